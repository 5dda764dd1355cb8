"""Turn the documentation of Python's standard library into a small document retrieval collection.

    python -m examples.build_collection --output_dir example_data

Documents are modules. A query is the first sentence of a function's documentation. It is held out of the document, with
the function's name and parameters. The function's module is the relevant document. BM25 selects the candidates; it may
miss the relevant document. Nothing is downloaded, no module written in Python is imported, and the same interpreter
always gives the same bytes. Files are as in MS MARCO, *.tsv separated by tabs and *.txt by blanks:

    docs.tsv                        docid, url (empty), title, body        docid is the module's name
    queries.{train,dev,test}.tsv    qid, text                              qid is the function's qualified name
    qrels.{train,dev,test}.txt      qid 0 docid 1
    bm25.{train,dev,test}.txt       qid Q0 docid rank score bm25           --candidates documents per query
    train.examples.tsv              index, query, passage, label           label 1: a passage of the relevant module
    {dev,test}.pairs.tsv            qid#docid_n, query, passage            n-th passage of a candidate document
    corpus.txt                      one passage per line, for pre-training

A passage is the module's name and --window words of its text. To make re-ranking fast, {dev,test}.pairs.tsv contain
only the --passages_per_document passages of each candidate document that BM25 scores highest.
"""

import argparse
import random
import re
from pathlib import Path

import bm25s
import numpy as np
import Stemmer
from tqdm import tqdm

from examples.stdlib_collection import PSEUDO, Collection, Query, choose_queries, digest, make_collection
from examples.stdlib_docs import read_library
from simplified_tinybert.common.files import UserError, atomic_writer, run_main


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the docstring's layout and shows defaults."""


class Bm25:
    """BM25 over a list of texts. Identifiers are split at underscores, words are stemmed."""

    def __init__(self, texts: list[str], k1: float, b: float):
        self.stem = Stemmer.Stemmer("english").stemWords
        self.index = bm25s.BM25(k1=k1, b=b)
        self.index.index([self.words(text) for text in texts], show_progress=False)
        self.size = len(texts)

    def words(self, text: str) -> list[str]:
        return self.stem(re.findall(r"[a-z0-9]+", text.lower()))

    def scores(self, query: str) -> np.ndarray:
        known = [word for word in self.words(query) if word in self.index.vocab_dict]
        return self.index.get_scores(known) if known else np.zeros(self.size, dtype=np.float32)


class Ranking:
    """Documents ranked for a query by the BM25 score of their best passage."""

    def __init__(self, collection: Collection, query: Query, bm25: Bm25, depth: int):
        self.scores = bm25.scores(query.text)
        self.first = np.searchsorted(collection.document_of, np.arange(len(collection.names) + 1))
        best = np.maximum.reduceat(self.scores, self.first[:-1])
        self.documents = [int(document) for document in np.argsort(-best, kind="stable")[:depth] if best[document] > 0]
        self.document_scores = best[self.documents]

    def passages(self, document: int) -> list[int]:
        """Passages of a document, best first."""
        start, end = self.first[document:document + 2]
        return [int(start + index) for index in np.argsort(-self.scores[start:end], kind="stable")]


def sample_examples(collection: Collection, query: Query, ranking: Ranking,
                    args: argparse.Namespace) -> list[tuple[int, int]]:
    """Return (passage, label) pairs for a training query.

    The positives are the passage about the function, and the module's best passage by BM25, as in re-ranking. A pseudo
    query is part of its own passage, so its only positive is another passage of the module. The negatives are the best
    passages of other candidates, as in re-ranking, and --random_negatives random passages.
    """
    generator = random.Random(digest(query.text))
    others = [passage for passage in ranking.passages(query.document) if passage not in query.own]
    positives = others[:1] if query.pseudo else query.own[:1] + ranking.passages(query.document)[:2]
    positives = list(dict.fromkeys(positives))[:2]
    documents = [document for document in ranking.documents if document != query.document]
    documents = generator.sample(documents, min(args.hard_negatives, len(documents)))
    negatives = [ranking.passages(document)[0] for document in documents]
    while len(negatives) < len(documents) + args.random_negatives:
        if collection.document_of[passage := generator.randrange(len(collection.passages))] != query.document:
            negatives.append(passage)
    return [(passage, 1) for passage in positives] + [(passage, 0) for passage in negatives if positives]


