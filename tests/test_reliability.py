"""Nothing lost, nothing half-written: runs killed at random moments, full disks, jobs side by side, readers of noise.

Scripts run in forked children of this process, which need no start-up, so that many moments can be tried. What was
tried is counted and printed at the end of the tests.
"""
import gzip
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import random_rows, words, write_features
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_distill import arguments, with_dropout
from test_general_distill import SHAPE
from test_stages import dev_set, without_speed
from tqdm import tqdm

import convert_to_trec_results
import distill
import general_distill
import prepare_examples
import report
import reranker
import tokenize_to_features
from simplified_tinybert.common.files import Problems, UserError, run_main
from simplified_tinybert.data import features
from simplified_tinybert.data.collection import read_queries, read_rows
from simplified_tinybert.data.documents import open_documents
from simplified_tinybert.model.pretrained import load_cross_encoder
from simplified_tinybert.ranking.trec import read_qrels, read_run

SCRIPTS = {module.__name__: module for module in (convert_to_trec_results, distill, general_distill, prepare_examples,
                                                  report, reranker, tokenize_to_features)}


def forked(script, call, log, file_limit=None):
    """Process id of a child that runs a script's main, its words in `log`; no file may exceed `file_limit` bytes."""
    child = os.fork()
    if child:
        return child
    code = 70                                           # of an exception that nobody caught: its words are in the log
    try:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the threads of the tokenizers library do not survive a fork
        tqdm.set_lock(threading.RLock())                # its own one is shared with other children, who die holding it
        words_file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(words_file, 1)
        os.dup2(words_file, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        sys.argv = [f"{script}.py", *map(str, call)]
        run_main(SCRIPTS[script].main)
        code = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException as error:
        print(f"uncaught: {error!r}", file=sys.stderr)
    finally:
        os._exit(code)


def whole_run(script, call, log):
    """Run to the end. Returns its seconds."""
    start = time.monotonic()
    _, status = os.waitpid(forked(script, call, log), 0)
    assert os.waitstatus_to_exitcode(status) == 0, log.read_text()
    return time.monotonic() - start


def with_little_room(script, call, limit):
    """Exit code and words of a run none of whose files may exceed `limit` bytes."""
    reading, writing = os.pipe()                        # not a file, which would be cut as well
    child = forked(script, call, f"/dev/fd/{writing}", limit)
    os.close(writing)
    with os.fdopen(reading) as told:
        text = told.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), text


def killed_runs(script, call, log, seconds, chance, most):
    """Start again and again, killed after a random time of up to `seconds`; then to the end. Returns the kills."""
    for kills in range(most):
        child, end = forked(script, call, log), time.monotonic() + chance.uniform(0, seconds)
        while time.monotonic() < end:
            finished, status = os.waitpid(child, os.WNOHANG)
            if finished:
                assert os.waitstatus_to_exitcode(status) == 0, log.read_text()
                return kills
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    whole_run(script, call, log)
    return most


def same_files(directory, other, names):
    for name in names:
        assert (directory / name).read_bytes() == (other / name).read_bytes(), name


# Killed at random moments


def check_whole_checkpoints(directory):
    for checkpoint in directory.glob("checkpoint-*"):
        load_cross_encoder(checkpoint, new_head=torch.Generator())
        assert torch.load(checkpoint / "training_state.pt", weights_only=True)["step"] == int(checkpoint.name[11:])
    if (directory / "model.safetensors").is_file():
        load_cross_encoder(directory, new_head=torch.Generator())


