"""Turn a TensorFlow checkpoint of Google's BERT into a model directory, such as the paper's teacher of dl4marco-bert.

    python convert_tf_checkpoint.py --tf_checkpoint model.ckpt-400000 --bert_config bert_config.json \\
        --vocab vocab.txt --output_dir teacher
    python convert_tf_checkpoint.py --tf_checkpoint uncased_L-12_H-768_A-12 --output_dir bert-base

In: a checkpoint (NAME.index and NAME.data-...) with the variable names of google-research/bert: bert/..., and for a
fine-tuned ranker output_weights and output_bias; its bert_config.json; its vocab.txt. Of a directory that holds them the
name alone will do; with several checkpoints in it, the one that its file `checkpoint` names is taken.

Out: a Hugging Face directory (config.json, model.safetensors, vocab.txt, model card) with the same logits in float32, and
run.json with the SHA-256 of every input. A pre-trained model without output_weights is written without a classifier:
a general student, or the teacher of a general distillation.

Every variable is used or a known leftover (Adam's adam_m and adam_v, global_step, the pre-training heads cls/...); if
one is missing, unknown or of another shape than the configuration says, all of these are listed and nothing is
written. "hidden_act": "gelu" means the exact function, as in dl4marco-bert's code and Google's until February 2019; for
a model trained with Google's approximation by tanh of later, write "gelu_new" into its bert_config.json first.

TensorFlow is needed here alone: pip install tensorflow-cpu (on ARM or a Mac: tensorflow)
"""
import argparse
import glob
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig

from simplified_tinybert.common.files import Problems, UserError, check_input_file, reason, run_main, say
from simplified_tinybert.common.records import record
from simplified_tinybert.model.bert import CrossEncoder, describe
from simplified_tinybert.model.configuration import read_config
from simplified_tinybert.model.pretrained import save_cross_encoder
from simplified_tinybert.model.tokenizer_files import load_vocabulary
from simplified_tinybert.model.vocabulary import Vocabulary
from simplified_tinybert.model.weights import identify
from simplified_tinybert.training.checkpoints import check_output_dir

LEFTOVERS = {"Adam's slots": re.compile(r"(.*/)?adam_[mv]"), "global_step": re.compile("global_step"),
             "pre-training heads": re.compile("cls/.*")}
SUFFIX = re.compile(r"\.(index|meta|data-\d{5}-of-\d{5})$")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tf_checkpoint", type=Path, required=True, help="checkpoint (what stands before .index), or its directory")
    add("--bert_config", type=Path, help="configuration (default: bert_config.json beside the checkpoint)")
    add("--vocab", type=Path, help="vocab.txt (default: the one beside the checkpoint)")
    add("--output_dir", type=Path, required=True, help="new or empty directory for the model")
    add("--do_lower_case", action=argparse.BooleanOptionalAction, default=None,
        help="whether texts are to be lower-cased (default: yes, as transformers does without settings)")
    return parser.parse_args()


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that is meant, without the endings of its files. Raises UserError."""
    if not path.is_dir():
        prefix = path.with_name(SUFFIX.sub("", path.name))
        if not prefix.with_name(prefix.name + ".index").is_file():
            raise UserError(f"{path}: no such checkpoint; expected a file {prefix.name}.index, or a directory with one")
        return prefix
    names = sorted(file.name.removesuffix(".index") for file in path.glob("*.index"))
    if not names:
        raise UserError(f"{path}: holds no checkpoint; expected NAME.index and NAME.data-00000-of-00001 in it")
    named, state = None, path / "checkpoint"
    if state.is_file():
        found = re.search(r'^model_checkpoint_path:\s*"(.*)"', state.read_text(encoding="utf-8", errors="replace"),
                          re.MULTILINE)
        named = found and Path(found[1]).name
    if named not in names and len(names) > 1:
        raise UserError(f"{path}: holds {len(names)} checkpoints ({', '.join(names)}), and no file `checkpoint` that "
                        f"names one of them; name one: --tf_checkpoint {path / names[-1]}")
    return path / (named if named in names else names[0])


def checkpoint_files(prefix: Path) -> list[Path]:
    """The index and every data file of a checkpoint. Raises UserError if one is missing."""
    data = sorted(prefix.parent.glob(f"{glob.escape(prefix.name)}.data-?????-of-?????"))
    if not data or len(data) != int(data[0].name[-5:]):
        raise UserError(f"{prefix}: {len(data)} of its data files are there, expected "
                        f"{int(data[0].name[-5:]) if data else 'one or more'} ({prefix.name}.data-...); fetch them all")
    return [prefix.with_name(prefix.name + ".index"), *data]


def google_name(parameter: str) -> str:
    """Name in Google's code: bert.encoder.layer.0.output.dense.weight → bert/encoder/layer_0/output/dense/kernel."""
    if parameter.startswith("classifier."):
        return {"weight": "output_weights", "bias": "output_bias"}[parameter.removeprefix("classifier.")]
    *path, last = re.sub(r"\.layer\.(\d+)\.", r".layer_\1.", parameter).split(".")
    if path[-1].endswith("_embeddings"):
        return "/".join(path)
    names = {"weight": "gamma", "bias": "beta"} if path[-1] == "LayerNorm" else {"weight": "kernel", "bias": "bias"}
    return "/".join([*path, names[last]])


