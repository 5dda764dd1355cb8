"""experiments/: a study on made-up words from collection to tables; cropped queries; docs/replication.md."""
import hashlib
import importlib
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
from conftest import ROOT, run_script
from helpers.collection import write_collection
from helpers.scripts import SCRIPTS, forked
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from transformers import BertConfig, BertForSequenceClassification

from experiments import cropped_queries, evaluation, findings, running
from experiments import replicate as replicate_script
from experiments.commands import Commands
from experiments.cropped_queries import examples, sample_texts
from experiments.model_records import Records, read_log, weights_sha256
from experiments.running import Command, run_all
from experiments.settings import Training, divisor_at_least, keep_inputs, read_settings
from experiments.study import extension
from simplified_tinybert.common.files import Problems, UserError
from simplified_tinybert.common.workers import available_cores
from simplified_tinybert.model.bert import count_parameters
from simplified_tinybert.ranking.trec import read_qrels

RESULTS = ROOT / "experiments" / "results"
SUMMARY = RESULTS / "summary.json"
STUDIES = {"replication.md": ["worldtree", "squad-sentences", "example"],
           "replication-nfcorpus.md": ["cranfield", "nfcorpus", "nfcorpus-cold"]}
SETTINGS = """
seeds = [1, 2]
measures = ["nDCG@10", "RR@10"]
proposed = "Simplified TinyBERT"
max_seq_length = 32
passages = "--title --window 12 --stride 6"
sampling = "--negatives 1"
dev_depth = 4
test_depth = 5

[tuning]
extensions = 0

[warm_up]
pairs = 24
most_epochs = 1
batch_size = 8
learning_rates = [1e-3]
flags = ""

[teacher]
pairs = 30
most_epochs = 2
batch_size = 8
learning_rates = [1e-3]
flags = "--padding masked"

[general]
pairs = 30
most_epochs = 1
batch_size = 8
flags = "--compress_teacher"

[student_warm_up]
pairs = 24
most_epochs = 1
batch_size = 8
flags = ""

[distillation]
pairs = 24
most_epochs = 9
batch_size = 8
validations = 2
flags = ""

[students]
quarter = { depth = 0.25, width = 0.5, general_learning_rate = 3e-4, learning_rates = [1e-3, 1e-2] }

[methods]
"TinyBERT" = "--distill_model tinybert"
"Simplified TinyBERT" = "--distill_model simplified"
"""


STEPS = """
like = "small.toml"
seeds = [1]
proposed = "Simplified TinyBERT"
steps = [
    { students = ["quarter"], methods = ["none"] },
    { teachers = true },
    { students = ["half"], methods = ["ensemble", "Simplified TinyBERT"] },
    { interpolation = true },
]
[tuning]
share = 0.3
extensions = 1
[teacher]
seeds = [3, 4]
[warm_up]
pairs = 0
[students]
half = { depth = 0.5, flags = "--init_from_teacher", learning_rates = [1e-3] }
[general]
flags = "--padding masked"
[methods]
none = "--distill_model finetune"
ensemble = "--distill_model standard --teacher_scores_file TEACHERS"
[titles]
none = "no distillation"
"""


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


@pytest.mark.parametrize(("rates", "best", "expected"), [
    ([5e-5, 1e-4, 2e-4], 1e-4, None), ([5e-5, 1e-4, 2e-4], 5e-5, 2.5e-5), ([5e-5, 1e-4, 2e-4], 2e-4, 4e-4),
    ([2.5e-5, 5e-5, 1e-4, 2e-4], 2.5e-5, 1.25e-5), ([1.25e-5, 2.5e-5, 5e-5, 1e-4, 2e-4], 1.25e-5, None),
    ([2.5e-5, 5e-5, 1e-4, 2e-4], 2e-4, 4e-4), ([5e-5, 1e-4, 2e-4, 4e-4, 8e-4], 8e-4, None)])
def test_learning_rates_are_extended_at_an_edge(rates, best, expected):
    assert extension(rates, best, [5e-5, 1e-4, 2e-4], 2) == expected


def test_one_learning_rate_has_no_edge():
    assert extension([1e-4], 1e-4, [1e-4], 2) is None


