"""experiments/: the study from a collection to its tables on made-up words; queries cut out of texts; the documents."""
import hashlib
import importlib
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
from conftest import ROOT, run_script
from hypothesis import given
from hypothesis import strategies as st
from test_collection import write_collection
from test_reliability import SCRIPTS, forked

from experiments import cropped_queries, evaluation, findings, running
from experiments import replicate as replicate_script
from experiments.cropped_queries import examples, sample_texts
from experiments.model_records import Records, rows_of
from experiments.running import Command, run_all
from experiments.settings import divisor_at_least, read_settings
from experiments.study import extension
from simplified_tinybert.common.files import Problems, UserError
from simplified_tinybert.ranking.trec import read_qrels

SUMMARY = ROOT / "experiments" / "results" / "summary.json"
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
    { students = ["half"], methods = ["Simplified TinyBERT"] },
]
[tuning]
epochs = 0.1
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
[titles]
none = "no distillation"
"""


class Forked:
    """In place of subprocess.Popen: a script in a child of this process, which needs no start-up."""

    def __init__(self, words, stdout, **_):
        self.pid, self.returncode = forked(Path(words[1]).stem, words[2:], stdout.name), None

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
def study(golden_models, tmp_path, monkeypatch, run_main):
    """Runs replicate.py in this process on a collection of made-up words; returns the results."""
    monkeypatch.setattr(running, "subprocess", SimpleNamespace(Popen=Forked))
    monkeypatch.setitem(SCRIPTS, "cropped_queries", cropped_queries)
    importlib.import_module("torch.utils.tensorboard")              # once, not in every child
    write_collection(tmp_path / "raw")
    (tmp_path / "small.toml").write_text(SETTINGS)
    (tmp_path / "steps.toml").write_text(STEPS)

    def run(settings, output, *more, model="teacher"):
        run_main(replicate_script, tmp_path / settings, "--collection", tmp_path / "raw", "--output_dir",
                 tmp_path / output, "--device", "cpu", "--bert_model", golden_models[model], *more)
        return json.loads((tmp_path / output / "results.json").read_text())
    return run


def test_the_whole_study(study, tmp_path, run_main):
    out = tmp_path / "out"
    results = study("small.toml", "out", "--until", "dev")
    assert not list((out / "runs").iterdir())                                   # nobody has looked at the test queries
    assert "systems" not in results and len(results["tuned"]) == 4 and len(results["curves"]) == 2
    assert results["curves"][1]["rows"][0]["att_grad"] > 0

    for path in (tmp_path / "raw").iterdir():                   # as a copy of the collection would have it
        os.utime(path)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix in (".safetensors", ".pkl")}
    results = study("small.toml", "out")
    assert before.items() <= {path: path.stat().st_mtime_ns for path in before}.items()
    check_students(results, out)
    check_figures(results, tmp_path)

    tables = (out / "results.md").read_text()
    assert re.search(r"\| TinyBERT +\| +1/24 \|.* ± 0\.\d{4} \|", tables) and "less teacher" in tables
    run_main(findings, out / "results.json", "--output_dir", tmp_path / "again")
    assert (tmp_path / "again" / "results.md").read_text() == tables
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"results.md", "results.png", "results-losses.png"}

    (tmp_path / "small.toml").write_text(SETTINGS.replace("test_depth = 5", "test_depth = 6"))
    with pytest.raises(UserError, match="was begun with other inputs: test_depth was 5, is 6"):
        study("small.toml", "out")
    with open(tmp_path / "raw" / "queries.test.tsv", "a") as queries:
        queries.write("one-more\tquery\n")
    with pytest.raises(UserError, match="was begun with other inputs: queries.test was(.|\n)*pre-trained BERT was"):
        study("small.toml", "out", model="student_4x48")


def check_students(results, out):
    """Every method has as many steps; each student is the one its record tells of."""
    for tuned in results["tuned"]:
        name = f"1-24-{tuned['method'].replace(' ', '-')}-{tuned['learning_rate']:g}-seed1"
        record = json.loads((out / "students" / name / "run.json").read_text())
        assert record["finished"] and record["arguments"]["learning_rate"] == tuned["learning_rate"]
        rows = rows_of(out / "students" / name / "train_loss.jsonl")
        assert rows[-1]["global_step"] == 3                                     # 24 pairs in batches of 8
        assert not list((out / "students" / name).glob("checkpoint-*"))
    for method in ("TinyBERT", "Simplified TinyBERT"):
        found = [tuned for tuned in results["tuned"] if tuned["method"] == method]
        assert max(found, key=lambda each: each["dev"])["dev"] == [each for each in found if each["chosen"]][0]["dev"]


def check_figures(results, directory):
    """Averages as msmarco_mrr_eval.py has them for the same runs."""
    qrels = directory / "raw" / "qrels.test.txt"
    rates = {f"{run['shape']} {run['method']}": run["learning_rate"] for run in results["tuned"] if run["chosen"]}
    for system in results["systems"][1:]:
        name = "teacher" if system["name"] == "teacher" else system["name"].replace("/", "-").replace(" ", "-")
        rate = rates.get(system["name"], 0.001)
        names = [f"{name}-{rate:g}" + seed for seed in (["-seed42"] if name == "teacher" else ["-seed1", "-seed2"])]
        assert len(names) == len(system["seeds"]["nDCG@10"])
        runs = [directory / "out" / "runs" / f"{name}.trec" for name in names]
        for number, run in enumerate(runs):
            told = run_script("msmarco_mrr_eval.py", qrels, run, "--measures", "nDCG@10").stdout
            average = float(re.search(r"nDCG@10\D*(\d\.\d+)", told).group(1))
            assert system["seeds"]["nDCG@10"][number] == pytest.approx(average, abs=2e-6)
    bm25 = evaluation.first_ranking(directory / "out" / "data" / "test.tsv")
    assert {query: list(found) for query, found in bm25.items()} == {
        query: found[:5] for query, found in candidates(directory / "raw" / "bm25.test.txt").items()}
    assert set(results["comparisons"]) == {"BM25", "teacher", "1/24 Simplified TinyBERT"}


def candidates(run):
    found = {}
    for line in run.read_text().splitlines():
        found.setdefault(line.split()[0], []).append(line.split()[2])
    return found


def test_steps_and_records_without_their_models(study, tmp_path, run_main):
    """A study that goes on in another directory, as on another machine, with the records of the first step."""
    records = "--records", tmp_path / "records"
    results = study("steps.toml", "first", *records, "--steps", 1)
    assert [system["name"] for system in results["systems"]] == ["BM25", "teacher", "1/24 none"]
    assert list(results["teacher_seeds"]) == ["3"]
    before = check_tuning(results, tmp_path)

    results = study("steps.toml", "second", *records)
    assert not [path for path in (tmp_path / "second" / "students").iterdir() if "none" in path.name]
    assert {path: path.read_bytes() for path in before} == before                       # the same weights again
    assert [system["method"] for system in results["systems"]] == ["BM25", "teacher", "none", "Simplified TinyBERT"]
    assert list(results["teacher_seeds"]) == ["3", "4"]
    teacher = json.loads((tmp_path / "records" / "teacher-0.001-seed3.json").read_text())
    weights = tmp_path / "second" / "teacher-0.001-seed3" / "best" / "model.safetensors"
    assert teacher["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    student = json.loads((tmp_path / "records" / "2-48-Simplified-TinyBERT-0.001-seed1.json").read_text())
    assert student["made_of"]["teacher"] == teacher["sha256"] and len(student["made_of"]) == 2
    check_summary(results, tmp_path, run_main)

    (tmp_path / "steps.toml").write_text(STEPS.replace("[warm_up]", 'flags = "--weight_decay 0"\n[warm_up]'))
    with pytest.raises(UserError, match="teacher-0.001-seed3.json: was made by another command"):
        study("steps.toml", "second", *records)


def check_tuning(results, directory):
    """Trials saw 0.1 epochs, the student the whole budget; the best rate is inside, or the range was extended."""
    rates = [run["learning_rate"] for run in results["tuned"]]
    best = max(results["tuned"], key=lambda run: run["dev"])
    assert len(rates) in (3, 4) and {0.001, 0.01} < set(rates) and best["chosen"]
    records = sorted((directory / "records").glob("1-24-none-*.json"))
    steps = {path.stem: json.loads(path.read_text())["steps"] for path in records}
    examples = sum(1 for _ in open(directory / "first" / "data" / "train.tsv"))
    trial = max(1, round(0.1 * -(-examples // 8)))
    assert steps.pop(f"1-24-none-{best['learning_rate']:g}-seed1") == 3 > trial
    assert set(steps.values()) == {trial} and len(steps) == len(rates)
    assert max(path.stat().st_size for path in records) < 20000
    return {path: path.read_bytes() for path in (directory / "records").glob("*.json")
            if path.stem not in ("queries", "inputs")}


def check_summary(results, directory, run_main):
    """The form that other programs read; figures as in results.json; the intervals by hand from the records."""
    out = directory / "second" / "results.json"
    run_main(findings, out, "--output_dir", directory / "tables", "--summary", directory / "summary.json")
    assert "no distillation" in (directory / "tables" / "results.md").read_text()
    summary = json.loads((directory / "summary.json").read_text())
    assert list(summary) == ["collections"] and list(summary["collections"]) == ["raw"]
    found = summary["collections"]["raw"]
    assert set(found) == {"queries", "bm25", "teacher", "teacher_seeds", "teacher_minus_bm25", "students"}
    assert [set(student) for student in found["students"]] == 2 * [{
        "method", "shape", "mean", "sd", "retention", "speed_up", "minus_teacher", "minus_bm25"}]
    student, read = found["students"][0], Records(directory / "records", {}).read
    name = next(f"1-24-none-{run['learning_rate']:g}-seed1" for run in results["tuned"] if run["chosen"])
    values, bm25 = read(name)["test"]["nDCG@10"], read("BM25")["test"]["nDCG@10"]
    assert (student["method"], student["shape"], student["sd"]) == ("none", "1/24", None)
    assert found["queries"] == len(values) == len(read("queries")["test"])
    assert student["mean"] == pytest.approx(statistics.fmean(values), abs=1e-5)
    assert student["retention"] == pytest.approx(student["mean"] / found["teacher"], rel=1e-4)
    differences = [mine - theirs for mine, theirs in zip(values, bm25)]
    less = student["minus_bm25"]
    assert less["difference"] == pytest.approx(statistics.fmean(differences), abs=1e-5)
    assert set(less) == {"difference", "low", "high", "p", "p_holm"} and less["p_holm"] >= less["p"]
    assert found["teacher_seeds"]["3"] == pytest.approx(found["teacher"]) and len(found["teacher_seeds"]) == 2
    (directory / "again.json").write_text(out.read_text())
    with pytest.raises(UserError, match="two of the results are of a collection called raw"):
        run_main(findings, out, directory / "again.json", "--output_dir", directory, "--summary", directory / "no.json")
    assert not (directory / "no.json").exists()


@pytest.mark.parametrize(("rates", "best", "expected"), [
    ([5e-5, 1e-4, 2e-4], 1e-4, None), ([5e-5, 1e-4, 2e-4], 5e-5, 2.5e-5), ([5e-5, 1e-4, 2e-4], 2e-4, 4e-4),
    ([2.5e-5, 5e-5, 1e-4, 2e-4], 2.5e-5, 1.25e-5), ([1.25e-5, 2.5e-5, 5e-5, 1e-4, 2e-4], 1.25e-5, None),
    ([2.5e-5, 5e-5, 1e-4, 2e-4], 2e-4, 4e-4), ([5e-5, 1e-4, 2e-4, 4e-4, 8e-4], 8e-4, None)])
def test_learning_rates_beyond_the_edge(rates, best, expected):
    assert extension(rates, best, [5e-5, 1e-4, 2e-4], 2) == expected


def test_one_learning_rate_has_no_edge():
    assert extension([1e-4], 1e-4, [1e-4], 2) is None


def trained(directory, weights):
    """A directory as distill.py leaves it."""
    (directory / "best").mkdir(parents=True)
    (directory / "best" / "model.safetensors").write_bytes(weights)
    (directory / "run.json").write_text(json.dumps({"arguments": {"learning_rate": 0.1, "seed": 7, "train_batch_size": 8},
                                                 "device": "cpu", "versions": {"torch": "2"}}))
    (directory / "dev.jsonl").write_text('{"global_step": 5, "nDCG@10": 0.25}\n{"global_step": 9, "nDCG@10": 0.125}\n')
    (directory / "train_loss.jsonl").write_text('{"global_step": 5, "loss": 0.123456789, "examples_per_second": 4.0}\n'
                                             '{"global_step": 9, "loss": 0.1, "examples_per_second": 2.0}\n')
    return directory


def test_records_of_a_model_that_was_made_twice(tmp_path):
    """By processors of other instruction sets, say: what was tested first counts, the other is told of once."""
    records, words = Records(tmp_path, {"OUT": tmp_path}), ["python", "/x/distill.py", "--out", f"{tmp_path}/a"]
    one, two = trained(tmp_path / "a", b"one"), trained(tmp_path / "b", b"two")
    assert records.keep("a", one, words, {"teacher": two}) and not records.keep("a", one, words, {"teacher": two})
    found = records.read("a")
    assert found["sha256"] == hashlib.sha256(b"one").hexdigest() and found["steps"] == 9
    assert found["made_of"] == {"teacher": hashlib.sha256(b"two").hexdigest()}
    assert found["seconds"] == 5 * 8 / 4 + 4 * 8 / 2 and found["losses"][0]["loss"] == 0.123457
    assert found["command"] == ["distill.py", "--out", "OUT/a"] and records.dev("a") == 0.25
    records.add_test("a", {"AP": {"r": 1 / 3, "q": 1.0}})
    assert records.keep("a", two, words, {}) and not records.keep("a", two, words, {})
    found = records.read("a")
    assert found["sha256"] == hashlib.sha256(b"one").hexdigest() and found["test"] == {"AP": [1.0, 0.333333]}
    assert [other["sha256"] for other in found["also_made"]] == [hashlib.sha256(b"two").hexdigest()]
    assert records.test(["a", "a"], ["AP"]) == ({"AP": [0.6666665] * 2}, {"AP": {"q": 1.0, "r": 0.333333}})
    with pytest.raises(UserError, match="other test queries"):
        records.add_test("b", {"AP": {"s": 1.0}})
    with pytest.raises(UserError, match="a.json: was made by another command"):
        records.read_of("a", [*words, "--more"])


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


def wait_for(condition, patience=120):
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_gone(pid):
    try:
        with open(f"/proc/{pid}/stat") as handle:
            return handle.read().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_what_is_wrong_is_told_at_once(tmp_path):
    write_collection(tmp_path / "raw")
    (tmp_path / "raw" / "qrels.dev.txt").unlink()
    (tmp_path / "small.toml").write_text(SETTINGS.replace('proposed = "Simplified TinyBERT"', 'proposed = "X"'))
    done = run_script("experiments.replicate", tmp_path / "small.toml", "--collection", tmp_path / "raw",
                      "--output_dir", tmp_path / "out", "--bert_model", tmp_path / "none", "--jobs", 0)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "out").exists()
    for complaint in ("proposed = 'X' is none of the methods", "cannot read the qrels.dev", str(tmp_path / "none"),
                      "--jobs 0: expected 1 or more"):
        assert complaint in done.stderr, done.stderr


@pytest.mark.parametrize(("old", "new", "complaint"), [
    ("seeds = [1, 2]", "seeds = []", "seeds is empty"), ("seeds = [1, 2]", "sedes = [1]", "sedes"),
    ("seeds = [1, 2]", "seeds = [1, 1]", "each once"), ("seeds = [1, 2]", "seeds = 3", "wrong kind"),
    ("[warm_up]", "[warm_up", "is not TOML"), ("depth = 0.25", "depth = 25", "shares of the teacher's"),
    ('measures = ["nDCG@10", "RR@10"]', 'measures = ["nDCG@10", "XY"]', "XY"), ("pairs = 30", "pairs = 0", "pairs"),
    ("learning_rates = [1e-3, 1e-2]", "learning_rates = [1e-3, 1e-3]", "each once"),
    ("learning_rates = [1e-3, 1e-2]", "learning_rates = []", "learning_rates"),
    ('flags = "--padding masked"', "flags = 1", "teacher.flags = 1"),
    ('flags = "--padding masked"', 'flags = "--seed 3"', "sets itself (--seed)"),
    ('"--distill_model tinybert"', '"--distill_model=tinybert"', "--distill_model=tinybert"),
    ('"TinyBERT" = ', '"Simplified-TinyBERT" = ', "differ in signs alone"),
    ("seeds = [1, 2]", 'steps = [{ students = ["quarter"], methods = ["X"] }]\nseeds = [1]', "['X']"),
    ("seeds = [1, 2]", 'steps = [{ students = ["quarter"] }]\nseeds = [1]', "steps"),
    ("seeds = [1, 2]", 'steps = [{ student = ["quarter"] }]\nseeds = [1]', "student"),
    ("[teacher]", "[teacher]\nseeds = []", "teacher.seeds = []"), ("extensions = 0", "extensions = -1", "tuning"),
    ("[students]", '[titles]\nx = "y"\n[students]', "['x'] are none of the methods")])
def test_wrong_settings(tmp_path, old, new, complaint):
    problems = Problems()
    (tmp_path / "small.toml").write_text(SETTINGS.replace(old, new))
    read_settings(tmp_path / "small.toml", problems)
    assert problems.count and complaint in " ".join(problems.messages), problems.messages


def test_settings_like_others(tmp_path):
    (tmp_path / "small.toml").write_text(SETTINGS)
    (tmp_path / "other.toml").write_text('like = "small.toml"\nseeds = [7]\n[teacher]\npairs = 99\n')
    plain, other = (read_settings(tmp_path / f"{name}.toml", Problems()) for name in ("small", "other"))
    assert other.seeds == [7] and other.teacher.pairs == 99
    assert other.teacher.flags == plain.teacher.flags and other.methods == plain.methods


def test_the_settings_that_are_there_are_right():
    for path in (ROOT / "experiments").glob("*.toml"):
        problems = Problems()
        assert read_settings(path, problems) and not problems.count, problems.messages


def test_a_command_that_fails_ends_the_others(tmp_path):
    steps = [Command("slow", tmp_path / "a", [sys.executable, "-c", "import time; time.sleep(60)"]),
             Command("bad", tmp_path / "b", [sys.executable, "-c", "print('what went wrong'); raise SystemExit(2)"])]
    with pytest.raises(UserError, match="bad ended with exit code 2(.|\n)*what went wrong"):
        run_all("both", steps, 2, tmp_path)
    steps[1] = Command("done", tmp_path / "c", ["/bin/touch", str(tmp_path / "c")])
    run_all("one", steps[1:], 2, tmp_path)
    changed = (tmp_path / "c").stat().st_mtime_ns
    run_all("one", steps[1:], 2, tmp_path)                                      # is done already
    assert (tmp_path / "c").stat().st_mtime_ns == changed


def test_a_command_waits_until_what_it_needs_is_finished(tmp_path):
    """Not only there: a training goes on after its weights are written."""
    slow = "import pathlib, time; pathlib.Path('a').touch(); time.sleep(1); pathlib.Path('end').touch()"
    quick = "import pathlib; pathlib.Path('b').write_text(str(pathlib.Path('end').exists()))"
    there = f"import os; os.chdir({str(tmp_path)!r}); "
    commands = [Command(name, tmp_path / name, [sys.executable, "-c", there + code], needs)
                for name, code, needs in (("a", slow, []), ("b", quick, [tmp_path / "a"]))]
    run_all("both", commands, 2, tmp_path)
    assert (tmp_path / "b").read_text() == "True"


@given(st.integers(1, 48), st.floats(0.01, 1))
def test_layers_can_be_mapped_evenly(layers, share):
    found = divisor_at_least(layers, share * layers)
    assert layers % found == 0 and found >= share * layers
    assert not any(layers % other == 0 for other in range(1, found) if other >= share * layers)


def test_comparisons_by_hand():
    """Three queries, differences 0.1, 0.2, 0.3: mean 0.2, t(0.975, 2) = 4.3027, standard error 0.1 / sqrt 3."""
    low, high = (0.1, 0.1, 0.1), (0.2, 0.3, 0.4)
    values = {name: {"AP": dict(zip("abc", found))} for name, found in (
        ("BM25", low), ("teacher", high), ("3/4 A", low), ("3/4 B", high))}
    found = evaluation.comparisons(values, {"3/4 A": "3/4", "3/4 B": "3/4"}, ["AP"], "B")
    assert set(found) == {"BM25", "teacher", "3/4 B"} and set(found["3/4 B"]["AP"]) == {"3/4 A"}
    low, high = found["BM25"]["AP"]["teacher"]["interval"]
    assert (low, high) == pytest.approx((0.2 - 4.30265 * 0.1 / 3 ** 0.5, 0.2 + 4.30265 * 0.1 / 3 ** 0.5), rel=1e-5)
    single, corrected = (found["3/4 B"]["AP"]["3/4 A"]["p"]["t-test"], found["BM25"]["AP"]["teacher"]["holm"]["t-test"])
    assert single == pytest.approx(0.07418, abs=1e-5) and corrected == pytest.approx(3 * single)
    assert found["teacher"]["AP"]["3/4 B"]["p"]["t-test"] == 1.0


def test_means_over_seeds(tmp_path):
    (tmp_path / "qrels").write_text("q 0 a 1\nr 0 b 1\n")
    runs = [{query: {"a": score, "b": 1.5} for query in "qr"} for score in (2.0, 1.0)]
    averages, values = evaluation.values_of(read_qrels(tmp_path / "qrels", Problems()), runs, ["RR@10"])
    assert averages == {"RR@10": [0.75, 0.75]} and values == {"RR@10": {"q": 0.75, "r": 0.75}}


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=40), min_size=2, max_size=6),
       st.integers(1, 30))
def test_queries_are_cut_out_of_their_passages(texts, count):
    texts = [" ".join(text) for text in texts]
    found = list(examples(texts, count, Random(1)))
    assert [label for _, _, label in found] == [1, 0] * (count // 2) + [1] * (count % 2)
    for (query, passage, label), (before, _, _) in zip(found, [found[0], *found]):
        assert any(passage in text for text in texts) and len(passage.split()) <= 24
        assert label == 0 and query == before or label == 1 and query in passage and len(query.split()) <= 8


def test_texts_are_drawn_evenly(tmp_path):
    (tmp_path / "docs.tsv").write_text("".join(f"D{number}\tw{number}\n" for number in range(10)))
    counts = dict.fromkeys((f"w{number}" for number in range(10)), 0)
    for seed in range(600):
        for text in sample_texts(tmp_path / "docs.tsv", 3, Random(seed), Problems()):
            counts[text] += 1
    assert sum(counts.values()) == 1800 and all(130 < count < 230 for count in counts.values())


def test_wrong_documents(tmp_path):
    for content, complaint in (("D1\ta b\n", "expected 2 or more"), ("D1\ta\tb\n", "found 3 tab-separated columns")):
        (tmp_path / "docs.tsv").write_text(content)
        done = run_script("experiments.cropped_queries", "--docs", tmp_path / "docs.tsv", "--output",
                          tmp_path / "out.tsv", "--texts", tmp_path / "texts.txt")
        assert done.returncode == 2 and complaint in done.stderr and "Traceback" not in done.stderr
        assert not (tmp_path / "out.tsv").exists()


def test_the_document_has_the_tables_of_the_committed_results(tmp_path):
    """docs/replication.md, to the letter; and its pictures lie beside the results."""
    results = sorted({*(ROOT / "experiments" / "results").glob("*.json")} - {SUMMARY})
    if not results:
        pytest.skip("no study has been committed yet")
    document = tmp_path / "replication.md"
    document.write_bytes((ROOT / "docs" / "replication.md").read_bytes())
    done = run_script("experiments.findings", *results, "--output_dir", tmp_path / "out", "--document", document)
    assert done.returncode == 0, done.stderr
    assert document.read_text() == (ROOT / "docs" / "replication.md").read_text()
    for path in (tmp_path / "out").glob("*.md"):
        assert path.read_text() == (ROOT / "experiments" / "results" / path.name).read_text()


def test_the_summary_is_that_of_the_committed_results(tmp_path):
    if not SUMMARY.exists():
        pytest.skip("no summary has been committed yet")
    results = [SUMMARY.with_name(f"{name}.json") for name in json.loads(SUMMARY.read_text())["collections"]]
    done = run_script("experiments.findings", *results, "--output_dir", tmp_path, "--summary", tmp_path / "x.json")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.json").read_text() == SUMMARY.read_text()


def test_the_findings_are_those_of_the_committed_results():
    """Every figure of four decimals in the text stands in a table too, but for those it calls a log's."""
    text = (ROOT / "docs" / "replication.md").read_text().partition("## NFCorpus")[0].replace("−", "-")
    from_a_log = {"0.3044", "0.3068", "0.3049"}
    tables = "".join(path.read_text() for path in (ROOT / "experiments" / "results").glob("*.md"))
    told = set(re.findall(r"[-+]?0\.\d{4}", text)) - from_a_log
    assert len(told) > 40 and not [figure for figure in told if figure not in tables]
    intervals = re.findall(r"([-+]0\.\d{4}) \(([-+]0\.\d{4} to [-+]0\.\d{4})", text)
    rows = [re.findall(r"[-+]0\.\d{4}(?: to [-+]0\.\d{4})?", line) for line in tables.splitlines()]
    assert len(intervals) > 12 and not [pair for pair in intervals if list(pair) not in rows]


