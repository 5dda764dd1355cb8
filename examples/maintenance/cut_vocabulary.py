"""Copy a BERT with only the tokens that some texts need: fewer embeddings, a smaller model.

    python -m examples.maintenance.cut_vocabulary --model_dir MiniLM --texts corpus.txt queries.train.tsv \\
        --tokens 6000 --positions 128 --output_dir bert

Kept are the special tokens, the characters of ASCII (so that every English word can still be split into tokens), then
the tokens of the texts by how often they occur, then the tokens with the smallest ids: BERT's vocabulary lists the most
common words first. Kept embeddings are unchanged: texts of kept tokens that fit into the kept positions get the same
hidden states as before. Weights stay float32.
"""
import argparse
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import load_file, save

from simplified_tinybert.common.files import Problems, atomic_writer, check_input_file, run_main, say
from simplified_tinybert.tokenization.tokenizer_files import load_vocabulary
from simplified_tinybert.tokenization.vocabulary import SPECIAL_TOKENS, Vocabulary

CHARACTERS = [prefix + chr(code) for code in range(33, 127) for prefix in ("", "##")]       # of ASCII
LEAST_TOKENS = len(SPECIAL_TOKENS) + len(CHARACTERS)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_dir", type=Path, required=True, help="directory of the BERT")
    add("--texts", type=Path, nargs="+", required=True, help="files of text in UTF-8")
    add("--tokens", type=int, required=True, help="tokens to keep")
    add("--positions", type=int, default=128, help="position embeddings to keep (default: 128)")
    add("--output_dir", type=Path, required=True, help="directory for the copy; made if it is missing")
    return parser.parse_args()


def choose_tokens(vocabulary: Vocabulary, texts: Iterable[str], count: int) -> list[str]:
    """`count` tokens in the order of their old ids."""
    tokenizer, found = vocabulary.tokenizer(), Counter()
    for text in texts:
        found.update(tokenizer.encode(text, add_special_tokens=False).tokens)
    common = sorted(vocabulary.token_ids, key=vocabulary.token_ids.get)
    common = [token for token in common if len(token) > 1 and token.isascii() and not token.startswith("[")]
    by_frequency = sorted(found, key=lambda token: (-found[token], vocabulary.token_ids[token]))
    wanted = dict.fromkeys([*SPECIAL_TOKENS, *CHARACTERS, *by_frequency, *common])
    kept = [token for token in wanted if token in vocabulary.token_ids][:count]
    say(f"{sum(found[token] for token in kept) / max(1, found.total()):.2%} of the texts' tokens are kept, "
        f"{len(found.keys() - set(kept)):,} of {len(found):,} different ones dropped")
    return sorted(kept, key=vocabulary.token_ids.get)


def main() -> None:
    args, problems = parse_args(), Problems()
    for path in (args.model_dir / "config.json", args.model_dir / "model.safetensors", *args.texts):
        check_input_file(path, problems, "input")
    problems.raise_if_any()
    config = json.loads((args.model_dir / "config.json").read_text(encoding="utf-8"))
    if not 1 <= args.positions <= config["max_position_embeddings"]:
        problems.add(f"--positions {args.positions}: expected 1 to {config['max_position_embeddings']}")
    if args.tokens < LEAST_TOKENS:
        problems.add(f"--tokens {args.tokens}: expected at least {LEAST_TOKENS}: special tokens and ASCII")
    problems.raise_if_any()
    vocabulary = load_vocabulary(args.model_dir)
    lines = (line for path in args.texts for line in path.read_text(encoding="utf-8").splitlines())
    tokens = choose_tokens(vocabulary, lines, args.tokens)
    rows = [vocabulary.token_ids[token] for token in tokens]
    weights = load_file(args.model_dir / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("word_embeddings.weight"):
            weights[name] = weight[rows].contiguous()
        elif name.endswith("position_embeddings.weight"):
            weights[name] = weight[:args.positions].contiguous()
    weights = {name: weight for name, weight in weights.items() if not name.endswith("position_ids")}
    config |= {"vocab_size": len(tokens), "max_position_embeddings": args.positions}
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": vocabulary.lower_case,
                 "model_max_length": args.positions}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with atomic_writer(args.output_dir / "model.safetensors", "wb") as handle:
        handle.write(save(weights, {"format": "pt"}))
    for name, text in {"config.json": json.dumps(config, indent=2) + "\n",
                       "tokenizer_config.json": json.dumps(tokenizer, indent=2) + "\n",
                       "vocab.txt": "".join(f"{token}\n" for token in tokens)}.items():
        with atomic_writer(args.output_dir / name) as handle:
            handle.write(text)


if __name__ == "__main__":
    run_main(main)
