"""experiments/replicate.py: a study on made-up words, from the collection to the tables."""
import hashlib
import importlib
import json
import math
import os
import re
import signal
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import run_script
from helpers.collection import write_collection
from helpers.scripts import SCRIPTS, forked
from helpers.study import SETTINGS, STEPS

from experiments import cropped_queries, evaluation, findings, running
from experiments import replicate as replicate_script
from experiments.model_records import Records, read_log
from simplified_tinybert.common.files import UserError


class Forked:
    """Replaces subprocess.Popen: runs a script in a forked child, which needs no start-up."""

    def __init__(self, words, stdout, **_):
        script, arguments = (words[2], words[3:]) if words[1] == "-m" else (Path(words[1]).stem, words[2:])
        self.pid, self.returncode = forked(script, arguments, stdout.name), None

    def poll(self):
        child, status = os.waitpid(self.pid, os.WNOHANG) if self.returncode is None else (0, 0)
        if child:
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def terminate(self):
        os.kill(self.pid, signal.SIGTERM)

    def wait(self):
        while self.poll() is None:
            time.sleep(0.05)


@pytest.fixture
def study(golden_models, tmp_path, monkeypatch, run_here):
    """A function that runs replicate.py in this process on a collection of made-up words and returns the results."""
    monkeypatch.setattr(running, "subprocess", SimpleNamespace(Popen=Forked))
    monkeypatch.setitem(SCRIPTS, cropped_queries.__name__, cropped_queries)
    importlib.import_module("torch.utils.tensorboard")              # once here, so that no child has to
    write_collection(tmp_path / "raw")
    (tmp_path / "small.toml").write_text(SETTINGS)
    (tmp_path / "steps.toml").write_text(STEPS)

    def run(settings, output, *more, model="teacher"):
        run_here(replicate_script, tmp_path / settings, "--collection", tmp_path / "raw", "--output_dir",
                 tmp_path / output, "--device", "cpu", "--bert_model", golden_models[model], *more)
        return json.loads((tmp_path / output / "results.json").read_text())
    return run


def test_teacher_and_general_students(study, tmp_path, run_here, golden_models):
    (tmp_path / "small.toml").write_text(SETTINGS.replace("dev_depth = 4", "dev_depth = 4\ndev_queries = 6"))
    results = study("small.toml", "out", "--until", "models")
    assert results["dev"]["queries"] == 6
    stderr = run_here(
        replicate_script, tmp_path / "small.toml", "--collection", tmp_path / "raw", "--output_dir", tmp_path / "out",
        "--device", "cpu", "--bert_model", golden_models["teacher"], "--until", "models")
    assert re.search(r"\d\d to train with; each model re-ranks \d\d dev and \d\d\d test pairs", stderr), stderr
    assert "at least 6 runs of 24 examples; TinyBERT, Simplified TinyBERT with 1/24" in stderr
    assert re.search(r"BM25 0\.\d{4}, teacher 0\.\d{4}\n(.*\n)*step 1 +about 0.0 hours", stderr), stderr
    assert set(results["dev"]["nDCG@10"]) == {"random order", "BM25", "BERT after its warm-up",
                                              "general student 1/24", "teacher, learning rate 0.001"}
    assert all(0 < value <= 1 for value in results["dev"]["nDCG@10"].values()) and results["tuned"] == []
    made = {path.parent.name for path in (tmp_path / "out").glob("*/model.safetensors")}
    assert made == {"warm_up", "teacher-0.001-seed42", "general-1-24", "general-1-24-warm"}
    assert not list((tmp_path / "out" / "students").iterdir())
    assert "| BM25" in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.slow
