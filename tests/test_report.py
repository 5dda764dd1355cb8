"""report.py: values by hand, significance marks, speeds, files and errors."""
import json
import re

import numpy as np
import pytest
from conftest import random_rows, run_script, write_features
from scipy import stats

import convert_to_trec_results
import report
import reranker
from simplified_tinybert.common.files import UserError
from simplified_tinybert.model.bert import count_parameters
from simplified_tinybert.model.pretrained import load_cross_encoder
from simplified_tinybert.ranking.significance import holm
from simplified_tinybert.ranking.speed import sample_pairs
from simplified_tinybert.ranking.systems import System

SETTINGS = {"fp16": False, "bf16": False, "int8": False}


def run_text(ranks: dict[str, int]) -> str:
    """Return a run that ranks the relevant document of each query at the given rank."""
    return "".join(f"{query} Q0 {'good' if place == rank else f'bad{place}'} {place} {-place} t\n"
                   for query, rank in ranks.items() for place in range(1, rank + 1))


def write_record(path, **metadata):
    path.write_text(json.dumps({"settings": SETTINGS, "device": "cpu"} | metadata))


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A directory with judgements of four queries, and runs of a teacher and a student (with records) and of BM25."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qrels.txt").write_text("".join(f"q{number} 0 good 1\n" for number in range(1, 5)))
    (tmp_path / "teacher.trec").write_text(run_text({"q1": 1, "q2": 1, "q3": 2}))
    (tmp_path / "student.trec").write_text(run_text({"q1": 1, "q2": 2, "q3": 4}))
    (tmp_path / "bm25.txt").write_text(run_text({"q1": 2, "q2": 2, "q3": 2, "q4": 1}))
    write_record(tmp_path / "teacher.tsv.run.json", pairs_per_second=100.0, parameters=12345)
    write_record(tmp_path / "student.tsv.run.json", pairs_per_second=250.0, parameters=2345)
    return tmp_path


SYSTEMS = ("--system", "the teacher", "teacher.trec", "--system", "BM25", "bm25.txt", "--system", "student_1",
           "student.trec")


@pytest.fixture
def made(directory, run_here):
    """Return a function that calls main() and returns (cells of the table by row, report.json, stderr)."""
    def call(*options, systems=SYSTEMS):
        stderr = run_here(report, "--qrels", "qrels.txt", *systems, "--output_dir", "out/report", *options)
        text = (directory / "out" / "report" / "table.md").read_text()
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[0:1] == "|"]
        content = json.loads((directory / "out" / "report" / "report.json").read_text())
        return {row[0]: row[1:] for row in [rows[0], *rows[2:]]}, content, stderr
    return call


# ---- figures

def test_figures_by_hand(made):
    rows, content, stderr = made("--teacher", "the teacher", "--measures", "MRR@10", "P@1")
    assert rows == {
        "system": ["layers/hidden size", "parameters", "pairs/s", "speed-up", "MRR@10", "% of teacher", "P@1",
                   "% of teacher"],
        "the teacher": ["–", "12,345", "100", "1.00 ×", f"{2.5 / 3:.4f}", "100.0", f"{2 / 3:.4f}", "100.0"],
        "BM25": ["–", "–", "–", "–", "0.5000", "60.0", "0.0000", "0.0"],
        "student_1": ["–", "2,345", "250", "2.50 ×", f"{1.75 / 3:.4f}", "70.0", f"{1 / 3:.4f}", "50.0"]}
    assert content["queries"] == ["q1", "q2", "q3"]
    assert "Averages over 3 queries (judged and in all runs)." in content["notes"]
    assert "recorded by reranker.py" in content["notes"][-1] and "(cpu)" in content["notes"][-1]
    assert "teacher.trec: 1 judged queries are missing, left out for all systems" in stderr


def test_all_judged_queries(made):
    rows, content, stderr = made("--teacher", "the teacher", "--measures", "RR", "--complete")
    assert [rows[name][4] for name in ("the teacher", "BM25", "student_1")] == ["0.6250", "0.6250", "0.4375"]
    assert content["queries"] == ["q1", "q2", "q3", "q4"] and "counted as 0: q4" in stderr


