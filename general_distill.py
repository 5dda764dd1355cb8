"""Make a general student by TinyBERT's general distillation: from a BERT that is not fine-tuned, on raw text.

    python general_distill.py --corpus texts.txt more.txt.gz --teacher_model google-bert/bert-base-uncased \\
        --student_config student_config.json --output_student_dir general_student --device 0 --bf16
    python general_distill.py --docs docs.tsv --teacher_model google-bert/bert-base-uncased \\
        --student_layers 6 --init_from_teacher --output_student_dir general_student

Input, UTF-8, plain or gzip: --corpus or --docs. --corpus takes text files with one document per line, or with blank
lines between documents (--documents paragraphs). --docs takes documents as prepare_examples.py does (document_id <tab>
url <tab> title <tab> body, or document_id <tab> text) and uses title and body. Each document is cut into segments:
[CLS], up to max_seq_length - 2 tokens, [SEP]. No token is masked.

The student has the shape of --student_config (a config.json, or its directory), or the teacher's shape with
--student_layers. It starts from:
    (no flag)             random weights
    --init_from_teacher   the teacher's embeddings, pooler and every k-th layer; needs the teacher's hidden size
    --compress_teacher    weights fitted to the teacher's outputs on a sample of the text, for any smaller hidden size
                          (simplified_tinybert/model/compression.py); helps if there is little text to train on
It minimizes attention + hidden, as in TinyBERT's general stage (Jiao et al. 2020).

Output, in --output_student_dir: the general student for distill.py --general_student_model, as a Hugging Face directory
(without classifier; fit_dense.safetensors holds the projection to the teacher's hidden size), with train_loss.jsonl and
checkpoints as from distill.py. --num_train_epochs 0 writes the initial student without training it.

Several GPUs or processes: torchrun --standalone --nproc_per_node=4 general_distill.py --corpus ...
"""
import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig

from simplified_tinybert.checks.compatibility import check_pair
from simplified_tinybert.common.device import explain_full_memory, prepare_device, select_device
from simplified_tinybert.common.files import Problems, UserError, run_main
from simplified_tinybert.common.processes import Processes, process_group
from simplified_tinybert.data.corpus import COLUMNS, DOCUMENTS, check_corpus, map_corpus
from simplified_tinybert.data.features import Examples
from simplified_tinybert.model import pretrained
from simplified_tinybert.model.batch import Batch
from simplified_tinybert.model.bert import CrossEncoder
from simplified_tinybert.model.compression import compress
from simplified_tinybert.model.configuration import FoundModel, find_models, read_config
from simplified_tinybert.model.precision import select_precision, warn_if_slow
from simplified_tinybert.model.weights import model_checksum
from simplified_tinybert.tokenization.tokenizer_files import load_vocabulary
from simplified_tinybert.tokenization.vocabulary import Vocabulary
from simplified_tinybert.training import settings as training_settings
from simplified_tinybert.training.checkpoints import find_run, name_way_out, output_run
from simplified_tinybert.training.description import describe_run, general_card
from simplified_tinybert.training.objective import ObjectiveSettings
from simplified_tinybert.training.settings import Stage, TrainingSettings
from simplified_tinybert.training.trainer import Trainer, TrainingSet

