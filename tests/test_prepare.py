"""From raw collections to examples and pairs: windows, draws, left-outs, the filter, bad input, ir_datasets."""
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
from hypothesis import given
from hypothesis import strategies as st

import prepare_examples
import tokenize_to_features
from simplified_tinybert.common.files import Problems, UserError
from simplified_tinybert.data import sampling
from simplified_tinybert.data.collection import by_query, read_rows
from simplified_tinybert.data.documents import Document
from simplified_tinybert.data.features import read_chunks
from simplified_tinybert.data.passages import PassageWindow, cut, window_starts
from simplified_tinybert.data.sampling import best_passages, draw_passages, draw_queries, shuffled, whole_number

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
def test_windows_cover_every_word_and_none_lies_in_another(words, sizes):
    window, stride = sizes
    spans = [set(range(start, min(start + window, words))) for start in window_starts(words, window, stride)]
    assert set().union(*spans) == set(range(words)) and len(spans) == 1 + ceil(max(0, words - window) / stride)
    assert not any(a <= b for i, a in enumerate(spans) for j, b in enumerate(spans) if i != j)


def test_passages_by_hand():
    document = Document("The  title\u2028x", " a\tb c\r\nd e ")
    assert cut(document, PassageWindow(3, 2, False)) == ["a b c", "c d e"]
    assert cut(document, PassageWindow(3, 2, True)) == ["The title x a b c", "The title x c d e"]
    assert cut(document, PassageWindow(2, 1, False, first=2)) == ["a b", "b c"]
    assert cut(Document("t", " \x0b"), PassageWindow(3, 2, True)) == ["t"]
    assert cut(Document("t", ""), PassageWindow(3, 2, False)) == cut(Document("", " "), PassageWindow(3, 2, True)) == []


@given(st.text(max_size=80), st.text(max_size=20), st.integers(1, 5), st.booleans())
def test_passages_are_texts_of_one_line(body, title, window, with_title):
    for passage in cut(Document(title, body), PassageWindow(window, 1, with_title)):
        assert re.search(r"\S", passage) and len(passage.splitlines()) == 1 and "\t" not in passage


# --- draws

def test_drawing_passages_goes_round_the_documents():
    texts = {"a": ["a0", "a1", "a2"], "b": ["b0"], "c": ["c0", "c1"], "none": []}
    asked = []

    def passages_of(document_id):
        asked.append(document_id)
        return texts[document_id]
    for count in range(8):
        asked.clear()
        drawn = draw_passages(list(texts), count, passages_of, Random(5))
        assert len(drawn) == len(set(drawn)) == min(count, 6)
        assert len(asked) == len(set(asked)) <= (count + 1 if count < 3 else 4)     # no more than needed; one is empty
        times = Counter(passage[0] for passage in drawn)
        assert all(times[name] >= min(len(texts[name]), max(times.values(), default=0) - 1) for name in "abc")
    firsts = Counter(draw_passages(list(texts), 1, texts.get, Random(seed))[0] for seed in range(600))
    assert 150 < sum(firsts[name] for name in ("a0", "a1", "a2")) < 250 and 150 < firsts["b0"] < 250


def test_draws_depend_on_ids_and_seed_alone():
    names = [f"q{number}" for number in range(50)]
    assert draw_queries(names, 10, 42) == draw_queries(names[::-1], 10, 42) != draw_queries(names, 10, 43)
    assert draw_queries(names[:40], 10, 42) >= draw_queries(names, 10, 42) & set(names[:40])
    assert draw_queries(names, 99, 42) == set(names)
    assert shuffled("abcdef", Random(1)) == shuffled("abcdef", Random(1)) and len(set(shuffled("abc", Random(2)))) == 3


@pytest.mark.parametrize("expected", [0.0, 1.0, 3.0, 0.5, 1.25])
def test_whole_numbers_are_right_on_average(expected):
    random = Random(0)
    drawn = [whole_number(expected, random) for _ in range(4000)]
    assert set(drawn) <= {int(expected), ceil(expected)} and abs(np.mean(drawn) - expected) < 0.04


def test_best_passages_by_hand():
    scores = np.array([0.2, 0.9, 0.9, 0.1])
    assert best_passages(list("abcd"), scores, 1, 0.0) == ["b"]
    assert best_passages(list("abcd"), scores, 3, 0.2) == ["b", "c", "a"]
    assert best_passages(list("abcd"), scores, None, 0.15) == ["b", "c", "a"]
    assert best_passages(list("abcd"), scores, 2, 0.95) == []


# --- the whole script