def write_examples(path: Path, collection: Collection, queries: list[Query], bm25: Bm25,
                   args: argparse.Namespace) -> None:
    rows = []
    for query in tqdm(queries, desc="training examples", unit="query"):
        ranking = Ranking(collection, query, bm25, args.candidates)
        chosen = sample_examples(collection, query, ranking, args)
        rows += [f"{query.text}\t{collection.passages[passage]}\t{label}\n" for passage, label in chosen]
    with atomic_writer(path) as handle:
        handle.writelines(f"{index}\t{row}" for index, row in enumerate(rows))


def write_pairs(path: Path, collection: Collection, queries: list[Query], bm25: Bm25, args: argparse.Namespace) -> None:
    """Write test pairs. A passage id ends with the passage's position in its document."""
    with atomic_writer(path) as handle:
        for query in queries:
            ranking = Ranking(collection, query, bm25, args.candidates)
            for document in ranking.documents:
                for passage in sorted(ranking.passages(document)[:args.passages_per_document]):
                    pair = f"{query.qid}#{collection.names[document]}_{passage - ranking.first[document]}"
                    handle.write(f"{pair}\t{query.text}\t{collection.passages[passage]}\n")


def write_split(directory: Path, split: str, collection: Collection, bm25: Bm25, args: argparse.Namespace) -> None:
    """Write queries, judgements and BM25 run of a split."""
    queries = collection.queries[split]
    with atomic_writer(directory / f"queries.{split}.tsv") as handle:
        handle.writelines(f"{query.qid}\t{query.text}\n" for query in queries)
    with atomic_writer(directory / f"qrels.{split}.txt") as handle:
        handle.writelines(f"{query.qid} 0 {collection.names[query.document]} 1\n" for query in queries)
    with atomic_writer(directory / f"bm25.{split}.txt") as handle:
        for query in queries:
            ranking = Ranking(collection, query, bm25, args.candidates)
            for rank, (document, score) in enumerate(zip(ranking.documents, ranking.document_scores), start=1):
                handle.write(f"{query.qid} Q0 {collection.names[document]} {rank} {score:.6f} bm25\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="directory for the collection; created if missing")
    add("--window", type=int, default=36, help="words of a passage")
    add("--stride", type=int, default=24, help="words between the starts of consecutive passages")
    add("--dev_queries", type=int, default=150, help="maximum number of dev queries")
    add("--test_queries", type=int, default=150, help="maximum number of test queries")
    add("--candidates", type=int, default=10, help="BM25 candidates per query")
    add("--passages_per_document", type=int, default=4, help="passages to re-rank per candidate document")
    add("--train_queries", type=int, default=1600, help="maximum number of training queries with examples")
    add("--pseudo_queries", type=int, default=1600,
        help="sentences from the documents that also become training queries, for their own module")
    add("--hard_negatives", type=int, default=3, help="negative examples per query from BM25's candidates")
    add("--random_negatives", type=int, default=1, help="negative examples per query from the whole collection")
    add("--k1", type=float, default=0.9, help="BM25: term frequency saturation")
    add("--b", type=float, default=0.4, help="BM25: length normalisation, 0 to 1")
    return parser.parse_args()


def write_collection(directory: Path, collection: Collection, bm25: Bm25, args: argparse.Namespace) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with atomic_writer(directory / "docs.tsv") as handle:
        handle.writelines(f"{name}\t\t{name}\t{body}\n" for name, body in zip(collection.names, collection.bodies))
    with atomic_writer(directory / "corpus.txt") as handle:
        handle.writelines(f"{passage}\n" for passage in collection.passages)
    for split in ("train", "dev", "test"):
        write_split(directory, split, collection, bm25, args)
    for split in ("dev", "test"):
        write_pairs(directory / f"{split}.pairs.tsv", collection, collection.queries[split], bm25, args)
    pseudo = sorted(collection.queries[PSEUDO], key=lambda query: digest(query.text))[:args.pseudo_queries]
    queries = collection.queries["train"][:args.train_queries] + pseudo
    write_examples(directory / "train.examples.tsv", collection, queries, bm25, args)


def main() -> None:
    args = parse_args()
    try:
        modules = read_library()
    except ValueError as error:
        raise UserError(str(error)) from error
    splits = choose_queries(modules, {"dev": args.dev_queries, "test": args.test_queries})
    collection = make_collection(modules, splits, args.window, args.stride)
    write_collection(args.output_dir, collection, Bm25(collection.passages, args.k1, args.b), args)
    counts = ", ".join(f"{len(queries)} {split}" for split, queries in collection.queries.items())
    size = f"{len(collection.names)} documents, {len(collection.passages)} passages"
    print(f"{size}; queries: {counts}; in {args.output_dir}")


if __name__ == "__main__":
    run_main(main)
