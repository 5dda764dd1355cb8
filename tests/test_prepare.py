"""prepare_examples.py: windows, random draws, skipped documents, the filter, invalid input, ir_datasets."""
import gzip
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter, namedtuple
from math import ceil
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, run_script, single_logit, tiny_vocabulary
from helpers.training import torchrun
from hypothesis import given
from hypothesis import strategies as st

import prepare_examples
import tokenize_to_features
from simplified_tinybert.common.files import Problems, UserError
from simplified_tinybert.data.collection import by_query, read_rows
from simplified_tinybert.data.documents import Document
from simplified_tinybert.data.features import read_chunks
from simplified_tinybert.data.passages import PassageWindow, split_document, window_starts
from simplified_tinybert.data.sampling import best_passages, draw_passages, draw_queries, round_randomly, shuffled

DATA = ROOT.parent / "shared" / "data"


def numbered(count: int, name: str = "w") -> str:
    return " ".join(f"{name}{number}" for number in range(count))


# --- windows

@pytest.mark.parametrize(("words", "window", "stride", "starts"), [
    (0, 150, 75, [0]), (1, 150, 75, [0]), (150, 150, 75, [0]), (151, 150, 75, [0, 75]), (225, 150, 75, [0, 75]),
    (226, 150, 75, [0, 75, 150]), (300, 150, 75, [0, 75, 150]), (10, 4, 3, [0, 3, 6]), (11, 4, 3, [0, 3, 6, 9]),
    (5, 2, 2, [0, 2, 4]), (4, 2, 2, [0, 2]), (3, 1, 1, [0, 1, 2])])
def test_windows_by_hand(words, window, stride, starts):
    assert list(window_starts(words, window, stride)) == starts


@given(st.integers(1, 400), st.integers(1, 60).flatmap(lambda window: st.tuples(st.just(window),
                                                                                st.integers(1, window))))
def test_windows_cover_every_word_and_none_contains_another(words, sizes):
    window, stride = sizes
    spans = [set(range(start, min(start + window, words))) for start in window_starts(words, window, stride)]
    assert set().union(*spans) == set(range(words)) and len(spans) == 1 + ceil(max(0, words - window) / stride)
    assert not any(a <= b for i, a in enumerate(spans) for j, b in enumerate(spans) if i != j)


def test_passages_by_hand():
    document = Document("The  title\u2028x", " a\tb c\r\nd e ")
    assert split_document(document, PassageWindow(3, 2, False)) == ["a b c", "c d e"]
    assert split_document(document, PassageWindow(3, 2, True)) == ["The title x a b c", "The title x c d e"]
    assert split_document(document, PassageWindow(2, 1, False, first=2)) == ["a b", "b c"]
    assert split_document(Document("t", " \x0b"), PassageWindow(3, 2, True)) == ["t"]
    assert split_document(Document("t", ""), PassageWindow(3, 2, False)) == []
    assert split_document(Document("", " "), PassageWindow(3, 2, True)) == []


@given(st.text(max_size=80), st.text(max_size=20), st.integers(1, 5), st.booleans())
def test_passages_are_single_lines(body, title, window, with_title):
    for passage in split_document(Document(title, body), PassageWindow(window, 1, with_title)):
        assert re.search(r"\S", passage) and len(passage.splitlines()) == 1 and "\t" not in passage


# --- random draws

def test_passages_are_drawn_round_robin_from_documents():
    texts = {"a": ["a0", "a1", "a2"], "b": ["b0"], "c": ["c0", "c1"], "none": []}
    requests = []

    def passages_of(document_id):
        requests.append(document_id)
        return texts[document_id]
    for count in range(8):
        requests.clear()
        drawn = draw_passages(list(texts), count, passages_of, Random(5))
        assert len(drawn) == len(set(drawn)) == min(count, 6)
        assert len(requests) == len(set(requests)) <= (count + 1 if count < 3 else 4)       # one document is empty
        counts = Counter(passage[0] for passage in drawn)
        assert all(counts[name] >= min(len(texts[name]), max(counts.values(), default=0) - 1) for name in "abc")
    firsts = Counter(draw_passages(list(texts), 1, texts.get, Random(seed))[0] for seed in range(600))
    assert 150 < sum(firsts[name] for name in ("a0", "a1", "a2")) < 250 and 150 < firsts["b0"] < 250


def test_draws_depend_on_ids_and_seed_only():
    names = [f"q{number}" for number in range(50)]
    assert draw_queries(names, 10, 42) == draw_queries(names[::-1], 10, 42) != draw_queries(names, 10, 43)
    assert draw_queries(names[:40], 10, 42) >= draw_queries(names, 10, 42) & set(names[:40])
    assert draw_queries(names, 99, 42) == set(names)
    assert shuffled("abcdef", Random(1)) == shuffled("abcdef", Random(1)) and len(set(shuffled("abc", Random(2)))) == 3


@pytest.mark.parametrize("expected", [0.0, 1.0, 3.0, 0.5, 1.25])
def test_random_rounding_is_correct_on_average(expected):
    random = Random(0)
    drawn = [round_randomly(expected, random) for _ in range(4000)]
    assert set(drawn) <= {int(expected), ceil(expected)} and abs(np.mean(drawn) - expected) < 0.04


def test_best_passages_by_hand():
    scores = np.array([0.2, 0.9, 0.9, 0.1])
    assert best_passages(list("abcd"), scores, 1, 0.0) == ["b"]
    assert best_passages(list("abcd"), scores, 3, 0.2) == ["b", "c", "a"]
    assert best_passages(list("abcd"), scores, None, 0.15) == ["b", "c", "a"]
    assert best_passages(list("abcd"), scores, 2, 0.95) == []


# --- the script