def test_the_whole_study(study, tmp_path, run_here):
    out = tmp_path / "out"
    results = study("small.toml", "out", "--until", "dev")
    assert not list((out / "runs").iterdir())                                   # the test queries are not used
    assert "systems" not in results and len(results["tuned"]) == 4 and len(results["curves"]) == 2
    assert results["curves"][1]["rows"][0]["att_grad"] > 0

    for path in (tmp_path / "raw").iterdir():                   # new modification times, as in a copy
        os.utime(path)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix in (".safetensors", ".pkl")}
    results = study("small.toml", "out")
    assert before.items() <= {path: path.stat().st_mtime_ns for path in before}.items()
    check_students(results, out)
    check_figures(results, tmp_path)

    tables = (out / "results.md").read_text()
    assert re.search(r"\| TinyBERT +\| +1/24 \|.* ± 0\.\d{4} \|", tables) and "minus teacher" in tables
    run_here(findings, out / "results.json", "--output_dir", tmp_path / "again")
    assert (tmp_path / "again" / "results.md").read_text() == tables
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"results.md", "results.png", "results-losses.png"}

    (tmp_path / "small.toml").write_text(SETTINGS.replace("test_depth = 5", "test_depth = 6"))
    with pytest.raises(UserError, match="test_depth was 5, is 6"):
        study("small.toml", "out")
    with open(tmp_path / "raw" / "queries.test.tsv", "a") as queries:
        queries.write("one-more\tquery\n")
    with pytest.raises(UserError, match="queries.test was(.|\n)*pre-trained BERT was"):
        study("small.toml", "out", model="student_4x48")


def check_students(results, out):
    """All methods have the same number of steps; each student matches its record."""
    for tuned in results["tuned"]:
        name = f"1-24-{tuned['method'].replace(' ', '-')}-{tuned['learning_rate']:g}-seed1"
        record = json.loads((out / "students" / name / "run.json").read_text())
        assert record["finished"] and record["arguments"]["learning_rate"] == tuned["learning_rate"]
        rows = read_log(out / "students" / name / "train_loss.jsonl")
        assert rows[-1]["global_step"] == 3                                     # 24 pairs in batches of 8
        assert not list((out / "students" / name).glob("checkpoint-*"))
    for method in ("TinyBERT", "Simplified TinyBERT"):
        trials = [tuned for tuned in results["tuned"] if tuned["method"] == method]
        chosen, = (trial["dev"] for trial in trials if trial["chosen"])
        assert chosen == max(trial["dev"] for trial in trials)


def check_figures(results, directory):
    """The averages equal those of msmarco_mrr_eval.py for the same runs."""
    qrels = directory / "raw" / "qrels.test.txt"
    rates = {f"{run['shape']} {run['method']}": run["learning_rate"] for run in results["tuned"] if run["chosen"]}
    for system in results["systems"][1:]:
        name = "teacher" if system["name"] == "teacher" else system["name"].replace("/", "-").replace(" ", "-")
        rate = rates.get(system["name"], 0.001)
        names = [f"{name}-{rate:g}" + seed for seed in (["-seed42"] if name == "teacher" else ["-seed1", "-seed2"])]
        assert len(names) == len(system["seeds"]["nDCG@10"])
        runs = [directory / "out" / "runs" / f"{name}.trec" for name in names]
        for number, run in enumerate(runs):
            output = run_script("msmarco_mrr_eval.py", qrels, run, "--measures", "nDCG@10").stdout
            average = float(re.search(r"nDCG@10\D*(\d\.\d+)", output).group(1))
            assert system["seeds"]["nDCG@10"][number] == pytest.approx(average, abs=2e-6)
    bm25 = evaluation.first_ranking(directory / "out" / "data" / "test.tsv")
    assert {query: list(ranking) for query, ranking in bm25.items()} == {
        query: ranking[:5] for query, ranking in candidates(directory / "raw" / "bm25.test.txt").items()}
    assert set(results["comparisons"]) == {"BM25", "teacher", "1/24 Simplified TinyBERT"}


def candidates(run):
    rankings = {}
    for line in run.read_text().splitlines():
        rankings.setdefault(line.split()[0], []).append(line.split()[2])
    return rankings


