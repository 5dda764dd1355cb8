"""Records trace a file to its models and raw input."""
import argparse
import hashlib
import json
import os

import pytest
from conftest import random_rows, run_script, words, write_features

import reranker
from simplified_tinybert.common.records import file_state, record_file, record_path


def test_a_ranking_is_traced_to_model_features_and_pairs(golden_models, tmp_path):
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text(f"q#D1_0\t{words([7, 8])}\t{words([9, 10])}\nq#D2_0\t{words([7, 8])}\t{words([11])}\n")
    for call in (("tokenize_to_features.py", "--set_name", "test", "--raw_data_file", pairs, "--output_features_file",
                  tmp_path / "test.pkl", "--bert_model_dir", golden_models["teacher"], "--max_seq_length", 32),
                 ("reranker.py", "--model_dir", golden_models["teacher"], "--features_file", tmp_path / "test.pkl",
                  "--output_scores_file", tmp_path / "scores.tsv", "--device", "cpu"),
                 ("convert_to_trec_results.py", "--scores_file", tmp_path / "scores.tsv", "--output_results_file",
                  tmp_path / "run.trec")):
        done = run_script(*call)
        assert done.returncode == 0, done.stderr

    def sha(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    run = json.loads((tmp_path / "run.trec.run.json").read_text())
    assert run["script"] == "convert_to_trec_results.py" and run["output"]["sha256"] == sha(tmp_path / "run.trec")
    scores, = run["made_from"]
    assert scores["sha256"] == scores["record"]["output"]["sha256"] == sha(tmp_path / "scores.tsv")
    weights = hashlib.sha256(hashlib.sha256((golden_models["teacher"] / "model.safetensors").read_bytes()).digest())
    assert scores["record"]["settings"]["weights"] == weights.hexdigest()
    features, = scores["record"]["made_from"]
    assert features["sha256"] == sha(tmp_path / "test.pkl")
    raw, = features["record"]["made_from"]
    assert raw["sha256"] == sha(pairs) and raw["file"] == str(pairs) and "record" not in raw
    assert features["record"]["arguments"]["max_seq_length"] == 32


def test_huge_files_are_not_hashed(tmp_path, monkeypatch):
    monkeypatch.setattr("simplified_tinybert.common.records.MAX_HASHED_BYTES", 3)
    (tmp_path / "small").write_text("abc")
    (tmp_path / "large").write_text("abcd")
    assert file_state(tmp_path / "small")["sha256"] == hashlib.sha256(b"abc").hexdigest()
    assert file_state(tmp_path / "large").keys() == {"bytes", "changed"}


def test_records_of_earlier_content_are_ignored(tmp_path):
    scores, run = tmp_path / "scores.tsv", tmp_path / "run.trec"
    scores.write_text("q\tD\t1\n")
    run.write_text("q Q0 D 1 1 t\n")
    record_file(scores, argparse.Namespace(model="a"), [])
    record_file(run, argparse.Namespace(), [scores])
    assert json.loads(record_path(run).read_text())["made_from"][0]["record"]["arguments"] == {"model": "a"}
    for stale in (record_path(scores).read_text(), "[]", '{"output": 1}', '{"settings": {}}', "{"):
        scores.write_text("q\tD\t2\n")
        record_path(scores).write_text(stale)
        record_file(run, argparse.Namespace(), [scores])
        assert "record" not in json.loads(record_path(run).read_text())["made_from"][0]


def test_scores_keep_their_record_until_they_are_replaced(golden_models, tmp_path, run_here, monkeypatch):
    """An interrupted run with another model changes neither. --resume continues it with its own record."""
    file = write_features(tmp_path / "test.pkl", random_rows(10), set_name="test")

    def call(model, *more):
        run_here(reranker, "--model_dir", golden_models[model], "--features_file", file, "--output_scores_file",
                 tmp_path / "scores.tsv", "--device", "cpu", *more)

    def recorded():
        return json.loads((tmp_path / "scores.tsv.run.json").read_text())
    call("teacher")
    teacher_record = recorded()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("reranker.os.replace", replace_no_scores)
        call("student_4x48")
    assert recorded() == teacher_record and (tmp_path / "scores.tsv.partial").is_file()
    call("student_4x48", "--resume")
    assert recorded()["settings"] != teacher_record["settings"]
    assert recorded()["output"] == file_state(tmp_path / "scores.tsv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.tsv", "scores.tsv.run.json", "test.pkl"]
    call("teacher", "--resume")                         # there is nothing to continue
    assert recorded()["settings"] == teacher_record["settings"]


def replace_no_scores(source, target, real=os.replace):
    if target.name == "scores.tsv":
        raise KeyboardInterrupt
    real(source, target)