class Files:
    """A small collection: documents of 1 to 3 passages (window 4, stride 2) whose words contain their id."""
    docs = {"A": ("ta", numbered(8, "a")), "B": ("tb", numbered(3, "b")), "C": ("tc", numbered(6, "c")),
            "D": ("td", numbered(5, "d")), "E": ("te", ""), "F": ("", ""), "G": ("tg", numbered(4, "g"))}
    queries = {"q1": "first query", "q2": "second  query", "q3": "third", "q5": "fifth", "q6": " "}
    run = [("q1", "A B C D E"), ("q2", "B C X D"), ("q4", "A"), ("q3", "D"), ("q6", "B")]
    qrels = ["q1 0 A 2", "q1 0 B 0", "q1 0 D 1", "q2 0 B 1", "q2 0 F 1", "q2 0 Y 1", "q3 0 D 1", "q5 0 A 1", "q7 0 A 1",
             "q8 0 A 0"]

    def __init__(self, directory: Path):
        self.directory = directory
        self.write("docs.tsv", "".join(f"{key}\thttp://x\t{t}\t{b}\n" for key, (t, b) in self.docs.items()))
        self.write("queries.tsv", "".join(f"{key}\t{text}\n" for key, text in self.queries.items()))
        lines = [f"{query} Q0 {document} {rank} {9 - rank} tag\n" for query, documents in self.run
                 for rank, document in enumerate(documents.split(), 1)]
        self.write("run.txt", "".join(lines))
        self.write("qrels.txt", "".join(f"{line}\n" for line in self.qrels))

    def write(self, name: str, content: str) -> Path:
        (self.directory / name).write_text(content, encoding="utf-8", newline="")
        return self.directory / name

    def flags(self, train: bool = False, **changes: str) -> list:
        names = {"docs": "docs.tsv", "queries": "queries.tsv", "candidates": "run.txt", "output": "out.tsv",
                 "cache_file_dir": "cache"} | ({"qrels": "qrels.txt"} if train else {}) | changes
        return [part for name, file in names.items() for part in (f"--{name}", self.directory / file)]

    def rows(self, name: str = "out.tsv") -> list[list[str]]:
        return [line.split("\t") for line in (self.directory / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def files(tmp_path) -> Files:
    return Files(tmp_path)


SMALL = ("--window", 4, "--stride", 2)


def test_test_pairs_by_hand(files, run_here):
    stderr = run_here(prepare_examples, "test", *files.flags(), *SMALL)
    rows = files.rows()
    assert [row[0] for row in rows] == [
        "q1#A_0", "q1#A_1", "q1#A_2", "q1#B_0", "q1#C_0", "q1#C_1", "q1#D_0", "q1#D_1",
        "q2#B_0", "q2#C_0", "q2#C_1", "q2#D_0", "q2#D_1", "q3#D_0", "q3#D_1"]
    assert rows[1] == ["q1#A_1", "first query", "a2 a3 a4 a5"] and rows[8] == ["q2#B_0", "second query", "b0 b1 b2"]
    assert files.rows("out.tsv.left_out.tsv") == [
        ["empty_document", "q1", "E"], ["missing_document", "q2", "X"], ["query_without_text", "q4", ""],
        ["query_without_text", "q6", ""], ["query_without_candidates", "q5", ""]]
    assert "2 (query_without_text): q4, q6" in stderr and "1 (missing_document): q2 X" in stderr
    record = json.loads((files.directory / "out.tsv.run.json").read_text())
    assert record["counts"]["lines"] == 15 and record["made_from"][0]["bytes"] > 0
    assert record["left_out"]["query_without_text"] == 2 and record["arguments"]["window"] == 4


def test_title_and_depth(files, run_here):
    stderr = run_here(prepare_examples, "test", *files.flags(), *SMALL, "--title", "--depth", 2)
    assert {row[0] for row in files.rows()} == {"q1#A_0", "q1#A_1", "q1#A_2", "q1#B_0", "q2#B_0", "q2#C_0", "q2#C_1",
                                                "q3#D_0", "q3#D_1"}
    assert files.rows()[0][2] == "ta a0 a1 a2 a3" and files.rows()[2][2] == "ta a4 a5 a6 a7"
    assert "empty_document" not in stderr
    run_here(prepare_examples, "test", *files.flags(), *SMALL, "--title")
    assert ["q1#E_0", "first query", "te"] in files.rows()                      # a passage of the title only


def test_candidates_are_ordered_by_score(files, run_here):
    files.write("run.txt", "q1 Q0 B 1 0.5 t\nq1 Q0 G 2 0.7 t\nq1 Q0 C 3 0.5 t\n")
    run_here(prepare_examples, "test", *files.flags(), "--depth", 2)
    assert [row[0] for row in files.rows()] == ["q1#G_0", "q1#C_0"]             # ties by descending id
    files.write("run.txt", "q1\tB\t3\nq1\tG\t1\nq1\tC\t2\n")                    # MS MARCO's three columns
    run_here(prepare_examples, "test", *files.flags())
    assert [row[0] for row in files.rows()] == ["q1#G_0", "q1#C_0", "q1#B_0"]


def test_train_examples_by_hand(files, run_here):
    run_here(prepare_examples, "train", *files.flags(True), *SMALL)
    rows = files.rows()
    assert [row[0] for row in rows] == [str(number) for number in range(10)]
    assert [row[1:] for row in rows[:5]] == [["first query", text, "1"] for text in
                                             ("a0 a1 a2 a3", "a2 a3 a4 a5", "a4 a5 a6 a7", "d0 d1 d2 d3", "d2 d3 d4")]
    assert {row[2] for row in rows[5:8]} == {"b0 b1 b2", "c0 c1 c2 c3", "c2 c3 c4 c5"}
    assert {row[1] for row in rows[5:8]} == {"first query"} and {row[3] for row in rows[5:8]} == {"0"}
    assert rows[8][1:] == ["second query", "b0 b1 b2", "1"]
    assert rows[9][1::2] == ["second query", "0"] and rows[9][2][0] in "cd"


def skipped(files: Files) -> set[tuple[str, ...]]:
    path = files.directory / "out.tsv.left_out.tsv"
    return {tuple(line.split("\t")) for line in path.read_text().splitlines()} if path.exists() else set()


def test_training_logs_what_it_skips(files, run_here):
    stderr = run_here(prepare_examples, "train", *files.flags(True), *SMALL)
    optional = {("missing_document", "q2", "X")}                                # logged only if it is drawn
    assert skipped(files) - optional == {                                       # q8 has no relevant document
        ("empty_document", "q1", "E"), ("empty_document", "q2", "F"), ("missing_document", "q2", "Y"),
        ("query_without_text", "q4", ""), ("query_without_text", "q6", ""), ("query_without_text", "q7", ""),
        ("query_without_candidates", "q5", ""), ("query_without_negative_passage", "q3", "")}
    assert "1 queries have fewer passages of label 0" in stderr
    assert not any(row[1] in ("third", "fifth") for row in files.rows())
    files.write("qrels.txt", "q1 0 E 1\nq2 0 B 1\n")
    run_here(prepare_examples, "train", *files.flags(True), *SMALL)
    assert {("query_without_positive_passage", "q1", ""),
            ("query_without_relevant_document", "q3", "")} <= skipped(files)


def test_the_log_of_an_earlier_run_is_removed(files, run_here):
    run_here(prepare_examples, "test", *files.flags())
    assert skipped(files)
    files.write("run.txt", "q1 Q0 A 1 1 t\n")
    files.write("queries.tsv", "q1\tx\n")
    stderr = run_here(prepare_examples, "test", *files.flags())
    assert not (files.directory / "out.tsv.left_out.tsv").exists() and "skipped" not in stderr


def test_documents_below_the_relevance_level_are_not_used(files, run_here):
    files.write("qrels.txt", "q1 0 A 2\nq1 0 B 1\nq1 0 C -1\n")
    run_here(prepare_examples, "train", *files.flags(True), *SMALL, "--relevance_level", 2, "--negatives", 9)
    labels = {row[2][0]: row[3] for row in files.rows()}
    assert labels == {"a": "1", "c": "0", "d": "0"}


def test_texts_of_relevant_documents_are_not_negatives(files, run_here):
    files.write("docs.tsv", "A\tsame words\nB\tsame words\nC\tother words\n")
    files.write("qrels.txt", "q1 0 A 1\n")
    run_here(prepare_examples, "train", *files.flags(True), "--negatives", 5)
    assert [row[2:] for row in files.rows()] == [["same words", "1"], ["other words", "0"]]


def test_first_passages(files, run_here):
    run_here(prepare_examples, "test", *files.flags(), *SMALL, "--first_passages", 2, "--depth", 2)
    assert [row[0] for row in files.rows()] == ["q1#A_0", "q1#A_1", "q1#B_0", "q2#B_0", "q2#C_0", "q2#C_1", "q3#D_0",
                                                "q3#D_1"]
    run_here(prepare_examples, "train", *files.flags(True), *SMALL, "--first_passages", 1)
    assert {row[2] for row in files.rows() if row[3] == "1"} == {"a0 a1 a2 a3", "d0 d1 d2 d3", "b0 b1 b2"}


def test_retrieved_positives(files, run_here):
    """Texts of relevant documents that were not retrieved are not negatives either."""
    files.write("docs.tsv", "A\ta text\nB\tb text\nC\tc text\nD\tb text\nE\te text\n")
    files.write("run.txt", "q1 Q0 A 1 9 t\nq1 Q0 D 2 8 t\nq1 Q0 C 3 7 t\nq2 Q0 C 1 1 t\nq2 Q0 A 2 0 t\n")
    files.write("qrels.txt", "q1 0 B 1\nq1 0 A 1\nq2 0 E 1\n")
    run_here(prepare_examples, "train", *files.flags(True), "--retrieved_positives", "--negatives", 5)
    assert [row[2:] for row in files.rows()] == [["a text", "1"], ["c text", "0"]]
    assert ("query_without_positive_passage", "q2", "") in skipped(files)
    run_here(prepare_examples, "train", *files.flags(True), "--negatives", 1)
    assert {row[2] for row in files.rows() if row[3] == "1"} == {"a text", "b text", "e text"}


@pytest.fixture
def large(tmp_path) -> Files:
    """60 queries, each with 3 relevant documents among 30 candidates of 1 to 4 passages."""
    files, random = Files(tmp_path), Random(3)
    files.write("docs.tsv", "".join(f"D{n}\t{numbered(random.randint(1, 10), f'd{n}.')}\n" for n in range(200)))
    candidates = {f"q{n}": random.sample(range(200), 30) for n in range(60)}
    files.write("queries.tsv", "".join(f"{q}\ttext of {q}\n" for q in candidates))
    files.write("run.txt", "".join(f"{q} Q0 D{n} 0 {-i} t\n" for q, found in candidates.items()
                                   for i, n in enumerate(found)))
    files.write("qrels.txt", "".join(f"{q} 0 D{n} {grade}\n" for q, found in candidates.items()
                                     for n, grade in zip(found[5:25:5], (1, 1, 0, 1))))
    files.relevant = {f"text of {q}": {found[5], found[10], found[20]} for q, found in candidates.items()}
    files.found = {f"text of {q}": set(found) for q, found in candidates.items()}
    return files


@pytest.mark.parametrize("ratio", [0, 0.5, 1, 2])
def test_negatives_per_positive_and_labels(large, run_here, ratio):
    run_here(prepare_examples, "train", *large.flags(True), *SMALL, "--negatives", ratio)
    labels, rows = Counter(), large.rows()
    for _, query, passage, label in rows:
        document = int(passage[1:].split(".")[0])
        assert (document in large.relevant[query]) == (label == "1") and document in large.found[query]
        labels[label] += 1
    assert len({tuple(row[1:3]) for row in rows}) == len(rows)                  # no duplicates within a query
    assert len({row[1] for row in rows}) == 60
    assert labels["0"] == ratio * labels["1"] if ratio != 0.5 else abs(labels["0"] / labels["1"] - 0.5) < 0.1


def test_positive_passages_per_document(large, run_here):
    run_here(prepare_examples, "train", *large.flags(True), *SMALL, "--positive_passages", 1)
    documents = Counter((row[1], row[2].split(".")[0]) for row in large.rows() if row[3] == "1")
    assert len(documents) == 180 and set(documents.values()) == {1}
    starts = {re.search(r"\.(\d+)", row[2])[1] for row in large.rows() if row[3] == "1"}
    assert starts == {"0", "2", "4", "6"}                                       # not only the first


def test_positive_passages_do_not_depend_on_the_order_of_judgements(large, run_here):
    def outcome():
        run_here(prepare_examples, "train", *large.flags(True), *SMALL, "--positive_passages", 1)
        return sorted(row[1:] for row in large.rows())
    first = outcome()
    lines = (large.directory / "qrels.txt").read_text().splitlines(keepends=True)
    large.write("qrels.txt", "".join(lines[::-1]))
    assert outcome() == first


def test_the_output_depends_on_the_seed_only(large, run_here):
    def outcome(*flags):
        run_here(prepare_examples, "train", *large.flags(True), *SMALL, *flags)
        return (large.directory / "out.tsv").read_bytes()
    first = outcome()
    lines = (large.directory / "queries.tsv").read_text().splitlines(keepends=True)
    large.write("queries.tsv", "".join(lines[::-1]))
    assert outcome("--seed", 42) == first != outcome("--seed", 43)
    subset = outcome("--max_queries", 7)
    assert len({row[1] for row in large.rows()}) == 7
    large.write("queries.tsv", "".join(lines[20:] + lines[:20]))
    assert outcome("--max_queries", 7) == subset
    subset, first = ({row.split(b"\t", 1)[1] for row in content.splitlines()} for content in (subset, first))
    assert subset < first


def test_only_judged_test_queries(large, run_here):
    run_here(prepare_examples, "test", *large.flags())
    everything = (large.directory / "out.tsv").read_text().splitlines()
    judged = [line.partition("#")[0] for line in everything[::40]]
    large.write("some.txt", "".join(f"{query_id} 0 other 0\n" for query_id in judged))
    stderr = run_here(prepare_examples, "test", *large.flags(qrels="some.txt"))
    lines = (large.directory / "out.tsv").read_text().splitlines()
    assert lines == [line for line in everything if line.partition("#")[0] in judged] and len(lines) < len(everything)
    absent = {line.partition("#")[0] for line in everything} - set(judged)
    assert f"skipped {len(absent)} (query_without_judgement)" in stderr
    left_out = (large.directory / "out.tsv.left_out.tsv").read_text()
    assert {line.split("\t")[1] for line in left_out.splitlines() if "judgement" in line} == absent


def test_some_of_the_test_queries(large, run_here):
    """--max_queries keeps all lines of the drawn queries; the draw depends on ids and seed only."""
    def outcome(*flags):
        run_here(prepare_examples, "test", *large.flags(), *flags)
        return (large.directory / "out.tsv").read_bytes().splitlines()
    everything, some = outcome(), outcome("--max_queries", 7)
    drawn = {line.partition(b"#")[0] for line in some}
    assert len(drawn) == 7 and some == [line for line in everything if line.partition(b"#")[0] in drawn]
    assert outcome("--max_queries", 7, "--seed", 43) != some
    assert outcome("--max_queries", 10_000) == everything


# --- the filter

@pytest.fixture
def ranked(tmp_path, golden_models) -> Files:
    """Documents whose words are in the golden models' vocabulary."""
    files, random, words = Files(tmp_path), Random(1), tiny_vocabulary()[5:]
    files.texts = {f"D{n}": [random.choice(words) for _ in range(random.randint(3, 30))] for n in range(40)}
    files.write("docs.tsv", "".join(f"{key}\t{' '.join(text)}\n" for key, text in files.texts.items()))
    files.write("queries.tsv", "".join(f"q{n}\t{' '.join(random.sample(words, 3))}\n" for n in range(10)))
    files.write("run.txt", "".join(f"q{n} Q0 D{d} 0 {-d} t\n" for n in range(10) for d in range(40)))
    files.write("qrels.txt", "".join(f"q{n} 0 D{d} 1\n" for n in range(10) for d in range(n, n + 3)))
    files.model = golden_models["teacher"]
    return files


def scores_by_the_scripts(files: Files) -> dict[str, float]:
    """Score every pair with the pipeline: test pairs, features, reranker.py."""
    commands = [("prepare_examples.py", "test", *files.flags(output="pairs.tsv"), "--window", 8, "--stride", 4),
                ("tokenize_to_features.py", "--set_name", "test", "--raw_data_file", files.directory / "pairs.tsv",
                 "--output_features_file", files.directory / "pairs.pkl", "--bert_model_dir", files.model,
                 "--max_seq_length", 32),
                ("reranker.py", "--model_dir", files.model, "--features_file", files.directory / "pairs.pkl",
                 "--output_scores_file", files.directory / "scores.tsv", "--device", "cpu")]
    for command in commands:
        done = run_script(*command)
        assert done.returncode == 0, done.stderr
    return {f"{q}#{p}": float(score) for q, p, score in files.rows("scores.tsv")}


@pytest.mark.parametrize("group", [8192, 20])
def test_the_filter_keeps_what_the_reranker_scores_highest(ranked, run_here, monkeypatch, group):
    scores = scores_by_the_scripts(ranked)
    texts = {row[0]: row[1:] for row in ranked.rows("pairs.tsv")}
    monkeypatch.setattr(prepare_examples, "GROUP", group)
    flags = [*ranked.flags(True), "--window", 8, "--stride", 4, "--filter_model", ranked.model, "--max_seq_length", 32]
    stderr = run_here(prepare_examples, "train", *flags)
    assert "filter       " in stderr and not skipped(ranked)

    def best(limit, threshold):
        expected = Counter()
        for n in range(10):
            for d in range(n, n + 3):
                keys = [key for key in scores if re.fullmatch(rf"q{n}#D{d}_\d+", key)]
                keys = sorted(keys, key=lambda key: -scores[key])[:limit]
                expected.update(tuple(texts[key]) for key in keys if scores[key] >= threshold)
        return expected
    assert Counter(tuple(row[1:3]) for row in ranked.rows() if row[3] == "1") == best(1, 0)
    values = sorted(scores.values())
    threshold = (values[len(values) // 2] + values[len(values) // 2 + 1]) / 2
    run_here(prepare_examples, "train", *flags, "--filter_threshold", threshold)
    assert Counter(tuple(row[1:3]) for row in ranked.rows() if row[3] == "1") == best(None, threshold)
    run_here(prepare_examples, "train", *flags, "--filter_threshold", threshold, "--positive_passages", 2)
    assert Counter(tuple(row[1:3]) for row in ranked.rows() if row[3] == "1") == best(2, threshold)
    record = json.loads((ranked.directory / "out.tsv.run.json").read_text())
    assert len(record["filter_weights"]) == 64 and record["versions"]["torch"]


def test_several_processes_filter_together(ranked, run_here):
    flags = [*ranked.flags(True), "--window", 8, "--stride", 4, "--filter_model", ranked.model, "--max_seq_length", 32]
    run_here(prepare_examples, "train", *flags)
    output = ranked.directory / "out.tsv"
    before = output.read_bytes()
    output.unlink()
    done = torchrun(2, "prepare_examples.py", "train", *flags)
    assert done.returncode == 0, done.stderr
    assert output.read_bytes() == before and done.stderr.count("60 lines, ") == 1
    done = torchrun(2, "prepare_examples.py", "train", *ranked.flags(True))
    assert done.returncode != 0 and "2 processes: only --filter_model can use several" in done.stderr


def test_filters_with_one_and_two_logits_agree(ranked, run_here):
    single, kept = single_logit(ranked.model, ranked.directory / "single"), []
    for model in (ranked.model, single):
        stderr = run_here(prepare_examples, "train", *ranked.flags(True), "--window", 8, "--stride", 4,
                          "--filter_model", model, "--max_seq_length", 32, "--filter_threshold", 0.05)
        assert ("(0, z)" in stderr) == (model == single)
        kept.append(ranked.rows())
    assert kept[0] == kept[1] and kept[0]


def test_an_unreadable_filter_is_reported_before_any_work(ranked, run_here):
    model = shutil.copytree(ranked.model, ranked.directory / "pointer")
    (model / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match="model.safetensors: is a Git LFS pointer"):
        run_here(prepare_examples, "train", *ranked.flags(True), "--filter_model", model, "--max_seq_length", 32)
    assert not (ranked.directory / "cache").exists() and not (ranked.directory / "out.tsv").exists()


def test_no_output_if_all_documents_are_below_the_threshold(ranked, run_here):
    with pytest.raises(UserError, match="out.tsv: not written"):
        run_here(prepare_examples, "train", *ranked.flags(True), "--filter_model", ranked.model, "--max_seq_length", 32,
                 "--filter_threshold", 1)
    assert not (ranked.directory / "out.tsv").exists() and not (ranked.directory / "out.tsv.left_out.tsv").exists()


def test_an_invalid_filter_is_reported_before_any_work(ranked, run_here):
    for flags, message in [(("--max_seq_length", 256), "--max_seq_length 256: expected 8 to 64"),
                           (("--filter_model", ranked.directory), "holds neither config.json"),
                           (("--filter_threshold", 1.5), "--filter_threshold 1.5: expected 0 to 1"),
                           (("--device", "gpu"), "--device gpu: expected auto")]:
        with pytest.raises(UserError, match=re.escape(message)):
            run_here(prepare_examples, "train", *ranked.flags(True), "--filter_model", ranked.model, *flags)
    assert not (ranked.directory / "cache").exists() and not (ranked.directory / "out.tsv").exists()


def test_torch_is_not_imported_without_a_filter(files):
    code = ("import sys, prepare_examples; prepare_examples.main(); "
            "sys.exit('torch' in sys.modules or 'ir_datasets' in sys.modules)")
    for arguments in (["test", *files.flags()], ["train", *files.flags(True)]):
        done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr


# --- invalid input

@pytest.mark.parametrize(("name", "content", "message"), [
    ("queries.tsv", "q1\tx\nq2 y\n", "queries.tsv:2: found 1 tab-separated columns ('q2 y')"),
    ("queries.tsv", "q1\tx\ty\n", "queries.tsv:1: found 3 tab-separated columns"),
    ("queries.tsv", "q1\tx\nq1\ty\n", "queries.tsv:2: query 'q1' is a duplicate of line 1"),
    ("queries.tsv", "q#1\tx\n", "queries.tsv:1: found query id 'q#1'"),
    ("queries.tsv", "q 1\tx\n", "queries.tsv:1: found query id 'q 1'"),
    ("queries.tsv", "", "queries.tsv: contains no queries"),
    ("run.txt", "q1 Q0 A 1 1\n", "run.txt:1: found 5 columns ('q1 Q0 A 1 1'); expected 6"),
    ("run.txt", "q1 Q0 A 1 x t\n", "run.txt:1: score 'x' is not a finite number"),
    ("run.txt", "q1 A\0 1\n", "run.txt:1: holds a NUL byte"),
    ("run.txt", "q1 A 1\nq1 B\n", "run.txt:2: found 2 columns ('q1 B'); expected 3: query_id document_id rank"),
    ("run.txt", "q1 A first\n", "run.txt:1: rank 'first' is not"),
    ("run.txt", "q1 A 11.5\nq1 B 7.2\n", "run.txt:1: rank '11.5' is not an integer"),        # it is a score
    ("run.txt", "q1 Q0 A 1 1 t\nq1 Q0 A 2 0 t\n", "run.txt:2: document 'A' is a duplicate for query 'q1'"),
    ("run.txt", "q1 Q0 A 1 1 t\nq2 Q0 A 1 1 t\nq1 Q0 B 2 0 t\n", "run.txt:3: query 'q1' also starts in line 1"),
    ("run.txt", "q#1 Q0 A 1 1 t\n", "run.txt:1: found query id 'q#1'"),
    ("run.txt", "q1 Q0 A\u00a0B 1 1 t\n", "run.txt:1: found document id 'A\\xa0B'"),
    ("run.txt", "", "run.txt: contains no candidates"),
    ("qrels.txt", "q1 0 A\n", "qrels.txt:1: found 3 columns"),
    ("docs.tsv", "A\tx\nB\n", "docs.tsv:2: found 1 tab-separated columns ('B\\n')"),
    ("docs.tsv", "A\tu\tt\tb\nB\tx\n", "docs.tsv:2: found 2 tab-separated columns ('B\\tx\\n')"),
    ("docs.tsv", "A\tu\tt\n", "docs.tsv:1: found 3 tab-separated columns"),
    ("docs.tsv", "A B\tx\n", "docs.tsv:1: found document id 'A B'"),
    ("docs.tsv", "\tx\n", "docs.tsv:1: found document id ''"),
    ("docs.tsv", "A\tx\nB\ty\nA\tz\n", "docs.tsv:3: document 'A' is a duplicate of line 1"),
    ("docs.tsv", "", "docs.tsv: is empty"),
])
def test_invalid_input_is_reported_with_its_line(files, run_here, name, content, message):
    files.write(name, content)
    with pytest.raises(UserError, match=re.escape(message)):
        run_here(prepare_examples, "train", *files.flags(True))
    assert not [path for path in files.directory.iterdir() if "out.tsv" in path.name]
    cache = files.directory / "cache"
    assert not cache.exists() or name != "docs.tsv" or not list(cache.iterdir())


def test_errors_of_all_files_are_reported_together(files):
    files.write("docs.tsv", "A\n")
    files.write("queries.tsv", "q1\n")
    files.write("run.txt", "q1\n")
    files.write("qrels.txt", "q1\n")
    done = run_script("prepare_examples.py", "train", *files.flags(True))
    assert done.returncode == 2 and done.stderr.count("error: ") >= 4 and "Traceback" not in done.stderr
    for name in ("docs.tsv:1", "queries.tsv:1", "run.txt:1", "qrels.txt:1"):
        assert name in done.stderr


@pytest.mark.parametrize(("flags", "messages"), [
    (["test"], ["--docs: add", "--queries: add", "--candidates: add"]),
    (["train"], ["--qrels: add this flag, or --dataset"]),
    (["test", "--qrels", "q.txt", "--negatives", 1], ["--negatives: is for train only", "q.txt: cannot read"]),
    (["train", "--window", 0, "--negatives", -1, "--depth", 0, "--relevance_level", 0, "--max_queries", 0],
     ["--window 0: expected 1 word", "--negatives -1.0: expected", "--depth 0", "--relevance_level 0", "--max_qu"]),
    (["test", "--stride", 151], ["--stride 151: expected 1 to --window"]),
    (["train", "--bf16", "--max_seq_length", 32], ["--bf16: needs --filter_model", "--max_seq_length: needs --fil"]),
    (["test", "--docs", "none.tsv"], ["none.tsv: cannot read the documents: No such file"]),
])
def test_invalid_flags(tmp_path, flags, messages):
    done = run_script("prepare_examples.py", *flags, "--output", tmp_path / "out.tsv")
    assert done.returncode == 2 and all(message in done.stderr for message in messages), done.stderr
    assert not list(tmp_path.iterdir())


def test_an_output_must_not_be_an_input(files, run_here):
    with pytest.raises(UserError, match="run.txt: is also an input"):
        run_here(prepare_examples, "test", *files.flags(output="run.txt"))
    (files.directory / "run.txt").rename(files.directory / "out.tsv.left_out.tsv")
    (files.directory / "out.tsv.run.json").mkdir()
    flags = [str(flag).replace("run.txt", "out.tsv.left_out.tsv") for flag in files.flags()]
    with pytest.raises(UserError, match="left_out.tsv: is also an input"):
        run_here(prepare_examples, "test", *flags)
    (files.directory / "out.tsv.left_out.tsv").rename(files.directory / "run.txt")
    with pytest.raises(UserError, match="out.tsv.run.json: is a directory"):
        run_here(prepare_examples, "test", *files.flags())


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8)), unique=True, min_size=1), st.integers(1, 4))
def test_grouping_by_query_keeps_all_rows(pairs, depth):
    pairs.sort(key=lambda pair: pair[0])                                        # contiguous queries
    problems = Problems()
    rows = [(line, f"q{q}", f"D{d}", float(d % 3), "") for line, (q, d) in enumerate(pairs, 1)]
    found = dict(by_query(rows, "run", None, problems))
    assert {(int(q[1:]), int(d[1:])) for q, documents in found.items() for d in documents} == set(pairs)
    assert dict(by_query(rows, "run", depth, problems)) == {q: found[q][:depth] for q in found}
    assert not problems.count
    for documents in found.values():
        keys = [(int(d[1:]) % 3, d) for d in documents]
        assert keys == sorted(keys, reverse=True)


