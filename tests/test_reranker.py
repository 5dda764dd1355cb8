"""reranker.py: scores, their order, resuming and errors."""
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import change_config, random_rows, run_script, single_logit, write_features
from helpers.reranking import arguments, read_scores
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import reranker
from simplified_tinybert.common.files import UserError
from simplified_tinybert.common.processes import locked
from simplified_tinybert.data import features
from simplified_tinybert.model.batch import Batch
from simplified_tinybert.model.pretrained import load_cross_encoder
from simplified_tinybert.ranking import scoring


def one_by_one(model_dir, rows):
    """Return the logits of each pair alone: no batches, no padding, all positions of all layers."""
    model, _ = load_cross_encoder(model_dir)
    logits = []
    for _, tokens, query_length, _ in rows:
        ids = torch.tensor(np.array([tokens], dtype=np.int64))
        segments = (torch.arange(ids.shape[1]) >= query_length).long()[None]
        with torch.inference_mode():
            logits.append(model(Batch(ids, segments, torch.ones_like(ids)), layers=[]).logits[0].numpy())
    return np.array(logits, dtype=np.float64)


@pytest.mark.parametrize("name", ["teacher", "student_2x24", "student_4x48"])
@pytest.mark.parametrize("more", [[], ["--eval_batch_size", 3], ["--batch_tokens", 50], ["--batch_tokens", 1]])
def test_scores_in_input_order_equal_those_of_single_pairs(golden_models, tmp_path, run_here, monkeypatch, name, more):
    monkeypatch.setattr(features, "CHUNK_EXAMPLES", 40)
    rows = random_rows(130)
    file = write_features(tmp_path / "test.pkl", rows, set_name="test")
    run_here(reranker, *arguments(golden_models[name], file, tmp_path / "scores.tsv", *more))
    found, logits = read_scores(tmp_path / "scores.tsv"), one_by_one(golden_models[name], rows)
    assert [f"{query_id}#{passage_id}" for query_id, passage_id, _ in found] == [row[0] for row in rows]
    expected = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
    np.testing.assert_allclose([score for *_, score in found], expected, rtol=0, atol=1e-6)


def test_log_odds(golden_models, tmp_path, run_here):
    rows = random_rows(30)
    file = write_features(tmp_path / "test.pkl", rows, set_name="test")
    run_here(reranker, *arguments(golden_models["teacher"], file, tmp_path / "scores.tsv", "--score", "log_odds"))
    logits = one_by_one(golden_models["teacher"], rows)
    np.testing.assert_allclose([score for *_, score in read_scores(tmp_path / "scores.tsv")],
                               logits[:, 1] - logits[:, 0], rtol=0, atol=2e-5)


def test_distinct_margins_stay_distinct():
    """In float32, the probability would be exactly 1 from a margin of 17 on."""
    margins = np.linspace(5, 30, 1000, dtype=np.float32)
    logits = np.stack([np.zeros_like(margins), margins], axis=1)
    for score in ("probability", "log_odds"):
        assert len(set(scoring.relevance(logits, score).tolist())) == 1000
    extreme = scoring.relevance(np.array([[0.0, 800.0], [800.0, 0.0]]), "probability")
    assert extreme.tolist() == pytest.approx([1.0, 0.0])


def test_single_logit_models_score_by_the_sigmoid(golden_models, tmp_path, run_here):
    rows, model = random_rows(30), single_logit(golden_models["teacher"], tmp_path / "single")
    file = write_features(tmp_path / "test.pkl", rows, set_name="test")
    single, _ = load_cross_encoder(model)
    assert single.classifier.out_features == 1
    logits = one_by_one(model, rows)[:, 0]
    for score, expected, error in (("log_odds", logits, 2e-5), ("probability", 1 / (1 + np.exp(-logits)), 1e-6)):
        stderr = run_here(reranker, *arguments(model, file, tmp_path / score, "--score", score))
        assert "(0, z)" in stderr
        np.testing.assert_allclose([row[2] for row in read_scores(tmp_path / score)], expected, rtol=0, atol=error)


@given(st.lists(st.integers(5, 300), min_size=1, max_size=200), st.integers(1, 3000),
       st.one_of(st.none(), st.integers(1, 9)))
def test_batches_hold_every_pair_once_within_the_budget(lengths, budget, most):
    lengths = np.array(lengths, dtype=np.uint16)
    batches = list(scoring.token_batches(lengths, scoring.BatchLimits(budget, most)))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= budget
        assert most is None or len(batch) <= most


def test_ids_with_special_characters_and_several_files(golden_models, tmp_path, run_here):
    rows = [(example_id, *rest) for example_id, (_, *rest)
            in zip(["1#msmarco_v2.1_doc_00_0#4_17", "q-ü#D_1_0", "9#a#b#c_1"], random_rows(3))]
    files = [write_features(tmp_path / f"{n}.pkl", [row], set_name="test") for n, row in enumerate(rows)]
    run_here(reranker, *arguments(golden_models["teacher"], files, tmp_path / "scores.tsv"))
    assert [row[:2] for row in read_scores(tmp_path / "scores.tsv")] == [
        ("1", "msmarco_v2.1_doc_00_0#4_17"), ("q-ü", "D_1_0"), ("9", "a#b#c_1")]


