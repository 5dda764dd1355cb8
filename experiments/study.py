"""What a study consists of: its settings, and commands that run side by side and are not repeated. Not a command."""
import json
import os
import re
import shlex
import subprocess
import time
import tomllib
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

from tqdm import tqdm

from simplified_tinybert.common.text import read_text
from simplified_tinybert.files import Problems, UserError, atomic_writer
from simplified_tinybert.measures import parse_measures

LAST_LINES = 12             # of the log of a command that failed
# Flags that follow from other settings
OWN = {"--learning_rate", "--seed", "--num_train_epochs", "--intermediate_epochs", "--train_batch_size", "--eval_step",
       "--gradient_accumulation_steps", "--resume", "--device", "--output_student_dir", "--teacher_model", "--depth"}
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

    learning_rates: the one of the warm-up, those that are tried for the teacher; students have their own.
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
        if len(set(self.seeds)) < len(self.seeds) or any(type(seed) is not int or seed < 0 for seed in self.seeds):
            problems.add(f"{path}: seeds = {self.seeds}: expected whole numbers from 0, each once")
        for name in TRAININGS:
            training = getattr(self, name)
            least = 0 if "warm_up" in name else 1               # which may be left out
            counts = training.batch_size, training.validations, training.pairs - least + 1
            if min(counts) < 1 or training.most_epochs <= 0:
                problems.add(f"{path}: {name}: expected pairs, most_epochs, batch_size and validations above 0")
        texts = {"passages": self.passages, "sampling": self.sampling} | {
            f"methods.{name}": flags for name, flags in self.methods.items()} | {
            f"{name}.flags": getattr(self, name).flags for name in TRAININGS}
        for name, text in texts.items():
            words = text.split() if isinstance(text, str) else [None]
            if wrong := [word for word in words if word is None or word in OWN or re.match("--.*=", word)]:
                problems.add(f"{path}: {name} = {text!r}: expected a text of flags, each as \"--flag value\", and none "
                             f"that the study sets itself ({wrong[0]})")
        if len(self.warm_up.learning_rates) != 1:
            problems.add(f"{path}: warm_up: expected one learning rate; the dev queries cannot choose it")
        for name, each in ({"warm_up": self.warm_up, "teacher": self.teacher} | self.students).items():
            rates = each.learning_rates
            if not rates or min(rates) <= 0 or len(set(rates)) < len(rates):
                problems.add(f"{path}: {name}: learning_rates = {rates}: expected one or more above 0, each once")
        for name, shape in self.students.items():
            if not (0 < shape.depth <= 1 and 0 < shape.width <= 1):
                problems.add(f"{path}: students.{name}: expected shares of the teacher's depth and width, above 0 to 1")
            elif shape.depth == shape.width == 1 and not shape.model:
                problems.add(f"{path}: students.{name}: is as large as the teacher; take a share of depth or width")
        self.measures = list(map(str, parse_measures(self.measures, 1, problems)))


def read_settings(path: Path, problems: Problems) -> Settings | None:
    """Settings of a TOML file; what is wrong with it is added to `problems`.

    like = "other.toml" takes over what this file does not say itself.
    """
    try:
        content = read_toml(path)
        for name in TRAININGS:
            content[name] = Training(**content[name])
        content["students"] = {name: Shape(**shape) for name, shape in content["students"].items()}
        settings = Settings(**content)
    except OSError as error:
        problems.add(f"{path}: cannot read the settings: {error.strerror}")
    except UserError as error:
        problems.add(str(error))
    except tomllib.TOMLDecodeError as error:
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


def read_toml(path: Path) -> dict:
    """The file's content, in that of the file that it is `like`, if any."""
    own = tomllib.loads(read_text(path))
    merged = read_toml(path.parent / own.pop("like")) if "like" in own else {}
    for name, value in own.items():
        merged[name] = merged.get(name, {}) | value if isinstance(value, dict) else value
    return merged


