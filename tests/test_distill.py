"""distill.py from the command line: golden losses, gradient accumulation, resuming, input errors."""
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    change_config,
    loss_terms,
    random_rows,
    run_script,
    single_logit,
    tiny_vocabulary,
    write_features,
)
from helpers.golden import golden_training
from helpers.training import arguments, log_of, with_dropout, without_speed
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from transformers import AutoModelForSequenceClassification

import distill
from simplified_tinybert.common.files import UserError
from simplified_tinybert.common.processes import locked
from simplified_tinybert.data.features import read_chunks
from simplified_tinybert.model.pretrained import load_cross_encoder
from simplified_tinybert.training.batches import epoch_batches
from simplified_tinybert.training.description import padding_share
from simplified_tinybert.training.objective import ObjectiveSettings
from simplified_tinybert.training.settings import Stage, TrainingSettings


@pytest.mark.parametrize("number", range(16))
def test_golden_losses_from_the_command_line(golden, golden_models, golden_features, tmp_path, run_here, number):
    """Ten epochs of one batch are ten steps of the golden schedule, of which the first six losses are known."""
    case = golden["cases"][number]
    run_here(distill, *golden_training(case, golden_features, golden_models, tmp_path / "out"), "--wd", 0.01)
    rows = log_of(tmp_path / "out")
    assert [row["global_step"] for row in rows] == list(range(1, 11))
    assert [row["loss"] for row in rows[:6]] == pytest.approx(case["training"]["total_loss_per_step"], rel=1e-4)
    columns = {"soft_loss": "soft", "hard_loss": "hard", "att_loss": "attention", "rep_loss": "hidden"}
    for column, term in columns.items():
        assert rows[0][column] == pytest.approx(case["losses"].get(term, 0), rel=1e-4)
    for row in rows:
        assert row["loss"] == pytest.approx(row["cls_loss"] + row["att_loss"] + row["rep_loss"], rel=1e-5)


def test_models_layers_and_steps_are_printed(golden_models, tmp_path, run_here):
    features = write_features(tmp_path / "train.pkl", random_rows(50))
    printed = run_here(distill, *arguments(features, golden_models, tmp_path / "out", "--train_batch_size", 8))
    for part in ("4 layers, hidden size 48, 4 heads, 91,154 parameters", "2 layers, hidden size 24",
                 "0 ← 0 (embeddings), 1 ← 2, 2 ← 4", "1 × attention + 1 × hidden + 1 × soft + 1 × hard",
                 "soft cross-entropy weighs 0.5", "50, 50.0 % relevant", "positions are padding",
                 "14 = 2 epochs × 7 steps of 8 × 1 examples", "warm-up over 1"):
        assert part in printed


