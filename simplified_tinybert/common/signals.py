"""Handling of SIGINT (Ctrl-C) and SIGTERM (sent by the system, batch queues and torchrun)."""
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(BaseException):
    """Raised by SIGTERM, as KeyboardInterrupt is by SIGINT, so that unfinished files are cleaned up."""


def raise_on_sigterm() -> None:
    signal.signal(signal.SIGTERM, _terminate)


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)       # torchrun and batch queues repeat it, even during the clean-up
    raise Terminated


class StopRequests:
    """Context that records SIGINT or SIGTERM in `signal`, so that the current training step can be completed.

    A second signal stops immediately. With `ignore_repeats` it does not, because torchrun forwards signals that its
    processes have also received themselves.
    """

    def __init__(self, ignore_repeats: bool):
        self.signal, self.ignore_repeats, self.previous_handlers = 0, ignore_repeats, {}

    def __enter__(self) -> "StopRequests":
        self.previous_handlers = {number: signal.signal(number, self._record) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.signal and not self.ignore_repeats:
            raise_for(number)
        self.signal = self.signal or number


def raise_for(number: int) -> None:
    """Raise the exception of a signal that was recorded."""
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


@contextmanager
def signals_unhandled() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the process at once, without a clean-up: nothing may have been begun yet."""
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def signals_delayed() -> Iterator[None]:
    """Delay SIGINT and SIGTERM until the body has finished. Processes started in it never receive them."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)       # for this thread; others still receive them
    try:
        with StopRequests(ignore_repeats=True) as requests:
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if requests.signal:
        raise_for(requests.signal)