def trained(directory, weights):
    """Return a directory as distill.py leaves it."""
    (directory / "best").mkdir(parents=True)
    (directory / "best" / "model.safetensors").write_bytes(weights)
    arguments = {"learning_rate": 0.1, "seed": 7, "train_batch_size": 8}
    (directory / "run.json").write_text(json.dumps({"arguments": arguments, "device": "cpu",
                                                    "versions": {"torch": "2"}}))
    (directory / "dev.jsonl").write_text('{"global_step": 5, "nDCG@10": 0.25}\n{"global_step": 9, "nDCG@10": 0.125}\n')
    (directory / "train_loss.jsonl").write_text(
        '{"global_step": 5, "loss": 0.123456789, "examples_per_second": 4.0}\n'
        '{"global_step": 9, "loss": 0.1, "examples_per_second": 2.0}\n')
    return directory


def test_records_of_a_model_that_was_made_twice(tmp_path):
    """Two machines may make different weights. Those tested first count; the others are mentioned once."""
    records, words = Records(tmp_path, {"OUT": tmp_path}), ["python", "/x/distill.py", "--out", f"{tmp_path}/a"]
    one, two = trained(tmp_path / "a", b"one"), trained(tmp_path / "b", b"two")
    assert records.keep("a", one, words, {"teacher": two}) and not records.keep("a", one, words, {"teacher": two})
    record = records.read("a")
    assert record["sha256"] == hashlib.sha256(b"one").hexdigest() and record["steps"] == 9
    assert record["made_of"] == {"teacher": hashlib.sha256(b"two").hexdigest()}
    assert record["seconds"] == 5 * 8 / 4 + 4 * 8 / 2 and record["losses"][0]["loss"] == 0.123457
    assert record["command"] == ["distill.py", "--out", "OUT/a"] and records.dev("a") == 0.25
    records.add_test("a", {"AP": {"r": 1 / 3, "q": 1.0}})
    assert records.keep("a", two, words, {}) and not records.keep("a", two, words, {})
    record = records.read("a")
    assert record["sha256"] == hashlib.sha256(b"one").hexdigest() and record["test"] == {"AP": [1.0, 0.333333]}
    assert [other["sha256"] for other in record["also_made"]] == [hashlib.sha256(b"two").hexdigest()]
    assert records.test(["a", "a"], ["AP"]) == ({"AP": [0.6666665] * 2}, {"AP": {"q": 1.0, "r": 0.333333}})
    with pytest.raises(UserError, match="queries.json: .* b was"):
        records.add_test("b", {"AP": {"s": 1.0}})
    with pytest.raises(UserError, match="a.json: (.|\n)*--more"):
        records.read_of("a", [*words, "--more"])


def test_the_checksum_of_sharded_weights_is_over_all_bytes(tmp_path):
    shards = {"model-00001-of-00002.safetensors": b"one", "model-00002-of-00002.safetensors": b"two"}
    for name, content in shards.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(zip("ab", shards))}))
    assert weights_sha256(tmp_path) == hashlib.sha256(b"onetwo").hexdigest()


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_commands_end_with_a_study_that_is_killed(tmp_path):
    endless = "import os, time; open('pid.tmp', 'w').write(str(os.getpid())); os.rename('pid.tmp', 'pid'); " \
              "time.sleep(600)"
    code = f"import sys; from pathlib import Path; from experiments.running import Command, run_all; " \
           f"run_all('x', [Command('a', Path('a'), [sys.executable, '-c', {endless!r}])], 1, Path('.'))"
    study = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.DEVNULL,
                             env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        wait_for(lambda: (tmp_path / "pid").exists())
    finally:
        study.send_signal(signal.SIGKILL)
        study.wait()
    wait_for(lambda: is_gone(int((tmp_path / "pid").read_text())))


def wait_for(condition, timeout=120):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_gone(pid):
    try:
        with open(f"/proc/{pid}/stat") as handle:
            return handle.read().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_input_errors_are_reported_before_anything_is_made(tmp_path):
    write_collection(tmp_path / "raw")
    (tmp_path / "raw" / "qrels.dev.txt").unlink()
    (tmp_path / "small.toml").write_text(SETTINGS.replace('proposed = "Simplified TinyBERT"', 'proposed = "X"'))
    done = run_script("experiments.replicate", tmp_path / "small.toml", "--collection", tmp_path / "raw",
                      "--output_dir", tmp_path / "out", "--bert_model", tmp_path / "none", "--jobs", 0)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "out").exists()
    for part in ("small.toml: proposed = 'X'", "qrels.dev.txt", str(tmp_path / "none"), "--jobs 0"):
        assert part in done.stderr, done.stderr


