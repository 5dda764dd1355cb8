"""Make training examples without judgements, for a teacher's warm-up: a query is a few words cut out of a passage.

    python -m experiments.cropped_queries --docs docs.tsv --output train.tsv --texts texts.txt

A BERT that was not trained on pairs of texts may not learn to rank even from thousands of judged pairs with hard
negatives. From two thousand cropped queries, it learns which passage contains a query's words. It can then be
fine-tuned on judged queries (figures: docs/replication-nfcorpus.md).

In: documents as prepare_examples.py takes them (document_id <tab> url <tab> title <tab> body, or document_id <tab>
text; plain or .gz). A random sample of --max_documents is used.
Out: --output, --examples lines of index <tab> query <tab> passage <tab> label. A query is 4 to 8 consecutive words of
a passage of 24 words. It is paired with this passage (label 1) and with a passage of another document (label 0).
--texts: title and body of the documents used, one document per line, for general_distill.py.
"""
import argparse
from collections.abc import Iterator
from pathlib import Path
from random import Random

from simplified_tinybert.common.files import (
    Problems,
    UserError,
    atomic_writer,
    check_input_file,
    check_ranges,
    run_main,
    say,
)
from simplified_tinybert.data.documents import read_documents

PASSAGE_WORDS, QUERY_WORDS = 24, (4, 8)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--docs", type=Path, required=True, help="documents, plain or .gz")
    add("--output", type=Path, required=True, help="output file for the examples")
    add("--texts", type=Path, required=True, help="output file for the texts, one document per line")
    add("--examples", type=int, default=10000, help="lines to write (default: 10000)")
    add("--max_documents", type=int, default=100000, help="maximum number of documents to use (default: 100000)")
    add("--seed", type=int, default=42, help="random seed (default: 42)")
    return parser.parse_args()


def sample_texts(path: Path, limit: int, random: Random, problems: Problems) -> list[str]:
    """Return title and body of up to `limit` documents, drawn uniformly (reservoir sampling)."""
    texts: list[str] = []
    for number, document in enumerate(read_documents(path, problems), start=1):
        slot = len(texts) if len(texts) < limit else random.randrange(number)
        if slot < limit:
            texts[slot:slot + 1] = [" ".join(f"{document.title} {document.body}".split())]
    return texts


def examples(texts: list[str], count: int, random: Random) -> Iterator[tuple[str, str, int]]:
    """Yield (query, passage, label): relevant and irrelevant passages in turn, all texts equally often."""
    order: list[int] = []
    for number in range(count):
        if number % 2 == 0:
            if not order:
                order = random.sample(range(len(texts)), len(texts))
            relevant = order.pop()
            passage = window(texts[relevant].split(), PASSAGE_WORDS, random)
            query = window(passage, random.randint(*QUERY_WORDS), random)
        else:
            other = (relevant + random.randrange(1, len(texts))) % len(texts)
            passage = window(texts[other].split(), PASSAGE_WORDS, random)
        yield " ".join(query), " ".join(passage), 1 - number % 2


def window(words: list[str], size: int, random: Random) -> list[str]:
    """Return `size` consecutive words from a random position."""
    start = random.randrange(max(1, len(words) - size + 1))
    return words[start:start + size]


def main() -> None:
    args, problems = parse_args(), Problems()
    random = Random(args.seed)
    check_ranges(args, problems, [(name, getattr(args, name) >= 2, "2 or more")
                                  for name in ("examples", "max_documents")])
    if check_input_file(args.docs, problems, "documents"):
        texts = list(filter(None, sample_texts(args.docs, args.max_documents, random, problems)))
    problems.raise_if_any()
    if len(texts) < 2:
        raise UserError(f"{args.docs}: found {len(texts)} documents with text; expected 2 or more")
    with atomic_writer(args.texts) as handle:
        handle.writelines(f"{text}\n" for text in texts)
    with atomic_writer(args.output) as handle:
        for number, (query, passage, label) in enumerate(examples(texts, args.examples, random)):
            handle.write(f"{number}\t{query}\t{passage}\t{label}\n")
    say(f"{args.output}: {args.examples:,} examples from {len(texts):,} documents")


if __name__ == "__main__":
    run_main(main)
