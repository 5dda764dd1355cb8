"""The golden cases: figures of the original implementation and the models that belong to them."""
import torch

from simplified_tinybert.model.pretrained import load_cross_encoder
from simplified_tinybert.training.objective import stage_weights

CASES = range(16)
TERMS = {"soft_loss": "soft", "hard_loss": "hard", "loss": "total", "att_loss": "attention", "rep_loss": "hidden",
         "cls_loss": "classification"}


def load_case(golden, golden_models, number, dtype=torch.float64):
    case = golden["cases"][number]
    student, _ = load_cross_encoder(golden_models[case["student"]], dtype=dtype)
    teacher, _ = load_cross_encoder(golden_models["teacher"], dtype=dtype)
    for model in (student, teacher):
        model.config.pooled_relu = case["head"] == "tinybert"
    weights, = stage_weights(case["distill_model"], case["alpha"])
    return case, student, teacher, {"weights": weights, "temperature": case["temperature"], "padding": "reference"}


def golden_name(name):
    return name.replace("projections.0", "fit_dense")