@pytest.mark.parametrize("method", ["tinybert", "simplified"])
def test_killed_distillations_end_in_the_same_student(golden_models, tmp_path, figures, method):
    file = write_features(tmp_path / "train.pkl", random_rows(60))
    models = golden_models | {"student_2x24": with_dropout(golden_models["student_2x24"], tmp_path / "dropout")}
    more = ("--distill_model", method, "--train_batch_size", 4, "--train_loss_step", 1, "--save_model_step", 3,
            "--keep_checkpoints", 3, "--learning_rate", 1e-3, "--eval_step", 4, *dev_set(tmp_path), "--resume")
    call = {name: arguments(file, models, tmp_path / name, *more) for name in ("whole", "killed")}
    seconds = whole_run("distill", call["whole"], tmp_path / "log")
    chance, kills = random.Random(method), 0
    while kills < 12:
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        shutil.rmtree(tmp_path / "cache")               # also built anew, and killed in the middle
        kills += killed_runs("distill", call["killed"], tmp_path / "log", 0.6 * seconds, chance, 12 - kills)
        same_files(tmp_path / "killed", tmp_path / "whole", ("model.safetensors", "fit_dense.safetensors", "dev.jsonl",
                                                             "best/model.safetensors", "config.json"))
        assert without_speed(tmp_path / "killed/train_loss.jsonl") == without_speed(tmp_path / "whole/train_loss.jsonl")
        check_whole_checkpoints(tmp_path / "killed")
        assert not [path.name for path in (tmp_path / "killed").iterdir() if path.name.startswith(".")]
    figures["SIGKILLs of distill.py, same student each time"] += kills


def test_killed_general_distillation_ends_in_the_same_student(golden_models, tmp_path, figures):
    chance = np.random.default_rng(0)
    (tmp_path / "corpus.txt").write_text("".join(words(chance.integers(5, 200, 40)) + "\n" for _ in range(60)))
    (tmp_path / "student.json").write_text(str(SHAPE).replace("'", '"'))
    call = {name: ["--corpus", tmp_path / "corpus.txt", "--teacher_model", golden_models["teacher"], "--student_config",
                   tmp_path / "student.json", "--output_student_dir", tmp_path / name, "--cache_file_dir",
                   tmp_path / f"{name}-cache", "--device", "cpu", "--max_seq_length", 16, "--train_batch_size", 16,
                   "--save_model_step", 3, "--resume"] for name in ("whole", "killed")}
    seconds = whole_run("general_distill", call["whole"], tmp_path / "log")
    chance, kills = random.Random(0), 0
    while kills < 6:
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        kills += killed_runs("general_distill", call["killed"], tmp_path / "log", 0.6 * seconds, chance, 6 - kills)
        same_files(tmp_path / "killed", tmp_path / "whole", ("model.safetensors", "fit_dense.safetensors"))
    figures["SIGKILLs of general_distill.py, same student"] += kills


def test_killed_reranking_ends_in_the_same_scores(golden_models, tmp_path, monkeypatch, figures):
    monkeypatch.setattr(features, "CHUNK_EXAMPLES", 40)
    file = write_features(tmp_path / "test.pkl", random_rows(2000), set_name="test")
    call = {name: ["--model_dir", golden_models["teacher"], "--features_file", file, "--output_scores_file",
                   tmp_path / f"{name}.tsv", "--device", "cpu", "--batch_tokens", 200, "--resume"]
            for name in ("whole", "killed")}
    seconds = whole_run("reranker", call["whole"], tmp_path / "log")
    chance, kills = random.Random(0), 0
    while kills < 12:
        (tmp_path / "killed.tsv").unlink(missing_ok=True)
        kills += killed_runs("reranker", call["killed"], tmp_path / "log", 0.5 * seconds, chance, 12 - kills)
        same_files(tmp_path / "killed.tsv", tmp_path / "whole.tsv", ("",))
        assert not (tmp_path / "killed.tsv.partial").exists()
    figures["SIGKILLs of reranker.py, same scores"] += kills


@pytest.fixture
def raw(tmp_path):
    """Pairs, and a collection of documents, enough for a few tenths of a second."""
    chance = np.random.default_rng(0)
    (tmp_path / "pairs.tsv").write_text("".join(f"q{number}#D1_0\t{words(chance.integers(5, 200, 5))}\t"
                                                f"{words(chance.integers(5, 200, 30))}\n" for number in range(5000)))
    (tmp_path / "docs.tsv.gz").write_bytes(gzip.compress("".join(
        f"D{number}\tu\tt\t{words(chance.integers(5, 200, 60))}\n" for number in range(2000)).encode()))
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


