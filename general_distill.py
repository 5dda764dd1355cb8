"""Make a general student: TinyBERT's general distillation, from a BERT that was not fine-tuned, on raw text.

    python general_distill.py --corpus texts.txt more.txt.gz --teacher_model google-bert/bert-base-uncased \\
        --student_config student_config.json --output_student_dir general_student --device 0 --bf16
    python general_distill.py --docs docs.tsv --teacher_model google-bert/bert-base-uncased \\
        --student_layers 6 --init_from_teacher --output_student_dir general_student

In, UTF-8, plain or gzip: --corpus, text files with one document a line (--documents paragraphs: documents separated by
blank lines); or --docs, documents as prepare_examples.py takes them (document_id <tab> url <tab> title <tab> body, or
document_id <tab> text), of which title and body are used. Each document is cut into segments [CLS] up to
max_seq_length - 2 tokens [SEP]; nothing is masked.
The student has the shape of --student_config (a config.json, or the directory of one), or the teacher's with
--student_layers. What it starts from:
    (no flag)             random weights
    --init_from_teacher   the teacher's embeddings, pooler and every k-th layer; needs the teacher's hidden size
    --compress_teacher    a fit to what the teacher computes on some of the text, for a student of any smaller shape
                          (simplified_tinybert/model/compression.py); helps where there is too little text to learn a
                          language from
It learns attention + hidden (Jiao et al. 2020, as TinyBERT's general stage).

Out, in --output_student_dir: the general student, which distill.py takes as --general_student_model, as a Hugging Face
directory (without classifier; fit_dense.safetensors holds the projection to the teacher's width), train_loss.jsonl and
checkpoints as from distill.py. --num_train_epochs 0 trains nothing and writes what the student starts from.

Several GPUs or processes: torchrun --standalone --nproc_per_node=4 general_distill.py --corpus ...
"""
import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig

from simplified_tinybert.common.checks import check_pair, find_models
from simplified_tinybert.common.device import keep_freed_memory, select_device
from simplified_tinybert.common.files import Problems, UserError, process_count, run_main
from simplified_tinybert.common.processes import Processes, process_group
from simplified_tinybert.data.corpus import COLUMNS, DOCUMENTS, check_corpus, map_corpus
from simplified_tinybert.data.features import Examples
from simplified_tinybert.model.bert import Batch, CrossEncoder
from simplified_tinybert.model.compression import compress
from simplified_tinybert.model.configuration import read_config
from simplified_tinybert.model.precision import select_precision, warn_if_emulated
from simplified_tinybert.model.pretrained import (
    copy_teacher_layers,
    fit_projections,
    load_cross_encoder,
    new_cross_encoder,
)
from simplified_tinybert.model.tokenizer_files import load_vocabulary
from simplified_tinybert.model.vocabulary import Vocabulary
from simplified_tinybert.model.weights import weights_checksum
from simplified_tinybert.training.checkpoints import check_output_dir
from simplified_tinybert.training.description import describe_run, general_card
from simplified_tinybert.training.flags import (
    RESUMABLE,
    Stage,
    TrainingSettings,
    add_training_flags,
    check_apex,
    check_flags,
)
from simplified_tinybert.training.loop import Trainer, TrainingSet
from simplified_tinybert.training.objective import ObjectiveSettings
from simplified_tinybert.training.run import SavedAs, find_output_run, output_run

COMPRESSED_TOKENS = 16384   # that a compressed student is fitted to: 1 GB of memory for 6/384, 4 GB for 12/768
WEIGHTS = {"attention": 1.0, "hidden": 1.0}
# What a student needs alike to take the teacher's layers over, and (the first three) its embeddings compressed
MADE_ALIKE = ("vocab_size", "max_position_embeddings", "type_vocab_size", "hidden_size", "intermediate_size",
              "num_attention_heads")
