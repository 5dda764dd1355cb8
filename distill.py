"""Distill a BERT cross-encoder (teacher) into a small one (student): section 3 of the paper.

    python distill.py --features_file train.pkl --teacher_model nboost/pt-bert-base-uncased-msmarco \\
        --general_student_model huawei-noah/TinyBERT_General_6L_768D --output_student_dir student \\
        --distill_model simplified --device 0 --bf16

In: feature file(s) of labelled training pairs (tokenize_to_features.py --set_name train), a teacher fine-tuned for
ranking, and a general student (a pre-trained small BERT). Models are folders or Hugging Face hub ids. A teacher or
student with a single logit z, as most cross-encoders on the hub have it, becomes one with the two logits (0, z).

    finetune      hard                                      no teacher: how a teacher is made; the baseline without KD
    standard      alpha · soft + (1 - alpha) · hard         standard KD
    tinybert      attention + hidden, then soft             TinyBERT's task distillation, in two stages
    simplified    attention + hidden + soft + hard          Simplified TinyBERT: all of it in one stage

--loss_weights hard=0 changes single weights, 0 leaves a term out. In tinybert attention and hidden belong to the first
stage, soft and hard to the second, so that --loss_weights hard=1 gives two stages with hard labels.

Out, in --output_student_dir: the finished student as a Hugging Face folder (config.json, model.safetensors, tokenizer,
fit_dense.safetensors), train_loss.jsonl (a row every --train_loss_step steps: global_step, loss = cls_loss + att_loss +
rep_loss, the unweighted soft_loss and hard_loss, learning_rate, examples_per_second), the same for TensorBoard, and
checkpoint-<step>/ every --save_model_step steps and where a stage begins (checkpoint-0: the student before the first
step), from which --resume goes on to the same student.

With --dev_features_file (tokenize_to_features.py --set_name dev) and --dev_qrels_file the student re-ranks the dev
pairs every --eval_step steps and at the end: dev.jsonl gets a row (global_step, nDCG@10, MRR@10; documents by their
best passage), TensorBoard the same, and best/ the student with the best nDCG@10 so far; in tinybert only in the second
stage, before which the head has learnt nothing.

Several GPUs of a machine, or processes on its CPU, share every batch and end in the same student as one:

    torchrun --standalone --nproc_per_node=4 distill.py --features_file train.pkl ...
"""
import argparse
import math
from functools import partial
from pathlib import Path

import torch

from simplified_tinybert.common.checks import (
    check_dev_set,
    check_flags,
    check_length,
    check_model_fits,
    check_output_dir,
    check_pair,
    find_models,
    find_run,
)
from simplified_tinybert.common.device import keep_freed_memory, select_device
from simplified_tinybert.common.files import Problems, process_count, run_main, say
from simplified_tinybert.common.processes import Processes, process_group
from simplified_tinybert.data.cache import map_examples
from simplified_tinybert.data.features import FeatureSummary, ids_of, summarise
from simplified_tinybert.data.tokenizer_files import has_vocabulary
from simplified_tinybert.model.bert import CrossEncoder
from simplified_tinybert.model.precision import select_precision, warn_if_emulated
from simplified_tinybert.model.pretrained import fit_projections, load_ranker, save_cross_encoder
from simplified_tinybert.model.weights import weights_fingerprint
from simplified_tinybert.training.description import describe_run, model_card
from simplified_tinybert.training.distillation import (
    SETTINGS,
    add_training_flags,
    check_apex,
    make_plan,
    make_student,
    train,
)
from simplified_tinybert.training.loop import Plan
from simplified_tinybert.training.loop import objective as objectives
from simplified_tinybert.training.objective import Weights
from simplified_tinybert.training.validation import DevSet, find_dev_set, warn_of_chance


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--features_file", type=Path, nargs="+", required=True, help="feature file(s) of labelled pairs")
    add("--teacher_model", help="folder or hub id of the teacher; not needed with finetune")
    add("--general_student_model", required=True, help="folder or hub id of the student to start from")
    add("--distill_model", choices=objectives.METHODS, default="simplified",
        help="method, see above (default: simplified)")
    add("--loss_weights", nargs="+", default=[], metavar="TERM=WEIGHT",
        help="other weights of attention, hidden, soft, hard than the method's; 0 leaves a term out")
    add("--layer_map", type=int, nargs="+", metavar="LAYER",
        help="teacher layer (from 1) that each student layer learns from (default: every k-th of the teacher's)")
    add("--alpha", type=float, default=0.5, help="weight of the soft loss in standard (default: 0.5)")
    add("--temperature", type=float, default=1.0, help="softens teacher and student in the soft loss (default: 1)")
    add("--intermediate_epochs", type=float,
        help="passes over the data in the first stage of tinybert (default: --num_train_epochs)")
    add("--intermediate_learning_rate", type=float,
        help="peak learning rate of the first stage of tinybert (default: --learning_rate)")
    add("--pooled_relu", action="store_true",
        help="relu before the classifier, as the original did while distilling; stored in the student's configuration, "
             "which reranker.py obeys, but other tools do not know it")
    add("--max_seq_length", type=int, help="positions to pad to (default: as the features were made)")
    add("--do_lower_case", action="store_true", help="refuse features that were not made lower-cased")
    add("--dev_features_file", type=Path, nargs="+", help="feature file(s) of pairs to validate on")
    add("--dev_qrels_file", type=Path, help="judgements of the dev queries: query_id 0 document_id grade")
    add("--eval_step", type=int, default=1000, help="steps between validations (default: 1000)")
    add_training_flags(parser, batch_size=64, learning_rate=5e-5, epochs=2)
    args = parser.parse_args()
    if args.distill_model != "tinybert" and (args.intermediate_epochs, args.intermediate_learning_rate) != (None, None):
        parser.error("--intermediate_epochs and --intermediate_learning_rate are for --distill_model tinybert, which "
                     "has two stages")
    if args.intermediate_epochs is None:
        args.intermediate_epochs = args.num_train_epochs
    if args.intermediate_learning_rate is None:
        args.intermediate_learning_rate = args.learning_rate
    return args


