"""Copy a model directory with the weights in half the bytes, for the models that this repository carries.

    python -m examples.maintenance.store_float16 --model_dir teacher_float32 --output_dir examples/teacher

In: config.json, model.safetensors, vocab.txt, tokenizer_config.json, and of a general student fit_dense.safetensors,
the projection to its teacher's hidden size. Out: the same files, weights as float16. config.json keeps saying "dtype":
"float32", so loaders convert the weights back and compute as before. Dropout is set to 0, because the example's
training takes only minutes.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from simplified_tinybert.common.files import Problems, atomic_writer, check_input_file, run_main

TEXTS = ("vocab.txt", "tokenizer_config.json")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True, help="directory of the model")
    parser.add_argument("--output_dir", type=Path, required=True, help="directory for the copy; made if it is missing")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    problems = Problems()
    for name in ("config.json", "model.safetensors", *TEXTS):
        check_input_file(args.model_dir / name, problems, "model")
    problems.raise_if_any()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for path in args.model_dir.glob("*.safetensors"):
        weights = load_file(path)
        with atomic_writer(args.output_dir / path.name, "wb") as handle:
            handle.write(save({name: weight.to(torch.float16) for name, weight in weights.items()}, {"format": "pt"}))
    config = json.loads((args.model_dir / "config.json").read_text(encoding="utf-8"))
    config |= {"dtype": "float32", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    texts = {name: (args.model_dir / name).read_text(encoding="utf-8") for name in TEXTS}
    for name, text in {**texts, "config.json": json.dumps(config, indent=2) + "\n"}.items():
        with atomic_writer(args.output_dir / name) as handle:
            handle.write(text)


if __name__ == "__main__":
    run_main(main)