class Files:
    """A small collection: documents of 1 to 3 passages (window 4, stride 2), named in their words."""
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

    def flags(self, train: bool = False, **changed: str) -> list:
        names = {"docs": "docs.tsv", "queries": "queries.tsv", "candidates": "run.txt", "output": "out.tsv",
                 "cache_file_dir": "cache"} | ({"qrels": "qrels.txt"} if train else {}) | changed
        return [part for name, file in names.items() for part in (f"--{name}", self.directory / file)]

    def rows(self, name: str = "out.tsv") -> list[list[str]]:
        return [line.split("\t") for line in (self.directory / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def files(tmp_path) -> Files:
    return Files(tmp_path)


SMALL = ("--window", 4, "--stride", 2)


def test_test_pairs_by_hand(files, run_main):
    told = run_main(prepare_examples, "test", *files.flags(), *SMALL)
    rows = files.rows()
    assert [row[0] for row in rows] == [
        "q1#A_0", "q1#A_1", "q1#A_2", "q1#B_0", "q1#C_0", "q1#C_1", "q1#D_0", "q1#D_1",
        "q2#B_0", "q2#C_0", "q2#C_1", "q2#D_0", "q2#D_1", "q3#D_0", "q3#D_1"]
    assert rows[1] == ["q1#A_1", "first query", "a2 a3 a4 a5"] and rows[8] == ["q2#B_0", "second query", "b0 b1 b2"]
    assert files.rows("out.tsv.left_out.tsv") == [
        ["empty_document", "q1", "E"], ["missing_document", "q2", "X"], ["query_without_text", "q4", ""],
        ["query_without_text", "q6", ""], ["query_without_candidates", "q5", ""]]
    assert "2 left out as query_without_text: q4, q6" in told and "1 left out as missing_document: q2 X" in told
    facts = json.loads((files.directory / "out.tsv.run.json").read_text())
    assert facts["counts"]["lines"] == 15 and facts["made_from"][0]["bytes"] > 0
    assert facts["left_out"]["query_without_text"] == 2 and facts["arguments"]["window"] == 4


def test_title_and_depth(files, run_main):
    told = run_main(prepare_examples, "test", *files.flags(), *SMALL, "--title", "--depth", 2)
    assert {row[0] for row in files.rows()} == {"q1#A_0", "q1#A_1", "q1#A_2", "q1#B_0", "q2#B_0", "q2#C_0", "q2#C_1",
                                                "q3#D_0", "q3#D_1"}
    assert files.rows()[0][2] == "ta a0 a1 a2 a3" and files.rows()[2][2] == "ta a4 a5 a6 a7"
    assert "empty_document" not in told
    run_main(prepare_examples, "test", *files.flags(), *SMALL, "--title")
    assert ["q1#E_0", "first query", "te"] in files.rows()                      # a title alone is a passage


def test_candidates_are_taken_in_the_order_of_their_scores(files, run_main):
    files.write("run.txt", "q1 Q0 B 1 0.5 t\nq1 Q0 G 2 0.7 t\nq1 Q0 C 3 0.5 t\n")
    run_main(prepare_examples, "test", *files.flags(), "--depth", 2)
    assert [row[0] for row in files.rows()] == ["q1#G_0", "q1#C_0"]             # ties by descending id, as trec_eval
    files.write("run.txt", "q1\tB\t3\nq1\tG\t1\nq1\tC\t2\n")                    # MS MARCO's three columns
    run_main(prepare_examples, "test", *files.flags())
    assert [row[0] for row in files.rows()] == ["q1#G_0", "q1#C_0", "q1#B_0"]


def test_train_examples_by_hand(files, run_main):
    run_main(prepare_examples, "train", *files.flags(True), *SMALL)
    rows = files.rows()
    assert [row[0] for row in rows] == [str(number) for number in range(10)]
    assert [row[1:] for row in rows[:5]] == [["first query", text, "1"] for text in
                                             ("a0 a1 a2 a3", "a2 a3 a4 a5", "a4 a5 a6 a7", "d0 d1 d2 d3", "d2 d3 d4")]
    assert {row[2] for row in rows[5:8]} == {"b0 b1 b2", "c0 c1 c2 c3", "c2 c3 c4 c5"}      # all there are
    assert {row[1] for row in rows[5:8]} == {"first query"} and {row[3] for row in rows[5:8]} == {"0"}
    assert rows[8][1:] == ["second query", "b0 b1 b2", "1"]
    assert rows[9][1::2] == ["second query", "0"] and rows[9][2][0] in "cd"


def left_out(files: Files) -> set[tuple[str, ...]]:
    path = files.directory / "out.tsv.left_out.tsv"
    return {tuple(line.split("\t")) for line in path.read_text().splitlines()} if path.exists() else set()


def test_what_training_leaves_out(files, run_main):
    told = run_main(prepare_examples, "train", *files.flags(True), *SMALL)
    maybe = {("missing_document", "q2", "X")}                                   # looked up if it is drawn
    assert left_out(files) - maybe == {                                         # q8 is judged, but has nothing relevant
        ("empty_document", "q1", "E"), ("empty_document", "q2", "F"), ("missing_document", "q2", "Y"),
        ("query_without_text", "q4", ""), ("query_without_text", "q6", ""), ("query_without_text", "q7", ""),
        ("query_without_candidates", "q5", ""), ("query_without_negative_passage", "q3", "")}
    assert "1 queries have fewer passages of label 0 than asked for" in told
    assert not any(row[1] in ("third", "fifth") for row in files.rows())
    files.write("qrels.txt", "q1 0 E 1\nq2 0 B 1\n")
    run_main(prepare_examples, "train", *files.flags(True), *SMALL)
    assert {("query_without_positive_passage", "q1", ""),
            ("query_without_relevant_document", "q3", "")} <= left_out(files)


def test_a_list_of_an_earlier_run_does_not_stay(files, run_main):
    run_main(prepare_examples, "test", *files.flags())
    assert left_out(files)
    files.write("run.txt", "q1 Q0 A 1 1 t\n")
    files.write("queries.tsv", "q1\tx\n")
    told = run_main(prepare_examples, "test", *files.flags())
    assert not (files.directory / "out.tsv.left_out.tsv").exists() and "left out" not in told


def test_a_grade_below_the_level_is_neither_label(files, run_main):
    files.write("qrels.txt", "q1 0 A 2\nq1 0 B 1\nq1 0 C -1\n")
    run_main(prepare_examples, "train", *files.flags(True), *SMALL, "--relevance_level", 2, "--negatives", 9)
    labels = {row[2][0]: row[3] for row in files.rows()}
    assert labels == {"a": "1", "c": "0", "d": "0"}


def test_texts_that_a_relevant_document_has_too_are_no_negatives(files, run_main):
    files.write("docs.tsv", "A\tsame words\nB\tsame words\nC\tother words\n")
    files.write("qrels.txt", "q1 0 A 1\n")
    run_main(prepare_examples, "train", *files.flags(True), "--negatives", 5)
    assert [row[2:] for row in files.rows()] == [["same words", "1"], ["other words", "0"]]


def test_only_the_first_passages_of_a_document(files, run_main):
    run_main(prepare_examples, "test", *files.flags(), *SMALL, "--first_passages", 2, "--depth", 2)
    assert [row[0] for row in files.rows()] == ["q1#A_0", "q1#A_1", "q1#B_0", "q2#B_0", "q2#C_0", "q2#C_1", "q3#D_0",
                                                "q3#D_1"]
    run_main(prepare_examples, "train", *files.flags(True), *SMALL, "--first_passages", 1)
    assert {row[2] for row in files.rows() if row[3] == "1"} == {"a0 a1 a2 a3", "d0 d1 d2 d3", "b0 b1 b2"}


def test_only_relevant_documents_that_were_retrieved(files, run_main):
    """A text of a relevant document that was not is no negative all the same."""
    files.write("docs.tsv", "A\ta text\nB\tb text\nC\tc text\nD\tb text\nE\te text\n")
    files.write("run.txt", "q1 Q0 A 1 9 t\nq1 Q0 D 2 8 t\nq1 Q0 C 3 7 t\nq2 Q0 C 1 1 t\nq2 Q0 A 2 0 t\n")
    files.write("qrels.txt", "q1 0 B 1\nq1 0 A 1\nq2 0 E 1\n")
    run_main(prepare_examples, "train", *files.flags(True), "--retrieved_positives", "--negatives", 5)
    assert [row[2:] for row in files.rows()] == [["a text", "1"], ["c text", "0"]]
    assert ("query_without_positive_passage", "q2", "") in left_out(files)
    run_main(prepare_examples, "train", *files.flags(True), "--negatives", 1)
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
def test_ratio_and_labels(large, run_main, ratio):
    run_main(prepare_examples, "train", *large.flags(True), *SMALL, "--negatives", ratio)
    labels, rows = Counter(), large.rows()
    for _, query, passage, label in rows:
        document = int(passage[1:].split(".")[0])
        assert (document in large.relevant[query]) == (label == "1") and document in large.found[query]
        labels[label] += 1
    assert len({tuple(row[1:3]) for row in rows}) == len(rows)                  # no passage twice for a query
    assert len({row[1] for row in rows}) == 60
    assert labels["0"] == ratio * labels["1"] if ratio != 0.5 else abs(labels["0"] / labels["1"] - 0.5) < 0.1


def test_positive_passages_of_each_document(large, run_main):
    run_main(prepare_examples, "train", *large.flags(True), *SMALL, "--positive_passages", 1)
    documents = Counter((row[1], row[2].split(".")[0]) for row in large.rows() if row[3] == "1")
    assert len(documents) == 180 and set(documents.values()) == {1}
    starts = {re.search(r"\.(\d+)", row[2])[1] for row in large.rows() if row[3] == "1"}
    assert starts == {"0", "2", "4", "6"}                                       # any of them, not the first


def test_positive_passages_do_not_depend_on_the_order_of_the_judgements(large, run_main):
    def outcome():
        run_main(prepare_examples, "train", *large.flags(True), *SMALL, "--positive_passages", 1)
        return sorted(row[1:] for row in large.rows())
    first = outcome()
    lines = (large.directory / "qrels.txt").read_text().splitlines(keepends=True)
    large.write("qrels.txt", "".join(lines[::-1]))
    assert outcome() == first


def test_the_seed_and_nothing_else_decides(large, run_main):
    def outcome(*flags):
        run_main(prepare_examples, "train", *large.flags(True), *SMALL, *flags)
        return (large.directory / "out.tsv").read_bytes()
    first = outcome()
    lines = (large.directory / "queries.tsv").read_text().splitlines(keepends=True)
    large.write("queries.tsv", "".join(lines[::-1]))
    assert outcome("--seed", 42) == first != outcome("--seed", 43)
    some = outcome("--max_queries", 7)
    assert len({row[1] for row in large.rows()}) == 7
    large.write("queries.tsv", "".join(lines[20:] + lines[:20]))
    assert outcome("--max_queries", 7) == some
    some, first = ({row.split(b"\t", 1)[1] for row in content.splitlines()} for content in (some, first))
    assert some < first


# --- the filter

@pytest.fixture
def ranked(tmp_path, golden_models) -> Files:
    """Documents in the words of the golden models' vocabulary."""
    files, random, words = Files(tmp_path), Random(1), tiny_vocabulary()[5:]
    files.texts = {f"D{n}": [random.choice(words) for _ in range(random.randint(3, 30))] for n in range(40)}
    files.write("docs.tsv", "".join(f"{key}\t{' '.join(text)}\n" for key, text in files.texts.items()))
    files.write("queries.tsv", "".join(f"q{n}\t{' '.join(random.sample(words, 3))}\n" for n in range(10)))
    files.write("run.txt", "".join(f"q{n} Q0 D{d} 0 {-d} t\n" for n in range(10) for d in range(40)))
    files.write("qrels.txt", "".join(f"q{n} 0 D{d} 1\n" for n in range(10) for d in range(n, n + 3)))
    files.model = golden_models["teacher"]
    return files


def scores_by_the_scripts(files: Files) -> dict[str, float]:
    """Every pair scored by the pipeline's own way: test pairs, features, reranker.py."""
    run = [("prepare_examples.py", "test", *files.flags(output="pairs.tsv"), "--window", 8, "--stride", 4),
           ("tokenize_to_features.py", "--set_name", "test", "--raw_data_file", files.directory / "pairs.tsv",
            "--output_features_file", files.directory / "pairs.pkl", "--bert_model_dir", files.model,
            "--max_seq_length", 32),
           ("reranker.py", "--model_dir", files.model, "--features_file", files.directory / "pairs.pkl",
            "--output_scores_file", files.directory / "scores.tsv", "--device", "cpu")]
    for command in run:
        done = run_script(*command)
        assert done.returncode == 0, done.stderr
    return {f"{q}#{p}": float(score) for q, p, score in files.rows("scores.tsv")}


@pytest.mark.parametrize("group", [8192, 20])
def test_the_filter_keeps_what_the_reranker_scores_highest(ranked, run_main, monkeypatch, group):
    scores = scores_by_the_scripts(ranked)
    texts = {row[0]: row[1:] for row in ranked.rows("pairs.tsv")}
    monkeypatch.setattr(sampling, "GROUP", group)
    flags = [*ranked.flags(True), "--window", 8, "--stride", 4, "--filter_model", ranked.model, "--max_seq_length", 32]
    told = run_main(prepare_examples, "train", *flags)
    assert "filter       " in told and not left_out(ranked)

    def wanted(most, threshold):
        expected = Counter()
        for n in range(10):
            for d in range(n, n + 3):
                of_document = [key for key in scores if re.fullmatch(rf"q{n}#D{d}_\d+", key)]
                best = sorted(of_document, key=lambda key: -scores[key])[:most]
                expected.update(tuple(texts[key]) for key in best if scores[key] >= threshold)
        return expected
    assert Counter(tuple(row[1:3]) for row in ranked.rows() if row[3] == "1") == wanted(1, 0)
    values = sorted(scores.values())
    threshold = (values[len(values) // 2] + values[len(values) // 2 + 1]) / 2
    run_main(prepare_examples, "train", *flags, "--filter_threshold", threshold)
    assert Counter(tuple(row[1:3]) for row in ranked.rows() if row[3] == "1") == wanted(None, threshold)
    run_main(prepare_examples, "train", *flags, "--filter_threshold", threshold, "--positive_passages", 2)
    assert Counter(tuple(row[1:3]) for row in ranked.rows() if row[3] == "1") == wanted(2, threshold)
    facts = json.loads((ranked.directory / "out.tsv.run.json").read_text())
    assert len(facts["filter_weights"]) == 64 and facts["versions"]["torch"]


def test_a_filter_with_one_logit_keeps_what_the_one_with_two_keeps(ranked, run_main):
    single, kept = single_logit(ranked.model, ranked.directory / "single"), []
    for model in (ranked.model, single):
        told = run_main(prepare_examples, "train", *ranked.flags(True), "--window", 8, "--stride", 4, "--filter_model",
                        model, "--max_seq_length", 32, "--filter_threshold", 0.05)
        assert ("(0, z)" in told) == (model == single)
        kept.append(ranked.rows())
    assert kept[0] == kept[1] and kept[0]


def test_a_filter_that_cannot_be_read_is_told_before_anything_else(ranked, run_main):
    model = shutil.copytree(ranked.model, ranked.directory / "pointer")
    (model / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match="model.safetensors: is a Git LFS pointer"):
        run_main(prepare_examples, "train", *ranked.flags(True), "--filter_model", model, "--max_seq_length", 32)
    assert not (ranked.directory / "cache").exists() and not (ranked.directory / "out.tsv").exists()


def test_documents_below_the_threshold_are_listed(ranked, run_main):
    with pytest.raises(UserError, match="nothing could be made"):
        run_main(prepare_examples, "train", *ranked.flags(True), "--filter_model", ranked.model, "--max_seq_length", 32,
                 "--filter_threshold", 1)
    assert not (ranked.directory / "out.tsv").exists() and not (ranked.directory / "out.tsv.left_out.tsv").exists()


def test_a_filter_that_cannot_work_is_told_before_anything_else(ranked, run_main):
    for flags, message in [(("--max_seq_length", 256), "expected 8 to 64, the positions of"),
                           (("--filter_model", ranked.directory), "holds neither config.json"),
                           (("--filter_threshold", 1.5), "--filter_threshold 1.5: expected 0 to 1"),
                           (("--device", "gpu"), "--device gpu: expected auto")]:
        with pytest.raises(UserError, match=re.escape(message)):
            run_main(prepare_examples, "train", *ranked.flags(True), "--filter_model", ranked.model, *flags)
    assert not (ranked.directory / "cache").exists() and not (ranked.directory / "out.tsv").exists()


def test_torch_is_not_imported_without_a_filter(files):
    code = ("import sys, prepare_examples; prepare_examples.main(); "
            "sys.exit('torch' in sys.modules or 'ir_datasets' in sys.modules)")
    for arguments in (["test", *files.flags()], ["train", *files.flags(True)]):
        done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr


# --- bad input

@pytest.mark.parametrize(("name", "content", "message"), [
    ("queries.tsv", "q1\tx\nq2 y\n", "queries.tsv:2: found 1 tab-separated columns ('q2 y'); expected query_id, query"),
    ("queries.tsv", "q1\tx\ty\n", "queries.tsv:1: found 3 tab-separated columns"),
    ("queries.tsv", "q1\tx\nq1\ty\n", "queries.tsv:2: query 'q1' stands already in line 1"),
    ("queries.tsv", "q#1\tx\n", "queries.tsv:1: found query id 'q#1'; expected one without white space and without "
     "'#'"),
    ("queries.tsv", "q 1\tx\n", "queries.tsv:1: found query id 'q 1'"),
    ("queries.tsv", "", "queries.tsv: holds no queries"),
    ("run.txt", "q1 Q0 A 1 1\n", "run.txt:1: found 5 columns ('q1 Q0 A 1 1'); expected 6"),
    ("run.txt", "q1 Q0 A 1 x t\n", "run.txt:1: score 'x' is not a finite number"),
    ("run.txt", "q1 A 1\nq1 B\n", "run.txt:2: found 2 columns ('q1 B'); expected 3: query_id document_id rank"),
    ("run.txt", "q1 A first\n", "run.txt:1: rank 'first' is not"),
    ("run.txt", "q1 Q0 A 1 1 t\nq1 Q0 A 2 0 t\n", "run.txt:2: document 'A' is ranked a second time for query 'q1'"),
    ("run.txt", "q1 Q0 A 1 1 t\nq2 Q0 A 1 1 t\nq1 Q0 B 2 0 t\n", "run.txt:3: query 'q1' comes again, after others, "
     "since line 1; the lines of a query must stand together. Do: LC_ALL=C sort -s -k1,1"),
    ("run.txt", "q#1 Q0 A 1 1 t\n", "run.txt:1: found query id 'q#1'"),
    ("run.txt", "q1 Q0 A\u00a0B 1 1 t\n", "run.txt:1: found document id 'A\\xa0B'; expected one without white space"),
    ("run.txt", "", "run.txt: holds no candidates"),
    ("qrels.txt", "q1 0 A\n", "qrels.txt:1: found 3 columns"),
    ("docs.tsv", "A\tx\nB\n", "docs.tsv:2: found 1 tab-separated columns ('B\\n'); expected document_id, text"),
    ("docs.tsv", "A\tu\tt\tb\nB\tx\n", "docs.tsv:2: found 2 tab-separated columns ('B\\tx\\n'); expected document_id, "
     "url, title, body"),
    ("docs.tsv", "A\tu\tt\n", "docs.tsv:1: found 3 tab-separated columns"),
    ("docs.tsv", "A B\tx\n", "docs.tsv:1: found document id 'A B'; expected one without white space"),
    ("docs.tsv", "\tx\n", "docs.tsv:1: found document id ''"),
    ("docs.tsv", "A\tx\nB\ty\nA\tz\n", "docs.tsv:3: document 'A' stands already in line 1; each may occur once"),
    ("docs.tsv", "", "docs.tsv: is empty; expected a document a line"),
])
def test_bad_input_is_told_with_its_line(files, run_main, name, content, message):
    files.write(name, content)
    with pytest.raises(UserError, match=re.escape(message)):
        run_main(prepare_examples, "train", *files.flags(True))
    assert not [path for path in files.directory.iterdir() if "out.tsv" in path.name]
    cache = files.directory / "cache"
    assert not cache.exists() or name != "docs.tsv" or not list(cache.iterdir())


def test_problems_of_all_files_are_told_together(files):
    files.write("docs.tsv", "A\n")
    files.write("queries.tsv", "q1\n")
    files.write("run.txt", "q1\n")
    files.write("qrels.txt", "q1\n")
    done = run_script("prepare_examples.py", "train", *files.flags(True))
    assert done.returncode == 2 and done.stderr.count("error: ") >= 4 and "Traceback" not in done.stderr
    for name in ("docs.tsv:1", "queries.tsv:1", "run.txt:1", "qrels.txt:1"):
        assert name in done.stderr


@pytest.mark.parametrize(("flags", "messages"), [
    (["test"], ["--docs is needed, or --dataset", "--queries is needed", "--candidates is needed"]),
    (["train"], ["--qrels is needed, or --dataset with a dataset that has qrels"]),
    (["test", "--qrels", "q.txt", "--seed", 1], ["--qrels: is for train only", "--seed: is for train only", "q.txt"]),
    (["train", "--window", 0, "--negatives", -1, "--depth", 0, "--relevance_level", 0, "--max_queries", 0],
     ["--window 0: expected 1 word", "--negatives -1.0: expected", "--depth 0", "--relevance_level 0", "--max_qu"]),
    (["test", "--stride", 151], ["--stride 151: expected 1 to the window, else words would be lost"]),
    (["train", "--bf16", "--max_seq_length", 32], ["--bf16: is for --filter_model", "--max_seq_length: is for --fil"]),
    (["test", "--docs", "none.tsv"], ["none.tsv: cannot read the documents: No such file"]),
])
def test_flags_that_cannot_work(tmp_path, flags, messages):
    done = run_script("prepare_examples.py", *flags, "--output", tmp_path / "out.tsv")
    assert done.returncode == 2 and all(message in done.stderr for message in messages), done.stderr
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_an_input_is_refused(files, run_main):
    with pytest.raises(UserError, match="run.txt: is an input as well"):
        run_main(prepare_examples, "test", *files.flags(output="run.txt"))
    (files.directory / "run.txt").rename(files.directory / "out.tsv.left_out.tsv")
    (files.directory / "out.tsv.run.json").mkdir()
    flags = [str(flag).replace("run.txt", "out.tsv.left_out.tsv") for flag in files.flags()]
    with pytest.raises(UserError, match="left_out.tsv: is an input as well"):
        run_main(prepare_examples, "test", *flags)
    (files.directory / "out.tsv.left_out.tsv").rename(files.directory / "run.txt")
    with pytest.raises(UserError, match="out.tsv.run.json: is a directory"):
        run_main(prepare_examples, "test", *files.flags())


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8)), unique=True, min_size=1), st.integers(1, 4))
def test_grouping_loses_nothing(pairs, depth):
    pairs.sort(key=lambda pair: pair[0])                                        # stands together, in any order within
    problems = Problems()
    rows = [(line, f"q{q}", f"D{d}", float(d % 3)) for line, (q, d) in enumerate(pairs, 1)]
    found = dict(by_query(rows, "run", None, problems))
    assert {(int(q[1:]), int(d[1:])) for q, documents in found.items() for d in documents} == set(pairs)
    assert dict(by_query(rows, "run", depth, problems)) == {q: found[q][:depth] for q in found}
    assert not problems.count
    for documents in found.values():
        keys = [(int(d[1:]) % 3, d) for d in documents]
        assert keys == sorted(keys, reverse=True)