def expected_variables(model: CrossEncoder, head: bool) -> dict[str, tuple[str, list[int]]]:
    """Google's name → (parameter, shape in the checkpoint, where kernels are transposed)."""
    found = {}
    for parameter, tensor in model.named_parameters():
        if head or not parameter.startswith("classifier."):
            name = google_name(parameter)
            found[name] = parameter, list(tensor.shape)[::-1 if name.endswith("/kernel") else 1]
    return found


def check_variables(shapes: dict[str, list[int]], expected: dict[str, tuple[str, list[int]]], source: Path,
                    problems: Problems) -> dict[str, int]:
    """Complain about every variable that is missing, unknown or of a wrong shape. Returns the leftovers by kind."""
    for name in sorted(expected.keys() - shapes.keys()):
        problems.add(f"{source}: lacks {name}")
    for name in sorted(expected.keys() & shapes.keys()):
        if shapes[name] != expected[name][1]:
            problems.add(f"{source}: {name} has shape {shapes[name]}; expected {expected[name][1]} by the "
                         f"configuration")
    leftovers = dict.fromkeys(LEFTOVERS, 0)
    for name in sorted(shapes.keys() - expected.keys()):
        kind = next((kind for kind, pattern in LEFTOVERS.items() if pattern.fullmatch(name)), None)
        if kind:
            leftovers[kind] += 1
        else:
            hint = "; it is a TensorFlow 2 object checkpoint, expected one of Google's BERT code" \
                if name.endswith("/.ATTRIBUTES/VARIABLE_VALUE") else ""
            problems.add(f"{source}: holds {name}, which has no place in a BERT ranker of this configuration{hint}")
    return leftovers


def open_checkpoint(prefix: Path) -> Any:
    """TensorFlow's reader of a checkpoint. Raises UserError."""
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}       # it talks before it is asked
    try:
        import tensorflow
    except ImportError as error:
        raise UserError(f"TensorFlow, which alone reads such checkpoints, cannot be used here ({error}); pip install "
                        f"tensorflow-cpu (on ARM or a Mac: tensorflow); the converted model does without") from error
    try:
        return tensorflow.train.load_checkpoint(str(prefix))
    except Exception as error:                          # a damaged file makes the library raise almost anything
        raise UserError(f"{prefix}.index: is damaged or no TensorFlow checkpoint ({reason(error)}); fetch it again"
                        ) from error


def read_model(reader: Any, config: BertConfig, prefix: Path) -> tuple[CrossEncoder, bool, dict[str, int]]:
    """The model, whether it has a classifier, and the leftovers by kind. Raises UserError with all that is wrong."""
    shapes, problems = reader.get_variable_to_shape_map(), Problems()
    head = bool(shapes.keys() & {"output_weights", "output_bias"})
    if len(shapes.get("output_weights", [])) == 2:
        config.num_labels = shapes["output_weights"][0]
    with torch.device("meta"):                          # shapes alone; the checkpoint fills them
        model = CrossEncoder(config)
    expected = expected_variables(model, head)
    leftovers = check_variables(shapes, expected, prefix, problems)
    problems.raise_if_any()
    weights = {parameter: read_variable(reader, name, prefix, problems) for name, (parameter, _) in expected.items()}
    problems.raise_if_any()
    model.load_state_dict(weights, strict=head, assign=True)
    return model.eval(), head, leftovers