@pytest.mark.parametrize("script", ["tokenize_to_features", "prepare_examples", "convert_to_trec_results"])
def test_killed_writers_leave_the_old_file_or_the_new_one(golden_models, raw, figures, script):
    output = raw / "output"
    seconds = whole_run(script, call_of(script, raw, golden_models, output), raw / "log")
    new, chance, kills = output.read_bytes(), random.Random(script), 0
    for _ in range(8):
        output.write_bytes(b"old")
        shutil.rmtree(raw / "cache", ignore_errors=True)
        child = forked(script, call_of(script, raw, golden_models, output), raw / "log")
        time.sleep(chance.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        assert output.read_bytes() in (b"old", new)
        whole_run(script, call_of(script, raw, golden_models, output), raw / "log")     # whatever the killed one left
        assert output.read_bytes() == new
    figures["SIGKILLs of the other writers, old file or whole new one"] += kills


# Full disks


@pytest.mark.parametrize("limit", [0, 200, 2000])
@pytest.mark.parametrize("script", ["general_distill", "report"])
def test_a_full_disk_leaves_no_half_directory(golden_models, tmp_path, figures, script, limit):
    """What a directory holds is whole, and nothing in it says that it is finished."""
    (tmp_path / "corpus.txt").write_text("w7 w8 w9\n" * 50)
    # So many queries make report.json longer than any limit, however short the paths are that it names
    (tmp_path / "qrels.txt").write_text("".join(f"q{number} 0 D1 1\n" for number in range(300)))
    (tmp_path / "run.trec").write_text("".join(f"q{number} Q0 D1 1 2 t\n" for number in range(300)))
    output = tmp_path / "output"
    call = {"general_distill": ["--corpus", tmp_path / "corpus.txt", "--teacher_model", golden_models["teacher"],
                                "--student_layers", 2, "--output_student_dir", output, "--device", "cpu",
                                "--max_seq_length", 16, "--cache_file_dir", tmp_path / "cache"],
            "report": ["--qrels", tmp_path / "qrels.txt", "--system", "one", tmp_path / "run.trec", "--teacher", "one",
                       "--output_dir", output]}[script]
    code, text = with_little_room(script, call, limit)
    assert code == 2 and "Traceback" not in text and str(tmp_path) in text, text
    assert not (output / "model.safetensors").exists() and not (output / "report.json").exists()
    assert not [path for path in tmp_path.rglob("*.tmp")]
    figures["writers on a full disk, nothing half-written"] += 1


@pytest.mark.parametrize("limit", [0, 1000, 20000])
@pytest.mark.parametrize("script", ["tokenize_to_features", "prepare_examples", "convert_to_trec_results"])
def test_a_full_disk_is_one_message_and_keeps_the_old_file(golden_models, raw, figures, script, limit):
    output = raw / "output"
    output.write_bytes(b"old")
    (raw / "log").write_bytes(b"")
    before = sorted(os.listdir(raw))
    _, status = os.waitpid(forked(script, call_of(script, raw, golden_models, output), "/dev/null", limit), 0)
    assert os.waitstatus_to_exitcode(status) == 2
    assert output.read_bytes() == b"old" and [name for name in sorted(os.listdir(raw)) if name != "cache"] == before
    figures["writers on a full disk, nothing half-written"] += 1


@pytest.mark.parametrize("limit", [0, 3000, 60000, 200000])
def test_a_full_disk_while_training_and_scoring(golden_models, tmp_path, figures, limit):
    """The runs end with one message; with room again, --resume ends in what an undisturbed run gives."""
    file = write_features(tmp_path / "train.pkl", random_rows(60))
    more = ("--train_batch_size", 4, "--save_model_step", 5, "--train_loss_step", 1, "--resume")
    calls = {"distill": arguments(file, golden_models, tmp_path / "out", *more),
             "reranker": ["--model_dir", golden_models["teacher"], "--features_file", file, "--output_scores_file",
                          tmp_path / "scores.tsv", "--device", "cpu", "--resume"]}
    shutil.copyfile(write_features(tmp_path / "test.pkl", random_rows(3000), set_name="test"), file.with_name("t.pkl"))
    calls["reranker"][3] = tmp_path / "t.pkl"
    for script, call in calls.items():
        code, text = with_little_room(script, call, limit)
        if code == 0:                                   # enough room for this one
            continue
        assert code == 2 and "Traceback" not in text, text
        assert "File too large" in text and str(tmp_path) in text
        figures["runs on a full disk, ended by a message"] += 1
        whole_run(script, call, tmp_path / "log")
    whole_run("distill", arguments(file, golden_models, tmp_path / "other", *more), tmp_path / "log")
    same_files(tmp_path / "out", tmp_path / "other", ("model.safetensors", "fit_dense.safetensors"))


def test_a_directory_that_cannot_be_written(golden_models, raw):
    locked = raw / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):
        pytest.skip("this user may write everywhere")
    for script in ("tokenize_to_features", "prepare_examples", "convert_to_trec_results"):
        _, status = os.waitpid(forked(script, call_of(script, raw, golden_models, locked / "out"), raw / "log"), 0)
        assert os.waitstatus_to_exitcode(status) == 2
    assert not list(locked.iterdir())