def keep_facts(path: Path, facts: dict[str, object]) -> None:
    """Note what a study is made of, or raise UserError if it was begun with something else."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else facts
    changed = [f"{name} was {old!r}, is {facts.get(name)!r}" for name, old in before.items() if old != facts.get(name)]
    if changed:
        raise UserError(f"{path.parent}: was begun with other inputs: {'; '.join(changed)}; name another --output_dir, "
                        f"or remove what was made of the old ones, and {path}")
    with atomic_writer(path) as handle:
        json.dump(facts, handle, indent=1)


@dataclass
class Step:
    """A command, done when its `output` is there; started when all that it `needs` is."""
    name: str
    output: Path
    command: list[str] = field(repr=False)
    needs: list[Path] = field(default_factory=list)

    def is_done(self, logs: Path) -> bool:
        """Whether the output is there. Raises UserError if it was made by another command, of other settings, say."""
        made_by = logs / f"{self.name}.command.json"
        if not self.output.exists():
            with atomic_writer(made_by) as handle:
                json.dump(self.command, handle)
            return False
        before = json.loads(made_by.read_text(encoding="utf-8")) if made_by.is_file() else self.command
        if essence(before) != essence(self.command):
            raise UserError(f"{self.output}: was made by another command; remove it and what was made of it, or name "
                            f"another --output_dir\nthen {shlex.join(before)}\nnow  {shlex.join(self.command)}")
        return True


def essence(command: list[str]) -> list[str]:
    """A command without where Python, this repository and the device are, which change nothing of what it makes."""
    words = [Path(command[1]).name, *command[2:]]
    return [word for before, word in zip(["", *words], words) if before != "--device"]


def run_all(title: str, steps: list[Step], jobs: int, logs: Path) -> None:
    """Run what is not done yet, `jobs` commands at a time; each writes what it says to a log of its own.

    CPU threads are shared out evenly. Raises UserError with the end of the log when a command fails; the others are
    asked to end then, as they are when this process is: each saves what it has.
    """
    waiting = [step for step in steps if not step.is_done(logs)]
    threads = max(1, (os.cpu_count() or 1) // max(1, min(jobs, len(waiting))))
    environment = {"OMP_NUM_THREADS": str(threads), "TQDM_MININTERVAL": "30", **os.environ}
    running: list[tuple[Step, subprocess.Popen]] = []
    with tqdm(total=len(steps), initial=len(steps) - len(waiting), desc=title, unit=" commands") as progress:
        try:
            while waiting or running:
                ready = [step for step in waiting if all(path.exists() for path in step.needs)]
                for step in ready[:jobs - len(running)]:
                    waiting.remove(step)
                    with open(logs / f"{step.name}.log", "ab") as log:      # a session of its own: Ctrl-C is for us
                        running.append((step, subprocess.Popen(step.command, stdout=log, stderr=log, env=environment,
                                                               start_new_session=True)))
                if not running:
                    raise UserError(f"{waiting[0].name} waits for {waiting[0].needs}, which nothing makes")
                for step, process in running[:]:
                    if process.poll() is not None:
                        running.remove((step, process))
                        check(step, process.returncode, logs / f"{step.name}.log")
                        progress.update()
                time.sleep(0.1)
        finally:
            for _, process in running:
                process.terminate()
            for _, process in running:
                process.wait()


def check(step: Step, code: int, log: Path) -> None:
    """Raise UserError if a command failed."""
    if code or not step.output.exists():
        text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
        said = [line for line in text.splitlines() if line.strip() and "/s]" not in line][-LAST_LINES:]
        raise UserError("\n".join([f"{step.name} ended with exit code {code}: {shlex.join(step.command)}", *said,
                                   f"all it said is in {log}; the same command goes on from here once the cause is "
                                   f"mended"]))


def slug(name: str) -> str:
    """A name as part of a file's: letters and digits."""
    return re.sub(r"\W+", "-", name)


def divisor_at_least(number: int, least: float) -> int:
    """The smallest divisor of `number` that is no less than `least`: layers that can be mapped evenly."""
    return next(each for each in range(max(1, ceil(least)), number + 1) if number % each == 0)