def test_compressed_runs_of_three_columns(tmp_path):
    problems = Problems()
    with gzip.open(tmp_path / "run.gz", "wt") as handle:
        handle.write("q D1 2\nq D2 1\n")
    assert list(read_rows(tmp_path / "run.gz", problems)) == [(1, "q", "D1", -2.0, ""), (2, "q", "D2", -1.0, "")]
    assert not problems.count


# --- the next script

def test_the_output_is_valid_input_of_tokenize_to_features(files, run_here, golden_models):
    for set_name, train in (("train", True), ("test", False)):
        run_here(prepare_examples, set_name, *files.flags(train, output=f"{set_name}.tsv"), *SMALL, "--title")
        run_here(tokenize_to_features, "--set_name", set_name, "--raw_data_file", files.directory / f"{set_name}.tsv",
                 "--output_features_file", files.directory / f"{set_name}.pkl", "--bert_model_dir",
                 golden_models["teacher"], "--max_seq_length", 32)
        chunk, = read_chunks(files.directory / f"{set_name}.pkl")
        rows = files.rows(f"{set_name}.tsv")
        assert chunk.ids == [row[0] for row in rows]
        assert chunk.labels.tolist() == [int(row[3]) if train else -1 for row in rows]


def test_plain_compressed_and_windows_files_give_the_same_pairs(files, run_here):
    run_here(prepare_examples, "test", *files.flags(), *SMALL)
    plain = (files.directory / "out.tsv").read_bytes()
    for name in ("docs.tsv", "queries.tsv", "run.txt"):
        (files.directory / f"{name}.gz").write_bytes(gzip.compress((files.directory / name).read_bytes()))
    stderr = run_here(prepare_examples, "test", *files.flags(docs="docs.tsv.gz", queries="queries.tsv.gz",
                                                           candidates="run.txt.gz"), *SMALL)
    assert (files.directory / "out.tsv").read_bytes() == plain and "unpacking it once" in stderr
    files.write("docs.tsv", "\ufeff" + (files.directory / "docs.tsv").read_text().replace("\n", "\r\n"))
    run_here(prepare_examples, "test", *files.flags(), *SMALL)
    assert (files.directory / "out.tsv").read_bytes() == plain


