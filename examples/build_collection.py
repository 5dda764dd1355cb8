"""Turn the documentation of installed packages into a small document retrieval collection.

    python -m examples.build_collection --output_dir example_data

A document is the docstring of a class, function or method of numpy, scipy, matplotlib, transformers or huggingface_hub,
as requirements.txt pins them. A query is the first sentence of a docstring. It is removed from its document, which is
the relevant one. Candidates come from BM25. Nothing is downloaded. Docstrings are read from the source
files, without importing them. The files have MS MARCO's formats: *.tsv are separated by tabs, judgements and runs by
blanks.

    docs.tsv                        docid, url (empty), title, body        docid: module of the file, name in it
    queries.{train,dev,test}.tsv    qid, text                              qid is the relevant document's docid
    qrels.{train,dev,test}.txt      qid 0 docid 1
    bm25.{train,dev,test}.txt       qid Q0 docid rank score bm25           10 documents for each query
    train.examples.tsv              index, query, passage, label           label 1: a passage of the relevant document
    {dev,test}.pairs.tsv            qid#docid_n, query, passage            n-th passage of a candidate document
    corpus.txt                      one passage per line, for general_distill.py

A passage is the title and 40 words of the body. {dev,test}.pairs.tsv hold the passage of each candidate document that
BM25 likes best, so that re-ranking takes seconds. Where BM25 misses the relevant document, it is not added to the
candidates, and a training query gets no examples.

The same bytes are written on every machine. Without --pseudo_queries, the texts of each package and the whole
collection are compared with their SHA-256 in checksums.json. If they differ, the script names the packages to install.
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
WINDOW, STRIDE = 40, 28                     # words: length of a passage, from the start of one to the next
HELD_OUT = {"dev": 300, "test": 400}        # queries at most
CANDIDATES, TRAIN_CANDIDATES = 10, 30       # BM25's first documents, for re-ranking and for training examples
HARD_NEGATIVES, RANDOM_NEGATIVES = 3, 1     # per training query: from BM25's candidates, from anywhere
K1, B = 1.2, 1.0                            # BM25: saturation of the term frequency, normalization of the length
PACKAGES = ("numpy", "scipy", "matplotlib", "transformers", "huggingface_hub")
RANKED_BY = ("bm25s", "PyStemmer", "numpy")

Ranking = list[tuple[int, float, int]]      # (document, score, its best passage), the best document first


class Bm25:
    """BM25 over passages. A document has the score of its best passage.

    Scores are rounded, so that rounding errors do not decide. Ties are broken by name, the highest first, as in
    trec_eval.
    """

    def __init__(self, documents: list[Document], passages: Passages):
        self.passages = passages
        self.name_rank = np.argsort(np.argsort([document.name for document in documents]))      # in alphabetical order
        self.index = bm25s.BM25(k1=K1, b=B, dtype="float64")
        self.index.index([stems(text) for text in passages.texts], show_progress=False)

    def rank(self, query: str, depth: int) -> Ranking:
        known = [stem for stem in stems(query) if stem in self.index.vocab_dict]
        if not known:
            return []
        scores, first = np.round(self.index.get_scores(known), 4), self.passages.first
        best = np.maximum.reduceat(scores, first[:-1])
        documents = [int(document) for document in np.lexsort((-self.name_rank, -best))[:depth] if best[document] > 0]
        return [(document, float(best[document]),
                 int(first[document] + scores[first[document]:first[document + 1]].argmax())) for document in documents]


def run_and_pairs(documents: list[Document], bm25: Bm25, ranked: list[tuple[Query, Ranking]]) -> tuple[str, str]:
    """The BM25 run of a split and its pairs; the number in a pair's id is the passage's place in its document."""
    run, pairs = [], []
    for query, ranking in ranked:
        for rank, (number, score, passage) in enumerate(ranking[:CANDIDATES], start=1):
            run.append(f"{query.qid} Q0 {documents[number].name} {rank} {score:.4f} bm25\n")
            pair = f"{query.qid}#{documents[number].name}_{passage - bm25.passages.first[number]}"
            pairs.append(f"{pair}\t{query.text}\t{bm25.passages.texts[passage]}\n")
    return "".join(run), "".join(pairs)


def sample_examples(query: Query, ranking: Ranking, passages: Passages) -> Iterator[tuple[str, int]]:
    """(passage, label): the relevant document's best passage, the best ones of other documents, and random ones.

    A sentence cut out as a query has the rest of its document as the relevant passage.
    """
    chance = random.Random(digest(query.text))
    relevant = [passage for number, _, passage in ranking if number == query.document]
    others = [passage for number, _, passage in ranking if number != query.document]
    if relevant:
        yield query.rest or passages.texts[relevant[0]], 1
        for passage in chance.sample(others, min(HARD_NEGATIVES, len(others))):
            yield passages.texts[passage], 0
        for _ in range(RANDOM_NEGATIVES):
            own = range(passages.first[query.document], passages.first[query.document + 1])
            while (passage := chance.randrange(len(passages.texts))) in own:
                pass
            yield passages.texts[passage], 0


def build(entries: list[Entry], pseudo_queries: int) -> dict[str, str]:
    """The text of every file of the collection by its name."""
    documents = make_documents(entries)
    bm25 = Bm25(documents, cut(documents, WINDOW, STRIDE))
    files = {"docs.tsv": "".join(f"{each.name}\t\t{each.title}\t{each.body}\n" for each in documents),
             "corpus.txt": "".join(f"{text}\n" for text in bm25.passages.texts)}
    for split, queries in choose_queries(documents, HELD_OUT).items():
        ranked = [(query, bm25.rank(query.text, TRAIN_CANDIDATES)) for query in queries]
        files[f"queries.{split}.tsv"] = "".join(f"{query.qid}\t{query.text}\n" for query in queries)
        files[f"qrels.{split}.txt"] = "".join(f"{query.qid} 0 {query.qid} 1\n" for query in queries)
        files[f"bm25.{split}.txt"], pairs = run_and_pairs(documents, bm25, ranked)
        if split == "train":
            trained_on = ranked
        else:
            files[f"{split}.pairs.tsv"] = pairs
    trained_on += [(query, bm25.rank(query.text, TRAIN_CANDIDATES))
                   for query in cut_out_queries(documents, pseudo_queries, WINDOW)]
    examples = [(query.text, *example) for query, ranking in trained_on
                for example in sample_examples(query, ranking, bm25.passages)]
    files["train.examples.tsv"] = "".join(
        f"{index}\t{text}\t{passage}\t{label}\n" for index, (text, passage, label) in enumerate(examples))
    return files


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="directory for the collection; made if it is missing")
    add("--pseudo_queries", type=int, default=0,
        help="number of sentences that become training queries as well, each for the rest of its document")
    add("--write_checksums", action="store_true", help="for maintenance: write checksums.json anew, compare nothing")
    args = parser.parse_args()
    if args.pseudo_queries < 0:
        parser.error(f"--pseudo_queries {args.pseudo_queries}: expected 0 or more")
    if args.write_checksums and args.pseudo_queries:
        parser.error("--write_checksums: checksums belong to the collection without --pseudo_queries; leave it out")
    return args


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
    """Yield a line for each package whose texts differ. If none does but files differ, for each that ranks."""
    for package, checksum in found["packages"].items():
        if checksum != expected["packages"].get(package):
            yield (f"{package} {importlib.metadata.version(package)}: its documentation has another SHA-256 than "
                   f"expected; {pinned(package)}")
    if found["packages"] == expected["packages"] and found["collection"] != expected["collection"]:
        for package in RANKED_BY:
            yield f"{package} {importlib.metadata.version(package)}: ranks differently than expected; {pinned(package)}"


def main() -> None:
    args = parse_args()
    problems = Problems()
    if not args.write_checksums:
        check_input_file(CHECKSUMS, problems, "checksums")
    problems.raise_if_any()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    packages = read_packages()
    files = build([entry for entries in packages.values() for entry in entries], args.pseudo_queries)
    found = {"packages": {name: sha256([f"{entry}" for entry in entries]) for name, entries in packages.items()},
             "collection": sha256([f"{name}\n{text}" for name, text in sorted(files.items())])}
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
    elif not args.pseudo_queries:
        notes = list(differences(found, json.loads(CHECKSUMS.read_text(encoding="utf-8"))))
        if notes:
            warn("\n".join(["the collection is not the one of examples/README.md, so figures will differ", *notes]))


if __name__ == "__main__":
    run_main(main)
