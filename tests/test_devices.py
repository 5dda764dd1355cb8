"""The choice of a device, full memory, and what is done differently on a GPU, as far as a CPU can show it."""
from functools import partial

import numpy as np
import pytest
import torch
from conftest import random_rows, write_features
from helpers.reranking import arguments as rerank_arguments
from helpers.reranking import read_scores
from helpers.training import arguments

import distill
import reranker
from simplified_tinybert.common import device as device_module
from simplified_tinybert.common.device import explain_full_memory, padded_length, select_device
from simplified_tinybert.common.files import UserError
from simplified_tinybert.data import features
from simplified_tinybert.model.batch import Batch
from simplified_tinybert.model.bert import CrossEncoder, LayerOutputs
from simplified_tinybert.model.precision import autocast, cast_linear_layers, warn_if_slow
from simplified_tinybert.model.pretrained import fit_projections, load_cross_encoder
from simplified_tinybert.ranking import scoring
from simplified_tinybert.training.losses import attention_loss
from simplified_tinybert.training.objective import ObjectiveSettings, objective, stage_weights, total_loss

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpus(monkeypatch):
    """Set the number of visible GPUs and the variables of a job."""
    def visible(count: int, **variables: object) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
    return visible


def test_a_task_of_slurm_that_sees_one_gpu_takes_it(gpus):
    gpus(1, RANK=3, LOCAL_RANK=3, WORLD_SIZE=4)
    assert select_device("auto") == select_device("cuda") == GPU
    gpus(1, RANK=3, LOCAL_RANK=3, WORLD_SIZE=4, LOCAL_WORLD_SIZE=4)         # torchrun: four processes for one GPU
    with pytest.raises(UserError, match="1 CUDA devices are available for 4 processes"):
        select_device("auto")
    gpus(4, RANK=3, LOCAL_RANK=3, WORLD_SIZE=4)
    assert select_device("auto") == torch.device("cuda", 3)


def test_a_driver_that_pytorch_cannot_use_is_reported(gpus, monkeypatch, tmp_path, capsys):
    gpus(0)
    monkeypatch.setattr(device_module, "NVIDIA_DRIVER", str(tmp_path / "version"))
    assert select_device("auto") == CPU and capsys.readouterr().err == ""
    (tmp_path / "version").touch()

    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update it.")
    monkeypatch.setattr(torch.cuda, "init", too_old)
    assert select_device("auto") == CPU
    assert "driver on your system is too old (found version 11040)" in capsys.readouterr().err
    assert select_device("auto", no_cuda=True) == select_device("cpu") == CPU and capsys.readouterr().err == ""


