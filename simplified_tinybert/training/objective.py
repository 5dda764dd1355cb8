"""What a student minimizes: a table of loss terms, and the methods (described in distill.py) that combine them.

A new term is one function of `Passes` and one row of TERMS.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from simplified_tinybert.model.batch import Batch
from simplified_tinybert.model.bert import CrossEncoder, LayerOutputs, uniform_layer_map
from simplified_tinybert.training import losses

METHODS = ("finetune", "standard", "tinybert", "simplified")

Weights = dict[str, float]                              # term → weight; a term without a weight is not computed


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """Which terms a stage minimizes, and how they are computed."""
    weights: Weights
    padding: str = "reference"
    temperature: float = 1.0
    layer_map: list[int] | None = None                  # teacher layer (from 1) of each student layer; None: every k-th
    scores_from_file: bool = False                      # the teacher's scores come with the batches

    def uses(self, need: str) -> bool:
        """Whether a term needs the teacher's `scores`, the `layers` of both models, or the student's `head`."""
        return any(need in TERMS[term].needs for term in self.weights)

    @property
    def runs_teacher(self) -> bool:
        """Whether the teacher computes something for the terms."""
        return self.uses("layers") or self.uses("scores") and not self.scores_from_file


@dataclass(frozen=True)
class Passes:
    """Input of a loss term: the forward passes of both models over one batch."""
    student: CrossEncoder
    student_out: LayerOutputs
    teacher_out: LayerOutputs | None
    layers: list[tuple[int, int]]                       # (student layer, teacher layer), counted from 1
    batch: Batch
    settings: ObjectiveSettings

    @property
    def teacher_logits(self) -> Tensor:
        """The teacher's logits (B, C). A score z from a file stands for the logits (0, z)."""
        scores = self.batch.teacher_scores
        return self.teacher_out.logits if scores is None else torch.stack([torch.zeros_like(scores), scores], dim=-1)


def attention(passes: Passes) -> Tensor:
    """Attention loss, summed over the mapped layers."""
    student, teacher, mask = passes.student_out, passes.teacher_out, passes.batch.attention_mask
    return sum(losses.attention_loss(student.queries[layer], student.keys[layer], teacher.queries[teacher_layer],
                                     teacher.keys[teacher_layer], mask, passes.settings.padding)
               for layer, teacher_layer in passes.layers)


def hidden(passes: Passes) -> Tensor:
    """Hidden-state loss, summed over the embedding output and the mapped layers."""
    student, teacher, mask = passes.student_out, passes.teacher_out, passes.batch.attention_mask
    return sum(losses.hidden_loss(passes.student.project(layer, student.hidden_states[layer]),
                                  teacher.hidden_states[teacher_layer], mask, passes.settings.padding)
               for layer, teacher_layer in [(0, 0), *passes.layers])


def soft(passes: Passes) -> Tensor:
    return losses.soft_loss(passes.student_out.logits, passes.teacher_logits, passes.settings.temperature)


def hard(passes: Passes) -> Tensor:
    return losses.hard_loss(passes.student_out.logits, passes.batch.labels)


