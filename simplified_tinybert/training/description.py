"""What a training says before its first step, and the model card of its student."""
import argparse

from simplified_tinybert.common.files import say
from simplified_tinybert.model.bert import CrossEncoder, describe, uniform_layer_map
from simplified_tinybert.training.flags import Stage
from simplified_tinybert.training.loop import Trainer, epoch_batches, padding_share
from simplified_tinybert.training.objective import formula


def describe_run(trainer: Trainer, stages: list[Stage], student_name: str, teacher_name: str | None) -> None:
    """Print what follows from the settings."""
    student, teacher, examples = trainer.student, trainer.teacher, trainer.examples
    say(f"student      {describe(student)}: {student_name}")
    if teacher:
        say(f"teacher      {describe(teacher)}: {teacher_name}")
    for stage in [stage for stage in stages if stage.objective.uses("layers")][:1]:
        layers = stage.objective.layer_map or uniform_layer_map(student.config.num_hidden_layers,
                                                                teacher.config.num_hidden_layers)
        say("layer map    student ← teacher: 0 ← 0 (embeddings), "
            + ", ".join(f"{layer} ← {source}" for layer, source in enumerate(layers, start=1)))
    labelled = int((examples.labels >= 0).sum())
    say(f"examples     {len(examples):,}, "
        + (f"{100 * float((examples.labels == 1).sum()) / labelled:.1f} % relevant, " if labelled else "")
        + f"{float(examples.lengths.mean(dtype=float)):.1f} tokens on average")
    for number, stage in enumerate(stages, start=1):
        if len(stages) > 1:
            say(f"stage {number} of {len(stages)}")
        describe_stage(trainer, stage)
    if trainer.processes.count > 1:
        say(f"processes    {trainer.processes.count}, each computes its part of {trainer.settings.batch_size} "
            f"examples; the first on {trainer.processes.device}")


def describe_stage(trainer: Trainer, stage: Stage) -> None:
    examples, settings, weights = trainer.examples, trainer.settings, stage.objective.weights
    steps, per_epoch = (count(len(examples), settings) for count in (stage.total_steps, stage.steps_per_epoch))
    padding = padding_share(examples.lengths, epoch_batches(examples.lengths, settings, 0), stage.pad_to(settings))
    soft = weights.get("soft", 0)
    say(f"objective    {formula(weights)}"
        + (f" (soft is a mean over the 2 classes: soft cross-entropy weighs {soft / 2:g})" if soft else ""))
    say(f"steps        {steps:,} = {stage.epochs:g} epochs × {per_epoch:,} steps of {settings.batch_size} × "
        f"{settings.accumulation} examples, {100 * padding:.1f} % of positions are padding; learning rate "
        f"{stage.learning_rate:g}, warm-up over {round(settings.warmup_proportion * steps):,}")


def general_card(args: argparse.Namespace, student: CrossEncoder) -> str:
    """The README.md of a general student."""
    return "\n".join(["---", "library_name: transformers", "---", f"# General student: {describe(student)}", "",
                      f"Made with `general_distill.py` from the teacher `{args.teacher_model}`; all settings are in "
                      f"run.json.", "It is not fine-tuned: `distill.py --general_student_model` takes it.", ""])


def model_card(args: argparse.Namespace, student: CrossEncoder, taught: bool) -> str:
    """The README.md of a student; `taught`: whether its objective looks at the teacher."""
    teacher = f" and the teacher `{args.teacher_model}`" if taught else ""
    lines = ["---", "pipeline_tag: text-ranking", "library_name: transformers", "---",
             f"# BERT re-ranker: {describe(student)}", "",
             f"Made with `distill.py --distill_model {args.distill_model}` from the student "
             f"`{args.general_student_model}`{teacher}; all settings are in run.json.",
             "Input: `[CLS] query [SEP] passage [SEP]`; class 1 of the two is relevance. In sentence-transformers:",
             "`CrossEncoder(directory).predict(pairs, apply_softmax=True)[:, 1]`."]
    if student.config.pooled_relu:
        lines += ["", "The head is classifier(relu(pooled)): score with reranker.py, other tools leave the relu out."]
    return "\n".join(lines) + "\n"
