"""Soft labels from score files, so that any ranker can teach: larger models, ensembles, language models.

A score file has a line for each training example, in any order, plain or gzip: example_id <tab> score. reranker.py
writes such a file for features made with --set_name train.
"""
from array import array
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from simplified_tinybert.common.files import Problems, shorten, warn
from simplified_tinybert.common.text import read_lines
from simplified_tinybert.data.features import FeatureSummary, ids_of, read_chunks
from simplified_tinybert.ranking.trec import first_ten, parse_score

SCORE_TYPES = ("log_odds", "probability")
LINES = 65536                   # read at once
LARGEST = 1e38                  # float32 ends soon after it
NUMBERING = ("number the lines of all files from 0 on, and tokenize them again: "
             "awk -F '\\t' -v OFS='\\t' '{$1 = NR - 1} 1' first.tsv second.tsv > both.tsv")


@dataclass(frozen=True)
class ExampleIds:
    """Finds the number of an example by its id, with 16 bytes for each example: sorted hashes and their numbers."""
    hashes: np.ndarray                                  # (N), sorted
    numbers: np.ndarray                                 # (N)

    def find(self, ids: list[str]) -> np.ndarray:
        """Return the number of each example, -1 for unknown ids."""
        hashes = np.fromiter(map(hash, ids), np.int64, len(ids))
        places = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        return np.where(self.hashes[places] == hashes, self.numbers[places], -1)


def read_teacher_scores(files: list[Path], score_type: str, features: FeatureSummary,
                        problems: Problems) -> np.ndarray | None:
    """Return the log-odds (N) of the examples in float32, the mean over the files. Errors are added to `problems`.

    Reads line by line. Needs about 40 bytes for each example.
    """
    before, ids = problems.count, number_examples(features, problems)
    if ids is None:
        return None
    if len(set(files)) < len(files):
        problems.add("--teacher_scores_file: names a file twice; name each once")
    total = np.zeros(features.examples)
    for path in files:
        total += read_score_file(path, score_type, ids, features.paths, problems)
    return (total / len(files)).astype(np.float32) if problems.count == before else None


def number_examples(features: FeatureSummary, problems: Problems) -> ExampleIds | None:
    """Number the examples. Ids that occur twice are added to `problems`."""
    hashes = array("q")
    for path in features.paths:
        for chunk in read_chunks(path):
            hashes.extend(map(hash, chunk.ids))
    values = np.frombuffer(hashes, np.int64)
    numbers = np.argsort(values, kind="stable")
    ids = ExampleIds(values[numbers], numbers)
    repeated = np.flatnonzero(ids.hashes[1:] == ids.hashes[:-1])
    if len(repeated):
        names = ids_of(features.paths, np.sort(numbers[repeated + 1])[:11])
        problems.add(f"{len(repeated)} ids occur more than once in the feature files ({first_ten(names)}), so scores "
                     f"cannot be matched to examples; {NUMBERING}")
        return None
    return ids


def read_score_file(path: Path, score_type: str, ids: ExampleIds, feature_files: list[Path],
                    problems: Problems) -> np.ndarray:
    """Return the log-odds (N) of a file. Missing, repeated and unknown ids and bad scores are added to `problems`."""
    scores, before = np.full(len(ids.numbers), np.nan), problems.count
    lines = read_lines(path, problems)
    while block := list(islice(lines, LINES)):
        rows = [(number, *line.split("\t")) for number, line in block]
        for row in [row for row in rows if len(row) != 3]:
            problems.add(f"{path}:{row[0]}: found {len(row) - 1} columns, expected 2: example_id TAB score")
        rows = [row for row in rows if len(row) == 3]
        numbers = ids.find([example_id for _, example_id, _ in rows])
        for (line, example_id, text), number in zip(rows, numbers.tolist(), strict=True):
            where = f"{path}:{line}: example {shorten(example_id)}"
            score = parse_score(text)
            if number < 0:
                problems.add(f"{where}: is not in the feature files; use the scores of the same examples")
            elif not np.isnan(scores[number]):
                problems.add(f"{where}: has a second score; remove one of the lines")
            elif not abs(score) < LARGEST:
                problems.add(f"{where}: score {shorten(text)}: expected a finite number, for example 2.5")
            elif score_type == "probability" and not 0 < score < 1:
                problems.add(f"{where}: score {shorten(text)}: expected a probability above 0 and below 1, whose log-"
                             f"odds are finite; for log-odds, leave out --teacher_scores probability")
            else:
                scores[number] = score
    missing = np.flatnonzero(np.isnan(scores))
    if len(missing) and problems.count == before:
        problems.add(f"{path}: has no score for {len(missing):,} of {len(scores):,} examples: "
                     f"{first_ten(ids_of(feature_files, missing[:11]))}; each example needs one")
    if score_type == "probability":
        return np.log(scores) - np.log1p(-scores)
    if problems.count == before and scores.min() >= 0 and scores.max() <= 1:
        warn(f"{path}: all scores lie between 0 and 1; if they are probabilities, add --teacher_scores probability")
    return scores
