"""Do the inputs of a run exist and go together? Asked before weights are loaded or a device is touched.

The functions add what is wrong to a `Problems` list, each with the way out, so that one run shows all of it.
"""
import argparse
import copy
import math
from pathlib import Path

import torch
from transformers import BertConfig

from simplified_tinybert.checkpoints import load_cross_encoder, load_ranker
from simplified_tinybert.features import FeatureSummary
from simplified_tinybert.files import Problems, UserError, process_count, warn
from simplified_tinybert.hub import find_model
from simplified_tinybert.measures import parse_measures
from simplified_tinybert.model.configuration import find_config, read_config
from simplified_tinybert.objectives import METHODS, stage_weights, uses_layers
from simplified_tinybert.records import read_record
from simplified_tinybert.tokenization import Vocabulary, has_vocabulary, load_vocabulary
from simplified_tinybert.training import newest_checkpoint


def check_flags(args: argparse.Namespace, problems: Problems, further: list[tuple[str, bool, str]]) -> None:
    """Complain about flags that no training can work with. `further` rules: (flag, whether it holds, expected)."""
    several = f" for each of {process_count()} processes" if process_count() > 1 else ""
    rules = [("train_batch_size", args.train_batch_size >= process_count(), f"1 or more{several}"),
             ("gradient_accumulation_steps", args.gradient_accumulation_steps >= 1, "1 or more"),
             ("learning_rate", 0 <= args.learning_rate < math.inf, "0 or more"),
             ("warmup_proportion", 0 <= args.warmup_proportion < 1, "0 to less than 1"),
             ("weight_decay", 0 <= args.weight_decay < math.inf, "0 or more"),
             ("train_loss_step", args.train_loss_step >= 1, "1 or more"),
             ("save_model_step", args.save_model_step >= 1, "1 or more"),
             ("seed", 0 <= args.seed < 2 ** 62, "0 or more, below 2^62"),
             ("keep_checkpoints", args.keep_checkpoints is None or args.keep_checkpoints >= 1, "1 or more"), *further]
    for name, holds, expected in rules:
        if not holds:
            problems.add(f"--{name} {getattr(args, name)}: expected {expected}")
    for folder in filter(None, (args.cache_file_dir, args.tensorboard_dir)):
        if folder.exists() and not folder.is_dir():
            problems.add(f"{folder}: is a file; name a folder")


def find_models(names: dict[str, str | None], problems: Problems) -> dict[str, tuple[Path, BertConfig]]:
    """Folder and configuration of each named model (role → name); what cannot be had is added to `problems`."""
    found = {}
    for role, name in names.items():
        if name:
            try:
                folder = find_model(name)
                found[role] = folder, read_config(folder)
            except UserError as error:
                problems.add(str(error))
    return found


def check_length(max_seq_length: int | None, summary: FeatureSummary, problems: Problems) -> int:
    """Length to pad to: --max_seq_length, or the features' own. Shorter than the features is a problem."""
    made_with = summary.header["max_seq_length"]
    if max_seq_length is not None and max_seq_length > made_with:
        warn(f"--max_seq_length {max_seq_length}: the features were made with {made_with}; padding further costs "
             f"time and changes the losses of --padding reference")
    if max_seq_length is not None and max_seq_length < made_with:
        problems.add(f"--max_seq_length {max_seq_length}: the features were made with {made_with}; leave the flag out, "
                     f"or tokenize again with --max_seq_length {max_seq_length}")
    return max_seq_length or made_with


def check_model_fits(role: str, folder: Path, config: BertConfig, summary: FeatureSummary, width: int,
                     problems: Problems) -> None:
    """Complain where features and model do not go together: vocabulary, length; warn about casing."""
    header = summary.header
    if width > config.max_position_embeddings:
        positions = config.max_position_embeddings
        way_out = ("leave --max_seq_length out" if header["max_seq_length"] <= positions else
                   f"tokenize again with --max_seq_length {positions} (MAX_SEQ_LENGTH={positions} for the .sh scripts)")
        problems.add(f"{folder}: the {role} has {positions} positions, {width} are asked for; {way_out}")
    if not has_vocabulary(folder):
        if header["vocabulary_size"] > config.vocab_size:
            problems.add(f"{folder}: the {role} has {config.vocab_size} embeddings, the features were made with "
                         f"{header['vocabulary_size']} tokens; tokenize with the {role}'s own vocabulary")
        warn(f"{folder}: the {role} has no vocabulary file, so it is not checked that the features were made with it")
        return
    try:
        vocabulary = load_vocabulary(folder)
    except UserError as error:
        problems.add(str(error))
        return
    if not check_vocabulary(folder, config, vocabulary, problems):
        return                                          # to tokenize again is no way out
    if vocabulary.fingerprint() != header["vocabulary"]:
        problems.add(f"{folder}: the features were made with another vocabulary than the {role}'s; tokenize with "
                     f"--bert_model_dir {folder}")
    if vocabulary.lower_case != header["lower_case"]:
        names = {True: "lower-cased", False: "cased"}
        warn(f"{folder}: the {role}'s texts should be {names[vocabulary.lower_case]}, the features are "
             f"{names[header['lower_case']]}")


