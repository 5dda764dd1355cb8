"""Convert a TensorFlow checkpoint of Google's BERT to a model directory, such as the paper's teacher, dl4marco-bert.

    python convert_tf_checkpoint.py --tf_checkpoint model.ckpt-400000 --bert_config bert_config.json \\
        --vocab vocab.txt --output_dir teacher
    python convert_tf_checkpoint.py --tf_checkpoint uncased_L-12_H-768_A-12 --output_dir bert-base

Input: a checkpoint (NAME.index and NAME.data-...), its bert_config.json and its vocab.txt. Its variables have the names
of google-research/bert: bert/..., and output_weights and output_bias in a fine-tuned ranker. --tf_checkpoint may also
name the directory of these files; if it holds several checkpoints, its file `checkpoint` determines which is converted.

Output: a Hugging Face directory (config.json, model.safetensors, vocab.txt, model card) that gives the same logits in
float32, and run.json with the SHA-256 of every input. A pre-trained model without output_weights is written without a
classifier; it can serve as a general student, or as the teacher of a general distillation.

Variables of the optimizer (adam_m, adam_v, global_step) and of the pre-training heads (cls/...) are skipped. If another
variable is missing, unknown or of the wrong shape, the script lists all such variables and writes nothing.
"hidden_act": "gelu" means the exact function, as in dl4marco-bert and in Google's code until February 2019; for a model
trained with Google's later tanh approximation, write "gelu_new" into its bert_config.json first.

Only this script needs TensorFlow: pip install tensorflow-cpu (on ARM or a Mac: tensorflow)
"""
import argparse
import glob
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig

from simplified_tinybert.common.files import Problems, UserError, check_input_file, reason, run_main, say
from simplified_tinybert.common.records import record, sha256_of
from simplified_tinybert.common.text import failed_download
from simplified_tinybert.model.bert import CrossEncoder, describe
from simplified_tinybert.model.configuration import read_config
from simplified_tinybert.model.pretrained import save_cross_encoder
from simplified_tinybert.tokenization.tokenizer_files import load_vocabulary
from simplified_tinybert.tokenization.vocabulary import Vocabulary
from simplified_tinybert.training.checkpoints import check_output_dir

SKIPPED = {"Adam's slots": re.compile(r"(.*/)?adam_[mv]"), "global_step": re.compile("global_step"),
           "pre-training heads": re.compile("cls/.*")}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tf_checkpoint", type=Path, required=True, help="checkpoint (file name without .index), or its directory")
    add("--bert_config", type=Path, help="configuration (default: bert_config.json in the same directory)")
    add("--vocab", type=Path, help="vocab.txt (default: the one in the same directory)")
    add("--output_dir", type=Path, required=True, help="new or empty directory for the model")
    add("--do_lower_case", action=argparse.BooleanOptionalAction, default=None,
        help="whether to lower-case texts (default: yes, as in transformers)")
    return parser.parse_args()


def find_checkpoint(path: Path) -> Path:
    """Return the path of a checkpoint without file name extensions. Raises UserError."""
    if not path.is_dir():
        prefix = path.with_name(re.sub(r"\.(index|meta|data-\d{5}-of-\d{5})$", "", path.name))
        if not prefix.with_name(prefix.name + ".index").is_file():
            raise UserError(f"{path}: no such checkpoint; expected a file {prefix.name}.index, or a directory with one")
        return prefix
    names = sorted(file.name.removesuffix(".index") for file in path.glob("*.index"))
    if not names:
        raise UserError(f"{path}: holds no checkpoint; expected NAME.index and NAME.data-00000-of-00001 in it")
    latest, state = None, path / "checkpoint"
    if state.is_file():
        found = re.search(r'^model_checkpoint_path:\s*"(.*)"', state.read_text(encoding="utf-8", errors="replace"),
                          re.MULTILINE)
        latest = found and Path(found[1]).name
    if latest not in names and len(names) > 1:
        raise UserError(f"{path}: holds {len(names)} checkpoints ({', '.join(names)}), and its file `checkpoint` names "
                        f"none of them; choose one: --tf_checkpoint {path / names[-1]}")
    return path / (latest if latest in names else names[0])


