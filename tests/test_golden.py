"""Values of the original implementation: losses, gradients, six optimizer steps, re-ranking probabilities."""
import numpy as np
import pytest
import torch
from conftest import loss_terms
from helpers.golden import CASES, TERMS, golden_name, load_case

from simplified_tinybert.model.bert import uniform_layer_map
from simplified_tinybert.model.pretrained import load_cross_encoder
from simplified_tinybert.ranking.scoring import relevance
from simplified_tinybert.training.losses import attention_loss, hidden_loss
from simplified_tinybert.training.optimizer import BertAdam, decay_groups, linear_warmup_decay

NEGLIGIBLE = 1e-14     # gradients of key biases are rounding errors: softmax ignores a constant shift


@pytest.mark.parametrize("number", CASES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_losses(golden, golden_models, batch, number, dtype, tolerance):
    case, student, teacher, settings = load_case(golden, golden_models, number, dtype)
    terms = loss_terms(student, teacher, batch, **settings)
    expected = {column: case["losses"][name] for column, name in TERMS.items() if name in case["losses"]}
    assert {name: terms[name].item() for name in expected} == pytest.approx(expected, rel=tolerance)
    assert terms["loss"].item() == pytest.approx(
        sum(terms[name].item() for name in ("cls_loss", "att_loss", "rep_loss") if name in terms), rel=tolerance)


@pytest.mark.parametrize("number", [number for number in CASES if number % 4 >= 2])
def test_losses_of_each_layer(golden, golden_models, batch, number):
    case, student, teacher, _ = load_case(golden, golden_models, number)
    assert case["distill_model"] == "simplified"
    layers = uniform_layer_map(student.config.num_hidden_layers, 4)
    student_out, teacher_out = student(batch, list(range(1, len(layers) + 1))), teacher(batch, layers)
    attention = [attention_loss(student_out.queries[j], student_out.keys[j], teacher_out.queries[k],
                                teacher_out.keys[k], batch.attention_mask).item()
                 for j, k in enumerate(layers, start=1)]
    hidden = [hidden_loss(student.project(j, student_out.hidden_states[j]), teacher_out.hidden_states[k],
                          batch.attention_mask).item() for j, k in enumerate([0, *layers])]
    assert attention == pytest.approx(case["losses"]["attention_per_layer"], rel=1e-9)
    assert hidden == pytest.approx(case["losses"]["hidden_per_layer"], rel=1e-9)


@pytest.mark.parametrize("number", CASES)
def test_gradients(golden, golden_models, batch, number):
    case, student, teacher, settings = load_case(golden, golden_models, number)
    loss_terms(student, teacher, batch, **settings)["loss"].backward()
    found = {golden_name(name): parameter.grad for name, parameter in student.named_parameters()}
    assert found.keys() == case["grad_norm"].keys()
    for name, expected in case["grad_norm"].items():
        if expected is None:
            assert found[name] is None, name
        else:
            assert found[name].norm().item() == pytest.approx(expected, rel=1e-9, abs=NEGLIGIBLE), name
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("number", CASES)
def test_six_optimizer_steps(golden, golden_models, batch, number):
    case, student, teacher, settings = load_case(golden, golden_models, number)
    training, losses = case["training"], []
    optimizer = BertAdam(decay_groups(student.named_parameters(), training["weight_decay"]), training["learning_rate"],
                         lambda step: linear_warmup_decay(step, training["t_total"], training["warmup_proportion"]))
    for _ in range(6):
        loss = loss_terms(student, teacher, batch, **settings)["loss"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == pytest.approx(training["total_loss_per_step"], rel=1e-9)
    norms = {golden_name(name): parameter.norm().item() for name, parameter in student.named_parameters()}
    sums = {golden_name(name): parameter.sum().item() for name, parameter in student.named_parameters()}
    assert norms == pytest.approx(training["parameter_norm_after"], rel=1e-6)
    assert sums == pytest.approx(training["parameter_sum_after"], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", ["teacher", "student_2x24", "student_4x48"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_reranking_probabilities(golden, golden_models, batch, name, dtype, tolerance):
    model, _ = load_cross_encoder(golden_models[name], dtype=dtype)
    logits = model(batch).logits.detach().numpy()
    expected = golden["rerank"][name]
    assert np.allclose(relevance(logits, "probability"), expected["relevance_probability"], rtol=0, atol=tolerance)
    assert np.allclose(logits, expected["logits"], rtol=0, atol=10 * tolerance)
