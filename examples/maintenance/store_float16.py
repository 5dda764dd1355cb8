"""Copy a model directory with float16 weights, which take half the space. For the models in this repository.

    python -m examples.maintenance.store_float16 --model_dir teacher_float32 --output_dir examples/teacher

In: config.json, model.safetensors, vocab.txt and tokenizer_config.json. Out: the same files, weights as float16.
config.json still says "dtype": "float32", so that loaders convert the weights back and compute in float32.
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
    parser.add_argument("--output_dir", type=Path, required=True, help="directory for the copy; created if missing")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    problems = Problems()
    for name in ("config.json", "model.safetensors", *TEXTS):
        check_input_file(args.model_dir / name, problems, "model")
    problems.raise_if_any()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    weights = load_file(args.model_dir / "model.safetensors")
    with atomic_writer(args.output_dir / "model.safetensors", "wb") as handle:
        handle.write(save({name: weight.to(torch.float16) for name, weight in weights.items()}, {"format": "pt"}))
    config = json.loads((args.model_dir / "config.json").read_text(encoding="utf-8"))
    texts = {name: (args.model_dir / name).read_text(encoding="utf-8") for name in TEXTS}
    for name, text in {**texts, "config.json": json.dumps({**config, "dtype": "float32"}, indent=2) + "\n"}.items():
        with atomic_writer(args.output_dir / name) as handle:
            handle.write(text)


if __name__ == "__main__":
    run_main(main)
