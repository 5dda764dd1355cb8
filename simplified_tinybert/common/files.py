"""Whole files out, and one way to tell a user what is wrong. (Text files in: common/text.py.)

Every reader collects its complaints in a `Problems` list and raises them together; every writer goes through
`atomic_writer`; every script ends in `run_main`, which turns a `UserError` into a message and exit code 2.
"""
import fcntl
import io
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import IO

from simplified_tinybert.common.signals import Terminated, raise_on_sigterm

PATIENCE = 5            # seconds


class UserError(Exception):
    """A mistake the user can mend: the message says what was found, what was expected and the way out."""


class Problems:
    """Complaints about the input, kept up to `limit` and raised all at once, so that one run shows them all."""

    def __init__(self, limit: int = 20):
        self.limit, self.count, self.messages = limit, 0, []

    def add(self, message: str) -> None:
        self.count += 1
        if self.count <= self.limit:
            self.messages.append(message)

    def raise_if_any(self) -> None:
        if self.count > self.limit:
            self.messages.append(f"... and {self.count - self.limit} more problems")
        if self.messages:
            raise UserError("\n".join(self.messages))


def run_main(main: Callable[[], None], several: bool = False) -> None:
    """Run a script's main; a user's mistake or a failing disk ends in one message on stderr and exit code 2.

    With `several` the script may run in several processes that torchrun started. Of these the first speaks for all.
    Another one keeps what it has to say until it fails, and says it then if it is the first of its machine. The rest
    wait one after the other: who met the same mistake before has told it, and torchrun ends them. Who is not ended by
    then was alone with it, and speaks.
    """
    raise_on_sigterm()
    show_what_can_be_shown()
    try:
        rank = process_number("RANK") if several else 0
    except UserError as error:
        sys.exit(_tell(str(error)))
    if rank == 0:
        code = _exit_code(main)
    else:
        with redirect_stderr(io.StringIO()) as told, redirect_stdout(told):
            code = _exit_code(main)
        if code == 2:
            with suppress(Terminated):                  # by torchrun, for the first has spoken
                time.sleep(PATIENCE * process_number("LOCAL_RANK"))
                sys.stderr.write(told.getvalue())
    if code:
        sys.exit(code)


def show_what_can_be_shown() -> None:
    """Write \\xNN for a character that stdout's encoding lacks (ASCII, Latin-1), as stderr always does."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _exit_code(main: Callable[[], None]) -> int:
    try:
        main()
    except UserError as error:
        return _tell(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _tell(f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except Terminated:
        say("terminated")
        return 143
    except SystemExit as ended:                         # of argparse, after its message
        return ended.code
    return 0


def process_count() -> int:
    """Processes of this job: more than 1 only if torchrun, or whatever sets its variables, started several."""
    return _whole_number("WORLD_SIZE", 1)


def process_number(variable: str) -> int:
    """Number of this process among those of its job (RANK) or of its machine (LOCAL_RANK), from 0."""
    return _whole_number(variable, 0) if process_count() > 1 else 0


def _whole_number(variable: str, otherwise: int) -> int:
    value = os.environ.get(variable) or str(otherwise)
    if not value.isdecimal():
        raise UserError(f"{variable}={value} in the environment: expected a number, as torchrun sets it; unset it to "
                        f"run one process")
    return int(value)


def _tell(message: str) -> int:
    for line in message.splitlines():
        say(f"error: {line}")
    return 2


def shorten(text: str, width: int = 60) -> str:
    """A value as it can stand in an error message: quoted, control characters escaped, cut."""
    quoted = repr(text)
    return quoted if len(quoted) <= width else quoted[:width - 4] + "...'"


def reason(error: BaseException, width: int = 300) -> str:
    """What an error of a library says, in one line: the first, and those that it announces by a colon at its end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    end = next((number for number, line in enumerate(lines, start=1) if not line.endswith(":")), len(lines))
    return " ".join(lines[:end])[:width] or type(error).__name__


def say(message: str) -> None:
    """Tell the user something: on stderr, for stdout belongs to results."""
    print(message, file=sys.stderr)


def warn(message: str) -> None:
    say(f"warning: {message}")


def check_input_file(path: Path, problems: Problems, what: str, read_twice: bool = False) -> bool:
    """True if `path` is a file that can be opened; otherwise the reason is added to `problems`.

    A pipe is not opened: that waits for whoever writes to it, and closing it again may end that one.
    """
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        if read_twice:
            problems.add(f"{path}: is not a plain file, but the {what} have to be read twice; write them to a file "
                         f"first")
        return not read_twice
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        problems.add(f"{path}: cannot read the {what}: {error.strerror}")
        return False
    return True


def check_output_file(path: Path, problems: Problems, inputs: Collection[Path] = ()) -> None:
    """Complain about an output that could not be written, or is an input, before any work is spent on it."""
    directory = path.parent
    if path.is_dir():
        problems.add(f"{path}: is a directory; name a file to write")
    elif path.exists() and not path.is_file():
        problems.add(f"{path}: is a device or a pipe, which would be replaced; name a file to write")
    elif not directory.is_dir():
        problems.add(f"{path}: its directory does not exist; make it first: mkdir -p {directory}")
    elif not os.access(directory, os.W_OK):
        problems.add(f"{path}: its directory is not writable")
    elif path.resolve() in [other.resolve() for other in inputs]:
        problems.add(f"{path}: is an input as well; name another output")


def check_output_files(paths: Collection[Path], problems: Problems, inputs: Collection[Path] = ()) -> None:
    """The same for several files of a directory, up to the first complaint: most are about the directory."""
    before = problems.count
    for path in paths:
        if problems.count == before:
            check_output_file(path, problems, inputs)


@contextmanager
def atomic_writer(path: Path | str, mode: str = "w") -> Iterator[IO]:
    """Open a file that appears under its name only when it is complete: write aside, sync, rename.

    If the body raises, the unfinished file is removed and whatever stood at `path` stays as it was. A link is followed.
    Text is written in UTF-8; what that cannot hold, such as the name of a file that is not UTF-8, as \\xNN.
    """
    path = Path(os.path.realpath(path))
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"}
    try:
        with name_in_errors(path), open(aside, mode, **text) as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """Give an OSError of the body the name of the file that is written there: a full disk does not say where."""
    try:
        yield
    except OSError as error:
        if not error.filename:
            error.strerror = error.strerror or f"{error}; is the disk full?"      # NumPy's has words but no number
            error.filename = str(path)
        raise


def sync_directory(directory: Path) -> None:
    """Make a rename inside `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes of this tool from writing at `path` (a file or a directory). Raises UserError if one does."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{path}: another process is writing here; wait for it, or name another output") from error
        except OSError:                                 # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)