def test_full_memory_is_one_line():
    with pytest.raises(UserError, match=r"the memory is full \(.*can't allocate memory.*\); use less"), \
            explain_full_memory("use less"):
        torch.empty(2 ** 60)
    with pytest.raises(UserError, match=r"CUDA out of memory\. Tried .*; use less"), explain_full_memory("use less"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")
    for words in ("CUDA error: out of memory\nCUDA kernel errors might be reported later",
                  "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"):
        with pytest.raises(UserError, match="the memory is full"), explain_full_memory("use less"):
            raise RuntimeError(words)                   # torch.AcceleratorError is one
    with pytest.raises(RuntimeError, match="something else"), explain_full_memory("use less"):
        raise RuntimeError("something else")


@pytest.mark.parametrize("script, advice", [(distill, "lower --train_batch_size, and raise --gradient_acc"),
                                            (reranker, "lower --batch_tokens")])
def test_scripts_say_what_to_do_if_memory_is_full(golden_models, tmp_path, run_here, monkeypatch, script, advice):
    def full(self, batch: Batch, layers: object = None) -> LayerOutputs:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    kind = "train" if script is distill else "test"
    file = write_features(tmp_path / "features.pkl", random_rows(20), set_name=kind)
    call = arguments(file, golden_models, tmp_path / "out") if script is distill else \
        rerank_arguments(golden_models["teacher"], file, tmp_path / "scores.tsv")
    monkeypatch.setattr(CrossEncoder, "forward", full)
    with pytest.raises(UserError, match=advice):
        run_here(script, *call)


@pytest.mark.parametrize("flag", ["--tf32", "--fp16", "--compile"])
def test_flags_that_need_a_gpu(golden_models, tmp_path, run_here, flag):
    file = write_features(tmp_path / "train.pkl", random_rows(20))
    with pytest.raises(UserError, match=f"{flag} needs a CUDA device"):
        run_here(distill, *arguments(file, golden_models, tmp_path / "out", flag))
    with pytest.raises(UserError, match="--bf16 and --tf32: choose one of them"):
        run_here(distill, *arguments(file, golden_models, tmp_path / "out", "--tf32", "--bf16"))


def test_what_is_set_for_a_gpu(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90a", "sm_120", "compute_120"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    before = torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()
    try:
        device_module.prepare_device(GPU)
        assert (torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()) == (before[0], False)
        device_module.prepare_device(GPU, tf32=True)
        assert torch.get_float32_matmul_precision() == "high" and current == [GPU, GPU]
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cuda.enable_cudnn_sdp(before[1])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    with pytest.raises(UserError, match=r"no kernels for Tesla V100 \(compute capability 7\.0\)"):
        device_module.prepare_device(GPU)


@pytest.mark.parametrize("longest, limit, expected", [(1, 512, 16), (16, 512, 16), (17, 512, 32), (500, 512, 512),
                                                      (500, 500, 500), (40, 45, 45)])
def test_lengths_on_a_gpu_are_multiples_of_16(longest, limit, expected):
    assert padded_length(longest, GPU, limit) == expected
    assert padded_length(longest, CPU, limit) == longest


def test_scores_do_not_depend_on_rounded_lengths_and_chunks_in_work(golden_models, tmp_path, run_here, monkeypatch):
    """As on a GPU: the same bytes with chunks in work; the same scores up to rounding with longer padding."""
    monkeypatch.setattr(features, "CHUNK_EXAMPLES", 40)
    file = write_features(tmp_path / "test.pkl", random_rows(130), set_name="test")
    call = rerank_arguments(golden_models["teacher"], file, tmp_path / "scores.tsv", "--batch_tokens", 200)
    run_here(reranker, *call)
    before, scores = (tmp_path / "scores.tsv").read_bytes(), read_scores(tmp_path / "scores.tsv")
    for ahead in (1, 2, 9):
        monkeypatch.setitem(scoring.AHEAD, "cpu", ahead)
        run_here(reranker, *call)
        assert (tmp_path / "scores.tsv").read_bytes() == before
    monkeypatch.setattr(scoring, "padded_length", lambda longest, device, limit: padded_length(longest, GPU, limit))
    run_here(reranker, *call)
    after = read_scores(tmp_path / "scores.tsv")
    assert [row[:2] for row in after] == [row[:2] for row in scores]
    np.testing.assert_allclose([row[2] for row in after], [row[2] for row in scores], rtol=1e-5)


def test_a_teacher_that_is_cast_once_computes_the_same_bits(golden_models, golden_features):
    """`autocast` converts the weights of linear layers in every step; `cast_linear_layers` does it once."""
    batch = next(features.read_chunks(golden_features)).batch(np.arange(6))
    outputs = []
    for cast in (False, True):
        model, _ = load_cross_encoder(golden_models["teacher"])
        if cast:
            cast_linear_layers(model.eval(), torch.bfloat16)
        with torch.inference_mode(), autocast(CPU, torch.bfloat16):
            outputs.append(model.eval()(batch, layers=[1, 2]))
    one, two = outputs
    assert torch.equal(one.logits, two.logits)
    for name in ("hidden_states", "queries", "keys"):
        for number, tensor in getattr(one, name).items():
            assert torch.equal(tensor, getattr(two, name)[number]) and tensor.dtype == getattr(two, name)[number].dtype


class Tf32Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Round the inputs of batched products to the 10-bit mantissas of TF32, as a GPU does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.bmm.default:
            args = [(tensor.view(torch.int32) + 0x1000 & -0x2000).view(torch.float32)
                    for tensor in (argument.contiguous() for argument in args)]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("padding", ["reference", "masked"])
@pytest.mark.parametrize("size, distance, error, gradient_error", [(32, 1.0, 1e-6, 2e-3), (32, 0.1, 1e-4, 2e-2),
                                                                   (64, 1.0, 1e-3, 2e-3), (64, 0.1, 1e-3, 2e-3)])
def test_error_of_tf32_in_the_attention_loss(padding, size, distance, error, gradient_error):
    """With queries and keys from bfloat16: student and teacher heads of 32 and 64 (3/384 and 12/768), or both 64.

    distance: of the student from its teacher, in standard deviations. Products of heads of 32 are exact; 1e-4 is the
    error of float32 sums near the teacher. A gradient is rounded to bfloat16 afterwards, a relative error of 4e-3.
    """
    generator = torch.Generator().manual_seed(0)
    teacher = [torch.randn(2, 4, 128, 64, generator=generator) for _ in range(2)]
    noise = [torch.randn(2, 4, 128, 64, generator=generator) for _ in range(2)]
    student = [tensor + distance * more for tensor, more in zip(teacher, noise, strict=True)]
    if size == 32:                                      # the teacher's second half is zero, so the student can be near
        teacher = [torch.cat([tensor[..., :32], torch.zeros_like(tensor[..., 32:])], dim=-1) for tensor in teacher]
        student = [(tensor[..., :32] * 0.5 ** 0.25) for tensor in student]
    teacher = [tensor.bfloat16().float() for tensor in teacher]
    student = [tensor.bfloat16().float().requires_grad_() for tensor in student]
    mask = (torch.arange(128) < torch.tensor([128, 70])[:, None]).long()
    exact = attention_loss(*(tensor.double() for tensor in (*student, *teacher)), mask, padding)
    gradients = torch.autograd.grad(exact, student)
    with Tf32Products():
        found = attention_loss(*student, *teacher, mask, padding)
        found_gradients = torch.autograd.grad(found, student)
    assert found.item() == pytest.approx(exact.item(), rel=error)
    for one, two in zip(gradients, found_gradients, strict=True):
        assert ((one - two).norm() / one.norm()).item() < gradient_error


@pytest.mark.parametrize("dtype, precision, native, noted", [
    (None, "highest", True, True), (None, "high", True, False), (None, "highest", False, False),
    (torch.float16, "highest", True, False)])
def test_float32_on_a_gpu_is_noted_as_slow(monkeypatch, capsys, dtype, precision, native, noted):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    warn_if_slow(dtype, GPU)
    assert ("would be several times as fast" in capsys.readouterr().err) == noted


@pytest.mark.parametrize("native", [True, False])
def test_bf16_on_a_gpu_without_its_instructions(monkeypatch, capsys, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    warn_if_slow(torch.bfloat16, GPU)
    assert ("this GPU has no bfloat16 instructions" in capsys.readouterr().err) == (not native)


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["reference", "masked"])
def test_compiled_models_have_no_graph_breaks_and_give_the_same_bits(golden_models, tmp_path, padding):
    """As --compile does it, but the compiler only records operations (aot_eager). Batches have different shapes."""
    def compiled(function):
        torch.compiler.reset()
        return torch.compile(function, backend="aot_eager", dynamic=True, fullgraph=True)
    teacher, _ = load_cross_encoder(golden_models["teacher"])
    student, _ = load_cross_encoder(golden_models["student_2x24"])
    teacher.eval().requires_grad_(False)
    fit_projections(student.train(), teacher.config.hidden_size, torch.Generator().manual_seed(0))
    weights = stage_weights("simplified")[0]
    terms = partial(objective, student, teacher, settings=ObjectiveSettings(weights=weights, padding=padding))
    examples = next(features.read_chunks(write_features(tmp_path / "train.pkl", random_rows(40))))
    results, compiled_terms = [], compiled(terms)
    for function in (terms, compiled_terms):
        for indices in (np.arange(4), np.arange(4, 12), np.arange(20, 30)):
            student.zero_grad()
            loss = total_loss(function(examples.batch(indices)), weights)["loss"]
            loss.backward()
            gradients = [weight.grad for weight in student.parameters() if weight.grad is not None]
            results.append([loss.detach(), *gradients])
    for one, two in zip(results[:3], results[3:], strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, two, strict=True))
    with torch.inference_mode():
        batches = [examples.batch(np.arange(0, 9)), examples.batch(np.arange(18, 40))]
        expected = [teacher(batch).logits for batch in batches]
        scorer = compiled(teacher)
        assert all(torch.equal(scorer(batch).logits, logits) for batch, logits in zip(batches, expected, strict=True))
