"""Readers of runs and qrels, and the ranking rule."""
import gzip
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given
from hypothesis import strategies as st

from simplified_tinybert.common.files import Problems
from simplified_tinybert.data.collection import by_query, read_rows
from simplified_tinybert.ranking.trec import float32_ties, parse_score, rank, read_qrels, read_run, sum_in_order

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"

ids = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=8)
scores = st.sampled_from([-1.5, 0.0, 0.25, 0.5, 1.0]) | st.floats(-1e6, 1e6)


def written(tmp_path, text, name="file.txt"):
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def read(reader, path):
    problems = Problems()
    return reader(path, problems), problems.messages


def test_rank_breaks_ties_by_descending_string():
    assert rank({"D10": 0.5, "D9": 0.5, "D2": 0.7, "d1": 0.5}) == ["D2", "d1", "D9", "D10"]


def test_rank_sees_differences_below_single_precision():
    assert rank({"b": 1.0, "a": 1.0 + 2**-50}) == ["a", "b"]


@given(st.dictionaries(ids, scores, max_size=12), st.randoms())
def test_rank_sorts_by_score_and_id_in_any_file_order(scored, chance):
    expected = [document for _, document in sorted(((s, d) for d, s in scored.items()), reverse=True)]
    shuffled = list(scored.items())
    chance.shuffle(shuffled)
    assert rank(scored) == rank(dict(shuffled)) == expected


@given(st.dictionaries(ids, st.integers(0, 4).map(float), min_size=2, max_size=12), st.data())
def test_rank_is_the_order_of_trec_eval(scored, data):
    relevant = data.draw(st.sampled_from(sorted(scored)))
    evaluator = pytrec_eval.RelevanceEvaluator({"q": {relevant: 1}}, {"recip_rank"})
    assert evaluator.evaluate({"q": scored})["q"]["recip_rank"] == 1 / (rank(scored).index(relevant) + 1)


@pytest.mark.parametrize(("values", "ties"), [
    ([], 0),
    ([0.5, 0.5, 0.5], 0),                   # equal in double precision too
    ([1.0, 1.0 + 1e-9], 1),
    ([1.0 + 2e-9, 1.0, 1.0 + 1e-9, 3.0], 2),  # three scores become one
    ([1.0, 1.0 + 2**-23], 0),               # the next float32
    ([1e300, 1e301], 1),                    # both infinite in single precision
])
def test_float32_ties_by_hand(values, ties):
    assert float32_ties(values) == ties


@given(st.lists(st.floats(-1, 1) | st.sampled_from([0.9999999999, 0.99999999991, 1.0])))
def test_float32_ties_counts_what_single_precision_loses(values):
    assert float32_ties(values) == len(set(values)) - len({float(np.float32(value)) for value in values})


def test_float32_ties_are_what_trec_eval_orders_by_id():
    scored = {"a": 1.0 + 1e-9, "b": 1.0}
    evaluator = pytrec_eval.RelevanceEvaluator({"q": {"a": 1}}, {"recip_rank"})
    assert rank(scored) == ["a", "b"]
    assert float32_ties(scored.values()) == 1
    assert evaluator.evaluate({"q": scored})["q"]["recip_rank"] == 0.5


def test_sum_in_order_does_not_compensate():
    assert sum_in_order([1e16, 1.0, 1.0]) == 1e16  # 1e16 + 2 if the two were added first, or with compensation
    assert sum_in_order([]) == 0.0


@pytest.mark.parametrize(("text", "value"), [
    ("0.25", 0.25), ("-3", -3.0), ("1e-7", 1e-7), ("nan", None), ("inf", None), ("-Infinity", None), ("1e999", None),
    ("1_000", None), ("", None), ("0,5", None), ("0x10", None), ("１", None), ("abc", None),
])
def test_parse_score(text, value):
    found = parse_score(text)
    assert found == value or value is None and math.isnan(found)


def test_negative_zero_is_zero():
    assert repr(parse_score("-0.0")) == "0.0"


def test_read_run_accepts_any_white_space_and_keeps_file_order(tmp_path):
    path = written(tmp_path, "7 Q0 D#2_a-b 1 0.5 tag\r\n"
                             "7\tQ0\tD\u00e9\u2028x\t1\t0.75\ttag\n"
                             "  3  Q0 D\u00a01 9  -2e-3 t ")
    run, messages = read(read_run, path)
    assert messages == []
    assert run == {"7": {"D#2_a-b": 0.5, "D\u00e9\u2028x": 0.75}, "3": {"D\u00a01": -0.002}}
    assert list(run) == ["7", "3"]


def test_read_qrels_and_gzip(tmp_path):
    text = b"7 0 D1 2\n7 0 D2 -1\n5 Q0 D1 +0\n"
    expected = {"7": {"D1": 2, "D2": -1}, "5": {"D1": 0}}
    assert read(read_qrels, written(tmp_path, text)) == (expected, [])
    assert read(read_qrels, written(tmp_path, gzip.compress(text), "qrels.gz")) == (expected, [])


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_run_may_come_from_a_pipe(pack):
    reading, writing = os.pipe()
    with open(reading), open(writing, "wb") as pipe:
        pipe.write(pack(b"7 Q0 D1 1 0.5 tag\n7 Q0 D2 2 0.4 tag\n"))
        pipe.close()
        assert read(read_run, Path(f"/dev/fd/{reading}")) == ({"7": {"D1": 0.5, "D2": 0.4}}, [])


