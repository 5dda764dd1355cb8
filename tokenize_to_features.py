"""Tokenize query-passage pairs once, for any number of training and re-ranking runs.

    python tokenize_to_features.py --set_name train --raw_data_file examples.tsv --output_features_file train.pkl \\
        --bert_model_dir google-bert/bert-base-uncased --max_seq_length 256
    python tokenize_to_features.py --set_name test --raw_data_file pairs.tsv.gz --output_features_file test.pkl \\
        --bert_model_dir google-bert/bert-base-uncased --max_seq_length 256

In, one pair per line, UTF-8, plain or gzip, columns separated by one tab:
    train      index <tab> query <tab> passage <tab> label        label 1: relevant, 0: not
    dev, test  query_id#passage_id <tab> query <tab> passage (<tab> label)
Out, a feature file (simplified_tinybert/data/features.py): [CLS] query [SEP] passage [SEP] of each pair in input order,
at most max_seq_length tokens. Truncation removes one token at a time from the longer text, or from the passage if both
are equally long. The tokenizer is that of the model directory, as transformers loads it. All lines are checked before
the first pair is tokenized. If there are errors, the first 20 are printed and nothing is written. FILE.run.json records
flags and inputs.
"""
import argparse
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from simplified_tinybert.common.duplicates import DuplicateFinder
from simplified_tinybert.common.files import (
    Problems,
    atomic_writer,
    check_input_file,
    check_output_file,
    check_ranges,
    run_main,
    say,
    shorten,
    warn,
)
from simplified_tinybert.common.records import record_file
from simplified_tinybert.common.text import lines_of, open_binary, read_blocks, read_json, read_lines
from simplified_tinybert.common.workers import MAX_WORKERS, default_workers, map_in_order
from simplified_tinybert.data.features import CHUNK_EXAMPLES, Examples, FeatureWriter, joined
from simplified_tinybert.model.hub import config_file, find_model
from simplified_tinybert.tokenization.pairs import CachedTokenizer, tokenize, words_suffice
from simplified_tinybert.tokenization.tokenizer_files import load_vocabulary
from simplified_tinybert.tokenization.vocabulary import Vocabulary

PAIR_COLUMNS = "query_id#passage_id, query, passage (, label)"
COLUMNS = {"train": "index, query, passage, label", "dev": PAIR_COLUMNS, "test": PAIR_COLUMNS}
PAIR_ID = re.compile(r"[^\s#]+#\S+")
PAIRS_PER_PROCESS = 16_384


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--set_name", choices=tuple(COLUMNS), required=True, help="determines the expected columns and ids")
    add("--raw_data_file", type=Path, required=True, help="tab-separated pairs, plain or .gz")
    add("--output_features_file", type=Path, required=True, help="feature file to write")
    add("--bert_model_dir", required=True, help="directory or hub id of the model whose tokenizer is used")
    add("--max_seq_length", type=int, default=256,
        help="maximum number of tokens in a pair, special tokens included (default: 256)")
    add("--do_lower_case", action=argparse.BooleanOptionalAction, default=None,
        help="lower-case texts (default: as transformers' AutoTokenizer does for this model)")
    add("--num_workers", type=int, default=0,
        help=f"number of tokenizing processes (default: one per CPU core, at most {MAX_WORKERS})")
    return parser.parse_args()


def check_line(text: str, set_name: str) -> list[str]:
    """Return the errors of a line."""
    columns = text.split("\t")
    if len(columns) not in ((4,) if set_name == "train" else (3, 4)):
        hint = ("two files were joined without a line end between them: add one" if "\ufeff" in text else
                "lines end in \\r alone: convert them, for example with tr '\\r' '\\n'" if "\r" in text else
                "use --set_name test if these are test pairs" if set_name == "train" and len(columns) == 3 else
                "replace tabs inside texts by spaces" if len(columns) > 4 else "separate columns by one tab")
        return [f"found {len(columns)} tab-separated columns ({shorten(text)}); expected {COLUMNS[set_name]}; {hint}"]
    errors = [f"the {name} is empty; add a text or remove the line"
              for name, value in zip(("query", "passage"), columns[1:3]) if not value.strip()]
    if len(columns) == 4 and columns[3] not in ("0", "1"):
        errors.append(f"found label {shorten(columns[3])}; expected 0 or 1")
    if not columns[0]:
        errors.append("the id is empty; expected " + COLUMNS[set_name].split(",")[0])
    elif set_name != "train" and not PAIR_ID.fullmatch(columns[0]):
        errors.append(f"found id {shorten(columns[0])}; expected query_id#passage_id without white space"
                      + ("; use --set_name train if these are training examples" if len(columns) == 4 else ""))
    return errors