def test_runs_of_either_layout_and_compressed(tmp_path):
    problems = Problems()
    with gzip.open(tmp_path / "run.gz", "wt") as handle:
        handle.write("q D1 2\nq D2 1\n")
    assert list(read_rows(tmp_path / "run.gz", problems)) == [(1, "q", "D1", -2.0), (2, "q", "D2", -1.0)]
    assert not problems.count


# --- into the next script

def test_what_comes_out_goes_into_tokenize(files, run_main, golden_models):
    for set_name, train in (("train", True), ("test", False)):
        run_main(prepare_examples, set_name, *files.flags(train, output=f"{set_name}.tsv"), *SMALL, "--title")
        run_main(tokenize_to_features, "--set_name", set_name, "--raw_data_file", files.directory / f"{set_name}.tsv",
                 "--output_features_file", files.directory / f"{set_name}.pkl", "--bert_model_dir",
                 golden_models["teacher"], "--max_seq_length", 32)
        chunk, = read_chunks(files.directory / f"{set_name}.pkl")
        rows = files.rows(f"{set_name}.tsv")
        assert chunk.ids == [row[0] for row in rows]
        assert chunk.labels.tolist() == [int(row[3]) if train else -1 for row in rows]


def test_documents_by_any_way_make_the_same_pairs(files, run_main):
    run_main(prepare_examples, "test", *files.flags(), *SMALL)
    plain = (files.directory / "out.tsv").read_bytes()
    for name in ("docs.tsv", "queries.tsv", "run.txt"):
        (files.directory / f"{name}.gz").write_bytes(gzip.compress((files.directory / name).read_bytes()))
    told = run_main(prepare_examples, "test", *files.flags(docs="docs.tsv.gz", queries="queries.tsv.gz",
                                                           candidates="run.txt.gz"), *SMALL)
    assert (files.directory / "out.tsv").read_bytes() == plain and "unpacking it once" in told
    files.write("docs.tsv", "\ufeff" + (files.directory / "docs.tsv").read_text().replace("\n", "\r\n"))
    run_main(prepare_examples, "test", *files.flags(), *SMALL)
    assert (files.directory / "out.tsv").read_bytes() == plain


