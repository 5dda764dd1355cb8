"""A small collection for collection.sh."""
import gzip

import numpy as np
from conftest import words


def write_collection(directory):
    """Documents of 25 words, a query of three of its words for each; candidates are the document and nine others."""
    random = np.random.default_rng(7)
    directory.mkdir()
    texts = [random.integers(5, 200, 25).tolist() for _ in range(30)]
    with gzip.open(directory / "docs.tsv.gz", "wt") as handle:
        handle.writelines(f"D{number}\thttp://d/{number}\t{words(text[:2])}\t{words(text)}\n"
                          for number, text in enumerate(texts))
    for part, split in enumerate(("train", "dev", "test")):
        queries = range(part * 10, part * 10 + 10)
        (directory / f"queries.{split}.tsv").write_text(
            "".join(f"q{number}\t{words(random.choice(texts[number], 3).tolist())}\n" for number in queries))
        (directory / f"qrels.{split}.txt").write_text("".join(f"q{number} 0 D{number} 1\n" for number in queries))
        ranked = {number: [number, *random.choice([other for other in range(30) if other != number], 9, False)]
                  for number in queries}
        (directory / f"bm25.{split}.txt").write_text(
            "".join(f"q{number} Q0 D{document} {place} {20 - place} bm25\n" for number in queries
                    for place, document in enumerate(random.permutation(ranked[number]), start=1)))