# --- ir_datasets

@pytest.fixture
def dataset(files, monkeypatch):
    """The same collection registered as an ir_datasets dataset, with a temporary home directory."""
    monkeypatch.setenv("IR_DATASETS_HOME", str(files.directory / "home"))
    ir_datasets = pytest.importorskip("ir_datasets")
    from ir_datasets.datasets.base import Dataset
    from ir_datasets.datasets.msmarco_document import MsMarcoDocument
    from ir_datasets.formats import TrecQrels, TrecScoredDocs, TsvDocs, TsvQueries
    local = ir_datasets.util.LocalDownload
    parts = {"docs": TsvDocs(local(files.directory / "docs.tsv"), doc_cls=MsMarcoDocument),
             "queries": TsvQueries(local(files.directory / "queries.tsv")),
             "scoreddocs": TrecScoredDocs(local(files.directory / "run.txt")),
             "qrels": TrecQrels(local(files.directory / "qrels.txt"), {})}
    registered = ir_datasets.registry._registered
    before = dict(registered)
    ir_datasets.registry.register("test-collection", Dataset(*parts.values()))
    ir_datasets.registry.register("test-collection/bare", Dataset(parts["docs"], parts["queries"]))
    yield files
    registered.clear()
    registered.update(before)


@pytest.mark.parametrize("set_name", ["test", "train"])
def test_a_dataset_gives_the_same_output_as_its_files(dataset, run_here, set_name):
    train = set_name == "train"
    run_here(prepare_examples, set_name, *dataset.flags(train), *SMALL, "--title")
    expected, log = (dataset.directory / "out.tsv").read_bytes(), skipped(dataset)
    for flags in ([], ["--candidates", dataset.directory / "run.txt"]):
        run_here(prepare_examples, set_name, "--dataset", "test-collection", "--output", dataset.directory / "out.tsv",
                 *SMALL, "--title", *flags)
        assert (dataset.directory / "out.tsv").read_bytes() == expected and skipped(dataset) == log