SHAPE = (*MADE_ALIKE, "num_hidden_layers", "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob",
         "initializer_range", "layer_norm_eps")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the student is made of. corpus: checksum of the texts."""
    teacher: tuple[Path, BertConfig]
    student: BertConfig
    vocabulary: Vocabulary
    corpus: str


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--corpus", type=Path, nargs="+", help="text file(s), plain or .gz")
    texts.add_argument("--docs", type=Path, nargs="+", help="file(s) of documents in columns, plain or .gz")
    add("--documents", choices=DOCUMENTS, help="what a document of --corpus is, see above (default: lines)")
    add("--teacher_model", required=True, help="directory or hub id of a BERT")
    shape = parser.add_mutually_exclusive_group(required=True)
    shape.add_argument("--student_config", type=Path, help="config.json of the student's shape, or its directory")
    shape.add_argument("--student_layers", type=int, help="layers of a student that is otherwise shaped as the teacher")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--init_from_teacher", action="store_true", help="start from the teacher's layers, see above")
    start.add_argument("--compress_teacher", action="store_true", help="start from the teacher compressed, see above")
    add("--max_seq_length", type=int, default=128, help="tokens of a segment with [CLS] and [SEP] (default: 128)")
    add_training_flags(parser, batch_size=256, learning_rate=1e-4, epochs=3)
    args = parser.parse_args()
    if args.docs and args.documents:
        parser.error("--documents: is for --corpus; a line of --docs is a document")
    args.documents = COLUMNS if args.docs else args.documents or DOCUMENTS[0]
    return args


def student_config(args: argparse.Namespace, teacher: BertConfig, problems: Problems) -> BertConfig | None:
    """The student's configuration, once it is known to fit the teacher; what does not is added to `problems`."""
    try:
        config = read_config(args.student_config) if args.student_config else BertConfig(
            **teacher.to_dict() | {"num_hidden_layers": args.student_layers})
        config.num_labels = 2
    except UserError as error:
        problems.add(str(error))
        return None
    if config.num_hidden_layers < 1:
        problems.add(f"a student of {config.num_hidden_layers} layers; expected 1 or more")
        return None
    check_pair(teacher, config, problems)
    if config.vocab_size != teacher.vocab_size:
        problems.add(f"{args.student_config}: vocab_size is {config.vocab_size}, the teacher's {teacher.vocab_size}; "
                     f"the two read the same tokens, make them equal")
    if args.max_seq_length > min(config.max_position_embeddings, teacher.max_position_embeddings):
        problems.add(f"--max_seq_length {args.max_seq_length}: the student has {config.max_position_embeddings} "
                     f"positions, the teacher {teacher.max_position_embeddings}; choose fewer")
    differing = [f"{name} is {getattr(config, name)}, not {getattr(teacher, name)}"
                 for name in (MADE_ALIKE if args.init_from_teacher else MADE_ALIKE[:3])
                 if getattr(config, name) != getattr(teacher, name)]
    if args.init_from_teacher and differing:
        problems.add(f"--init_from_teacher: the student is not shaped as the teacher ({'; '.join(differing)}); leave "
                     f"the flag out, or use --student_layers or --compress_teacher")
    if args.compress_teacher and differing:
        problems.add(f"--compress_teacher: the student's embeddings are not shaped as the teacher's "
                     f"({'; '.join(differing)}); make them equal")
    for name in ("hidden_size", "intermediate_size"):
        if args.compress_teacher and getattr(config, name) > getattr(teacher, name):
            problems.add(f"--compress_teacher: the student's {name} is {getattr(config, name)}, the teacher's "
                         f"{getattr(teacher, name)}; a student that is not smaller cannot be compressed from it")
    return config


def check_numbers(args: argparse.Namespace, problems: Problems) -> None:
    check_flags(args, problems, [("max_seq_length", 8 <= args.max_seq_length < 2 ** 16, "8 to 65535"),
                                 ("num_train_epochs", 0 <= args.num_train_epochs < math.inf, "0 or more")])


def check_settings(args: argparse.Namespace, problems: Problems) -> dict:
    """Check all that can be checked without the texts; role → directory and configuration of the teacher."""
    check_numbers(args, problems)
    check_apex(args, 1, problems)
    check_output_dir(args.output_student_dir, args.resume, problems)
    return find_models({"teacher": args.teacher_model}, problems)


