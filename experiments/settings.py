"""What a study consists of: its settings file. Not a command."""
import json
import re
import tomllib
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path

from simplified_tinybert.common.files import Problems, UserError, atomic_writer
from simplified_tinybert.common.text import read_text
from simplified_tinybert.ranking.measures import parse_measures

# Flags that follow from other settings
OWN = {"--learning_rate", "--seed", "--num_train_epochs", "--intermediate_epochs", "--train_batch_size", "--eval_step",
       "--gradient_accumulation_steps", "--resume", "--device", "--output_student_dir", "--teacher_model", "--depth"}
TRAININGS = ("warm_up", "teacher", "general", "student_warm_up", "distillation")


@dataclass
class Shape:
    """A student as shares of its teacher: (0.25, 0.5) of 12/768 is 3/384. `model`: a general student that exists.

    flags: of general_distill.py for this shape, after those of [general].
    """
    learning_rates: list[float]
    general_learning_rate: float = 1e-4
    depth: float = 1.0
    width: float = 1.0
    model: str = ""
    flags: str = ""


@dataclass
class Training:
    """How a model learns. `pairs` of examples are seen in all, but none more than `most_epochs` times.

    learning_rates: the one of the warm-up, those that are tried for the teacher; students have their own.
    seeds: of the teacher. The first teaches; the others show how much the teacher depends on its seed.
    """
    pairs: int
    most_epochs: float
    batch_size: int
    flags: str
    learning_rates: list[float] = field(default_factory=list)
    validations: int = 1
    seeds: list[int] = field(default_factory=lambda: [42])

    def epochs(self, examples: int) -> float:
        return min(self.most_epochs, self.pairs / examples)

    def of(self, learning_rate: float, seed: int) -> "Training":
        """This training with one learning rate and one seed."""
        return replace(self, learning_rates=[learning_rate], seeds=[seed])


@dataclass
class Tuning:
    """How a method's learning rate is chosen, with the first seed.

    epochs: passes over the training pairs of each trial; 0: the whole budget: the trial is the first seed's run.
    extensions: learning rates beyond the given ones that are tried on a side if the best is at that edge.
    """
    epochs: float = 0.0
    extensions: int = 2


@dataclass
class Step:
    """A part of the study, finished and tested before the next: some students by some methods, or other teachers."""
    students: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    teachers: bool = False          # those of the seeds after the first


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
    tuning: Tuning = field(default_factory=Tuning)
    steps: list[Step] = field(default_factory=list)         # default: all students by all methods
    titles: dict[str, str] = field(default_factory=dict)    # of methods, in tables

    def __post_init__(self) -> None:
        self.steps = self.steps or [Step(list(self.students), list(self.methods))]
        if len(self.teacher.seeds) > 1 and not any(step.teachers for step in self.steps):
            self.steps.append(Step(teachers=True))

    def problems(self, path: Path, problems: Problems) -> None:
        """Add what cannot work to `problems`."""
        if self.proposed not in self.methods:
            problems.add(f"{path}: proposed = {self.proposed!r} is none of the methods ({', '.join(self.methods)})")
        if len({slug(name) for name in self.methods}) < len(self.methods):
            problems.add(f"{path}: methods: two names differ in signs alone; directories have letters and digits only")
        for name in ("seeds", "measures", "students", "methods"):
            if not getattr(self, name):
                problems.add(f"{path}: {name} is empty")
        for step in self.steps:
            unknown = sorted({*step.students} - {*self.students} | {*step.methods} - {*self.methods})
            if unknown or not (step.teachers or step.students and step.methods):
                problems.add(f"{path}: steps: expected students and methods of this file, or teachers = true; found "
                             f"{unknown or step}")
        if unknown := sorted({*self.titles} - {*self.methods}):
            problems.add(f"{path}: titles: {unknown} are none of the methods")
        if self.tuning.epochs < 0 or self.tuning.extensions < 0:
            problems.add(f"{path}: tuning: expected epochs and extensions of 0 or more")
        for name in ("max_seq_length", "dev_depth", "test_depth"):
            if getattr(self, name) < 1:
                problems.add(f"{path}: {name} = {getattr(self, name)}: expected 1 or more")
        for name, seeds in (("seeds", self.seeds), ("teacher.seeds", self.teacher.seeds)):
            if len(set(seeds)) < len(seeds) or any(type(seed) is not int or seed < 0 for seed in seeds) or not seeds:
                problems.add(f"{path}: {name} = {seeds}: expected whole numbers from 0, each once")
        for name in TRAININGS:
            training = getattr(self, name)
            least = 0 if "warm_up" in name else 1               # which may be left out
            counts = training.batch_size, training.validations, training.pairs - least + 1
            if min(counts) < 1 or training.most_epochs <= 0:
                problems.add(f"{path}: {name}: expected pairs, most_epochs, batch_size and validations above 0")
        texts = {"passages": self.passages, "sampling": self.sampling} | {
            f"methods.{name}": flags for name, flags in self.methods.items()} | {
            f"{name}.flags": getattr(self, name).flags for name in TRAININGS} | {
            f"students.{name}.flags": shape.flags for name, shape in self.students.items()}
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
        content["tuning"] = Tuning(**content.get("tuning", {}))
        content["steps"] = [Step(**step) for step in content.get("steps", [])]
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


def keep_inputs(path: Path, facts: dict[str, object]) -> None:
    """Note what a study is made of, or raise UserError if it was begun with something else."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else facts
    changed = [f"{name} was {old!r}, is {facts.get(name)!r}" for name, old in before.items() if old != facts.get(name)]
    if changed:
        raise UserError(f"{path.parent}: was begun with other inputs: {'; '.join(changed)}; name another --output_dir, "
                        f"or remove what was made of the old ones, and {path}")
    with atomic_writer(path) as handle:
        json.dump(facts, handle, indent=1)


def slug(name: str) -> str:
    """A name as part of a file's: letters and digits."""
    return re.sub(r"\W+", "-", name)


def divisor_at_least(number: int, least: float) -> int:
    """The smallest divisor of `number` that is no less than `least`: layers that can be mapped evenly."""
    return next(each for each in range(max(1, ceil(least)), number + 1) if number % each == 0)
