"""What a distillation tells: on the terminal before its first step, and in the model card of its student."""
import argparse

from simplified_tinybert.common.files import say
from simplified_tinybert.common.processes import Processes
from simplified_tinybert.data.features import Examples
from simplified_tinybert.model.bert import CrossEncoder, describe
from simplified_tinybert.training.loop import Plan, epoch_batches, padding_share
from simplified_tinybert.training.losses import layer_map
from simplified_tinybert.training.objective import formula, uses_layers


def describe_run(args: argparse.Namespace, student: CrossEncoder, teacher: CrossEncoder | None, examples: Examples,
                 plans: list[Plan], processes: Processes, start: str) -> None:
    """Print what follows from the settings, before the first step. start: what the student starts from."""
    say(f"student      {describe(student)}: {start}")
    if teacher:
        say(f"teacher      {describe(teacher)}: {args.teacher_model}")
    if any(uses_layers(plan.weights) for plan in plans):
        layers = getattr(args, "layer_map", None) or layer_map(student.config.num_hidden_layers,
                                                               teacher.config.num_hidden_layers)
        say("layer map    student ← teacher: 0 ← 0 (embeddings), "
            + ", ".join(f"{layer} ← {source}" for layer, source in enumerate(layers, start=1)))
    labelled = int((examples.labels >= 0).sum())
    say(f"examples     {len(examples):,}, "
        + (f"{100 * float((examples.labels == 1).sum()) / labelled:.1f} % relevant, " if labelled else "")
        + f"{float(examples.lengths.mean(dtype=float)):.1f} word pieces on average")
    for number, plan in enumerate(plans, start=1):
        if len(plans) > 1:
            say(f"stage {number} of {len(plans)}")
        describe_stage(args, examples, plan)
    if processes.count > 1:
        say(f"processes    {processes.count}, each computes its part of {args.train_batch_size} examples; the first on "
            f"{processes.device}")


def describe_stage(args: argparse.Namespace, examples: Examples, plan: Plan) -> None:
    steps, per_epoch = plan.total_steps(len(examples)), plan.steps_per_epoch(len(examples))
    batches = epoch_batches(examples.lengths, plan.batch_size, plan.seed, 0, plan.bucket)
    padding = padding_share(examples.lengths, batches, plan.width)
    soft = plan.weights.get("soft", 0)
    say(f"objective    {formula(plan.weights)}"
        + (f" (soft is a mean over the 2 classes: soft cross-entropy weighs {soft / 2:g})" if soft else ""))
    say(f"steps        {steps:,} = {plan.epochs:g} epochs × {per_epoch:,} steps of {plan.batch_size} × "
        f"{plan.accumulation} examples, {100 * padding:.1f} % of positions are padding; learning rate "
        f"{plan.learning_rate:g}, warm-up over {round(args.warmup_proportion * steps):,}")


def general_card(args: argparse.Namespace, student: CrossEncoder) -> str:
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
             "`CrossEncoder(folder).predict(pairs, apply_softmax=True)[:, 1]`."]
    if student.config.pooled_relu:
        lines += ["", "The head is classifier(relu(pooled)): score with reranker.py, other tools leave the relu out."]
    return "\n".join(lines) + "\n"
