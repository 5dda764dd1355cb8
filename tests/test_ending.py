"""Runs that stop early: signals, NaN losses, damaged checkpoints. Also teachers near chance, and layer maps."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import ROOT, loss_terms, random_rows, write_features
from helpers.training import arguments, dev_set, log_of, with_dropout, without_speed
from safetensors.torch import load_file, save_file

import distill
from simplified_tinybert.common.files import UserError
from simplified_tinybert.common.processes import Processes
from simplified_tinybert.common.signals import Terminated
from simplified_tinybert.data.features import read_chunks
from simplified_tinybert.model.pretrained import load_cross_encoder
from simplified_tinybert.training.checkpoints import step_of
from simplified_tinybert.training.losses import attention_loss, hidden_loss
from simplified_tinybert.training.trainer import CHECK_EVERY, Trainer
from simplified_tinybert.training.validation import area_under_curve

LONG = ("--train_batch_size", 4, "--num_train_epochs", 40, "--train_loss_step", 3, "--save_model_step", 10 ** 6,
        "--learning_rate", 1e-3)


def start(script, *more, **environment):
    return subprocess.Popen([sys.executable, str(ROOT / script), *map(str, more)], stderr=subprocess.PIPE, text=True,
                            env=os.environ | environment)


def wait_for(path, process, timeout=6000):
    """Wait until the file has content."""
    end = time.monotonic() + timeout
    while not (path.is_file() and path.stat().st_size):
        assert process.poll() is None and time.monotonic() < end, process.stderr.read()
        time.sleep(0.02)


@pytest.mark.parametrize("number, code, word", [
    pytest.param(signal.SIGINT, 130, "interrupted", marks=pytest.mark.slow), (signal.SIGTERM, 143, "terminated")])
def test_a_run_stopped_by_a_signal_resumes_to_the_same_student(golden_models, tmp_path, run_here, number, code, word):
    features = write_features(tmp_path / "train.pkl", random_rows(60))
    models = golden_models | {"student_2x24": with_dropout(golden_models["student_2x24"], tmp_path / "dropout")}
    call = arguments(features, models, tmp_path / "halves", *LONG, "--num_train_epochs", 12)
    process = start("distill.py", *call)
    wait_for(tmp_path / "halves" / "train_loss.jsonl", process)
    process.send_signal(number)
    printed = process.communicate(timeout=600)[1]
    assert process.returncode == code and printed.rstrip().endswith(word) and "Traceback" not in printed
    step = int(re.search(r"checkpoint-(\d+) is saved; .* --resume continues", printed)[1])
    assert 3 <= step < 180 and (tmp_path / "halves" / f"checkpoint-{step}" / "training_state.pt").is_file()
    assert not (tmp_path / "halves" / "model.safetensors").exists()

    run_here(distill, *call, "--resume")
    run_here(distill, *arguments(features, models, tmp_path / "whole", *LONG, "--num_train_epochs", 12))
    for name in ("model.safetensors", "fit_dense.safetensors"):
        assert (tmp_path / "halves" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert without_speed(tmp_path / "halves/train_loss.jsonl") == without_speed(tmp_path / "whole/train_loss.jsonl")


@pytest.mark.parametrize("at", [5, 10, 20, *(pytest.param(step, marks=pytest.mark.slow) for step in (3, 4, 11, 15))])
def test_a_signal_at_any_step_loses_no_step_and_no_row(golden_models, tmp_path, run_here, monkeypatch, at):
    """At steps with a row, a validation or a checkpoint, at the ends of both stages, at the start of the second."""
    features = write_features(tmp_path / "train.pkl", random_rows(40))
    more = ("--distill_model", "tinybert", "--train_batch_size", 8, "--num_train_epochs", 2, "--train_loss_step", 3,
            "--save_model_step", 5, "--eval_step", 4, *dev_set(tmp_path), "--learning_rate", 1e-3)
    run_here(distill, *arguments(features, golden_models, tmp_path / "whole", *more))
    real_step = Trainer._step

    def step_and_signal(self, number, group):
        real_step(self, number, group)
        if number == at:
            os.kill(os.getpid(), signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", step_and_signal)
        call = arguments(features, golden_models, tmp_path / "halves", *more)
        if at == 20:
            run_here(distill, *call)                    # the run has just finished
        else:
            with pytest.raises(KeyboardInterrupt):
                run_here(distill, *call)
            assert (tmp_path / "halves" / f"checkpoint-{11 if at == 10 else at}").is_dir()
    run_here(distill, *arguments(features, golden_models, tmp_path / "halves", *more, "--resume"))
    for name in ("model.safetensors", "fit_dense.safetensors", "dev.jsonl", "best/model.safetensors"):
        assert (tmp_path / "halves" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert without_speed(tmp_path / "halves/train_loss.jsonl") == without_speed(tmp_path / "whole/train_loss.jsonl")


@pytest.fixture
def signal_at_7(monkeypatch):
    real_step = Trainer._step

    def step_and_signal(self, number, group):
        real_step(self, number, group)
        if number == 7:
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(Trainer, "_step", step_and_signal)


def test_a_signal_is_noticed_between_checks_of_the_device(golden_models, tmp_path, run_here, monkeypatch, signal_at_7):
    monkeypatch.setitem(CHECK_EVERY, "cpu", 50)
    features = write_features(tmp_path / "train.pkl", random_rows(40))
    with pytest.raises(Terminated):
        run_here(distill, *arguments(features, golden_models, tmp_path / "out", *LONG))
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-0", "checkpoint-7"]


def test_no_process_ends_before_the_checkpoint_is_saved(golden_models, tmp_path, run_here, monkeypatch, signal_at_7):
    """torchrun kills the others 30 seconds after the first process has ended."""
    saved = []

    class Watched(Processes):
        def barrier(self, group=None):
            saved.append((tmp_path / "out" / "checkpoint-7").is_dir())
    monkeypatch.setattr(distill, "process_group", lambda device: nullcontext(Watched()))
    features = write_features(tmp_path / "train.pkl", random_rows(40))
    with pytest.raises(Terminated):
        run_here(distill, *arguments(features, golden_models, tmp_path / "out", *LONG))
    assert saved and saved[-1]


@pytest.mark.slow
def test_a_signal_to_several_processes_saves_one_checkpoint(golden_models, tmp_path):
    features = write_features(tmp_path / "train.pkl", random_rows(60))
    call = arguments(features, golden_models, tmp_path / "out", *LONG)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.Popen([*launcher, str(ROOT / "distill.py"), *map(str, call)], stderr=subprocess.PIPE,
                               text=True)
    wait_for(tmp_path / "out" / "train_loss.jsonl", process)
    process.terminate()
    printed = process.communicate(timeout=600)[1]
    assert len(re.findall(r"checkpoint-\d+ is saved", printed)) == 1, printed
    assert process.returncode
    assert max(map(step_of, (tmp_path / "out").glob("checkpoint-*"))) >= 3


def test_a_terminated_script_leaves_no_unfinished_file(golden_models, tmp_path):
    """tokenize_to_features.py, while its workers tokenize."""
    (tmp_path / "pairs.tsv").write_text("".join(f"q{number}#p\tw7 w8\t{'w9 ' * 50}{number}\n"
                                                for number in range(60000)))
    process = start("tokenize_to_features.py", "--set_name", "test", "--raw_data_file", tmp_path / "pairs.tsv",
                    "--output_features_file", tmp_path / "out.pkl", "--bert_model_dir", golden_models["teacher"],
                    "--num_workers", 2)
    end = time.monotonic() + 600
    while not list(tmp_path.glob(".out.pkl.*")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    process.terminate()
    printed = process.communicate(timeout=600)[1]
    assert process.returncode == 143 and printed.rstrip().endswith("terminated") and "Traceback" not in printed
    assert sorted(os.listdir(tmp_path)) == ["pairs.tsv"]


def test_a_second_sigterm_does_not_interrupt_the_clean_up():
    code = ("import os, signal, time; from simplified_tinybert.common.files import run_main\n"
            "def main():\n"
            "    try:\n"
            "        os.kill(os.getpid(), signal.SIGTERM), time.sleep(9)\n"
            "    finally:\n"
            "        os.kill(os.getpid(), signal.SIGTERM), print('cleaned up')\n"
            "run_main(main)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (143, "cleaned up\n", "terminated\n")


def test_a_damaged_checkpoint_is_reported(golden_models, tmp_path, run_here, signal_at_7):
    features = write_features(tmp_path / "train.pkl", random_rows(40))
    call = arguments(features, golden_models, tmp_path / "out", *LONG)
    with pytest.raises(Terminated):
        run_here(distill, *call)
    path = tmp_path / "out" / "checkpoint-7" / "training_state.pt"
    content = path.read_bytes()
    torch.save({"step": 7}, tmp_path / "other.pt")
    for damaged in (b"", content[:9], content[:len(content) // 2], b"x" * 99, b"cos\nsystem\n(S'true'\ntR.",
                    (tmp_path / "other.pt").read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{path}: is missing or damaged; remove {path.parent}"):
            run_here(distill, *call, "--resume")
    path.unlink()
    with pytest.raises(UserError, match=f"{path}: is missing or damaged; remove {path.parent}"):
        run_here(distill, *call, "--resume")
    path.with_name("model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=f"model.safetensors: .*; or remove {path.parent}, and --resume"):
        run_here(distill, *call, "--resume")


@pytest.mark.parametrize("name", ["train_loss.jsonl", "dev.jsonl"])
def test_a_damaged_log_is_reported_with_its_line(golden_models, tmp_path, run_here, signal_at_7, name):
    features = write_features(tmp_path / "train.pkl", random_rows(40))
    call = arguments(features, golden_models, tmp_path / "out", *LONG)
    with pytest.raises(Terminated):
        run_here(distill, *call)
    for line in ("", "x", "[]", '{"global_step": "x", "loss": 1}', '{"loss": 1}', '{"global_step": 1}'):
        (tmp_path / "out" / name).write_text(f'{{"global_step": 1, "loss": 1.0}}\n{line}\n')
        with pytest.raises(UserError, match=f"{name}:2: is no row of this log .*remove the line"):
            run_here(distill, *call, "--resume")


def test_keep_checkpoints_removes_older_ones(golden_models, tmp_path, run_here):
    features = write_features(tmp_path / "train.pkl", random_rows(40))
    common = ("--train_batch_size", 8, "--save_model_step", 2)
    for name, more in (("all", ()), ("two", ("--keep_checkpoints", 2))):
        run_here(distill, *arguments(features, golden_models, tmp_path / name, *common, *more))
    found = {name: sorted(step_of(path) for path in (tmp_path / name).glob("checkpoint-*")) for name in ("all", "two")}
    assert found == {"all": [0, 2, 4, 6, 8], "two": [6, 8]}
    with pytest.raises(UserError, match="--keep_checkpoints 0: "):
        run_here(distill, *arguments(features, golden_models, tmp_path / "none", "--keep_checkpoints", 0))


def test_a_half_removed_checkpoint_is_not_resumed(golden_models, tmp_path, run_here, monkeypatch):
    features = write_features(tmp_path / "train.pkl", random_rows(40))
    call = arguments(features, golden_models, tmp_path / "out", "--train_batch_size", 8, "--save_model_step", 2,
                     "--eval_step", 2, "--learning_rate", 1e-3, *dev_set(tmp_path), "--keep_checkpoints", 1)

    def interrupted_removal(directory, ignore_errors=False, real=shutil.rmtree):
        if ignore_errors:
            return real(directory, ignore_errors=True)
        (directory / "model.safetensors").unlink()
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("simplified_tinybert.training.checkpoints.shutil.rmtree", interrupted_removal)
        run_here(distill, *call)
    kept = [*(tmp_path / "out").glob("checkpoint-*"), *(tmp_path / "out").glob("best")]
    assert kept and all((directory / "model.safetensors").is_file() for directory in kept)
    run_here(distill, *call, "--resume")
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("log_every", [3, 1000])
def test_a_nan_loss_is_reported_with_step_rate_and_examples(golden_models, tmp_path, run_here, monkeypatch, log_every):
    """Losses are checked every 4 steps, as on a GPU, and before each row. The learning rate at step 2 is by hand."""
    monkeypatch.setitem(CHECK_EVERY, "cpu", 4)
    features = write_features(tmp_path / "train.pkl", random_rows(16))
    with pytest.raises(UserError) as raised:
        run_here(distill, *arguments(features, golden_models, tmp_path / "out", "--train_batch_size", 5,
                                     "--learning_rate", 1e29, "--warmup_proportion", 0, "--num_train_epochs", 3,
                                     "--save_model_step", 1000, "--train_loss_step", log_every))
    found = re.match(r"the loss of step (\d+) is NaN or infinite; learning rate ([\d.e+]+), examples ([^;]+);",
                     str(raised.value))
    assert int(found[1]) == 2 and float(found[2]) == pytest.approx(1e29 * 11 / 12, rel=1e-2)
    order = np.random.default_rng([42, 0]).permutation(16)
    names = [row[0] for row in random_rows(16)]
    assert found[3].split(", ") == [names[index] for index in order[5:10]]
    assert not (tmp_path / "out" / "train_loss.jsonl").exists()             # no row with a NaN


@pytest.mark.parametrize("scale, warning", [(1.0, None), (0.0, "no better than chance"), (-1.0, "worse than chance")])
def test_a_teacher_near_chance_is_reported(golden_models, tmp_path, run_here, scale, warning):
    """Labels are the teacher's own; then its classifier is multiplied by `scale`."""
    teacher, _ = load_cross_encoder(golden_models["teacher"])
    rows = random_rows(300)
    features = write_features(tmp_path / "draft.pkl", rows)
    chunk, = read_chunks(features)
    with torch.inference_mode():
        logits = teacher(chunk.batch(np.arange(300))).logits
    margins = (logits[:, 1] - logits[:, 0]).numpy()
    rows = [(*row[:3], int(margin > np.median(margins))) for row, margin in zip(rows, margins)]
    features = write_features(tmp_path / "train.pkl", rows)
    directory = shutil.copytree(golden_models["teacher"], tmp_path / "teacher")
    weights = load_file(directory / "model.safetensors")
    save_file({name: tensor * scale if name.startswith("classifier.") else tensor for name, tensor in weights.items()},
              directory / "model.safetensors")
    printed = run_here(distill, *arguments(features, golden_models | {"teacher": directory}, tmp_path / "out",
                                           "--num_train_epochs", 0.1))
    assert ("warning: the teacher scores" in printed) == bool(warning)
    assert not warning or warning in printed