# --- ir_datasets

@pytest.fixture
def dataset(files, monkeypatch):
    """The same collection as a dataset in the registry: real stores and readers, in a home of its own."""
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
def test_a_dataset_makes_what_its_files_make(dataset, run_main, set_name):
    train = set_name == "train"
    run_main(prepare_examples, set_name, *dataset.flags(train), *SMALL, "--title")
    expected, noted = (dataset.directory / "out.tsv").read_bytes(), left_out(dataset)
    for flags in ([], ["--candidates", dataset.directory / "run.txt"]):
        run_main(prepare_examples, set_name, "--dataset", "test-collection", "--output", dataset.directory / "out.tsv",
                 *SMALL, "--title", *flags)
        assert (dataset.directory / "out.tsv").read_bytes() == expected and left_out(dataset) == noted


def test_a_dataset_that_lacks_something_names_the_flag(dataset, run_main):
    with pytest.raises(UserError, match="(?s)has no scoreddocs; give a file by --candidates.*has no qrels; give a file "
                                        "by --qrels"):
        run_main(prepare_examples, "train", "--dataset", "test-collection/bare", "--output", dataset.directory / "o.tsv")
    with pytest.raises(UserError, match="knows none of this name; near to it: test-collection"):
        run_main(prepare_examples, "test", "--dataset", "test-colection", "--output", dataset.directory / "o.tsv")
    with pytest.raises(UserError, match="near to it: .*msmarco-document/trec-dl-2019"):
        run_main(prepare_examples, "test", "--dataset", "msmarco-documents/trec-dl-2019", "--output",
                 dataset.directory / "o.tsv")


