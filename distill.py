"""Distill a BERT cross-encoder (teacher) into a small one (student).

    python distill.py --features_file train.pkl --teacher_model nboost/pt-bert-base-uncased-msmarco \\
        --general_student_model huawei-noah/TinyBERT_General_6L_768D --output_student_dir student \\
        --distill_model simplified --device 0 --bf16

Input: feature files of labelled training pairs (tokenize_to_features.py --set_name train), a teacher fine-tuned for
ranking, and a general student (a small BERT to start from). Models are directories or Hugging Face hub ids. Most
cross-encoders on the hub have a single logit z; such a model is converted to one with the two logits (0, z).
--teacher_scores_file: any ranker's scores replace those of the teacher: example_id <tab> score, plain or gzip.

    finetune      hard                                      no teacher: to make a teacher, or a baseline without KD
    standard      alpha · soft + (1 - alpha) · hard         standard KD
    tinybert      attention + hidden, then soft             TinyBERT's task distillation, in two stages
    simplified    attention + hidden + soft + hard          Simplified TinyBERT: all terms in one stage

--loss_weights hard=0 changes single weights; 0 leaves a term out. In tinybert, attention and hidden belong to the first
stage, all others to the second: --loss_weights hard=1 adds hard labels to the second stage. margin and listwise are
ranking losses: --loss_weights margin=1 --group_by_query 4 (docs/objectives.md).

Output, in --output_student_dir: the finished student as a Hugging Face directory (config.json, model.safetensors,
tokenizer, fit_dense.safetensors); train_loss.jsonl, a row every --train_loss_step steps (global_step, loss = cls_loss +
att_loss + rep_loss, the unweighted terms of cls_loss, learning_rate, examples_per_second), also for TensorBoard;
checkpoint-<step>/ every --save_model_step steps and at the start of each stage (checkpoint-0: the student before
training). --resume continues from the newest checkpoint and ends in the same student.

With --dev_features_file (tokenize_to_features.py --set_name dev) and --dev_qrels_file, the student re-ranks the dev
pairs every --eval_step steps and at the end. dev.jsonl gets a row (global_step, nDCG@10, MRR@10; documents are scored
by their best passage), and best/ holds the student with the best nDCG@10 so far. In tinybert, this starts in the second
stage, because the first does not train the head.

Several GPUs or CPU processes share each batch. Only dropout and rounding differ from one process:

    torchrun --standalone --nproc_per_node=4 distill.py --features_file train.pkl ...
"""
import argparse
import hashlib
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from simplified_tinybert.checks import compatibility
from simplified_tinybert.common.device import explain_full_memory, prepare_device, select_device
from simplified_tinybert.common.files import Problems, process_count, run_main, say
from simplified_tinybert.common.processes import Processes, process_group
from simplified_tinybert.data.cache import map_examples
from simplified_tinybert.data.features import FeatureSummary, summarise
from simplified_tinybert.model.bert import CrossEncoder
from simplified_tinybert.model.configuration import Models, find_models
from simplified_tinybert.model.precision import select_precision, warn_if_slow
from simplified_tinybert.model.pretrained import fit_projections, load_ranker, save_cross_encoder
from simplified_tinybert.model.weights import model_checksum
from simplified_tinybert.ranking.teacher_scores import SCORE_TYPES, read_teacher_scores
from simplified_tinybert.tokenization.tokenizer_files import has_vocabulary
from simplified_tinybert.training import settings as training_settings
from simplified_tinybert.training.batches import check_queries, number_queries
from simplified_tinybert.training.checkpoints import find_run, name_way_out, output_run
from simplified_tinybert.training.description import describe_run, model_card
from simplified_tinybert.training.objective import METHODS, ObjectiveSettings
from simplified_tinybert.training.settings import Stage, TrainingSettings, make_stages, runs_teacher, uses
from simplified_tinybert.training.trainer import Trainer, TrainingSet
from simplified_tinybert.training.validation import DevSet, find_dev_set, sample_of, scores_of, warn_of_chance