def test_errors_in_the_collection_are_found_before_anything_is_made(tmp_path, golden_models):
    write_collection(tmp_path / "raw")
    queries, run = tmp_path / "raw" / "queries.train.tsv", tmp_path / "raw" / "bm25.train.txt"
    queries.write_text(queries.read_text().replace("q1\t", "q#1\t"))
    run.write_text(run.read_text() + run.read_text().splitlines(keepends=True)[0])
    (tmp_path / "small.toml").write_text(SETTINGS)
    done = run_script("experiments.replicate", tmp_path / "small.toml", "--collection", tmp_path / "raw",
                      "--output_dir", tmp_path / "out", "--device", "cpu", "--bert_model", golden_models["teacher"])
    assert done.returncode == 2 and "queries.train.tsv:2: found query id 'q#1'" in done.stderr, done.stderr
    assert "must be contiguous" in done.stderr and not (tmp_path / "out").exists()


def test_inputs_are_fixed_once_something_is_made(tmp_path):
    path = tmp_path / "inputs.json"
    keep_inputs(path, {"docs": 1}, made=False)
    keep_inputs(path, {"docs": 2}, made=False)                  # for example after mending the documents
    keep_inputs(path, {"docs": 2, "dev_queries": None}, made=True)
    with pytest.raises(UserError, match="dev_queries was None, is 5"):
        keep_inputs(path, {"docs": 2, "dev_queries": 5}, made=True)
    with pytest.raises(UserError, match="docs was 2, is 3"):
        keep_inputs(path, {"docs": 3}, made=True)


def test_trials_are_shares_of_the_budget():
    training = Training(pairs=100_000, most_epochs=2, batch_size=16, flags="", validations=4)
    for pairs in (18_300, 160_000):
        trial = training.part(0.25)
        assert trial.epochs(pairs) == pytest.approx(training.epochs(pairs) / 4) and trial.validations == 1
    assert training.part(0.25).epochs(18_300) == 0.5                            # as in the recorded commands


def test_ranking_losses_train_for_as_many_steps(tmp_path, golden_models):
    """Their epoch has N passages of each query (10 examples here, 4 steps), the others' all pairs (24, 8 steps)."""
    (tmp_path / "small.toml").write_text(SETTINGS)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.tsv").write_text("".join(f"{n}\tquery {n % 5}\tpassage\t0\n" for n in range(24)))
    args = SimpleNamespace(output_dir=tmp_path, teacher_model=None, bert_model=golden_models["teacher"], device="cpu")
    commands = Commands(args, read_settings(tmp_path / "small.toml", Problems()), {"qrels.dev": tmp_path})
    commands.counts["train"] = 24
    training, epochs = Training(24, 2, 3, "", [1e-3], seeds=[1]), []
    for flags in ([], ["--group_by_query", "2"]):
        words = commands.train(tmp_path / "student", tmp_path / "start", "train", training, flags).words
        epochs.append(float(words[words.index("--num_train_epochs") + 1]))
    assert epochs == [1, 2]


def test_warnings_of_commands_are_printed_once(tmp_path, capsys):
    code = "import sys; print('\\rpassages: 50%warning: skipped 3\\nnote', file=sys.stderr); open(sys.argv[1], 'w')"
    for attempt in range(2):
        run_all("both", [Command(name, tmp_path / name, [sys.executable, "-c", code, str(tmp_path / name)])
                         for name in ("a", "b")], 1, tmp_path)
        assert capsys.readouterr().err.count("warning: skipped 3 (a)\n") == 1 - attempt


def test_a_command_alone_uses_all_cores(tmp_path):
    code = "import os, sys; open(sys.argv[1], 'w').write(os.environ['OMP_NUM_THREADS'])"
    first, second = (Command(name, tmp_path / name, [sys.executable, "-c", code, str(tmp_path / name)],
                             [tmp_path / "a"] * (name == "b")) for name in ("a", "b"))
    run_all("in turn", [first, second], 2, tmp_path)
    assert {(tmp_path / name).read_text() for name in "ab"} == {os.environ.get("OMP_NUM_THREADS",
                                                                               str(available_cores()))}