def test_a_dataset_that_cannot_be_read_is_told(dataset, run_main):
    dataset.write("run.txt", "q1 Q0 A 1 x t\n")
    with pytest.raises(UserError, match="--dataset test-collection: cannot be fetched or read .*could not convert"):
        run_main(prepare_examples, "test", "--dataset", "test-collection", "--output", dataset.directory / "o.tsv")
    dataset.write("run.txt", "q1 Q0 A 1 1 t\nq2 Q0 A 1 1 t\nq1 Q0 B 1 1 t\n")
    with pytest.raises(UserError, match="ir_datasets export test-collection scoreddocs"):
        run_main(prepare_examples, "test", "--dataset", "test-collection", "--output", dataset.directory / "o.tsv")


@pytest.fixture
def refused_rows(dataset, run_main):
    """The error of a dataset whose queries, qrels or scoreddocs are these rows; its other parts are the files'."""
    import ir_datasets
    from ir_datasets.datasets.base import Dataset

    def refuse(part, *rows):
        given = SimpleNamespace(**{f"{part}_iter": lambda: iter(rows)})         # is asked before the other
        ir_datasets.registry._registered["test-rows"] = Dataset(given, ir_datasets.load("test-collection"))
        with pytest.raises(UserError) as raised:
            run_main(prepare_examples, "train", "--dataset", "test-rows", "--output", dataset.directory / "o.tsv")
        assert not (dataset.directory / "o.tsv").exists()
        return str(raised.value)
    return refuse