@dataclass(frozen=True, kw_only=True)
class Inputs:
    stages: list[Stage]
    models: Models
    features: FeatureSummary
    max_seq_length: int
    dev_set: DevSet | None
    teacher_scores: np.ndarray | None                   # (N), of --teacher_scores_file


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--features_file", type=Path, nargs="+", required=True, help="feature file(s) of labelled pairs")
    add("--teacher_model", help="directory or hub id of the teacher; not needed with finetune")
    add("--teacher_scores_file", type=Path, nargs="+", metavar="FILE", help="soft labels of any ranker; several files: "
        "their mean. --teacher_model is then only needed for attention and hidden")
    add("--teacher_scores", choices=SCORE_TYPES, default="log_odds",
        help="what the scores in --teacher_scores_file are (default: log_odds)")
    add("--general_student_model", required=True, help="directory or hub id of the student to start from")
    add("--distill_model", choices=METHODS, default="simplified", help="method, see above (default: simplified)")
    add("--loss_weights", nargs="+", default=[], metavar="TERM=WEIGHT",
        help="change the method's weights of attention, hidden, soft, hard, margin or listwise; 0 leaves a term out")
    add("--group_by_query", type=int, metavar="N", help="batches of whole queries, with N passages of each (fewer if "
        "it has fewer), drawn anew in each epoch; an epoch is a pass over the queries. margin and listwise need it")
    add("--layer_map", type=int, nargs="+", metavar="LAYER",
        help="teacher layer (from 1) for each student layer (default: every k-th)")
    add("--alpha", type=float, default=0.5, help="weight of the soft loss in standard (default: 0.5)")
    add("--temperature", type=float, default=ObjectiveSettings.temperature,
        help="divides the logits of both models in the soft and listwise losses (default: 1)")
    add("--intermediate_epochs", type=float,
        help="passes over the data in the first stage of tinybert (default: --num_train_epochs)")
    add("--intermediate_learning_rate", type=float,
        help="peak learning rate of the first stage of tinybert (default: --learning_rate)")
    add("--pooled_relu", action="store_true",
        help="apply a ReLU before the classifier, as the original does in distillation. It is stored in the student's "
             "configuration, which reranker.py obeys; other tools ignore it")
    add("--max_seq_length", type=int, help="sequence length to pad to (default: that of the features)")
    add("--do_lower_case", action="store_true", help="require lower-cased features")
    add("--dev_features_file", type=Path, nargs="+", help="feature file(s) of validation pairs")
    add("--dev_qrels_file", type=Path, help="judgements of the dev queries: query_id 0 document_id grade")
    add("--eval_step", type=int, default=TrainingSettings.eval_every,
        help=f"steps between validations (default: {TrainingSettings.eval_every})")
    training_settings.add_training_flags(parser, batch_size=64, learning_rate=5e-5, epochs=2)
    args = parser.parse_args()
    if args.distill_model != "tinybert" and (args.intermediate_epochs, args.intermediate_learning_rate) != (None, None):
        parser.error("--intermediate_epochs and --intermediate_learning_rate are for --distill_model tinybert, which "
                     "has two stages")
    if args.intermediate_epochs is None:
        args.intermediate_epochs = args.num_train_epochs
    if args.intermediate_learning_rate is None:
        args.intermediate_learning_rate = args.learning_rate
    return args