@pytest.mark.parametrize(("old", "new", "part"), [
    ("dev_depth = 4", "dev_depth = 4\ndev_queries = 0", "dev_queries = 0"), ("extensions = 0", "share = 1", "tuning: "),
    ("seeds = [1, 2]", "seeds = []", "seeds is empty"), ("seeds = [1, 2]", "sedes = [1]", "sedes"),
    ("seeds = [1, 2]", "seeds = [1, 1]", "seeds = [1, 1]"), ("seeds = [1, 2]", "seeds = 3", "wrong type"),
    ("[warm_up]", "[warm_up", "TOML"), ("depth = 0.25", "depth = 25", "students.quarter: found depth 25"),
    ('measures = ["nDCG@10", "RR@10"]', 'measures = ["nDCG@10", "XY"]', "XY"), ("pairs = 30", "pairs = 0", "pairs"),
    ("learning_rates = [1e-3, 1e-2]", "learning_rates = [1e-3, 1e-3]", "quarter: learning_rates = [0.001, 0.001]"),
    ("learning_rates = [1e-3, 1e-2]", "learning_rates = []", "quarter: learning_rates = []"),
    ('flags = "--padding masked"', "flags = 1", "teacher.flags = 1"),
    ('flags = "--padding masked"', 'flags = "--seed 3"', "teacher.flags = '--seed 3'"),
    ('"--distill_model tinybert"', '"--distill_model=tinybert"', "--distill_model=tinybert"),
    ('"TinyBERT" = ', '"Simplified-TinyBERT" = ', "methods: "),
    ("seeds = [1, 2]", 'steps = [{ students = ["quarter"], methods = ["X"] }]\nseeds = [1]', "steps: "),
    ("seeds = [1, 2]", 'steps = [{ students = ["quarter"] }]\nseeds = [1]', "steps: "),
    ("seeds = [1, 2]", 'steps = [{ student = ["quarter"] }]\nseeds = [1]', "'student'"),
    ("[teacher]", "[teacher]\nseeds = []", "teacher.seeds = []"), ("extensions = 0", "extensions = -1", "tuning: "),
    ("[students]", '[titles]\nx = "y"\n[students]', "titles: ['x']")])
def test_wrong_settings(tmp_path, old, new, part):
    problems = Problems()
    (tmp_path / "small.toml").write_text(SETTINGS.replace(old, new))
    read_settings(tmp_path / "small.toml", problems)
    assert any(part in message and ("small.toml: " in message or message.startswith("--measures"))
               for message in problems.messages), problems.messages


def test_settings_like_those_of_another_file(tmp_path):
    (tmp_path / "small.toml").write_text(SETTINGS)
    (tmp_path / "other.toml").write_text('like = "small.toml"\nseeds = [7]\n[teacher]\npairs = 99\n')
    plain, other = (read_settings(tmp_path / f"{name}.toml", Problems()) for name in ("small", "other"))
    assert other.seeds == [7] and other.teacher.pairs == 99
    assert other.teacher.flags == plain.teacher.flags and other.methods == plain.methods


def test_the_committed_settings_are_valid():
    for path in (ROOT / "experiments").glob("*.toml"):
        problems = Problems()
        assert read_settings(path, problems) and not problems.count, problems.messages


def test_a_command_that_fails_ends_the_others(tmp_path):
    steps = [Command("slow", tmp_path / "a", [sys.executable, "-c", "import time; time.sleep(60)"]),
             Command("bad", tmp_path / "b", [sys.executable, "-c", "print('what went wrong'); raise SystemExit(2)"])]
    start = time.monotonic()
    with pytest.raises(UserError, match="bad ended with exit code 2(.|\n)*what went wrong"):
        run_all("both", steps, 2, tmp_path)
    assert time.monotonic() - start < 60
    steps[1] = Command("done", tmp_path / "c", ["/bin/touch", str(tmp_path / "c")])
    run_all("one", steps[1:], 2, tmp_path)
    changed = (tmp_path / "c").stat().st_mtime_ns
    run_all("one", steps[1:], 2, tmp_path)                                      # already done
    assert (tmp_path / "c").stat().st_mtime_ns == changed


def test_a_command_waits_until_the_files_it_needs_are_complete(tmp_path):
    """A file may exist before the command that makes it has ended. If it is made again, so is what was made from it."""
    slow = "import pathlib, time; pathlib.Path('a').touch(); time.sleep(1); pathlib.Path('end').touch()"
    quick = "import pathlib; pathlib.Path('b').write_text(str(pathlib.Path('end').exists()))"
    chdir = f"import os; os.chdir({str(tmp_path)!r}); "
    commands = [Command(name, tmp_path / name, [sys.executable, "-c", chdir + code], needs)
                for name, code, needs in (("a", slow, []), ("b", quick, [tmp_path / "a"]))]
    for remove in ("end", "a"):
        (tmp_path / remove).unlink(missing_ok=True)
        run_all("both", commands, 2, tmp_path)
        assert (tmp_path / "b").read_text() == "True"
        (tmp_path / "b").write_text("made from the old a")


@given(st.integers(1, 48), st.floats(0.01, 1))
def test_layers_can_be_mapped_evenly(layers, share):
    divisor = divisor_at_least(layers, share * layers)
    assert layers % divisor == 0 and divisor >= share * layers
    assert not any(layers % other == 0 for other in range(1, divisor) if other >= share * layers)