def test_the_commands_of_the_document_are_understood(monkeypatch):
    text = re.sub(r"\s*\\\n\s*", " ", (ROOT / "docs" / "replication.md").read_text())
    lines = re.findall(r"python -m (experiments\.replicate [^\n]*)", text)
    assert len(lines) >= 2
    for line in lines:
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        args = replicate_script.parse_args()
        assert not Problems().count and read_settings(ROOT / args.settings, Problems())


def test_a_document_without_the_marks(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"collection": "a", "settings": {"dev_depth": 1}, "tuned": [],
                                                 "curves": [], "dev": {"queries": 1, "nDCG@10": {"BM25": 0.5}}}))
    (tmp_path / "doc.md").write_text("<!-- b -->\n")
    done = run_script("experiments.findings", tmp_path / "a.json", "--output_dir", tmp_path, "--document",
                      tmp_path / "doc.md")
    assert done.returncode == 2 and "expected the lines <!-- a -->" in done.stderr
    (tmp_path / "doc.md").write_text("x\n<!-- a -->\nold\n<!-- end of a -->\ny\n")
    for _ in range(2):
        run_script("experiments.findings", tmp_path / "a.json", "--output_dir", tmp_path, "--document",
                   tmp_path / "doc.md")
    assert re.fullmatch(r"x\n<!-- a -->\n\nOn the 1 dev queries(.|\n)*0\.5000(.|\n)*\n<!-- end of a -->\ny\n",
                        (tmp_path / "doc.md").read_text())


def test_results_of_something_else(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").write_text("{")
    for name, complaint in (("a", "name a results.json of replicate.py"), ("b", "is not JSON")):
        done = run_script("experiments.findings", tmp_path / f"{name}.json", "--output_dir", tmp_path / "out")
        assert done.returncode == 2 and complaint in done.stderr and "Traceback" not in done.stderr


def test_help_is_there():
    for script in ("replicate", "findings", "cropped_queries"):
        done = run_script(f"experiments.{script}", "--help")
        assert done.returncode == 0 and "Out, in" in done.stdout or "Out:" in done.stdout
