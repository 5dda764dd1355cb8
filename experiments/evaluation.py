"""From the runs of a study to its results.json: averages, comparisons, speeds, what was tuned. Not a command.

Values of a query are means over the seeds before queries are compared. Families for Holm's correction, by measure: the
teacher and all students against BM25, all students against the teacher, and the proposed method against the others of
its shape.
"""
import math
import statistics
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig

from simplified_tinybert.common.files import Problems
from simplified_tinybert.data.features import summarise
from simplified_tinybert.model.bert import count_parameters
from simplified_tinybert.model.pretrained import new_cross_encoder
from simplified_tinybert.ranking.measures import PerQuery, Qrels, Run, evaluate, parse_measures
from simplified_tinybert.ranking.scoring import prepare
from simplified_tinybert.ranking.significance import apply_holm, compare
from simplified_tinybert.ranking.speed import machine, measure, sample_pairs
from simplified_tinybert.ranking.trec import split_passage_id

SPEED_PAIRS, SPEED_ROUNDS = {"cpu": 256, "cuda": 16384}, 5
Values = dict[str, dict[str, PerQuery]]         # system → measure → query → mean over the seeds


def first_ranking(pairs: Path) -> Run:
    """The order in which the pairs stand is that of the candidates: BM25's ranking of what is re-ranked."""
    ranked: dict[str, dict[str, None]] = {}
    with open(pairs, encoding="utf-8") as lines:
        for line in lines:
            query_id, _, passage_id = line.partition("\t")[0].partition("#")
            ranked.setdefault(query_id, {})[split_passage_id(passage_id)[0]] = None
    return {query_id: {document_id: -float(place) for place, document_id in enumerate(documents)}
            for query_id, documents in ranked.items()}


def values_of(qrels: Qrels, runs: list[Run], measures: list[str]) -> tuple[dict[str, list[float]], dict[str, PerQuery]]:
    """By measure: the average of each run (one for each seed), and each query's mean over the runs."""
    parsed = parse_measures(measures, 1, Problems())
    found = [{name: (values, average) for name, values, average in evaluate(qrels, run, parsed, 1, False).results}
             for run in runs]
    averages = {name: [each[name][1] for each in found] for name in measures}
    values = {name: {query_id: statistics.fmean(each[name][0][query_id] for each in found)
                     for query_id in found[0][name][0]} for name in measures}
    return averages, values


def family(values: Values, measure: str, pairs: dict[str, tuple[str, str]]) -> dict[str, dict]:
    """Comparisons of pairs of systems that are read together, with 95 % intervals (Student's t) of the differences."""
    from scipy import stats

    found, intervals = {}, {}
    for label, names in pairs.items():
        first, second = (values[name][measure] for name in names)
        found[label] = compare(first, second, permutations=10_000)
        differences = np.array([first[query_id] - second[query_id] for query_id in sorted(first)])
        half = float(stats.t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / len(differences) ** 0.5) \
            if len(differences) > 1 else math.inf
        intervals[label] = [max(-1.0, differences.mean() - half), min(1.0, differences.mean() + half)]
    apply_holm(list(found.values()))
    return {label: asdict(comparison) | {"interval": intervals[label]} for label, comparison in found.items()}


def comparisons(values: Values, shapes: dict[str, str], measures: list[str], proposed: str) -> dict:
    """{"BM25" | "teacher" | proposed student: {measure: {system: comparison}}}; shapes: student → its shape."""
    families = {"BM25": {name: (name, "BM25") for name in ("teacher", *shapes)},
                "teacher": {name: (name, "teacher") for name in shapes}}
    for name, shape in shapes.items():
        if name == f"{shape} {proposed}":
            families[name] = {other: (name, other) for other in shapes if shapes[other] == shape and other != name}
    return {label: {measure: family(values, measure, pairs) for measure in measures}
            for label, pairs in families.items()}


def speeds(configs: dict[str, BertConfig], features: Path, device: torch.device) -> dict:
    """By shape: parameters, pairs per second, speed-up over the first; and how it was measured.

    The weights are random: the speed is that of any model of the shape.
    """
    models, facts = {}, machine(device)
    for name, config in configs.items():
        models[name] = new_cross_encoder(config, torch.Generator().manual_seed(42)).to(device)
        prepare(models[name], None, False)
    pairs = sample_pairs([features], summarise([features], Problems()).examples, SPEED_PAIRS[device.type])
    rates = measure(models, pairs, device, SPEED_ROUNDS)
    first = next(iter(configs))
    found = {name: {"shape": name, "parameters": count_parameters(model), "rounds": rates[name],
                    "pairs_per_second": statistics.median(rates[name]),
                    "speed_up": statistics.median(mine / theirs for mine, theirs in zip(rates[name], rates[first]))}
             for name, model in models.items()}
    where = facts["GPU"] if device.type == "cuda" else f"{facts['CPU']}, cores {facts['cores']}"
    return {"shapes": found, "note": f"median of {SPEED_ROUNDS} rounds in turn over the same {len(pairs)} pairs of "
                                     f"{pairs.lengths.mean():.0f} tokens on average, float32 ({where})."}
