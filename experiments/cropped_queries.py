"""Training examples without people: a few words cut out of a passage are its query. To warm a teacher up.

    python -m experiments.cropped_queries --docs docs.tsv --output train.tsv --texts texts.txt

A BERT that was not trained on pairs of texts learns from judged queries and their hard negatives only after thousands
of pairs, if at all; which passage holds a query's words it learns in two thousand, and what it has learnt then it can
refine (docs/replication.md has the figures).

In: documents as prepare_examples.py takes them (document_id <tab> url <tab> title <tab> body, or document_id <tab>
text; plain or .gz). --max_documents of them are used, drawn at random.
Out: --output, --examples lines of index <tab> query <tab> passage <tab> label: 4 to 8 words in a row of a passage of 24
words, with this passage (label 1) and with one of another document (label 0); and --texts, title and body of the
documents used, one a line, for general_distill.py.
"""
import argparse
from collections.abc import Iterator
from pathlib import Path
from random import Random

from simplified_tinybert.common.files import Problems, UserError, atomic_writer, check_input_file, run_main, say
from simplified_tinybert.data.documents import read_documents

PASSAGE, QUERY = 24, (4, 8)     # words


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--docs", type=Path, required=True, help="documents, plain or .gz")
    add("--output", type=Path, required=True, help="file for the examples")
    add("--texts", type=Path, required=True, help="file for the texts, one a line")
    add("--examples", type=int, default=10000, help="lines to write (default: 10000)")
    add("--max_documents", type=int, default=100000, help="use so many of the documents at most (default: 100000)")
    add("--seed", type=int, default=42, help="of all that is drawn at random (default: 42)")
    return parser.parse_args()


def sample_texts(path: Path, most: int, random: Random, problems: Problems) -> list[str]:
    """Title and body of `most` of the documents, each document as likely as any other (reservoir sampling)."""
    texts: list[str] = []
    for number, document in enumerate(read_documents(path, problems), start=1):
        place = len(texts) if len(texts) < most else random.randrange(number)
        if place < most:
            texts[place:place + 1] = [" ".join(f"{document.title} {document.body}".split())]
    return texts


def examples(texts: list[str], count: int, random: Random) -> Iterator[tuple[str, str, int]]:
    """(query, passage, label), a relevant passage and another one in turn; every text gives as many as any other."""
    order: list[int] = []
    for number in range(count):
        if number % 2 == 0:
            if not order:
                order = random.sample(range(len(texts)), len(texts))
            mine = order.pop()
            passage = window(texts[mine].split(), PASSAGE, random)
            query = window(passage, random.randint(*QUERY), random)
        else:
            other = (mine + random.randrange(1, len(texts))) % len(texts)
            passage = window(texts[other].split(), PASSAGE, random)
        yield " ".join(query), " ".join(passage), 1 - number % 2


def window(words: list[str], size: int, random: Random) -> list[str]:
    """So many words in a row."""
    start = random.randrange(max(1, len(words) - size + 1))
    return words[start:start + size]


def main() -> None:
    args, problems = parse_args(), Problems()
    random = Random(args.seed)
    for name in ("examples", "max_documents"):
        if getattr(args, name) < 2:
            problems.add(f"--{name} {getattr(args, name)}: expected 2 or more")
    found = check_input_file(args.docs, problems, "documents")
    texts = sample_texts(args.docs, args.max_documents, random, problems) if found else []
    problems.raise_if_any()
    texts = [text for text in texts if text]
    if len(texts) < 2:
        raise UserError(f"{args.docs}: has {len(texts)} documents with words; expected 2 or more")
    with atomic_writer(args.texts) as handle:
        handle.writelines(f"{text}\n" for text in texts)
    with atomic_writer(args.output) as handle:
        for number, (query, passage, label) in enumerate(examples(texts, args.examples, random)):
            handle.write(f"{number}\t{query}\t{passage}\t{label}\n")
    say(f"{args.output}: {args.examples:,} examples of {len(texts):,} documents")


if __name__ == "__main__":
    run_main(main)