def test_missing_parts_of_a_dataset_are_reported_with_the_flag(dataset, run_here):
    output = ["--output", dataset.directory / "o.tsv"]
    with pytest.raises(UserError, match="(?s)has no scoreddocs; .* --candidates.*has no qrels; .* --qrels"):
        run_here(prepare_examples, "train", "--dataset", "test-collection/bare", *output)
    with pytest.raises(UserError, match="--dataset test-colection: .*did you mean test-collection"):
        run_here(prepare_examples, "test", "--dataset", "test-colection", *output)
    with pytest.raises(UserError, match="did you mean .*msmarco-document/trec-dl-2019"):
        run_here(prepare_examples, "test", "--dataset", "msmarco-documents/trec-dl-2019", *output)


def test_an_unreadable_dataset_is_reported(dataset, run_here):
    dataset.write("run.txt", "q1 Q0 A 1 x t\n")
    with pytest.raises(UserError, match="--dataset test-collection: .*could not convert"):
        run_here(prepare_examples, "test", "--dataset", "test-collection", "--output", dataset.directory / "o.tsv")
    dataset.write("run.txt", "q1 Q0 A 1 1 t\nq2 Q0 A 1 1 t\nq1 Q0 B 1 1 t\n")
    with pytest.raises(UserError, match="ir_datasets export test-collection scoreddocs"):
        run_here(prepare_examples, "test", "--dataset", "test-collection", "--output", dataset.directory / "o.tsv")


