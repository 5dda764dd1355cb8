"""Compute the content of a study's results.json from its runs: averages, comparisons, speeds. Not a command.

Each query's values are averaged over the seeds before systems are compared. Holm's correction is applied to three
families for each measure: the teacher and all students against BM25, all students against the teacher, and the
proposed method against the other methods for its student shape. Interpolations with BM25 are a family of their own.
"""
import math
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig

from simplified_tinybert.common.files import Problems
from simplified_tinybert.data.collection import read_rows
from simplified_tinybert.data.features import summarise
from simplified_tinybert.model.bert import count_parameters
from simplified_tinybert.model.pretrained import new_cross_encoder
from simplified_tinybert.ranking.interpolation import best_weight, interpolate_run, values_by_weight
from simplified_tinybert.ranking.measures import PerQuery, Qrels, Run, evaluate, parse_measures
from simplified_tinybert.ranking.scoring import prepare
from simplified_tinybert.ranking.significance import compare_pairs
from simplified_tinybert.ranking.speed import SPEED_PAIRS, machine, measure, sample_pairs
from simplified_tinybert.ranking.trec import read_qrels, read_run, split_passage_id

SPEED_ROUNDS = 5
Values = dict[str, dict[str, PerQuery]]         # system → measure → query → mean over the seeds


def first_ranking(pairs: Path) -> Run:
    """Return BM25's ranking of the re-ranked documents: a file of pairs lists them in this order."""
    ranking: Run = {}
    with open(pairs, encoding="utf-8") as lines:
        for line in lines:
            query_id, _, passage_id = line.partition("\t")[0].partition("#")
            scores = ranking.setdefault(query_id, {})
            scores.setdefault(split_passage_id(passage_id)[0], -float(len(scores)))
    return ranking


def values_of(qrels: Qrels, runs: list[Run], measures: list[str]) -> tuple[dict[str, list[float]], dict[str, PerQuery]]:
    """Return, for each measure, the average of each run (one run per seed), and each query's mean over the runs."""
    parsed = parse_measures(measures, 1, Problems())
    results = [evaluate(qrels, run, parsed, 1, False).results for run in runs]
    averages = {name: [result[name].average for result in results] for name in measures}
    values = {name: {query_id: statistics.fmean(result[name].values[query_id] for result in results)
                     for query_id in results[0][name].values} for name in measures}
    return averages, values


def interpolated_values(splits: dict[str, list[Path]],
                        measures: list[str]) -> tuple[float, dict[str, PerQuery], dict[str, PerQuery]]:
    """Interpolate a model's log-odds with BM25's scores of the same documents.

    splits: "dev" and "test" → paths of judgements, BM25's run and the model's run, with probabilities as scores.
    Returns the weight of BM25 that has the best nDCG@10 on dev, each test query's values, and those of the model alone.
    """
    read = {}
    for split, (qrels, bm25, run) in splits.items():
        ranker, scores = log_odds_run(read_run(run, Problems())), {}
        for _, query_id, document_id, score, _ in read_rows(bm25, Problems()):
            if document_id in ranker.get(query_id, {}):
                scores.setdefault(query_id, {})[document_id] = score
        read[split] = read_qrels(qrels, Problems()), scores, ranker
    qrels, scores, ranker = read["dev"]
    weight = best_weight(values_by_weight(ranker, scores, qrels))
    qrels, scores, ranker = read["test"]
    found, alone = (values_of(qrels, [run], measures)[1] for run in (interpolate_run(ranker, scores, weight), ranker))
    return weight, found, alone


def log_odds_run(run: Run) -> Run:
    """Turn probabilities into log-odds. In double precision, they keep nine digits up to log-odds of 15."""
    def log_odds(probability: float) -> float:
        probability = min(max(probability, sys.float_info.epsilon), 1.0 - sys.float_info.epsilon)
        return math.log(probability / (1.0 - probability))

    return {query_id: {document_id: log_odds(score) for document_id, score in scores.items()}
            for query_id, scores in run.items()}


def compare_family(values: Values, measure: str, pairs: dict[str, tuple[str, str]]) -> dict[str, dict]:
    """Compare pairs of systems as one family. Differences get 95 % confidence intervals (Student's t)."""
    from scipy import stats

    runs = {label: (values[first][measure], values[second][measure]) for label, (first, second) in pairs.items()}
    family, intervals = compare_pairs(runs, permutations=10_000), {}
    for label, (first, second) in runs.items():
        differences = np.array([first[query_id] - second[query_id] for query_id in sorted(first)])
        half = float(stats.t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / len(differences) ** 0.5) \
            if len(differences) > 1 else math.inf
        intervals[label] = [max(-1.0, differences.mean() - half), min(1.0, differences.mean() + half)]
    return {label: asdict(comparison) | {"interval": intervals[label]} for label, comparison in family.items()}


def comparisons(values: Values, shapes: dict[str, str], measures: list[str], proposed: str) -> dict:
    """Return {"BM25" | "teacher" | proposed student: {measure: {system: comparison}}}. `shapes`: student → shape."""
    families = {"BM25": {name: (name, "BM25") for name in ("teacher", *shapes)},
                "teacher": {name: (name, "teacher") for name in shapes}}
    for name, shape in shapes.items():
        if name == f"{shape} {proposed}":
            families[name] = {other: (name, other) for other in shapes if shapes[other] == shape and other != name}
    return {label: {measure: compare_family(values, measure, pairs) for measure in measures}
            for label, pairs in families.items()}


def speeds(configs: dict[str, BertConfig], features: Path, device: torch.device) -> dict:
    """Measure each shape: parameters, pairs per second, speed-up over the first shape. The weights are random."""
    models, parameters = {}, {}
    for name, config in configs.items():
        models[name] = new_cross_encoder(config, torch.Generator().manual_seed(42)).to(device)
        parameters[name] = count_parameters(models[name])       # packed weights are no parameters
        prepare(models[name], None, False)
    pairs = sample_pairs([features], summarise([features], Problems()).examples, SPEED_PAIRS[device.type])
    rates = measure(models, pairs, device, SPEED_ROUNDS)
    baseline = next(iter(rates.values()))
    shapes = {name: {"shape": name, "parameters": parameters[name], "rounds": rates[name],
                     "pairs_per_second": statistics.median(rates[name]),
                     "speed_up": statistics.median(rate / base for rate, base in zip(rates[name], baseline))}
              for name in models}
    hardware = machine(device)
    where = hardware["GPU"] if device.type == "cuda" else f"{hardware['CPU']}, cores {hardware['cores']}"
    return {"shapes": shapes, "note": f"median of {SPEED_ROUNDS} rounds in turn over the same {len(pairs)} pairs of "
                                      f"{pairs.lengths.mean():.0f} tokens on average, float32 ({where})."}