@pytest.mark.parametrize(("line", "message"), [
    ("7 Q0 D2 1 0.5", "found 5 columns ('7 Q0 D2 1 0.5'); expected 6"),
    ("7 Q0 D2 1 0.5 my run", "found 7 columns ('7 Q0 D2 1 0.5 my run'); expected 6"),
    ("", "found 0 columns (''); expected 6"),
    ("7 Q0 D2 1 high tag", "score 'high'"),
    ("7 Q0 D2 1 nan tag", "score 'nan'"),
    ("7 Q0 D2 1 -inf tag", "score '-inf'"),
    ("7 Q0 D1 2 0.4 tag", "document 'D1' is a duplicate for query '7'"),
    ("7 Q0 D\0b 2 0.4 tag", "holds a NUL byte ('7 Q0 D\\x00b 2 0.4 tag')"),
])
def test_read_run_errors(tmp_path, line, message):
    path = written(tmp_path, f"7 Q0 D1 1 0.5 tag\n{line}\n8 Q0 D1 1 0.5 tag\n")
    run, (found,) = read(read_run, path)
    assert found.startswith(f"{path}:2: {message}")
    assert run["7"]["D1"] == 0.5 and run["8"] == {"D1": 0.5}


@pytest.mark.parametrize(("line", "message"), [
    ("7 0 D2", "found 3 columns ('7 0 D2'); expected 4"),
    ("7 0 D2 1.0", "grade '1.0'"),
    ("7 0 D2 1_0", "grade '1_0'"),
    ("7 0 D1 1", "document 'D1' is a duplicate for query '7' (grade 1, first 1)"),
    ("7 0 D1 0", "document 'D1' is a duplicate for query '7' (grade 0, first 1)"),
])
def test_read_qrels_errors(tmp_path, line, message):
    path = written(tmp_path, f"7 0 D1 1\n{line}\n")
    qrels, (found,) = read(read_qrels, path)
    assert qrels == {"7": {"D1": 1}} and found.startswith(f"{path}:2: {message}")


@pytest.mark.parametrize("grade", ["10001", "999999999", "2147483648", "9223372036854775808", "-2000000000", "1" * 400])
def test_grades_that_trec_eval_cannot_hold_are_refused(tmp_path, grade):
    path = written(tmp_path, f"7 0 D1 10000\n7 0 D3 -999999999\n7 0 D2 {grade}\n")
    qrels, (message,) = read(read_qrels, path)
    assert qrels == {"7": {"D1": 10000, "D3": -999999999}}
    assert message.startswith(f"{path}:3: grade '{grade[:20]}") and "10,000" in message


@pytest.mark.parametrize("reader", [read_run, lambda path, problems: list(
    by_query(read_rows(path, problems), str(path), None, problems, check_ranks=True))])
@pytest.mark.parametrize("lines, warning", [
    (["q D1 1 .5", "q D2 2 .5", "q D3 3 .5"],
     ":3: query 'q': document 'D3' has rank 3 and score 0.5, document 'D2' has rank 2 and score 0.5; rank and score "
     "disagree in 1 of 1 queries, in 1 of them only between equal scores."),
    (["q D1 1 .1", "q D2 2 .3", "p D1 1 2", "p D2 2 1", "r D1 0 2", "r D2 1 2"],
     ":2: query 'q': document 'D2' has rank 2 and score 0.3, document 'D1' has rank 1 and score 0.1; rank and score "
     "disagree in 2 of 3 queries, in 1 of them only between equal scores."),
    (["q D1 2 .1", "q D2 1 .3"], ""), (["q D1 1 .1", "q D2 1 .3"], ""), (["q D1 0 .5", "q D2 0 .5"], ""),
    (["q D1 first .1", "q D2 second .3"], ""), (["q D2 1 .5", "q D1 2 .5"], ""), (["q D1 7 1"], "")])
def test_one_warning_for_ranks_that_contradict_the_scores(tmp_path, capsys, reader, lines, warning):
    rows = (line.split() for line in lines)
    path = written(tmp_path, "".join("{} Q0 {} {} {} t\n".format(*row) for row in rows))
    problems = Problems()
    reader(path, problems)
    stderr = capsys.readouterr().err
    assert not problems.count and stderr.count("\n") == bool(warning) and f"{path}{warning}" * bool(warning) in stderr


def test_ranks_of_interleaved_queries(tmp_path, capsys):
    read(read_run, written(tmp_path, "q Q0 A 1 1 t\np Q0 A 1 1 t\nq Q0 B 2 2 t\np Q0 B 2 .5 t\n"))
    assert "disagree in 1 of 2 queries." in capsys.readouterr().err


def test_all_problems_of_a_file_are_reported(tmp_path):
    path = written(tmp_path, "7 0 D1\n7 0 D1 x\n\xff\n".encode("latin-1"))
    messages = read(read_qrels, path)[1]
    assert [message.split(": ")[0] for message in messages] == [f"{path}:1", f"{path}:2", f"{path}:3"]


@given(st.dictionaries(st.tuples(ids, ids), scores, max_size=12))
def test_a_written_run_is_read_back(tmp_path_factory, scored):
    lines = [f"{query} Q0 {document} 1 {score!r} tag\n" for (query, document), score in scored.items()]
    random.Random(0).shuffle(lines)
    path = written(tmp_path_factory.mktemp("run"), "".join(lines))
    run, messages = read(read_run, path)
    assert messages == []
    assert {(query, document): score for query in run for document, score in run[query].items()} == scored


@pytest.mark.parametrize(("file", "queries", "judgements"), [
    ("trec-dl-2019-doc/qrels.test.txt", 43, 16258), ("msmarco-doc-dev/qrels.dev.txt", 5193, 5193)])
def test_real_judgements(file, queries, judgements):
    path = SHARED / file
    if not path.is_file():
        pytest.skip(f"{path} does not exist: the official judgements are not part of this repository")
    qrels, messages = read(read_qrels, path)
    assert messages == []
    assert (len(qrels), sum(map(len, qrels.values()))) == (queries, judgements)