def check_vocabulary(folder: Path, config: BertConfig, vocabulary: Vocabulary, problems: Problems) -> bool:
    """Whether a model's own embedding matrix has a row for each token of its own tokenizer; complain if not."""
    size = max(vocabulary.pieces.values()) + 1
    if size > config.vocab_size:
        tokenizer = next(name for name in ("vocab.txt", "tokenizer.json") if (folder / name).is_file())
        problems.add(f"{folder / tokenizer}: has {size} tokens, the embedding matrix {config.vocab_size} rows "
                     f"(vocab_size in {find_config(folder)}): these two files of the model do not go together; fetch "
                     f"both from one place or, if tokens were added, call resize_token_embeddings({size}) and save the "
                     f"model again")
    return size <= config.vocab_size


def check_dev_set(dev: FeatureSummary, train: FeatureSummary | None, student: BertConfig, problems: Problems) -> None:
    """Complain about dev features that the student of these training features cannot read."""
    if train and any(dev.header[field] != train.header[field] for field in ("vocabulary", "lower_case")):
        problems.add("--dev_features_file: was made with another vocabulary or casing than --features_file; tokenize "
                     "both with the same settings")
    if dev.header["max_seq_length"] > student.max_position_embeddings:
        problems.add(f"--dev_features_file: was made with --max_seq_length {dev.header['max_seq_length']}, the student "
                     f"has {student.max_position_embeddings} positions; tokenize again with fewer")


def check_pair(teacher: BertConfig, student: BertConfig, problems: Problems,
               layer_map: list[int] | None = None) -> None:
    """Complain about a teacher and a student whose layers or heads cannot be matched one to one."""
    if layer_map:
        known = set(range(1, teacher.num_hidden_layers + 1))
        if len(layer_map) != student.num_hidden_layers or sorted(known & set(layer_map)) != layer_map:
            problems.add(f"--layer_map {' '.join(map(str, layer_map))}: expected {student.num_hidden_layers} ascending "
                         f"numbers from 1 to {teacher.num_hidden_layers}, a teacher layer for each student layer")
    elif teacher.num_hidden_layers % student.num_hidden_layers:
        problems.add(f"a teacher of {teacher.num_hidden_layers} layers cannot be mapped evenly to a student of "
                     f"{student.num_hidden_layers}; choose a student whose depth divides the teacher's, or name a "
                     f"teacher layer for each by distill.py --layer_map")
    if teacher.num_attention_heads != student.num_attention_heads:
        problems.add(f"the teacher has {teacher.num_attention_heads} attention heads, the student "
                     f"{student.num_attention_heads}; the attention loss compares head with head, choose a student "
                     f"with as many")


def check_chain(teacher_name: str, student_name: str, new_layers: int, methods: list[str], measures: list[str],
                fine_tuned: bool) -> None:
    """Raise UserError if the steps of collection.sh do not go together: better now than when their turn comes.

    The student is a general one, or, where `new_layers` is not 0, will be made with so many layers of this model. A
    teacher that is not `fine_tuned` is still to be made of the model named.
    """
    problems = Problems()
    for method in methods:
        if method not in METHODS:
            problems.add(f"METHODS: there is no {method}; expected some of {' '.join(METHODS)}")
    parse_measures(measures, 1, problems)
    models = find_models({"teacher": teacher_name, "student": student_name}, problems)
    problems.raise_if_any()
    (folder, teacher), (other, student) = models["teacher"], models["student"]
    vocabularies = [load_vocabulary(place) for place in (folder, other)]
    for (place, config), vocabulary in zip(dict(models.values()).items(), vocabularies):
        check_vocabulary(place, config, vocabulary, problems)
    if vocabularies[0].fingerprint() != vocabularies[1].fingerprint():
        problems.add(f"{student_name}: has another vocabulary than {teacher_name}; teacher and students read the same "
                     f"features, name models of one vocabulary")
    if new_layers:
        shallow = copy.copy(student)
        shallow.num_hidden_layers = new_layers
        check_pair(student, shallow, problems)
        student = shallow
    if folder != other and any(map(uses_layers, (stage for method in methods for stage in stage_weights(method)))):
        check_pair(teacher, student, problems)
    problems.raise_if_any()
    load_ranker(folder, teacher, None if fine_tuned else torch.Generator())
    if other != folder:                                 # of a model that students are made of the head is not used
        (load_cross_encoder if new_layers else load_ranker)(other, models["student"][1], torch.Generator())


def check_output_dir(folder: Path, resume: bool | None, problems: Problems) -> None:
    """An output folder is new or empty, or holds a run that --resume may go on with (None: there is no such flag)."""
    if folder.exists() and not folder.is_dir():
        problems.add(f"{folder}: is a file; name a folder")
    elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        if not resume:
            way_out = "" if resume is None else ", or go on with the run in it by --resume"
            problems.add(f"{folder}: is not empty; name a new folder{way_out}")
        elif not (folder / "run.json").is_file():
            problems.add(f"{folder}: is not empty and holds no run to --resume (no run.json); name another folder")


def find_run(output_dir: Path, settings: dict) -> tuple[bool, Path | None]:
    """Whether the run in the output folder is finished, and the checkpoint to go on from.

    Raises UserError if that run was started with other settings.
    """
    path = output_dir / "run.json"
    if not path.is_file():
        return False, None
    run = read_record(path)
    if run["settings"].keys() != settings.keys():
        raise UserError(f"{output_dir}: holds a run of another version of this tool, which alone can go on with it; "
                        f"name another folder, or remove this one to start again")
    changed = [f"{name} was {run['settings'].get(name)}, is {value}"
               for name, value in settings.items() if run["settings"].get(name) != value]
    if changed:
        raise UserError(f"{output_dir}: holds a run with other settings ({'; '.join(changed)}); name another folder, "
                        f"or remove this one to start again")
    return run.get("finished", False), newest_checkpoint(output_dir)