@pytest.fixture
def error_of_rows(dataset, run_here):
    """Return the error of a dataset with these rows as queries, qrels or scoreddocs."""
    import ir_datasets
    from ir_datasets.datasets.base import Dataset

    def error_of(part, *rows):
        given = SimpleNamespace(**{f"{part}_iter": lambda: iter(rows)})         # takes precedence
        ir_datasets.registry._registered["test-rows"] = Dataset(given, ir_datasets.load("test-collection"))
        with pytest.raises(UserError) as raised:
            run_here(prepare_examples, "train", "--dataset", "test-rows", "--output", dataset.directory / "o.tsv")
        assert not (dataset.directory / "o.tsv").exists()
        return str(raised.value)
    return error_of


def test_queries_without_a_text_are_reported_with_their_fields(error_of_rows):
    """For example wapo/v2/trec-news-2018."""
    stderr = error_of_rows("queries", namedtuple("Query", "query_id doc_id url")("q1", "A", "http://"))
    assert "--dataset test-rows: " in stderr and "query_id, doc_id, url" in stderr


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf, None, "high", "1_0"])
def test_invalid_scores_of_a_dataset_are_reported(error_of_rows, score):
    row = namedtuple("Row", "query_id doc_id score")
    stderr = error_of_rows("scoreddocs", row("q1", "A", 2.5), row("q1", "B", score))
    assert stderr.startswith("--dataset test-rows, candidate:2: the score of document 'B' for query 'q1'")


