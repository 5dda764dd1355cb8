"""How a script ends when it is asked to: by Ctrl-C (SIGINT), or by the system or a batch queue (SIGTERM)."""
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM)


class Terminated(BaseException):
    """What SIGTERM raises, as SIGINT raises KeyboardInterrupt: so that half-written files are tidied away."""


def raise_on_sigterm() -> None:
    signal.signal(signal.SIGTERM, _terminate)


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)       # torchrun and batch queues repeat it: that must not end tidying
    raise Terminated


class StopRequests:
    """Context in which SIGINT and SIGTERM are noted in `signal` instead of ending the work in the middle of a step.

    One that comes a second time ends it at once, unless `patient`: torchrun passes on what its processes got already.
    """

    def __init__(self, patient: bool):
        self.signal, self.patient, self.former = 0, patient, {}

    def __enter__(self) -> "StopRequests":
        self.former = {number: signal.signal(number, self._note) for number in ENDING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal and not self.patient:
            end_by(number)
        self.signal = self.signal or number


def end_by(number: int) -> None:
    """Raise what a signal raises where it is not noted."""
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


@contextmanager
def deaf_to_signals() -> Iterator[None]:
    """SIGINT and SIGTERM take effect when the body is through; processes that it starts never hear them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)           # of this thread: others still note them
    try:
        with StopRequests(patient=True) as requests:
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if requests.signal:
        end_by(requests.signal)
