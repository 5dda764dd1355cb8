"""Re-ranking in half precision and in 8 bits: close to float32, and without ties caused by rounding."""
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_rows, write_features
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import reranker
from simplified_tinybert.common.files import UserError
from simplified_tinybert.data.features import read_chunks
from simplified_tinybert.model.cpu_linear import (
    WEIGHT_LEVELS,
    Int8Linear,
    PackedLinear,
    overflows,
    pack_linear_layers,
    quantize_linear_layers,
)
from simplified_tinybert.model.precision import to_half
from simplified_tinybert.model.pretrained import load_cross_encoder, read_config

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
BITS = 7 if overflows() else 8          # of weights on this CPU


@pytest.fixture
def features(tmp_path):
    return write_features(tmp_path / "features.pkl", random_rows(60), set_name="test")


def logits_of(model, features) -> torch.Tensor:
    chunk = next(read_chunks(features))
    with torch.inference_mode():
        return model(chunk.batch(np.arange(len(chunk)))).logits


def linear(weight, bias) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(weight))
        layer.bias.copy_(torch.as_tensor(bias))
    return layer


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(2, 70), st.integers(1, 20), st.booleans(), st.integers(0, 2 ** 31 - 1))
def test_integers_are_exact(outputs, inputs, rows, largest, seed):
    """Integers that fit the number of bits are not rounded, so products are exact.

    This includes the largest ones, for which sums of two products overflow 16 bits if weights have too many bits.
    """
    most = WEIGHT_LEVELS[BITS]
    random = np.random.default_rng(seed)
    values = random.integers(0, 256, (rows, inputs)) * (random.random((rows, inputs)) < 0.9)
    weight, bias = random.integers(-most, most + 1, (outputs, inputs)), random.integers(-9, 10, outputs)
    if largest:
        values, weight = np.full_like(values, 255), np.full_like(weight, most)
    weight[:, 0], values[:, 0], values[:, 1] = most, 255, 0           # makes all scales 1
    lower = random.integers(-1000, 1000, (rows, 1)) * 1.0           # rows have different offsets and scales
    scale = random.choice([0.125, 1.0, 32.0], (rows, 1))
    float_inputs = (values * scale + lower).astype(np.float32)
    product = Int8Linear(linear(weight, bias), BITS)(torch.from_numpy(float_inputs))
    exact = float_inputs.astype(np.float64) @ weight.T + bias
    size = np.abs(float_inputs).astype(np.float64) @ np.abs(weight).T + 9
    assert (np.abs(product.detach().numpy() - exact) <= 1e-5 * size).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 20), st.integers(0, 2 ** 31 - 1))
def test_quantization_error_is_bounded(outputs, inputs, rows, seed):
    random = np.random.default_rng(seed)
    weight, bias = (random.standard_normal(shape) for shape in ((outputs, inputs), outputs))
    values = random.standard_normal((rows, inputs)) * 10.0 ** random.integers(-3, 4, (rows, 1))
    values, weight = values.astype(np.float32).astype(np.float64), weight.astype(np.float32).astype(np.float64)
    product = Int8Linear(linear(weight, bias), BITS)(torch.from_numpy(values).float()).detach().numpy()
    step, weight_step = np.ptp(values, axis=1, keepdims=True) / 255, np.abs(weight).max(axis=1) / WEIGHT_LEVELS[BITS]
    bound = (step * (np.abs(weight) + weight_step[:, None] / 2).sum(axis=1)
             + np.abs(values).sum(axis=1, keepdims=True) * weight_step) / 2
    size = np.abs(values) @ np.abs(weight).T + np.abs(bias)
    assert (np.abs(product - (values @ weight.T + bias)) <= 1.001 * bound + 1e-5 * size).all()


def test_rows_are_independent():
    torch.manual_seed(0)
    layer, rows = Int8Linear(nn.Linear(64, 16), BITS), torch.randn(12, 64)
    rows[0] *= 1e4
    rows[1] = torch.nan
    rows[2, 3] = torch.inf
    rows[3] = 0.7
    with torch.inference_mode():
        found = layer(rows)
        assert found[1:3].isnan().all()
        for number in (0, *range(3, 12)):
            torch.testing.assert_close(found[number], layer(rows[number:number + 1])[0], rtol=1e-5, atol=1e-6)


def test_each_output_has_its_own_scale():
    layer = nn.Linear(32, 2)
    with torch.no_grad():
        layer.weight[0] *= 1e-4
    inputs = torch.rand(50, 32)
    product, expected = Int8Linear(layer, BITS)(inputs).detach(), layer(inputs).detach()
    error = (product - expected).abs().amax(dim=0) / (inputs @ layer.weight.detach().abs().T).amax(dim=0)
    assert error.max() < 0.02


@pytest.mark.parametrize("engine", [name for name in torch.backends.quantized.supported_engines if name != "none"])
def test_all_kernels_agree(engine):
    """PyTorch uses FBGEMM, oneDNN or QNNPACK, depending on the CPU."""
    torch.manual_seed(0)
    layer, inputs = nn.Linear(96, 24), torch.randn(30, 96)
    expected = Int8Linear(layer, 7)(inputs)
    before = torch.backends.quantized.engine
    try:
        torch.backends.quantized.engine = engine
        torch.testing.assert_close(Int8Linear(layer, 7)(inputs), expected, rtol=1e-4, atol=1e-4)
    finally:
        torch.backends.quantized.engine = before


