"""Parts of the model: activations and attention equal those of the libraries; dropout has the right statistics."""
import platform
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForSequenceClassification

from simplified_tinybert.common.device import read_ahead
from simplified_tinybert.data.features import Examples
from simplified_tinybert.model import bert
from simplified_tinybert.model.batch import Batch
from simplified_tinybert.model.bert import ACTIVATIONS, CrossEncoder, Dropout, attend, drop
from simplified_tinybert.model.gpu_scoring import GeluLinear, can_pack, fuse_gelu


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "gelu_fast", "quick_gelu", "mish", "linear"])
def test_activations_are_those_of_transformers(activation):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
                        max_position_embeddings=16, hidden_act=activation, num_labels=2, initializer_range=0.5)
    theirs = BertForSequenceClassification(config).eval().double()
    ours = CrossEncoder(config).eval().double()
    ours.load_state_dict(theirs.state_dict())
    ids, mask = torch.randint(0, 50, (3, 12)), torch.ones(3, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    segments = (torch.arange(12) > 4).long().expand(3, 12)
    expected = theirs(input_ids=ids, attention_mask=mask, token_type_ids=segments).logits
    torch.testing.assert_close(ours(Batch(ids, segments, mask)).logits, expected, rtol=1e-10, atol=1e-10)


def attention_of_each_example(query, key, value, starts, key_starts, longest, longest_key, *settings):
    """What FlashAttention computes for examples without padding, (T, H, d). A CPU has no such kernel."""
    assert starts.dtype == key_starts.dtype == torch.int32
    assert (longest, longest_key) == (starts.diff().max(), key_starts.diff().max())
    outputs = []
    for example in range(len(starts) - 1):
        own, keys, values = (tensor[begin[example]:begin[example + 1]] for tensor, begin in (
            (query, starts), (key, key_starts), (value, key_starts)))
        scores = torch.einsum("qhd,khd->hqk", own, keys) / own.shape[-1] ** 0.5
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(outputs), query.new_empty(query.shape[1], len(query), dtype=torch.float32), query.new_empty(
        2, dtype=torch.uint64)


@pytest.fixture(scope="module")
def packed_attention_on_cpus():
    """PyTorch's operator for packed batches, with a kernel for CPUs."""
    from torch.nn.attention import varlen
    varlen._varlen_attn.register_kernel("cpu")(attention_of_each_example)


@pytest.mark.parametrize("compiled", [False, True])
def test_packed_batches_have_the_logits_of_padded_ones(packed_attention_on_cpus, compiled):
    """Also of batches with one example, with examples of equal lengths, and as --compile does it."""
    torch.manual_seed(0)
    model = CrossEncoder(BertConfig(vocab_size=50, hidden_size=24, num_hidden_layers=3, num_attention_heads=4,
                                    intermediate_size=96, max_position_embeddings=16, num_labels=2)).eval().double()
    random, lengths = np.random.default_rng(0), np.array([16, 5, 9, 9, 3, 12], np.uint16)
    examples = Examples(random.integers(0, 50, int(lengths.sum())).astype(np.uint16), lengths, lengths // 2,
                        np.zeros(6, np.int8))
    torch.compiler.reset()
    scorer = torch.compile(model, backend="aot_eager", dynamic=True, fullgraph=True) if compiled else model
    with torch.inference_mode():
        for indices in (np.arange(6), np.array([4]), np.array([2, 3]), np.array([5, 0, 4])):
            packed = scorer(examples.packed_batch(indices, torch.device("cpu"))).logits
            torch.testing.assert_close(packed, model(examples.batch(indices)).logits, rtol=1e-10, atol=1e-10)


def test_gelu_in_the_product():
    """Exact on a CPU, the tanh approximation on a GPU. Only a GPU's bfloat16 encoders are changed."""
    torch.manual_seed(0)
    layer, inputs = torch.nn.Linear(24, 96), torch.randn(2, 5, 24)
    torch.testing.assert_close(GeluLinear(layer)(inputs), F.gelu(layer(inputs)), rtol=0, atol=5e-4)
    model = CrossEncoder(BertConfig(vocab_size=50, hidden_size=24, num_hidden_layers=1, num_attention_heads=4))
    assert not fuse_gelu(model.bfloat16()) and not can_pack(model)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 150), st.integers(1, 9), st.booleans(),
       st.integers(0, 2 ** 31 - 1))
