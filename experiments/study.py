"""What a study consists of: its settings, and commands that run side by side and are not repeated. Not a command."""
import json
import os
import re
import subprocess
import time
import tomllib
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path

from tqdm import tqdm

from simplified_tinybert.files import Problems, UserError, atomic_writer
from simplified_tinybert.measures import parse_measures

LAST_LINES = 12             # of the log of a command that failed
TRAININGS = ("warm_up", "teacher", "general", "student_warm_up", "distillation")


@dataclass
class Shape:
    """A student as shares of its teacher: (0.25, 0.5) of 12/768 is 3/384. `model`: a general student that is there."""
    learning_rates: list[float]
    general_learning_rate: float = 1e-4
    depth: float = 1.0
    width: float = 1.0
    model: str = ""


@dataclass
class Training:
    """How a model learns. `pairs` of examples are seen in all, but none more than `most_epochs` times.

    learning_rates: those of the teacher; students have their own.
    """
    pairs: int
    most_epochs: float
    batch_size: int
    flags: str
    learning_rates: list[float] = field(default_factory=list)
    validations: int = 1

    def epochs(self, examples: int) -> float:
        return min(self.most_epochs, self.pairs / examples)


@dataclass
class Settings:
    """The settings file: everything but collection, pre-trained model and machine."""
    seeds: list[int]
    measures: list[str]
    max_seq_length: int
    passages: str
    sampling: str
    dev_depth: int
    test_depth: int
    warm_up: Training
    teacher: Training
    general: Training
    student_warm_up: Training
    distillation: Training
    students: dict[str, Shape]
    methods: dict[str, str]
    proposed: str

    def problems(self, path: Path, problems: Problems) -> None:
        """Add what cannot work to `problems`."""
        if self.proposed not in self.methods:
            problems.add(f"{path}: proposed = {self.proposed!r} is none of the methods ({', '.join(self.methods)})")
        if len({slug(name) for name in self.methods}) < len(self.methods):
            problems.add(f"{path}: methods: two names differ in signs alone; folders have letters and digits only")
        for name in ("seeds", "measures", "students", "methods"):
            if not getattr(self, name):
                problems.add(f"{path}: {name} is empty")
        for name in ("max_seq_length", "dev_depth", "test_depth"):
            if getattr(self, name) < 1:
                problems.add(f"{path}: {name} = {getattr(self, name)}: expected 1 or more")
        for name in TRAININGS:
            training = getattr(self, name)
            if min(training.batch_size, training.validations) < 1 or min(training.most_epochs, training.pairs) <= 0:
                if "warm_up" not in name or training.pairs:     # which may be left out
                    problems.add(f"{path}: {name}: expected pairs, most_epochs, batch_size and validations above 0")
            if not isinstance(training.flags, str):
                problems.add(f"{path}: {name}: flags = {training.flags!r}: expected a text: \"--padding masked\"")
        trained = {"warm_up": self.warm_up, "teacher": self.teacher} | self.students
        for name, each in trained.items():
            if not each.learning_rates or min(each.learning_rates) <= 0:
                problems.add(f"{path}: {name}: expected one of learning_rates or more, above 0")
        for name, shape in self.students.items():
            if not (0 < shape.depth <= 1 and 0 < shape.width <= 1):
                problems.add(f"{path}: students.{name}: expected shares of the teacher's depth and width, above 0 to 1")
        parse_measures(self.measures, 1, problems)


def read_settings(path: Path, problems: Problems) -> Settings | None:
    """Settings of a TOML file; what is wrong with it is added to `problems`."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        for name in TRAININGS:
            content[name] = Training(**content[name])
        content["students"] = {name: Shape(**shape) for name, shape in content["students"].items()}
        settings = Settings(**content)
    except OSError as error:
        problems.add(f"{path}: cannot read the settings: {error.strerror}")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problems.add(f"{path}: is not TOML: {error}")
    except (KeyError, TypeError) as error:
        problems.add(f"{path}: {error}; expected the keys of experiments/small.toml")
    else:
        try:
            settings.problems(path, problems)
            return settings
        except TypeError as error:
            problems.add(f"{path}: a value is of a wrong kind ({error}); compare it with experiments/small.toml")
    return None


def frozen(settings: Settings, facts: dict[str, str]) -> dict[str, object]:
    """What a study cannot go on with if it changes: the settings that commands were made of, by their names.

    Seeds, learning rates, measures and the proposed method may change, students and methods may be added.
    """
    free = {"seeds", "measures", "proposed"}
    flat = dict(facts)
    for name, value in asdict(settings).items():
        if name not in free:
            flat |= {f"{name}.{key}": each for key, each in value.items() if key != "learning_rates"} if isinstance(
                value, dict) else {name: value}
    return flat


def keep_settings(path: Path, settings: Settings, facts: dict[str, str]) -> None:
    """Note what the study is made with, or raise UserError if it was begun with something else."""
    now = frozen(settings, facts)
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    changed = [f"{name} was {old!r}, is {now.get(name)!r}" for name, old in before.items() if old != now.get(name)]
    if changed:
        raise UserError(f"{path.parent}: was begun with other settings: {'; '.join(changed)}; name another "
                        f"--output_dir, or remove what was made with the old ones, and {path}")
    with atomic_writer(path) as handle:
        json.dump(now, handle, indent=1)


@dataclass
class Step:
    """A command, done when `output`, which it writes as its last, is there; started when all that it `needs` is."""
    name: str
    output: Path
    command: list[str] = field(repr=False)
    needs: list[Path] = field(default_factory=list)


def run_all(title: str, steps: list[Step], jobs: int, logs: Path) -> None:
    """Run what is not done yet, `jobs` commands at a time; each writes what it says to a log of its own.

    CPU threads are shared out evenly. Raises UserError with the end of the log when a command fails; the others are
    asked to end then, as they are when this process is: each saves what it has.
    """
    waiting = [step for step in steps if not step.output.exists()]
    threads = max(1, (os.cpu_count() or 1) // max(1, min(jobs, len(waiting))))
    environment = {"OMP_NUM_THREADS": str(threads), "TQDM_MININTERVAL": "30", **os.environ}
    running: dict[int, tuple[Step, subprocess.Popen]] = {}
    with tqdm(total=len(steps), initial=len(steps) - len(waiting), desc=title, unit=" commands") as progress:
        try:
            while waiting or running:
                ready = [step for step in waiting if all(path.exists() for path in step.needs)]
                for step in ready[:jobs - len(running)]:
                    waiting.remove(step)
                    with open(logs / f"{step.name}.log", "ab") as log:
                        process = subprocess.Popen(step.command, stdout=log, stderr=log, env=environment)
                    running[process.pid] = step, process
                for pid, (step, process) in list(running.items()):
                    if process.poll() is not None:
                        del running[pid]
                        check(step, process.returncode, logs / f"{step.name}.log")
                        progress.update()
                time.sleep(0.1)
        finally:
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.wait()


def check(step: Step, code: int, log: Path) -> None:
    """Raise UserError if a command failed."""
    if code or not step.output.exists():
        end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])
        raise UserError(f"{step.name} ended with exit code {code}; its command: {' '.join(step.command)}\n{end}\n"
                        f"all of it is in {log}; the same command goes on from here once the cause is mended")


def slug(name: str) -> str:
    """A name as part of a file's: letters and digits."""
    return re.sub(r"\W+", "-", name)


def divisor_at_least(number: int, least: float) -> int:
    """The smallest divisor of `number` that is no less than `least`: layers that can be mapped evenly."""
    return next(each for each in range(max(1, ceil(least)), number + 1) if number % each == 0)
