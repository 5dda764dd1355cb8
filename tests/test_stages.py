"""Methods and their stages, weights of loss terms, validation during training."""
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import loss_terms, random_rows, run_script, words, write_features
from helpers.reranking import arguments as rerank_arguments
from helpers.training import arguments, dev_set, log_of, rows_of, student_of, with_dropout, without_speed
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import distill
from simplified_tinybert.common.files import UserError
from simplified_tinybert.data.features import Examples
from simplified_tinybert.model.pretrained import load_cross_encoder
from simplified_tinybert.training.objective import METHODS, formula, parse_loss_weights, stage_weights

SMALL_STEPS = ("--train_batch_size", 8, "--train_loss_step", 1, "--learning_rate", 1e-3)


# Weights


def test_weights_of_the_methods():
    assert stage_weights("finetune") == [{"hard": 1.0}]
    assert stage_weights("standard", alpha=0.3) == [{"soft": 0.3, "hard": 0.7}]
    assert stage_weights("simplified") == [{"attention": 1.0, "hidden": 1.0, "soft": 1.0, "hard": 1.0}]
    assert stage_weights("tinybert") == [{"attention": 1.0, "hidden": 1.0}, {"soft": 1.0}]


def test_changed_weights():
    assert stage_weights("simplified", changed={"hard": 0.0}) == [{"attention": 1.0, "hidden": 1.0, "soft": 1.0}]
    assert stage_weights("tinybert", changed={"hard": 2.0, "hidden": 0.0}) == [
        {"attention": 1.0}, {"soft": 1.0, "hard": 2.0}]
    assert stage_weights("standard", 1.0) == [{"soft": 1.0, "hard": 0.0}]                  # alpha leaves nothing out
    assert stage_weights("finetune", changed={"soft": 0.5})[0] == {"soft": 0.5, "hard": 1.0}
    assert formula(stage_weights("standard", 0.25)[0]) == "0.25 × soft + 0.75 × hard"


@pytest.mark.parametrize("items", [["hard"], ["hard="], ["hard=x"], ["hard=-1"], ["hard=nan"], ["hard=inf"],
                                   ["att=1"], ["hard=1", "hard=2"]])
def test_wrong_weights(items):
    with pytest.raises(ValueError, match="expected term=weight"):
        parse_loss_weights(items)


@given(weights=st.dictionaries(st.sampled_from(["attention", "hidden", "soft", "hard"]), st.floats(0.125, 8),
                               min_size=1))
def test_the_loss_is_the_weighted_sum_of_its_terms(golden_models, weights):
    student, _ = load_cross_encoder(golden_models["student_2x24"], dtype=torch.float64)
    teacher, _ = load_cross_encoder(golden_models["teacher"], dtype=torch.float64)
    batch = Examples(np.arange(5, 35, dtype=np.uint16), np.array([10, 20], np.uint16), np.array([4, 5], np.uint16),
                     np.array([0, 1], np.int8)).batch(np.arange(2))
    single = {term: loss_terms(student, teacher, batch, {term: 1.0})["loss"].item() for term in weights}
    terms = loss_terms(student, teacher, batch, weights)
    assert terms["loss"].item() == pytest.approx(sum(weights[term] * single[term] for term in weights), rel=1e-9)
    assert terms["loss"].item() == pytest.approx(sum(
        terms[part].item() for part in ("att_loss", "rep_loss", "cls_loss") if part in terms), rel=1e-12)
    names = {"soft": "soft_loss", "hard": "hard_loss"}
    assert {name: terms[name].item() for term, name in names.items() if term in weights} == pytest.approx(
        {name: single[term] for term, name in names.items() if term in weights}, rel=1e-9)


# Two stages


@pytest.fixture
def train_features(tmp_path):
    return write_features(tmp_path / "train.pkl", random_rows(40))


def test_tinybert_has_two_stages(golden_models, train_features, tmp_path, run_here):
    printed = run_here(distill, *arguments(
        train_features, golden_models, tmp_path / "out", "--distill_model", "tinybert", "--intermediate_epochs", 2,
        "--intermediate_learning_rate", 2e-3, "--num_train_epochs", 1, *SMALL_STEPS))
    rows = log_of(tmp_path / "out")
    assert [row["global_step"] for row in rows] == list(range(1, 16))
    for row in rows[:10]:
        assert row["att_loss"] > 0 and row["rep_loss"] > 0
        assert row["loss"] == pytest.approx(row["att_loss"] + row["rep_loss"])
        assert row["soft_loss"] == row["hard_loss"] == row["cls_loss"] == 0
    for row in rows[10:]:
        assert row["loss"] == row["cls_loss"] == row["soft_loss"] > 0
        assert row["att_loss"] == row["rep_loss"] == row["hard_loss"] == 0
    assert [row["learning_rate"] for row in rows[:3]] == [0.0, 2e-3, pytest.approx(2e-3 * 8 / 9)]
    assert [row["learning_rate"] for row in rows[10:12]] == [0.0, pytest.approx(1e-3 * 0.8 / 0.9)]
    assert "stage 1 of 2\nobjective    1 × attention + 1 × hidden\nsteps        10 = 2 epochs" in printed
    assert "stage 2 of 2\nobjective    1 × soft (soft is a mean" in printed
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-0", "checkpoint-10"}