def check_numbers(args: argparse.Namespace, problems: Problems) -> list[Stage]:
    """Check only the flags, and return the stages. collection.sh calls this before any file exists."""
    stages = make_stages(args, problems)
    training_settings.check_training_flags(args, len(stages), problems, [
        ("num_train_epochs", 0 < args.num_train_epochs < math.inf, "more than 0"),
        ("alpha", 0 <= args.alpha <= 1, "0 to 1"), ("eval_step", args.eval_step >= 1, "1 or more"),
        ("group_by_query", args.group_by_query is None or 2 <= args.group_by_query <=
         args.train_batch_size // process_count(), "2 to --train_batch_size"
         + (" divided by the number of processes" if process_count() > 1 else "")),
        ("temperature", 0 < args.temperature < math.inf, "more than 0"),
        ("intermediate_epochs", args.intermediate_epochs == args.num_train_epochs or
         0 < args.intermediate_epochs < math.inf, "more than 0"),
        ("intermediate_learning_rate", args.intermediate_learning_rate == args.learning_rate or
         0 <= args.intermediate_learning_rate < math.inf, "0 or more")])
    if args.group_by_query and args.train_batch_size % args.group_by_query:
        problems.add(f"--train_batch_size {args.train_batch_size}: expected a multiple of --group_by_query "
                     f"{args.group_by_query}")
    if runs_teacher(stages) and not args.teacher_model:
        problems.add(f"--distill_model {args.distill_model} needs --teacher_model"
                     + (" for its attention and hidden terms" if args.teacher_scores_file else ""))
    if args.teacher_scores == "probability" and not args.teacher_scores_file:
        problems.add("--teacher_scores probability: needs --teacher_scores_file")
    if args.teacher_scores_file and stages and not uses(stages, "scores"):
        problems.add(f"--teacher_scores_file: --distill_model {args.distill_model} uses no soft labels; leave it out")
    return stages


def check_settings(args: argparse.Namespace, problems: Problems) -> Models:
    """Check flags and models. distill.sh calls this before the features exist."""
    return find_student_and_teacher(args, check_numbers(args, problems), problems)


def find_student_and_teacher(args: argparse.Namespace, stages: list[Stage], problems: Problems) -> Models:
    """Find student and teacher, and check that their layers can be matched."""
    models = find_models({
        "general student": args.general_student_model,
        "teacher": args.teacher_model if runs_teacher(stages) else None}, problems)
    if uses(stages, "layers") and len(models) == 2:
        compatibility.check_pair(models["teacher"].config, models["general student"].config, problems, args.layer_map)
    return models


def check_inputs(args: argparse.Namespace, problems: Problems) -> Inputs:
    """Find the inputs and check that they fit together. Raises UserError with all problems."""
    stages = check_numbers(args, problems)
    models = find_student_and_teacher(args, stages, problems)
    features, max_seq_length = summarise(args.features_file, problems), 0
    if features:
        max_seq_length = compatibility.check_length(args.max_seq_length, features, problems)
        for role, (directory, config) in models.items():
            compatibility.check_model_fits(role, directory, config, features, max_seq_length, problems)
        if features.labelled < features.examples:
            problems.add(f"{features.examples - features.labelled} of {features.examples} examples have no label; "
                         f"training needs features made with --set_name train")
        if args.do_lower_case and not features.header["lower_case"]:
            problems.add("--do_lower_case: the features are cased; tokenize again with --do_lower_case")
    dev_set = find_dev_set(args.dev_features_file, args.dev_qrels_file, problems)
    if dev_set and stages and not uses(stages, "head"):
        problems.add(f"--dev_features_file: with --loss_weights {' '.join(args.loss_weights)} the head is not trained "
                     f"and the student ranks at random; leave the flag out")
    if dev_set and "general student" in models:
        compatibility.check_dev_set(dev_set.summary, features, models["general student"].config, problems)
    problems.raise_if_any()
    scores = read_teacher_scores(args.teacher_scores_file, args.teacher_scores, features,
                                 problems) if args.teacher_scores_file else None
    problems.raise_if_any()
    return Inputs(stages=stages, models=models, features=features, max_seq_length=max_seq_length, dev_set=dev_set,
                  teacher_scores=scores)


def resumable_settings(args: argparse.Namespace, inputs: Inputs) -> dict:
    """Return the settings that must not change when a run is resumed."""
    settings = training_settings.resumable_settings(args, (
        "distill_model", "max_seq_length", "temperature", "pooled_relu", "layer_map", "intermediate_epochs",
        "intermediate_learning_rate"))
    models = {role: model_checksum(directory) for role, (directory, _) in inputs.models.items()}
    if inputs.teacher_scores is not None:
        settings["teacher_scores"] = hashlib.sha256(inputs.teacher_scores.tobytes()).hexdigest()
    if args.group_by_query:
        settings["group_by_query"] = args.group_by_query
    return settings | models | {
        "loss_weights": [stage.objective.weights for stage in inputs.stages], "features": inputs.features.checksum,
        "validation": [*inputs.dev_set.checksums(), args.eval_step] if inputs.dev_set else None}


