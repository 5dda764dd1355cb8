"""What a student minimizes: a table of loss terms, and the methods that combine them (section 3 of the paper).

    finetune      hard                                      no teacher: how a teacher is made; the baseline without KD
    standard      alpha · soft + (1 - alpha) · hard         standard KD
    tinybert      attention + hidden, then soft             TinyBERT's task distillation, in two stages
    simplified    attention + hidden + soft + hard          Simplified TinyBERT: all terms in one stage

A new term is one function of `Passes` and one row of TERMS.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from simplified_tinybert.model.bert import Batch, CrossEncoder, LayerOutputs, uniform_layer_map
from simplified_tinybert.training import losses

METHODS = ("finetune", "standard", "tinybert", "simplified")

Weights = dict[str, float]                              # term → weight; a term that is missing is not computed


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """Which terms a stage minimizes, and how they are computed.

    layer_map: teacher layer (from 1) that each student layer learns from; None: every k-th.
    """
    weights: Weights
    padding: str = "reference"
    temperature: float = 1.0
    layer_map: list[int] | None = None

    def uses(self, need: str) -> bool:
        """Whether a term needs the `teacher`, the `layers` of both models, or the student's `head`."""
        return any(need in TERMS[term].needs for term in self.weights)


@dataclass(frozen=True)
class Passes:
    """What a loss term sees: the forward passes of both models over one batch.

    layers: (student layer, teacher layer) pairs, counted from 1; layer 0 is the embedding output.
    """
    student: CrossEncoder
    student_out: LayerOutputs
    teacher_out: LayerOutputs | None
    layers: list[tuple[int, int]]
    batch: Batch
    settings: ObjectiveSettings


def attention(passes: Passes) -> Tensor:
    """Attention loss, summed over the mapped layers."""
    student, teacher, mask = passes.student_out, passes.teacher_out, passes.batch.attention_mask
    return sum(losses.attention_loss(student.queries[mine], student.keys[mine], teacher.queries[theirs],
                                     teacher.keys[theirs], mask, passes.settings.padding)
               for mine, theirs in passes.layers)


def hidden(passes: Passes) -> Tensor:
    """Hidden-state loss, summed over the embedding output and the mapped layers."""
    student, teacher, mask = passes.student_out, passes.teacher_out, passes.batch.attention_mask
    return sum(losses.hidden_loss(passes.student.project(mine, student.hidden_states[mine]),
                                  teacher.hidden_states[theirs], mask, passes.settings.padding)
               for mine, theirs in [(0, 0), *passes.layers])


def soft(passes: Passes) -> Tensor:
    return losses.soft_loss(passes.student_out.logits, passes.teacher_out.logits, passes.settings.temperature)


def hard(passes: Passes) -> Tensor:
    return losses.hard_loss(passes.student_out.logits, passes.batch.labels)


@dataclass(frozen=True)
class Term:
    """A loss term.

    part: column of the log that adds up the weighted terms of its kind. column: its own, unweighted, if it has one.
    mean_over: what the term is a mean over with --padding masked: examples, their tokens, or their pairs of tokens.
    """
    loss: Callable[[Passes], Tensor]
    part: str
    column: str | None
    mean_over: str
    needs: tuple[str, ...]


# Name in the paper and in --loss_weights → the term
TERMS = {"attention": Term(attention, "att_loss", None, "pairs", ("teacher", "layers")),
         "hidden": Term(hidden, "rep_loss", None, "tokens", ("teacher", "layers")),
         "soft": Term(soft, "cls_loss", "soft_loss", "examples", ("teacher", "head")),
         "hard": Term(hard, "cls_loss", "hard_loss", "examples", ("head",))}


def objective(student: CrossEncoder, teacher: CrossEncoder | None, batch: Batch,
              settings: ObjectiveSettings) -> dict[str, Tensor]:
    """The terms of a batch by name, unweighted; each is a scalar."""
    pairs, teacher_out = [], None
    if settings.uses("layers"):
        depths = student.config.num_hidden_layers, teacher.config.num_hidden_layers
        pairs = list(enumerate(settings.layer_map or uniform_layer_map(*depths), start=1))
    mine, theirs = zip(*pairs) if pairs else (None, None)
    if settings.uses("teacher"):
        with torch.inference_mode():
            teacher_out = teacher(batch, layers=theirs)
    passes = Passes(student, student(batch, layers=mine), teacher_out, pairs, batch, settings)
    return {name: TERMS[name].loss(passes) for name in TERMS if name in settings.weights}


def mean_over(term: str, padding: str) -> str:
    """What a term is a mean over. With --padding reference every example weighs the same, however short it is."""
    return TERMS[term].mean_over if padding == "masked" else "examples"


def total_loss(terms: dict[str, Tensor], weights: Weights) -> dict[str, Tensor]:
    """The minimized "loss" and its parts, as the log has them.

    loss = att_loss + rep_loss + cls_loss, which are weighted; soft_loss and hard_loss are not.
    """
    parts: dict[str, Tensor] = {}
    for name, value in terms.items():
        part, weighted = TERMS[name].part, weights[name] * value
        parts[part] = parts[part] + weighted if part in parts else weighted
    columns = {TERMS[name].column: value for name, value in terms.items() if TERMS[name].column}
    return {"loss": sum(parts.values()), **parts, **columns}


def stage_weights(method: str, alpha: float = 0.5, changed: Weights | None = None) -> list[Weights]:
    """Weights of the terms in each stage of a method; those in `changed` replace the method's own.

    A term of weight 0 in `changed` is left out. Of two stages, the first has the terms of the layers.
    """
    stages = {"finetune": [{"hard": 1.0}],
              "standard": [{"soft": alpha, "hard": 1.0 - alpha}],
              "tinybert": [{"attention": 1.0, "hidden": 1.0}, {"soft": 1.0}],
              "simplified": [{"attention": 1.0, "hidden": 1.0, "soft": 1.0, "hard": 1.0}]}[method]
    for term, weight in (changed or {}).items():
        stages[0 if "layers" in TERMS[term].needs else -1][term] = weight
    left_out = {term for term, weight in (changed or {}).items() if weight == 0}
    return [{term: stage[term] for term in TERMS if term in stage and term not in left_out} for stage in stages]


def parse_loss_weights(items: list[str]) -> Weights:
    """["hard=0", ...] → {"hard": 0.0, ...}. Raises ValueError that says what was found and expected."""
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