def checkpoint_files(prefix: Path) -> list[Path]:
    """Return the index and all data files of a checkpoint. Raises UserError if one is missing."""
    data = sorted(prefix.parent.glob(f"{glob.escape(prefix.name)}.data-?????-of-?????"))
    expected = int(data[0].name[-5:]) if data else 1
    if len(data) != expected:
        raise UserError(f"{prefix}: found {len(data)} data files ({prefix.name}.data-...), expected {expected}; fetch "
                        f"them all")
    return [prefix.with_name(prefix.name + ".index"), *data]


def google_name(parameter: str) -> str:
    """Map bert.encoder.layer.0.output.dense.weight to Google's name, bert/encoder/layer_0/output/dense/kernel."""
    if parameter.startswith("classifier."):
        return {"weight": "output_weights", "bias": "output_bias"}[parameter.removeprefix("classifier.")]
    *path, last = re.sub(r"\.layer\.(\d+)\.", r".layer_\1.", parameter).split(".")
    if path[-1].endswith("_embeddings"):
        return "/".join(path)
    names = {"weight": "gamma", "bias": "beta"} if path[-1] == "LayerNorm" else {"weight": "kernel", "bias": "bias"}
    return "/".join([*path, names[last]])


def expected_variables(model: CrossEncoder, has_head: bool) -> dict[str, tuple[str, list[int]]]:
    """Map Google's name of each parameter to our name and to the shape in the checkpoint (kernels are transposed)."""
    expected = {}
    for parameter, tensor in model.named_parameters():
        if has_head or not parameter.startswith("classifier."):
            name = google_name(parameter)
            expected[name] = parameter, list(tensor.shape)[::-1 if name.endswith("/kernel") else 1]
    return expected


def check_variables(shapes: dict[str, list[int]], expected: dict[str, tuple[str, list[int]]], source: Path,
                    problems: Problems) -> dict[str, int]:
    """Add missing, unknown and wrongly shaped variables to `problems`. Returns {kind: number of skipped variables}."""
    for name in sorted(expected.keys() - shapes.keys()):
        problems.add(f"{source}: lacks {name}")
    for name in sorted(expected.keys() & shapes.keys()):
        if shapes[name] != expected[name][1]:
            problems.add(f"{source}: {name} has shape {shapes[name]}; expected {expected[name][1]} by the "
                         f"configuration")
    skipped = dict.fromkeys(SKIPPED, 0)
    for name in sorted(shapes.keys() - expected.keys()):
        kind = next((kind for kind, pattern in SKIPPED.items() if pattern.fullmatch(name)), None)
        if kind:
            skipped[kind] += 1
        else:
            hint = "; this is a TensorFlow 2 object checkpoint; expected a checkpoint of Google's BERT code" \
                if name.endswith("/.ATTRIBUTES/VARIABLE_VALUE") else ""
            problems.add(f"{source}: holds {name}, not expected in a BERT ranker of this configuration{hint}")
    return skipped


def open_checkpoint(prefix: Path) -> Any:
    """Return TensorFlow's reader of a checkpoint. Raises UserError."""
    import torch._dynamo  # noqa: F401  CUDA builds load triton here, which crashes if TensorFlow was loaded first
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}       # no messages on import
    try:
        import tensorflow
    except ImportError as error:
        raise UserError(f"TensorFlow is needed to read the checkpoint, but cannot be imported ({error}); pip install "
                        f"tensorflow-cpu (on ARM or a Mac: tensorflow)") from error
    try:
        return tensorflow.train.load_checkpoint(str(prefix))
    except Exception as error:                          # the library raises almost any error for a damaged file
        raise UserError(f"{prefix}.index: is damaged or not a TensorFlow checkpoint ({reason(error)}); fetch it "
                        f"again") from error


def read_model(reader: Any, config: BertConfig, prefix: Path) -> tuple[CrossEncoder, bool, dict[str, int]]:
    """Return the model, whether it has a classifier, and {kind: number of skipped variables}. Raises UserError."""
    shapes, problems = reader.get_variable_to_shape_map(), Problems()
    has_head = bool(shapes.keys() & {"output_weights", "output_bias"})
    if len(shapes.get("output_weights", [])) == 2:
        config.num_labels = shapes["output_weights"][0]
    with torch.device("meta"):                          # no memory is needed for shapes
        model = CrossEncoder(config)
    expected = expected_variables(model, has_head)
    skipped = check_variables(shapes, expected, prefix, problems)
    problems.raise_if_any()
    weights = {parameter: read_variable(reader, name, prefix, problems) for name, (parameter, _) in expected.items()}
    problems.raise_if_any()
    model.load_state_dict(weights, strict=has_head, assign=True)
    return model.eval(), has_head, skipped


