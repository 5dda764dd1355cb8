"""Tests that need an NVIDIA GPU: golden values, mixed precision, memory. Skipped without one."""
import copy
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, loss_terms, random_rows, write_features
from helpers.golden import CASES, GPU_TOLERANCES, TERMS, golden_training, load_case
from helpers.reranking import arguments as rerank_arguments
from helpers.reranking import read_scores
from helpers.training import arguments, assert_same_student, log_of
from transformers import BertConfig

import distill
import reranker
from simplified_tinybert.data.features import Examples
from simplified_tinybert.model.batch import Batch
from simplified_tinybert.model.bert import CrossEncoder
from simplified_tinybert.model.precision import to_half
from simplified_tinybert.model.pretrained import fit_projections
from simplified_tinybert.ranking import scoring
from simplified_tinybert.training import optimizer
from simplified_tinybert.training.objective import stage_weights

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("number", CASES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_golden_losses_and_gradients(golden, golden_models, batch, number, dtype, tolerance):
    case, student, teacher, settings = load_case(golden, golden_models, number, dtype)
    terms = loss_terms(student.cuda(), teacher.cuda(), batch.to(torch.device("cuda")), **settings)
    expected = {column: case["losses"][name] for column, name in TERMS.items() if name in case["losses"]}
    assert {name: terms[name].item() for name in expected} == pytest.approx(expected, rel=tolerance)
    terms["loss"].backward()
    for name, parameter in student.named_parameters():
        norm = case["grad_norm"][name.replace("projections.0", "fit_dense")]
        if norm is not None and norm > 1e-12:
            found = parameter.grad.norm().item()
            assert found == pytest.approx(norm, rel=10 * tolerance, abs=1e-5 * (tolerance > 1e-8))


@pytest.mark.parametrize("more", [[], ["--bf16"], ["--fp16"]])
@pytest.mark.parametrize("number", [2, 6, 12])
def test_golden_training_from_the_command_line(golden, golden_models, golden_features, tmp_path, run_here, monkeypatch,
                                               number, more):
    monkeypatch.setattr(optimizer, "INITIAL_SCALE", 256.0)                  # so that no step is skipped
    case = golden["cases"][number]
    run_here(distill, *golden_training(case, golden_features, golden_models, tmp_path / "out"), "--device", "0", *more)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["device"] == "cuda:0"
    rows = log_of(tmp_path / "out")[:6]
    assert not any("skipped_steps" in row for row in rows)
    tolerance = GPU_TOLERANCES[more[0]][number] if more else 1e-4
    assert [row["loss"] for row in rows] == pytest.approx(case["training"]["total_loss_per_step"], rel=tolerance)


@pytest.mark.parametrize("more, tolerance", [([], 1e-5), (["--bf16"], 0.05), (["--fp16"], 0.01)])
def test_scores_equal_those_of_the_cpu(golden_models, tmp_path, run_here, more, tolerance):
    file = write_features(tmp_path / "test.pkl", random_rows(300), set_name="test")
    scores = []
    for device, flags in (("cpu", []), ("0", more)):
        run_here(reranker, *rerank_arguments(golden_models["teacher"], file, tmp_path / "scores.tsv"), "--device",
                 device, *flags)
        scores.append([score for *_, score in read_scores(tmp_path / "scores.tsv")])
    np.testing.assert_allclose(scores[1], scores[0], rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_packed_batches_are_as_exact_as_padded_ones(dtype):
    random = np.random.default_rng(0)
    lengths = random.integers(3, 200, 600).astype(np.uint16)
    pairs = Examples(random.integers(5, 30000, int(lengths.sum())).astype(np.uint16), lengths,
                     (lengths // 2).astype(np.uint16), np.zeros(600, np.int8))
    model = bert(3, 384, 0.0).eval()
    exact, packed = scoring.score_all(model, pairs), copy.deepcopy(model)
    assert "without padding" in scoring.prepare(packed, dtype, int8=False)
    errors = [np.abs(scoring.score_all(packed, pairs) - exact).mean()]
    to_half(model, dtype)
    errors.append(np.abs(scoring.score_all(model, pairs) - exact).mean())
    assert errors[0] < 1.2 * errors[1] and errors[1] < 0.03 * exact.std()


def run_both(run_here, golden_models, directory, more, on_gpu=()):
    """Train on the CPU and on the GPU, and return both logs and command lines."""
    train = write_features(directory / "train.pkl", random_rows(64))
    calls = {name: arguments(train, golden_models, directory / name, "--train_batch_size", 8, "--train_loss_step", 1,
                             "--learning_rate", 1e-3, "--save_model_step", 4, *more, *flags)
             for name, flags in (("cpu", ()), ("gpu", ("--device", "0", *on_gpu)))}
    for call in calls.values():
        run_here(distill, *call)
    return log_of(directory / "cpu"), log_of(directory / "gpu"), calls


@pytest.mark.parametrize("on_both, on_gpu, tolerance", [
    ([], [], 1e-3), ([], ["--tf32"], 0.02), ([], ["--compile"], 1e-3), (["--log_gradients"], [], 1e-3)])
@pytest.mark.parametrize("padding", ["reference", "masked"])
def test_training_equals_that_of_the_cpu(golden_models, tmp_path, run_here, padding, on_both, on_gpu, tolerance):
    cpu, gpu, _ = run_both(run_here, golden_models, tmp_path, ["--padding", padding, *on_both], on_gpu)
    names = [name for name in cpu[0] if name != "examples_per_second"]
    for one, two in zip(cpu, gpu, strict=True):
        assert one.keys() == two.keys()
        assert [two[name] for name in names] == pytest.approx([one[name] for name in names], rel=tolerance, abs=1e-6)


def test_a_gpu_resumes_what_a_cpu_began(golden_models, tmp_path, run_here):
    cpu, _, calls = run_both(run_here, golden_models, tmp_path, ["--padding", "masked"])
    begun = tmp_path / "cpu"
    for checkpoint in sorted(begun.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))[2:]:
        shutil.rmtree(checkpoint)
    record = json.loads((begun / "run.json").read_text())
    (begun / "run.json").write_text(json.dumps(record | {"finished": False}))
    call = [begun if flag == tmp_path / "gpu" else flag for flag in calls["gpu"]]
    assert "from another device" in run_here(distill, *call, "--resume")
    rows = log_of(begun)
    assert [row["step"] for row in rows] == [row["step"] for row in cpu]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in cpu], rel=1e-3)


@pytest.mark.parametrize("precision, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("hidden_size", [384, 312, 768])                    # heads of 32, 26 and 64
def test_gradients_equal_those_in_double_precision(precision, tolerance, hidden_size):
    """With the kernels of real head sizes and padding, unlike the golden models."""
    torch.manual_seed(0)
    student, teacher = bert(2, hidden_size, 0.0), bert(4, 384, 0.0).eval().requires_grad_(False)
    fit_projections(student, 384, torch.Generator().manual_seed(0))
    mask = (torch.arange(96) < torch.randint(20, 97, (8, 1))).long()
    data = Batch(torch.randint(30522, (8, 96)), torch.zeros(8, 96, dtype=torch.long), mask, torch.randint(2, (8,)))
    gradients = []
    for device, dtype in (("cpu", torch.float64), ("cuda", precision)):
        weights = torch.float64 if device == "cpu" else torch.float32
        models = [model.to(device, weights) for model in (student, teacher)]
        student.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=precision, enabled=dtype == torch.bfloat16):
            loss = loss_terms(*models, data.to(torch.device(device)), stage_weights("simplified")[0],
                              padding="masked")["loss"]
        loss.backward()
        gradients.append(torch.cat([weight.grad.flatten().double().cpu() for weight in student.parameters()
                                    if weight.grad is not None]))
    exact, found = gradients
    assert ((found - exact).norm() / exact.norm()).item() < tolerance


@pytest.mark.parametrize("more", [[], ["--bf16"]])
def test_the_gpu_computes_while_the_logits_of_a_chunk_are_read(more):
    """The logits of the first chunk are there before those of the second."""
    model = bert(12, 768, 0.0).eval()
    scoring.prepare(model, torch.bfloat16 if more else None, int8=False)
    pairs = Examples(np.full(512 * 128, 7, np.uint16), np.full(128, 512, np.uint16), np.full(128, 9, np.uint16),
                     np.zeros(128, np.int8))
    first = scoring.score_chunk(model, pairs, [np.arange(16)])
    second = scoring.score_chunk(model, pairs, [np.arange(128)] * 4)
    first.logits()
    assert not torch.cuda.current_stream().query(), "waited for the second chunk, too"
    assert np.isfinite(second.logits()).all() and torch.cuda.current_stream().query()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_two_gpus_give_the_same_student_and_scores_as_one(golden_models, tmp_path, run_here):
    def on_two(script, *flags):
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                        str(ROOT / script), *map(str, flags)], check=True, timeout=900)
    train = write_features(tmp_path / "train.pkl", random_rows(27))
    for name, more in (("reference", []), ("masked", ["--padding", "masked"])):
        flags = arguments(train, golden_models, tmp_path / name, "--device", "cuda", "--train_batch_size", 8,
                          "--train_loss_step", 1, "--learning_rate", 1e-3, "--gradient_accumulation_steps", 2, *more)
        on_two("distill.py", *flags)
        assert json.loads((tmp_path / name / "run.json").read_text())["device"] == "cuda:0"
        run_here(distill, *[tmp_path / f"{name}-of-one" if flag == tmp_path / name else flag for flag in flags])
        assert_same_student(tmp_path / f"{name}-of-one", tmp_path / name)
    pairs = write_features(tmp_path / "test.pkl", random_rows(300), set_name="test")
    for more in ([], ["--bf16"]):
        flags = rerank_arguments(golden_models["teacher"], pairs, tmp_path / "scores.tsv", "--device", "cuda",
                                 "--batch_tokens", 500, *more)
        run_here(reranker, *flags)
        whole = (tmp_path / "scores.tsv").read_bytes()
        on_two("reranker.py", *flags)
        assert (tmp_path / "scores.tsv").read_bytes() == whole