COMPRESSION_TOKENS = 16384  # that a compressed student is fitted on; takes 1 GB of memory for 6/384, 4 GB for 12/768
# --compress_teacher copies embeddings of the teacher's shape, --init_from_teacher whole layers
EMBEDDING_SHAPE = ("vocab_size", "max_position_embeddings", "type_vocab_size")
LAYER_SHAPE = (*EMBEDDING_SHAPE, "hidden_size", "intermediate_size", "num_attention_heads")
RESUMABLE_SHAPE = (*LAYER_SHAPE, "num_hidden_layers", "hidden_act", "hidden_dropout_prob",
                   "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    teacher: FoundModel
    student_config: BertConfig
    vocabulary: Vocabulary
    corpus_checksum: str


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--corpus", type=Path, nargs="+", help="text file(s), plain or .gz")
    texts.add_argument("--docs", type=Path, nargs="+", help="file(s) of tab-separated documents, plain or .gz")
    add("--documents", choices=DOCUMENTS, help="what a document of --corpus is, see above (default: lines)")
    add("--teacher_model", required=True, help="directory or hub id of a BERT")
    shape = parser.add_mutually_exclusive_group(required=True)
    shape.add_argument("--student_config", type=Path, help="config.json with the student's shape, or its directory")
    shape.add_argument("--student_layers", type=int, help="layers of a student that otherwise has the teacher's shape")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--init_from_teacher", action="store_true", help="start from the teacher's layers, see above")
    start.add_argument("--compress_teacher", action="store_true", help="start from the compressed teacher, see above")
    add("--max_seq_length", type=int, default=128, help="tokens per segment, including [CLS] and [SEP] (default: 128)")
    training_settings.add_training_flags(parser, batch_size=256, learning_rate=1e-4, epochs=3)
    args = parser.parse_args()
    if args.docs and args.documents:
        parser.error("--documents: is only for --corpus; in --docs, each line is a document")
    args.documents = COLUMNS if args.docs else args.documents or DOCUMENTS[0]
    return args


def student_config(args: argparse.Namespace, teacher: BertConfig, problems: Problems) -> BertConfig:
    """Return the student's configuration, checked against the teacher's. Raises UserError if there is none."""
    config = read_config(args.student_config) if args.student_config else BertConfig(
        **teacher.to_dict() | {"num_hidden_layers": args.student_layers})
    config.num_labels = 2
    if config.num_hidden_layers < 1:
        raise UserError(f"the student has {config.num_hidden_layers} layers; expected 1 or more")
    check_pair(teacher, config, problems)
    if config.vocab_size != teacher.vocab_size:
        problems.add(f"{args.student_config}: vocab_size is {config.vocab_size}, but the teacher's is "
                     f"{teacher.vocab_size}; make them equal, because both models read the same tokens")
    if args.max_seq_length > min(config.max_position_embeddings, teacher.max_position_embeddings):
        problems.add(f"--max_seq_length {args.max_seq_length}: the student has {config.max_position_embeddings} "
                     f"positions, the teacher {teacher.max_position_embeddings}; choose a shorter length")
    check_start(args, config, teacher, problems)
    return config


def check_start(args: argparse.Namespace, student: BertConfig, teacher: BertConfig, problems: Problems) -> None:
    """Check that the student's shape allows --init_from_teacher or --compress_teacher."""
    differing = [f"{name} is {getattr(student, name)}, not {getattr(teacher, name)}"
                 for name in (LAYER_SHAPE if args.init_from_teacher else EMBEDDING_SHAPE)
                 if getattr(student, name) != getattr(teacher, name)]
    if args.init_from_teacher and differing:
        problems.add(f"--init_from_teacher: the student's shape differs from the teacher's ({'; '.join(differing)}); "
                     f"leave the flag out, or use --student_layers or --compress_teacher")
    if args.compress_teacher and differing:
        problems.add(f"--compress_teacher: the shape of the student's embeddings differs from the teacher's "
                     f"({'; '.join(differing)}); make them equal")
    for name in ("hidden_size", "intermediate_size"):
        if args.compress_teacher and getattr(student, name) > getattr(teacher, name):
            problems.add(f"--compress_teacher: the student's {name} is {getattr(student, name)}, the teacher's "
                         f"{getattr(teacher, name)}; choose a smaller one, or leave the flag out")


def check_numbers(args: argparse.Namespace, problems: Problems) -> None:
    """Check only the flags. collection.sh calls this before any file exists."""
    training_settings.check_training_flags(args, 1, problems, [
        ("max_seq_length", 8 <= args.max_seq_length < 2 ** 16, "8 to 65535"),
        ("num_train_epochs", 0 <= args.num_train_epochs < math.inf, "0 or more")])


def check_inputs(args: argparse.Namespace, problems: Problems) -> Inputs:
    """Find the inputs and check that they fit together. Raises UserError with all problems."""
    check_numbers(args, problems)
    config = vocabulary = None
    teacher = find_models({"teacher": args.teacher_model}, problems).get("teacher")
    if teacher:
        with problems.collect():
            config = student_config(args, teacher.config, problems)
        with problems.collect():
            vocabulary = load_vocabulary(teacher.directory)
    corpus = check_corpus(args.docs or args.corpus, args.documents, problems)
    problems.raise_if_any()
    return Inputs(teacher=teacher, student_config=config, vocabulary=vocabulary, corpus_checksum=corpus)


def resumable_settings(args: argparse.Namespace, inputs: Inputs) -> dict:
    """Return the settings that must not change when a run is resumed."""
    settings = training_settings.resumable_settings(args, (
        "max_seq_length", "documents", "init_from_teacher", "compress_teacher"))
    return settings | {"student": {name: getattr(inputs.student_config, name) for name in RESUMABLE_SHAPE},
                       "teacher": model_checksum(inputs.teacher.directory), "corpus": inputs.corpus_checksum}


def load_models(args: argparse.Namespace, inputs: Inputs,
                checkpoint: Path | None) -> tuple[CrossEncoder, CrossEncoder]:
    """Load the teacher, and make the student or load it from the checkpoint."""
    generator = torch.Generator().manual_seed(args.seed)
    teacher, _ = pretrained.load_cross_encoder(*inputs.teacher, new_head=torch.Generator())     # the head is not used
    teacher.requires_grad_(False)
    if checkpoint:
        with name_way_out(checkpoint):
            student, _ = pretrained.load_cross_encoder(checkpoint, new_head=generator)
    else:
        student = pretrained.new_cross_encoder(inputs.student_config, generator)
    pretrained.fit_projections(student, teacher.config.hidden_size, generator)
    if args.init_from_teacher and not checkpoint:
        pretrained.copy_teacher_layers(student, teacher)
    return student, teacher


def sample_batches(examples: Examples, seed: int) -> Iterator[Batch]:
    """Yield batches of random segments with at least COMPRESSION_TOKENS tokens in total."""
    tokens = 0
    for indices in np.array_split(np.random.default_rng(seed).permutation(len(examples)), -(-len(examples) // 16)):
        if tokens >= COMPRESSION_TOKENS:
            return
        tokens += int(examples.lengths[indices].sum())
        yield examples.batch(indices)


def general_distill(args: argparse.Namespace, processes: Processes) -> None:
    device, problems = processes.device, Problems()
    dtype = select_precision(args, device, problems)
    inputs = check_inputs(args, problems)
    run = find_run(args, resumable_settings(args, inputs), processes)
    if run.finished:
        return

    warn_if_slow(dtype, device)
    student, teacher = (model.to(device) for model in load_models(args, inputs, run.checkpoint))
    with processes.first_on_machine():
        examples = map_corpus(args.docs or args.corpus, args.documents, inputs.vocabulary, args.max_seq_length,
                              inputs.corpus_checksum, args.cache_file_dir)
    if args.compress_teacher and not run.checkpoint:
        compress(student, teacher, sample_batches(examples, args.seed))
    start = ("the teacher's layers" if args.init_from_teacher else
             "the compressed teacher" if args.compress_teacher else "random weights")
    stage = Stage(objective=ObjectiveSettings(weights={"attention": 1.0, "hidden": 1.0}, padding=args.padding),
                  epochs=args.num_train_epochs, learning_rate=args.learning_rate)
    save_model = partial(pretrained.save_cross_encoder, tokenizer_directory=inputs.teacher.directory,
                         lower_case=inputs.vocabulary.lower_case, card=general_card(args, student), general=True)
    settings = TrainingSettings.from_args(args, dtype, args.max_seq_length)
    with output_run(run, save_model) as run:
        trainer = Trainer(student, teacher, TrainingSet(examples), settings, run)
        describe_run(trainer, [stage], start, args.teacher_model)
        trainer.train([stage])


def main() -> None:
    args = parse_args()
    device = select_device(args.device, args.no_cuda)
    with explain_full_memory(training_settings.SMALLER_BATCHES):
        prepare_device(device, args.tf32 or args.fp16 or args.bf16)
        with process_group(device) as processes:
            general_distill(args, processes)


if __name__ == "__main__":
    run_main(main, distributed=True)
