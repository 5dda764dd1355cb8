"""Re-rank the candidates with a study's models, and record each query's values. Not a command."""
from dataclasses import replace
from functools import partial
from pathlib import Path

from experiments.commands import Commands
from experiments.evaluation import first_ranking, interpolated_values, values_of
from experiments.model_records import Records
from experiments.running import Command
from simplified_tinybert.common.files import Problems
from simplified_tinybert.ranking.trec import read_qrels, read_run


class Rankings:
    """Builds the commands that rank, and keeps their results in the records."""

    def __init__(self, commands: Commands, records: Records):
        self.commands, self.records = commands, records
        self.files, self.measures = commands.files, commands.settings.measures

    def needs_test(self, name: str) -> bool:
        """Whether a model still has to re-rank the test queries."""
        record = self.records.read(name) or {}
        return self.commands.args.until == "test" and not set(self.measures) <= set(record.get("test", {}))

    def testing(self, name: str, model: Path, needs: list[Path]) -> list[Command]:
        """The commands that re-rank the test queries and record the result; none if done or excluded by --until."""
        if not self.needs_test(name):
            return []
        *commands, last = self.commands.rank(name, model, "test", needs)
        return [*commands, replace(last, after=partial(self.keep_test, name, last.output))]

    def keep_test(self, name: str, ranking: Path) -> None:
        run = read_run(ranking, Problems()) if name != "BM25" else first_ranking(ranking)
        qrels = read_qrels(self.files["qrels.test"], Problems())
        self.records.add_test(name, values_of(qrels, [run], self.measures)[1])

    def interpolating(self, name: str, model: Path, needs: list[Path]) -> list[Command]:
        """The commands that rank dev and test queries and record the interpolation with BM25; none if recorded."""
        if self.is_interpolated(name):
            return []
        test, (scores, dev) = (self.commands.rank(name, model, split, needs) for split in ("test", "dev"))
        return [*test, scores, replace(dev, needs=[scores.output, test[-1].output],
                                       after=partial(self.keep_interpolated, name))]

    def is_interpolated(self, name: str) -> bool:
        return set(self.measures) <= set(self.records.read(name).get("interpolated", {}))

    def keep_interpolated(self, name: str) -> None:
        """Record the interpolation, and the values without it: the weights may have been made anew since the test."""
        splits = {split: [self.files[f"qrels.{split}"], self.files[f"bm25.{split}"],
                          self.commands.scores(name, split).with_suffix(".trec")] for split in ("dev", "test")}
        weight, values, alone = interpolated_values(splits, self.measures)
        self.records.add_test(name, alone, "not_interpolated")
        self.records.add_test(name, values, "interpolated", weight=weight)
