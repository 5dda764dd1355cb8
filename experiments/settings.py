"""The settings file of a study. Not a command."""
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import ceil, inf
from pathlib import Path

from simplified_tinybert.common.files import Problems, UserError
from simplified_tinybert.common.text import gives_flag, read_text
from simplified_tinybert.ranking.measures import parse_measures

# Flags that the study sets itself
RESERVED = {"--learning_rate", "--seed", "--num_train_epochs", "--intermediate_epochs", "--train_batch_size",
            "--eval_step", "--gradient_accumulation_steps", "--resume", "--device", "--output_student_dir",
            "--teacher_model", "--depth"}
TRAININGS = ("warm_up", "teacher", "general", "student_warm_up", "distillation")


@dataclass
class Shape:
    """A student shape, as shares of the teacher's depth and width: 0.25 and 0.5 of 12/768 is 3/384.

    `model`: an existing general student. `flags`: more flags of general_distill.py, after those of [general].
    """
    learning_rates: list[float]
    general_learning_rate: float = 1e-4
    depth: float = 1.0
    width: float = 1.0
    model: str = ""
    flags: str = ""


@dataclass
class Training:
    """How a model is trained: on `pairs` examples, for at most `most_epochs` epochs.

    `learning_rates`: one for the warm-up, those to try for the teacher; students have their own.
    `seeds`: of the teacher. The first one teaches the students; all together teach methods with TEACHERS in the flags.
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

    def part(self, share: float) -> "Training":
        """This training on a share of the budget, validated once."""
        return replace(self, pairs=max(1, round(self.pairs * share)), most_epochs=self.most_epochs * share,
                       validations=1)

    def of(self, learning_rate: float, seed: int) -> "Training":
        """This training with one learning rate and one seed."""
        return replace(self, learning_rates=[learning_rate], seeds=[seed])


@dataclass
class Tuning:
    """How a method's learning rate is chosen, with the first seed.

    `share`: length of a trial, as a share of the budget; 0: all of it, so that a trial is also the first seed's run.
    `extensions`: maximum number of further rates to try below the lowest or above the highest, if that is the best.
    """
    share: float = 0.0
    extensions: int = 2


@dataclass
class Step:
    """A part of the study: some students by some methods, or more teachers. It is finished before the next begins."""
    students: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    teachers: bool = False          # train the teachers of the other seeds
    interpolation: bool = False     # combine the teacher, and all students up to this step, with BM25


@dataclass
class Settings:
    """All settings of a study except collection, pre-trained model and machine."""
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
    titles: dict[str, str] = field(default_factory=dict)    # method → name in tables
    dev_queries: int | None = None  # at most so many, drawn at random; None: all
    test_queries: int | None = None

    def __post_init__(self) -> None:
        self.steps = self.steps or [Step(list(self.students), list(self.methods))]
        if len(self.teacher.seeds) > 1 and not any(step.teachers for step in self.steps):
            self.steps.append(Step(teachers=True))

    def check(self, path: Path, problems: Problems) -> None:
        """Add invalid settings to `problems`, and bring the names of the measures into their usual form."""
        for message in (*self.check_names(), *self.check_numbers(), *self.check_flags(), *self.check_students()):
            problems.add(f"{path}: {message}")
        self.measures = list(map(str, parse_measures(self.measures, 1, problems)))

    def check_names(self) -> Iterator[str]:
        if self.proposed not in self.methods:
            yield f"proposed = {self.proposed!r}: expected one of the methods ({', '.join(self.methods)})"
        if len({slug(name) for name in self.methods}) < len(self.methods):
            yield "methods: two names have the same letters and digits, so they would share a directory; rename one"
        for name in ("seeds", "measures", "students", "methods"):
            if not getattr(self, name):
                yield f"{name} is empty"
        for step in self.steps:
            unknown = sorted({*step.students} - {*self.students} | {*step.methods} - {*self.methods})
            if unknown or not (step.teachers or step.interpolation or step.students and step.methods):
                yield (f"steps: expected students and methods from this file, teachers = true or interpolation = true; "
                       f"found {unknown or step}")
        if unknown := sorted({*self.titles} - {*self.methods}):
            yield f"titles: {unknown} are not methods"

    def check_numbers(self) -> Iterator[str]:
        if not 0 <= self.tuning.share < 1 or self.tuning.extensions < 0:
            yield "tuning: expected a share from 0 to below 1, and extensions of 0 or more"
        for name in ("max_seq_length", "dev_depth", "test_depth", "dev_queries", "test_queries"):
            if (value := getattr(self, name)) is not None and (type(value) is not int or value < 1):
                yield f"{name} = {value}: expected a whole number of 1 or more"
        for name, seeds in (("seeds", self.seeds), ("teacher.seeds", self.teacher.seeds)):
            if len(set(seeds)) < len(seeds) or any(type(seed) is not int or seed < 0 for seed in seeds) or not seeds:
                yield f"{name} = {seeds}: expected distinct whole numbers, 0 or more"
        for name in TRAININGS:
            training = getattr(self, name)
            pairs = training.pairs + ("warm_up" in name)                # a warm-up may have no pairs
            if min(training.batch_size, training.validations, pairs) < 1 or training.most_epochs <= 0:
                yield f"{name}: expected pairs, most_epochs, batch_size and validations above 0"

    def check_flags(self) -> Iterator[str]:
        texts = {"passages": self.passages, "sampling": self.sampling} | {
            f"methods.{name}": flags for name, flags in self.methods.items()} | {
            f"{name}.flags": getattr(self, name).flags for name in TRAININGS} | {
            f"students.{name}.flags": shape.flags for name, shape in self.students.items()}
        for name, text in texts.items():
            words = text.split() if isinstance(text, str) else [None]
            wrong = [word for word in words if word is None or gives_flag(word, RESERVED) or re.match("--.*=", word)]
            if wrong:
                yield (f"{name} = {text!r}: expected a string of flags, each as \"--flag value\", and none that the "
                       f"study sets itself (found {wrong[0]})")

    def check_students(self) -> Iterator[str]:
        if len(self.warm_up.learning_rates) != 1:
            yield "warm_up: expected one learning rate; the dev queries cannot choose it"
        for name, training in ({"warm_up": self.warm_up, "teacher": self.teacher} | self.students).items():
            rates = training.learning_rates
            if not rates or not all(0 < rate < inf for rate in rates) or len(set(rates)) < len(rates):
                yield f"{name}: learning_rates = {rates}: expected one or more distinct rates above 0"
        for name, shape in self.students.items():
            if not (0 < shape.depth <= 1 and 0 < shape.width <= 1):
                yield (f"students.{name}: found depth {shape.depth} and width {shape.width}; expected shares of the "
                       f"teacher's, above 0 and at most 1")
            elif shape.depth == shape.width == 1 and not shape.model:
                yield f"students.{name}: as large as the teacher; choose a smaller depth or width"


def read_settings(path: Path, problems: Problems) -> Settings | None:
    """Read settings from a TOML file. Input errors are added to `problems`."""
    try:
        content = read_toml(path)
        for name in TRAININGS:
            content[name] = Training(**content[name])
        content["students"] = {name: Shape(**shape) for name, shape in content["students"].items()}
        content["tuning"] = Tuning(**content.get("tuning", {}))
        content["steps"] = [Step(**step) for step in content.get("steps", [])]
        settings = Settings(**content)
        settings.check(path, problems)
        return settings
    except OSError as error:
        problems.add(f"{error.filename or path}: cannot read the settings: {error.strerror}")
    except UserError as error:
        problems.add(str(error))
    except tomllib.TOMLDecodeError as error:
        problems.add(f"{path}: not valid TOML: {error}")
    except (KeyError, TypeError, AttributeError) as error:
        problems.add(f"{path}: unknown or missing key, or wrong type: {error}; compare with experiments/small.toml")
    return None


def read_toml(path: Path, readers: tuple[Path, ...] = ()) -> dict:
    """Return the file's settings. The key `like` names a file that supplies all settings that this file lacks.

    `readers` are the files that name this one. Raises UserError if it is one of them.
    """
    if path.resolve() in readers:
        raise UserError(f"{path}: `like` leads back to this file; name another one")
    own = tomllib.loads(read_text(path))
    merged = read_toml(path.parent / own.pop("like"), (*readers, path.resolve())) if "like" in own else {}
    for name, value in own.items():
        merged[name] = merged.get(name, {}) | value if isinstance(value, dict) else value
    return merged


def slug(name: str) -> str:
    """Return a name with only letters, digits and "-", for use in a file name."""
    return re.sub(r"\W+", "-", name)


def divisor_at_least(number: int, minimum: float) -> int:
    """Return the smallest divisor of `number` that is at least `minimum`. That many layers can be mapped evenly."""
    return next(divisor for divisor in range(max(1, ceil(minimum)), number + 1) if number % divisor == 0)