def test_the_first_stage_does_not_train_the_head_nor_the_second_the_projection(golden_models, train_features, tmp_path,
                                                                               run_here):
    out = tmp_path / "out"
    run_here(distill, *arguments(train_features, golden_models, out, "--distill_model", "tinybert", *SMALL_STEPS))
    start, middle, end = map(student_of, (out / "checkpoint-0", out / "checkpoint-10", out))
    for name in start:
        head, projection = name.startswith(("classifier.", "bert.pooler.")), name.startswith("fit_dense.")
        assert torch.equal(start[name], middle[name]) == head, name
        assert torch.equal(middle[name], end[name]) == projection, name


def test_the_second_stage_is_standard_kd_from_the_end_of_the_first(golden_models, train_features, tmp_path, run_here):
    """With a new optimizer and schedule, and the batches of any run with this seed."""
    out = tmp_path / "out"
    run_here(distill, *arguments(train_features, golden_models, out, "--distill_model", "tinybert", *SMALL_STEPS))
    run_here(distill, *arguments(train_features, golden_models | {"student_2x24": out / "checkpoint-10"},
                                 tmp_path / "second", "--distill_model", "standard", "--alpha", 1, *SMALL_STEPS))
    found, expected = (load_file(directory / "model.safetensors") for directory in (out, tmp_path / "second"))
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stop_after", [0, 6, 9, 10, 11, 14, 17, 19])
def test_two_stages_and_validation_resume_to_the_same_student(golden_models, train_features, tmp_path, run_here,
                                                              interrupted, stop_after):
    models = golden_models | {"student_2x24": with_dropout(golden_models["student_2x24"], tmp_path / "dropout")}
    more = ("--distill_model", "tinybert", "--loss_weights", "hard=1", "--save_model_step", 4, "--eval_step", 3,
            *dev_set(tmp_path), *SMALL_STEPS)
    run_here(distill, *arguments(train_features, models, tmp_path / "whole", *more))
    with interrupted(stop_after):
        run_here(distill, *arguments(train_features, models, tmp_path / "halves", *more))
    run_here(distill, *arguments(train_features, models, tmp_path / "halves", *more, "--resume"))
    for name in ("model.safetensors", "fit_dense.safetensors", "dev.jsonl", "best/model.safetensors"):
        assert (tmp_path / "halves" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert without_speed(tmp_path / "halves/train_loss.jsonl") == without_speed(tmp_path / "whole/train_loss.jsonl")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weights, complaint", [
    (["hard=no"], "expected term=weight"), (["attention=0", "hidden=0", "soft=0", "hard=0"], "set at least one")])
def test_refused_weights(golden_models, train_features, tmp_path, run_here, method, weights, complaint):
    with pytest.raises(UserError, match=complaint):
        run_here(distill, *arguments(train_features, golden_models, tmp_path / "out", "--distill_model", method,
                                     "--loss_weights", *weights))
    assert not (tmp_path / "out").exists()


def test_a_term_that_needs_a_teacher_asks_for_one(golden_models, train_features, tmp_path, run_here):
    call = ["--features_file", train_features, "--general_student_model", golden_models["student_2x24"],
            "--output_student_dir", tmp_path / "out", "--cache_file_dir", tmp_path / "cache", "--device", "cpu"]
    with pytest.raises(UserError, match="standard needs --teacher_model"):
        run_here(distill, *call, "--distill_model", "standard")
    with pytest.raises(UserError, match="finetune needs --teacher_model"):
        run_here(distill, *call, "--distill_model", "finetune", "--loss_weights", "soft=1")
    run_here(distill, *call, "--distill_model", "standard", "--loss_weights", "soft=0")
    assert log_of(tmp_path / "out")[-1]["soft_loss"] == 0


def test_flags_of_the_first_stage_without_one(golden_models, train_features, tmp_path):
    done = run_script("distill.py", *arguments(train_features, golden_models, tmp_path / "out",
                                               "--intermediate_epochs", 1))
    assert done.returncode == 2 and "are for --distill_model tinybert" in done.stderr
    assert not (tmp_path / "out").exists()


# Validation