@pytest.mark.parametrize("cut", [0, 1, 40, 50, 99])
def test_an_interrupted_run_resumes_to_the_same_bytes(golden_models, tmp_path, run_here, monkeypatch, cut):
    monkeypatch.setattr(features, "CHUNK_EXAMPLES", 40)
    file = write_features(tmp_path / "test.pkl", random_rows(100), set_name="test")
    run_here(reranker, *arguments(golden_models["teacher"], file, tmp_path / "scores.tsv"))
    complete = (tmp_path / "scores.tsv").read_bytes()
    lines = complete.splitlines(keepends=True)
    (tmp_path / "scores.tsv").unlink()
    (tmp_path / "scores.tsv.run.json").rename(tmp_path / "scores.tsv.partial.run.json")
    (tmp_path / "scores.tsv.partial").write_bytes(b"".join(lines[:cut]) + lines[cut][:7])
    counted = []
    real = scoring.score_chunk
    monkeypatch.setattr(scoring, "score_chunk", lambda *args: counted.append(len(args[1])) or real(*args))
    run_here(reranker, *arguments(golden_models["teacher"], file, tmp_path / "scores.tsv", "--resume"))
    assert (tmp_path / "scores.tsv").read_bytes() == complete
    assert sum(counted) == 100 - cut // 40 * 40
    assert not (tmp_path / "scores.tsv.partial").exists()


def test_resume_refuses_another_model(golden_models, tmp_path, run_here):
    file = write_features(tmp_path / "test.pkl", random_rows(10), set_name="test")
    run_here(reranker, *arguments(golden_models["teacher"], file, tmp_path / "scores.tsv"))
    (tmp_path / "scores.tsv.partial").write_text("q0\tD0_0\t0.5\n")
    (tmp_path / "scores.tsv.run.json").rename(tmp_path / "scores.tsv.partial.run.json")
    with pytest.raises(UserError, match="another model, features, settings or version"):
        run_here(reranker, *arguments(golden_models["student_4x48"], file, tmp_path / "scores.tsv", "--resume"))
    changed = shutil.copytree(golden_models["teacher"], tmp_path / "teacher")
    change_config(changed, hidden_act="relu")
    with pytest.raises(UserError, match="another model, features, settings or version"):
        run_here(reranker, *arguments(changed, file, tmp_path / "scores.tsv", "--resume"))


def test_two_runs_do_not_share_an_output_file(golden_models, tmp_path, run_here):
    file = write_features(tmp_path / "test.pkl", random_rows(10), set_name="test")
    (tmp_path / "scores.tsv.partial").write_text("q0\tD0_0\t0.5\n")
    for more in ([], ["--resume"]):
        with locked(tmp_path / "scores.tsv.partial"), pytest.raises(UserError, match="another process is writing"):
            run_here(reranker, *arguments(golden_models["teacher"], file, tmp_path / "scores.tsv", *more))
    assert (tmp_path / "scores.tsv.partial").read_text() == "q0\tD0_0\t0.5\n"


def test_a_link_is_followed(golden_models, tmp_path, run_here):
    file = write_features(tmp_path / "test.pkl", random_rows(10), set_name="test")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "scores.tsv").symlink_to(tmp_path / "elsewhere" / "real.tsv")
    run_here(reranker, *arguments(golden_models["teacher"], file, tmp_path / "scores.tsv"))
    assert (tmp_path / "scores.tsv").is_symlink()
    assert len(read_scores(tmp_path / "elsewhere" / "real.tsv")) == 10


def test_pooled_relu_from_flag_or_configuration(golden_models, tmp_path, run_here):
    file = write_features(tmp_path / "test.pkl", random_rows(10), set_name="test")
    configured = shutil.copytree(golden_models["teacher"], tmp_path / "relu")
    config = json.loads((configured / "config.json").read_text())
    (configured / "config.json").write_text(json.dumps(config | {"pooled_relu": True}))
    outputs = []
    for number, (model, more) in enumerate([(golden_models["teacher"], []), (configured, []),
                                            (golden_models["teacher"], ["--pooled_relu"])]):
        run_here(reranker, *arguments(model, file, tmp_path / f"{number}.tsv", *more))
        outputs.append((tmp_path / f"{number}.tsv").read_bytes())
    assert outputs[0] != outputs[1] == outputs[2]


def test_nan_weights_are_an_error(golden_models, tmp_path, run_here):
    file = write_features(tmp_path / "test.pkl", random_rows(10), set_name="test")
    broken = shutil.copytree(golden_models["teacher"], tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["bert.pooler.dense.bias"][3] = math.nan
    save_file(weights, broken / "model.safetensors")
    with pytest.raises(UserError, match="logits of q0#D0_0 are NaN or infinite"):
        run_here(reranker, *arguments(broken, file, tmp_path / "scores.tsv"))
    assert not (tmp_path / "scores.tsv").exists()


def test_all_errors_at_once_with_exit_code_2(golden_models, tmp_path):
    file = write_features(tmp_path / "pairs.pkl", [("17", *row[1:]) for row in random_rows(3)], set_name="test")
    done = run_script("reranker.py", *arguments(tmp_path / "no", file, tmp_path / "nowhere" / "s.tsv",
                                                "--batch_tokens", 0))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for problem in ("no such model directory", "directory does not exist", "--batch_tokens 0", "3 of 3 ids"):
        assert problem in done.stderr
    general = shutil.copytree(golden_models["student_2x24"], tmp_path / "general")
    weights = load_file(general / "model.safetensors")
    save_file({name: tensor for name, tensor in weights.items() if not name.startswith("classifier")},
              general / "model.safetensors")
    file = write_features(tmp_path / "test.pkl", random_rows(3), set_name="test")
    done = run_script("reranker.py", *arguments(general, file, tmp_path / "s.tsv"))
    assert done.returncode == 2 and "classifier.weight; the model was not fine-tuned" in done.stderr
    assert not (tmp_path / "s.tsv").exists()
