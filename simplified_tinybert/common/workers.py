"""Apply a function to a stream of items in several processes. Results are in order; each process holds one item."""
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection

from simplified_tinybert.common.files import UserError
from simplified_tinybert.common.signals import STOP_SIGNALS, signals_delayed

MAX_WORKERS = 8


def available_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    return min(available_cores(), MAX_WORKERS)


def map_in_order(make_function: Callable[[], Callable], items: Iterable, workers: int) -> Iterator:
    """Yield make_function()(item) for each item, in order. Each worker process calls `make_function` once.

    With one worker, everything runs in this process. `make_function`, items and results must be picklable. Raises
    UserError if a worker dies.
    """
    if workers == 1:
        yield from map(make_function(), items)
        return
    # Spawn, not fork: NumPy and tqdm start threads, and a forked copy of a process with threads can deadlock.
    context, connections, processes = multiprocessing.get_context("spawn"), [], []
    resource_tracker.ensure_running()       # otherwise the first start() does this, and unblocks signals
    try:
        with signals_delayed():             # a worker whose parent dies during start-up would print a traceback
            for _ in range(workers):
                connection, worker_end = context.Pipe()
                process = context.Process(target=_serve, args=(worker_end,), daemon=True)
                process.start()
                worker_end.close()
                connections.append(connection)
                processes.append(process)
        for connection in connections:
            connection.send(make_function)
        busy = deque()
        for item, connection in zip(items, cycle(connections)):
            if len(busy) == workers:        # round robin: the worker that has been busy longest gets this item
                yield _receive(busy.popleft())
            connection.send(item)
            busy.append(connection)
        while busy:
            yield _receive(busy.popleft())
    except (EOFError, ConnectionError) as error:
        raise UserError("a tokenization process died, perhaps because memory ran out; use fewer processes: "
                        "--num_workers 1 of tokenize_to_features.py, or taskset -c 0 before the command") from error
    finally:
        for connection in connections:      # a worker exits when its connection is closed
            connection.close()
        for process in processes:
            process.join()


def _serve(connection: Connection) -> None:
    for number in STOP_SIGNALS:             # the parent receives them too, and stops the workers
        signal.signal(number, signal.SIG_IGN)
    try:
        function = _receive(connection)()
        while True:
            connection.send(function(_receive(connection)))
    except (EOFError, ConnectionError):
        pass


def _receive(connection: Connection) -> object:
    """Receive the next object. Raises EOFError if the other process died, even in the middle of a message."""
    try:
        return connection.recv()
    except OSError as error:
        raise EOFError from error
