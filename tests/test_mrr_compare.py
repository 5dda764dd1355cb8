"""msmarco_mrr_eval.py --compare: compared queries, output and errors."""
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run_script
from scipy import stats

import msmarco_mrr_eval as evaluate
from simplified_tinybert.common.files import UserError
from simplified_tinybert.ranking.significance import holm

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "data" / "aggregation"
QRELS = "".join(f"q{number} 0 good 1\n" for number in range(1, 6))


def run_with(*ranks: int | None) -> str:
    """Return a run that ranks the relevant document of q1, q2, ... at these ranks; None: the query is missing."""
    return "".join(f"q{query} Q0 {'good' if place == rank else f'bad{place}'} {place} {-place} t\n"
                   for query, rank in enumerate(ranks, start=1) if rank for place in range(1, rank + 1))


@pytest.fixture
def compared(tmp_path, monkeypatch, capsys):
    """Return a function that calls main() in a directory with these files: (cells of the table, stdout, stderr)."""
    def call(files, *options):
        for name, content in files.items():
            (tmp_path / name).write_text(content)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["evaluate", "qrels.txt", *map(str, options)])
        evaluate.main()
        out, err = capsys.readouterr()
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line[0] == "|"]
        return rows[2:], out, err
    return call


def test_by_hand(compared):
    """1/rank: 1, 1/2, 1, 1/4, 1/2 against 1/2, 1/2, 1/2, 1/2, 1/4: four differ, +1/2, +1/2, -1/4, +1/4."""
    files = {"qrels.txt": QRELS, "run": run_with(1, 2, 1, 4, 2), "other": run_with(2, 2, 2, 2, 4)}
    rows, out, err = compared(files, "run", "--measures", "RR", "--compare", "other")
    assert [row[0] for row in rows] == ["MRR", "MRR@10", "MRR@100", "RR"]
    t = stats.ttest_rel([1, 1 / 2, 1, 1 / 4, 1 / 2], [1 / 2, 1 / 2, 1 / 2, 1 / 2, 1 / 4]).pvalue
    # Of the 16 sums ±2 ±2 ±1 ±1 (quarters), 6 are at least 4 from zero: ±6, and ±4 twice each.
    assert rows[0][1:] == ["other", "5", "0.6500", "0.4500", "+0.2000", "3/1/1", f"{t:.4f}", f"{t:.4f}", "0.3750",
                           "0.3750"]
    assert all(row[1:] == rows[0][1:] for row in rows)
    assert "nothing to correct" in out and "exact for up to 16 queries" in out
    assert "other: compared on 5 queries; left out: 0 only in run, 0 only in the other" in err


def test_comparing_keeps_the_output_of_evaluating(compared):
    files = {"qrels.txt": QRELS, "run": run_with(1, 2, 1, 4, 2), "other": run_with(2, 2, 2, 2, 4)}
    _, alone, _ = compared(files, "run", "--measures", "AP")
    _, more, _ = compared(files, "run", "--measures", "AP", "--compare", "other")
    assert more.startswith(alone)


def test_common_queries_only_or_all_with_complete(compared):
    """q1 is only in one run, q5 only in the other. MRR over q2 and q3 is 3/4 and 1/2."""
    files = {"qrels.txt": QRELS, "run": run_with(4, 1, 2, None, None), "other": run_with(None, 2, 2, None, 4)}
    rows, out, err = compared(files, "run", "--compare", "other")
    assert rows[0][2:7] == ["2", "0.7500", "0.5000", "+0.2500", "1/1/0"]
    assert "query_num: 3" in out
    assert "other: compared on 2 queries; left out: 1 only in run, 1 only in the other" in err
    rows, _, err = compared(files, "run", "--compare", "other", "--complete")
    assert rows[0][2:7] == ["5", f"{1.75 / 5:.4f}", f"{1.25 / 5:.4f}", "+0.1000", "2/2/1"]
    assert "other: 2 judged queries are missing from the run, counted as 0: q1, q4" in err


def test_holm_over_the_other_runs_of_a_measure(compared):
    files = {"qrels.txt": "".join(f"q{number} 0 good 1\n" for number in range(1, 10)), "run": run_with(*[1] * 9),
             "a": run_with(*[2] * 8, 3), "b": run_with(*[1] * 6, 2, 2, 2), "c": run_with(1, 2, 1, 3, 1, 2, 2, 2, 1)}
    rows, out, _ = compared(files, "run", "--compare", "b", "a", "c")
    randomization = [float(row[9]) for row in rows[:3]]
    assert randomization == [2 / 2 ** 3, pytest.approx(2 / 2 ** 9, abs=5e-5), pytest.approx(2 / 2 ** 5)]
    assert [row[10].rstrip("*") for row in rows[:3]] == [f"{p:.4f}" for p in holm([1 / 4, 2 / 2 ** 9, 1 / 16])]
    assert [row[10].endswith("*") for row in rows[:3]] == [False, True, False]
    assert "p corrected over the 3 other runs of a measure" in out


def test_a_run_and_itself(compared):
    files = {"qrels.txt": QRELS, "run": run_with(1, 2, 3, 4, 5)}
    rows, _, err = compared(files, "run", "--measures", "AP", "--compare", "run")
    assert all(row[5:] == ["+0.0000", "0/5/0", "1.0000", "1.0000", "1.0000", "1.0000"] for row in rows)
    assert err.count("averaged over") == 1


