"""What a study keeps of each finished model, so that its results outlive the weights. Not a command.

records/NAME.json: learning rate, seed, steps, seconds, rows of dev.jsonl and train_loss.jsonl, SHA-256 of the weights
and of the models that they come from, processor, versions, the command, and, once the test queries are re-ranked, the
values of each query by measure (rounded to 6 decimals, in the order of the query ids in records/queries.json).
A model with a record is not trained again on another machine, where its weights are missing, unless they are needed.
"""
import hashlib
import json
import statistics
from pathlib import Path

import torch

from experiments.running import check_same, essence
from simplified_tinybert.common.files import UserError, atomic_writer, warn
from simplified_tinybert.common.text import BLOCK
from simplified_tinybert.model.weights import weight_files
from simplified_tinybert.ranking.measures import PerQuery
from simplified_tinybert.ranking.speed import machine
from simplified_tinybert.training.log import first_measure

DECIMALS, DIGITS = 6, 6     # of a query's values; of a row of a log, significant


class Records:
    """The records in one directory. `places`: directories that stand under their names in the commands recorded."""

    def __init__(self, directory: Path, places: dict[str, Path]):
        self.directory, self.places = directory, places

    def path(self, name: str) -> Path:
        return self.directory / f"{name}.json"

    def read(self, name: str) -> dict | None:
        """Raises UserError if the file is damaged."""
        try:
            return json.loads(self.path(name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UserError(f"{self.path(name)}: is not JSON ({error}); restore it, or remove it to train the model "
                            f"again") from None

    def write(self, name: str, record: dict) -> None:
        """One line a key, so that a record can be looked at and two be compared."""
        lines = [f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in record.items()]
        with atomic_writer(self.path(name)) as handle:
            handle.write("{\n" + ",\n".join(lines) + "\n}\n")

    def read_of(self, name: str, words: list[str]) -> dict | None:
        """The record of the model that this command makes. Raises UserError if another command made it."""
        record = self.read(name)
        if record:
            check_same(self.path(name), record["command"], essence(words, self.places))
        return record

    def keep(self, name: str, directory: Path, words: list[str], made_of: dict[str, Path]) -> bool:
        """Record a finished training; False if it is recorded. Other weights than those recorded are told of.

        made_of: role → model directory, "teacher" and "general student".
        """
        before, now = self.read(name), training_record(directory, made_of) | {"command": essence(words, self.places)}
        if before and now["sha256"] in (each["sha256"] for each in (before, *before.get("also_made", []))):
            return False
        if before:
            warn(f"{directory}: has other weights than in {self.path(name)}, which were made on {before['machine']}; "
                 f"each student's record tells which of them taught it")
            kept, other = (before, now) if "test" in before else (now, before)
            brief = {key: other[key] for key in ("sha256", "machine", "versions", "dev")}
            now = kept | {"also_made": [*before.get("also_made", []), brief]}
        self.write(name, now)
        return True

    def add_test(self, name: str, values: dict[str, PerQuery]) -> None:
        """Add a model's values of the test queries by measure."""
        record = self.read(name) or {}
        queries = sorted(next(iter(values.values())))
        known = self.read("queries")
        if known and known["test"] != queries:
            raise UserError(f"{self.path('queries')}: holds other test queries than {name} was evaluated on")
        self.write("queries", {"test": queries})
        self.write(name, record | {"test": record.get("test", {}) | {
            measure: [round(found[query_id], DECIMALS) for query_id in queries] for measure, found in values.items()}})

    def test(self, names: list[str], measures: list[str]) -> tuple[dict[str, list[float]], dict[str, PerQuery]]:
        """By measure: the average of each model (one for each seed), and each query's mean over the models."""
        queries, found = self.read("queries")["test"], [self.read(name)["test"] for name in names]
        averages = {measure: [statistics.fmean(each[measure]) for each in found] for measure in measures}
        return averages, {measure: dict(zip(queries, map(statistics.fmean, zip(*(each[measure] for each in found)))))
                          for measure in measures}

    def dev(self, name: str) -> float:
        """The best of the validations of a training."""
        return max(map(first_measure, self.read(name)["dev"]))


def training_record(directory: Path, made_of: dict[str, Path]) -> dict:
    """What a training left in its directory: the model that did best on dev, if it was validated, is what counts."""
    run = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    arguments, rows = run["arguments"], rows_of(directory / "train_loss.jsonl")
    steps = [after - before for before, after in zip([0, *(row["global_step"] for row in rows)],
                                                     (row["global_step"] for row in rows))]
    facts = machine(torch.device("cpu"))
    return {"learning_rate": arguments["learning_rate"], "seed": arguments["seed"],
            "steps": rows[-1]["global_step"] if rows else 0,
            "seconds": round(sum(count * arguments["train_batch_size"] / row["examples_per_second"]
                                 for count, row in zip(steps, rows))),
            "sha256": weights_sha256(directory), "made_of": {role: weights_sha256(model)
                                                          for role, model in made_of.items()},
            "device": run["device"], "machine": {key: facts[key] for key in ("CPU", "instructions", "cores", "GPU")},
            "versions": run["versions"], "dev": rows_of(directory / "dev.jsonl"), "losses": rows}


def finished_model(directory: Path) -> Path:
    """Of a training's directory: the model that did best on dev, or the last one if none was validated."""
    return directory / "best" if (directory / "best").is_dir() else directory


def weights_sha256(directory: Path) -> str:
    """Of one file what sha256sum says; of several, that of all bytes in a row."""
    digest = hashlib.sha256()
    for path in weight_files(finished_model(directory)):
        with open(path, "rb") as handle:
            while block := handle.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()


def rows_of(log: Path) -> list[dict]:
    """The rows of a log, numbers rounded; none if there is no log."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return [{key: float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
             for key, value in json.loads(line).items()} for line in lines]
