"""Turn the documentation of installed packages into a small document retrieval collection.

    python -m examples.build_collection --output_dir example_data

A document is the docstring of a class, function or method of numpy, scipy, matplotlib, transformers or huggingface_hub,
as requirements.txt pins them. A query is the first sentence of a docstring, which its document does not contain; the
document is the relevant one. Candidates come from BM25. Nothing is downloaded and none of the packages' code runs.
Files as in MS MARCO, the *.tsv separated by tabs, the *.txt by blanks:

    docs.tsv                        docid, url (empty), title, body        docid is the qualified name
    queries.{train,dev,test}.tsv    qid, text                              qid is the relevant document's docid
    qrels.{train,dev,test}.txt      qid 0 docid 1
    bm25.{train,dev,test}.txt       qid Q0 docid rank score bm25           --candidates documents for each query
    train.examples.tsv              index, query, passage, label           label 1: a passage of the relevant document
    {dev,test}.pairs.tsv            qid#docid_n, query, passage            n-th passage of a candidate document
    corpus.txt                      one passage a line, for general_distill.py

A passage is the title and --window words of the body. {dev,test}.pairs.tsv hold those --passages_per_document passages
of each candidate document that BM25 likes best, so that re-ranking takes seconds. Where BM25 misses the relevant
document, it is not added to the candidates, and a training query gets no examples.

The same bytes are written on every machine. With the default flags, the texts of each package and the whole collection
are compared with their SHA-256 in checksums.json. If they differ, the script names the packages to install.
"""
import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import bm25s
import numpy as np

from examples.docstring_collection import (
    Document,
    Passages,
    Query,
    choose_queries,
    cut,
    cut_out_queries,
    digest,
    make_documents,
    stems,
)
from examples.docstrings import Entry, read_package
from simplified_tinybert.common.files import Problems, atomic_writer, check_input_file, run_main, warn

ROOT = Path(__file__).resolve().parent.parent
CHECKSUMS = ROOT / "examples" / "checksums.json"
PACKAGES = ("numpy", "scipy", "matplotlib", "transformers", "huggingface_hub")
RANKED_BY = ("bm25s", "PyStemmer", "numpy")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and defaults."""


Ranking = list[tuple[int, float, list[int]]]       # (document, score, its passages, the best first), the best first


class Bm25:
    """BM25 over the passages; a document is as good as its best one.

    In float64 and rounded, so that no processor's last digits decide between documents. Of equal ones, those with the
    highest name come first, as in trec_eval.
    """

    def __init__(self, documents: list[Document], passages: Passages, k1: float, b: float):
        self.passages = passages
        self.place = np.argsort(np.argsort([document.name for document in documents]))      # of the names in order
        self.index = bm25s.BM25(k1=k1, b=b, dtype="float64")
        self.index.index([stems(text) for text in passages.texts], show_progress=False)

    def rank(self, query: str, depth: int) -> Ranking:
        known = [stem for stem in stems(query) if stem in self.index.vocab_dict]
        if not known:
            return []
        scores, first = np.round(self.index.get_scores(known), 4), self.passages.first
        best = np.maximum.reduceat(scores, first[:-1])
        documents = [int(document) for document in np.lexsort((-self.place, -best))[:depth] if best[document] > 0]
        return [(document, float(best[document]),
                 [int(first[document] + place)
                  for place in np.argsort(-scores[first[document]:first[document + 1]], kind="stable")])
                for document in documents]


def run_and_pairs(documents: list[Document], bm25: Bm25, ranked: list[tuple[Query, Ranking]],
                  args: argparse.Namespace) -> tuple[str, str]:
    """The BM25 run of a split and its pairs; the number in a pair's id is the passage's place in its document."""
    run, pairs = [], []
    for query, ranking in ranked:
        for rank, (number, score, passages) in enumerate(ranking[:args.candidates], start=1):
            run.append(f"{query.qid} Q0 {documents[number].name} {rank} {score:.4f} bm25\n")
            for passage in sorted(passages[:args.passages_per_document]):
                pair = f"{query.qid}#{documents[number].name}_{passage - bm25.passages.first[number]}"
                pairs.append(f"{pair}\t{query.text}\t{bm25.passages.texts[passage]}\n")
    return "".join(run), "".join(pairs)


def sample_examples(query: Query, ranking: Ranking, texts: list[str],
                    args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """(passage, label): the best passage of the relevant document and those of others among the first.

    A sentence that was cut out of its document is relevant to what the document says besides.
    """
    chance, ranking = random.Random(digest(query.text)), ranking[:args.train_candidates]
    relevant = [passages[0] for number, _, passages in ranking if number == query.document]
    others = [passages[0] for number, _, passages in ranking if number != query.document]
    if relevant:
        yield query.rest or texts[relevant[0]], 1
        for passage in chance.sample(others, min(args.hard_negatives, len(others))):
            yield texts[passage], 0
        for _ in range(args.random_negatives):
            yield texts[chance.randrange(len(texts))], 0


def build(entries: list[Entry], args: argparse.Namespace) -> dict[str, str]:
    """The text of every file of the collection by its name."""
    documents = make_documents(entries)
    queries = choose_queries(documents, {"dev": args.dev_queries, "test": args.test_queries})
    bm25 = Bm25(documents, cut(documents, args.window, args.stride), args.k1, args.b)
    files = {"docs.tsv": "".join(f"{each.name}\t\t{each.title}\t{each.body}\n" for each in documents),
             "corpus.txt": "".join(f"{text}\n" for text in bm25.passages.texts)}
    depth = max(args.candidates, args.train_candidates)
    for split, chosen in queries.items():
        ranked = [(query, bm25.rank(query.text, depth)) for query in chosen]
        if split == "train":
            trained_on = ranked[:args.train_queries]
        files[f"queries.{split}.tsv"] = "".join(f"{query.qid}\t{query.text}\n" for query in chosen)
        files[f"qrels.{split}.txt"] = "".join(f"{query.qid} 0 {query.qid} 1\n" for query in chosen)
        files[f"bm25.{split}.txt"], pairs = run_and_pairs(documents, bm25, ranked, args)
        if split != "train":
            files[f"{split}.pairs.tsv"] = pairs
    trained_on += [(query, bm25.rank(query.text, depth))
                   for query in cut_out_queries(documents, args.pseudo_queries, args.window)]
    examples = [(query.text, *example) for query, ranking in trained_on
                for example in sample_examples(query, ranking, bm25.passages.texts, args)]
    files["train.examples.tsv"] = "".join(
        f"{index}\t{text}\t{passage}\t{label}\n" for index, (text, passage, label) in enumerate(examples))
    return files


def parse_args() -> tuple[argparse.Namespace, bool]:
    """The arguments, and whether all that the collection depends on are the defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="directory for the collection; made if it is missing")
    add("--window", type=int, default=40, help="length of a passage, words")
    add("--stride", type=int, default=28, help="from the start of one passage to the start of the next, words")
    add("--dev_queries", type=int, default=300, help="at most so many dev queries")
    add("--test_queries", type=int, default=400, help="at most so many test queries")
    add("--candidates", type=int, default=10, help="documents that BM25 hands to the re-ranker, per query")
    add("--passages_per_document", type=int, default=1, help="passages re-ranked of each candidate document")
    add("--train_queries", type=int, default=100000, help="at most so many training queries get examples")
    add("--pseudo_queries", type=int, default=0,
        help="so many sentences of the documents become training queries as well, each for the rest of its document")
    add("--train_candidates", type=int, default=30, help="documents of BM25 that training examples are taken from")
    add("--hard_negatives", type=int, default=3, help="negative examples from BM25's candidates, per query")
    add("--random_negatives", type=int, default=1, help="negative examples from anywhere, per query")
    add("--k1", type=float, default=1.2, help="BM25: saturation of the term frequency")
    add("--b", type=float, default=1.0, help="BM25: strength of the length normalization, 0 to 1")
    add("--write_checksums", action="store_true", help="for maintenance: write checksums.json anew, compare nothing")
    args = parser.parse_args()
    defaults = all(getattr(args, name) == parser.get_default(name) for name in vars(args)
                   if name not in ("output_dir", "write_checksums"))
    if args.write_checksums and not defaults:
        parser.error("--write_checksums: checksums belong to the defaults; leave the other flags out")
    return args, defaults