def test_a_pytorch_without_8_bit_kernels(golden_models, monkeypatch):
    model, _ = load_cross_encoder(golden_models["teacher"])
    monkeypatch.setattr(torch._C, "_get_qengine", lambda: 0)            # as on an unsupported CPU
    with pytest.raises(UserError, match="--int8: .*no 8-bit kernels"):
        quantize_linear_layers(model)


def test_an_output_with_zero_weights_equals_its_bias():
    layer = nn.Linear(8, 3)
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(Int8Linear(layer, BITS)(torch.rand(4, 8)), layer.bias.detach().expand(4, 3))


def test_int8_replaces_only_the_encoder_and_stays_close(golden_models, features):
    model, _ = load_cross_encoder(golden_models["teacher"])
    exact = logits_of(model, features)
    quantize_linear_layers(model)
    left = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert left == ["bert.pooler.dense", "classifier"]
    assert sum(isinstance(module, Int8Linear) for module in model.modules()) == 6 * model.config.num_hidden_layers
    rounded = logits_of(model, features)
    # Tiny models with random weights lose most: 0.1 with 8 bits, 0.2 with 7 bits, whose steps are twice as large
    bound = 0.15 * WEIGHT_LEVELS[8] / WEIGHT_LEVELS[BITS]
    assert 0 < (rounded - exact).abs().max() < bound * exact.std()
    assert np.corrcoef(rounded[:, 1], exact[:, 1])[0, 1] > 0.98


@needs_onednn
@settings(max_examples=50, deadline=None)
@given(st.integers(1, 130), st.integers(1, 130), st.integers(1, 5), st.integers(1, 40), st.booleans(),
       st.integers(0, 2 ** 31 - 1))
def test_packed_layers_give_the_same_outputs(outputs, inputs, batch, length, gelu, seed):
    torch.manual_seed(seed)
    layer, values = nn.Linear(inputs, outputs), torch.randn(batch, length, inputs) * 3
    expected = F.gelu(layer(values)) if gelu else layer(values)
    with torch.inference_mode():
        assert torch.allclose(PackedLinear(layer, gelu)(values), expected.detach(), rtol=1e-5, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_a_packed_model_gives_the_same_scores_and_layers(golden_models, features, activation):
    config = read_config(golden_models["teacher"])
    config.hidden_act = activation
    model, _ = load_cross_encoder(golden_models["teacher"], config)
    packed, chunk = copy.deepcopy(model), next(read_chunks(features))
    pack_linear_layers(packed)
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) == 6 * config.num_hidden_layers
    batch = chunk.batch(np.arange(len(chunk)))
    with torch.inference_mode():
        for layers in (None, [1, config.num_hidden_layers]):
            expected, found = model(batch, layers), packed(batch, layers)
            assert torch.allclose(found.logits, expected.logits, atol=1e-5)
            for name in ("hidden_states", "queries", "keys"):
                for number, tensor in getattr(expected, name).items():
                    assert torch.allclose(getattr(found, name)[number], tensor, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_head_stays_in_float32(golden_models, features, dtype):
    """Logits in half precision have 8 or 11 bits, and would tie."""
    model, _ = load_cross_encoder(golden_models["teacher"])
    exact, half = logits_of(model, features), copy.deepcopy(model)
    to_half(half, dtype)
    logits = logits_of(half, features)
    assert logits.dtype == torch.float32 and (logits.to(dtype).float() != logits).float().mean() > 0.9
    assert (logits - exact).abs().max() < 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert logits_of(model, features).dtype == torch.float32


def test_int8_on_the_command_line(golden_models, features, tmp_path, run_here):
    scores = {}
    for flag in ([], ["--int8"]):
        output = tmp_path / f"scores{len(flag)}.tsv"
        run_here(reranker, "--model_dir", golden_models["teacher"], "--features_file", features,
                 "--output_scores_file", output, "--device", "cpu", *flag)
        scores[len(flag)] = [float(line.split("\t")[2]) for line in output.read_text().splitlines()]
    difference = np.abs(np.array(scores[0]) - np.array(scores[1]))
    assert 0 < difference.max() < 0.05 * WEIGHT_LEVELS[8] / WEIGHT_LEVELS[BITS]


def test_int8_does_not_hide_a_broken_model(golden_models, features):
    """Rounding would turn NaN into a plausible number."""
    model, _ = load_cross_encoder(golden_models["teacher"])
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.bert.encoder.layer[0].intermediate.dense.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"layer\.0\.intermediate\.dense\.weight is NaN or infinite"):
        quantize_linear_layers(broken)
    quantize_linear_layers(model)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[5:] = 1e38          # overflows in later layers
    assert not logits_of(model, features).isfinite().any()


@pytest.mark.parametrize("flag", ["--bf16", "--fp16"])
def test_int8_excludes_other_precisions(golden_models, features, tmp_path, run_here, flag):
    with pytest.raises(UserError, match=f"{flag} and --int8: choose one of them"):
        run_here(reranker, "--model_dir", golden_models["teacher"], "--features_file", features,
                 "--output_scores_file", tmp_path / "scores.tsv", "--device", "cpu", "--int8", flag)