def test_marks_and_correction(made, directory):
    """Compare with SciPy on 30 queries, and with Holm's correction over two systems compared with the same one."""
    generator = np.random.default_rng(3)
    ranks = {name: generator.integers(1, high, 30).tolist()
             for name, high in (("teacher", 2), ("student", 3), ("bm25", 9))}
    (directory / "qrels.txt").write_text("".join(f"q{number} 0 good 1\n" for number in range(30)))
    for name, file in (("teacher", "teacher.trec"), ("student", "student.trec"), ("bm25", "bm25.txt")):
        (directory / file).write_text(run_text({f"q{number}": rank for number, rank in enumerate(ranks[name])}))
    rows, content, _ = made("--teacher", "the teacher", "--baseline", "BM25", "--measures", "RR")
    teacher, student, bm25 = (1 / np.array(ranks[name]) for name in ("teacher", "student", "bm25"))
    for role, pairs in (("teacher", {"BM25": (bm25, teacher), "student_1": (student, teacher)}),
                        ("baseline", {"the teacher": (teacher, bm25), "student_1": (student, bm25)})):
        expected = {name: stats.ttest_rel(*pair).pvalue for name, pair in pairs.items()}
        found = content["comparisons"][role]["RR"]
        assert {name: found[name]["p"]["t-test"] for name in found} == pytest.approx(expected)
        corrected = holm([expected[name] for name in found])
        assert [found[name]["holm"]["t-test"] for name in found] == pytest.approx(corrected)
        assert max(corrected) < 0.05
    assert [rows[name][4][6:] for name in ("the teacher", "BM25", "student_1")] == ["‡", "†", "†‡"]
    assert "† from the teacher, ‡ from BM25: two-sided paired t-test" in content["notes"][1]
    rows, content, _ = made("--teacher", "the teacher", "--measures", "RR", "--test", "randomization")
    assert [rows[name][4][6:] for name in ("the teacher", "BM25", "student_1")] == ["", "†", "†"]
    assert "‡" not in content["notes"][1] and "randomization test" in content["notes"][1]


def test_nothing_is_marked_where_nothing_differs(made, directory):
    (directory / "student.trec").write_text((directory / "teacher.trec").read_text())
    rows, content, _ = made("--teacher", "the teacher")
    assert rows["student_1"][4:] == rows["the teacher"][4:]
    assert content["comparisons"]["teacher"]["AP"]["student_1"]["holm"] == {"t-test": 1.0, "randomization": 1.0}


def test_a_teacher_that_finds_nothing(made, directory):
    (directory / "teacher.trec").write_text("q1 Q0 bad 1 1 t\n")
    rows, content, _ = made("--teacher", "the teacher", "--measures", "RR")
    assert [row[5] for row in list(rows.values())[1:]] == ["–", "–", "–"]
    assert content["systems"][1]["retained"] == {"RR": None}


def test_a_measure_that_is_defined_for_no_query_of_a_system(made, directory):
    """Accuracy needs a relevant and another document in the run."""
    (directory / "teacher.trec").write_text(run_text({"q1": 2, "q2": 2, "q3": 2}))
    (directory / "student.trec").write_text("".join(f"q{number} Q0 bad 1 1 t\n" for number in range(1, 5)))
    rows, content, stderr = made("--teacher", "the teacher", "--measures", "Accuracy", "RR")
    assert rows["student_1"][4:] == ["–", "–", "0.0000†", "0.0"]           # always 1/2 less: t is infinite
    assert "student_1" not in content["comparisons"]["teacher"]["Accuracy"]
    assert content["systems"][2]["averages"]["Accuracy"] is None
    assert "student.trec: Accuracy is defined for only 0 queries" in stderr


# ---- models and speeds

@pytest.fixture
def ranked(directory, golden_models, run_here):
    """Arguments for two models with runs made by the scripts, and the feature file."""
    features = write_features(directory / "test.pkl", random_rows(40), set_name="test")
    for name, model, run in (("t", "teacher", "t.trec"), ("s/scores", "student_2x24", "s/run.trec")):
        (directory / "s").mkdir(exist_ok=True)
        run_here(reranker, "--model_dir", golden_models[model], "--features_file", features, "--output_scores_file",
                 f"{name}.tsv", "--device", "cpu")
        run_here(convert_to_trec_results, "--scores_file", f"{name}.tsv", "--output_results_file", run)
    (directory / "qrels.txt").write_text("".join(f"q{number} 0 D{number} 1\n" for number in range(4)))
    return ("--system", "student", "s/run.trec", golden_models["student_2x24"], "--system", "T", "t.trec",
            golden_models["teacher"]), features


def test_recorded_speeds_of_real_runs(ranked, made, directory):
    rows, content, stderr = made("--teacher", "T", systems=ranked[0])
    recorded = [json.loads((directory / name).read_text()) for name in ("s/scores.tsv.run.json", "t.tsv.run.json")]
    assert [row[0] for row in list(rows.values())[1:]] == ["2/24", "4/48"]
    for system, record in zip(content["systems"], recorded):
        assert system["pairs_per_second"] == record["pairs_per_second"] and system["parameters"] == record["parameters"]
        assert system["record"]["versions"] == record["versions"]
        assert re.match(r"\d{4}-\d\d-\d\dT", system["record"]["date"])
    assert content["systems"][0]["speed_up"] == recorded[0]["pairs_per_second"] / recorded[1]["pairs_per_second"]
    assert "warning" not in stderr