def read_variable(reader: Any, name: str, prefix: Path, problems: Problems) -> torch.Tensor | None:
    """A variable in float32, kernels transposed as PyTorch has them."""
    try:
        value = reader.get_tensor(name)
    except Exception as error:
        problems.add(f"{prefix}: {name} cannot be read: its data file is damaged or cut off ({reason(error)}); "
                     f"fetch it again")
        return None
    if not reader.get_variable_to_dtype_map()[name].is_floating:
        problems.add(f"{prefix}: {name} holds {value.dtype}; expected floating-point numbers")
        return None
    value = np.asarray(value, dtype=np.float32)
    if not np.isfinite(value).all():
        problems.add(f"{prefix}: {name} holds infinities or NaN; no model that diverged can be a teacher")
    return torch.from_numpy(np.ascontiguousarray(value.T if name.endswith("/kernel") else value))


def collect_error(problems: Problems, function: Callable, *arguments: object) -> Any:
    """What the function returns, or None if it raises a UserError, which is added to the problems."""
    try:
        return function(*arguments)
    except UserError as error:
        problems.add(str(error))
        return None


def check_all(args: argparse.Namespace) -> tuple[Path, list[Path], BertConfig, Vocabulary]:
    """Checkpoint, all input files, configuration and vocabulary, once all is right that shows without TensorFlow."""
    problems, files, config, vocabulary = Problems(), [], None, None
    check_output_dir(args.output_dir, None, problems)
    prefix = collect_error(problems, find_checkpoint, args.tf_checkpoint)
    if prefix:
        files = collect_error(problems, checkpoint_files, prefix) or []
        for path in files:
            if instead := identify(path, text=True):
                problems.add(f"{path}: {instead}")
        args.bert_config = args.bert_config or prefix.with_name("bert_config.json")
        args.vocab = args.vocab or prefix.with_name("vocab.txt")
    if args.bert_config and check_input_file(args.bert_config, problems, "configuration (--bert_config)"):
        config = collect_error(problems, read_config, args.bert_config)
    if args.vocab and args.vocab.name != "vocab.txt":
        problems.add(f"--vocab {args.vocab}: expected a file named vocab.txt; copy it under that name")
    elif args.vocab and check_input_file(args.vocab, problems, "vocabulary (--vocab)"):
        vocabulary = collect_error(problems, load_vocabulary, args.vocab.parent, args.do_lower_case)
    if config and vocabulary and len(vocabulary.pieces) > config.vocab_size:
        problems.add(f"{args.vocab}: has {len(vocabulary.pieces)} tokens, {args.bert_config} says "
                     f"{config.vocab_size}; they belong to different models")
    problems.raise_if_any()
    return prefix, [*files, args.bert_config, args.vocab], config, vocabulary


def model_card(model: CrossEncoder, head: bool, checkpoint: str) -> str:
    kind = "re-ranker" if head else "model without a classifier (pre-trained)"
    lines = ["---", *(["pipeline_tag: text-ranking"] if head else []), "library_name: transformers", "---",
             f"# BERT {kind}: {describe(model)}", "",
             f"Converted from the TensorFlow checkpoint `{checkpoint}` by `convert_tf_checkpoint.py`; the inputs and "
             f"their SHA-256 are in run.json."]
    if head:
        lines.append("Input: `[CLS] query [SEP] passage [SEP]`; with two classes, class 1 is relevance.")
    return "\n".join(lines) + "\n"


def sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def main() -> None:
    args = parse_args()
    prefix, inputs, config, vocabulary = check_all(args)
    model, head, leftovers = read_model(open_checkpoint(prefix), config, prefix)
    say(f"model        {describe(model)}" + (f", {model.config.num_labels} classes" if head else ""))
    say("not used     " + (", ".join(f"{count} of {kind}" for kind, count in leftovers.items() if count) or "nothing"))
    if not head:
        say("note         no output_weights: pre-trained, not fine-tuned; it is written without a classifier")
    checksums = {str(path): sha256(path) for path in inputs}
    save_cross_encoder(model, args.output_dir, args.vocab.parent, vocabulary.lower_case,
                       model_card(model, head, prefix.name), general=not head)
    record(args.output_dir / "run.json", args, inputs=checksums, not_used=leftovers)
    say(f"written      {args.output_dir}, {'lower-cased' if vocabulary.lower_case else 'cased'}")


if __name__ == "__main__":
    run_main(main)