def read_variable(reader: Any, name: str, prefix: Path, problems: Problems) -> torch.Tensor | None:
    """Return a variable in float32. Kernels are transposed, as in PyTorch."""
    try:
        value = reader.get_tensor(name)
    except Exception as error:
        problems.add(f"{prefix}: cannot read {name}: the data file is damaged or truncated ({reason(error)}); fetch it "
                     f"again")
        return None
    if not reader.get_variable_to_dtype_map()[name].is_floating:
        problems.add(f"{prefix}: {name} holds {value.dtype}; expected floating-point numbers")
        return None
    value = np.asarray(value, dtype=np.float32)
    if not np.isfinite(value).all():
        problems.add(f"{prefix}: {name} holds NaN or infinite values; the model diverged")
    return torch.from_numpy(np.ascontiguousarray(value.T if name.endswith("/kernel") else value))


def check_all(args: argparse.Namespace) -> tuple[Path, list[Path], BertConfig, Vocabulary]:
    """Check the inputs without TensorFlow. Returns checkpoint, all input files, configuration and vocabulary."""
    problems, files, config, vocabulary = Problems(), [], None, None
    check_output_dir(args.output_dir, None, problems)
    with problems.collect():
        prefix = find_checkpoint(args.tf_checkpoint)
        args.bert_config = args.bert_config or prefix.with_name("bert_config.json")
        args.vocab = args.vocab or prefix.with_name("vocab.txt")
        files = checkpoint_files(prefix)
    for path in files:
        if error := failed_download(path):
            problems.add(f"{path}: {error}")
    if args.bert_config and check_input_file(args.bert_config, problems, "configuration (--bert_config)"):
        with problems.collect():
            config = read_config(args.bert_config)
    if args.vocab and args.vocab.name != "vocab.txt":
        problems.add(f"--vocab {args.vocab}: expected a file named vocab.txt; copy it under that name")
    elif args.vocab and args.vocab.with_name("tokenizer.json").is_file():
        problems.add(f"--vocab {args.vocab}: its directory also holds tokenizer.json, which replaces vocab.txt in "
                     f"transformers; copy vocab.txt to a directory without it")
    elif args.vocab and check_input_file(args.vocab, problems, "vocabulary (--vocab)"):
        with problems.collect():
            vocabulary = load_vocabulary(args.vocab.parent, args.do_lower_case)
    if config and vocabulary and len(vocabulary.token_ids) > config.vocab_size:
        problems.add(f"{args.vocab}: has {len(vocabulary.token_ids)} tokens, but vocab_size in {args.bert_config} is "
                     f"{config.vocab_size}; expected both files from the same model")
    problems.raise_if_any()
    return prefix, [*files, args.bert_config, args.vocab], config, vocabulary


def model_card(model: CrossEncoder, has_head: bool, checkpoint: str) -> str:
    kind = "re-ranker" if has_head else "model without a classifier (pre-trained)"
    lines = ["---", *(["pipeline_tag: text-ranking"] if has_head else []), "library_name: transformers", "---",
             f"# BERT {kind}: {describe(model)}", "",
             f"Converted from the TensorFlow checkpoint `{checkpoint}` by `convert_tf_checkpoint.py`; run.json lists "
             f"the inputs and their SHA-256."]
    if has_head:
        lines.append("Input: `[CLS] query [SEP] passage [SEP]`; with two classes, class 1 is relevance.")
    return "\n".join(lines) + "\n"


def main() -> None:
    args = parse_args()
    prefix, inputs, config, vocabulary = check_all(args)
    model, has_head, skipped = read_model(open_checkpoint(prefix), config, prefix)
    say(f"model        {describe(model)}" + (f", {model.config.num_labels} classes" if has_head else ""))
    say("not used     " + (", ".join(f"{count} of {kind}" for kind, count in skipped.items() if count) or "nothing"))
    if not has_head:
        say("note         without output_weights, so not fine-tuned; written without a classifier")
    checksums = {str(path): sha256_of(path) for path in inputs}
    save_cross_encoder(model, args.output_dir, args.vocab.parent, vocabulary.lower_case,
                       model_card(model, has_head, prefix.name), general=not has_head)
    record(args.output_dir / "run.json", args, inputs=checksums, not_used=skipped)
    say(f"written      {args.output_dir}, {'lower-cased' if vocabulary.lower_case else 'cased'}")


if __name__ == "__main__":
    run_main(main)