def test_queries_without_a_text_name_the_fields_there_are(refused_rows):
    """As those of wapo/v2/trec-news-2018."""
    told = refused_rows("queries", namedtuple("Query", "query_id doc_id url")("q1", "A", "http://"))
    assert "--dataset test-rows: its queries have neither text nor default_text, but query_id, doc_id, url;" in told


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf, None, "high", "1_0"])
def test_scores_of_a_dataset_are_finite_numbers(refused_rows, score):
    row = namedtuple("Row", "query_id doc_id score")
    told = refused_rows("scoreddocs", row("q1", "A", 2.5), row("q1", "B", score))
    assert told == ("--dataset test-rows, candidate:2: the score of document 'B' for query 'q1' is not a finite number")


def test_judgements_and_ids_of_a_dataset_are_checked_as_those_of_files(refused_rows):
    row = namedtuple("Row", "query_id doc_id relevance")
    assert "document 'A': grade 'L' is not a whole number" in refused_rows("qrels", row("q1", "A", "L"))
    assert "query 'q1', document 'A': grade '20000' is too large" in refused_rows("qrels", row("q1", "A", 20000))
    other = namedtuple("Other", "query_id doc_id method")("q1", "A", 1)
    assert "have no relevance, but query_id, doc_id, method" in refused_rows("qrels", other)
    scored = namedtuple("Scored", "query_id doc_id score")("q1", "A b", 1.0)
    assert "found document id 'A b'" in refused_rows("scoreddocs", scored)


