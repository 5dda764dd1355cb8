"""What a training run prints before its first step, and the model card of its student."""
import argparse

import numpy as np

from simplified_tinybert.common.files import say
from simplified_tinybert.model.bert import CrossEncoder, describe, uniform_layer_map
from simplified_tinybert.training.batches import epoch_batches
from simplified_tinybert.training.objective import formula
from simplified_tinybert.training.settings import Stage
from simplified_tinybert.training.trainer import Trainer


def describe_run(trainer: Trainer, stages: list[Stage], student_name: str, teacher_name: str | None) -> None:
    """Print models, examples and stages."""
    student, teacher, examples = trainer.student, trainer.teacher, trainer.examples
    say(f"student      {describe(student)}: {student_name}")
    if teacher:
        say(f"teacher      {describe(teacher)}: {teacher_name}")
    for stage in [stage for stage in stages if stage.objective.uses("layers")][:1]:
        layers = stage.objective.layer_map or uniform_layer_map(student.config.num_hidden_layers,
                                                                teacher.config.num_hidden_layers)
        say("layer map    student ← teacher: 0 ← 0 (embeddings), "
            + ", ".join(f"{layer} ← {teacher_layer}" for layer, teacher_layer in enumerate(layers, start=1)))
    labelled = int((examples.labels >= 0).sum())
    relevant = f"{100 * float((examples.labels == 1).sum()) / labelled:.1f} % relevant, " if labelled else ""
    say(f"examples     {len(examples):,}, {relevant}{float(examples.lengths.mean(dtype=float)):.1f} tokens on average")
    if trainer.training_set.queries is not None:
        say(f"queries      {int(trainer.training_set.queries.max()) + 1:,}, up to {trainer.settings.group_by_query} "
            f"examples of each in a batch")
    for number, stage in enumerate(stages, start=1):
        if len(stages) > 1:
            say(f"stage {number} of {len(stages)}")
        describe_stage(trainer, stage)
    if trainer.processes.count > 1:
        say(f"processes    {trainer.processes.count}, each computes part of every batch of "
            f"{trainer.settings.batch_size} examples; the first on {trainer.processes.device}")


def describe_stage(trainer: Trainer, stage: Stage) -> None:
    examples, settings, weights = trainer.examples, trainer.settings, stage.objective.weights
    steps, per_epoch = (count(trainer.epoch_size, settings) for count in (stage.total_steps, stage.steps_per_epoch))
    batches = epoch_batches(examples.lengths, settings, 0, trainer.training_set.queries)
    padding = padding_share(examples.lengths, batches, stage.pad_to(settings))
    soft = weights.get("soft", 0)
    note = f" (soft is a mean over the 2 classes: soft cross-entropy weighs {soft / 2:g})" if soft else ""
    say(f"objective    {formula(weights)}{note}")
    say(f"steps        {steps:,} = {stage.epochs:g} epochs × {per_epoch:,} steps of {settings.batch_size} × "
        f"{settings.accumulation} examples, {100 * padding:.1f} % of positions are padding; learning rate "
        f"{stage.learning_rate:g}, warm-up over {round(settings.warmup_proportion * steps):,}")


def padding_share(lengths: np.ndarray, batches: list[np.ndarray], pad_to: int | None) -> float:
    """Return the fraction of positions that are padding if batches are padded to `pad_to` or their longest example."""
    padded = sum(len(batch) * (pad_to or int(lengths[batch].max())) for batch in batches)
    return 1.0 - sum(float(lengths[batch].sum(dtype=np.int64)) for batch in batches) / padded


def general_card(args: argparse.Namespace, student: CrossEncoder) -> str:
    """Return the README.md of a general student."""
    return "\n".join(["---", "library_name: transformers", "---", f"# General student: {describe(student)}", "",
                      f"Made with `general_distill.py` from the teacher `{args.teacher_model}`; all settings are in "
                      f"run.json.", "It is not fine-tuned: use it with `distill.py --general_student_model`.", ""])


def model_card(args: argparse.Namespace, student: CrossEncoder, has_teacher: bool) -> str:
    """Return the README.md of a student."""
    teacher = f" and the teacher `{args.teacher_model}`" if has_teacher else ""
    lines = ["---", "pipeline_tag: text-ranking", "library_name: transformers", "---",
             f"# BERT re-ranker: {describe(student)}", "",
             f"Made with `distill.py --distill_model {args.distill_model}` from the student "
             f"`{args.general_student_model}`{teacher}; all settings are in run.json.",
             "Input: `[CLS] query [SEP] passage [SEP]`; class 1 of the two is relevance. In sentence-transformers:",
             "`CrossEncoder(directory).predict(pairs, apply_softmax=True)[:, 1]`."]
    if student.config.pooled_relu:
        lines += ["", "The head is classifier(relu(pooled)): score with reranker.py; other tools omit the relu."]
    return "\n".join(lines) + "\n"