def test_area_under_curve_by_hand():
    scores, relevant = np.array([0.9, 0.5, 0.5, 0.1]), np.array([True, False, True, False])
    assert area_under_curve(scores, relevant) == (pytest.approx(3.5 / 4), pytest.approx((5 / 48) ** 0.5))
    assert area_under_curve(scores, np.array([True] * 4)) == (1.0, 0.0)


def test_layer_map(golden_models, tmp_path, run_here):
    features = write_features(tmp_path / "train.pkl", random_rows(8))
    printed = run_here(distill, *arguments(features, golden_models, tmp_path / "out", "--layer_map", 1, 4,
                                           "--train_batch_size", 8, "--train_loss_step", 1))
    assert "0 ← 0 (embeddings), 1 ← 1, 2 ← 4" in printed
    batch = next(read_chunks(features)).batch(np.arange(8), 32)
    student, _ = load_cross_encoder(golden_models["student_2x24"])
    teacher, _ = load_cross_encoder(golden_models["teacher"])
    student_out, teacher_out = student(batch, [1, 2]), teacher(batch, [1, 4])
    attention = sum(attention_loss(student_out.queries[j], student_out.keys[j], teacher_out.queries[k],
                                   teacher_out.keys[k], batch.attention_mask) for j, k in ((1, 1), (2, 4)))
    hidden = sum(hidden_loss(student.project(j, student_out.hidden_states[j]), teacher_out.hidden_states[k],
                             batch.attention_mask) for j, k in ((0, 0), (1, 1), (2, 4)))
    row = log_of(tmp_path / "out")[0]
    assert (row["att_loss"], row["rep_loss"]) == pytest.approx((attention.item(), hidden.item()), rel=1e-4)
    uniform = loss_terms(student, teacher, batch, {"attention": 1.0})["loss"].item()
    assert abs(uniform - attention.item()) > 1e-3
    assert json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["layer_map"] == [1, 4]


@pytest.mark.parametrize("layers", [[2], [4, 2], [2, 2], [0, 4], [2, 5], [1, 2, 4]])
def test_refused_layer_maps(golden_models, tmp_path, run_here, layers):
    features = write_features(tmp_path / "train.pkl", random_rows(8))
    with pytest.raises(UserError, match=f"--layer_map {' '.join(map(str, layers))}: expected 2 .* from 1 to 4"):
        run_here(distill, *arguments(features, golden_models, tmp_path / "out", "--layer_map", *layers))