def test_one_query_has_no_t_test(compared):
    rows, out, _ = compared({"qrels.txt": "q1 0 good 1\n", "run": run_with(1), "other": run_with(2)}, "run",
                            "--compare", "other")
    assert rows[0][6:] == ["1/0/0", "-", "-", "1.0000", "1.0000"] and "the t-test needs two queries" in out


def test_equal_differences(compared):
    files = {"qrels.txt": QRELS, "run": run_with(1, 1, 1, 1, 1), "other": run_with(2, 2, 2, 2, 2)}
    rows, _, err = compared(files, "run", "--compare", "other")
    assert rows[0][5:] == ["+0.5000", "5/0/0", "0.0000", "0.0000*", "0.0625", "0.0625"]
    assert "Warning" not in err


def test_queries_for_which_a_measure_is_not_defined(compared):
    """Accuracy needs a relevant document in the run; q1 has none."""
    qrels = "q1 0 good 0\nq2 0 good 1\nq2 0 bad1 0\nq3 0 good 1\nq3 0 bad1 0\n"
    files = {"qrels.txt": qrels, "run": run_with(1, 2, 1) + "q3 Q0 bad1 9 -9 t\n", "other": run_with(1, 2, 2),
             "none": run_with(1, None, None)}
    rows, _, err = compared(files, "run", "--measures", "Accuracy", "--compare", "other", "none")
    accuracy = [row for row in rows if row[0] == "Accuracy"]
    assert accuracy[0][2:7] == ["2", "0.5000", "0.0000", "+0.5000", "1/1/0"]
    assert accuracy[1][2:] == ["0", *["-"] * 8]
    assert "run: Accuracy is defined for only 2 queries" in err


def test_per_query_names_the_run(compared):
    files = {"qrels.txt": QRELS, "run": run_with(1, 2), "other": run_with(2, 1)}
    _, out, _ = compared(files, "run", "--per_query", "--compare", "other")
    lines = [line.split("\t") for line in out.splitlines() if "\t" in line]
    assert lines[0] == ["q1", "MRR", "1.0", "run"] and lines[-1] == ["q2", "MRR@100", "1.0", "other"]
    assert len(lines) == 2 * 2 * 3


def test_lines_in_another_order_change_nothing(compared):
    qrels = "".join(f"q{number} 0 good 1\n" for number in range(1, 31))
    run, other = run_with(*[1, 2, 5] * 10), run_with(*[2, 1, 3, 1, 2] * 6)
    found = compared({"qrels.txt": qrels, "run": run, "other": other}, "run", "--compare", "other")[0]
    reordered = "".join(f"{line}\n" for line in reversed(run.splitlines()))
    assert compared({"qrels.txt": qrels, "run": reordered, "other": other}, "run", "--compare", "other")[0] == found
    again = compared({"run": run}, "run", "--compare", "other", "--seed", "7", "--permutations", "50")
    assert again[0] != found and "50 random sign assignments, seed 7" in again[1]


@pytest.mark.parametrize(("files", "options", "message"), [
    ({"other": run_with(None, None, 1, 1)}, [], "other: none of its judged queries (q3, q4) is in run (q1, q2)"),
    ({"other": "x Q0 good 1 1 t\n"}, ["--complete"], "other: none of its queries (x) is judged in qrels.txt"),
    ({"other": ""}, [], "other: is empty"),
    ({"other": "q1 Q0\n"}, [], "other:1: found 2 columns"),
    ({}, [], "other: cannot read the run: No such file"),
    ({"other": run_with(1, 1)}, ["--permutations", "0"], "--permutations 0: expected 1 or more"),
    ({"other": run_with(1, 1)}, ["--seed", "-1"], "--seed -1: expected 0 or more"),
])
def test_refusals(compared, capsys, files, options, message):
    with pytest.raises(UserError) as caught:
        compared({"qrels.txt": QRELS, "run": run_with(1, 2), **files}, "run", *options, "--compare", "other")
    assert str(caught.value).startswith(message) and capsys.readouterr().out == ""


def test_a_run_named_twice_is_refused(compared):
    with pytest.raises(UserError, match="--compare: other is given more than once"):
        compared({"qrels.txt": QRELS, "run": run_with(1), "other": run_with(1)}, "run", "--compare", "other", "other")


def test_golden_runs_as_a_program():
    done = run_script("msmarco_mrr_eval.py", GOLDEN / "qrels.txt", GOLDEN / "MaxP.trec", "--measures", "AP",
                      "--compare", GOLDEN / "SumP.trec", GOLDEN / "AvgP.trec")
    assert done.returncode == 0 and done.stdout.count("SumP.trec |") == 4, done.stderr


def test_scipy_is_loaded_for_comparisons_only():
    code = ("import sys, msmarco_mrr_eval as m; sys.argv = ['m', *sys.argv[1:]]; m.main(); "
            "print('scipy.stats' in sys.modules)")
    ends = [subprocess.run([sys.executable, "-c", code, str(GOLDEN / "qrels.txt"), str(GOLDEN / "MaxP.trec"), *options],
                           cwd=ROOT, capture_output=True, text=True).stdout.splitlines()[-1]
            for options in ([], ["--compare", str(GOLDEN / "SumP.trec")])]
    assert ends == ["False", "True"]
