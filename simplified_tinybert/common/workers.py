"""One function over a stream by several processes: results in order, memory bounded by one part for each process."""
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection

from simplified_tinybert.common.files import UserError
from simplified_tinybert.common.signals import ENDING, deaf_to_signals

MOST_WORKERS = 8


def default_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


def map_in_order(make: Callable[[], Callable], parts: Iterable, workers: int) -> Iterator:
    """Yield make()(part) of each part in order; each of `workers` processes calls `make` once.

    One worker means this process itself. `make`, parts and results must be picklable. Raises UserError if a process
    is lost.
    """
    if workers == 1:
        yield from map(make(), parts)
        return
    # Spawned, not forked: a copy of a process with threads, as numpy and tqdm have them, may lock up.
    context, connections, processes = multiprocessing.get_context("spawn"), [], []
    resource_tracker.ensure_running()       # else the first process starts it, after which Python lets signals in again
    try:
        with deaf_to_signals():             # a process whose parent ends while it starts would end in a traceback
            for _ in range(workers):
                connection, other_end = context.Pipe()
                process = context.Process(target=_serve, args=(other_end,), daemon=True)
                process.start()
                other_end.close()
                connections.append(connection)
                processes.append(process)
        for connection in connections:
            connection.send(make)
        busy = deque()
        for part, connection in zip(parts, cycle(connections)):
            if len(busy) == workers:        # the first to be busy is the next in turn: no process holds two parts
                yield _receive(busy.popleft())
            connection.send(part)
            busy.append(connection)
        while busy:
            yield _receive(busy.popleft())
    except (EOFError, ConnectionError) as error:
        raise UserError("a process that tokenizes ended too early, perhaps for want of memory; fewer need less: "
                        "--num_workers 1 of tokenize_to_features.py, or taskset -c 0 before the command") from error
    finally:
        for connection in connections:      # at the end of its connection a process ends
            connection.close()
        for process in processes:
            process.join()


def _serve(connection: Connection) -> None:
    for number in ENDING:                               # the first process gets them as well, and closes down
        signal.signal(number, signal.SIG_IGN)
    try:
        function = _receive(connection)()
        while True:
            connection.send(function(_receive(connection)))
    except (EOFError, ConnectionError):
        pass


def _receive(connection: Connection) -> object:
    """What comes next. Raises EOFError also where the other process ended in the middle of it."""
    try:
        return connection.recv()
    except OSError as error:
        raise EOFError from error
