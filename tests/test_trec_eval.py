"""Measures equal trec_eval's for each query of the golden runs, ties included; the official judgements parse."""
import math
import random
from pathlib import Path

import ir_measures
import pytest
import pytrec_eval

from simplified_tinybert.common.files import Problems
from simplified_tinybert.ranking.measures import evaluate
from simplified_tinybert.ranking.trec import read_qrels, read_run

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "data" / "aggregation"
SHARED = ROOT.parent / "shared" / "data"
OFFICIAL = {"trec-dl-2019-doc": ("qrels.test.txt", 43), "msmarco-doc-dev": ("qrels.dev.txt", 5193)}


def evaluated(qrels, run, complete=False):
    measures = [ir_measures.nDCG @ 10, ir_measures.AP, ir_measures.RR, ir_measures.RR @ 10, ir_measures.RR @ 1]
    results = evaluate(qrels, run, measures, 1, complete).results
    return tuple({name: getattr(result, part) for name, result in results.items()} for part in ("values", "average"))


def check_against_trec_eval(qrels, run):
    """Compare each query. trec_eval has no RR@k: it is recip_rank, or 0 beyond rank k."""
    values, _ = evaluated(qrels, run)
    peer = pytrec_eval.RelevanceEvaluator(qrels, {"map", "ndcg_cut.10", "recip_rank"}).evaluate(run)
    for query_id, figures in peer.items():
        assert values["nDCG@10"][query_id] == figures["ndcg_cut_10"]
        assert values["AP"][query_id] == figures["map"]
        for name in ("RR", "MRR"):
            assert values[name][query_id] == figures["recip_rank"]
        for name, cutoff in (("RR@10", 10), ("MRR@10", 10), ("RR@1", 1), ("MRR@100", 100)):
            expected = figures["recip_rank"] if figures["recip_rank"] >= 1 / cutoff else 0
            assert values[name][query_id] == expected, name
    assert values["AP"].keys() == peer.keys()


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.trec")), ids=lambda path: path.stem)
@pytest.mark.parametrize("digits", [None, 1], ids=["as they are", "rounded until they tie"])
def test_golden_runs(path, digits):
    problems = Problems()
    qrels, run = read_qrels(GOLDEN / "qrels.txt", problems), read_run(path, problems)
    if digits:
        run = {query_id: {document_id: round(score, digits) for document_id, score in scores.items()}
               for query_id, scores in run.items()}
        assert any(len(set(scores.values())) < len(scores) for scores in run.values())
    check_against_trec_eval(qrels, run)


def test_all_scores_equal():
    """Documents are ordered by descending id, compared as strings: 9 before 10."""
    qrels = {"q": {"9": 1, "10": 0, "b": 0, "a": 0}}
    run = {"q": {"a": 1.0, "b": 1.0, "9": 1.0, "10": 1.0}}
    check_against_trec_eval(qrels, run)
    assert evaluated(qrels, run)[0]["RR"]["q"] == 1 / 3


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_judgements(name):
    """Evaluate the ideal run and random runs, made from the judgements."""
    file, count = OFFICIAL[name]
    path = SHARED / name / file
    if not path.is_file():
        pytest.skip(f"{path} does not exist: the official judgements are not part of this repository")
    problems = Problems()
    qrels = read_qrels(path, problems)
    problems.raise_if_any()
    assert len(qrels) == count
    ideal = {query_id: {document_id: float(grade) for document_id, grade in grades.items()}
             for query_id, grades in qrels.items()}
    _, averages = evaluated(qrels, ideal)
    assert averages["nDCG@10"] == pytest.approx(1) and averages["MRR"] == averages["AP"] == averages["RR@10"] == 1
    generator = random.Random(3)
    drawn = {query_id: {f"D{number}": generator.random() for number in range(20)} |
             {document_id: round(generator.random(), 1) for document_id in grades}
             for query_id, grades in qrels.items()}
    check_against_trec_eval(qrels, {query_id: drawn[query_id] for query_id in list(drawn)[:200]})
    half = dict(list(drawn.items())[::2])
    (complete, over_all), (_, over_half) = evaluated(qrels, half, complete=True), evaluated(qrels, half)
    assert len(complete["MRR"]) == count
    assert over_all["MRR@100"] == pytest.approx(over_half["MRR@100"] * len(half) / count)
    assert math.isclose(over_all["nDCG@10"] * count, over_half["nDCG@10"] * len(half))