def test_documents_without_a_text_name_the_fields_there_are():
    from simplified_tinybert.data.ir_dataset import parts_of
    with pytest.raises(UserError, match="document 'D1' has no text, but doc_id, image"):
        parts_of(namedtuple("Picture", "doc_id image")("D1", b"png"))


def test_candidates_whose_ranks_contradict_their_scores_are_told_once(files, run_main):
    files.write("run.txt", "".join(f"q1 Q0 {document} {place} 1.0 t\n" for place, document in enumerate("ABC", 1)))
    told = run_main(prepare_examples, "test", *files.flags(False), "--depth", 1, *SMALL)
    assert told.count("rank and score disagree in 1 of 1 queries") == 1 and "run.txt:3: query 'q1'" in told


def test_documents_of_many_kinds():
    pytest.importorskip("ir_datasets")
    from ir_datasets.datasets.clinicaltrials import ClinicalTrialsDoc
    from ir_datasets.datasets.cord19 import Cord19Doc
    from ir_datasets.datasets.msmarco_document import MsMarcoDocument
    from ir_datasets.formats import GenericDoc, TitleUrlTextDoc

    from simplified_tinybert.data.ir_dataset import parts_of
    assert parts_of(MsMarcoDocument("D1", "u", "a  title", "a\nbody")) == ("a title", "a body")
    assert parts_of(GenericDoc("D1", "text\ud800")) == ("", "text?")
    assert parts_of(TitleUrlTextDoc("D1", "t", "u", "x")) == ("t", "x")
    assert parts_of(Cord19Doc("D1", "t", "doi", "date", "abstract")) == ("", "t abstract")
    assert parts_of(ClinicalTrialsDoc("D1", "t", "c", "s", "d", "e")) == ("", "t c s d e")


