"""BertAdam against its definition, one parameter tensor at a time."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from simplified_tinybert.training import optimizer as optimizer_module
from simplified_tinybert.training.optimizer import BertAdam, LossScaler, decay_groups, linear_warmup_decay


def naive_step(parameter, gradient, mean, square, rate, decay):
    norm = gradient.norm()
    if norm > 1:
        gradient = gradient / (norm + 1e-6)
    mean = 0.9 * mean + 0.1 * gradient
    square = 0.999 * square + 0.001 * gradient ** 2
    update = mean / (square.sqrt() + 1e-6) + decay * parameter
    return parameter - rate * update, mean, square


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(1, 12), st.floats(0, 0.9), st.integers(0, 999),
       st.floats(0.01, 30))
def test_against_definition(sizes, total, warmup, seed, scale):
    torch.manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(size, size, dtype=torch.float64)) for size in sizes]
    expected = [(p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    named = [(f"{number}.{'bias' if number % 2 else 'weight'}", p) for number, p in enumerate(parameters)]
    optimizer = BertAdam(decay_groups(named, 0.01), 0.1, lambda step: linear_warmup_decay(step, total, warmup))
    for step in range(total):
        rate = 0.1 * linear_warmup_decay(step, total, warmup)
        for number, parameter in enumerate(parameters):
            parameter.grad = scale * torch.randn_like(parameter)
            expected[number] = naive_step(expected[number][0], parameter.grad.clone(), *expected[number][1:], rate,
                                          0.0 if number % 2 else 0.01)
        optimizer.step()
        assert optimizer.learning_rate == rate
    for parameter, (value, _, _) in zip(parameters, expected):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_blocks_change_no_bit(monkeypatch, block):
    """All operations but the norm are for single elements; a parameter that is not contiguous is one block."""
    def train():
        torch.manual_seed(1)
        parameters = [nn.Parameter(values) for values in (torch.randn(5, 6), torch.randn(3, 4).t(), torch.randn(9))]
        optimizer = BertAdam([{"params": parameters, "weight_decay": 0.01}], 0.1, lambda step: 1.0)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape)
            optimizer.step()
        return parameters
    whole = train()
    monkeypatch.setattr(optimizer_module, "CPU_BLOCK", block)
    assert all(torch.equal(*pair) for pair in zip(whole, train(), strict=True))


def test_a_step_that_loss_scaling_skips_counts_in_the_schedule():
    """The rate still reaches 0 at the end. A gradient is infinite in float16 if the scale is too large."""
    parameter = nn.Parameter(torch.ones(3))
    groups = decay_groups([("weight", parameter)], 0.0)
    optimizer = BertAdam(groups, 0.1, lambda step: linear_warmup_decay(step, 4, 0.0))
    scaler, made, rates = LossScaler(torch.device("cpu"), torch.float16), [], []
    for step in range(4):
        before, scale = parameter.detach().clone(), scaler.get_scale()
        scaler.backward(parameter.sum())
        if step in (0, 2):
            parameter.grad[1] = torch.inf
        made.append(scaler.step(optimizer))
        optimizer.zero_grad()
        rates.append(optimizer.learning_rate)
        assert torch.equal(parameter, before) != made[-1] and scaler.get_scale() == (scale if made[-1] else scale / 2)
    assert made == [False, True, False, True] and rates == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_parameters_without_a_gradient_do_not_change():
    changed, fixed = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    changed.grad = torch.ones(2)
    optimizer = BertAdam(decay_groups([("a", changed), ("b", fixed)], 0.01), 0.1, lambda step: 1.0)
    optimizer.step()
    assert fixed.tolist() == [1.0, 1.0] and changed.tolist() != [1.0, 1.0]


def test_schedule_by_hand():
    factors = [linear_warmup_decay(step, 10, 0.2) for step in range(11)]
    assert factors == pytest.approx([0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0])
    assert linear_warmup_decay(0, 10, 0.0) == 1.0


def test_biases_and_layer_norms_have_no_weight_decay():
    names = ["bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.bias", "classifier.bias",
             "classifier.weight", "projections.0.weight", "bert.embeddings.word_embeddings.weight"]
    decay, no_decay = decay_groups([(name, name) for name in names], 0.01)
    assert decay["params"] == names[3:] and no_decay["params"] == names[:3]


def test_the_state_can_be_saved_and_loaded():
    def run(restart):
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(3, 3))

        def make():
            return BertAdam(decay_groups([("w", parameter)], 0.01), 0.1,
                            lambda step: linear_warmup_decay(step, 6, 0.5))
        optimizer = make()
        for step in range(6):
            if step == restart:
                state = optimizer.state_dict()
                optimizer = make()
                optimizer.load_state_dict(state)
            parameter.grad = torch.full((3, 3), float(step))
            optimizer.step()
        return parameter.detach()
    assert torch.equal(run(restart=None), run(restart=3))