def test_comparisons_by_hand():
    """Three queries, differences 0.1, 0.2, 0.3: mean 0.2, t(0.975, 2) = 4.3027, standard error 0.1 / sqrt 3."""
    low, high = (0.1, 0.1, 0.1), (0.2, 0.3, 0.4)
    values = {name: {"AP": dict(zip("abc", found))} for name, found in (
        ("BM25", low), ("teacher", high), ("3/4 A", low), ("3/4 B", high))}
    compared = evaluation.comparisons(values, {"3/4 A": "3/4", "3/4 B": "3/4"}, ["AP"], "B")
    assert set(compared) == {"BM25", "teacher", "3/4 B"} and set(compared["3/4 B"]["AP"]) == {"3/4 A"}
    low, high = compared["BM25"]["AP"]["teacher"]["interval"]
    assert (low, high) == pytest.approx((0.2 - 4.30265 * 0.1 / 3 ** 0.5, 0.2 + 4.30265 * 0.1 / 3 ** 0.5), rel=1e-5)
    single = compared["3/4 B"]["AP"]["3/4 A"]["p"]["t-test"]
    corrected = compared["BM25"]["AP"]["teacher"]["holm"]["t-test"]
    assert single == pytest.approx(0.07418, abs=1e-5) and corrected == pytest.approx(3 * single)
    assert compared["teacher"]["AP"]["3/4 B"]["p"]["t-test"] == 1.0


def test_means_over_seeds(tmp_path):
    (tmp_path / "qrels").write_text("q 0 a 1\nr 0 b 1\n")
    runs = [{query: {"a": score, "b": 1.5} for query in "qr"} for score in (2.0, 1.0)]
    averages, values = evaluation.values_of(read_qrels(tmp_path / "qrels", Problems()), runs, ["RR@10"])
    assert averages == {"RR@10": [0.75, 0.75]} and values == {"RR@10": {"q": 0.75, "r": 0.75}}


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=40), min_size=2, max_size=6),
       st.integers(1, 30))