def load_models(args: argparse.Namespace, stages: list[Weights], models: dict, checkpoint: Path | None,
                device: torch.device) -> tuple[CrossEncoder, CrossEncoder | None]:
    """Student (from a checkpoint if given) and teacher on the device, with the head that --pooled_relu asks for."""
    generator = torch.Generator().manual_seed(args.seed)
    folder, config = models["general student"]
    student, notes = load_ranker(checkpoint or folder, None if checkpoint else config, new_head=generator)
    teacher = None
    if "teacher" in models:
        teacher, more = load_ranker(*models["teacher"])
        teacher.requires_grad_(False)
        notes += more
    for model in filter(None, (student, teacher)):
        model.config.pooled_relu = args.pooled_relu or getattr(model.config, "pooled_relu", False)
    if any("hidden" in weights for weights in stages):
        notes += fit_projections(student, teacher.config.hidden_size, generator)
    for note in notes:
        say(f"note         {note}")
    return student.to(device), teacher and teacher.to(device)


def settings(args: argparse.Namespace, stages: list[Weights], models: dict, summary: FeatureSummary,
             dev_set: DevSet | None) -> dict:
    """What must not change when a run is resumed."""
    names = (*SETTINGS, "distill_model", "max_seq_length", "temperature", "pooled_relu", "layer_map",
             "intermediate_epochs", "intermediate_learning_rate")
    validation = [*dev_set.fingerprints(), args.eval_step] if dev_set else None
    inputs = {role: weights_fingerprint(folder) for role, (folder, _) in models.items()}
    return {name: getattr(args, name) for name in names} | inputs | {
        "loss_weights": stages, "features": summary.fingerprint, "validation": validation,
        "processes": process_count()}


def find_stages(args: argparse.Namespace, problems: Problems) -> list[Weights]:
    """Weights of the loss terms in each stage."""
    try:
        changed = objectives.parse_loss_weights(args.loss_weights)
    except ValueError as error:
        problems.add(str(error))
        return []
    stages = objectives.stage_weights(args.distill_model, args.alpha, changed)
    for number, weights in enumerate(stages, start=1):
        if not any(weights.values()):
            problems.add(f"--loss_weights {' '.join(args.loss_weights)}: nothing is left to minimize in stage {number} "
                         f"of {args.distill_model}; leave a weight above 0")
    if any(map(objectives.uses_teacher, stages)) and not args.teacher_model:
        problems.add(f"--distill_model {args.distill_model} needs --teacher_model")
    return stages


def check_numbers(args: argparse.Namespace, problems: Problems) -> None:
    check_flags(args, problems, [
        ("num_train_epochs", 0 < args.num_train_epochs < math.inf, "more than 0"),
        ("alpha", 0 <= args.alpha <= 1, "0 to 1"), ("eval_step", args.eval_step >= 1, "1 or more"),
        ("temperature", 0 < args.temperature < math.inf, "more than 0"),
        ("intermediate_epochs", 0 < args.intermediate_epochs < math.inf, "more than 0"),
        ("intermediate_learning_rate", 0 <= args.intermediate_learning_rate < math.inf, "0 or more")])