def read_packages(packages: Iterable[str] = PACKAGES) -> dict[str, list[Entry]]:
    """The documented classes, functions and methods of installed packages. Raises UserError if one is missing."""
    problems, found = Problems(), {}
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            problems.add(f"{package}: is not installed; {pinned(package)}")
        else:
            found[package] = list(read_package(package, Path(spec.submodule_search_locations[0])))
    problems.raise_if_any()
    return found


def sha256(texts: list[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def pinned(package: str) -> str:
    """What requirements.txt says of a package, as a way out."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    return f"install {next(line for line in lines if line.startswith(f'{package}=='))}"


def differences(found: dict, expected: dict) -> Iterator[str]:
    """A line for each package whose texts differ from the expected ones, or for those that ranked them."""
    for package, checksum in found["packages"].items():
        if checksum != expected["packages"].get(package):
            yield (f"{package} {importlib.metadata.version(package)}: its documentation has another SHA-256 than "
                   f"expected; {pinned(package)}")
    if found["packages"] == expected["packages"] and found["collection"] != expected["collection"]:
        for package in RANKED_BY:
            yield f"{package} {importlib.metadata.version(package)}: ranks differently than expected; {pinned(package)}"


def main() -> None:
    args, defaults = parse_args()
    problems = Problems()
    if not args.write_checksums:
        check_input_file(CHECKSUMS, problems, "checksums")
    problems.raise_if_any()
    packages = read_packages()
    files = build([entry for entries in packages.values() for entry in entries], args)
    found = {"packages": {name: sha256([f"{entry}" for entry in entries]) for name, entries in packages.items()},
             "collection": sha256([f"{name}\n{text}" for name, text in sorted(files.items())])}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        with atomic_writer(args.output_dir / name) as handle:
            handle.write(text)
    lines = {name: len(text.splitlines()) for name, text in files.items()}
    counts = ", ".join(f"{lines[f'queries.{split}.tsv']:,} {split}" for split in ("train", "dev", "test"))
    print(f"{lines['docs.tsv']:,} documents, {lines['corpus.txt']:,} passages; queries: {counts}; "
          f"{lines['train.examples.tsv']:,} examples; in {args.output_dir}")
    if args.write_checksums:
        with atomic_writer(CHECKSUMS) as handle:
            handle.write(json.dumps(found, indent=2) + "\n")
    elif defaults and (notes := list(differences(found, json.loads(CHECKSUMS.read_text(encoding="utf-8"))))):
        warn("\n".join(["the collection is not the one of examples/README.md, so figures will differ", *notes]))


if __name__ == "__main__":
    run_main(main)
