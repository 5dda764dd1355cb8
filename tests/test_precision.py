"""Re-ranking in half precision and in 8 bits: close to float32, and without ties that rounding makes."""
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
from simplified_tinybert.checkpoints import load_cross_encoder, read_config
from simplified_tinybert.cpu_linear import (
    Int8Linear,
    PackedLinear,
    pack_linear_layers,
    quantize_linear_layers,
    saturates,
)
from simplified_tinybert.features import read_chunks
from simplified_tinybert.files import UserError
from simplified_tinybert.precision import to_half

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")


@pytest.fixture
def features(tmp_path):
    return write_features(tmp_path / "features.pkl", random_rows(60), set_name="test")


def logits_of(model, features) -> torch.Tensor:
    chunk = next(read_chunks(features))
    with torch.inference_mode():
        return model(chunk.batch(np.arange(len(chunk)))).logits


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 20), st.integers(0, 2 ** 31 - 1))
def test_whole_numbers_come_out_exactly(outputs, inputs, rows, seed):
    """Numbers that 7 bits hold need no rounding, so that the 8-bit product is the product."""
    random = np.random.default_rng(seed)
    layer, values = nn.Linear(inputs, outputs), random.integers(0, 128, (rows, inputs))
    weight, bias = random.integers(-127, 128, (outputs, inputs)), random.integers(-9, 10, outputs)
    weight[:, 0], values[0, 0] = 127, 127                           # which makes all scales 1 (inputs: 127 / 127)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(bias))
    product = Int8Linear(layer, reduce_range=True)(torch.from_numpy(values).float())
    assert np.abs(product.detach().numpy() - (values @ weight.T + bias)).max() <= 1e-5 * 127 * 127 * inputs ** 0.5


def test_every_output_has_its_own_scale():
    layer = nn.Linear(32, 2)
    with torch.no_grad():
        layer.weight[0] *= 1e-4
    inputs = torch.rand(50, 32)
    product, expected = Int8Linear(layer, saturates())(inputs).detach(), layer(inputs).detach()
    error = (product - expected).abs().amax(dim=0) / (inputs @ layer.weight.detach().abs().T).amax(dim=0)
    assert error.max() < 0.02


def test_an_output_without_weights_is_its_bias():
    layer = nn.Linear(8, 3)
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(Int8Linear(layer, False)(torch.rand(4, 8)), layer.bias.detach().expand(4, 3))


def test_int8_replaces_the_encoder_alone_and_stays_close(golden_models, features):
    model, _ = load_cross_encoder(golden_models["teacher"])
    exact = logits_of(model, features)
    quantize_linear_layers(model)
    left = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert left == ["bert.pooler.dense", "classifier"]
    assert sum(isinstance(module, Int8Linear) for module in model.modules()) == 6 * model.config.num_hidden_layers
    rounded = logits_of(model, features)
    assert 0 < (rounded - exact).abs().max() < 0.15 * exact.std()      # a tiny model of random weights: 0.1
    assert np.corrcoef(rounded[:, 1], exact[:, 1])[0, 1] > 0.98


@needs_onednn
@settings(max_examples=50, deadline=None)
@given(st.integers(1, 130), st.integers(1, 130), st.integers(1, 5), st.integers(1, 40), st.booleans(),
       st.integers(0, 2 ** 31 - 1))
def test_packed_layers_give_the_same_products(outputs, inputs, batch, length, gelu, seed):
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
def test_half_precision_ends_before_the_head(golden_models, features, dtype):
    """Logits in half precision have 8 or 11 bits and tie; these are float32."""
    model, _ = load_cross_encoder(golden_models["teacher"])
    exact, half = logits_of(model, features), copy.deepcopy(model)
    to_half(half, dtype)
    logits = logits_of(half, features)
    assert logits.dtype == torch.float32 and (logits.to(dtype).float() != logits).float().mean() > 0.9
    assert (logits - exact).abs().max() < 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert logits_of(model, features).dtype == torch.float32


def test_int8_on_the_command_line(golden_models, features, tmp_path, run_main):
    scores = {}
    for flag in ([], ["--int8"]):
        output = tmp_path / f"scores{len(flag)}.tsv"
        run_main(reranker, "--model_dir", golden_models["teacher"], "--features_file", features,
                 "--output_scores_file", output, "--device", "cpu", *flag)
        scores[len(flag)] = [float(line.split("\t")[2]) for line in output.read_text().splitlines()]
    difference = np.abs(np.array(scores[0]) - np.array(scores[1]))
    assert 0 < difference.max() < 0.05


def test_int8_does_not_hide_a_broken_model(golden_models, features):
    """Rounding turns what is no number into one that looks like any other."""
    model, _ = load_cross_encoder(golden_models["teacher"])
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.bert.encoder.layer[0].intermediate.dense.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"layer\.0\.intermediate\.dense\.weight holds values that are not numbers"):
        quantize_linear_layers(broken)
    quantize_linear_layers(model)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[5:] = 1e38          # which overflows further on
    assert not logits_of(model, features).isfinite().any()


@pytest.mark.parametrize("flag", ["--bf16", "--fp16"])
def test_int8_goes_with_nothing_else(golden_models, features, tmp_path, run_main, flag):
    with pytest.raises(UserError, match="--int8: runs on a CPU alone and not with --fp16 or --bf16"):
        run_main(reranker, "--model_dir", golden_models["teacher"], "--features_file", features,
                 "--output_scores_file", tmp_path / "scores.tsv", "--device", "cpu", "--int8", flag)
