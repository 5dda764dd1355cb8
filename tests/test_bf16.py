"""Warnings of --bf16 on devices that emulate bfloat16, according to their instruction set or to measurements."""
import importlib
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_rows, write_features
from helpers.golden import HALF_TOLERANCES, golden_training
from helpers.training import log_of, torchrun
from transformers import BertConfig

import distill
from simplified_tinybert.model import precision
from simplified_tinybert.model.bert import CrossEncoder
from simplified_tinybert.model.precision import has_bf16, is_emulated, slowdown, warn_if_slow
from simplified_tinybert.ranking import scoring
from simplified_tinybert.training import optimizer

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")


@pytest.fixture
def features(tmp_path):
    return write_features(tmp_path / "features.pkl", random_rows(60), set_name="test")


@pytest.mark.parametrize("flag", ["--bf16", "--fp16"])
@pytest.mark.parametrize("number", [2, 6, 12])
def test_golden_training_in_half_precision(golden, golden_models, golden_features, tmp_path, run_here, monkeypatch,
                                           number, flag):
    """As on a GPU; the scale is low enough that loss scaling skips no step of --fp16."""
    monkeypatch.delitem(precision.NEEDED_DEVICE, "fp16")
    monkeypatch.setattr(optimizer, "INITIAL_SCALE", 256.0)
    case = golden["cases"][number]
    run_here(distill, *golden_training(case, golden_features, golden_models, tmp_path / "out"), flag)
    rows, expected = log_of(tmp_path / "out")[:6], case["training"]["total_loss_per_step"]
    assert [row["loss"] for row in rows] == pytest.approx(expected, rel=HALF_TOLERANCES[flag][number])


def test_steps_that_loss_scaling_skips_are_in_the_log(golden, golden_models, golden_features, tmp_path, run_here,
                                                      monkeypatch):
    monkeypatch.delitem(precision.NEEDED_DEVICE, "fp16")
    run_here(distill, *golden_training(golden["cases"][6], golden_features, golden_models, tmp_path / "out"), "--fp16")
    rows = log_of(tmp_path / "out")
    assert [row.get("skipped_steps") for row in rows[:6]] == [1, 1, 1, 1, 1, None]
    assert rows[-1]["learning_rate"] == pytest.approx(2e-3 / 8)             # the last of 10 steps, of which 2 warm up


X86 = {"architecture": "x86_64", "avx2": True}


@needs_onednn
@pytest.mark.parametrize("capabilities, limited, native", [
    (X86, False, False),
    (X86 | {"avx512_bf16": False, "amx_bf16": False}, False, False),
    (X86 | {"avx512_f": True, "avx512_vnni": True}, True, False),
    (X86 | {"avx512_bf16": True}, False, True),
    (X86 | {"amx_bf16": True}, False, True),
    (X86 | {"avx512_bf16": True}, True, None),          # needs a measurement
    ({"architecture": "aarch64", "bf16": True}, False, None),
    ({"architecture": "aarch64", "bf16": False}, False, None),
    ({}, False, None)])                                 # other versions of PyTorch
def test_bf16_support_of_instruction_sets(capabilities, limited, native):
    assert has_bf16(capabilities, limited) is native


@pytest.mark.parametrize("native, factor, emulated", [
    (False, 6.4, True), (False, 1.1, True), (False, 0.7, False), (None, 6.4, True), (None, 1.2, False),
    (None, 0.5, False), (True, 0.6, False), (True, 3.0, False)])
def test_is_emulated(native, factor, emulated):
    assert is_emulated(native, factor) is emulated


