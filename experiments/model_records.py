"""A small record of each finished model. It keeps a study's results even if the weights are deleted. Not a command.

records/NAME.json holds learning rate, seed, steps, seconds, the rows of dev.jsonl and train_loss.jsonl, SHA-256 of the
weights and of the models they come from, processor, versions and command. Once the test queries are re-ranked, it also
holds each query's value for each measure, in the order of the query ids in records/queries.json ("test"), and the
same for its interpolation with BM25 ("interpolated") and for the ranking before it ("not_interpolated").
A machine that has a record but not the weights trains the model again only if the weights are needed.
"""
import hashlib
import json
import statistics
from pathlib import Path

import torch

from experiments.running import check_same, comparable
from simplified_tinybert.common.files import UserError, atomic_writer, warn
from simplified_tinybert.model.weights import weight_files
from simplified_tinybert.ranking.measures import PerQuery
from simplified_tinybert.ranking.speed import machine
from simplified_tinybert.training.log import first_measure


class Records:
    """The records in one directory. In recorded commands, names replace the paths in `named_paths`."""

    def __init__(self, directory: Path, named_paths: dict[str, Path]):
        self.directory, self.named_paths = directory, named_paths

    def path(self, name: str) -> Path:
        return self.directory / f"{name}.json"

    def read(self, name: str) -> dict | None:
        """Raises UserError if the file is damaged."""
        try:
            return json.loads(self.path(name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UserError(f"{self.path(name)}: not valid JSON ({error}); restore it, or remove it to train the model "
                            f"again") from None

    def write(self, name: str, record: dict) -> None:
        """Write one line per key, which is easy to read and to compare."""
        lines = [f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in record.items()]
        with atomic_writer(self.path(name)) as handle:
            handle.write("{\n" + ",\n".join(lines) + "\n}\n")

    def read_of(self, name: str, words: list[str]) -> dict | None:
        """Return the record of the model that this command trains. Raises UserError if another command trained it."""
        record = self.read(name)
        if record:
            check_same(self.path(name), record["command"], comparable(words, self.named_paths))
        return record

    def keep(self, name: str, directory: Path, words: list[str], made_of: dict[str, Path]) -> bool:
        """Record a finished training run. Return False if its weights are recorded already; warn if they differ.

        `made_of`: "teacher" or "general student" → model directory.
        """
        before = self.read(name)
        now = training_record(directory, made_of) | {"command": comparable(words, self.named_paths)}
        if before and now["sha256"] in (model["sha256"] for model in (before, *before.get("also_made", []))):
            return False
        if before:
            warn(f"{directory}: weights differ from those in {self.path(name)}, which were made on "
                 f"{before['machine']}; each student's record says which weights its teacher had")
            kept, other = (before, now) if "test" in before else (now, before)
            brief = {key: other[key] for key in ("sha256", "machine", "versions", "dev")}
            now = kept | {"also_made": [*before.get("also_made", []), brief]}
        self.write(name, now)
        return True

    def add_test(self, name: str, values: dict[str, PerQuery], key: str = "test", **more: float) -> None:
        """Add a model's values on the test queries under `key`, rounded to six decimals, and `more`."""
        record, known = self.read(name) or {}, self.read("queries")
        queries = sorted(next(iter(values.values())))
        if known and known["test"] != queries:
            raise UserError(f"{self.path('queries')}: the test queries differ from those that {name} was evaluated on")
        self.write("queries", {"test": queries})
        self.write(name, record | {key: record.get(key, {}) | more | {
            measure: [round(per_query[query_id], 6) for query_id in queries] for measure, per_query in values.items()}})

    def test(self, names: list[str], measures: list[str],
             key: str = "test") -> tuple[dict[str, list[float]], dict[str, PerQuery]]:
        """Return, for each measure, the average of each model (one per seed), and each query's mean over the models."""
        queries, models = self.read("queries")["test"], [self.read(name)[key] for name in names]
        averages = {measure: [statistics.fmean(model[measure]) for model in models] for measure in measures}
        return averages, {measure: dict(zip(queries, map(statistics.fmean, zip(*(model[measure] for model in models)))))
                          for measure in measures}

    def dev(self, name: str) -> float:
        """Return the best validation result of a training run."""
        return max(map(first_measure, self.read(name)["dev"]))


def training_record(directory: Path, made_of: dict[str, Path]) -> dict:
    """Collect what a training run left in its directory."""
    run = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    arguments, rows = run["arguments"], read_log(directory / "train_loss.jsonl")
    logged = [0, *(row["global_step"] for row in rows)]
    seconds = sum((row["global_step"] - previous) * arguments["train_batch_size"] / row["examples_per_second"]
                  for previous, row in zip(logged, rows))
    hardware = machine(torch.device("cuda" if "cuda" in run["device"] and torch.cuda.is_available() else "cpu"))
    return {"learning_rate": arguments["learning_rate"], "seed": arguments["seed"], "steps": logged[-1],
            "seconds": round(seconds), "sha256": weights_sha256(directory),
            "made_of": {role: weights_sha256(model) for role, model in made_of.items()}, "device": run["device"],
            "machine": {key: hardware[key].partition(",")[0] for key in ("CPU", "instructions", "cores", "GPU")},
            "versions": run["versions"], "dev": read_log(directory / "dev.jsonl"), "losses": rows}


def weights_sha256(directory: Path) -> str:
    """SHA-256 over the weight files of the model that was best on dev, or of the last one without validation."""
    digest = hashlib.sha256()
    for path in weight_files(directory / "best" if (directory / "best").is_dir() else directory):
        with open(path, "rb") as handle:
            hashlib.file_digest(handle, lambda: digest)
    return digest.hexdigest()


def read_log(path: Path) -> list[dict]:
    """Return the rows of a log with floats rounded to six significant digits, or [] if there is no log."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [{key: float(f"{value:.6g}") if isinstance(value, float) else value
             for key, value in json.loads(line).items()} for line in lines]