def test_queries_are_cut_out_of_their_passages(texts, count):
    texts = [" ".join(text) for text in texts]
    made = list(examples(texts, count, Random(1)))
    assert [label for _, _, label in made] == [1, 0] * (count // 2) + [1] * (count % 2)
    for (query, passage, label), (previous_query, _, _) in zip(made, [made[0], *made]):
        assert any(passage in text for text in texts) and len(passage.split()) <= 24
        if label == 1:
            assert query in passage and len(query.split()) <= 8
        else:
            assert query == previous_query


def test_texts_are_drawn_evenly(tmp_path):
    (tmp_path / "docs.tsv").write_text("".join(f"D{number}\tw{number}\n" for number in range(10)))
    counts = dict.fromkeys((f"w{number}" for number in range(10)), 0)
    for seed in range(600):
        for text in sample_texts(tmp_path / "docs.tsv", 3, Random(seed), Problems()):
            counts[text] += 1
    assert sum(counts.values()) == 1800 and all(130 < count < 230 for count in counts.values())


def test_wrong_documents(tmp_path):
    for content, part in (("D1\ta b\n", "docs.tsv: found 1 documents"), ("D1\ta\tb\n", "docs.tsv:1: found 3")):
        (tmp_path / "docs.tsv").write_text(content)
        done = run_script("experiments.cropped_queries", "--docs", tmp_path / "docs.tsv", "--output",
                          tmp_path / "out.tsv", "--texts", tmp_path / "texts.txt")
        assert done.returncode == 2 and part in done.stderr and "Traceback" not in done.stderr
        assert not (tmp_path / "out.tsv").exists()


@pytest.mark.parametrize("name", ["worldtree", "nfcorpus"])
def test_parameters_in_the_committed_results(name):
    """Counted anew; packing the weights for a CPU once hid most of them."""
    bert = {"vocab_size": 30522, "num_attention_heads": 12, "max_position_embeddings": 512}
    for system in json.loads((RESULTS / f"{name}.json").read_text())["systems"]:
        if system["shape"]:
            layers, hidden_size = map(int, system["shape"].split("/"))
            config = BertConfig(**bert, num_hidden_layers=layers, hidden_size=hidden_size,
                                intermediate_size=4 * hidden_size, num_labels=2)
            assert system["parameters"] == count_parameters(BertForSequenceClassification(config))


def test_every_committed_result_is_on_a_page():
    assert {path.stem for path in RESULTS.glob("*.json")} - {"summary"} == {*chain.from_iterable(STUDIES.values())}


@pytest.mark.parametrize("page", STUDIES)
def test_the_document_has_the_tables_of_the_committed_results(tmp_path, page):
    """The tables in the page and in experiments/results equal those that findings.py makes."""
    document = tmp_path / page
    document.write_bytes((ROOT / "docs" / page).read_bytes())
    done = run_script("experiments.findings", *(RESULTS / f"{name}.json" for name in STUDIES[page]), "--output_dir",
                      tmp_path / "out", "--document", document)
    assert done.returncode == 0, done.stderr
    assert document.read_text() == (ROOT / "docs" / page).read_text()
    for path in (tmp_path / "out").glob("*.md"):
        assert path.read_text() == (RESULTS / path.name).read_text()


def test_the_summary_is_that_of_the_committed_results(tmp_path):
    results = [SUMMARY.with_name(f"{name}.json") for name in json.loads(SUMMARY.read_text())["collections"]]
    done = run_script("experiments.findings", *results, "--output_dir", tmp_path, "--summary", tmp_path / "x.json")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.json").read_text() == SUMMARY.read_text()


@pytest.mark.parametrize(("page", "end", "least", "from_a_log"), [
    ("replication.md", "## Set-up", (30, 9), set()),
    ("replication-nfcorpus.md", "## NFCorpus", (40, 12), {"0.3044", "0.3068", "0.3049"})])
def test_the_findings_are_those_of_the_committed_results(page, end, least, from_a_log):
    """Every figure of four decimals in the text is also in a table, except those from a log."""
    text = (ROOT / "docs" / page).read_text().partition(end)[0].replace("−", "-")
    tables = "".join((RESULTS / f"{name}.md").read_text() for name in STUDIES[page])
    text = re.sub(r"(?m)^\| [^|]+(?: \| (?:0\.\d{4}|–)){3} \|$", "", text)       # a row of the next test
    figures = set(re.findall(r"[-+]?0\.\d{4}", text)) - from_a_log
    assert len(figures) > least[0] and not [figure for figure in figures if figure not in tables]
    intervals = re.findall(r"([-+]0\.\d{4}) \(([-+]0\.\d{4} to [-+]0\.\d{4})", text)
    rows = [re.findall(r"[-+]0\.\d{4}(?: to [-+]0\.\d{4})?", line) for line in tables.splitlines()]
    assert len(intervals) > least[1] and not [pair for pair in intervals if list(pair) not in rows]


def test_the_commands_of_the_document_are_understood(monkeypatch):
    text = re.sub(r"\s*\\\n\s*", " ", (ROOT / "docs" / "replication.md").read_text())
    lines = re.findall(r"python -m (experiments\.replicate [^\n]*)", text)
    assert len(lines) >= 2
    for line in lines:
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        args, problems = replicate_script.parse_args(), Problems()
        assert read_settings(ROOT / args.settings, problems) and not problems.count, problems.messages


def test_the_progress_of_the_students_is_reported_as_recorded():
    """Half an epoch: the trial of the chosen learning rate. One and two epochs: the student with the first seed."""
    results = json.loads((RESULTS / "worldtree.json").read_text())
    text, titles = (ROOT / "docs" / "replication.md").read_text(), results["settings"]["titles"]
    chosen = [run for run in results["tuned"] if run["chosen"]]
    for run in chosen:
        name = f"3-384-{run['method']}-{run['learning_rate']:g}-seed1.json"
        one, two = (f"{row['nDCG@10']:.4f}" for row in json.loads((RESULTS / "worldtree" / name).read_text())["dev"])
        one = "–" if run["method"] == "tinybert" else one               # its first validation is in the second stage
        assert f"| {titles[run['method']]} | {run['dev']:.4f} | {one} | {two} |" in text
    rates = sorted((run["learning_rate"], run["dev"]) for run in results["tuned"]
                   if run["method"] == results["settings"]["proposed"])
    values = ", ".join(f"{value:.4f}" for _, value in rates)
    assert f"Simplified TinyBERT has {values} at 5e-5, 1e-4, 2e-4, 4e-4 and 8e-4" in " ".join(text.split())
    assert [rate for rate, _ in rates] == [5e-5, 1e-4, 2e-4, 4e-4, 8e-4]


def test_the_first_table_of_the_readme_is_the_summary():
    text, studies = (ROOT / "README.md").read_text(), json.loads(SUMMARY.read_text())["collections"]
    results = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in studies}
    (first, worldtree), (second, squad) = studies.items()
    titles = results[first]["settings"]["titles"]

    def interval(found):
        return f"{found['difference']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"

    def cells(study, found, mean):
        return f"{mean:.4f} | {interval(found)}"
    rows = [f"| WorldTree ({worldtree['queries']} queries) | minus BM25 |",
            f"| squad-sentences ({squad['queries']:,} queries) | minus BM25 |",
            f"| {worldtree['bm25']:.4f} | – | {squad['bm25']:.4f} | – | – |",
            "| " + " | ".join(cells(study, study["teacher_minus_bm25"], study["teacher"]) for study in studies.values())
            + " | 1.00 × |"]
    of_method = [{student["method"]: student for student in study["students"]} for study in studies.values()]
    for method, student in of_method[0].items():
        bold = "**" * (method == "simplified-masked")
        both = [cells(study, students[method]["minus_bm25"], students[method]["mean"])
                for study, students in zip(studies.values(), of_method)]
        rows.append(f"| {bold}student: {titles[method]}{bold} | {student['shape']} | {' | '.join(both)} | "
                    f"{student['speed_up']:.3g} × |")
    assert not [row for row in rows if row not in text]
    text = " ".join(text.split())
    proposed = [students["simplified-masked"] for students in of_method]
    retained = [f"{100 * student['retention']:.1f} %" for student in proposed]
    assert f"keeps {retained[0]} and {retained[1]} of its teacher's nDCG@10" in text
    differences = [interval(student["minus_teacher"]) for student in proposed]
    assert f"minus its teacher: {' and '.join(differences)};" in text
    found = [results[name]["comparisons"]["3/384 simplified-masked"]["nDCG@10"]["3/384 tinybert"] for name in studies]
    found = [each | dict(zip(("low", "high"), each["interval"])) for each in found]
    assert f"minus TinyBERT: {interval(found[0])} and {interval(found[1])}" in text
    teacher, student = (statistics.fmean(results[first]["interpolated"][name]["seeds"]["nDCG@10"])
                        for name in ("teacher", "3/384 simplified-masked"))
    assert f"With BM25's scores added, the teacher has {teacher:.4f} on WorldTree, the student {student:.4f}." in text


