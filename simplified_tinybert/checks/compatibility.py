"""Checks that the inputs of a run fit together, before weights are loaded. Each message says how to fix the problem."""
from pathlib import Path

from transformers import BertConfig

from simplified_tinybert.common.files import Problems, warn
from simplified_tinybert.data.features import FeatureSummary
from simplified_tinybert.tokenization.tokenizer_files import has_vocabulary, load_vocabulary


def check_length(max_seq_length: int | None, summary: FeatureSummary, problems: Problems) -> int:
    """Return the length to pad to. It is that of the features, unless --max_seq_length gives a longer one."""
    made_with = summary.header["max_seq_length"]
    if max_seq_length is None:
        return made_with
    if max_seq_length > made_with:
        warn(f"--max_seq_length {max_seq_length}: the features were made with {made_with}; more padding costs time and "
             f"changes the losses of --padding reference")
    elif max_seq_length < made_with:
        problems.add(f"--max_seq_length {max_seq_length}: the features were made with {made_with}; leave the flag out, "
                     f"or tokenize again with --max_seq_length {max_seq_length}")
    return max_seq_length


def check_model_fits(role: str, directory: Path, config: BertConfig, summary: FeatureSummary, max_seq_length: int,
                     problems: Problems) -> None:
    """Check that a model can read the features: vocabulary and sequence length. Warns if the casing differs."""
    header, positions = summary.header, config.max_position_embeddings
    if max_seq_length > positions:
        way_out = ("leave --max_seq_length out" if header["max_seq_length"] <= positions else
                   f"tokenize again with --max_seq_length {positions} (MAX_SEQ_LENGTH={positions} for the .sh scripts)")
        problems.add(f"{directory}: the {role} has {positions} positions, but sequences are padded to "
                     f"{max_seq_length}; {way_out}")
    if not has_vocabulary(directory):
        if header["vocabulary_size"] > config.vocab_size:
            problems.add(f"{directory}: the {role} has {config.vocab_size} embeddings, but the features were made with "
                         f"{header['vocabulary_size']} tokens; tokenize with the {role}'s own vocabulary")
        warn(f"{directory}: the {role} has no vocabulary file; cannot check that the features were made with its "
             f"vocabulary")
        return
    with problems.collect():
        vocabulary = load_vocabulary(directory)
        if vocabulary.with_casing(header["lower_case"]).checksum() != header["vocabulary"]:
            problems.add(f"{directory}: the features were made with a different vocabulary than the {role}'s; "
                         f"tokenize with --bert_model_dir {directory}")
        if vocabulary.lower_case != header["lower_case"]:
            casing = {True: "lower-cased", False: "cased"}
            warn(f"{directory}: the {role} expects {casing[vocabulary.lower_case]} text, the features are "
                 f"{casing[header['lower_case']]}")


def check_dev_set(dev: FeatureSummary, train: FeatureSummary | None, student: BertConfig, problems: Problems) -> None:
    """Check that the student can read the dev features."""
    if train and any(dev.header[field] != train.header[field] for field in ("vocabulary", "lower_case")):
        problems.add("--dev_features_file: was made with a different vocabulary or casing than --features_file; "
                     "tokenize both with the same settings")
    if dev.header["max_seq_length"] > student.max_position_embeddings:
        problems.add(f"--dev_features_file: was made with --max_seq_length {dev.header['max_seq_length']}, but the "
                     f"student has {student.max_position_embeddings} positions; tokenize again with a shorter length")


def check_pair(teacher: BertConfig, student: BertConfig, problems: Problems,
               layer_map: list[int] | None = None) -> None:
    """Check that the student's layers and attention heads can be matched with the teacher's."""
    if layer_map:
        known = set(range(1, teacher.num_hidden_layers + 1))
        if len(layer_map) != student.num_hidden_layers or sorted(known & set(layer_map)) != layer_map:
            problems.add(f"--layer_map {' '.join(map(str, layer_map))}: expected {student.num_hidden_layers} ascending "
                         f"numbers from 1 to {teacher.num_hidden_layers}, a teacher layer for each student layer")
    elif teacher.num_hidden_layers % student.num_hidden_layers:
        problems.add(f"a teacher of {teacher.num_hidden_layers} layers cannot be mapped evenly to a student of "
                     f"{student.num_hidden_layers}; choose a student whose number of layers divides the teacher's, or "
                     f"give distill.py a --layer_map")
    if teacher.num_attention_heads != student.num_attention_heads:
        problems.add(f"the teacher has {teacher.num_attention_heads} attention heads, the student "
                     f"{student.num_attention_heads}; choose a student with the same number, because the attention "
                     f"loss compares them head by head")
