"""Commands that run side by side, are not repeated, and end with the study that started them. Not a command."""
import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from simplified_tinybert.common.files import UserError, atomic_writer

LAST_LINES = 12             # of the log of a command that failed
PR_SET_PDEATHSIG = 1        # of prctl(2)


@dataclass
class Command:
    """A command, done when it has ended and its `output` exists; started when whatever makes what it `needs` is done.

    after: called when the output exists, also if it existed before.
    """
    name: str
    output: Path
    words: list[str] = field(repr=False)
    needs: list[Path] = field(default_factory=list)
    after: Callable[[], None] | None = None

    def is_done(self, logs: Path) -> bool:
        """Whether the output exists. Raises UserError if another command made it, one of other settings, say."""
        made_by = logs / f"{self.name}.command.json"
        if not self.output.exists():
            with atomic_writer(made_by) as handle:
                json.dump(self.words, handle)
            return False
        before = json.loads(made_by.read_text(encoding="utf-8")) if made_by.is_file() else self.words
        check_same(self.output, essence(before), essence(self.words))
        return True


def check_same(path: Path, before: list[str], now: list[str]) -> None:
    """Raise UserError if what is at `path` was made by another command."""
    if before != now:
        raise UserError(f"{path}: was made by another command; remove it and what was made of it, or name another "
                        f"--output_dir\nthen {shlex.join(before)}\nnow  {shlex.join(now)}")


def essence(words: list[str], places: dict[str, Path] | None = None) -> list[str]:
    """A command without what changes nothing of its output: Python, the repository, the device, and the `places`.

    A path in one of the places begins with the name of the place instead.
    """
    kept = [Path(words[1]).name, *words[2:]]            # "-m" before the name of a module
    kept = [word for before, word in zip(["", *kept], kept) if before != "--device"]
    for name, place in (places or {}).items():
        kept = [name + word.removeprefix(str(place)) if word == str(place) or word.startswith(f"{place}{os.sep}")
                else word for word in kept]
    return kept


def run_all(title: str, commands: list[Command], jobs: int, logs: Path) -> None:
    """Run what is not done yet, `jobs` commands at a time; each writes what it says to a log of its own.

    CPU threads are shared out evenly. Raises UserError with the end of the log when a command fails; the others are
    asked to end then, as they are when this process is: each saves what it has.
    """
    waiting = []
    for command in commands:
        if command.is_done(logs):
            finish(command)
        else:
            waiting.append(command)
    threads = max(1, (os.cpu_count() or 1) // max(1, min(jobs, len(waiting))))
    environment = {"OMP_NUM_THREADS": str(threads), "TQDM_MININTERVAL": "30", **os.environ}
    end_with_parent = ending_with(os.getpid())
    running: list[tuple[Command, subprocess.Popen]] = []
    with tqdm(total=len(commands), initial=len(commands) - len(waiting), desc=title, unit=" commands") as progress:
        try:
            while waiting or running:
                unfinished = {command.output for command in (*waiting, *(command for command, _ in running))}
                ready = [command for command in waiting
                         if all(path.exists() and path not in unfinished for path in command.needs)]
                for command in ready[:jobs - len(running)]:
                    waiting.remove(command)
                    with open(logs / f"{command.name}.log", "ab") as log:   # a session of its own: Ctrl-C is for us
                        running.append((command, subprocess.Popen(
                            command.words, stdout=log, stderr=log, env=environment, start_new_session=True,
                            preexec_fn=end_with_parent)))
                if not running:
                    raise UserError(f"{waiting[0].name} waits for {waiting[0].needs}, which nothing makes")
                for command, process in running[:]:
                    if process.poll() is not None:
                        running.remove((command, process))
                        check(command, process.returncode, logs / f"{command.name}.log")
                        finish(command)
                        progress.update()
                time.sleep(0.1)
        finally:
            for _, process in running:
                process.terminate()
            for _, process in running:
                process.wait()


def finish(command: Command) -> None:
    if command.after:
        command.after()


def ending_with(parent: int) -> Callable[[], None] | None:
    """What a new process calls to be killed when its parent is: an orphan would write beside its successor. On Linux.

    It goes on from its last checkpoint then, as after any other kill.
    """
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)                         # loaded here: not between fork and exec

    def call() -> None:
        library.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:                      # which was killed before that call
            os._exit(1)
    return call


def check(command: Command, code: int, log: Path) -> None:
    """Raise UserError if a command failed."""
    if code or not command.output.exists():
        text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
        said = [line for line in text.splitlines() if line.strip() and "/s]" not in line][-LAST_LINES:]
        raise UserError("\n".join([f"{command.name} ended with exit code {code}: {shlex.join(command.words)}", *said,
                                   f"the whole log is {log}; the same command continues from here once the cause is "
                                   f"mended"]))