def test_a_short_run_writes_the_student_and_a_last_row(golden_models, tmp_path, run_here):
    features = write_features(tmp_path / "train.pkl", random_rows(20))
    run_here(distill, *arguments(features, golden_models, tmp_path / "out", "--train_batch_size", 8))
    assert [row["global_step"] for row in log_of(tmp_path / "out")] == [6]
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-0"]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finished"]
    before = load_file(golden_models["student_2x24"] / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors") | load_file(tmp_path / "out" / "fit_dense.safetensors")
    assert before.keys() == after.keys()
    assert not torch.allclose(before["classifier.weight"].float(), after["classifier.weight"], atol=1e-6)


@pytest.mark.parametrize("distill_model", ["finetune", "standard", "simplified"])
def test_accumulated_batches_give_the_same_student_as_large_ones(golden_models, tmp_path, run_here, distill_model):
    """28 examples: each epoch has two steps of 12 examples and one of 4, without dropout."""
    features = write_features(tmp_path / "train.pkl", random_rows(28))
    students = []
    for name, batch, accumulation in (("a", 12, 1), ("b", 4, 3), ("c", 3, 4)):
        run_here(distill, *arguments(features, golden_models, tmp_path / name, "--distill_model", distill_model,
                                     "--train_batch_size", batch, "--gradient_accumulation_steps", accumulation,
                                     "--train_loss_step", 1, "--learning_rate", 1e-3))
        students.append(load_file(tmp_path / name / "model.safetensors"))
        assert [row["global_step"] for row in log_of(tmp_path / name)] == [1, 2, 3, 4, 5, 6]
    for other in students[1:]:
        for key, tensor in students[0].items():
            torch.testing.assert_close(other[key], tensor, rtol=1e-4, atol=2e-5)
    losses = [[row["loss"] for row in log_of(tmp_path / name)] for name in "abc"]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_finetune_needs_no_teacher_and_lowers_the_loss(golden_models, tmp_path, run_here):
    features = write_features(tmp_path / "train.pkl", random_rows(16))
    run_here(distill, "--features_file", features, "--general_student_model", golden_models["student_4x48"],
             "--output_student_dir", tmp_path / "out", "--cache_file_dir", tmp_path, "--distill_model", "finetune",
             "--num_train_epochs", 40, "--train_batch_size", 16, "--learning_rate", 1e-3, "--train_loss_step", 10)
    rows = log_of(tmp_path / "out")
    assert rows[-1]["hard_loss"] < 0.5 * rows[0]["hard_loss"]
    assert rows[-1]["soft_loss"] == rows[-1]["att_loss"] == 0.0


def test_padding_modes(golden_models, tmp_path, run_here):
    """Padding further changes the loss with --padding reference, but not with masked."""
    features = write_features(tmp_path / "train.pkl", random_rows(12, max_seq_length=20), max_seq_length=20)
    first = {}
    for padding in ("reference", "masked"):
        for length in (20, 40):
            output = tmp_path / f"{padding}{length}"
            run_here(distill, *arguments(features, golden_models, output, "--padding", padding, "--max_seq_length",
                                         length, "--train_batch_size", 12, "--train_loss_step", 1))
            first[padding, length] = log_of(output)[0]["att_loss"]
    assert first["masked", 20] == pytest.approx(first["masked", 40], rel=1e-5)
    # Twice the length: only padded queries add to the sum, but the mean is over four times as many pairs
    assert first["reference", 40] < 0.7 * first["reference", 20]


@pytest.mark.parametrize("flags", [(), ("--padding", "masked"), ("--distill_model", "standard"),
                                   ("--loss_weights", "attention=3", "hard=0")])
def test_logged_gradient_norms(golden_models, golden_features, tmp_path, run_here, flags):
    """Each norm is that of the gradient of its term alone."""
    more = ("--train_batch_size", 6, "--train_loss_step", 1, "--log_gradients", *flags)
    run_here(distill, *arguments(golden_features, golden_models, tmp_path / "out", *more))
    row, found = log_of(tmp_path / "out")[0], set()
    teacher, _ = load_cross_encoder(golden_models["teacher"])
    for term, name in (("attention", "att"), ("hidden", "rep"), ("soft", "soft"), ("hard", "hard")):
        student, _ = load_cross_encoder(tmp_path / "out" / "checkpoint-0")
        batch = next(read_chunks(golden_features)).batch(np.arange(6), 32)
        padding = "masked" if "masked" in flags else "reference"
        loss_terms(student, teacher, batch, {term: 3.0 if "attention=3" in flags and name == "att" else 1.0},
                  padding=padding)["loss"].backward()
        norm = torch.cat([parameter.grad.flatten() for key, parameter in student.named_parameters()
                          if parameter.grad is not None and "projections" not in key]).norm().item()
        if f"{name}_grad" in row:
            assert row[f"{name}_grad"] == pytest.approx(norm, rel=1e-4) and norm > 0
            found.add(name)
    expected = {"soft", "hard"} if "standard" in flags else {"att", "rep", "soft", "hard"} - (
        {"hard"} if "hard=0" in flags else set())
    assert found == expected


def test_logging_gradients_does_not_change_the_student(golden_models, tmp_path, run_here):
    features = write_features(tmp_path / "train.pkl", random_rows(50))
    models = golden_models | {"student_2x24": with_dropout(golden_models["student_2x24"], tmp_path / "dropout")}
    for name, more in (("plain", ()), ("logged", ("--log_gradients",))):
        run_here(distill, *arguments(features, models, tmp_path / name, "--train_batch_size", 8, "--train_loss_step", 3,
                                     "--gradient_accumulation_steps", 2, "--learning_rate", 1e-3, *more))
    assert (tmp_path / "plain" / "model.safetensors").read_bytes() == \
        (tmp_path / "logged" / "model.safetensors").read_bytes()
    assert "att_grad" not in log_of(tmp_path / "plain")[0]
    assert all(row["att_grad"] > 0 for row in log_of(tmp_path / "logged"))


@pytest.mark.parametrize("stop_after", [0, 1, 7, 10, 13])
def test_an_interrupted_run_resumes_to_the_same_student(golden_models, tmp_path, run_here, interrupted, stop_after):
    features = write_features(tmp_path / "train.pkl", random_rows(50))
    models = golden_models | {"student_2x24": with_dropout(golden_models["student_2x24"], tmp_path / "dropout")}
    more = ("--train_batch_size", 8, "--save_model_step", 5, "--train_loss_step", 3, "--learning_rate", 1e-3)
    run_here(distill, *arguments(features, models, tmp_path / "whole", *more))

    with interrupted(stop_after):
        run_here(distill, *arguments(features, models, tmp_path / "halves", *more))
    assert not (tmp_path / "halves" / "model.safetensors").exists()
    run_here(distill, *arguments(features, models, tmp_path / "halves", *more, "--resume"))
    for name in ("model.safetensors", "fit_dense.safetensors", "config.json"):
        assert (tmp_path / "halves" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert without_speed(tmp_path / "halves/train_loss.jsonl") == without_speed(tmp_path / "whole/train_loss.jsonl")
    assert "already finished" in run_here(distill, *arguments(features, models, tmp_path / "halves", *more, "--resume"))


def test_resume_refuses_other_settings(golden_models, tmp_path, run_here):
    features = write_features(tmp_path / "train.pkl", random_rows(20))
    run_here(distill, *arguments(features, golden_models, tmp_path / "out"))
    for flags, message in ((["--learning_rate", 0.1], "learning_rate was 5e-05, is 0.1"),
                           (["--distill_model", "finetune"], "distill_model was simplified, is finetune")):
        with pytest.raises(UserError, match=message):
            run_here(distill, *arguments(features, golden_models, tmp_path / "out", "--resume", *flags))


def test_a_checkpoint_saved_while_a_job_starts_is_not_overlooked(golden_models, tmp_path, run_here, interrupted,
                                                                 monkeypatch):
    """The earlier job saves a checkpoint after the next one has looked for it, and before that takes the lock."""
    features = write_features(tmp_path / "train.pkl", random_rows(50))
    call = arguments(features, golden_models, tmp_path / "out", "--train_batch_size", 10)
    with interrupted(2):
        run_here(distill, *call)
    load_models = distill.load_models
    monkeypatch.setattr(distill, "load_models", lambda *inputs: (
        shutil.copytree(tmp_path / "out" / "checkpoint-0", tmp_path / "out" / "checkpoint-4"), load_models(*inputs))[1])
    with pytest.raises(UserError, match=f"{tmp_path / 'out'}: another job has saved a checkpoint"):
        run_here(distill, *call, "--resume")


def test_a_directory_that_is_not_writable_is_reported_first(golden_models, tmp_path, run_here, monkeypatch):
    """The tests may run as root, who can write anywhere. So the system's answer is replaced."""
    features, access = write_features(tmp_path / "train.pkl", random_rows(8)), os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    with pytest.raises(UserError) as raised:
        run_here(distill, *arguments(features, golden_models, tmp_path / "new" / "out", "--train_batch_size", 0))
    assert f"{tmp_path / 'new' / 'out'}: cannot be written: {tmp_path} is not writable" in str(raised.value)
    assert "--train_batch_size 0" in str(raised.value)


def test_flags_without_effect_are_reported(golden_models, tmp_path, run_here):
    features = write_features(tmp_path / "train.pkl", random_rows(8))
    stderr = run_here(distill, *arguments(features, golden_models, tmp_path / "out", "--alpha", 0.3))
    assert "warning: --alpha has no effect: --distill_model simplified minimizes attention" in stderr
    stderr = run_here(distill, *arguments(features, golden_models, tmp_path / "other", "--distill_model", "standard",
                                          "--alpha", 1, "--temperature", 2, "--layer_map", 2, 4))
    assert "--layer_map has no effect" in stderr and "--alpha" not in stderr and "--temperature" not in stderr


def test_all_problems_are_reported_at_once(golden_models, tmp_path):
    """Exit code 2, no traceback, no output directory."""
    done = run_script("distill.py", "--features_file", tmp_path / "missing.pkl", "--general_student_model",
                      tmp_path / "no", "--output_student_dir", tmp_path / "out", "--train_batch_size", 0,
                      "--temperature", -1, "--learning_rate", -1, "--fp16", "--device", "cpu")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "intermediate" not in done.stderr
    for problem in ("missing.pkl", str(tmp_path / "no"), "--train_batch_size 0", "--temperature -1",
                    "needs --teacher_model", "--fp16"):
        assert problem in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rows, changes, more, message", [
    (random_rows(8), {"num_attention_heads": 2}, [], "attention heads"),
    ([(i, t, q, -1) for i, t, q, _ in random_rows(8)], {}, [], "8 of 8 examples have no label"),
    (random_rows(8), {}, ["--max_seq_length", 16], "made with 32"),
    (random_rows(8), {}, ["--max_seq_length", 65], "64 positions"),
    (random_rows(8), {"vocab_size": 100}, [], "has 200 tokens, but the embedding matrix has 100 rows"),
    (random_rows(8), {"type_vocab_size": 1}, [], "config.json: .*type_vocab_size is 1; expected .* 2 or more"),
    (random_rows(8), {"layer_norm_eps": "1e-12"}, [], "config.json: .*layer_norm_eps.*expected float, got str"),
    (random_rows(8), {"num_hidden_layers": 3}, [], "cannot be mapped evenly"),
    (random_rows(8), {}, ["--fp16_backend", "apex", "--fp16"], "apex"),
])
def test_models_and_features_that_do_not_fit_together(golden_models, tmp_path, run_here, rows, changes, more, message):
    features = write_features(tmp_path / "train.pkl", rows)
    models = golden_models | {"student_2x24": change_config(
        shutil.copytree(golden_models["student_2x24"], tmp_path / "s"), **changes)}
    with pytest.raises(UserError, match=message):
        run_here(distill, *arguments(features, models, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.json"])
def test_a_vocabulary_larger_than_the_embeddings(golden_models, tmp_path, run_here, file):
    """Reported as such, not as features of another vocabulary: tokenizing again would not help."""
    features = write_features(tmp_path / "train.pkl", random_rows(8))
    teacher = shutil.copytree(golden_models["teacher"], tmp_path / "teacher")
    tokens = [*tiny_vocabulary(), "covid"]
    if file == "vocab.txt":
        (teacher / file).write_text("\n".join(tokens) + "\n")
    else:
        (teacher / "vocab.txt").unlink()
        Tokenizer(WordPiece({token: number for number, token in enumerate(tokens)}, unk_token="[UNK]")).save(
            str(teacher / file))
    with pytest.raises(UserError) as raised:
        run_here(distill, *arguments(features, golden_models | {"teacher": teacher}, tmp_path / "out"))
    for part in (str(teacher / file), "201", str(teacher / "config.json"), "200"):
        assert part in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


def test_a_teacher_with_one_logit_gives_the_same_student(golden_models, tmp_path, run_here):
    """(0, z) has the same softmax as two logits whose difference is z."""
    features = write_features(tmp_path / "train.pkl", random_rows(16))
    single = single_logit(golden_models["teacher"], tmp_path / "single", problem_type="regression")
    students = []
    for name, teacher in (("two", golden_models["teacher"]), ("one", single)):
        printed = run_here(distill, *arguments(features, golden_models | {"teacher": teacher}, tmp_path / name,
                                               "--train_batch_size", 8, "--learning_rate", 1e-3))
        assert ("(0, z)" in printed) == (name == "one") == ("regression" in printed)
        students.append(load_file(tmp_path / name / "model.safetensors"))
    for name, tensor in students[0].items():
        torch.testing.assert_close(students[1][name], tensor, rtol=0, atol=1e-6)


def test_a_general_student_with_one_logit_keeps_its_head(golden_models, tmp_path, run_here):
    """It starts from (0, z). transformers loads the finished student with two classes and the same logits."""
    features = write_features(tmp_path / "train.pkl", random_rows(16))
    single = single_logit(golden_models["student_2x24"], tmp_path / "single", sentence_transformers={
        "activation_fn": "torch.nn.modules.activation.Sigmoid"})
    printed = run_here(distill, *arguments(features, golden_models | {"student_2x24": single}, tmp_path / "out",
                                           "--learning_rate", 1e-3))
    assert "(0, z)" in printed and "newly initialised" not in printed
    before, start = (load_file(path / "model.safetensors") for path in (single, tmp_path / "out" / "checkpoint-0"))
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.equal(start[name][1:], before[name].float()) and not start[name][0].any()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "not relevant", "1": "relevant"} and "sentence_transformers" not in config
    batch = next(read_chunks(features)).batch(np.arange(16), 32)
    with torch.inference_mode():
        logits = load_cross_encoder(tmp_path / "out")[0](batch).logits
        expected = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()(
            input_ids=batch.input_ids, token_type_ids=batch.token_type_ids, attention_mask=batch.attention_mask).logits
    assert expected.shape == (16, 2) and torch.allclose(logits, expected, rtol=0, atol=1e-6)


def test_features_of_another_vocabulary_are_refused(golden_models, tmp_path, run_here):
    features = write_features(tmp_path / "train.pkl", random_rows(8))
    other = shutil.copytree(golden_models["teacher"], tmp_path / "other")
    (other / "vocab.txt").write_text((other / "vocab.txt").read_text().replace("w7\n", "w7x\n"))
    with pytest.raises(UserError, match="a different vocabulary than the teacher's"):
        run_here(distill, *arguments(features, golden_models | {"teacher": other}, tmp_path / "out"))


def test_a_non_empty_directory_is_refused_and_not_changed(golden_models, tmp_path, run_here):
    features = write_features(tmp_path / "train.pkl", random_rows(8))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("thesis")
    for more in ([], ["--resume"]):
        with pytest.raises(UserError, match="is not empty"):
            run_here(distill, *arguments(features, golden_models, tmp_path / "out", *more))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_an_infinite_loss_stops_the_run(golden_models, tmp_path, run_here):
    features = write_features(tmp_path / "train.pkl", random_rows(16))
    with pytest.raises(UserError, match="step 3 is .*1e[+]30, examples q.* --learning_rate"):
        run_here(distill, *arguments(features, golden_models, tmp_path / "out", "--learning_rate", 1e30,
                                     "--train_batch_size", 4, "--num_train_epochs", 5, "--train_loss_step", 1))


def test_nan_weights_are_not_saved(golden_models, tmp_path, run_here):
    features = write_features(tmp_path / "train.pkl", random_rows(40))
    with pytest.raises(UserError, match="--learning_rate"):
        run_here(distill, *arguments(features, golden_models, tmp_path / "out", "--learning_rate", 1e30,
                                     "--train_batch_size", 4, "--save_model_step", 2, "--train_loss_step", 100))
    for path in (tmp_path / "out").glob("checkpoint-*/model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


def test_resume_refuses_models_whose_files_changed(golden_models, tmp_path, run_here):
    features = write_features(tmp_path / "train.pkl", random_rows(20))
    models = golden_models | {"teacher": shutil.copytree(golden_models["teacher"], tmp_path / "teacher")}
    run_here(distill, *arguments(features, models, tmp_path / "out"))
    shutil.copyfile(golden_models["student_4x48"] / "model.safetensors", models["teacher"] / "model.safetensors")
    with pytest.raises(UserError, match="teacher was"):
        run_here(distill, *arguments(features, models, tmp_path / "out", "--resume"))
    shutil.copyfile(golden_models["teacher"] / "model.safetensors", models["teacher"] / "model.safetensors")
    assert "already finished" in run_here(distill, *arguments(features, models, tmp_path / "out", "--resume"))
    change_config(models["teacher"], hidden_act="relu")
    with pytest.raises(UserError, match="teacher was"):
        run_here(distill, *arguments(features, models, tmp_path / "out", "--resume"))


@pytest.mark.parametrize("content", ["garbage", "[]", '{"settings": 3}', ""])
def test_a_damaged_run_json_is_refused(golden_models, tmp_path, run_here, content):
    features = write_features(tmp_path / "train.pkl", random_rows(8))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text(content)
    with pytest.raises(UserError, match="out/run.json: "):
        run_here(distill, *arguments(features, golden_models, tmp_path / "out", "--resume"))


def test_an_output_directory_is_locked_and_leftovers_are_removed(golden_models, tmp_path, run_here):
    features = write_features(tmp_path / "train.pkl", random_rows(8))
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"), pytest.raises(UserError, match=f"{tmp_path / 'out'}: another process"):
        run_here(distill, *arguments(features, golden_models, tmp_path / "out"))
    (tmp_path / "out" / ".checkpoint-5.123").mkdir()                      # left over from a killed run
    (tmp_path / "out" / ".run.json.123.tmp").write_text("{")
    run_here(distill, *arguments(features, golden_models, tmp_path / "out"))
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_a_file_in_place_of_a_directory_is_refused(golden_models, tmp_path, run_here):
    features = write_features(tmp_path / "train.pkl", random_rows(8))
    for flag in ("--tensorboard_dir", "--cache_file_dir"):
        with pytest.raises(UserError, match="train.pkl: is a file"):
            run_here(distill, *arguments(features, golden_models, tmp_path / "out", flag, features))
    assert not (tmp_path / "out").exists()


def test_the_model_card_names_the_teacher_if_there_is_one(golden_models, tmp_path, run_here):
    features = write_features(tmp_path / "train.pkl", random_rows(8))
    for number, (kind, weights, named) in enumerate([
            ("finetune", [], False), ("standard", [], True), ("finetune", ["--loss_weights", "soft=1"], True),
            ("simplified", ["--loss_weights", *(f"{term}=0" for term in ("attention", "hidden", "soft"))], False)]):
        out = tmp_path / str(number)
        run_here(distill, *arguments(features, golden_models, out, "--distill_model", kind, *weights))
        assert ("the teacher" in (out / "README.md").read_text()) == named


def test_losses_in_bfloat16_are_close_to_float32(golden_models, tmp_path, run_here):
    features = write_features(tmp_path / "train.pkl", random_rows(16))
    losses = []
    for name, more in (("a", []), ("b", ["--bf16"])):
        run_here(distill, *arguments(features, golden_models, tmp_path / name, *more, "--train_loss_step", 1))
        losses.append([row["loss"] for row in log_of(tmp_path / name)])
    assert losses[1] == pytest.approx(losses[0], rel=0.03) and losses[0] != losses[1]


def test_batches_of_an_epoch_contain_each_example_once():
    lengths = np.random.default_rng(1).integers(5, 100, 1003)
    plain, grouped = (TrainingSettings(batch_size=8, seed=1, max_seq_length=99, group_by_length=group)
                      for group in (False, True))
    for settings in (plain, grouped):
        batches = epoch_batches(lengths, settings, epoch=3)
        assert sorted(np.concatenate(batches).tolist()) == list(range(1003))
        assert all(len(batch) <= 8 for batch in batches) and len(batches) == 126
        assert not np.array_equal(np.concatenate(batches),
                                  np.concatenate(epoch_batches(lengths, settings, epoch=4)))
    shares = [padding_share(lengths, epoch_batches(lengths, settings, 0), None) for settings in (plain, grouped)]
    assert shares[1] < 0.05 < 0.3 < shares[0] < padding_share(lengths, epoch_batches(lengths, plain, 0), 99)


@pytest.mark.parametrize("examples, batch, accumulation, epochs, steps", [
    (100, 10, 1, 2, 20), (101, 10, 1, 2, 22), (100, 10, 3, 1, 4), (100, 10, 1, 2.5, 25), (3, 10, 4, 1, 1),
    (100, 10, 1, 0.01, 1)])
def test_number_of_steps(examples, batch, accumulation, epochs, steps):
    settings = TrainingSettings(batch_size=batch, accumulation=accumulation, max_seq_length=32)
    stage = Stage(objective=ObjectiveSettings(weights={}), epochs=epochs, learning_rate=1e-3)
    assert stage.total_steps(examples, settings) == steps


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="needs TensorFlow")
def test_tensorboard_does_not_import_tensorflow(tmp_path):
    code = ("import sys, torch; from pathlib import Path; from simplified_tinybert.common.processes import Processes; "
            "from simplified_tinybert.training.log import TrainingLog; "
            "TrainingLog(Path(sys.argv[1]), None, torch.device('cpu'), Processes()).close(); "
            "print('tensorflow' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n" and done.stderr == ""
    assert list((tmp_path / "tensorboard").iterdir())
