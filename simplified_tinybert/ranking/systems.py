"""The systems of a report: their runs, models, values by query, and recorded or measured speeds."""
import datetime
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from transformers import BertConfig

from simplified_tinybert.common.files import Problems, UserError, say, warn
from simplified_tinybert.common.records import read_record, script_of
from simplified_tinybert.common.text import argument_text
from simplified_tinybert.data.features import Examples
from simplified_tinybert.model.bert import CrossEncoder, count_parameters
from simplified_tinybert.model.configuration import find_models
from simplified_tinybert.model.weights import weights_checksum
from simplified_tinybert.ranking.measures import PerQuery, evaluate, say_gaps
from simplified_tinybert.ranking.scoring import load_scorer
from simplified_tinybert.ranking.speed import measure
from simplified_tinybert.ranking.trec import Qrels, Run, first_ten


@dataclass
class System:
    """A row of the table."""
    name: str
    run: Path
    model: str | None = None
    directory: Path | None = None
    config: BertConfig | None = None
    parameters: int | None = None
    rates: list[float] = field(default_factory=list)    # pairs per second: of each round, or one recorded value
    where: str = ""                                     # device, precision and processes of the rates
    record: dict = field(default_factory=dict)          # written by reranker.py
    values: dict[str, PerQuery] = field(default_factory=dict)               # measure → query → value
    averages: dict[str, float | None] = field(default_factory=dict)         # None: not defined for any query

    def speed(self) -> float | None:
        return median(self.rates) if self.rates else None

    def speed_up(self, other: "System") -> float | None:
        """Return the median over the rounds of own speed / other speed, or None if they were measured differently."""
        if not (self.rates and other.rates and self.where == other.where):
            return None
        return median(own / others for own, others in zip(self.rates, other.rates))

    def retained(self, teacher: "System", measure: str) -> float | None:
        """Return the average as a share of the teacher's; None if that is not defined."""
        average, teachers = self.averages[measure], teacher.averages[measure]
        return average / teachers if average is not None and teachers else None

    def as_json(self, teacher: "System", measures: list[str]) -> dict:
        config = self.config
        return {"name": self.name, "run": str(self.run), "model": self.model,
                "layers": config.num_hidden_layers if config else None, "width": config.hidden_size if config else None,
                "parameters": self.parameters, "pairs_per_second": self.speed(), "rounds": self.rates,
                "speed_of": self.where, "speed_up": self.speed_up(teacher),
                "averages": {measure: self.averages[measure] for measure in measures},
                "retained": {measure: self.retained(teacher, measure) for measure in measures},
                "values": {measure: self.values[measure] for measure in measures}, "record": self.record or None}


def find_systems(rows: list[list[str]], problems: Problems) -> list[System]:
    """Create systems from (name, run[, model]), with configurations and records but without loading weights."""
    systems = []
    for name, *files in rows:
        name = argument_text(name)
        if len(files) not in (1, 2) or not name.strip() or not name.isprintable() or not Path(files[0]).name:
            problems.add(f"--system {' '.join(map(repr, [name, *files]))}: expected a name, a run and at most one "
                         f"model; quote a name that contains spaces")
        elif name in [system.name for system in systems]:
            problems.add(f"--system {name!r}: is given twice; give each system its own name")
        else:
            systems.append(System(name, Path(files[0]), files[1] if len(files) == 2 else None))
    found = find_models({system.name: system.model for system in systems}, problems)
    for system in systems:
        system.directory, system.config = found.get(system.name, (None, None))
        with problems.collect():
            _read_size_and_speed(system)
    return systems


def _read_size_and_speed(system: System) -> None:
    """Fill in size and speed from reranker.py's record next to the run. Without it, only the size is known."""
    names = [system.run.with_suffix(".tsv.run.json").name, *["scores.tsv.run.json"] * (system.run.name == "run.trec")]
    paths = [path for name in names if (path := system.run.with_name(name)).is_file()]
    # prepare_examples.py writes bm25.tsv.run.json for its pairs, which may lie next to the run bm25.txt.
    path = next((path for path in paths if script_of(path) != "prepare_examples.py"), None)
    if path is None:
        system.parameters = _count(system.config)
        return
    date = datetime.datetime.fromtimestamp(path.stat().st_mtime).isoformat(timespec="seconds")
    system.record = {"file": str(path), "date": date, **read_record(path)}
    settings, rate = system.record["settings"], system.record.get("pairs_per_second")
    system.parameters = system.record.get("parameters") or _count(system.config)
    if rate:                                            # missing if the run was interrupted
        processes, device = system.record.get("processes", 1), system.record.get("device", "unknown device")
        details = [flag for flag in ("fp16", "bf16", "tf32", "int8", "compile") if settings.get(flag)]
        details += [f"{processes} processes"] if processes > 1 else []
        system.rates, system.where = [rate], ", ".join([device, *details])
    if system.directory and "weights" in settings and settings["weights"] != weights_checksum(system.directory):
        warn(f"{system.run}: was scored with weights that differ from those in {system.directory} ({path}); re-rank "
             f"again, unless the model was only converted")


def _count(config: BertConfig | None) -> int | None:
    """The number of parameters, if the model is known."""
    if config is None:
        return None
    with torch.device("meta"):                          # needs no memory, but takes seconds to start
        return count_parameters(CrossEncoder(config))


def evaluate_systems(systems: list[System], qrels: Qrels, runs: dict[Path, Run], measures: list[object], level: int,
                     complete: bool) -> list[str]:
    """Fill in values and averages. Returns the averaged queries: all judged ones if `complete`, else common ones."""
    queries = [query_id for query_id in qrels if complete or all(query_id in run for run in runs.values())]
    if not queries:
        raise UserError("no judged query is in all runs; use runs of the same queries, or --complete")
    judged = {query_id: qrels[query_id] for query_id in queries}
    for system in systems:
        missing = [query_id for query_id in qrels if query_id not in runs[system.run]]
        if missing:
            how = "counted as 0" if complete else "left out for all systems (--complete counts them as 0)"
            say(f"{system.run}: {len(missing)} judged queries are missing, {how}: {first_ten(missing)}")
        evaluation = evaluate(judged, runs[system.run], measures, level, complete)
        say_gaps(evaluation, f"{system.run}: ")
        for name, (values, average) in evaluation.results.items():
            system.values[name], system.averages[name] = values, average if values else None
    return queries


def measure_systems(systems: list[System], pairs: Examples, device: torch.device, dtype: torch.dtype | None, int8: bool,
                    rounds: int) -> None:
    """Load all models and measure their speeds on the same pairs. Recorded speeds are dropped."""
    models = {}
    for system in systems:
        system.rates, system.where = [], ""
        if system.directory:
            models[system.name], system.parameters = load_scorer(system.directory, system.config, device, dtype, int8,
                                                                 label=system.name)
    precision = "int8" if int8 else str(dtype or torch.float32).removeprefix("torch.")
    rates = measure(models, pairs, device, rounds)
    for system in systems:
        if system.name in rates:
            system.rates, system.where = rates[system.name], f"{device}, {precision}"