def test_slowdown_is_that_of_a_larger_product(capsys):
    """The quick measurement roughly agrees with a layer of an encoder, on any machine."""
    device = torch.device("cpu")

    def spent(dtype):
        inputs, weight = torch.ones(512, 384, dtype=dtype), torch.ones(768, 384, dtype=dtype)
        times = []
        for _ in range(6):
            start = time.thread_time()
            F.linear(inputs, weight)
            times.append(time.thread_time() - start)
        return float(np.median(times[1:]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        real = spent(torch.bfloat16) / spent(torch.float32)
    finally:
        torch.set_num_threads(threads)
    found = slowdown(torch.bfloat16)
    assert torch.get_num_threads() == threads
    assert 1 / 3 < found / real < 3
    warn_if_slow(torch.bfloat16, device, "use float32")
    output = capsys.readouterr().err
    if has_bf16(torch.cpu.get_capabilities(), False) is False and real > 3:
        assert output.count("emulated") == output.count("\n") == 1 and output.endswith("; use float32\n")
    if real < 0.5:
        assert not output
    warn_if_slow(None, device)
    assert not capsys.readouterr().err
    assert slowdown(torch.float32) < 1.5


@pytest.fixture
def slow_bf16(monkeypatch):
    """Simulate a CPU that emulates bfloat16."""
    monkeypatch.setattr(precision, "has_bf16", lambda capabilities, limited: False)
    monkeypatch.setattr(precision, "slowdown", lambda dtype: 6.43)


def commands(models, directory, features) -> dict:
    """Arguments of a short run of each script that has --bf16."""
    (directory / "texts.txt").write_text("w7 w8 w9\n" * 20)
    (directory / "docs.tsv").write_text("D1\tu\tt\tw7 w8 w9\nD2\tu\tt\tw10 w11 w12\n")
    (directory / "queries.tsv").write_text("q0\tw7 w8\n")
    (directory / "qrels.txt").write_text("q0 0 D1 1\n")
    (directory / "run.trec").write_text("q0 Q0 D1 1 2 t\nq0 Q0 D2 2 1 t\n")
    train = write_features(directory / "train.pkl", random_rows(8))
    cpu = ["--device", "cpu", "--bf16"]
    cache = ["--cache_file_dir", directory / "cache", "--output_student_dir", directory / "student"]
    return {
        "reranker": ["--model_dir", models["teacher"], "--features_file", features, "--output_scores_file",
                     directory / "scores.tsv", *cpu],
        "distill": ["--features_file", train, "--teacher_model", models["teacher"], "--general_student_model",
                    models["student_2x24"], "--num_train_epochs", 1, *cache, *cpu],
        "general_distill": ["--corpus", directory / "texts.txt", "--teacher_model", models["teacher"],
                            "--student_layers", 2, "--max_seq_length", 16, "--num_train_epochs", 1, *cache, *cpu],
        "report": ["--qrels", directory / "qrels.txt", "--system", "one", directory / "run.trec", models["teacher"],
                   "--features_file", features, "--speed_rounds", 1, "--output_dir", directory / "report", *cpu],
        "prepare_examples": ["train", "--docs", directory / "docs.tsv", "--queries", directory / "queries.tsv",
                             "--qrels", directory / "qrels.txt", "--candidates", directory / "run.trec",
                             "--output", directory / "out.tsv", "--cache_file_dir", directory / "cache",
                             "--filter_model", models["teacher"], "--max_seq_length", 32,
                             "--window", 2, "--stride", 1, *cpu]}


@pytest.mark.parametrize("script", ["reranker", "distill", "general_distill", "report", "prepare_examples"])
def test_every_script_warns_of_emulation(golden_models, features, tmp_path, run_here, slow_bf16, script):
    call = commands(golden_models, tmp_path, features)[script]
    output = run_here(importlib.import_module(script), *call).splitlines()
    lines = [number for number, line in enumerate(output) if "emulated" in line]
    assert len(lines) == 1
    line = output[lines[0]]
    assert "--bf16" in line and "6.4 times" in line and "leave the flag out" in line
    assert ("--int8" in line) == (script in ("reranker", "report"))
    work = [number for number, line in enumerate(output)
            if any(word in line for word in ("model   ", "student   ", "round 1", "filter   "))]
    assert work and lines[0] < work[0]
    outputs = (tmp_path / "student", tmp_path / "report")
    call = [part.with_name("again") if part in outputs else part for part in call if part != "--bf16"]
    assert "emulated" not in run_here(importlib.import_module(script), *call)


def test_one_process_warns_for_all(golden_models, features, tmp_path):
    """There is no warning if this CPU has bfloat16 instructions."""
    call = commands(golden_models, tmp_path, features)["reranker"]
    done = torchrun(2, "reranker.py", *call)
    assert done.returncode == 0, done.stderr
    native = has_bf16(torch.cpu.get_capabilities(), False)
    assert done.stderr.count("is emulated") <= 1
    if native is False and slowdown(torch.bfloat16) > 2:
        assert done.stderr.count("is emulated") == 1


def test_the_advice_to_use_bf16_where_it_is_fast(monkeypatch):
    """A CPU with AMX, unless an environment variable forbids its instructions."""
    def products(amx, limit=None):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", "amx_bf16": amx},
                            raising=False)
        for name in precision.ISA_LIMITS:
            monkeypatch.delenv(name, raising=False)
        if limit:
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        model = CrossEncoder(BertConfig(vocab_size=50, hidden_size=24, num_hidden_layers=1, num_attention_heads=4))
        return scoring.prepare(model.eval(), None, int8=False)
    assert "--bf16" in products(True)
    assert "--bf16" not in products(False) and "--bf16" not in products(True, "AVX2")
