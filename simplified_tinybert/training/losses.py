"""The terms of the distillation objectives (section 3 of the paper), one pure function each.

Shapes: B examples, L positions (padding included), H heads, d and d' head widths of student and teacher, D hidden
width of the teacher. Teachers' tensors carry no gradient. Numbers are those of the original implementation; where
it differs from the usual definition, the function says so.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

PADDING_MODES = ("reference", "masked")


def soft_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Soft-label loss: cross-entropy between the softened class distributions, logits (B, C).

    As in the original the mean is taken over the batch *and* the C classes, so that with two classes the term is half
    of the usual cross-entropy, and there is no factor temperature².
    """
    dtype = _accumulate(student_logits)
    teacher_probability = F.softmax(teacher_logits.to(dtype) / temperature, dim=-1)
    return -(teacher_probability * F.log_softmax(student_logits.to(dtype) / temperature, dim=-1)).mean()


def hard_loss(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Hard-label loss: cross-entropy of the logits (B, C) with the labels (B)."""
    return F.cross_entropy(student_logits.to(_accumulate(student_logits)), labels)


def direct_attention_loss(student_queries: Tensor, student_keys: Tensor, teacher_queries: Tensor, teacher_keys: Tensor,
                          attention_mask: Tensor, padding: str = "reference") -> Tensor:
    """Definition of `attention_loss`, which computes the same faster. Read this one; tests compare the two."""
    keep = attention_mask[:, None, None, :].to(student_queries.dtype)                    # (B, 1, 1, L)
    student = student_queries @ student_keys.transpose(-1, -2) / student_queries.shape[-1] ** 0.5    # (B, H, L, L)
    teacher = teacher_queries @ teacher_keys.transpose(-1, -2) / teacher_queries.shape[-1] ** 0.5
    squared = ((student - teacher) * keep).square()
    if padding == "reference":
        return squared.mean()
    pairs = keep * attention_mask[:, None, :, None]                                      # (B, 1, L, L), real tokens
    return (squared * pairs).sum() / (pairs.sum() * squared.shape[1])


def attention_loss(student_queries: Tensor, student_keys: Tensor, teacher_queries: Tensor, teacher_keys: Tensor,
                   attention_mask: Tensor, padding: str = "reference") -> Tensor:
    """Attention loss of one pair of layers: mean squared difference of the scaled scores before the softmax.

    Queries and keys (B, H, L, d) of the student and (B, H, L, d') of the teacher, attention_mask (B, L) of ones and
    zeros. With padding="reference" scores towards padded keys count as zero in both models, scores of padded queries
    count in full, and the mean is over B·H·L·L; with "masked" only pairs of real tokens count, in numerator and mean.

    The L×L score matrices are never formed. With Q, K of the student and Q', K' of the teacher, scaled by d^-¼ and
    d'^-¼, the matrix of differences is A·Bᵀ for A = [Q, -Q'] and B = M·[K, K'] (M zeroes padded keys), and its squared
    norm is the sum of AᵀA ∘ BᵀB: two Gram matrices of (d+d')×(d+d'), whose cost is linear in L. Where the widths are
    equal, A = [Q-Q', Q'] and B = M·[K, K-K'] give the same matrix, and in float32 no digits are lost when the student
    comes close to its teacher. With unequal widths rounding is about 1e-7 of the teacher's mean squared score.
    """
    dtype = _accumulate(student_queries)
    keep = attention_mask[:, None, :, None].to(dtype)                                    # (B, 1, L, 1)
    student_queries, student_keys = (_scaled(tensor, dtype) for tensor in (student_queries, student_keys))
    teacher_queries, teacher_keys = (_scaled(tensor, dtype) for tensor in (teacher_queries, teacher_keys))
    if student_queries.shape == teacher_queries.shape:
        queries = torch.cat([student_queries - teacher_queries, teacher_queries], dim=-1)
        keys = torch.cat([student_keys, student_keys - teacher_keys], dim=-1) * keep
    else:
        queries = torch.cat([student_queries, -teacher_queries], dim=-1)                 # (B, H, L, d+d')
        keys = torch.cat([student_keys, teacher_keys], dim=-1) * keep
    if padding == "masked":
        queries = queries * keep
        real = keep.sum(dim=2).square().sum()                                            # pairs of real tokens
    else:
        real = keep.shape[0] * keep.shape[2] ** 2
    with torch.autocast(queries.device.type, enabled=False):    # half precision would drown the difference in rounding
        query_gram = queries.transpose(-1, -2) @ queries                                 # (B, H, d+d', d+d')
        key_gram = keys.transpose(-1, -2) @ keys
    return (query_gram * key_gram).sum() / (real * queries.shape[1])


def hidden_loss(student_hidden: Tensor, teacher_hidden: Tensor, attention_mask: Tensor,
                padding: str = "reference") -> Tensor:
    """Hidden-state loss of one pair of layers: mean squared difference of projected student and teacher (B, L, D).

    With padding="reference" the mean is over all positions, padding included; with "masked" over real tokens only.
    """
    dtype = _accumulate(student_hidden)
    squared = (student_hidden.to(dtype) - teacher_hidden.to(dtype)).square()
    if padding == "reference":
        return squared.mean()
    keep = attention_mask[:, :, None].to(dtype)                                          # (B, L, 1)
    return (squared * keep).sum() / (keep.sum() * squared.shape[-1])


def _scaled(projection: Tensor, dtype: torch.dtype) -> Tensor:
    """Queries or keys times d^-¼, so that products of two are scaled scores."""
    return projection.to(dtype) * projection.shape[-1] ** -0.25


def _accumulate(tensor: Tensor) -> torch.dtype:
    """Sums run in float32 at least: half precision is for the models, not for their losses."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