def test_judgements_and_ids_of_a_dataset_are_checked_like_files(error_of_rows):
    row = namedtuple("Row", "query_id doc_id relevance")
    assert "document 'A': grade 'L'" in error_of_rows("qrels", row("q1", "A", "L"))
    assert "query 'q1', document 'A': grade '20000'" in error_of_rows("qrels", row("q1", "A", 20000))
    other = namedtuple("Other", "query_id doc_id method")("q1", "A", 1)
    assert "have no relevance, only query_id, doc_id, method" in error_of_rows("qrels", other)
    scored = namedtuple("Scored", "query_id doc_id score")("q1", "A b", 1.0)
    assert "found document id 'A b'" in error_of_rows("scoreddocs", scored)


def test_documents_without_a_text_are_reported_with_their_fields():
    from simplified_tinybert.data.ir_dataset import to_document
    with pytest.raises(UserError, match="document 'D1' has no text, only doc_id, image"):
        to_document(namedtuple("Picture", "doc_id image")("D1", b"png"))


def test_ranks_that_contradict_scores_give_one_warning(files, run_here):
    files.write("run.txt", "".join(f"q1 Q0 {document} {place} 1.0 t\n" for place, document in enumerate("ABC", 1)))
    stderr = run_here(prepare_examples, "test", *files.flags(False), "--depth", 1, *SMALL)
    assert stderr.count("1 of 1 queries") == 1 and "run.txt:3: query 'q1'" in stderr