# --- collections that are not made for a test

def shared(name: str) -> Path:
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is not there: the collection is not part of the repository")
    return DATA / name


def flags_of(directory: Path, split: str, output: Path) -> list:
    return ["--docs", directory / "docs.tsv", "--queries", directory / f"queries.{split}.tsv", "--candidates",
            directory / f"bm25.{split}.txt", "--output", output, "--cache_file_dir", output.parent / "cache"]


def test_cranfield_with_its_empty_documents(tmp_path, run_main):
    directory, output = shared("cranfield"), tmp_path / "out.tsv"
    told = run_main(prepare_examples, "train", *flags_of(directory, "dev", output), "--qrels", directory / "qrels.dev.txt")
    assert (tmp_path / "out.tsv.left_out.tsv").read_text() == "empty_document\t125\t995\n"
    assert "1 left out as empty_document: 125 995" in told
    run_main(prepare_examples, "test", *flags_of(directory, "test", output), "--title")
    documents = dict((line.split("\t")[0], line.rstrip("\n").split("\t")[2:]) for line in open(directory / "docs.tsv"))
    expected = [(query, document, n) for query, _, document, *_ in map(str.split, open(directory / "bm25.test.txt"))
                for n in range(1 + max(0, ceil((len(documents[document][1].split()) - 150) / 75)))]
    found = [re.fullmatch(r"(\d+)#(\d+)_(\d+)", line.split("\t")[0]).groups() for line in open(output)]
    assert sorted((q, d, int(n)) for q, d, n in found) == sorted(expected) and len(found) == 9928


def test_nfcorpus_and_its_queries_without_candidates(tmp_path, run_main):
    directory, output = shared("nfcorpus"), tmp_path / "out.tsv"
    run_main(prepare_examples, "test", *flags_of(directory, "test", output))
    kinds = Counter(line.split("\t")[0] for line in open(tmp_path / "out.tsv.left_out.tsv"))
    assert kinds == {"query_without_candidates": 15} and os.path.getsize(output) > 10 ** 7


def test_trec_dl_files_parse(tmp_path, run_main):
    directory = shared("trec-dl-2019-doc")
    files = Files(tmp_path)
    files.write("run.txt", "156493 Q0 A 1 1 t\n")
    flags = [part for part in files.flags(True) if part not in (tmp_path / "queries.tsv", tmp_path / "qrels.txt")]
    flags[flags.index("--queries") + 1:flags.index("--queries") + 1] = [directory / "queries.test.tsv"]
    flags.append(directory / "qrels.test.txt")
    with pytest.raises(UserError, match="nothing could be made"):               # its documents are not here
        run_main(prepare_examples, "train", *flags)
