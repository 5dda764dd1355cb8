"""msmarco_mrr_eval.py: measures, averages and errors."""
import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import ir_measures
import pytest
from hypothesis import given
from hypothesis import strategies as st

import msmarco_mrr_eval as evaluate
from simplified_tinybert.common.files import Problems, UserError
from simplified_tinybert.ranking import measures
from simplified_tinybert.ranking.trec import rank

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "data" / "aggregation"
MEASURES = json.loads((GOLDEN / "measures.json").read_text())
ROW = "#####################"

QRELS = """\
q1 0 A 0
q1 0 B 2
q1 0 C 1
q2 0 A -1
q2 0 D 1
q3 0 A 0
q4 0 A 3
"""
# q1: C B A (C and B tie), q2: A D, q3: nothing relevant, q4 is missing, x is not judged
RUN = """\
q1 Q0 A 1 0.1 t
q1 Q0 B 2 0.5 t
q1 Q0 C 3 0.5 t
q2 Q0 D 1 -2 t
q2 Q0 A 2 -1 t
x Q0 A 1 1 t
q3 Q0 A 1 1 t
"""


@pytest.fixture
def evaluated(tmp_path, monkeypatch, capsys):
    """Return a function that calls main() and returns ({measure: average}, lines before the block, stderr lines)."""
    def call(qrels, run, *options):
        paths = []
        for name, content in (("qrels.txt", qrels), ("run.trec", run)):
            if not isinstance(content, Path):
                (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
                content = tmp_path / name
            paths.append(str(content))
        monkeypatch.setattr(sys, "argv", ["evaluate", *paths, *options])
        evaluate.main()
        out, err = capsys.readouterr()
        lines = out.splitlines()
        start = lines.index(ROW)
        assert lines[-1] == ROW
        averages = dict(line.split(": ") for line in lines[start + 1:-1])
        return {name: float(value) for name, value in averages.items()}, lines[:start], err.splitlines()
    return call


@pytest.fixture
def refused(evaluated, tmp_path, capsys):
    """Return a function that calls main(), expects a UserError and returns its lines, with paths relative."""
    def call(*args):
        with pytest.raises(UserError) as caught:
            evaluated(*args)
        assert capsys.readouterr().out == ""
        return str(caught.value).replace(f"{tmp_path}{os.sep}", "").splitlines()
    return call


# ---- the original's figures

@pytest.mark.parametrize("name", MEASURES)
def test_golden_results(evaluated, name):
    golden = MEASURES[name]
    averages, before, _ = evaluated(GOLDEN / "qrels.txt", GOLDEN / f"{name.replace('&', '_and_')}.trec",
                                    "--measures", "nDCG@10", "RR", "AP", "RR@10")
    assert before == []
    assert list(averages) == ["query_num", "MRR", "MRR@10", "MRR@100", "nDCG@10", "RR", "AP", "RR@10"]
    assert (averages["query_num"], averages["MRR"], averages["MRR@10"]) == (20, golden["mrr"], golden["mrr_at_10"])
    for measure in ("nDCG@10", "RR", "AP"):
        assert averages[measure] == pytest.approx(golden["ir_measures"][measure], abs=1e-12)
    # In ir_measures (the golden file), RR@10 orders equal scores by ascending id, RR and all others by descending id.
    # Here all measures use one order, so RR@10 is MRR@10.
    assert averages["RR@10"] == pytest.approx(golden["mrr_at_10"], abs=1e-12)


def test_the_golden_file_does_show_the_two_tie_rules():
    assert any(golden["ir_measures"]["RR@10"] != golden["mrr_at_10"] for golden in MEASURES.values())


def test_output_to_the_byte(tmp_path):
    done = program(GOLDEN / "qrels.txt", GOLDEN / "MaxP.trec", "--measures", "nDCG@10", cwd=tmp_path)
    assert done.stdout == (f"{ROW}\nquery_num: 20\nMRR: 0.36529761904761904\nMRR@10: 0.3617261904761905\n"
                           f"MRR@100: 0.36529761904761904\nnDCG@10: 0.38564540826126426\n{ROW}\n")
    assert (done.returncode, done.stderr) == (0, "averaged over 20 queries: judged and in the run\n")


# ---- by hand

def test_reciprocal_rank_by_hand():
    ranking = ["a", "b", "c", "d"]
    assert measures.reciprocal_rank(ranking, {"c", "d"}) == 1 / 3
    assert measures.reciprocal_rank(ranking, {"c", "d"}, 3) == 1 / 3
    assert measures.reciprocal_rank(ranking, {"c", "d"}, 2) == 0.0
    assert measures.reciprocal_rank(ranking, {"e"}) == measures.reciprocal_rank([], {"a"}) == 0.0


def test_averages_over_judged_queries_in_the_run(evaluated):
    averages, _, stderr = evaluated(QRELS, RUN)
    assert averages == {"query_num": 3, "MRR": (1 + 1 / 2 + 0) / 3, "MRR@10": 0.5, "MRR@100": 0.5}
    assert "run.trec:3: query 'q1': document 'C' has rank 3" in stderr.pop(0)
    averaged, missing, not_judged = stderr
    assert averaged.startswith("averaged over 3 queries: ")
    assert missing.startswith("1 judged queries are missing from the run, left out") and missing.endswith(": q4")
    assert not_judged.startswith("1 queries of the run are not judged") and not_judged.endswith(": x")


def test_complete_counts_missing_queries_as_0(evaluated):
    averages, before, stderr = evaluated(QRELS, RUN, "--complete", "--per_query", "--measures", "P@1", "RR")
    assert averages == {"query_num": 4, "MRR": 1.5 / 4, "MRR@10": 1.5 / 4, "MRR@100": 1.5 / 4, "P@1": 1 / 4,
                        "RR": 1.5 / 4}
    assert before[-5:] == ["q4\tMRR\t0.0", "q4\tMRR@10\t0.0", "q4\tMRR@100\t0.0", "q4\tP@1\t0.0", "q4\tRR\t0.0"]
    assert stderr[1].startswith("averaged over 4 queries: all") and stderr[2].endswith("counted as 0: q4")
    assert stderr[3].endswith("not judged, left out: x") and len(stderr) == 4


def test_per_query(evaluated):
    averages, before, _ = evaluated(QRELS, RUN, "--per_query", "--measures", "P@1")
    assert before == [
        "q1\tMRR\t1.0", "q1\tMRR@10\t1.0", "q1\tMRR@100\t1.0", "q1\tP@1\t1.0",
        "q2\tMRR\t0.5", "q2\tMRR@10\t0.5", "q2\tMRR@100\t0.5", "q2\tP@1\t0.0",
        "q3\tMRR\t0.0", "q3\tMRR@10\t0.0", "q3\tMRR@100\t0.0", "q3\tP@1\t0.0"]
    assert averages["P@1"] == 1 / 3


def test_relevance_level(evaluated):
    # In q1, C (grade 1) ranks above B (grade 2). Negative grades never count, and at level 2, grade 1 does not.
    averages, _, _ = evaluated(QRELS, RUN, "--relevance_level", "2", "--measures", "RR", "RR(rel=1)@10", "P@1",
                               "nDCG@2", "NumRet")
    assert averages["MRR"] == averages["RR(rel=2)"] == pytest.approx((1 / 2) / 3)
    assert averages["RR@10"] == pytest.approx((1 + 1 / 2) / 3)  # its own rel is kept
    assert averages["P(rel=2)@1"] == 0
    assert averages["NumRet"] == 6  # without a rel it counts all documents
    assert averages["nDCG@2"] == evaluated(QRELS, RUN, "--measures", "nDCG@2")[0]["nDCG@2"]  # graded


def test_negative_grades_are_never_relevant(evaluated):
    averages, _, _ = evaluated("q 0 A -2\nq 0 B 1\n", "q Q0 A 1 2 t\nq Q0 B 2 1 t\n",
                               "--measures", "RR", "RR@10", "P@1")
    assert averages == {"query_num": 1, "MRR": 0.5, "MRR@10": 0.5, "MRR@100": 0.5, "RR": 0.5, "RR@10": 0.5, "P@1": 0.0}


@pytest.mark.parametrize("grades", [(-2,), (-5, -2), (-10 ** 9, -1)])
def test_a_query_with_only_negative_grades_counts_as_0(evaluated, grades):
    """trec_eval would end the process if all of them are below -1, even for a document that the run lacks."""
    qrels = "".join(f"q 0 D{number} {grade}\n" for number, grade in enumerate(grades))
    averages, _, _ = evaluated("r 0 A 1\n" + qrels, "r Q0 A 1 2 t\nq Q0 D0 1 2 t\nq Q0 X 2 1 t\n",
                               "--measures", "nDCG@10", "AP", "P@1", "Bpref")
    assert {averages[name] for name in ("MRR", "nDCG@10", "AP", "P@1")} == {0.5}


def test_cutoffs_of_10_and_100(evaluated):
    run = "".join(f"{query} Q0 D{position:03} 1 {-position} t\n" for query in "abc" for position in range(1, 201))
    averages, _, _ = evaluated("a 0 D010 1\nb 0 D011 1\nc 0 D101 1\n", run)
    assert averages == {"query_num": 3, "MRR": pytest.approx((1 / 10 + 1 / 11 + 1 / 101) / 3),
                        "MRR@10": pytest.approx(1 / 30), "MRR@100": pytest.approx((1 / 10 + 1 / 11) / 3)}


def test_only_scores_decide_not_lines_or_the_rank_column(evaluated):
    lines = (GOLDEN / "MaxP.trec").read_text().splitlines()
    random.Random(7).shuffle(lines)
    shuffled = "".join("{} Q0 {} {} {} x\n".format(*line.split()[:1], line.split()[2], number, line.split()[4])
                       for number, line in enumerate(lines))
    flags = ("--measures", "nDCG@10", "RR@10", "AP", "Judged@10")
    golden, shuffled = (evaluated(GOLDEN / "qrels.txt", run, *flags)[0] for run in (GOLDEN / "MaxP.trec", shuffled))
    assert shuffled == pytest.approx(golden, abs=1e-12)  # the last digit: queries are added up in another order


def test_scores_closer_than_single_precision_are_kept_apart(evaluated):
    qrels, run = "q 0 A 1\n", "q Q0 A 1 1.0000000001 t\nq Q0 B 2 1.0 t\n"
    averages, _, stderr = evaluated(qrels, run, "--measures", "RR", "RR@10")
    assert averages["MRR"] == averages["RR"] == averages["RR@10"] == 1.0
    assert stderr[-1].startswith("warning: 1 pair(s) of different scores are equal in single precision")
    assert not evaluated(qrels, "q Q0 A 1 1 t\nq Q0 B 2 1 t\n")[2][-1].startswith("warning")


def test_gzip_and_odd_ids(evaluated):
    averages, before, _ = evaluated(gzip.compress("é#1 0 a_b-c#d 1\n".encode()), gzip.compress(
        "é#1 Q0 a_b-c#d 1 0.5 t\né#1 Q0 мир_0 2 0.7 t\n".encode()), "--per_query", "--measures", "RR")
    assert averages["MRR"] == averages["RR"] == 0.5
    assert before[0] == "é#1\tMRR\t0.5"


def test_measures_that_are_sums_or_not_defined_everywhere(evaluated):
    averages, _, stderr = evaluated(QRELS, RUN, "--measures", "NumRel", "Accuracy", "NumRel")
    assert averages["NumRel"] == 3  # a sum over q1, q2 and q3, as ir_measures has it
    # 1 for q1, 0 for q2. If NumRel and Accuracy are asked for in one call, ir_measures adds a 0 for q3.
    assert averages["Accuracy"] == 0.5
    assert any(line.startswith("Accuracy is defined for only 2 queries") for line in stderr)


def test_long_lists_are_cut_at_ten(evaluated):
    run = RUN + "".join(f"y{number} Q0 A 1 1 t\n" for number in range(20))
    last = evaluated(QRELS, run)[2][-1]
    assert last.startswith("21 queries") and last.endswith(": x, y0, y1, y2, y3, y4, y5, y6, y7, y8, ...")


# ---- properties

grades = st.dictionaries(st.sampled_from("abcdefghijklmnop"), st.integers(-1, 3), min_size=1)
run_scores = st.dictionaries(st.sampled_from("abcdefghijklmnop"), st.integers(0, 3).map(float), min_size=1)


@given(st.lists(st.tuples(grades, run_scores), min_size=1, max_size=4))
def test_a_cutoff_never_raises_mrr_and_ir_measures_agrees(queries):
    qrels = {f"q{number}": judged for number, (judged, _) in enumerate(queries)}
    rankings = {f"q{number}": rank(scores) for number, (_, scores) in enumerate(queries)}
    mrr = dict(measures.reciprocal_ranks(qrels, rankings, 1))
    other = dict(measures.other_measures([ir_measures.RR, ir_measures.RR @ 10, ir_measures.RR @ 1], qrels, rankings))
    assert mrr["MRR"] == other["RR"] and mrr["MRR@10"] == other["RR@10"]
    for query in rankings:
        assert other["RR@1"][0][query] <= other["RR@10"][0][query] <= other["RR"][0][query]
        hits = [position for position, document in enumerate(rankings[query], 1) if qrels[query].get(document, 0) > 0]
        assert mrr["MRR"][0][query] == (1 / hits[0] if hits else 0)
        assert mrr["MRR@10"][0][query] == (1 / hits[0] if hits and hits[0] <= 10 else 0)
    assert mrr["MRR"][1] == pytest.approx(sum(mrr["MRR"][0].values()) / len(queries))


@given(grades, run_scores)
def test_results_equal_trec_evals_where_single_precision_suffices(judged, scored):
    chosen = [ir_measures.nDCG @ 3, ir_measures.AP, ir_measures.P @ 2, ir_measures.RR]
    ours = {name: result.average
            for name, result in measures.other_measures(chosen, {"q": judged}, {"q": rank(scored)})}
    direct = ir_measures.pytrec_eval.calc_aggregate(chosen, {"q": judged}, {"q": scored})
    assert ours == {str(measure): value for measure, value in direct.items()}


# ---- errors

@pytest.mark.parametrize(("measure", "start"), [
    ("ndgc@10", "unknown measure; did you mean nDCG"),
    ("bogus123", "unknown measure; ir_measures offers AP, "),
    ("R", "a parameter is missing or wrong; R takes cutoff (required), rel, judged_only"),
    ("nDCG@2.5", "a parameter is missing or wrong; nDCG takes cutoff, "),
    ("P@0", "cutoff and rel must be 1 or more"),  # would end the process inside pytrec_eval
    ("AP(rel=0)", "cutoff and rel must be 1 or more"),
    ("'nDCG@'", "problem parsing measure"),
    ("nDCG@", "problem parsing measure"),
    ("AP,RR", "problem parsing measure"),
])
def test_wrong_measures(measure, start):
    problems = Problems()
    assert measures.parse_measures(["AP", measure], 1, problems) == [ir_measures.AP]
    assert len(problems.messages) == 1
    assert problems.messages[0].partition(": ")[2].startswith(start)
    assert measure in problems.messages[0].replace('"', "")


def test_a_measure_that_no_provider_computes_at_this_level(refused):
    line, = refused(QRELS, RUN, "--relevance_level", "2", "--measures", "NumRel")
    assert line.startswith("--measures NumRel: Unsupported measures {NumRel(rel=2)}; ")


@pytest.mark.parametrize("name", ["ERR", "RBP", "SDCG(max_rel=4)@10", "alpha_nDCG@10", "nDCG@x", "ERR@10 nothing"])
def test_each_unavailable_measure_is_one_error(refused, name):
    lines = refused(QRELS, RUN, "--measures", name, name + "1")
    assert len(lines) == 2 and lines[0].startswith(f"--measures {name}: ") and len(lines[0]) > 60


def test_measures_of_gdeval_for_any_ids(evaluated):
    """gdeval reads only the number of an id, the 12 of "trec-12": it would confuse these two queries."""
    _, lines, _ = evaluated("a-12 0 A 4\nb-12 0 B 2\nq 0 C 1\n",
                            "a-12 Q0 A 1 1 t\nb-12 Q0 B 1 1 t\nq Q0 C 1 1 t\n", "--measures", "ERR@10", "--per_query")
    assert [line for line in lines if "ERR" in line] == ["a-12\tERR@10\t0.9375", "b-12\tERR@10\t0.1875",
                                                         "q\tERR@10\t0.0625"]


@pytest.mark.parametrize("measure", ["ERR@10", "nDCG(dcg='exp-log2')@10"])
def test_grades_that_a_measure_cannot_take_are_named_by_their_line(refused, evaluated, measure):
    line, = refused("q1 0 A 4\nq1 0 B 5\nq4 0 Z 9\n", "q1 Q0 A 1 1 t\n", "--measures", measure)
    assert "qrels.txt:2: found grade 5" in line and measure in line and "0 to 4" in line
    evaluated("q1 0 A 4\nq4 0 Z 9\n", "q1 Q0 A 1 1 t\n", "--measures", measure)       # q4 is not averaged
    assert len(refused("q1 0 A 4\nq4 0 Z 9\n", "q1 Q0 A 1 1 t\n", "--complete", "--measures", measure)) == 1


def test_a_provider_that_fails_is_an_error(monkeypatch, refused):
    def fail(*_):
        raise RuntimeError("no perl")
    monkeypatch.setattr(ir_measures, "iter_calc", fail)
    assert refused(QRELS, RUN, "--measures", "P@5") == ["--measures P@5: ir_measures could not compute it: no perl"]


def test_problems_of_measures_and_both_files_at_once(refused):
    errors = refused(QRELS + "q1 0 A 5\nq1 0\n", RUN + "q1 Q0 Z 4 nan t\n", "--measures", "R", "ndgc")
    assert [error[:18].rstrip(": ") for error in errors] == [
        "--measures R: a pa", "--measures ndgc: u", "qrels.txt:8: docum", "qrels.txt:9: found", "run.trec:8: score"]


@pytest.mark.parametrize(("qrels", "run", "message"), [
    ("", RUN, "qrels.txt: is empty"),
    (QRELS, "", "run.trec: is empty"),
    (QRELS, "x Q0 A 1 1 t\ny Q0 A 1 1 t\n", "run.trec: none of its queries (x, y) is judged in qrels.txt "
                                            "(q1, q2, q3, q4)"),
])
def test_nothing_to_evaluate(refused, qrels, run, message):
    for flags in ([], ["--complete"]):
        found, = refused(qrels, run, *flags)
        assert found.startswith(message)


def test_missing_files_are_reported_together(refused, tmp_path):
    assert refused(tmp_path / "a", tmp_path / "b") == [
        "a: cannot read the relevance judgements: No such file or directory",
        "b: cannot read the run: No such file or directory"]


# ---- as a program

def program(*options, cwd):
    return subprocess.run([sys.executable, str(ROOT / "msmarco_mrr_eval.py"), *map(str, options)],
                          cwd=cwd, capture_output=True, text=True, encoding="utf-8")


def test_program_ends_with_2_and_one_message(tmp_path):
    (tmp_path / "run.trec").write_text("")
    done = program(GOLDEN / "qrels.txt", "run.trec", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: run.trec: is empty") and done.stderr.count("\n") == 1


def test_judgements_without_relevant_documents_give_a_warning(tmp_path):
    (tmp_path / "qrels.txt").write_text("q1 0 D1 0\nq2 0 D1 1\n")
    (tmp_path / "run.trec").write_text("q1 Q0 D1 1 2.5 t\n")
    done = program("qrels.txt", "run.trec", cwd=tmp_path)
    assert done.returncode == 0 and "MRR: 0.0" in done.stdout
    assert "warning: qrels.txt: none of these queries has a document with a grade of 1 or more" in done.stderr


@pytest.mark.parametrize("level", ["0", "-1", "x", "1.5"])
def test_program_refuses_levels_below_1(tmp_path, level):
    done = program(GOLDEN / "qrels.txt", GOLDEN / "MaxP.trec", f"--relevance_level={level}", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--relevance_level" in done.stderr and level in done.stderr and "Traceback" not in done.stderr


def test_mrr_alone_does_not_load_ir_measures(tmp_path):
    code = ("import sys, msmarco_mrr_eval as m; sys.argv = ['m', *sys.argv[1:]]; m.main(); "
            "print('ir_measures' in sys.modules)")
    ends = [subprocess.run([sys.executable, "-c", code, str(GOLDEN / "qrels.txt"), str(GOLDEN / "MaxP.trec"), *options],
                           cwd=ROOT, capture_output=True, text=True).stdout.splitlines()[-1]
            for options in ([], ["--measures", "AP"])]
    assert ends == ["False", "True"]


def test_help_explains_what_the_official_script_does(tmp_path):
    text = " ".join(program("--help", cwd=tmp_path).stdout.split())
    assert "official MS MARCO script divides by the number of all judged queries" in text