def bert(layers, hidden_size, dropout):
    return CrossEncoder(BertConfig(hidden_size=hidden_size, num_hidden_layers=layers, num_attention_heads=12,
                                   intermediate_size=4 * hidden_size, hidden_dropout_prob=dropout,
                                   attention_probs_dropout_prob=dropout)).cuda()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers, hidden_size", [(3, 384), (4, 312), (6, 768)])
def test_peak_memory_of_a_training_step_is_linear_in_the_length(precision, layers, hidden_size):
    """With a BERT-Base teacher, dropout 0.1 and batches of 32 padded pairs; without the memory of the models."""
    student, teacher = bert(layers, hidden_size, 0.1).train(), bert(12, 768, 0.1).eval().requires_grad_(False)
    fit_projections(student, 768, torch.Generator().manual_seed(0))
    student.cuda()
    peaks = []
    for length in (64, 128, 256, 512):                   # the first is a warm-up
        mask = (torch.arange(length) < torch.randint(length // 2, length, (32, 1))).long()
        data = Batch(torch.randint(30522, (32, length)), torch.zeros(32, length, dtype=torch.long), mask,
                     torch.randint(2, (32,))).to(torch.device("cuda"))
        student.zero_grad(set_to_none=False)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", dtype=precision, enabled=precision != torch.float32):
            loss = loss_terms(student, teacher, data, stage_weights("simplified")[0])["loss"]
        loss.backward()
        peaks.append((torch.cuda.max_memory_allocated() - before) / 2 ** 20)
        del loss, data
    print(f"{layers}/{hidden_size} {precision}: peak of a step at lengths 128, 256, 512: "
          + ", ".join(f"{peak:,.0f} MiB" for peak in peaks[1:]))
    assert peaks[2] < 2.2 * peaks[1] and peaks[3] < 2.2 * peaks[2]
