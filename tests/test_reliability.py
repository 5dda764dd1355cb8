"""No data is lost or half-written: runs killed at random moments, full disks, concurrent jobs, readers of noise.

Scripts run in forked children of this process, which start fast, so that many moments can be tried. The number of
trials is printed at the end of the tests.
"""
import gzip
import os
import random
import shutil
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import random_rows, words, write_features
from helpers.scripts import forked
from helpers.training import SHAPE, arguments, dev_set, with_dropout, without_speed
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import convert_to_trec_results
import tokenize_to_features
from simplified_tinybert.common.files import Problems, UserError
from simplified_tinybert.data import features
from simplified_tinybert.data.collection import read_queries, read_rows
from simplified_tinybert.data.documents import open_documents
from simplified_tinybert.model.pretrained import load_cross_encoder
from simplified_tinybert.ranking.trec import read_qrels, read_run


def full_run(script, call, log):
    """Run a script to the end. Returns its time in seconds."""
    start = time.monotonic()
    _, status = os.waitpid(forked(script, call, log), 0)
    assert os.waitstatus_to_exitcode(status) == 0, log.read_text()
    return time.monotonic() - start


def run_with_file_limit(script, call, limit):
    """Run a script whose files may not exceed `limit` bytes. Returns exit code and output."""
    reading, writing = os.pipe()                        # a file would be limited as well
    child = forked(script, call, f"/dev/fd/{writing}", limit)
    os.close(writing)
    with os.fdopen(reading) as handle:
        text = handle.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), text


def run_with_kills(script, call, log, seconds, random, max_kills):
    """Start a script and kill it after a random time of up to `seconds`, until it finishes. Returns the kills.

    After `max_kills` kills it runs to the end.
    """
    for kills in range(max_kills):
        child, end = forked(script, call, log), time.monotonic() + random.uniform(0, seconds)
        while time.monotonic() < end:
            finished, status = os.waitpid(child, os.WNOHANG)
            if finished:
                assert os.waitstatus_to_exitcode(status) == 0, log.read_text()
                return kills
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    full_run(script, call, log)
    return max_kills


def assert_same_files(directory, other, names):
    for name in names:
        assert (directory / name).read_bytes() == (other / name).read_bytes(), name


# Kills at random moments


def check_checkpoints(directory):
    """All checkpoints, and the student if there is one, can be loaded."""
    for checkpoint in directory.glob("checkpoint-*"):
        load_cross_encoder(checkpoint, new_head=torch.Generator())
        assert torch.load(checkpoint / "training_state.pt", weights_only=True)["step"] == int(checkpoint.name[11:])
    if (directory / "model.safetensors").is_file():
        load_cross_encoder(directory, new_head=torch.Generator())


@pytest.mark.parametrize("method, trials", [("tinybert", 2), pytest.param("tinybert", 12, marks=pytest.mark.slow),
                                            pytest.param("simplified", 12, marks=pytest.mark.slow)])
def test_killed_distillations_end_in_the_same_student(golden_models, tmp_path, trial_counts, method, trials):
    file = write_features(tmp_path / "train.pkl", random_rows(60))
    models = golden_models | {"student_2x24": with_dropout(golden_models["student_2x24"], tmp_path / "dropout")}
    more = ("--distill_model", method, "--train_batch_size", 4, "--train_loss_step", 1, "--save_model_step", 3,
            "--keep_checkpoints", 3, "--learning_rate", 1e-3, "--eval_step", 4, *dev_set(tmp_path), "--resume")
    call = {name: arguments(file, models, tmp_path / name, *more) for name in ("whole", "killed")}
    seconds = full_run("distill", call["whole"], tmp_path / "log")
    generator, kills = random.Random(method), 0
    while kills < trials:
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        shutil.rmtree(tmp_path / "cache")               # so that building it is killed, too
        kills += run_with_kills("distill", call["killed"], tmp_path / "log", 0.6 * seconds, generator, trials - kills)
        assert_same_files(tmp_path / "killed", tmp_path / "whole", (
            "model.safetensors", "fit_dense.safetensors", "dev.jsonl", "best/model.safetensors", "config.json"))
        assert without_speed(tmp_path / "killed/train_loss.jsonl") == without_speed(tmp_path / "whole/train_loss.jsonl")
        check_checkpoints(tmp_path / "killed")
        assert not [path.name for path in (tmp_path / "killed").iterdir() if path.name.startswith(".")]
    trial_counts["SIGKILLs of distill.py, same student each time"] += kills


