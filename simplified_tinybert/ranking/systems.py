"""The rankers of a report: their runs, models, recorded or measured speeds, and values by query."""
import datetime
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from transformers import BertConfig

from simplified_tinybert.common.checks import find_models
from simplified_tinybert.common.files import Problems, UserError, say, warn
from simplified_tinybert.common.records import read_record, script_of
from simplified_tinybert.common.text import argument_text
from simplified_tinybert.data.features import Examples
from simplified_tinybert.model.bert import CrossEncoder, count_parameters
from simplified_tinybert.model.pretrained import load_ranker
from simplified_tinybert.model.weights import weights_checksum
from simplified_tinybert.ranking.measures import MRR_CUTOFFS, PerQuery, Qrels, Run, evaluate, first_ten, parse_measures
from simplified_tinybert.ranking.scoring import prepare
from simplified_tinybert.ranking.speed import measure


@dataclass
class System:
    """A row of the table. `rates`: pairs per second in each round, or the one figure that was recorded."""
    name: str
    run: Path
    model: str | None = None
    directory: Path | None = None
    config: BertConfig | None = None
    parameters: int | None = None
    rates: list[float] = field(default_factory=list)
    where: str = ""                                     # device, precision, processes of the rates
    record: dict = field(default_factory=dict)          # reranker.py's
    values: dict[str, PerQuery] = field(default_factory=dict)               # measure → query → value
    averages: dict[str, float | None] = field(default_factory=dict)         # None: defined for no query

    def speed(self) -> float | None:
        return median(self.rates) if self.rates else None

    def speed_up(self, other: "System") -> float | None:
        """How many times the other's speed, median over the rounds; None if they were not measured alike."""
        if not (self.rates and other.rates and self.where == other.where):
            return None
        return median(mine / theirs for mine, theirs in zip(self.rates, other.rates))

    def retained(self, teacher: "System", measure: str) -> float | None:
        """Share of the teacher's average; None where one of the two is not defined, or the teacher's is 0."""
        mine, theirs = self.averages[measure], teacher.averages[measure]
        return mine / theirs if mine is not None and theirs else None


def find_systems(rows: list[list[str]], problems: Problems) -> list[System]:
    """Systems of (name, run[, model]) as words; models are looked up and records read, no weights are loaded."""
    systems = []
    for words in rows:
        words = [argument_text(words[0]), *words[1:]]           # the name, which is written to files
        if not 2 <= len(words) <= 3 or not words[0].strip() or not words[0].isprintable() or not Path(words[1]).name:
            problems.add(f"--system {' '.join(map(repr, words))}: expected a name, a run and at most one model; quote "
                         f"names with blanks")
        elif words[0] in [system.name for system in systems]:
            problems.add(f"--system {words[0]!r}: stands there twice; give each system a name of its own")
        else:
            systems.append(System(words[0], Path(words[1]), words[2] if len(words) == 3 else None))
    found = find_models({system.name: system.model for system in systems}, problems)
    for system in systems:
        system.directory, system.config = found.get(system.name, (None, None))
        try:
            _take_record(system)
        except UserError as error:
            problems.add(str(error))
    return systems


def _take_record(system: System) -> None:
    """Size and speed as reranker.py recorded them beside the scores of this run, if it did; else the size alone."""
    if system.config:
        with torch.device("meta"):                      # counts without weights
            system.parameters = count_parameters(CrossEncoder(system.config))
    names = [system.run.with_suffix(".tsv.run.json").name, *["scores.tsv.run.json"] * (system.run.name == "run.trec")]
    paths = [path for name in names if (path := system.run.with_name(name)).is_file()]
    path = next((path for path in paths if script_of(path) != "prepare_examples.py"), None)     # which tells of pairs
    if path is None:
        return
    date = datetime.datetime.fromtimestamp(path.stat().st_mtime).isoformat(timespec="seconds")
    system.record = {"file": str(path), "date": date, **read_record(path)}
    settings, rate = system.record["settings"], system.record.get("pairs_per_second")
    system.parameters = system.record.get("parameters", system.parameters)
    if rate:                                            # 0 or missing: the run was interrupted
        processes, device = system.record.get("processes", 1), system.record.get("device", "unknown device")
        how = [flag for flag in ("fp16", "bf16", "int8") if settings.get(flag)]
        how += [f"{processes} processes"] if processes > 1 else []
        system.rates, system.where = [rate], ", ".join([device, *how])
    if system.directory and "weights" in settings and settings["weights"] != weights_checksum(system.directory):
        warn(f"{system.run}: was scored with other weights than those of {system.directory} ({path}); if the model was "
             f"not merely converted, re-rank again")


def choose_measures(names: list[str], level: int, problems: Problems) -> tuple[list[str], list[object]]:
    """Names of the measures as results have them, and the ones among them that ir_measures computes."""
    chosen, others = [], []
    for name in names:
        parsed = [] if name in MRR_CUTOFFS else parse_measures([name], level, problems)
        chosen += [name] if name in MRR_CUTOFFS else map(str, parsed)
        others += parsed
    return list(dict.fromkeys(chosen)), others


def evaluate_systems(systems: list[System], qrels: Qrels, runs: dict[Path, Run], measures: list[object], level: int,
                     complete: bool) -> list[str]:
    """Fill in values and averages; returns the queries averaged over: judged and in all runs, or all judged ones."""
    common = [query_id for query_id in qrels if all(query_id in run for run in runs.values())]
    if not common and not complete:
        raise UserError("no judged query is in all of the runs; report on runs of the same queries, or with --complete")
    queries = list(qrels) if complete else common
    judged = {query_id: qrels[query_id] for query_id in queries}
    for system in systems:
        missing = [query_id for query_id in qrels if query_id not in runs[system.run]]
        if missing:
            how = "counted as 0" if complete else "left out for all systems (--complete counts them as 0)"
            say(f"{system.run}: {len(missing)} judged queries are missing, {how}: {first_ten(missing)}")
        found = evaluate(judged, runs[system.run], measures, level, complete)
        system.values = {name: values for name, values, _ in found.results}
        system.averages = {name: average if values else None for name, values, average in found.results}
        for name, values in system.values.items():
            if len(values) < len(queries):
                say(f"{system.run}: {name} is defined for {len(values)} of the queries only; its average is over these")
        if found.float32_ties:
            warn(f"{system.run}: {found.float32_ties} pair(s) of differing scores are equal in single precision, as "
                 f"trec_eval reads them; its figures may differ")
    return queries


def measure_systems(systems: list[System], pairs: Examples, device: torch.device, dtype: torch.dtype | None, int8: bool,
                    rounds: int) -> None:
    """Load all models, and fill in their parameters and speeds on the same pairs; recorded speeds are dropped."""
    models = {}
    for system in systems:
        system.rates, system.where = [], ""
        if system.directory:
            models[system.name], notes = load_ranker(system.directory, system.config)
            for note in notes:
                say(f"note         {system.name}: {note}")
            system.parameters = count_parameters(models[system.name])
            prepare(models[system.name].to(device), dtype, int8)
    precision = "int8" if int8 else str(dtype or torch.float32).removeprefix("torch.")
    for name, rates in measure(models, pairs, device, rounds).items():
        system = next(system for system in systems if system.name == name)
        system.rates, system.where = rates, f"{device}, {precision}"
