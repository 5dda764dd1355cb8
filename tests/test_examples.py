"""The built-in example: its collection and its committed models."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_script
from safetensors.torch import load_file

from simplified_tinybert.common.files import Problems
from simplified_tinybert.model.pretrained import load_cross_encoder, read_config
from simplified_tinybert.model.tokenizer_files import load_vocabulary
from simplified_tinybert.ranking.trec import read_qrels, read_run
from tokenize_to_features import check_pairs

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    directory = tmp_path_factory.mktemp("collection")
    done = run_script("examples.build_collection", "--output_dir", directory, "--train_queries", 50,
                      "--pseudo_queries", 50)
    assert done.returncode == 0, done.stderr
    return directory


def table(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_collection_is_reproducible(collection, tmp_path):
    run_script("examples.build_collection", "--output_dir", tmp_path, "--train_queries", 50, "--pseudo_queries", 50)
    names = sorted(path.name for path in collection.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        assert (collection / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_queries_are_held_out_of_the_documents(collection):
    """No relevant document contains its query, and no training text contains a dev or test query."""
    documents = {docid: body for docid, _, _, body in table(collection / "docs.tsv")}
    examples = (collection / "train.examples.tsv").read_text(encoding="utf-8")
    corpus = (collection / "corpus.txt").read_text(encoding="utf-8")
    for split in ("train", "dev", "test"):
        qrels = read_qrels(collection / f"qrels.{split}.txt", Problems())
        queries = dict(table(collection / f"queries.{split}.tsv"))
        assert queries.keys() == qrels.keys() and len(queries) >= 100
        for query_id, text in queries.items():
            (docid, grade), = qrels[query_id].items()
            assert grade == 1 and text not in documents[docid]
            if split != "train":
                assert text not in examples and text not in corpus


def test_splits_do_not_share_queries(collection):
    splits = [dict(table(collection / f"queries.{split}.tsv")) for split in ("train", "dev", "test")]
    ids = [query_id for split in splits for query_id in split]
    texts = [text for split in splits for text in split.values()]
    assert len(set(ids)) == len(ids) and len(set(texts)) == len(texts)


def test_pairs_and_examples_pass_the_tokenizers_checks(collection):
    problems = Problems()
    assert check_pairs(collection / "test.pairs.tsv", "test", problems) > 1000
    assert check_pairs(collection / "train.examples.tsv", "train", problems) > 100
    assert problems.count == 0, problems.messages


def test_the_pairs_are_passages_of_bm25_candidates(collection):
    problems = Problems()
    run = read_run(collection / "bm25.test.txt", problems)
    documents = {docid: body for docid, _, _, body in table(collection / "docs.tsv")}
    for pair_id, _, passage in table(collection / "test.pairs.tsv"):
        query_id, _, passage_id = pair_id.partition("#")
        docid = passage_id.rpartition("_")[0]
        assert docid in run[query_id]
        assert passage.startswith(f"{docid} : ") and passage.removeprefix(f"{docid} : ") in documents[docid]
    assert problems.count == 0 and all(len(scores) <= 10 for scores in run.values())


def test_a_python_without_docstrings_is_refused(tmp_path):
    done = subprocess.run([sys.executable, "-OO", "-m", "examples.build_collection", "--output_dir", tmp_path / "out"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "-OO" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name, layers, has_head", [("teacher", 4, True), ("general_student", 2, False)])
def test_committed_models_are_complete_and_small(name, layers, has_head):
    directory = EXAMPLES / name
    config = read_config(directory)
    assert (config.num_hidden_layers, config.num_attention_heads) == (layers, 4)
    assert ("classifier.weight" in load_file(directory / "model.safetensors")) == has_head
    assert sum(path.stat().st_size for path in directory.iterdir()) < 10e6
    assert all(tensor.isfinite().all() for tensor in load_file(directory / "model.safetensors").values())
    if has_head:
        load_cross_encoder(directory)


def test_teacher_and_student_share_a_vocabulary():
    teacher, student = (load_vocabulary(EXAMPLES / name) for name in ("teacher", "general_student"))
    assert teacher.checksum() == student.checksum() and teacher.lower_case and student.lower_case


def test_the_teacher_ranks_better_than_chance(collection, tmp_path):
    """On 30 queries, the best passage of the relevant document scores higher than most other passages."""
    qrels = read_qrels(collection / "qrels.dev.txt", Problems())
    rows = [row for row in table(collection / "dev.pairs.tsv") if row[0].partition("#")[0] in list(qrels)[:30]]
    (tmp_path / "pairs.tsv").write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    assert run_script("tokenize_to_features.py", "--set_name", "dev", "--raw_data_file", tmp_path / "pairs.tsv",
                      "--output_features_file", tmp_path / "dev.pkl", "--bert_model_dir", EXAMPLES / "teacher",
                      "--max_seq_length", 128).returncode == 0
    assert run_script("reranker.py", "--device", "cpu", "--model_dir", EXAMPLES / "teacher", "--features_file",
                      tmp_path / "dev.pkl", "--output_scores_file", tmp_path / "scores.tsv").returncode == 0
    scores = {}
    for query_id, passage_id, score in table(tmp_path / "scores.tsv"):
        relevant = passage_id.rpartition("_")[0] in qrels[query_id]
        scores.setdefault(query_id, {True: [], False: []})[relevant].append(float(score))
    shares = [np.mean(max(found[True]) > np.array(found[False])) for found in scores.values() if found[True]]
    assert len(shares) > 15 and np.mean(shares) > 0.75


@pytest.mark.slow
def test_pretraining_learns_and_writes_a_general_student(collection, tmp_path):
    lines = (collection / "corpus.txt").read_text(encoding="utf-8").splitlines()[:400]
    (tmp_path / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    done = run_script("examples.maintenance.pretrain", "--corpus", tmp_path / "corpus.txt", "--output_dir",
                      tmp_path / "model", "--num_hidden_layers", 2, "--hidden_size", 32, "--vocab_size", 500,
                      "--num_train_epochs", 2, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "classifier.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == "bert" and config["hidden_size"] == 32
    assert load_vocabulary(tmp_path / "model").lower_case
