"""What a distillation tells: on the terminal before its first step, and in the model card of its student."""
import argparse

from simplified_tinybert.distributed import Processes
from simplified_tinybert.features import Examples, FeatureSummary
from simplified_tinybert.files import say
from simplified_tinybert.losses import layer_map
from simplified_tinybert.modeling import CrossEncoder, describe
from simplified_tinybert.training import Plan, epoch_batches, padding_share


def describe_run(args: argparse.Namespace, student: CrossEncoder, teacher: CrossEncoder | None, examples: Examples,
                 summary: FeatureSummary, plan: Plan, processes: Processes) -> None:
    """Print what follows from the settings, before the first step."""
    steps, per_epoch = plan.total_steps(len(examples)), plan.steps_per_epoch(len(examples))
    batches = epoch_batches(examples.lengths, plan.batch_size, plan.seed, 0, plan.bucket)
    padding = padding_share(examples.lengths, batches, plan.width)
    say(f"student      {describe(student)}: {args.general_student_model}")
    if teacher:
        say(f"teacher      {describe(teacher)}: {args.teacher_model}")
    if args.distill_model == "simplified":
        layers = layer_map(student.config.num_hidden_layers, teacher.config.num_hidden_layers)
        say("layer map    student ← teacher: 0 ← 0 (embeddings), "
            + ", ".join(f"{layer} ← {source}" for layer, source in enumerate(layers, start=1)))
    weights = {"finetune": "1 × hard", "standard": f"{args.alpha:g} × soft + {1 - args.alpha:g} × hard",
               "simplified": "1 × attention + 1 × hidden + 1 × soft + 1 × hard"}[args.distill_model]
    soft = {"finetune": 0, "standard": args.alpha, "simplified": 1}[args.distill_model]
    say(f"objective    {args.distill_model}: {weights}"
        + (f" (soft is a mean over the 2 classes: soft cross-entropy weighs {soft / 2:g})" if soft else ""))
    say(f"examples     {len(examples):,}, {100 * float((examples.labels == 1).mean()):.1f} % relevant, "
        f"{summary.tokens / len(examples):.1f} word pieces on average; {100 * padding:.1f} % of positions are padding")
    say(f"steps        {steps:,} = {plan.epochs:g} epochs × {per_epoch:,} steps of {plan.batch_size} × "
        f"{plan.accumulation} examples; warm-up over {round(args.warmup_proportion * steps):,}")
    if processes.count > 1:
        say(f"processes    {processes.count}, each computes its part of the {plan.batch_size} examples; the first on "
            f"{processes.device}")


def model_card(args: argparse.Namespace, student: CrossEncoder) -> str:
    teacher = f" and the teacher `{args.teacher_model}`" if args.distill_model != "finetune" else ""
    lines = ["---", "pipeline_tag: text-ranking", "library_name: transformers", "---",
             f"# BERT re-ranker: {describe(student)}", "",
             f"Made with `distill.py --distill_model {args.distill_model}` from the student "
             f"`{args.general_student_model}`{teacher}; all settings are in run.json.",
             "Input: `[CLS] query [SEP] passage [SEP]`; class 1 of the two is relevance. In sentence-transformers:",
             "`CrossEncoder(folder).predict(pairs, apply_softmax=True)[:, 1]`."]
    if student.config.pooled_relu:
        lines += ["", "The head is classifier(relu(pooled)): score with reranker.py, other tools leave the relu out."]
    return "\n".join(lines) + "\n"
