"""The loss terms of the distillation objectives, as pure functions.

Shapes: B examples, L positions (including padding), H heads, d and d' head sizes of student and teacher, D hidden size
of the teacher. The teacher's tensors have no gradient. Values equal those of the original implementation; docstrings
say where these differ from the usual definition. If the models run in half precision, losses are computed in float32.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

PADDING_MODES = ("reference", "masked")


def soft_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Soft-label loss: cross-entropy between the softened class distributions, logits (B, C).

    As in the original, the mean is over the batch *and* the C classes: with two classes, it is half of the usual
    cross-entropy. There is no factor temperature².
    """
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    teacher_probability = F.softmax(teacher_logits.to(dtype) / temperature, dim=-1)
    return -(teacher_probability * F.log_softmax(student_logits.to(dtype) / temperature, dim=-1)).mean()


def hard_loss(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Hard-label loss: cross-entropy of the logits (B, C) with the labels (B)."""
    return F.cross_entropy(student_logits.to(torch.promote_types(student_logits.dtype, torch.float32)), labels)


def margin_loss(student_scores: Tensor, teacher_scores: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    """MarginMSE (Hofstätter et al., arXiv 2010.02666), log-odds (B), labels (B), numbers of the queries (B).

    A margin is the score of a relevant passage minus that of one that is not relevant to the same query. The loss is
    the mean squared difference of the student's and the teacher's margins, over all such pairs in the batch; 0 without
    any.
    """
    pairs = (queries[:, None] == queries) & (labels[:, None] == 1) & (labels == 0)                 # (B, B)
    difference = student_scores - teacher_scores
    squared = (difference[:, None] - difference).square()
    return torch.where(pairs, squared, 0.0).sum() / pairs.sum().clamp(min=1)


def listwise_loss(student_scores: Tensor, teacher_scores: Tensor, queries: Tensor, temperature: float = 1.0) -> Tensor:
    """KL divergence KL(teacher ‖ student) of the softmax over the passages of a query in the batch, log-odds (B).

    Both scores are divided by the temperature. The mean over the queries.
    """
    same = queries[:, None] == queries                                                             # (B, B)

    def log_probabilities(scores: Tensor) -> Tensor:
        scores = scores / temperature
        return scores - torch.where(same, scores, -torch.inf).logsumexp(dim=1)
    teacher, student = log_probabilities(teacher_scores), log_probabilities(student_scores)
    return (teacher.exp() * (teacher - student)).sum() / same.sum(dim=1, dtype=teacher.dtype).reciprocal().sum()


def attention_loss(student_queries: Tensor, student_keys: Tensor, teacher_queries: Tensor, teacher_keys: Tensor,
                   attention_mask: Tensor, padding: str = "reference") -> Tensor:
    """Attention loss of one pair of layers: mean squared difference of the scaled scores before the softmax.

    The scores are Q·Kᵀ/√d for the student and Q'·K'ᵀ/√d' for the teacher.
    Queries and keys are (B, H, L, d) for the student and (B, H, L, d') for the teacher; attention_mask (B, L) holds
    ones and zeros. With padding="reference", scores of padded keys are zero in both models, scores of padded queries
    count in full, and the mean is over B·H·L·L. With "masked", only pairs of real tokens count.

    The L×L score matrices are never formed. Let Q, K be the student's queries and keys, and Q', K' the teacher's. The
    matrix of differences is A·S·Bᵀ with A = [Q, -Q'], B = M·[K, K'], where M zeroes padded keys and S is a diagonal
    matrix of d^-½ and d'^-½. Its squared norm is the sum of AᵀA ∘ S·BᵀB·S: two Gram matrices of (d+d')×(d+d'), at a
    cost linear in L. If d = d', A = [Q-Q', Q'] and B = M·[K, K-K'] give the same matrix, without cancellation in
    float32 when the student is close to its teacher. If d ≠ d', the rounding error is about 1e-7 of the teacher's mean
    squared score. S is applied last: on a GPU in half precision, the products of A and B run in TF32, which keeps all
    digits of queries and keys in half precision. If d = d', it rounds the differences to 2^-11 of their size.
    """
    dtype = torch.promote_types(student_queries.dtype, torch.float32)
    keep = attention_mask[:, None, :, None].to(dtype)                                    # (B, 1, L, 1)
    student_queries, student_keys, teacher_queries, teacher_keys = (
        tensor.to(dtype) for tensor in (student_queries, student_keys, teacher_queries, teacher_keys))
    sizes = student_queries.shape[-1], teacher_queries.shape[-1]                         # d, d'
    if sizes[0] == sizes[1]:
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
    with torch.autocast(queries.device.type, enabled=False):    # half precision would lose the difference
        query_gram = queries.transpose(-1, -2) @ queries                                 # (B, H, d+d', d+d')
        key_gram = keys.transpose(-1, -2) @ keys
    products = query_gram * key_gram
    if sizes[0] == sizes[1]:
        return products.sum() / (real * queries.shape[1] * sizes[0])
    scales = torch.cat([products.new_full((size,), size ** -0.5) for size in sizes])
    return (products * scales[:, None] * scales).sum() / (real * queries.shape[1])


def hidden_loss(student_hidden: Tensor, teacher_hidden: Tensor, attention_mask: Tensor,
                padding: str = "reference") -> Tensor:
    """Hidden-state loss of two layers: mean squared difference (B, L, D), with "masked" over real tokens only."""
    dtype = torch.promote_types(student_hidden.dtype, torch.float32)
    squared = (student_hidden.to(dtype) - teacher_hidden.to(dtype)).square()
    if padding == "reference":
        return squared.mean()
    keep = attention_mask[:, :, None].to(dtype)                                          # (B, L, 1)
    return (squared * keep).sum() / (keep.sum() * squared.shape[-1])