def test_dev_measures_equal_those_of_the_scripts(golden_models, train_features, tmp_path, run_here):
    dev, out = dev_set(tmp_path), tmp_path / "out"
    printed = run_here(distill, *arguments(train_features, golden_models, out, *dev, "--eval_step", 4, *SMALL_STEPS))
    assert "1 of 4 dev queries are not judged" in printed
    rows = rows_of(out / "dev.jsonl")
    assert [row["global_step"] for row in rows] == [4, 8, 10]
    best = max(rows, key=lambda row: row["nDCG@10"])
    for directory, row in ((out, rows[-1]), (out / "best", best)):
        scores, run = tmp_path / f"{directory.name}.tsv", tmp_path / f"{directory.name}.trec"
        for call in (("reranker.py", *rerank_arguments(directory, dev[1], scores)),
                     ("convert_to_trec_results.py", "--scores_file", scores, "--output_results_file", run)):
            done = run_script(*call)
            assert done.returncode == 0, done.stderr
        done = run_script("msmarco_mrr_eval.py", dev[3], run, "--measures", "nDCG@10")
        printed_measures = dict(line.split(": ") for line in done.stdout.splitlines() if ": " in line)
        assert {name: float(printed_measures[name]) for name in ("nDCG@10", "MRR@10")} == pytest.approx(
            {name: row[name] for name in ("nDCG@10", "MRR@10")}, abs=1e-12)


def test_validation_does_not_change_the_student(golden_models, train_features, tmp_path, run_here):
    models = golden_models | {"student_2x24": with_dropout(golden_models["student_2x24"], tmp_path / "dropout")}
    for name, more in (("with", dev_set(tmp_path)), ("without", ())):
        run_here(distill, *arguments(train_features, models, tmp_path / name, *more, *SMALL_STEPS,
                                     *(["--eval_step", 1] if more else [])))
    for name in ("model.safetensors", "fit_dense.safetensors"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
    assert without_speed(tmp_path / "with/train_loss.jsonl") == without_speed(tmp_path / "without/train_loss.jsonl")
    assert not (tmp_path / "without" / "best").exists() and not (tmp_path / "without" / "dev.jsonl").exists()


def test_refused_dev_sets(golden_models, train_features, tmp_path, run_here):
    _, dev, _, qrels = dev_set(tmp_path)
    no_ids = write_features(tmp_path / "no_ids.pkl", [("1", *row[1:]) for row in random_rows(1)])
    (tmp_path / "other.txt").write_text("other 0 D1 1\n")
    (tmp_path / "zero.txt").write_text(re.sub(r"\d+$", "0", qrels.read_text(), flags=re.MULTILINE))
    long = write_features(tmp_path / "long.pkl", random_rows(8), max_seq_length=600)
    for more, message in (
            (["--dev_features_file", dev], "--dev_features_file needs --dev_qrels_file"),
            (["--dev_qrels_file", qrels], "--dev_qrels_file needs --dev_features_file"),
            (["--dev_features_file", no_ids, "--dev_qrels_file", qrels], "1 of 1 ids .* not query_id#passage_id"),
            (["--dev_features_file", dev, "--dev_qrels_file", tmp_path / "other.txt"], "other.txt: judges none"),
            (["--dev_features_file", dev, "--dev_qrels_file", tmp_path / "zero.txt"], "zero.txt: has no document with"),
            (["--dev_features_file", dev, "--dev_qrels_file", tmp_path / "no"], f"{tmp_path / 'no'}: cannot read"),
            (["--dev_features_file", long, "--dev_qrels_file", qrels], "600, but the student has 64 positions"),
            (["--dev_features_file", dev, "--dev_qrels_file", qrels, "--loss_weights", "soft=0", "hard=0"],
             "--dev_features_file: .*soft=0 hard=0"),
            (["--eval_step", 0], "--eval_step 0: expected 1 or more")):
        with pytest.raises(UserError, match=message):
            run_here(distill, *arguments(train_features, golden_models, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_dev_features_of_another_vocabulary(golden_models, train_features, tmp_path, run_here):
    other = shutil.copytree(golden_models["student_2x24"], tmp_path / "other")
    (other / "vocab.txt").write_text((other / "vocab.txt").read_text().replace("w100", "v100"))
    (tmp_path / "pairs.tsv").write_text(f"q0#D1_0\t{words([7])}\t{words([8, 9])}\n")
    _, _, _, qrels = dev_set(tmp_path)
    done = run_script("tokenize_to_features.py", "--set_name", "dev", "--raw_data_file", tmp_path / "pairs.tsv",
                      "--output_features_file", tmp_path / "dev.pkl", "--bert_model_dir", other)
    assert done.returncode == 0, done.stderr
    with pytest.raises(UserError, match="--dev_features_file: .* a different vocabulary"):
        run_here(distill, *arguments(train_features, golden_models, tmp_path / "out", "--dev_features_file",
                                     tmp_path / "dev.pkl", "--dev_qrels_file", qrels))