def test_documents_of_several_types():
    pytest.importorskip("ir_datasets")
    from ir_datasets.datasets.clinicaltrials import ClinicalTrialsDoc
    from ir_datasets.datasets.cord19 import Cord19Doc
    from ir_datasets.datasets.msmarco_document import MsMarcoDocument
    from ir_datasets.formats import GenericDoc, TitleUrlTextDoc

    from simplified_tinybert.data.ir_dataset import to_document
    assert to_document(MsMarcoDocument("D1", "u", "a  title", "a\nbody")) == ("a title", "a body")
    assert to_document(GenericDoc("D1", "text\ud800")) == ("", "text?")
    assert to_document(TitleUrlTextDoc("D1", "t", "u", "x")) == ("t", "x")
    assert to_document(Cord19Doc("D1", "t", "doi", "date", "abstract")) == ("", "t abstract")
    assert to_document(ClinicalTrialsDoc("D1", "t", "c", "s", "d", "e")) == ("", "t c s d e")


# --- real collections

def shared(name: str) -> Path:
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is not part of the repository")
    return DATA / name


def flags_of(directory: Path, split: str, output: Path) -> list:
    return ["--docs", directory / "docs.tsv", "--queries", directory / f"queries.{split}.tsv", "--candidates",
            directory / f"bm25.{split}.txt", "--output", output, "--cache_file_dir", output.parent / "cache"]


def test_cranfield_with_an_empty_document(tmp_path, run_here):
    directory, output = shared("cranfield"), tmp_path / "out.tsv"
    stderr = run_here(prepare_examples, "train", *flags_of(directory, "dev", output),
                      "--qrels", directory / "qrels.dev.txt")
    assert (tmp_path / "out.tsv.left_out.tsv").read_text() == "empty_document\t125\t995\n"
    assert "1 (empty_document): 125 995" in stderr
    run_here(prepare_examples, "test", *flags_of(directory, "test", output), "--title")
    documents = dict((line.split("\t")[0], line.rstrip("\n").split("\t")[2:]) for line in open(directory / "docs.tsv"))
    expected = [(query, document, n) for query, _, document, *_ in map(str.split, open(directory / "bm25.test.txt"))
                for n in range(1 + max(0, ceil((len(documents[document][1].split()) - 150) / 75)))]
    found = [re.fullmatch(r"(\d+)#(\d+)_(\d+)", line.split("\t")[0]).groups() for line in open(output)]
    assert sorted((q, d, int(n)) for q, d, n in found) == sorted(expected) and len(found) == 9928


def test_nfcorpus_with_queries_without_candidates(tmp_path, run_here):
    directory, output = shared("nfcorpus"), tmp_path / "out.tsv"
    run_here(prepare_examples, "test", *flags_of(directory, "test", output))
    kinds = Counter(line.split("\t")[0] for line in open(tmp_path / "out.tsv.left_out.tsv"))
    assert kinds == {"query_without_candidates": 15} and os.path.getsize(output) > 10 ** 7


def test_trec_dl_files_are_readable(tmp_path, run_here):
    directory = shared("trec-dl-2019-doc")
    files = Files(tmp_path)
    files.write("run.txt", "156493 Q0 A 1 1 t\n")
    flags = [part for part in files.flags(True) if part not in (tmp_path / "queries.tsv", tmp_path / "qrels.txt")]
    flags[flags.index("--queries") + 1:flags.index("--queries") + 1] = [directory / "queries.test.tsv"]
    flags.append(directory / "qrels.test.txt")
    with pytest.raises(UserError, match="out.tsv: not written"):               # without its documents
        run_here(prepare_examples, "train", *flags)
