"""What a file came from can be read beside it, back to the models and the raw collection."""
import hashlib
import json

from conftest import run_script, words

from simplified_tinybert.records import file_facts


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
    monkeypatch.setattr("simplified_tinybert.records.SMALL", 3)
    (tmp_path / "small").write_text("abc")
    (tmp_path / "large").write_text("abcd")
    assert file_facts(tmp_path / "small")["sha256"] == hashlib.sha256(b"abc").hexdigest()
    assert file_facts(tmp_path / "large").keys() == {"bytes", "changed"}