# Side by side


def test_jobs_that_share_a_cache(golden_models, tmp_path, figures):
    file = write_features(tmp_path / "train.pkl", random_rows(60))
    calls = {name: arguments(file, golden_models, tmp_path / name, "--train_batch_size", 8) for name in "abcd"}
    children = [forked("distill", call, tmp_path / f"log-{name}") for name, call in calls.items()]
    for name, child in zip(calls, children):
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0, (tmp_path / f"log-{name}").read_text()
        same_files(tmp_path / name, tmp_path / "a", ("model.safetensors",))
    assert len(list((tmp_path / "cache").iterdir())) == 1
    figures["jobs at once on one cache"] += 4


# Readers of noise

ODD = st.one_of(st.text(max_size=20), st.sampled_from(
    ["\t", " ", "#", "_", "q1", "D1", "D1_0", "Q0", "0", "1", "-1", "1e400", "nan", "\u202e", "\u2028", "\x00", "\x85",
     "é", "\ufeff", "q1#D1_0", "w7 w8", "9" * 400, "x" * 5000]))
LINE = st.one_of(
    st.lists(ODD, max_size=8).map("\t".join).map(partial(str.encode, errors="surrogatepass")),
    st.lists(ODD, max_size=8).map(" ".join).map(partial(str.encode, errors="surrogatepass")), st.binary(max_size=40),
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
def test_readers_of_noise_lose_nothing_in_silence(tmp_path, figures, reader):
    """Each line is either read or complained of, or the file as a whole as a damaged .gz; only UserError is raised."""
    @settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
    @given(lines=NOISE, packed=st.booleans(), end=st.sampled_from([b"\n", b"\r\n"]))
    @example(lines=[b"\x1f\x8b", b""], packed=False, end=b"\n")
    def check(lines, packed, end):
        content, path, problems = end.join(lines) + end, tmp_path / "noise", Problems()
        path.write_bytes(gzip.compress(content) if packed else content)
        figures[f"noisy inputs to the reader of {reader}"] += 1
        try:
            read = READERS[reader](path, problems)
        except UserError:
            return
        assert problems.count or read == len(lines)
        assert read <= len(lines)
        whole = any(message.startswith(f"{path}: ") or "gzip file" in message for message in problems.messages)
        if reader in ("run", "qrels", "queries") and not whole:    # refused as a whole: a damaged .gz, or UTF-16
            assert read + problems.count >= len(lines)
    check()
