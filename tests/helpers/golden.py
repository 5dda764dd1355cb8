"""The golden cases: figures of the original implementation and the models that belong to them."""
import torch

from helpers.training import arguments
from simplified_tinybert.model.pretrained import load_cross_encoder
from simplified_tinybert.training.objective import stage_weights

CASES = range(16)
# Relative errors of the losses of six training steps: three times what a CPU's autocast showed (bf16: 0.0005, 0.0053,
# 0.1153; fp16: 0.0019 in the worst case). The learning rate is large, so that later steps amplify rounding.
HALF_TOLERANCES = {"--bf16": {2: 0.002, 6: 0.016, 12: 0.35}, "--fp16": dict.fromkeys((2, 6, 12), 0.006)}
# With fp16 on a GPU, float32 products are TF32, which rounds as much. An H100 showed an error of 0.0328 in case 12.
GPU_TOLERANCES = HALF_TOLERANCES | {"--fp16": HALF_TOLERANCES["--fp16"] | {12: 0.1}}
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


def golden_training(case, features, models, output):
    """Return arguments of distill.py for the training of a golden case."""
    return arguments(
        features, models, output, "--distill_model", case["distill_model"], "--temperature", case["temperature"],
        "--alpha", case["alpha"], "--train_batch_size", 6, "--num_train_epochs", 10, "--learning_rate", 2e-3,
        "--warmup_proportion", 0.2, "--train_loss_step", 1, *(["--pooled_relu"] if case["head"] == "tinybert" else []),
        student=case["student"])


def golden_name(name):
    return name.replace("projections.0", "fit_dense")