def test_the_worldtree_teacher_is_reported_as_recorded():
    text = (ROOT / "docs" / "replication.md").read_text().partition("## The teacher")[2]
    directory = ROOT / "experiments" / "results" / "worldtree"
    bm25, teacher = (json.loads((directory / f"{name}.json").read_text()) for name in ("BM25", "teacher-5e-05-seed1"))
    for measure, before in bm25["test"].items():
        found = stats.ttest_rel(after := teacher["test"][measure], before)
        low, high = found.confidence_interval()
        means = statistics.fmean(before), statistics.fmean(after)
        assert (f"| {measure} | {means[0]:.4f} | {means[1]:.4f} | {means[1] - means[0]:+.4f} | {low:+.4f} to "
                f"{high:+.4f} | {found.pvalue:.2g} |") in text
    trials = json.loads((directory / "trials.json").read_text())["trials"]
    for trial in trials:
        values = ", ".join(f"{value:.4f}" for value in trial["dev"].values())
        stopped = ", stopped" if trial.get("stopped") else ""
        assert f"| {trial['batch size']} | {trial['learning rate']:g} | {trial['epochs']} | {values}{stopped} |" in text
    assert list(trials[-1]["dev"].values()) == [row["nDCG@10"] for row in teacher["dev"]]
    assert f"exceeds BM25's by {teacher['dev'][-1]['nDCG@10'] - 0.481641:.4f}" in text


def test_the_first_worldtree_teacher_is_reported_as_recorded():
    text = (ROOT / "docs" / "replication.md").read_text().partition("### The first teacher")[2]
    directory = ROOT / "experiments" / "results" / "worldtree-first"
    for name, split in json.loads((directory / "depths.json").read_text())["splits"].items():
        cells = [f"{depth['teacher']:.4f} ({depth['difference']:+.4f})" for depth in split["depths"].values()]
        assert f"| {name}, {split['queries']} queries | {split['bm25']:.4f} | {' | '.join(cells)} |" in text
    test = json.loads((directory / "teacher-5e-05-seed1.json").read_text())["test"]["nDCG@10"]
    assert f"{statistics.fmean(test):.4f}" == f"{split['depths']['50']['teacher']:.4f}"


