"""Atomic output files, and one way to report input errors. (common/text.py reads text files.)

Readers collect errors in `Problems` and raise them together. Writers use `atomic_writer` or `new_directory`. Scripts
end in `run_main`, which turns a `UserError` into a message and exit code 2.
"""
import argparse
import io
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import IO

from simplified_tinybert.common.signals import Terminated, raise_on_sigterm

SECONDS_PER_RANK = 5


class UserError(Exception):
    """An error that the user can fix. The message says what was found, what was expected and what to do."""


class Problems:
    """Input errors, collected so that one run reports all of them. The first `limit` are kept, the others counted."""

    def __init__(self, limit: int = 20):
        self.limit, self.count, self.messages = limit, 0, []

    def add(self, message: str) -> None:
        self.count += 1
        if self.count <= self.limit:
            self.messages.append(message)

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Add a UserError of the body to the problems instead of raising it."""
        try:
            yield
        except UserError as error:
            self.add(str(error))

    def raise_if_any(self) -> None:
        if self.count > self.limit:
            self.messages.append(f"... and {self.count - self.limit} more problems")
        if self.messages:
            raise UserError("\n".join(self.messages))


def check_ranges(args: argparse.Namespace, problems: Problems, rules: list[tuple[str, bool, str]]) -> None:
    """Add a problem for each flag that is out of range. rules: (flag, condition that must hold, expected value)."""
    for name, holds, expected in rules:
        if not holds:
            problems.add(f"--{name} {getattr(args, name)}: expected {expected}")


def run_main(main: Callable[[], None], distributed: bool = False) -> None:
    """Run a script's main. A UserError or OSError prints one message on stderr and exits with code 2.

    With `distributed`, torchrun may have started several processes. Rank 0 prints directly. Every other rank buffers
    its output and prints it only if it fails, after a delay that grows with its local rank: if another rank has printed
    the same error, torchrun kills this one first. A rank that torchrun has not killed by then prints its own error.
    """
    raise_on_sigterm()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):        # \xNN for characters that an ASCII or Latin-1 terminal lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        rank = process_number("RANK") if distributed else 0
    except UserError as error:
        sys.exit(_print_error(str(error)))
    if rank == 0:
        code = _exit_code(main)
    else:
        with redirect_stderr(io.StringIO()) as output, redirect_stdout(output):
            code = _exit_code(main)
        if code == 2:
            with suppress(Terminated):
                time.sleep(SECONDS_PER_RANK * process_number("LOCAL_RANK"))
                sys.stderr.write(output.getvalue())
    if code:
        sys.exit(code)


def _exit_code(main: Callable[[], None]) -> int:
    try:
        main()
    except UserError as error:
        return _print_error(str(error))
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        return _print_error(f"{name}{error.strerror or error}")
    except (KeyboardInterrupt, Terminated) as error:
        name, code = ("terminated", 143) if isinstance(error, Terminated) else ("interrupted", 130)
        say(name)
        return code
    except SystemExit as exit_:                         # argparse has printed its message
        return exit_.code
    return 0


def process_count() -> int:
    """Number of processes in this job, from torchrun's environment variables; 1 without them."""
    return _environment_number("WORLD_SIZE", 1)


def process_number(variable: str) -> int:
    """Rank of this process in its job (RANK) or on its machine (LOCAL_RANK), from 0."""
    return _environment_number(variable, 0) if process_count() > 1 else 0


def _environment_number(variable: str, default: int) -> int:
    value = os.environ.get(variable) or str(default)
    if not value.isdecimal():
        raise UserError(f"{variable}={value} in the environment: expected a number, as torchrun sets it; unset it to "
                        f"run one process")
    return int(value)


def _print_error(message: str) -> int:
    for line in message.splitlines():
        say(f"error: {line}")
    return 2


def shorten(text: str, width: int = 60) -> str:
    """Return a value for an error message: quoted, control characters escaped, at most `width` characters."""
    quoted = repr(text)
    return quoted if len(quoted) <= width else quoted[:width - 4] + "...'"


def reason(error: BaseException, width: int = 300) -> str:
    """Return the first line of a library's error message. If it ends in a colon, the next line is added."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    end = next((number for number, line in enumerate(lines, start=1) if not line.endswith(":")), len(lines))
    return " ".join(lines[:end])[:width] or type(error).__name__


def say(message: str) -> None:
    """Print a message on stderr; stdout is for results."""
    print(message, file=sys.stderr)


def warn(message: str) -> None:
    say(f"warning: {message}")


def check_input_file(path: Path, problems: Problems, what: str, read_twice: bool = False) -> bool:
    """Return whether `path` can be opened; if not, the reason is added to `problems`.

    A pipe is not opened: opening would block until a writer appears, and closing could kill that writer.
    """
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        if read_twice:
            problems.add(f"{path}: is not a regular file, but the {what} must be read twice; save them to a file")
        return not read_twice
    try:
        open(path, "rb").close()
    except OSError as error:
        problems.add(f"{path}: cannot read the {what}: {error.strerror}")
        return False
    return True


def check_output_file(path: Path, problems: Problems, inputs: Collection[Path] = ()) -> None:
    """Report an output path that cannot be written or is also an input."""
    if path.is_dir():
        problems.add(f"{path}: is a directory; name a file to write")
    elif path.exists() and not path.is_file():
        problems.add(f"{path}: is a device or a pipe; name a file to write")
    elif not path.parent.is_dir():
        problems.add(f"{path}: its directory does not exist; create it first: mkdir -p {path.parent}")
    elif not os.access(path.parent, os.W_OK):
        problems.add(f"{path}: its directory is not writable")
    elif path.resolve() in [other.resolve() for other in inputs]:
        problems.add(f"{path}: is also an input; name another output")


def check_output_files(paths: Collection[Path], problems: Problems, inputs: Collection[Path] = ()) -> None:
    """Check output files of one directory, only up to the first error, because most errors concern the directory."""
    before = problems.count
    for path in paths:
        if problems.count == before:
            check_output_file(path, problems, inputs)


@contextmanager
def atomic_writer(path: Path | str, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file for writing; sync it and rename it to `path` when the body has succeeded.

    If the body raises, the temporary file is removed and `path` stays unchanged. Symbolic links are followed. Text is
    written in UTF-8; surrogates, as in file names that are not UTF-8, are written as \\xNN.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"}
    try:
        with name_in_errors(path), open(temporary, mode, **text) as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """Create a temporary directory. Rename it to `directory` when the body has succeeded, else remove it.

    If another job creates `directory` in the meantime, that directory is kept.
    """
    temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")      # process ids repeat across machines
    temporary.mkdir(parents=True)
    try:
        yield temporary
        try:
            os.rename(temporary, directory)
        except OSError:
            if not directory.is_dir():
                raise
        sync_directory(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """Add a file name to an OSError that has none: the error of a full disk does not name the file."""
    try:
        yield
    except OSError as error:
        if not error.filename:
            error.strerror = error.strerror or f"{error}; is the disk full?"      # NumPy sets no strerror
            error.filename = str(path)
        raise


def sync_directory(directory: Path) -> None:
    """Flush a directory to disk, so that a rename in it survives a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