def check_settings(args: argparse.Namespace, problems: Problems) -> dict:
    """Role → directory and configuration of the models; what is wrong before features are there is added to problems.
    """
    stages = find_stages(args, problems)
    check_numbers(args, problems)
    check_apex(args, len(stages), problems)
    check_output_dir(args.output_student_dir, args.resume, problems)
    roles = {"general student": args.general_student_model}
    if any(map(objectives.uses_teacher, stages)):
        roles["teacher"] = args.teacher_model
    models = find_models(roles, problems)
    if any(map(objectives.uses_layers, stages)) and len(models) == 2:
        check_pair(models["teacher"][1], models["general student"][1], problems, args.layer_map)
    return models


def check_all(args: argparse.Namespace, stages: list[Weights], problems: Problems) \
        -> tuple[dict, FeatureSummary, int, DevSet | None]:
    """Models, features, padded length, dev set, once everything is known to fit. Raises UserError otherwise."""
    models, summary, width = check_settings(args, problems), summarise(args.features_file, problems), 0
    dev_set = find_dev_set(args.dev_features_file, args.dev_qrels_file, problems)
    if dev_set and stages and not any(map(objectives.uses_labels, stages)):
        problems.add(f"--dev_features_file: --loss_weights {' '.join(args.loss_weights)} leaves the head untrained, so "
                     f"that the student ranks at random; leave the flag out")
    if dev_set and "general student" in models:
        check_dev_set(dev_set.summary, summary, models["general student"][1], problems)
    if summary:
        width = check_length(args.max_seq_length, summary, problems)
        for role, (folder, config) in models.items():
            check_model_fits(role, folder, config, summary, width, problems)
        if summary.labelled < summary.examples:
            problems.add(f"{summary.examples - summary.labelled} of {summary.examples} examples have no label; "
                         f"training needs features made with --set_name train")
        if args.do_lower_case and not summary.header["lower_case"]:
            problems.add("--do_lower_case: the features are cased; tokenize again with --do_lower_case")
    problems.raise_if_any()
    return models, summary, width, dev_set


def make_plans(args: argparse.Namespace, stages: list[Weights], width: int) -> list[Plan]:
    first, last = ((args.intermediate_epochs, args.intermediate_learning_rate),
                   (args.num_train_epochs, args.learning_rate))
    return [make_plan(args, weights, width, *times)
            for weights, times in zip(stages, [first, last][-len(stages):])]


def distill(args: argparse.Namespace, device: torch.device, processes: Processes) -> None:
    problems = Problems()
    dtype = select_precision(args.fp16, args.bf16, device, problems)
    stages = find_stages(args, Problems())
    models, summary, width, dev_set = check_all(args, stages, problems)
    facts = {"settings": settings(args, stages, models, summary, dev_set), "device": str(device)}
    finished, checkpoint = find_run(args.output_student_dir, facts["settings"])
    processes.check_agreement(facts["settings"] | {"checkpoint": checkpoint})
    if finished:
        say(f"{args.output_student_dir}: the student is finished already; remove the folder to distill it again")
        return

    warn_if_emulated(dtype, device)
    student, teacher = load_models(args, stages, models, checkpoint, device)
    args.cache_file_dir.mkdir(parents=True, exist_ok=True)
    with processes.first_on_machine():
        examples = map_examples(args.features_file, summary, args.cache_file_dir)
    plans = make_plans(args, stages, width)
    if teacher and not checkpoint and processes.first:
        warn_of_chance(teacher, examples, device, dtype)
    describe_run(args, student, teacher, examples, plans, processes, args.general_student_model)
    tokenizer_folder = next((folder for folder, _ in models.values() if has_vocabulary(folder)), None)

    def save_model(folder: Path) -> None:
        save_cross_encoder(student, folder, tokenizer_folder, summary.header["lower_case"],
                           model_card(args, student, teacher is not None))

    make_student(args, facts, processes, save_model, partial(
        train, args, student, teacher, examples, plans, dtype, save_model, checkpoint, processes,
        partial(ids_of, args.features_file), dev_set))


def main() -> None:
    args = parse_args()
    device = select_device(args.device, args.no_cuda)
    keep_freed_memory(device)
    with process_group(device) as processes:
        distill(args, device, processes)


if __name__ == "__main__":
    run_main(main, several=True)