def test_the_second_collection_is_reported_as_recorded():
    text = (ROOT / "docs" / "replication.md").read_text().partition("## A second collection")[2].partition("<!--")[0]
    results, words = json.loads((RESULTS / "squad-sentences.json").read_text()), " ".join(text.split())
    records = Records(RESULTS / "squad-sentences", {})
    teacher, bm25 = records.read("teacher-5e-05-seed1"), results["dev"]["nDCG@10"]["BM25"]
    assert f"has {records.dev('teacher-5e-05-seed1'):.4f} on the dev queries, BM25 {bm25:.4f}" in words
    seconds = []
    for run in results["tuned"]:
        if run["chosen"]:
            names = [f"3-384-{run['method']}-{run['learning_rate']:g}-seed{seed}" for seed in (1, 2, 3)]
            tests = [records.read(name).get("test", {}).get("nDCG@10") for name in names]
            dev = ", ".join(f"{records.dev(name):.4f}" for name in names)
            test = ", ".join(f"{statistics.fmean(values):.4f}" if values else "–" for values in tests)
            assert f"| {results['settings']['titles'][run['method']]} | {dev} | {test} |" in text
            seconds += [records.read(name)["seconds"] for name in names]
    assert f"{teacher['seconds']} s for the teacher and {min(seconds)} to {max(seconds)} s for a student" in words
    assert f"({teacher['steps']:,} steps)" in words and "H100" in teacher["machine"]["GPU"]
    assert {len(system["seeds"]["nDCG@10"]) for system in results["systems"] if system["shape"] == "3/384"} == {2}


def test_the_study_of_the_example_is_reported_as_recorded():
    text = (ROOT / "docs" / "replication.md").read_text().partition("## Labels, padding")[2].partition("<!--")[0]
    results, text = json.loads((RESULTS / "example.json").read_text()), text.replace("−", "-")
    means = {system["name"]: statistics.fmean(system["seeds"]["nDCG@10"]) for system in results["systems"]}
    compared = results["comparisons"]["3/192 simplified-masked"]["nDCG@10"]
    for method, title in (("simplified-listwise", "with the listwise loss"), ("without-hard", "without hard labels"),
                          ("simplified", "with the original's padding"), ("simplified-margin", "with the margin loss")):
        found = compared[f"3/192 {method}"]
        low, high = found["interval"]
        p = "< 0.001" if (value := found["holm"]["t-test"]) < 0.001 else f"{value:.3f}"
        difference = f"{found['difference']:+.4f} ({low:+.4f} to {high:+.4f})"
        assert f"| {title} | {means[f'3/192 {method}']:.4f} | {difference} | {p} |" in text
    words = " ".join(text.split())
    assert (f"BM25 has {means['BM25']:.4f}, the teacher {means['teacher']:.4f}, Simplified TinyBERT (padding masked) "
            f"{means['3/192 simplified-masked']:.4f}:") in words
    minus_bm25 = results["comparisons"]["BM25"]["nDCG@10"]
    better = [name for name, found in minus_bm25.items() if found["holm"]["t-test"] < 0.05]
    assert better == ["teacher", "3/192 simplified-masked", "3/192 simplified-listwise"]


def test_a_document_without_the_markers(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"collection": "a", "settings": {"dev_depth": 1}, "tuned": [],
                                                 "curves": [], "dev": {"queries": 1, "nDCG@10": {"BM25": 0.5}}}))
    (tmp_path / "doc.md").write_text("<!-- b -->\n")
    done = run_script("experiments.findings", tmp_path / "a.json", "--output_dir", tmp_path, "--document",
                      tmp_path / "doc.md")
    assert done.returncode == 2 and "doc.md: " in done.stderr and "<!-- a -->" in done.stderr
    (tmp_path / "doc.md").write_text("x\n<!-- a -->\nold\n<!-- end of a -->\ny\n")
    for _ in range(2):
        run_script("experiments.findings", tmp_path / "a.json", "--output_dir", tmp_path, "--document",
                   tmp_path / "doc.md")
    assert re.fullmatch(r"x\n<!-- a -->\n\nOn the 1 dev queries(.|\n)*0\.5000(.|\n)*\n<!-- end of a -->\ny\n",
                        (tmp_path / "doc.md").read_text())


def test_files_that_are_not_results(tmp_path):
    for name, content, part in (("a.json", "{}", "'dev'"), ("b.json", "{", "JSON")):
        (tmp_path / name).write_text(content)
        done = run_script("experiments.findings", tmp_path / name, "--output_dir", tmp_path / "out")
        assert done.returncode == 2 and f"{name}: " in done.stderr and part in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("script", ["replicate", "findings", "cropped_queries"])
def test_help_describes_the_output(script):
    done = run_script(f"experiments.{script}", "--help")
    assert done.returncode == 0 and ("Out, in" in done.stdout or "Out:" in done.stdout)
