"""Do the inputs of a run exist and go together? Asked before weights are loaded or a device is touched.

The functions add what is wrong to a `Problems` list, each with the way out, so that one run shows all of it.
"""
import copy
from pathlib import Path

import torch
from transformers import BertConfig

from simplified_tinybert.common.files import Problems, UserError, warn
from simplified_tinybert.data.features import FeatureSummary
from simplified_tinybert.model.configuration import read_config
from simplified_tinybert.model.hub import find_model
from simplified_tinybert.model.pretrained import load_cross_encoder, load_ranker
from simplified_tinybert.model.tokenizer_files import has_vocabulary, load_vocabulary
from simplified_tinybert.ranking.measures import parse_measures
from simplified_tinybert.training.objective import METHODS, ObjectiveSettings, stage_weights


def find_models(names: dict[str, str | None], problems: Problems) -> dict[str, tuple[Path, BertConfig]]:
    """Directory and configuration of each named model (role → name); what cannot be had is added to `problems`."""
    found = {}
    for role, name in names.items():
        if name:
            try:
                directory = find_model(name)
                found[role] = directory, read_config(directory)
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


def check_model_fits(role: str, directory: Path, config: BertConfig, summary: FeatureSummary, width: int,
                     problems: Problems) -> None:
    """Complain where features and model do not go together: vocabulary, length; warn about casing."""
    header = summary.header
    if width > config.max_position_embeddings:
        positions = config.max_position_embeddings
        way_out = ("leave --max_seq_length out" if header["max_seq_length"] <= positions else
                   f"tokenize again with --max_seq_length {positions} (MAX_SEQ_LENGTH={positions} for the .sh scripts)")
        problems.add(f"{directory}: the {role} has {positions} positions, {width} are asked for; {way_out}")
    if not has_vocabulary(directory):
        if header["vocabulary_size"] > config.vocab_size:
            problems.add(f"{directory}: the {role} has {config.vocab_size} embeddings, the features were made with "
                         f"{header['vocabulary_size']} tokens; tokenize with the {role}'s own vocabulary")
        warn(f"{directory}: the {role} has no vocabulary file, so it is not checked that the features were made with it")
        return
    try:
        vocabulary = load_vocabulary(directory)
        checksum = vocabulary.with_casing(header["lower_case"]).checksum()
    except UserError as error:
        problems.add(str(error))
        return
    if checksum != header["vocabulary"]:
        problems.add(f"{directory}: the features were made with another vocabulary than the {role}'s; tokenize with "
                     f"--bert_model_dir {directory}")
    if vocabulary.lower_case != header["lower_case"]:
        names = {True: "lower-cased", False: "cased"}
        warn(f"{directory}: the {role}'s texts should be {names[vocabulary.lower_case]}, the features are "
             f"{names[header['lower_case']]}")


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
    (directory, teacher), (other, student) = models["teacher"], models["student"]
    vocabularies = [load_vocabulary(place) for place in (directory, other)]
    if vocabularies[0].checksum() != vocabularies[1].checksum():
        problems.add(f"{student_name}: has another vocabulary than {teacher_name}; teacher and students read the same "
                     f"features, name models of one vocabulary")
    if new_layers:
        shallow = copy.copy(student)
        shallow.num_hidden_layers = new_layers
        check_pair(student, shallow, problems)
        student = shallow
    if directory != other and any(ObjectiveSettings(weights=weights).uses("layers")
                               for method in methods for weights in stage_weights(method)):
        check_pair(teacher, student, problems)
    problems.raise_if_any()
    load_ranker(directory, teacher, None if fine_tuned else torch.Generator())
    if other != directory:                                 # of a model that students are made of the head is not used
        (load_cross_encoder if new_layers else load_ranker)(other, models["student"][1], torch.Generator())