def test_attention_in_blocks_equals_fused_attention(batch, heads, length, size, padded, seed):
    torch.manual_seed(seed)
    query, key, value = torch.randn(3, batch, heads, length, size, dtype=torch.float64).requires_grad_().unbind()
    mask = None
    if padded:
        lengths = torch.randint(1, length + 1, (batch, 1, 1, 1))
        mask = torch.arange(length) < lengths                                                # (B, 1, 1, L)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    found = attend(query, key, value, mask, dropout=2.0 ** -20)         # rounds to no dropout, on the dropout path
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    weight = torch.randn_like(expected)
    for one, other in zip(torch.autograd.grad((found * weight).sum(), (query, key, value)),
                          torch.autograd.grad((expected * weight).sum(), (query, key, value))):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("size", [8, 12, 26, 64])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_on_a_gpu_equals_that_on_a_cpu(size, padded):
    """Heads are padded to a size that has fast kernels. Gradients are those of the heads before padding."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 20, size, dtype=torch.float64).requires_grad_().unbind()
    tokens = (torch.arange(20) < torch.tensor([20, 13])[:, None, None, None]) if padded else None
    mask = torch.zeros(tokens.shape, dtype=torch.float64).masked_fill(~tokens, -torch.inf) if padded else None
    results = [bert._attend_on_gpu(query, key, value, mask, 0.0), attend(query, key, value, tokens, 0.0)]
    assert bert.pad_heads(query).shape[-1] % 8 == 0
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(result.sin().sum(), (query, key, value)) for result in results]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_dropout_rate_and_mean(probability):
    torch.manual_seed(0)
    count = 1_000_003                                                   # not a multiple of four: 64 bits serve four
    dropped = drop(torch.ones(count), probability)
    error = 5 * (probability * (1 - probability) / count) ** 0.5        # five standard errors
    assert abs(float((dropped == 0).double().mean()) - probability) < error + 2 ** -17
    kept = dropped[dropped != 0]
    assert kept.unique().numel() == 1 and abs(float(kept[0]) * (1 - probability) - 1) < 2e-4
    neighbours = np.corrcoef((dropped[:-1] == 0).numpy(), (dropped[1:] == 0).numpy())[0, 1]
    assert abs(neighbours) < 5 / count ** 0.5


def test_gradients_of_dropout():
    inputs = torch.randn(7, 5, 13, requires_grad=True)
    outputs = drop(inputs, 0.3)
    outputs.sum().backward()
    assert torch.equal(inputs.grad == 0, outputs == 0)
    torch.testing.assert_close(inputs.grad * inputs.detach(), outputs.detach())


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_dropout_of_nothing_and_of_everything(probability):
    inputs = torch.randn(9, dtype=torch.bfloat16)
    assert torch.equal(drop(inputs, probability), inputs * (1 - probability))


def test_dropout_follows_the_seed_and_is_off_in_evaluation():
    layer, inputs, found = Dropout(0.5), torch.randn(64), []
    for _ in range(2):
        torch.manual_seed(7)
        found.append(layer(inputs))
    assert torch.equal(*found) and not torch.equal(found[0], layer(inputs))
    assert layer.eval()(inputs) is inputs


def test_read_ahead_preserves_items_and_errors():
    def broken():
        yield 1
        raise ValueError("the second item")

    def counted():
        for number in range(3):
            fetched.append(number)
            yield number

    fetched = []
    items = read_ahead(counted())
    assert next(items) == 0
    wait_until = time.monotonic() + 300
    while fetched != [0, 1] and time.monotonic() < wait_until:
        time.sleep(0.01)
    assert fetched == [0, 1]                            # the second item is fetched while the first is used
    assert list(items) == [1, 2] and list(read_ahead(iter([]))) == []
    ahead = read_ahead(broken())
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="the second item"):
        next(ahead)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize("kept", [True, False])
def test_freed_memory_is_kept(kept):
    """Count page faults while large tensors are allocated and freed, in a new process."""
    code = f"""
import resource, torch
from simplified_tinybert.common.device import keep_freed_memory
if {kept}:
    keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(2 ** 24).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (int(done.stdout) < 1000) is kept            # 64 MiB are 16,384 pages


def test_attention_with_dropout_is_computed_in_float32_under_autocast():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 90, 16).unbind()
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attend(query.bfloat16(), key.bfloat16(), value.bfloat16(), None, dropout=2.0 ** -20)
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).norm() / exact.norm() < 5e-3         # the inputs' rounding; 7e-3 in bfloat16
