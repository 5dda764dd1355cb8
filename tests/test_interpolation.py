"""Interpolation of a ranker with the first stage: by hand, by definition, and on the command line."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import convert_to_trec_results
from simplified_tinybert.common.files import Problems, UserError
from simplified_tinybert.ranking.interpolation import WEIGHTS, best_weight, interpolate
from simplified_tinybert.ranking.trec import rank, read_run

sides = st.dictionaries(st.sampled_from("abcdefg"), st.floats(-50, 50), min_size=1)
# The definition's standard deviation is 0 for scores that differ by less than 1e-160.
coarse_scores = st.integers(-50_000, 50_000).map(lambda number: number / 1000)
coarse_sides = st.dictionaries(st.sampled_from("abcdefg"), coarse_scores, min_size=1)


def test_by_hand():
    """The ranker's scores 1, 3 become -1, 1; the first stage's 10, 20, 30 become -√1.5, 0, √1.5."""
    found = interpolate({"a": 1.0, "b": 3.0}, {"a": 30.0, "b": 20.0, "c": 10.0}, 0.25)
    root = 1.5 ** 0.5
    assert found == pytest.approx({"a": -0.75 + 0.25 * root, "b": 0.75, "c": -0.75 - 0.25 * root})


@given(coarse_sides, coarse_sides, st.floats(0, 1))
def test_is_its_definition(ranker, first_stage, weight):
    found = interpolate(ranker, first_stage, weight)
    assert found.keys() == ranker.keys() | first_stage.keys()
    for document_id, score in found.items():
        expected = 0.0
        for side, share in ((ranker, 1 - weight), (first_stage, weight)):
            values = np.array(list(side.values()))
            value = side.get(document_id, values.min())
            expected += share * ((value - values.mean()) / values.std() if len(set(side.values())) > 1 else 0.0)
        assert score == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(sides, sides)
def test_weights_0_and_1_are_one_side_alone(ranker, first_stage):
    both = ranker.keys() & first_stage.keys()
    for weight, side in ((0.0, ranker), (1.0, first_stage)):
        found = interpolate(ranker, first_stage, weight)
        for one in both:
            for two in both:
                if side[one] > side[two] + 1e-6:
                    assert found[one] > found[two]


def test_of_equal_weights_the_smallest_is_chosen():
    assert best_weight({0.0: 0.5, 0.1: 0.7, 0.2: 0.7, 0.3: 0.6}) == 0.1 and WEIGHTS[0] == 0.0 and WEIGHTS[-1] == 1.0


@pytest.mark.parametrize("exponent", [120, 300, 1020])
def test_large_scores_do_not_overflow(exponent):
    scores = {"a": 3.0, "b": 2.5, "c": -1.0, "d": 0.125}
    large = {document_id: score * 2.0 ** exponent for document_id, score in scores.items()}
    assert interpolate(large, scores, 0.3) == interpolate(scores, large, 0.3) == interpolate(scores, scores, 0.3)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "scores.tsv").write_text("q1\ta_0\t0.1\nq1\ta_1\t0.9\nq1\tb_0\t0.2\nq2\tc_0\t0.3\nq2\td_0\t0.4\n")
    (tmp_path / "bm25.txt").write_text("q1 Q0 b 1 7.0 x\nq1 Q0 a 2 5.0 x\nq1 Q0 e 3 1.0 x\nq3 Q0 z 1 1.0 x\n")
    (tmp_path / "qrels.txt").write_text("q1 0 b 1\nq1 0 a 0\n")
    return tmp_path


def convert(files, run_here, *more):
    return run_here(convert_to_trec_results, "--scores_file", files / "scores.tsv", "--output_results_file",
                    files / "run.trec", *more)


def test_on_the_command_line(files, run_here):
    printed = convert(files, run_here, "--interpolate", files / "bm25.txt", "--interpolation_weight", 0.3)
    assert "with weight 0.3; documents that only the first stage has: 1, that only the ranker has: 2" in printed
    assert "queries without a first stage: 1" in printed
    run = read_run(files / "run.trec", Problems())
    expected = interpolate({"a": 0.9, "b": 0.2}, {"a": 5.0, "b": 7.0, "e": 1.0}, 0.3)
    assert run["q1"] == expected and rank(run["q2"]) == ["d", "c"] and "q3" not in run


def test_the_weight_is_chosen_on_judged_queries(files, run_here):
    printed = convert(files, run_here, "--interpolate", files / "bm25.txt", "--interpolation_qrels",
                      files / "qrels.txt")
    one, two = {"a": 0.9, "b": 0.2}, {"a": 5.0, "b": 7.0, "e": 1.0}
    chosen = min(weight for weight in WEIGHTS if rank(interpolate(one, two, weight))[0] == "b")
    assert f"interpolated with weight {chosen:g}" in printed and "1: 1.0000" in printed
    assert rank(read_run(files / "run.trec", Problems())["q1"])[0] == "b"


def test_inputs_are_kept_and_must_belong_together(files, run_here):
    for name in ("bm25.txt", "qrels.txt"):
        with pytest.raises(UserError, match=f"{name}: is also an input"):
            run_here(convert_to_trec_results, "--scores_file", files / "scores.tsv", "--output_results_file",
                     files / name, "--interpolate", files / "bm25.txt", "--interpolation_qrels", files / "qrels.txt")
    (files / "other.txt").write_text("q8 Q0 b 1 7.0 x\n")
    with pytest.raises(UserError, match="other.txt: has none of the queries"):
        convert(files, run_here, "--interpolate", files / "other.txt", "--interpolation_weight", 0.3)
    (files / "zero.txt").write_text("q1 0 b 0\n")
    with pytest.raises(UserError, match="zero.txt: has no document with a grade of 1 or more"):
        convert(files, run_here, "--interpolate", files / "bm25.txt", "--interpolation_qrels", files / "zero.txt")


@pytest.mark.parametrize("flags, expected", [
    (["--interpolate", "bm25.txt"], "add either --interpolation_weight, or --interpolation_qrels"),
    (["--interpolation_weight", "0.5"], "--interpolation_weight: needs --interpolate"),
    (["--interpolate", "bm25.txt", "--interpolation_weight", "1.5"], "--interpolation_weight 1.5: expected 0 to 1"),
    (["--interpolate", "none.txt", "--interpolation_weight", "0.5"], "none.txt: cannot read the run")])
def test_flags_that_do_not_fit(files, run_here, monkeypatch, flags, expected):
    monkeypatch.chdir(files)
    with pytest.raises(UserError, match=expected):
        convert(files, run_here, *flags)
