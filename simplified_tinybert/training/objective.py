"""What a student minimizes: the terms of losses.py, weighted as each method has them (section 3 of the paper).

    finetune      hard                                      no teacher: how a teacher is made; the baseline without KD
    standard      alpha · soft + (1 - alpha) · hard         standard KD
    tinybert      attention + hidden, then soft             TinyBERT's task distillation, in two stages
    simplified    attention + hidden + soft + hard          Simplified TinyBERT: all of it in one stage
"""
import torch
from torch import Tensor

from simplified_tinybert.common.processes import WHOLE, Share
from simplified_tinybert.model.bert import Batch, CrossEncoder
from simplified_tinybert.training.loop import losses

METHODS = ("finetune", "standard", "tinybert", "simplified")
LAYER_TERMS, LABEL_TERMS = ("attention", "hidden"), ("soft", "hard")

Weights = dict[str, float]                              # term → weight; what is not in it is not computed


def stage_weights(method: str, alpha: float = 0.5, changed: Weights | None = None) -> list[Weights]:
    """Weights of the terms in each stage of a method; those in `changed` take the place of the method's own.

    A term of weight 0 in `changed` is left out. Of two stages the first has the layers' terms, the second the labels'.
    """
    stages = {"finetune": [{"hard": 1.0}],
              "standard": [{"soft": alpha, "hard": 1.0 - alpha}],
              "tinybert": [{"attention": 1.0, "hidden": 1.0}, {"soft": 1.0}],
              "simplified": [{"attention": 1.0, "hidden": 1.0, "soft": 1.0, "hard": 1.0}]}[method]
    for term, weight in (changed or {}).items():
        stages[0 if term in LAYER_TERMS else -1][term] = weight
    left_out = {term for term, weight in (changed or {}).items() if weight == 0}
    return [{term: stage[term] for term in LAYER_TERMS + LABEL_TERMS if term in stage and term not in left_out}
            for stage in stages]


def uses_layers(weights: Weights) -> bool:
    return not weights.keys().isdisjoint(LAYER_TERMS)


def uses_labels(weights: Weights) -> bool:
    """Whether the logits have a say: if not, pooler and classifier learn nothing."""
    return not weights.keys().isdisjoint(LABEL_TERMS)


def uses_teacher(weights: Weights) -> bool:
    return bool(weights.keys() - {"hard"})


def objective(student: CrossEncoder, teacher: CrossEncoder | None, batch: Batch, weights: Weights,
              temperature: float = 1.0, padding: str = "reference", layer_map: list[int] | None = None,
              share: Share = WHOLE) -> dict[str, Tensor]:
    """Loss terms of a batch; "loss" = cls_loss + att_loss + rep_loss (these are weighted) is what is minimized.

    layer_map: teacher layer (from 1) that each student layer learns from; None: every k-th. Where the batch is a
    `share` of a larger one, its terms are what it contributes to the larger one's means.
    """
    mapped = None
    if uses_layers(weights):
        mapped = layer_map or losses.layer_map(student.config.num_hidden_layers, teacher.config.num_hidden_layers)
    if uses_teacher(weights):
        with torch.inference_mode():
            taught = teacher(batch, layers=mapped)
    learnt = student(batch, layers=mapped and list(range(1, len(mapped) + 1)))

    masked = padding == "masked"                         # means over real tokens; otherwise examples weigh the same
    terms = {}
    if "attention" in weights:
        terms["attention"] = sum(
            losses.attention_loss(learnt.queries[layer], learnt.keys[layer], taught.queries[source],
                                  taught.keys[source], batch.attention_mask, padding)
            for layer, source in enumerate(mapped, start=1)) * (share.pairs if masked else share.examples)
    if "hidden" in weights:
        terms["hidden"] = sum(
            losses.hidden_loss(student.project(layer, learnt.hidden_states[layer]), taught.hidden_states[source],
                               batch.attention_mask, padding)
            for layer, source in enumerate([0, *mapped])) * (share.tokens if masked else share.examples)
    if "soft" in weights:
        terms["soft"] = share.examples * losses.soft_loss(learnt.logits, taught.logits, temperature)
    if "hard" in weights:
        terms["hard"] = share.examples * losses.hard_loss(learnt.logits, batch.labels)
    return summed(terms, weights)


def summed(terms: dict[str, Tensor], weights: Weights) -> dict[str, Tensor]:
    """The total and its parts as they are logged; soft_loss and hard_loss as they are before they are weighted."""
    weighted = {term: weights[term] * value for term, value in terms.items()}
    groups = {"att_loss": ("attention",), "rep_loss": ("hidden",), "cls_loss": LABEL_TERMS}
    parts = {name: sum(weighted[term] for term in group if term in weighted)
             for name, group in groups.items() if not weighted.keys().isdisjoint(group)}
    unweighted = {f"{term}_loss": terms[term] for term in LABEL_TERMS if term in terms}
    return {"loss": sum(parts.values()), **parts, **unweighted}


def parse_loss_weights(items: list[str]) -> Weights:
    """["hard=0", ...] → {"hard": 0.0, ...}. Raises ValueError that says what was found and expected."""
    weights = {}
    for item in items:
        term, _, text = item.partition("=")
        try:
            weight = float(text)
        except ValueError:
            weight = -1.0
        if term not in LAYER_TERMS + LABEL_TERMS or term in weights or not 0 <= weight < float("inf"):
            raise ValueError(f"--loss_weights {item}: expected term=weight, each term once, with a term of "
                             f"{', '.join(LAYER_TERMS + LABEL_TERMS)} and a weight of 0 or more")
        weights[term] = weight
    return weights


def formula(weights: Weights) -> str:
    return " + ".join(f"{weight:g} × {term}" for term, weight in weights.items())
