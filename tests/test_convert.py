"""convert_to_trec_results.py: aggregations, the written run, and errors."""
import argparse
import gzip
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import convert_to_trec_results as convert
from simplified_tinybert.common.files import Problems, UserError
from simplified_tinybert.ranking.aggregation import find_aggregation

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "data" / "aggregation"
NAMES = ["MaxP", "FirstP", "SumP", "AvgP", "1-Max&AvgP", "2-Max&AvgP", "3-Max&AvgP"]

scores = st.sampled_from([-1.0, 0.0, 0.1, 0.2, 0.3]) | st.floats(-1e6, 1e6)


class Result:
    def __init__(self, output: Path, capsys):
        self.text = output.read_bytes().decode()
        self.rows = [line.split("\t") for line in self.text.splitlines()]
        self.stdout, self.stderr = capsys.readouterr()
        self.documents = [(row[0], row[2], float(row[4])) for row in self.rows]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Return a function that calls main() with these lines as scores file and returns what it wrote."""
    def call(lines, *options, name="scores.tsv"):
        source, output = tmp_path / name, tmp_path / "run.trec"
        content = lines if isinstance(lines, bytes) else "".join(f"{line}\n" for line in lines).encode()
        source.write_bytes(content)
        monkeypatch.setattr(sys, "argv", ["convert", "--scores_file", str(source),
                                          "--output_results_file", str(output), *options])
        convert.main()
        return Result(output, capsys)
    return call


@pytest.fixture
def refused(run, tmp_path):
    """Return a function that calls main(), expects a UserError and no output, and returns the lines of the error."""
    def call(lines, *options):
        with pytest.raises(UserError) as caught:
            run(lines, *options)
        assert [path.name for path in tmp_path.iterdir()] == ["scores.tsv"]
        return str(caught.value).replace(f"{tmp_path}{os.sep}", "").splitlines()
    return call


# ---- the original's runs

@pytest.mark.parametrize(("name", "golden"), [
    ("MaxP", "MaxP"), ("SumP", "SumP"), ("AvgP", "AvgP"), ("2-Max&AvgP", "2-Max_and_AvgP"),
    ("3-Max&AvgP", "3-Max_and_AvgP"), ("2-Max_and_AvgP", "2-Max_and_AvgP"), ("03-Max_and_AvgP", "3-Max_and_AvgP")])
def test_golden_runs_to_the_byte(run, name, golden):
    result = run((GOLDEN / "scores.tsv").read_bytes(), "--aggregation", name)
    assert result.text.encode() == (GOLDEN / f"{golden}.trec").read_bytes()
    assert "20 queries, 300 documents, 1248 passages, aggregation " in result.stderr
    assert result.stdout == ""


def test_maxp_is_the_default_and_gzip_is_read(run):
    result = run(gzip.compress((GOLDEN / "scores.tsv").read_bytes()), name="scores.tsv.gz")
    assert result.text.encode() == (GOLDEN / "MaxP.trec").read_bytes()


# ---- aggregations

def aggregate(name, passages):
    aggregation, state = find_aggregation(name), None
    for number, score in passages:
        state = aggregation.update(state, score, number)
    return aggregation.score(state)


@pytest.mark.parametrize(("name", "expected"), [
    ("MaxP", 4.0), ("FirstP", 1.0), ("SumP", 5.5), ("AvgP", 1.375), ("1-Max&AvgP", 4.0), ("2-Max&AvgP", 3.0),
    ("3-Max&AvgP", 7 / 3), ("4-Max&AvgP", 1.375), ("5-Max&AvgP", 1.375), ("100-Max&AvgP", 1.375)])
def test_aggregations_by_hand(name, expected):
    assert aggregate(name, [(2, 4.0), (0, 1.0), (1, 2.0), (10, -1.5)]) == expected


def by_definition(name, passages):
    values = [score for _, score in passages]
    if name == "MaxP":
        return sorted(values)[-1]
    if name == "FirstP":
        first = min(number for number, _ in passages)
        return max(score for number, score in passages if number == first)
    if name == "SumP":
        return np.sum(values)
    if name == "AvgP":
        return np.sum(values) / len(values)
    best = sorted(values)[::-1][:int(name.split("-")[0])]
    total = 0.0
    for value in best:
        total += value
    return total / len(best)


@pytest.mark.parametrize("name", NAMES)
@given(st.lists(st.tuples(st.integers(0, 30), scores), min_size=1, max_size=40))
def test_aggregations_equal_their_definitions_to_the_last_bit(name, passages):
    assert aggregate(name, passages) == by_definition(name, passages)


def test_sums_of_many_passages_are_numpys(run):
    # Added from left to right, these 20 end in another digit.
    values = [0.7] * 20
    left_to_right = 0.0
    for value in values:
        left_to_right += value
    result = run([f"q\td_{i}\t{value!r}" for i, value in enumerate(values)], "--aggregation", "SumP")
    assert result.documents == [("q", "d", float(np.sum(values)))] != [("q", "d", left_to_right)]


@pytest.mark.parametrize("name", ["MaxP", "FirstP", "2-Max&AvgP"])
@given(st.lists(st.tuples(st.integers(0, 9), scores), min_size=1, max_size=10), st.randoms())
def test_the_order_of_the_lines_does_not_matter(name, passages, chance):
    shuffled = passages.copy()
    chance.shuffle(shuffled)
    assert aggregate(name, passages) == aggregate(name, shuffled)


def test_memory_is_what_the_aggregation_needs():
    states = {name: None for name in NAMES}
    for number in range(1000):
        for name in NAMES:
            states[name] = find_aggregation(name).update(states[name], number / 7, number)
    assert isinstance(states["MaxP"], float)
    assert states["FirstP"] == (0, 0.0)
    assert sorted(states["3-Max&AvgP"]) == [997 / 7, 998 / 7, 999 / 7]
    assert states["SumP"].itemsize * len(states["SumP"]) == 8000


@pytest.mark.parametrize("name", ["maxp", "", "0-Max&AvgP", "-1-Max&AvgP", "k-Max&AvgP", "2-Max", "2.5-Max&AvgP"])
def test_unknown_aggregation(name):
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(repr(name))):
        convert.parse_aggregation(name)


# ---- ids

@pytest.mark.parametrize(("passage_id", "document_id", "number"), [
    ("D1_0", "D1", 0), ("D1_12", "D1", 12), ("D1_passage-3", "D1", 3), ("FBIS3-10082_passage-0", "FBIS3-10082", 0),
    ("msmarco_doc_00_0_4", "msmarco_doc_00_0", 4), ("msmarco_v2.1_doc_00_0#3_77", "msmarco_v2.1_doc_00_0#3", 77),
    ("D1", "D1", 0), ("a#b-7", "a#b-7", 0), ("Käse_é-07", "Käse", 7), ("D_x", "D", None), ("D_", "D", None),
    ("D_3x", "D", None), ("D_٣", "D", None), ("_3", "", 3)])
def test_ids(passage_id, document_id, number):
    document, suffix = convert.split_passage_id(passage_id)
    assert (document, convert.passage_number(suffix)) == (document_id, number)


def test_documents_with_awkward_ids_stay_apart(run):
    result = run(["q#1\tmsmarco_doc_00_0_0\t0.5", "q#1\tmsmarco_doc_00_1_0\t0.75", "q#1\ta-b_c#d_passage-1\t0.25",
                  "q#1\tмир_0\t1.0", "q_2\tmsmarco_doc_00_0_0\t0.125"])
    assert result.text == ("q#1\tQ0\tмир\t1\t1.0\tbert_MaxP\n"
                           "q#1\tQ0\tmsmarco_doc_00_1\t2\t0.75\tbert_MaxP\n"
                           "q#1\tQ0\tmsmarco_doc_00_0\t3\t0.5\tbert_MaxP\n"
                           "q#1\tQ0\ta-b_c#d\t4\t0.25\tbert_MaxP\n"
                           "q_2\tQ0\tmsmarco_doc_00_0\t1\t0.125\tbert_MaxP\n")


def test_ids_without_underscore_are_documents_and_counted(run):
    result = run(["q\tD1\t0.5", "q\tD2\t0.25", "q\tD2_1\t0.75"])
    assert result.documents == [("q", "D2", 0.75), ("q", "D1", 0.5)]
    assert '2 passage ids have no "_"' in result.stderr


def test_firstp_takes_the_lowest_number_and_counts_documents_without_passage_0(run):
    result = run(["q\tA_10\t9", "q\tA_2\t0.5", "q\tB_passage-0\t0.25", "q\tB_passage-1\t7", "r\tA_3\t1", "r\tC\t2"],
                 "--aggregation", "FirstP")
    assert result.documents == [("q", "A", 0.5), ("q", "B", 0.25), ("r", "C", 2.0), ("r", "A", 1.0)]
    assert "2 documents have no passage 0" in result.stderr


def test_firstp_needs_numbers_and_only_firstp(run, refused):
    lines = ["q\tA_0\t1", "q\tA_x\t2", "q\tB_\t3"]
    first, second = refused(lines, "--aggregation", "FirstP")
    assert first.startswith("scores.tsv:2: passage id 'A_x'") and second.startswith("scores.tsv:3: passage id 'B_'")
    assert run(lines).documents == [("q", "B", 3.0), ("q", "A", 2.0)]


# ---- the run

def test_queries_by_first_appearance_documents_by_score_then_descending_id(run):
    result = run(["2\tD10_0\t0.5", "10\tD1_0\t0.1", "2\tD9_0\t0.5", "2\tD1_0\t0.75", "10\tD2_0\t-1", "2\tD9_1\t0.25"])
    assert [row[:4] for row in result.rows] == [
        ["2", "Q0", "D1", "1"], ["2", "Q0", "D9", "2"], ["2", "Q0", "D10", "3"],
        ["10", "Q0", "D1", "1"], ["10", "Q0", "D2", "2"]]


def test_scores_are_printed_in_full_and_line_ends_do_not_matter(run):
    assert run(b"q\tA_0\t0.30000000000000004\r\nq\tB_0\t1e-7").text == (
        "q\tQ0\tA\t1\t0.30000000000000004\tbert_MaxP\nq\tQ0\tB\t2\t1e-07\tbert_MaxP\n")


@pytest.mark.parametrize(("options", "tag"), [
    ([], "bert_MaxP"), (["--aggregation", "10-Max_and_AvgP"], "bert_10-Max&AvgP"),
    (["--aggregation", "SumP", "--run_name", "my-run#2_é"], "my-run#2_é")])
def test_run_name(run, options, tag):
    assert run(["q\tA_0\t1"], *options).text == f"q\tQ0\tA\t1\t1.0\t{tag}\n"


def test_float32_ties_are_reported(run):
    stderr = run(["q\tA_0\t1.0000000001", "q\tB_0\t1.0", "r\tA_0\t0.5", "s\tA_0\t0.50000000001"]).stderr
    assert "warning: 1 pair(s) of different scores are equal in single precision" in stderr
    assert "document id" in stderr and "reranker.py --score log_odds" in stderr
    assert "warning" not in run(["q\tA_0\t1.0", "q\tB_0\t1.0", "q\tC_0\t2"]).stderr


# ---- errors

@pytest.mark.parametrize(("line", "message"), [
    ("q\tA_1", "found 2 columns ('q\\tA_1'), expected 3"),
    ("q A_1 0.5", "found 1 columns ('q A_1 0.5'), expected 3"),
    ("q\tA_1\t0.5\t1", "found 4 columns ('q\\tA_1\\t0.5\\t1'), expected 3"),
    ("", "found 1 columns (''), expected 3"),
    ("q\tA_1\thigh", "score 'high'"),
    ("q\tA_1\tNaN", "score 'NaN'"),
    ("q\tA_1\t-inf", "score '-inf'"),
    ("\tA_1\t1", "query id ''"),
    ("q\t\t1", "passage id ''"),
    ("q 1\tA_1\t1", "query id 'q 1'"),
    ("q\tA\u3000B_1\t1", "passage id 'A\\u3000B_1'"),
    ("q\t_1\t1", "passage id '_1'"),
    ("q\tA_0\t0.25", "query and passage 'q A_0' is a duplicate of line 1"),
])
def test_errors_name_the_line(refused, line, message):
    found, = refused(["q\tA_0\t0.5", line, "r\tA_0\t0.5"])
    assert found.startswith(f"scores.tsv:2: {message}")


def test_all_problems_at_once(refused):
    errors = refused(["q\tA_0\t0.5", "q\tA_1\tx", "q\tA_0\t0.5", "r\tA_0\t1", "q", "q\tA_0\t2"])
    assert [re.match(r"scores.tsv:\d+", line)[0] for line in errors] == [
        f"scores.tsv:{number}" for number in (2, 5, 3, 6)]


@pytest.mark.parametrize("name", ["SumP", "AvgP", "2-Max&AvgP"])
def test_scores_with_an_infinite_sum(refused, run, name):
    lines = ["q\tD1_0\t1e308", "q\tD1_1\t1e308", "q\tD2_0\t1"]
    found, = refused(lines, "--aggregation", name)
    assert found.startswith("scores.tsv: the scores of document 'D1' for query 'q' add up to more than")
    assert run(lines).documents == [("q", "D1", 1e308), ("q", "D2", 1.0)]


def test_empty_file(refused):
    assert refused(b"")[0].startswith("scores.tsv: is empty")


def test_damaged_gzip(refused):
    assert "damaged or cut off" in refused(gzip.compress(b"q\tA_0\t1\n" * 9)[:-6])[0]


def flags(**given):
    names = ("run_name", "interpolate", "interpolation_weight", "interpolation_qrels")
    return argparse.Namespace(**dict.fromkeys(names) | given)


def test_arguments_are_checked_together(tmp_path, monkeypatch):
    args = flags(scores_file=tmp_path / "none.tsv", output_results_file=tmp_path / "no" / "run.trec", run_name="my run")
    with pytest.raises(UserError) as caught:
        convert.check_args(args)
    assert [line.replace(str(tmp_path), "").partition(": ")[0] for line in str(caught.value).splitlines()] == [
        "/none.tsv", "/no/run.trec", "--run_name 'my run'"]


@pytest.mark.parametrize("name", ["", "a\tb", " a", "a\n"])
def test_run_names_that_break_columns(refused, name):
    assert refused(["q\tA_0\t1"], "--run_name", name)[0].startswith(f"--run_name {name!r}: ")


def test_the_input_is_never_overwritten(tmp_path):
    path = tmp_path / "scores.tsv"
    path.write_text("q\tA_0\t1\n")
    with pytest.raises(UserError, match="is also an input; name another output"):
        convert.check_args(flags(scores_file=path, output_results_file=path))


def test_a_pipe_is_refused(tmp_path):
    reading, writing = os.pipe()
    try:
        with pytest.raises(UserError, match="is not a regular file, but the scores must be read twice"):
            convert.check_args(flags(scores_file=Path(f"/dev/fd/{reading}"), output_results_file=tmp_path / "run.trec"))
    finally:
        os.close(reading)
        os.close(writing)


def test_a_file_without_duplicates_is_read_once(tmp_path, monkeypatch):
    path, reads = tmp_path / "scores.tsv", []
    path.write_text("q\tA_0\t1\nq\tA_1\t1\n")
    read_lines = convert.read_lines
    monkeypatch.setattr(convert, "read_lines", lambda *args: reads.append(args) or read_lines(*args))
    convert.collect(path, find_aggregation("MaxP"), Problems())
    assert len(reads) == 1


# ---- as a program

def program(*options, cwd):
    return subprocess.run([sys.executable, str(ROOT / "convert_to_trec_results.py"), *map(str, options)],
                          cwd=cwd, capture_output=True, text=True, encoding="utf-8")


def test_program_writes_the_run_and_ends_with_0(tmp_path):
    done = program("--scores_file", GOLDEN / "scores.tsv", "--output_results_file", "run.trec", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    assert (tmp_path / "run.trec").read_bytes() == (GOLDEN / "MaxP.trec").read_bytes()


def test_program_keeps_an_existing_run_if_the_scores_have_errors(tmp_path):
    (tmp_path / "scores.tsv").write_text("q\tA_0\t1\nq\tA_0\t2\nq\tA_1\tx\n")
    (tmp_path / "run.trec").write_text("before")
    done = program("--scores_file", "scores.tsv", "--output_results_file", "run.trec", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert [line.partition("; ")[0].partition("': ")[0] for line in done.stderr.splitlines()] == [
        "error: scores.tsv:3: score 'x", "error: scores.tsv:2: query and passage 'q A_0' is a duplicate of line 1"]
    assert (tmp_path / "run.trec").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.trec", "scores.tsv"]


def test_program_refuses_an_unknown_aggregation(tmp_path):
    done = program("--scores_file", GOLDEN / "scores.tsv", "--output_results_file", "run.trec",
                   "--aggregation", "MinP", cwd=tmp_path)
    assert done.returncode == 2
    assert "'MinP': expected MaxP" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())
