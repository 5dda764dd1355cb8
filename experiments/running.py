"""Run commands in parallel, each only once. They end when the study that started them ends. Not a command itself."""
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
from simplified_tinybert.common.workers import available_cores

# No time left: some commands take seconds, some hours.
BAR = "{desc}: {n_fmt} of {total_fmt} commands done, {elapsed}{postfix}"


@dataclass
class Command:
    """A command that makes `output`. It starts once all files in `needs` are complete.

    `after` is called when the output is complete, even if it was complete before.
    """
    name: str
    output: Path
    words: list[str] = field(repr=False)
    needs: list[Path] = field(default_factory=list)
    after: Callable[[], None] | None = None
    log_start: int = 0              # where this run begins in the log, in bytes

    def is_done(self, logs: Path) -> bool:
        """Return whether the output exists. Raises UserError if a different command made it."""
        made_by = logs / f"{self.name}.command.json"
        if not self.output.exists():
            with atomic_writer(made_by) as handle:
                json.dump(self.words, handle)
            return False
        try:
            before = json.loads(made_by.read_text(encoding="utf-8")) if made_by.is_file() else self.words
        except ValueError:
            raise UserError(f"{made_by}: is damaged; remove it, if {self.output} was made with the present "
                            f"settings") from None
        check_same(self.output, comparable(before), comparable(self.words))
        return True

    def start(self, logs: Path, threads: int, preexec: Callable[[], None] | None) -> subprocess.Popen:
        """Start the command in a new session, so that it does not get this process's Ctrl-C."""
        environment = {"OMP_NUM_THREADS": str(threads), "TQDM_MININTERVAL": "30", **os.environ}
        with open(logs / f"{self.name}.log", "ab") as log:
            self.log_start = log.tell()
            return subprocess.Popen(self.words, stdout=log, stderr=log, env=environment, start_new_session=True,
                                    preexec_fn=preexec)

    def warnings(self, logs: Path) -> list[str]:
        """The warnings that the command has printed since its start."""
        with open(logs / f"{self.name}.log", "rb") as log:
            log.seek(self.log_start)
            text = log.read().decode("utf-8", errors="replace").replace("\r", "\n")
        return [line[line.index("warning: "):] for line in text.splitlines() if "warning: " in line]    # after a bar

    def finish(self) -> None:
        if self.after:
            self.after()


def check_same(path: Path, before: list[str], now: list[str]) -> None:
    """Raise UserError if the command that made `path` differs from the present one."""
    if before != now:
        raise UserError(f"{path}: was made by another command; remove it and everything made from it, or choose "
                        f"another --output_dir\nthen {shlex.join(before)}\nnow  {shlex.join(now)}")


def comparable(words: list[str], named_paths: dict[str, Path] | None = None) -> list[str]:
    """Return a command without the parts that do not affect its output: interpreter, repository and device.

    Directories in `named_paths` are replaced by their names.
    """
    kept = [Path(words[1]).name, *words[2:]]            # words[1]: a script, or "-m" before a module's name
    kept = [word for before, word in zip(["", *kept], kept) if before != "--device"]
    for name, path in (named_paths or {}).items():
        kept = [name + word.removeprefix(str(path)) if word == str(path) or word.startswith(f"{path}{os.sep}")
                else word for word in kept]
    return kept


def run_all(title: str, commands: list[Command], jobs: int, logs: Path) -> None:
    """Run the commands that are not done yet, up to `jobs` at a time, each with its own log and share of the cores.

    Their warnings are printed, each only once. If a command fails, raises UserError with the end of its log. The other
    commands then get SIGTERM, as they do when this process ends, and save their state.
    """
    waiting, printed = [], set()
    for command in commands:
        if command.is_done(logs) and not {other.output for other in waiting} & set(command.needs):
            command.finish()
        else:
            waiting.append(command)
    die_with_parent = make_die_with_parent()
    running: list[tuple[Command, subprocess.Popen]] = []
    with tqdm(total=len(commands), initial=len(commands) - len(waiting), desc=title, bar_format=BAR) as progress:
        try:
            while waiting or running:
                unfinished = {command.output for command in (*waiting, *(command for command, _ in running))}
                ready = [command for command in waiting
                         if all(path.exists() and path not in unfinished for path in command.needs)]
                threads = max(1, available_cores() // max(1, min(jobs, len(running) + len(ready))))
                for command in ready[:jobs - len(running)]:
                    waiting.remove(command)
                    running.append((command, command.start(logs, threads, die_with_parent)))
                    progress.set_postfix_str(", ".join(command.name for command, _ in running))
                if not running:
                    raise UserError(f"{waiting[0].name} needs {waiting[0].needs}, which no command makes")
                for command, process in running[:]:
                    if process.poll() is not None:
                        running.remove((command, process))
                        progress.set_postfix_str(", ".join(command.name for command, _ in running))
                        check_success(command, process.returncode, logs / f"{command.name}.log")
                        print_new(command, logs, printed)
                        command.finish()
                        progress.update()
                time.sleep(0.1)
        finally:
            for _, process in running:
                process.terminate()
            for _, process in running:
                process.wait()


def print_new(command: Command, logs: Path, printed: set[str]) -> None:
    """Print the command's warnings that are not in `printed`, and add them to it."""
    for line in command.warnings(logs):
        if line not in printed:
            tqdm.write(f"{line} ({command.name})", file=sys.stderr)
        printed.add(line)


def make_die_with_parent() -> Callable[[], None] | None:
    """Return a function for child processes: it has Linux kill them when this process dies. None on other systems.

    An orphan would write to the same files as the command that replaces it.
    """
    if sys.platform != "linux":
        return None
    parent, libc = os.getpid(), ctypes.CDLL(None)       # nothing may be loaded between fork and exec

    def die_with_parent() -> None:
        libc.prctl(1, signal.SIGKILL)                   # 1: PR_SET_PDEATHSIG
        if os.getppid() != parent:                      # the parent died before prctl was called
            os._exit(1)
    return die_with_parent


def check_success(command: Command, code: int, log: Path) -> None:
    """Raise UserError with the last lines of the log if a command failed."""
    if code or not command.output.exists():
        text = log.read_bytes()[command.log_start:].decode("utf-8", errors="replace").replace("\r", "\n")
        hint = "; it was killed, perhaps because the memory was full (try --jobs 1)" if code == -signal.SIGKILL else ""
        last_lines = [line for line in text.splitlines() if line.strip() and "/s]" not in line][-12:]
        raise UserError("\n".join([
            f"{command.name} ended with exit code {code}{hint}: {shlex.join(command.words)}", *last_lines,
            f"full log: {log}; after fixing the cause, run the same study command to continue (with a new "
            f"--output_dir if the collection or the settings had to be changed)"]))