def load_models(args: argparse.Namespace, inputs: Inputs,
                checkpoint: Path | None) -> tuple[CrossEncoder, CrossEncoder | None]:
    """Load the student, from the checkpoint if there is one, and the teacher."""
    generator = torch.Generator().manual_seed(args.seed)
    directory, config = inputs.models["general student"]
    with name_way_out(checkpoint):
        student, notes = load_ranker(checkpoint or directory, None if checkpoint else config, new_head=generator)
    teacher = None
    if "teacher" in inputs.models:
        teacher, teacher_notes = load_ranker(*inputs.models["teacher"])
        teacher.requires_grad_(False)
        notes += teacher_notes
    for model in filter(None, (student, teacher)):
        model.config.pooled_relu = args.pooled_relu or getattr(model.config, "pooled_relu", False)
    if any("hidden" in stage.objective.weights for stage in inputs.stages):
        notes += fit_projections(student, teacher.config.hidden_size, generator)
    for note in notes:
        say(f"note         {note}")
    if args.teacher_scores_file:
        say(f"soft labels  {', '.join(map(str, args.teacher_scores_file))}" + ("; --teacher_model is not needed"
            if args.teacher_model and not teacher else ""))
    return student, teacher


def distill(args: argparse.Namespace, processes: Processes) -> None:
    device, problems = processes.device, Problems()
    dtype = select_precision(args, device, problems)
    inputs = check_inputs(args, problems)
    run = find_run(args, resumable_settings(args, inputs), processes)
    if run.finished:
        return

    warn_if_slow(dtype, device)
    if processes.first:
        training_settings.warn_of_unused(args, inputs.stages)
    student, teacher = load_models(args, inputs, run.checkpoint)
    student, teacher = student.to(device), teacher and teacher.to(device)
    args.cache_file_dir.mkdir(parents=True, exist_ok=True)
    with processes.first_on_machine():
        examples = map_examples(args.features_file, inputs.features, args.cache_file_dir)
    queries = None
    if args.group_by_query:
        queries = number_queries(examples, inputs.features.header["max_seq_length"])
        check_queries(queries, examples.labels, inputs.stages[-1].objective.weights)
    from_file = inputs.teacher_scores is not None
    if (teacher or from_file) and not run.checkpoint and processes.first:
        sample = sample_of(examples)
        scores = inputs.teacher_scores[sample] if from_file else scores_of(teacher, examples, sample, device, dtype)
        warn_of_chance(scores, examples.labels[sample])
    with_vocabulary = [directory for directory, _ in inputs.models.values() if has_vocabulary(directory)]
    save_model = partial(save_cross_encoder, tokenizer_directory=with_vocabulary[0] if with_vocabulary else None,
                         lower_case=inputs.features.header["lower_case"], card=model_card(args, student, bool(teacher)))
    settings = TrainingSettings.from_args(args, dtype, inputs.max_seq_length, args.eval_step, args.group_by_query)
    with output_run(run, save_model) as run:
        training_set = TrainingSet(examples, args.features_file, inputs.teacher_scores, queries)
        trainer = Trainer(student, teacher, training_set, settings, run, inputs.dev_set)
        describe_run(trainer, inputs.stages, args.general_student_model, args.teacher_model)
        trainer.train(inputs.stages)


def main() -> None:
    args = parse_args()
    device = select_device(args.device, args.no_cuda)
    with explain_full_memory(training_settings.SMALLER_BATCHES):
        prepare_device(device, args.tf32 or args.fp16 or args.bf16)
        with process_group(device) as processes:
            distill(args, processes)


if __name__ == "__main__":
    run_main(main, distributed=True)