def check_pairs(path: Path, set_name: str, problems: Problems) -> int:
    """Check all lines. Returns the number of pairs."""
    ids, pairs, before = DuplicateFinder(), 0, problems.count
    for number, text in tqdm(read_lines(path, problems), desc="checking", unit=" lines", unit_scale=True):
        pairs += 1
        for error in check_line(text, set_name):
            problems.add(f"{path}:{number}: {error}")
        if text:                                        # empty lines are not duplicates
            ids.add(text.partition("\t")[0])
    keys = ((number, text.partition("\t")[0]) for number, text in read_lines(path, Problems()) if text)
    ids.report(keys, path, "id", problems)
    if not pairs and problems.count == before:
        problems.add(f"{path}: is empty; expected one pair per line: {COLUMNS[set_name]}")
    return pairs


def warn_of_positions(directory: Path, max_seq_length: int) -> None:
    """Warn if the model cannot read such long sequences. Another one with this tokenizer may be able to."""
    path = config_file(directory)
    positions = read_json(path, "configuration").get("max_position_embeddings") if path else None
    if isinstance(positions, int) and max_seq_length > positions:
        warn(f"--max_seq_length {max_seq_length}: {directory} has only {positions} positions, and cannot read these "
             f"features; for this model, use {positions} or less")


def block_tokenizer(vocabulary: Vocabulary, max_seq_length: int, by_words: bool) -> Callable[[bytes], Examples]:
    tokenizer = CachedTokenizer(vocabulary, max_seq_length, by_words)
    return lambda block: tokenize(lines_of(block), tokenizer)


def in_chunks(blocks: Iterable[Examples]) -> Iterator[Examples]:
    """Regroup examples into chunks of CHUNK_EXAMPLES."""
    pending, count = [], 0
    for block in blocks:
        pending.append(block)
        count += len(block)
        while count >= CHUNK_EXAMPLES:
            examples = joined(pending)
            yield examples.span(0, CHUNK_EXAMPLES)
            pending, count = [examples.span(CHUNK_EXAMPLES, count)], count - CHUNK_EXAMPLES
    if count:
        yield joined(pending)


def main() -> None:
    args, problems = parse_args(), Problems()
    check_ranges(args, problems, [("max_seq_length", 8 <= args.max_seq_length < 2 ** 16, "8 to 65535 tokens"),
                                  ("num_workers", args.num_workers >= 0, "0 (one per core) or more")])
    check_output_file(args.output_features_file, problems, inputs=[args.raw_data_file])
    readable = check_input_file(args.raw_data_file, problems, "pairs", read_twice=True)
    with problems.collect():
        directory = find_model(args.bert_model_dir)
        vocabulary = load_vocabulary(directory, args.do_lower_case)
        warn_of_positions(directory, args.max_seq_length)
    pairs = check_pairs(args.raw_data_file, args.set_name, problems) if readable else 0
    problems.raise_if_any()

    workers, full = min(args.num_workers or default_workers(), 1 + pairs // PAIRS_PER_PROCESS), 0
    say(f"{pairs:,} pairs; vocabulary of {len(vocabulary.token_ids):,} tokens, "
        f"{'lower-cased' if vocabulary.lower_case else 'cased'}")
    texts = chain.from_iterable(line.split("\t")[1:3] for _, line in read_lines(args.raw_data_file, Problems()))
    by_words = words_suffice(vocabulary, texts)
    with open_binary(args.raw_data_file) as source, atomic_writer(args.output_features_file, "wb") as handle:
        writer = FeatureWriter(handle, args.set_name, args.max_seq_length, vocabulary)
        with tqdm(total=pairs, desc="tokenizing", unit=" pairs", unit_scale=True) as progress:
            make = partial(block_tokenizer, vocabulary, args.max_seq_length, by_words)
            for examples in in_chunks(map_in_order(make, read_blocks(source), workers)):
                writer.write(examples)
                full += int((examples.lengths == args.max_seq_length).sum())
                progress.update(len(examples))
        if writer.examples != pairs:
            problems.add(f"{args.raw_data_file}: changed while it was read: {pairs} lines, then {writer.examples}")
        problems.raise_if_any()
        writer.close()
    record_file(args.output_features_file, args, [args.raw_data_file], pairs=pairs,
                vocabulary=vocabulary.checksum(), lower_case=vocabulary.lower_case)
    say(f"{args.output_features_file}: {pairs:,} pairs, {writer.tokens / pairs:.1f} tokens on average, "
        f"{100 * full / pairs:.1f} % have {args.max_seq_length}")


if __name__ == "__main__":
    run_main(main)