def test_measured_speeds(ranked, made):
    systems, features = ranked
    rows, content, stderr = made("--features_file", features, "--device", "cpu", "--speed_rounds", "3",
                                 "--speed_pairs", "25", "--teacher", "T", "--system", "BM25", "bm25.txt", "--complete",
                                 systems=systems)
    student, teacher, bm25 = content["systems"]
    assert content["speed_pairs"] == 25 and "the same 25 pairs" in content["notes"][-1] and "round 3" in stderr
    assert len(student["rounds"]) == len(teacher["rounds"]) == 3 and bm25["rounds"] == []
    assert student["pairs_per_second"] == np.median(student["rounds"])
    assert student["speed_up"] == np.median(np.array(student["rounds"]) / np.array(teacher["rounds"]))
    assert student["speed_of"] == "cpu, float32" and rows["BM25"][:4] == ["–", "–", "–", "–"]


def test_the_first_system_with_a_model_is_the_teacher(ranked, made):
    _, content, _ = made("--complete", systems=("--system", "BM25", "bm25.txt", *ranked[0]))
    assert content["arguments"]["teacher"] == "student"


def test_a_model_that_has_changed_since_its_run_is_noticed(ranked, made, golden_models):
    _, _, stderr = made("--teacher", "a", systems=("--system", "a", "t.trec", golden_models["student_2x24"]))
    assert "warning: t.trec: was scored with weights that differ" in stderr


def test_parameters_without_weights(made, golden_models, directory):
    """Without a record, parameters are counted from the configuration."""
    rows, content, stderr = made("--measures", "RR", systems=("--system", "a", "bm25.txt", golden_models["teacher"]))
    loaded, _ = load_cross_encoder(golden_models["teacher"])
    assert rows["a"][:2] == ["4/48", f"{count_parameters(loaded):,}"]
    assert "no speeds are known" in stderr and len(content["notes"]) == 1
    assert not (directory / "out" / "report" / "effectiveness.png").exists()


def test_speeds_of_different_devices_are_not_divided(made, directory):
    write_record(directory / "student.tsv.run.json", pairs_per_second=250.0, parameters=2345, device="cuda:0",
                 processes=2, settings=SETTINGS | {"bf16": True})
    rows, content, _ = made("--teacher", "the teacher")
    assert rows["student_1"][2:4] == ["250", "–"]
    assert "(the teacher: cpu; student_1: cuda:0, bf16, 2 processes)" in content["notes"][-1]
    compiled = {"tf32": True, "compile": True}
    for name, flags in (("teacher", {}), ("student", compiled)):
        write_record(directory / f"{name}.tsv.run.json", pairs_per_second=9.0, device="cuda:0",
                     settings=SETTINGS | flags)
    rows, content, _ = made("--teacher", "the teacher")
    assert rows["student_1"][3] == "–" and "student_1: cuda:0, tf32, compile)" in content["notes"][-1]


def test_an_interrupted_reranking_has_no_speed(made, directory):
    write_record(directory / "student.tsv.run.json")
    assert made("--teacher", "the teacher")[0]["student_1"][:4] == ["–", "–", "–", "–"]


def test_the_record_of_the_pairs_next_to_a_run_is_ignored(made, directory):
    """The pairs made from bm25.txt may be called bm25.tsv; their record then has the name of a record of the run."""
    (directory / "bm25.tsv.run.json").write_text(json.dumps({"script": "prepare_examples.py", "counts": {"lines": 4}}))
    rows, content, _ = made("--teacher", "the teacher")
    assert rows["BM25"][:4] == ["–"] * 4 and content["systems"][1]["record"] is None


