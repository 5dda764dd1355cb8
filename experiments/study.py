"""The steps of a study: find what is missing, and make it in the right order. Not a command.

A model is trained only if it has no record, or if its weights are missing and needed by a student, the test
queries, an interpolation or an ensemble.
"""
import argparse
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from experiments.commands import SPLITS, Commands, run_name
from experiments.model_records import Records
from experiments.rankings import Rankings
from experiments.running import Command, run_all
from experiments.settings import Settings, Step, slug
from simplified_tinybert.common.files import UserError
from simplified_tinybert.model.configuration import read_config
from simplified_tinybert.model.hub import find_model

Pair = tuple[str, str]      # shape ("3/384") and method
Rank = Callable[[str, Path, list[Path]], list[Command]]     # name, model and what it needs → commands that rank with it
FINETUNE = ["--distill_model", "finetune"]
TEACHERS = "TEACHERS"       # in a method's flags: the files with all teachers' scores of the training pairs


class Study:
    """Runs the commands and keeps a record of each model."""

    def __init__(self, args: argparse.Namespace, settings: Settings, files: dict[str, Path]):
        self.args, self.settings, self.files, self.out = args, settings, files, args.output_dir
        self.commands = Commands(args, settings, files)
        self.records = Records(args.records, {"OUT": self.out, "COLLECTION": args.collection, "BERT": args.bert_model}
                               | ({"TEACHER": args.teacher_model} if args.teacher_model else {}))
        self.rankings = Rankings(self.commands, self.records)
        configs = {name: self.commands.student_config(shape) for name, shape in settings.students.items()}
        self.sizes = {name: f"{config.num_hidden_layers}/{config.hidden_size}" for name, config in configs.items()}
        teacher = read_config(self.commands.tokenizer_directory)
        self.teacher_shape = f"{teacher.num_hidden_layers}/{teacher.hidden_size}"
        self.shapes = {self.sizes[name]: shape for name, shape in settings.students.items()}
        if len(self.shapes) < len(self.sizes):
            raise UserError(f"{args.settings}: two students have the same shape for this teacher "
                            f"({', '.join(self.sizes.values())}); remove one")
        if same := [name for name, size in self.sizes.items()
                    if size == self.teacher_shape and not settings.students[name].model]:
            raise UserError(f"{args.settings}: student {same[0]!r} would have the teacher's shape, "
                            f"{self.teacher_shape}, because its depth is rounded up to a divisor of the teacher's; "
                            f"choose a smaller depth or width")
        for name in ("logs", "data", "runs", "students"):
            (self.out / name).mkdir(parents=True, exist_ok=True)

    def run(self, title: str, commands: list[Command]) -> None:
        if commands:
            run_all(title, commands, self.args.jobs, self.out / "logs")

    def prepare(self) -> None:
        """Make pairs and features of all splits, and the texts for general distillation."""
        self.run("texts", [self.commands.texts(), self.commands.pairs("dev")])  # also indexes the documents
        self.run("passages", [self.commands.pairs("train"), self.commands.pairs("test")])
        self.run("features", [self.commands.tokenize(name) for name in SPLITS])

    def recorded(self, command: Command, made_of: dict[str, Path] | None = None, clean: bool = False) -> Command:
        """Make a command record the model that it trains; with `clean` also remove its checkpoints."""
        directory = command.output.parent

        def after() -> None:
            if self.records.keep(command.name, directory, command.words, made_of or {}):
                for stale in (self.out / "runs").glob(f"{command.name}.*"):         # rankings by other weights
                    stale.unlink()
            for checkpoint in directory.glob("checkpoint-*") if clean else ():
                shutil.rmtree(checkpoint)
        return replace(command, after=after)

    def is_finished(self, command: Command, needs_weights: bool) -> bool:
        """Whether a model needs no training: it has a record and, if needed, its weights exist."""
        record = self.records.read_of(command.name, command.words)
        return record is not None and (not needs_weights or command.output.exists())

    def warms_up(self) -> bool:
        return self.settings.warm_up.pairs > 0 and not self.args.teacher_model

    def pre_trained(self) -> Path:
        """The BERT from which teacher and general students are made. It has not seen a training query."""
        return self.out / "warm_up" if self.warms_up() else self.args.bert_model

    def teacher_command(self, rate: float, seed: int) -> Command:
        return self.recorded(self.commands.train(
            self.out / f"teacher-{rate:g}-seed{seed}", self.pre_trained(), "train",
            self.settings.teacher.of(rate, seed), FINETUNE))

    def teacher_names(self, seeds: list[int]) -> list[str]:
        """Names of the teachers with these seeds, at the learning rate that was best on dev with the first seed."""
        if self.args.teacher_model:
            return ["teacher"]
        return [f"teacher-{self.teacher_rate():g}-seed{seed}" for seed in seeds]

    def teacher_rate(self) -> float:
        first, rates = self.settings.teacher.seeds[0], self.settings.teacher.learning_rates
        return max(rates, key=lambda rate: self.records.dev(f"teacher-{rate:g}-seed{first}"))

    def teacher(self) -> Path:
        """Directory of the students' teacher."""
        return self.args.teacher_model or self.out / self.teacher_names(self.settings.teacher.seeds[:1])[0] / "best"

    def make_models(self, sizes: list[str], weights: bool = True) -> None:
        """Train teachers at all learning rates with the first seed; with `weights` also general students.

        With `weights`, the best teacher is trained again if its weights are missing.
        """
        first = self.settings.teacher.seeds[0]
        teachers = [] if self.args.teacher_model else [
            self.teacher_command(rate, first) for rate in self.settings.teacher.learning_rates]
        missing = [command for command in teachers if not self.is_finished(command, needs_weights=False)]
        general = [command for size in sizes for command in self.general_commands(size)] if weights else []
        self.run_from_pre_trained("teacher and general students", missing + general)
        if teachers and weights:
            best = self.teacher_command(self.teacher_rate(), first)
            if not self.is_finished(best, needs_weights=True):
                self.run_from_pre_trained("the teacher again", [best])

    def make_other_teachers(self) -> None:
        """Train the teachers of the other seeds. They have no students of their own."""
        commands = [] if self.args.teacher_model else [
            self.teacher_command(self.teacher_rate(), seed) for seed in self.settings.teacher.seeds[1:]]
        self.run_from_pre_trained("other teachers", self.missing(commands, self.rankings.testing))

    def methods(self, step: Step) -> list[str]:
        """The step's methods, without those that need several teachers if there is only one."""
        several = len(self.settings.teacher.seeds) > 1 and not self.args.teacher_model
        return [method for method in step.methods if several or TEACHERS not in self.settings.methods[method].split()]

    def score_training_pairs(self) -> None:
        """Score the training pairs with all teachers, for students of their ensemble."""
        def score(name: str, model: Path, needs: list[Path]) -> list[Command]:
            command = self.commands.score(name, model, "train", needs)
            return [] if command.output.exists() else [command]

        self.run_from_pre_trained("scores of the teachers", self.missing(
            [self.teacher_command(self.teacher_rate(), seed) for seed in self.settings.teacher.seeds], score))

    def missing(self, commands: list[Command], rank: Rank | None) -> list[Command]:
        """Return the unfinished training commands, each followed by the commands that `rank` returns for its model."""
        missing = []
        for command in commands:
            rankings = rank(command.name, command.output.parent / "best", [command.output]) if rank else []
            missing += [*([] if self.is_finished(command, bool(rankings)) else [command]), *rankings]
        return missing

    def run_from_pre_trained(self, title: str, commands: list[Command]) -> None:
        """Run commands that start from the pre-trained BERT, after its warm-up."""
        if self.warms_up() and not all(command.output.exists() for command in commands):
            commands = [self.warm_up_command(), *commands]
        self.run(title, commands)

    def warm_up_command(self) -> Command:
        warm_up = self.settings.warm_up
        return self.recorded(self.commands.train(self.pre_trained(), self.args.bert_model, "warm_up",
                                                 warm_up.of(warm_up.learning_rates[0], 42), FINETUNE))

    def general_commands(self, size: str) -> list[Command]:
        """The commands that make a general student; none if the settings name an existing one."""
        shape, warm_up, directory = self.shapes[size], self.settings.student_warm_up, self.out / f"general-{slug(size)}"
        if shape.model:
            return []
        commands = [self.recorded(self.commands.general_student(shape, self.pre_trained(), directory))]
        if self.general_student(size) != directory:
            commands.append(self.recorded(self.commands.train(
                self.general_student(size), directory, "warm_up", warm_up.of(shape.general_learning_rate, 42),
                ["--distill_model", "simplified", "--teacher_model", self.pre_trained()]),
                {"general student": directory}))
        return commands

    def check_starts(self, sizes: list[str]) -> None:
        """Raise UserError if a recorded general student, or the warm-up, was made with other settings."""
        commands = [command for size in sizes for command in self.general_commands(size)]
        for command in [*commands, *([self.warm_up_command()] if self.warms_up() else [])]:
            self.records.read_of(command.name, command.words)

    def general_student(self, size: str) -> Path:
        """Directory of the model from which the students of a shape start."""
        shape, directory = self.shapes[size], self.out / f"general-{slug(size)}"
        if shape.model:
            return find_model(shape.model)
        warm = self.warms_up() and self.settings.student_warm_up.pairs
        return directory.with_name(f"{directory.name}-warm") if warm else directory

    def student(self, pair: Pair, rate: float, seed: int, tuning: bool = False) -> Command:
        """The command that trains a student; with `tuning`, on the budget of a trial."""
        budget, flags = self.settings.distillation, self.settings.methods[pair[1]].split()
        if tuning := tuning and self.settings.tuning.share > 0:
            budget = budget.part(self.settings.tuning.share)
        made_of = {"general student": self.general_student(pair[0])}
        if "finetune" not in flags:
            made_of["teacher"] = self.teacher()
            flags += ["--teacher_model", made_of["teacher"]]
        if TEACHERS in flags:
            place, names = flags.index(TEACHERS), self.teacher_names(self.settings.teacher.seeds)
            flags[place:place + 1] = [self.commands.scores(name, "train") for name in names]
            made_of |= {name: self.out / name / "best" for name in names[1:]}
        directory = self.out / "students" / (run_name(*pair, rate, seed) + "-tuning" * tuning)
        command = self.commands.train(directory, made_of["general student"], "train", budget.of(rate, seed),
                                      [*flags, "--log_gradients"])
        return self.recorded(command, made_of, clean=True)

    def distill(self, title: str, students: list[tuple[Pair, float, int]], rank: Rank | None,
                tuning: bool = False) -> None:
        """Train the unfinished students (pair, learning rate, seed), and before them the models they need.

        Each student re-ranks right after its training, so that an interrupted study leaves complete records. Nothing
        is chosen on the test queries.
        """
        missing = {student: self.missing([self.student(*student, tuning)], rank) for student in students}
        if sizes := list(dict.fromkeys(pair[0] for (pair, _, _), commands in missing.items() if commands)):
            self.make_models(sizes)
        methods = {pair[1] for (pair, _, _), commands in missing.items() if commands}
        if any(TEACHERS in self.settings.methods[method].split() for method in methods):
            self.score_training_pairs()
        self.run(title, [command for commands in missing.values() for command in commands])

    def tune(self, pairs: list[Pair]) -> dict[Pair, list[float]]:
        """Return the learning rates tried for each pair, first the one that was best on dev with the first seed."""
        seed, rates = self.settings.seeds[0], {pair: sorted(self.shapes[pair[0]].learning_rates) for pair in pairs}
        while True:
            self.distill("tuning", [(pair, rate, seed) for pair in pairs for rate in rates[pair]], None, tuning=True)
            best = {pair: max(rates[pair], key=partial(self.dev_result, pair)) for pair in pairs}
            more = {pair: extension(rates[pair], best[pair], self.shapes[pair[0]].learning_rates,
                                    self.settings.tuning.extensions) for pair in pairs}
            if not any(more.values()):
                return {pair: sorted(rates[pair], key=lambda rate: rate != best[pair]) for pair in pairs}  # noqa: B023
            rates = {pair: sorted(filter(None, [*rates[pair], more[pair]])) for pair in pairs}

    def dev_result(self, pair: Pair, rate: float) -> float:
        """Return the result of a learning rate's trial on the dev queries."""
        return self.records.dev(self.student(pair, rate, self.settings.seeds[0], tuning=True).name)

    def test_first(self) -> None:
        """Evaluate BM25 and the students' teacher on the test queries."""
        if self.rankings.needs_test("BM25"):
            self.rankings.keep_test("BM25", self.out / "data" / "test.tsv")
        name, = self.teacher_names(self.settings.teacher.seeds[:1])
        self.make_models([], self.rankings.needs_test(name))
        self.run("the teacher's ranking", self.rankings.testing(name, self.teacher(), []))

    def interpolate(self, students: list[tuple[Pair, float, int]]) -> None:
        """Combine teacher and students with BM25. The dev queries choose a weight for each model."""
        if self.args.until != "test":
            return
        name, = self.teacher_names(self.settings.teacher.seeds[:1])
        teacher = self.rankings.interpolating(name, self.teacher(), [])
        self.make_models([], bool(teacher))
        self.run("the teacher's interpolation", teacher)
        self.distill("interpolation", students, self.rankings.interpolating)


def extension(rates: list[float], best: float, given: list[float], limit: int) -> float | None:
    """Return the next learning rate to try if the best of the sorted `rates` is at an edge, or None.

    At most `limit` rates are tried below the `given` ones, and as many above them.
    """
    if len(rates) > 1 and best == rates[0] and sum(rate < min(given) for rate in rates) < limit:
        return float(f"{rates[0] ** 2 / rates[1]:.3g}")
    if len(rates) > 1 and best == rates[-1] and sum(rate > max(given) for rate in rates) < limit:
        return float(f"{rates[-1] ** 2 / rates[-2]:.3g}")
    return None