@pytest.mark.parametrize("trials", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_killed_general_distillation_ends_in_the_same_student(golden_models, tmp_path, trial_counts, trials):
    generator = np.random.default_rng(0)
    (tmp_path / "corpus.txt").write_text("".join(words(generator.integers(5, 200, 40)) + "\n" for _ in range(60)))
    (tmp_path / "student.json").write_text(str(SHAPE).replace("'", '"'))
    call = {name: ["--corpus", tmp_path / "corpus.txt", "--teacher_model", golden_models["teacher"], "--student_config",
                   tmp_path / "student.json", "--output_student_dir", tmp_path / name, "--cache_file_dir",
                   tmp_path / f"{name}-cache", "--device", "cpu", "--max_seq_length", 16, "--train_batch_size", 16,
                   "--save_model_step", 3, "--resume"] for name in ("whole", "killed")}
    seconds = full_run("general_distill", call["whole"], tmp_path / "log")
    generator, kills = random.Random(0), 0
    while kills < trials:
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        kills += run_with_kills("general_distill", call["killed"], tmp_path / "log", 0.6 * seconds, generator,
                                trials - kills)
        assert_same_files(tmp_path / "killed", tmp_path / "whole", ("model.safetensors", "fit_dense.safetensors"))
    trial_counts["SIGKILLs of general_distill.py, same student"] += kills


@pytest.mark.parametrize("trials", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_killed_reranking_ends_in_the_same_scores(golden_models, tmp_path, monkeypatch, trial_counts, trials):
    monkeypatch.setattr(features, "CHUNK_EXAMPLES", 40)
    file = write_features(tmp_path / "test.pkl", random_rows(2000), set_name="test")
    call = {name: ["--model_dir", golden_models["teacher"], "--features_file", file, "--output_scores_file",
                   tmp_path / f"{name}.tsv", "--device", "cpu", "--batch_tokens", 200, "--resume"]
            for name in ("whole", "killed")}
    seconds = full_run("reranker", call["whole"], tmp_path / "log")
    generator, kills = random.Random(0), 0
    while kills < trials:
        (tmp_path / "killed.tsv").unlink(missing_ok=True)
        kills += run_with_kills("reranker", call["killed"], tmp_path / "log", 0.5 * seconds, generator, trials - kills)
        assert_same_files(tmp_path / "killed.tsv", tmp_path / "whole.tsv", ("",))
        assert not (tmp_path / "killed.tsv.partial").exists()
    trial_counts["SIGKILLs of reranker.py, same scores"] += kills


@pytest.fixture
def raw(tmp_path):
    """Pairs and a collection of documents that take a script a few tenths of a second."""
    random = np.random.default_rng(0)
    (tmp_path / "pairs.tsv").write_text("".join(f"q{number}#D1_0\t{words(random.integers(5, 200, 5))}\t"
                                                f"{words(random.integers(5, 200, 30))}\n" for number in range(5000)))
    (tmp_path / "docs.tsv.gz").write_bytes(gzip.compress("".join(
        f"D{number}\tu\tt\t{words(random.integers(5, 200, 60))}\n" for number in range(2000)).encode()))
    (tmp_path / "queries.tsv").write_text("".join(f"q{number}\tw7 w8\n" for number in range(300)))
    (tmp_path / "run.txt").write_text("".join(f"q{query} Q0 D{(query * 7 + place) % 2000} {place} {-place} t\n"
                                              for query in range(300) for place in range(1, 9)))
    (tmp_path / "scores.tsv").write_text("".join(f"q{number // 10}\tD{number}_0\t{number / 7}\n"
                                                 for number in range(20000)))
    return tmp_path


def call_of(script, raw, models, output):
    return {"tokenize_to_features": ["--set_name", "test", "--raw_data_file", raw / "pairs.tsv",
                                     "--output_features_file", output, "--bert_model_dir", models["teacher"],
                                     "--max_seq_length", 32, "--num_workers", 1],
            "prepare_examples": ["test", "--docs", raw / "docs.tsv.gz", "--queries", raw / "queries.tsv",
                                 "--candidates", raw / "run.txt", "--output", output, "--window", 20, "--stride", 10,
                                 "--cache_file_dir", raw / "cache"],
            "convert_to_trec_results": ["--scores_file", raw / "scores.tsv", "--output_results_file", output]}[script]


@pytest.mark.parametrize("trials", [2, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("script", ["tokenize_to_features", "prepare_examples", "convert_to_trec_results"])
def test_killed_writers_leave_the_old_file_or_the_new_one(golden_models, raw, trial_counts, script, trials):
    output = raw / "output"
    seconds = full_run(script, call_of(script, raw, golden_models, output), raw / "log")
    new, generator, kills = output.read_bytes(), random.Random(script), 0
    for _ in range(trials):
        output.write_bytes(b"old")
        shutil.rmtree(raw / "cache", ignore_errors=True)
        child = forked(script, call_of(script, raw, golden_models, output), raw / "log")
        time.sleep(generator.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        assert output.read_bytes() in (b"old", new)
        full_run(script, call_of(script, raw, golden_models, output), raw / "log")     # in spite of leftovers
        assert output.read_bytes() == new
    trial_counts["SIGKILLs of the other writers, old file or complete new one"] += kills


# Full disks


@pytest.mark.parametrize("limit", [0, 200, 2000])
@pytest.mark.parametrize("script", ["general_distill", "report"])
def test_a_full_disk_leaves_no_finished_directory(golden_models, tmp_path, trial_counts, script, limit):
    """The error names a file. The output directory holds no unfinished file, and no file that marks it as finished."""
    (tmp_path / "corpus.txt").write_text("w7 w8 w9\n" * 50)
    # With this many queries, report.json exceeds each limit
    (tmp_path / "qrels.txt").write_text("".join(f"q{number} 0 D1 1\n" for number in range(300)))
    (tmp_path / "run.trec").write_text("".join(f"q{number} Q0 D1 1 2 t\n" for number in range(300)))
    output = tmp_path / "output"
    call = {"general_distill": ["--corpus", tmp_path / "corpus.txt", "--teacher_model", golden_models["teacher"],
                                "--student_layers", 2, "--output_student_dir", output, "--device", "cpu",
                                "--max_seq_length", 16, "--cache_file_dir", tmp_path / "cache"],
            "report": ["--qrels", tmp_path / "qrels.txt", "--system", "one", tmp_path / "run.trec", "--teacher", "one",
                       "--output_dir", output]}[script]
    code, text = run_with_file_limit(script, call, limit)
    assert code == 2 and "Traceback" not in text and str(tmp_path) in text, text
    assert not (output / "model.safetensors").exists() and not (output / "report.json").exists()
    assert not [path for path in tmp_path.rglob("*.tmp")]
    trial_counts["writers on a full disk, no unfinished file"] += 1


@pytest.mark.parametrize("limit", [0, 1000, 20000])
@pytest.mark.parametrize("script", ["tokenize_to_features", "prepare_examples", "convert_to_trec_results"])
def test_a_full_disk_keeps_the_old_file(golden_models, raw, trial_counts, script, limit):
    output = raw / "output"
    output.write_bytes(b"old")
    (raw / "log").write_bytes(b"")
    before = sorted(os.listdir(raw))
    _, status = os.waitpid(forked(script, call_of(script, raw, golden_models, output), "/dev/null", limit), 0)
    assert os.waitstatus_to_exitcode(status) == 2
    assert output.read_bytes() == b"old" and [name for name in sorted(os.listdir(raw)) if name != "cache"] == before
    trial_counts["writers on a full disk, no unfinished file"] += 1


@pytest.mark.parametrize("limit", [3000, 200000, *(pytest.param(size, marks=pytest.mark.slow) for size in (0, 60000))])
def test_a_full_disk_while_training_and_scoring(golden_models, tmp_path, trial_counts, limit):
    """The runs stop with an error. With enough space, --resume gives the same results as an undisturbed run."""
    file = write_features(tmp_path / "train.pkl", random_rows(60))
    more = ("--train_batch_size", 4, "--save_model_step", 5, "--train_loss_step", 1, "--resume")
    calls = {"distill": arguments(file, golden_models, tmp_path / "out", *more),
             "reranker": ["--model_dir", golden_models["teacher"], "--features_file", file, "--output_scores_file",
                          tmp_path / "scores.tsv", "--device", "cpu", "--resume"]}
    shutil.copyfile(write_features(tmp_path / "test.pkl", random_rows(3000), set_name="test"), file.with_name("t.pkl"))
    calls["reranker"][3] = tmp_path / "t.pkl"
    for script, call in calls.items():
        code, text = run_with_file_limit(script, call, limit)
        if code == 0:                                   # the limit was large enough
            continue
        assert code == 2 and "Traceback" not in text, text
        assert "File too large" in text and str(tmp_path) in text
        trial_counts["runs on a full disk, stopped with an error"] += 1
        full_run(script, call, tmp_path / "log")
    full_run("distill", arguments(file, golden_models, tmp_path / "other", *more), tmp_path / "log")
    assert_same_files(tmp_path / "out", tmp_path / "other", ("model.safetensors", "fit_dense.safetensors"))


def test_a_directory_without_write_permission(golden_models, raw):
    locked = raw / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):
        pytest.skip("this user can write everywhere")
    for script in ("tokenize_to_features", "prepare_examples", "convert_to_trec_results"):
        _, status = os.waitpid(forked(script, call_of(script, raw, golden_models, locked / "out"), raw / "log"), 0)
        assert os.waitstatus_to_exitcode(status) == 2
    assert not list(locked.iterdir())


# Concurrent jobs


def test_jobs_that_share_a_cache(golden_models, tmp_path, trial_counts):
    file = write_features(tmp_path / "train.pkl", random_rows(60))
    calls = {name: arguments(file, golden_models, tmp_path / name, "--train_batch_size", 8) for name in "abcd"}
    children = [forked("distill", call, tmp_path / f"log-{name}") for name, call in calls.items()]
    for name, child in zip(calls, children):
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0, (tmp_path / f"log-{name}").read_text()
        assert_same_files(tmp_path / name, tmp_path / "a", ("model.safetensors",))
    assert len(list((tmp_path / "cache").iterdir())) == 1
    trial_counts["concurrent jobs with the same cache"] += 4


# Readers of noise

FIELD = st.one_of(st.text(max_size=20), st.sampled_from(
    ["\t", " ", "#", "_", "q1", "D1", "D1_0", "Q0", "0", "1", "-1", "1e400", "nan", "\u202e", "\u2028", "\x00", "\x85",
     "é", "\ufeff", "q1#D1_0", "w7 w8", "9" * 400, "x" * 5000]))
LINE = st.one_of(
    st.lists(FIELD, max_size=8).map("\t".join).map(partial(str.encode, errors="surrogatepass")),
    st.lists(FIELD, max_size=8).map(" ".join).map(partial(str.encode, errors="surrogatepass")), st.binary(max_size=40),
    st.builds("q{} Q0 D{} 1 {} t".format, st.integers(0, 3), st.integers(0, 99), st.floats(-9, 9)).map(str.encode),
    st.builds("q{} 0 D{} {}".format, st.integers(0, 3), st.integers(0, 99), st.integers(0, 3)).map(str.encode),
    st.builds("q{}\tD{}_{}\t{}".format, st.integers(0, 3), st.integers(0, 9), st.integers(0, 9),
              st.floats(-9, 9)).map(str.encode),
    st.builds("D{}\tu\tt\tw7 w{}".format, st.integers(0, 99), st.integers(5, 99)).map(str.encode),
    st.builds("q{}#D{}_0\tw7\tw8".format, st.integers(0, 9), st.integers(0, 9)).map(str.encode),
    st.builds("{}\tw7\tw8 w9\t{}".format, st.integers(0, 99), st.integers(0, 1)).map(str.encode))
NOISE = st.lists(LINE.map(lambda line: line.replace(b"\n", b" ")), min_size=1, max_size=12)


def count_run(path, problems):
    return sum(map(len, read_run(path, problems).values()))


def count_qrels(path, problems):
    return sum(map(len, read_qrels(path, problems).values()))


def count_documents(path, problems):
    documents = open_documents(path, path.with_name("cache"), problems)
    return len(documents) if documents else 0


READERS = {"run": count_run, "qrels": count_qrels, "documents": count_documents,
           "queries": lambda path, problems: len(read_queries(path, problems)),
           "candidates": lambda path, problems: len(list(read_rows(path, problems))),
           "scores": lambda path, problems: len(list(convert_to_trec_results.read_scores(path, problems))),
           "examples": lambda path, problems: tokenize_to_features.check_pairs(path, "train", problems),
           "pairs": lambda path, problems: tokenize_to_features.check_pairs(path, "test", problems)}


@pytest.mark.parametrize("reader", READERS)
def test_readers_of_noise_drop_no_line_silently(tmp_path, trial_counts, reader):
    """Each line is read or reported, or the file is refused as damaged. No exception but UserError is raised."""
    @settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
    @given(lines=NOISE, packed=st.booleans(), end=st.sampled_from([b"\n", b"\r\n"]))
    @example(lines=[b"\x1f\x8b", b""], packed=False, end=b"\n")
    def check(lines, packed, end):
        content, path, problems = end.join(lines) + end, tmp_path / "noise", Problems()
        path.write_bytes(gzip.compress(content) if packed else content)
        trial_counts[f"noisy inputs to the reader of {reader}"] += 1
        try:
            read = READERS[reader](path, problems)
        except UserError:
            return
        assert problems.count or read == len(lines)
        assert read <= len(lines)
        refused = any(message.startswith(f"{path}: ") or "gzip file" in message for message in problems.messages)
        if reader in ("run", "qrels", "queries") and not refused:      # as a damaged .gz, or as UTF-16
            assert read + problems.count >= len(lines)
    check()
