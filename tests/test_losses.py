"""The losses against their definitions, on random shapes and masks, and by hand."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from simplified_tinybert.model.bert import uniform_layer_map
from simplified_tinybert.training.losses import attention_loss, hard_loss, hidden_loss, soft_loss

shapes = st.fixed_dictionaries({
    "batch": st.integers(1, 4), "heads": st.integers(1, 4), "length": st.integers(1, 40),
    "head_size": st.integers(1, 9), "teacher_head_size": st.integers(1, 12), "seed": st.integers(0, 2 ** 31),
    "dtype": st.just(torch.float64)})


def draw(shape):
    """Return random queries and keys of student and teacher, and a mask with at least one token per row."""
    generator = torch.Generator().manual_seed(shape["seed"])
    head_sizes = [shape["head_size"]] * 2 + [shape["teacher_head_size"]] * 2
    tensors = [torch.randn(shape["batch"], shape["heads"], shape["length"], size, generator=generator,
                           dtype=torch.float64).to(shape["dtype"]) for size in head_sizes]
    lengths = torch.randint(1, shape["length"] + 1, (shape["batch"],), generator=generator)
    return tensors, (torch.arange(shape["length"]) < lengths[:, None]).long()


def direct_attention_loss(student_queries, student_keys, teacher_queries, teacher_keys, attention_mask, padding):
    """The definition of the attention loss, with the matrices of scores."""
    keep = attention_mask[:, None, None, :].to(student_queries.dtype)                    # (B, 1, 1, L)
    student = student_queries @ student_keys.transpose(-1, -2) / student_queries.shape[-1] ** 0.5    # (B, H, L, L)
    teacher = teacher_queries @ teacher_keys.transpose(-1, -2) / teacher_queries.shape[-1] ** 0.5
    squared = ((student - teacher) * keep).square()
    if padding == "reference":
        return squared.mean()
    pairs = keep * attention_mask[:, None, :, None]                                      # (B, 1, L, L), real tokens
    return (squared * pairs).sum() / (pairs.sum() * squared.shape[1])


@settings(max_examples=150, deadline=None)
@given(shapes, st.sampled_from(["reference", "masked"]))
def test_attention_loss_equals_its_definition_with_gradients(shape, padding):
    tensors, mask = draw(shape)
    for tensor in tensors[:2]:
        tensor.requires_grad_()
    found = attention_loss(*tensors, mask, padding)
    expected = direct_attention_loss(*tensors, mask, padding)
    assert found.item() == pytest.approx(expected.item(), rel=1e-10, abs=1e-10)
    for gradients in zip(torch.autograd.grad(found, tensors[:2]), torch.autograd.grad(expected, tensors[:2])):
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@settings(max_examples=50, deadline=None)
@given(shapes.map(lambda shape: shape | {"dtype": torch.float32}), st.sampled_from(["reference", "masked"]))
def test_attention_loss_in_float32(shape, padding):
    tensors, mask = draw(shape)
    exact = direct_attention_loss(*(tensor.double() for tensor in tensors), mask, padding)
    assert attention_loss(*tensors, mask, padding).item() == pytest.approx(exact.item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4])
def test_attention_loss_in_float32_is_accurate_near_the_teacher(distance):
    generator = torch.Generator().manual_seed(0)
    queries, keys, more_queries, more_keys = (torch.randn(2, 4, 256, 64, generator=generator) for _ in range(4))
    student = queries + distance * more_queries, keys + distance * more_keys
    mask = torch.ones(2, 256, dtype=torch.long)
    exact = direct_attention_loss(*(tensor.double() for tensor in (*student, queries, keys)), mask, "reference")
    assert attention_loss(*student, queries, keys, mask).item() == pytest.approx(exact.item(), rel=1e-4)
    assert attention_loss(queries, keys, queries, keys, mask).item() == 0.0


@settings(max_examples=50, deadline=None)
@given(shapes, st.integers(0, 20))
def test_masked_losses_do_not_depend_on_padding(shape, more):
    tensors, mask = draw(shape)
    padded = [F.pad(tensor, (0, 0, 0, more), value=7.0) for tensor in tensors]
    longer = F.pad(mask, (0, more))
    assert attention_loss(*padded, longer, "masked").item() == pytest.approx(
        attention_loss(*tensors, mask, "masked").item(), rel=1e-10)
    student, teacher = tensors[0][:, 0], torch.zeros_like(tensors[0][:, 0])
    padded = hidden_loss(F.pad(student, (0, 0, 0, more), value=7.0), F.pad(teacher, (0, 0, 0, more)), longer, "masked")
    assert padded.item() == pytest.approx(hidden_loss(student, teacher, mask, "masked").item(), rel=1e-10)


def test_reference_attention_loss_counts_padded_queries_but_not_padded_keys():
    """By hand: one head of size 1, two positions, the second of them padding."""
    queries, keys = torch.tensor([[[[1.0], [2.0]]]]), torch.tensor([[[[3.0], [5.0]]]])
    teacher_queries, teacher_keys = torch.zeros_like(queries), torch.zeros_like(keys)
    mask = torch.tensor([[1, 0]])
    # differences: [[3, 5→0], [6, 10→0]], mean of squares over all four: 45 / 4
    assert attention_loss(queries, keys, teacher_queries, teacher_keys, mask).item() == pytest.approx(45 / 4)
    assert attention_loss(queries, keys, teacher_queries, teacher_keys, mask, "masked").item() == pytest.approx(9.0)


def test_reference_hidden_loss_counts_padding():
    student, teacher = torch.tensor([[[1.0, 3.0], [2.0, 2.0]]]), torch.zeros(1, 2, 2)
    mask = torch.tensor([[1, 0]])
    assert hidden_loss(student, teacher, mask).item() == pytest.approx((1 + 9 + 4 + 4) / 4)
    assert hidden_loss(student, teacher, mask, "masked").item() == pytest.approx((1 + 9) / 2)


def test_soft_loss_is_half_the_cross_entropy_of_softened_classes():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 4.0 + 2 * math.log(3)]])
    # At temperature 2, the teacher predicts 1/4 and 3/4, the student 1/2 and 1/2: cross-entropy log 2, over two classes
    assert soft_loss(student, teacher, temperature=2.0).item() == pytest.approx(math.log(2) / 2)


def test_losses_of_half_precision_logits_are_computed_in_float32():
    logits = torch.tensor([[9.0, -3.5]], dtype=torch.bfloat16)
    exact = F.cross_entropy(logits.double(), torch.tensor([1])).item()
    assert hard_loss(logits, torch.tensor([1])).item() == pytest.approx(exact, rel=1e-6)
    assert soft_loss(logits, logits).dtype == torch.float32


@pytest.mark.parametrize("student, teacher, expected", [(3, 12, [4, 8, 12]), (6, 12, [2, 4, 6, 8, 10, 12]),
                                                        (4, 4, [1, 2, 3, 4])])
def test_layer_map(student, teacher, expected):
    assert uniform_layer_map(student, teacher) == expected


def test_no_layer_map_if_the_depths_do_not_divide():
    with pytest.raises(ValueError, match="12 teacher layers"):
        uniform_layer_map(5, 12)