@pytest.mark.parametrize("count", [1, 7, 40, 100])
def test_pairs_at_equal_distances(tmp_path, monkeypatch, count):
    monkeypatch.setattr("simplified_tinybert.data.features.CHUNK_EXAMPLES", 9)
    rows = random_rows(40)
    files = [write_features(tmp_path / name, part) for name, part in (("1", rows[:25]), ("2", rows[25:]))]
    pairs, least = sample_pairs(files, 40, count), min(count, 40)
    expected = [rows[number * 40 // least] for number in range(least)]
    assert pairs.ids == [row[0] for row in expected]
    assert pairs.tokens.tolist() == np.concatenate([row[1] for row in expected]).tolist()
    assert pairs.query_lengths.tolist() == [row[2] for row in expected]


# ---- files

def test_files(made, directory, capsys):
    made("--teacher", "the teacher", "--measures", "AP", "RR")
    out = directory / "out" / "report"
    assert sorted(path.name for path in out.iterdir()) == ["effectiveness.png", "report.json", "table.md", "table.tex"]
    assert (out / "effectiveness.png").read_bytes().startswith(b"\x89PNG")
    latex = (out / "table.tex").read_text()
    assert r"\begin{tabular}{lrrrrrrrr}" in latex and r"student\_1 & -- & 2,345 & 250 & 2.50 $\times$ &" in latex
    assert latex.count(r" \\") == 4 and all(line.count(" & ") == 8 for line in latex.splitlines() if r" \\" in line)
    assert all(line.count(" & ") in (0, 8) for line in latex.splitlines())


def test_as_a_program(directory):
    done = run_script("report.py", "--qrels", directory / "qrels.txt", "--system", "a b", directory / "teacher.trec",
                      "--system", "c", directory / "bm25.txt", "--teacher", "a b", "--output_dir", directory / "new")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{directory / 'new' / 'table.md'}:\n" + (directory / "new" / "table.md").read_text()


# ---- refusals

def test_all_problems_at_once(directory, golden_models, run_here):
    (directory / "bad.trec").write_text("q1 Q0\n")
    (directory / "teacher.tsv.run.json").write_text("{")
    (directory / "file").write_text("")
    with pytest.raises(UserError) as caught:
        run_here(report, "--qrels", "none.txt", "--system", "T", "teacher.trec", golden_models["teacher"], "--system",
                 "T", "bm25.txt", "--system", "only a name", "--system", "b", "bad.trec", "no/model", "--baseline",
                 "BM25", "--measures", "ndgc", "MRR@10", "--speed_rounds", "0", "--output_dir", "file",
                 "--features_file", "none.pkl", "--device", "cpu", "--fp16", "--int8")
    errors = str(caught.value)
    for message in ("--system 'T': is given twice", "--system 'only a name': expected a name, a run",
                    "--baseline 'BM25': unknown system", "ndgc: unknown measure", "no/model", "--speed_rounds 0: ",
                    "file: is a file", "none.txt: cannot read", "none.pkl: cannot read", "bad.trec:1: found 2 columns",
                    "--fp16 needs a CUDA device", "--int8: ", "teacher.tsv.run.json: is damaged"):
        assert message in errors, message
    assert not (directory / "out").exists()


@pytest.mark.parametrize(("options", "message"), [
    ([], "no system has a model, so the teacher is unknown"),
    (["--teacher", "BM25", "--baseline", "BM25"], "--baseline 'BM25': is the teacher"),
    (["--teacher", "nobody"], "--teacher 'nobody': unknown system; expected one of the teacher, BM25, student_1"),
    (["--system", "x", ""], "--system 'x' '': expected a name, a run"),
    (["--system", "x", "/"], "--system 'x' '/': expected a name, a run"),
    (["--teacher", "BM25", "--features_file", "test.pkl"], "--features_file: no system has a model"),
    (["--teacher", "BM25", "--bf16", "--speed_pairs", "9"], "--speed_pairs: is for measuring speed"),
    (["--teacher", "BM25", "--system", "x", "x.trec"], "no judged query is in all runs"),
    (["--teacher", "BM25", "--system", "y", "y.trec"], "y.trec: none of its queries (z) is judged in qrels.txt"),
])
def test_refusals(made, directory, options, message):
    write_features(directory / "test.pkl", random_rows(3), set_name="test")
    (directory / "x.trec").write_text(run_text({"q4": 1}))
    (directory / "y.trec").write_text(run_text({"z": 1}))
    with pytest.raises(UserError, match=re.escape(message)):
        made(*options)
    assert not (directory / "out").exists()


def test_unwritable_output_is_an_error_before_speeds_are_measured(ranked, made, directory, monkeypatch):
    monkeypatch.setattr(report, "measure_systems", lambda *_: pytest.fail("measured"))
    options = ("--features_file", "test.pkl", "--teacher", "T")
    (directory / "out").write_text("")
    with pytest.raises(OSError, match="out"):
        made(*options, systems=ranked[0])
    (directory / "out").unlink()
    (directory / "out" / "report" / "table.tex").mkdir(parents=True)
    with pytest.raises(UserError, match="table.tex: is a directory"):
        made(*options, systems=ranked[0])


def test_a_model_that_does_not_fit_the_features(ranked, made, directory):
    write_features(directory / "long.pkl", random_rows(5, 80), max_seq_length=80, set_name="test")
    with pytest.raises(UserError, match="the T has 64 positions, but sequences are padded to 80"):
        made("--features_file", "long.pkl", "--teacher", "T", systems=ranked[0])


def test_speed_of_a_system():
    """20 is the median of the speeds; 5 is the median of 10/5, 20/4 and 60/6."""
    one, two, none = (System(name, None, rates=rates, where="cpu")
                      for name, rates in (("a", [10.0, 20.0, 60.0]), ("b", [5.0, 4.0, 6.0]), ("c", [])))
    assert (one.speed(), one.speed_up(two), none.speed(), one.speed_up(none)) == (20, 5, None, None)