@pytest.mark.slow
def test_steps_and_records_without_their_models(study, tmp_path, run_here):
    """A study continues in another directory, as on another machine, from the records of the first step."""
    records = "--records", tmp_path / "records"
    results = study("steps.toml", "first", *records, "--steps", 1)
    assert [system["name"] for system in results["systems"]] == ["BM25", "teacher", "1/24 none"]
    assert list(results["teacher_seeds"]) == ["3"]
    before = check_tuning(results, tmp_path)

    results = study("steps.toml", "second", *records, "--steps", 3)
    assert not [path for path in (tmp_path / "second" / "students").iterdir() if "none" in path.name]
    assert {path: path.read_bytes() for path in before} == before                       # the same weights again
    assert [system["method"] for system in results["systems"]] == [
        "BM25", "teacher", "none", "ensemble", "Simplified TinyBERT"]
    check_ensemble(tmp_path)
    assert list(results["teacher_seeds"]) == ["3", "4"]
    values = ", ".join(f"{seeds['nDCG@10'][0]:.4f} (seed {seed})" for seed, seeds in results["teacher_seeds"].items())
    assert f"the first one teaches the students: {values}." in (tmp_path / "second" / "results.md").read_text()
    teacher = json.loads((tmp_path / "records" / "teacher-0.001-seed3.json").read_text())
    weights = tmp_path / "second" / "teacher-0.001-seed3" / "best" / "model.safetensors"
    assert teacher["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    student = json.loads((tmp_path / "records" / "2-48-Simplified-TinyBERT-0.001-seed1.json").read_text())
    assert student["made_of"]["teacher"] == teacher["sha256"] and len(student["made_of"]) == 2
    check_summary(results, tmp_path, run_here)
    check_interpolation(study("steps.toml", "second", *records), tmp_path)             # trains a student again for it

    (tmp_path / "steps.toml").write_text(STEPS.replace("[warm_up]", 'flags = "--weight_decay 0"\n[warm_up]'))
    with pytest.raises(UserError, match="teacher-0.001-seed3.json: (.|\n)*--weight_decay 0"):
        study("steps.toml", "second", *records)


def check_tuning(results, directory):
    """Trials use 0.3 of the budget, the student all of it. The range is extended if the best rate is at its edge."""
    rates = [run["learning_rate"] for run in results["tuned"]]
    best = max(results["tuned"], key=lambda run: run["dev"])
    assert len(rates) in (3, 4) and {0.001, 0.01} < set(rates) and best["chosen"]
    records = sorted((directory / "records").glob("1-24-none-*.json"))
    steps = {path.stem: json.loads(path.read_text())["steps"] for path in records}
    trial = 1                                                                   # 0.3 of 24 pairs, in batches of 8
    assert steps.pop(f"1-24-none-{best['learning_rate']:g}-seed1") == 3 > trial
    assert set(steps.values()) == {trial} and len(steps) == len(rates)
    assert max(path.stat().st_size for path in records) < 20000
    return {path: path.read_bytes() for path in (directory / "records").glob("*.json")
            if path.stem not in ("queries", "inputs")}


def check_summary(results, directory, run_here):
    """The summary's format is fixed. Its figures are recomputed from the records."""
    out = directory / "second" / "results.json"
    run_here(findings, out, "--output_dir", directory / "tables", "--summary", directory / "summary.json")
    assert "no distillation" in (directory / "tables" / "results.md").read_text()
    summary = json.loads((directory / "summary.json").read_text())
    assert list(summary) == ["collections"] and list(summary["collections"]) == ["raw"]
    study = summary["collections"]["raw"]
    assert set(study) == {"queries", "bm25", "teacher", "teacher_seeds", "teacher_minus_bm25", "students"}
    assert [set(student) for student in study["students"]] == 3 * [{
        "method", "shape", "mean", "sd", "retention", "speed_up", "minus_teacher", "minus_bm25"}]
    student, read = study["students"][0], Records(directory / "records", {}).read
    name = next(f"1-24-none-{run['learning_rate']:g}-seed1" for run in results["tuned"] if run["chosen"])
    values, bm25 = read(name)["test"]["nDCG@10"], read("BM25")["test"]["nDCG@10"]
    assert (student["method"], student["shape"], student["sd"]) == ("none", "1/24", None)
    assert study["queries"] == len(values) == len(read("queries")["test"])
    assert student["mean"] == pytest.approx(statistics.fmean(values), abs=1e-5)
    assert student["retention"] == pytest.approx(student["mean"] / study["teacher"], rel=1e-4)
    difference = student["minus_bm25"]
    expected = statistics.fmean(value - base for value, base in zip(values, bm25))
    assert difference["difference"] == pytest.approx(expected, abs=1e-5)
    assert set(difference) == {"difference", "low", "high", "p", "p_holm"} and difference["p_holm"] >= difference["p"]
    assert study["teacher_seeds"]["3"] == pytest.approx(study["teacher"]) and len(study["teacher_seeds"]) == 2
    (directory / "again.json").write_text(out.read_text())
    with pytest.raises(UserError, match="collection raw"):
        run_here(findings, out, directory / "again.json", "--output_dir", directory, "--summary", directory / "no.json")
    assert not (directory / "no.json").exists()


def check_ensemble(directory):
    """The student's soft labels are those of the two teachers' score files, which have a row for each training pair."""
    record = json.loads((directory / "records" / "2-48-ensemble-0.001-seed1.json").read_text())
    files = [f"OUT/runs/teacher-0.001-seed{seed}.train.tsv" for seed in (3, 4)]
    place = record["command"].index("--teacher_scores_file")
    assert record["command"][place + 1:place + 3] == files
    assert set(record["made_of"]) == {"general student", "teacher", "teacher-0.001-seed4"}
    pairs = (directory / "second" / "data" / "train.tsv").read_text().splitlines()
    scores = [(directory / "second" / file.removeprefix("OUT/")).read_text().splitlines() for file in files]
    assert [len(lines) for lines in scores] == 2 * [len(pairs)] and scores[0] != scores[1]
    assert min(float(line.split("\t")[1]) for line in scores[0]) < 0                       # log-odds


def check_interpolation(results, directory):
    """Weights and values equal those of convert_to_trec_results.py --interpolate, for BM25's scores and log-odds.

    Its command finds each weight on the dev queries, and is then given this weight for the test queries.
    """
    assert list(results["interpolated"]) == ["teacher", "1/24 none", "2/48 ensemble", "2/48 Simplified TinyBERT"]
    runs, rates = directory / "second" / "runs", {
        run["shape"]: run["learning_rate"] for run in results["tuned"] if run["chosen"]}
    names = ["teacher-0.001-seed3", f"1-24-none-{rates['1/24']:g}-seed1", "2-48-ensemble-0.001-seed1",
             "2-48-Simplified-TinyBERT-0.001-seed1"]
    for split, depth in (("dev", 4), ("test", 5)):
        kept = [line for line in (directory / "raw" / f"bm25.{split}.txt").read_text().splitlines()
                if int(line.split()[3]) <= depth]
        (directory / f"{split}.txt").write_text("\n".join(kept) + "\n")
    for system, name in zip(results["interpolated"].values(), names):
        choose = "--interpolation_qrels", directory / "raw" / "qrels.dev.txt"
        weight, = system["weights"]
        for split, scores, flags in (("dev", f"{name}.dev.tsv", choose), ("test", f"{name}.tsv", (
                "--interpolation_weight", weight))):
            with open(directory / "log_odds.tsv", "w") as handle:
                for line in (runs / scores).read_text().splitlines():
                    *ids, p = line.split("\t")
                    print(*ids, math.log(float(p)) - math.log1p(-float(p)), sep="\t", file=handle)
            done = run_script("convert_to_trec_results.py", "--scores_file", handle.name, "--interpolate",
                              directory / f"{split}.txt", *flags, "--output_results_file", directory / "run.trec")
            assert f"interpolated with weight {weight:g};" in done.stderr, done.stderr
        output = run_script("msmarco_mrr_eval.py", directory / "raw" / "qrels.test.txt", directory / "run.trec",
                            "--measures", "nDCG@10").stdout
        value, = system["seeds"]["nDCG@10"]
        assert value == pytest.approx(float(re.search(r"nDCG@10\D*(\d\.\d+)", output).group(1)), abs=2e-6)
        alone, = next(each["seeds"]["nDCG@10"] for each in results["systems"] if each["shape"] and (
            each["name"].replace("/", "-").replace(" ", "-") in name))
        assert system["minus_alone"]["nDCG@10"]["difference"] == pytest.approx(value - alone, abs=1e-5)
    assert "1/24 no distillation + BM25" in (directory / "second" / "results.md").read_text()


@pytest.mark.parametrize("script", ["replicate", "findings", "cropped_queries"])
def test_help_describes_the_output(script):
    done = run_script(f"experiments.{script}", "--help")
    assert done.returncode == 0 and ("Out, in" in done.stdout or "Out:" in done.stdout)
