"""Parts of a study: settings, commands, records, learning rates, cropped queries."""
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from random import Random
from types import SimpleNamespace

import pytest
from conftest import ROOT, run_script
from helpers.collection import write_collection
from helpers.study import SETTINGS
from hypothesis import given
from hypothesis import strategies as st

from experiments import evaluation
from experiments.commands import Commands
from experiments.cropped_queries import examples, sample_texts
from experiments.model_records import Records, weights_sha256
from experiments.running import Command, comparable, run_all
from experiments.settings import Training, divisor_at_least, read_settings
from experiments.study import Study, extension
from simplified_tinybert.checks.collection_directory import check_collection, find_files, keep_inputs
from simplified_tinybert.common.files import Problems, UserError
from simplified_tinybert.common.workers import available_cores
from simplified_tinybert.ranking.trec import read_qrels


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
    code = f"import sys; from pathlib import Path; from experiments.running import Command, comparable, run_all; " \
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


@pytest.mark.parametrize("split", ["train", "test"])
def test_judgements_and_candidates_with_different_ids_are_refused(tmp_path, split):
    """All measures would be 0."""
    write_collection(tmp_path / "raw")
    qrels = tmp_path / "raw" / f"qrels.{split}.txt"
    qrels.write_text(re.sub(r" 0 ", " 0 msmarco_", qrels.read_text()))
    problems = Problems()
    check_collection(find_files(tmp_path / "raw", problems), tmp_path / "data", problems)
    message, = problems.messages
    assert message.startswith(f"{qrels.parent / f'bm25.{split}.txt'}: none of the relevant documents in {qrels}")


def test_a_student_as_large_as_its_teacher_is_refused(tmp_path, golden_models):
    """With a teacher of 2 layers, three quarters of the depth are both layers."""
    write_collection(tmp_path / "raw")
    text = re.sub(r"depth = [\d.]+, width = [\d.]+", "depth = 0.75, width = 1.0", SETTINGS)
    (tmp_path / "small.toml").write_text(text.replace("max_seq_length = ", "max_seq_length = 9"))
    command = ["experiments.replicate", tmp_path / "small.toml", "--collection", tmp_path / "raw", "--output_dir",
               tmp_path / "out", "--device", "cpu", "--bert_model", golden_models["student_2x24"]]
    done = run_script(*command)
    assert done.returncode == 2 and "positions; lower max_seq_length in the settings" in done.stderr, done.stderr
    (tmp_path / "small.toml").write_text(text)
    done = run_script(*command)
    assert done.returncode == 2 and "would have the teacher's shape, 2/24" in done.stderr, done.stderr
    assert not (tmp_path / "out" / "data").exists()


def test_inputs_are_fixed_once_something_is_made(tmp_path):
    path = tmp_path / "inputs.json"
    keep_inputs(path, {"docs": 1}, made=False)
    keep_inputs(path, {"docs": 2}, made=False)                  # for example after mending the documents
    keep_inputs(path, {"docs": 2, "dev_queries": None}, made=True)
    with pytest.raises(UserError, match="dev_queries was None, is 5"):
        keep_inputs(path, {"docs": 2, "dev_queries": 5}, made=True)
    with pytest.raises(UserError, match="docs was 2, is 3"):
        keep_inputs(path, {"docs": 3}, made=True)
    with pytest.raises(UserError, match="has no other.json"):
        keep_inputs(tmp_path / "other.json", {"docs": 2}, made=True)


def test_a_recorded_general_student_keeps_its_settings(tmp_path, golden_models):
    """Otherwise, students of two general students would be compared."""
    (tmp_path / "small.toml").write_text(SETTINGS)
    settings = read_settings(tmp_path / "small.toml", Problems())
    args = SimpleNamespace(settings=tmp_path / "small.toml", output_dir=tmp_path, records=tmp_path / "records",
                           collection=tmp_path, bert_model=golden_models["teacher"], teacher_model=None, device="cpu")
    study = Study(args, settings, {"qrels.dev": tmp_path / "qrels"})
    study.commands.segments = lambda texts: 30
    study.commands.counts["warm_up"] = 24
    size, = study.sizes.values()
    general, _ = study.general_commands(size)
    for command in (general, study.warm_up_command()):
        (tmp_path / "records").mkdir(exist_ok=True)
        study.records.write(command.name, {"command": comparable(command.words, study.records.named_paths)})
    study.check_starts([size])
    for part, name, value in ((study.shapes[size], "general_learning_rate", 2e-2),
                              (study.settings.general, "pairs", 20), (study.settings.warm_up, "flags", "--seed 1")):
        before = getattr(part, name)
        setattr(part, name, value)
        with pytest.raises(UserError, match="was made by another command"):
            study.check_starts([size])
        setattr(part, name, before)
    study.check_starts([size])


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


def test_commands_wait_only_for_models_that_the_study_makes(tmp_path):
    (tmp_path / "small.toml").write_text(SETTINGS)
    args = SimpleNamespace(output_dir=tmp_path, teacher_model=tmp_path / "given", bert_model=tmp_path / "bert")
    commands = Commands(args, read_settings(tmp_path / "small.toml", Problems()), {})
    assert commands.own_weights(tmp_path / "bert") == commands.own_weights(tmp_path / "given") == []
    assert commands.own_weights(tmp_path / "general") == [tmp_path / "general" / "model.safetensors"]


def test_the_error_of_a_command_has_only_the_lines_of_its_last_run(tmp_path):
    for message in ("the first reason", "the second reason"):
        command = Command("a", tmp_path / "a", [sys.executable, "-c", f"import sys; sys.exit({message!r})"])
        with pytest.raises(UserError, match=message) as error:
            run_all("one", [command], 1, tmp_path)
    assert "the first reason" not in str(error.value).partition("\n")[2]


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
    ("dev_depth = ", "dev_depth = 0.", "expected a whole number"),
    ("learning_rates = [1e-3, 1e-2]", "learning_rates = [nan]", "quarter: learning_rates = [nan]"),
    ('flags = "--padding masked"', 'flags = "--learn 3"', "teacher.flags = '--learn 3'"),
    ("[students]", 'like = 1\n[students]', "wrong type"), ("[teacher]", "[[teacher]]", "wrong type"),
    ("seeds = [1, 2]", 'seeds = [1, 2]\nlike = "small.toml"', "`like` leads back to this file"),
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


def test_a_missing_file_of_settings_is_named(tmp_path):
    problems = Problems()
    (tmp_path / "small.toml").write_text('like = "none.toml"\n')
    read_settings(tmp_path / "small.toml", problems)
    assert problems.messages == [f"{tmp_path / 'none.toml'}: cannot read the settings: No such file or directory"]


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