def check_inputs(args: argparse.Namespace, problems: Problems) -> Inputs:
    """Find the inputs and check that they go together. Raises UserError with all that is wrong."""
    teacher, config, vocabulary = check_settings(args, problems).get("teacher"), None, None
    if teacher:
        config = student_config(args, teacher[1], problems)
        try:
            vocabulary = load_vocabulary(teacher[0])
        except UserError as error:
            problems.add(str(error))
    corpus = check_corpus(args.docs or args.corpus, args.documents, problems)
    problems.raise_if_any()
    return Inputs(teacher=teacher, student=config, vocabulary=vocabulary, corpus=corpus)


def load_models(args: argparse.Namespace, inputs: Inputs,
                checkpoint: Path | None) -> tuple[CrossEncoder, CrossEncoder]:
    """Student (from a checkpoint if given) and teacher."""
    generator = torch.Generator().manual_seed(args.seed)
    teacher, _ = load_cross_encoder(*inputs.teacher, new_head=torch.Generator())        # its head is not used
    teacher.requires_grad_(False)
    if checkpoint:
        student, _ = load_cross_encoder(checkpoint, new_head=generator)
    else:
        student = new_cross_encoder(inputs.student, generator)
    fit_projections(student, teacher.config.hidden_size, generator)
    if args.init_from_teacher and not checkpoint:
        copy_teacher_layers(student, teacher)
    return student, teacher


def some_batches(examples: Examples, seed: int) -> Iterator[Batch]:
    """Segments drawn at random, until they have enough tokens to fit a student on."""
    tokens = 0
    for indices in np.array_split(np.random.default_rng(seed).permutation(len(examples)), -(-len(examples) // 16)):
        if tokens < COMPRESSED_TOKENS:
            tokens += int(examples.lengths[indices].sum())
            yield examples.batch(indices)


def resumable(args: argparse.Namespace, inputs: Inputs) -> dict:
    """What must not change when a run is resumed."""
    names = (*RESUMABLE, "max_seq_length", "documents", "init_from_teacher", "compress_teacher")
    return {name: getattr(args, name) for name in names} | {
        "student": {name: getattr(inputs.student, name) for name in SHAPE},
        "teacher": weights_checksum(inputs.teacher[0]), "corpus": inputs.corpus, "processes": process_count()}


def general_distill(args: argparse.Namespace, device: torch.device, processes: Processes) -> None:
    problems = Problems()
    dtype = select_precision(args.fp16, args.bf16, device, problems)
    inputs = check_inputs(args, problems)
    run = find_output_run(args, {"device": str(device), "settings": resumable(args, inputs)}, processes)
    if run.finished:
        return

    warn_if_emulated(dtype, device)
    student, teacher = load_models(args, inputs, run.checkpoint)
    student, teacher = student.to(device), teacher.to(device)
    with processes.first_on_machine():
        examples = map_corpus(args.docs or args.corpus, args.documents, inputs.vocabulary, args.max_seq_length,
                              inputs.corpus, args.cache_file_dir)
    if args.compress_teacher and not run.checkpoint:
        compress(student, teacher, some_batches(examples, args.seed))
    start = ("the teacher's layers" if args.init_from_teacher else
             "the teacher compressed" if args.compress_teacher else "random weights")
    stage = Stage(objective=ObjectiveSettings(weights=WEIGHTS, padding=args.padding), epochs=args.num_train_epochs,
                  learning_rate=args.learning_rate)
    saved_as = SavedAs(tokenizer_dir=inputs.teacher[0], lower_case=inputs.vocabulary.lower_case,
                       card=general_card(args, student), general=True)
    settings = TrainingSettings.from_args(args, dtype, args.max_seq_length)
    with output_run(run, saved_as) as run:
        trainer = Trainer(student, teacher, TrainingSet(examples), settings, run)
        describe_run(trainer, [stage], start, args.teacher_model)
        trainer.train(stage)
        trainer.finish()


def main() -> None:
    args = parse_args()
    device = select_device(args.device, args.no_cuda)
    keep_freed_memory(device)
    with process_group(device) as processes:
        general_distill(args, device, processes)


if __name__ == "__main__":
    run_main(main, several=True)