def log_odds(logits: Tensor) -> Tensor:
    """(B, 2) → (B), in float32 or better."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits[:, 1] - logits[:, 0]


def margin(passes: Passes) -> Tensor:
    return losses.margin_loss(log_odds(passes.student_out.logits), log_odds(passes.teacher_logits),
                              passes.batch.labels, passes.batch.queries)


def listwise(passes: Passes) -> Tensor:
    return losses.listwise_loss(log_odds(passes.student_out.logits), log_odds(passes.teacher_logits),
                                passes.batch.queries, passes.settings.temperature)


@dataclass(frozen=True)
class Term:
    """A loss term and its place in the log."""
    loss: Callable[[Passes], Tensor]
    part: str                                           # log column that sums the weighted terms of this kind
    column: str | None                                  # log column of the unweighted term, if any
    mean_over: str                                      # what the loss averages over (layers: with --padding masked)
    needs: tuple[str, ...]


# Name in the paper and in --loss_weights → term
TERMS = {"attention": Term(attention, "att_loss", None, "pairs", ("layers",)),
         "hidden": Term(hidden, "rep_loss", None, "tokens", ("layers",)),
         "soft": Term(soft, "cls_loss", "soft_loss", "examples", ("scores", "head")),
         "hard": Term(hard, "cls_loss", "hard_loss", "examples", ("head",)),
         "margin": Term(margin, "cls_loss", "margin_loss", "margins", ("scores", "head", "queries")),
         "listwise": Term(listwise, "cls_loss", "listwise_loss", "queries", ("scores", "head", "queries"))}
RANKING = [name for name, term in TERMS.items() if "queries" in term.needs]


def objective(student: CrossEncoder, teacher: CrossEncoder | None, batch: Batch,
              settings: ObjectiveSettings) -> dict[str, Tensor]:
    """Compute the unweighted terms of a batch: name → scalar."""
    pairs, teacher_out = [], None
    if settings.uses("layers"):
        layer_map = settings.layer_map or uniform_layer_map(student.config.num_hidden_layers,
                                                            teacher.config.num_hidden_layers)
        pairs = list(enumerate(layer_map, start=1))
    student_layers, teacher_layers = zip(*pairs) if pairs else (None, None)
    if settings.runs_teacher:
        with torch.no_grad():
            teacher_out = teacher(batch, layers=teacher_layers)
    passes = Passes(student, student(batch, layers=student_layers), teacher_out, pairs, batch, settings)
    return {name: TERMS[name].loss(passes) for name in TERMS if name in settings.weights}


def mean_over(term: str, padding: str) -> str:
    """What a term averages over. With --padding reference, the layers of all examples weigh the same, long or short."""
    by_layers = "layers" in TERMS[term].needs
    return "examples" if by_layers and padding == "reference" else TERMS[term].mean_over


def total_loss(terms: dict[str, Tensor], weights: Weights) -> dict[str, Tensor]:
    """Return "loss", the sum of the weighted att_loss, rep_loss, cls_loss, and the unweighted terms of cls_loss."""
    parts: dict[str, Tensor] = {}
    for name, value in terms.items():
        part = TERMS[name].part
        parts[part] = parts.get(part, 0.0) + weights[name] * value
    columns = {TERMS[name].column: value for name, value in terms.items() if TERMS[name].column}
    return {"loss": sum(parts.values()), **parts, **columns}


def stage_weights(method: str, alpha: float = 0.5, changed: Weights | None = None) -> list[Weights]:
    """Return the weights of the terms in each stage of a method, after the changes; weight 0 leaves a term out."""
    stages = {"finetune": [{"hard": 1.0}],
              "standard": [{"soft": alpha, "hard": 1.0 - alpha}],
              "tinybert": [{"attention": 1.0, "hidden": 1.0}, {"soft": 1.0}],
              "simplified": [{"attention": 1.0, "hidden": 1.0, "soft": 1.0, "hard": 1.0}]}[method]
    changed = changed or {}
    for term, weight in changed.items():                # if there are two stages, the first compares layers
        stages[0 if "layers" in TERMS[term].needs else -1][term] = weight
    return [{term: stage[term] for term in TERMS if term in stage and changed.get(term) != 0} for stage in stages]


def parse_loss_weights(items: list[str]) -> Weights:
    """["hard=0", ...] → {"hard": 0.0, ...}. Raises ValueError with a message for the user."""
    weights: Weights = {}
    for item in items:
        term, _, text = item.partition("=")
        try:
            weight = float(text)
        except ValueError:
            weight = -1.0
        if term not in TERMS or term in weights or not 0 <= weight < float("inf"):
            raise ValueError(f"--loss_weights {item}: expected term=weight, each term once, with a term of "
                             f"{', '.join(TERMS)} and a weight of 0 or more")
        weights[term] = weight
    return weights


def formula(weights: Weights) -> str:
    return " + ".join(f"{weight:g} × {term}" for term, weight in weights.items())
