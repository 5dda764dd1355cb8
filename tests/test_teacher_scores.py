"""Students of a score file: --teacher_scores_file, and score files that reranker.py writes for training examples."""
import gzip
import math

import numpy as np
import pytest
from conftest import random_rows, write_features
from helpers.reranking import arguments as rerank_arguments
from helpers.training import arguments, log_of, student_of

import distill
import reranker
from simplified_tinybert.common.files import Problems, UserError
from simplified_tinybert.data.features import summarise
from simplified_tinybert.ranking.teacher_scores import read_teacher_scores

ROWS = [(str(number), *row[1:]) for number, row in enumerate(random_rows(30))]


@pytest.fixture
def train(tmp_path):
    return write_features(tmp_path / "train.pkl", ROWS)


@pytest.fixture
def scores(golden_models, train, tmp_path, run_here):
    """The golden teacher's log-odds for the examples, as reranker.py writes them."""
    run_here(reranker, *rerank_arguments(golden_models["teacher"], train, tmp_path / "scores.tsv", "--score",
                                         "log_odds"))
    return tmp_path / "scores.tsv"


def read(files, features, kind="log_odds"):
    problems = Problems()
    found = read_teacher_scores(files, kind, summarise(features, problems), problems)
    return found, problems.messages


def alone(call):
    """Remove the teacher model from the arguments of distill.py."""
    place = call.index("--teacher_model")
    return call[:place] + call[place + 2:]


def test_reranker_writes_the_ids_of_examples_unsplit(scores):
    rows = [line.split("\t") for line in scores.read_text().splitlines()]
    assert [row[0] for row in rows] == [row[0] for row in ROWS] and all(len(row) == 2 for row in rows)


@pytest.mark.parametrize("flags", [["--distill_model", "standard"], ["--distill_model", "simplified"],
                                   ["--distill_model", "finetune", "--loss_weights", "soft=1"]])
def test_scores_of_the_teacher_teach_what_the_teacher_teaches(golden_models, train, scores, tmp_path, run_here, flags):
    more = [*flags, "--train_loss_step", 1, "--train_batch_size", 10, "--learning_rate", 1e-3, "--temperature", 2]
    run_here(distill, *arguments(train, golden_models, tmp_path / "model", *more))
    call = arguments(train, golden_models, tmp_path / "file", *more, "--teacher_scores_file", scores)
    run_here(distill, *(call if "simplified" in flags else alone(call)))
    one, two = log_of(tmp_path / "model"), log_of(tmp_path / "file")
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-6) and two[0]["soft_loss"] > 0
    first, second = student_of(tmp_path / "model"), student_of(tmp_path / "file")
    for name, tensor in first.items():
        assert (tensor - second[name]).norm() <= 1e-4 * tensor.norm(), name



def test_the_order_of_lines_gzip_and_probabilities_change_nothing(train, scores, tmp_path):
    expected, messages = read([scores], [train])
    assert not messages and expected.dtype == np.float32
    lines = scores.read_text().splitlines()
    assert expected.tolist() == pytest.approx([float(line.split("\t")[1]) for line in lines], rel=1e-6)
    (tmp_path / "other.gz").write_bytes(gzip.compress("\n".join(sorted(lines, reverse=True)).encode()))
    np.testing.assert_array_equal(read([tmp_path / "other.gz"], [train])[0], expected)
    probabilities = [f"{name}\t{1 / (1 + math.exp(-float(text)))!r}" for name, text in
                     (line.split("\t") for line in lines)]
    (tmp_path / "probabilities.tsv").write_text("\n".join(probabilities) + "\n")
    np.testing.assert_allclose(read([tmp_path / "probabilities.tsv"], [train], "probability")[0], expected, rtol=1e-5)


def test_an_ensemble_is_the_mean_of_the_log_odds(train, tmp_path):
    for number, value in enumerate((1.0, 2.0, 6.0)):
        (tmp_path / f"{number}.tsv").write_text("".join(f"{row[0]}\t{value}\n" for row in ROWS))
    found, messages = read([tmp_path / f"{number}.tsv" for number in range(3)], [train])
    assert not messages and found.tolist() == [3.0] * len(ROWS)


def test_ids_are_found_in_several_feature_files(tmp_path):
    files = [write_features(tmp_path / f"{part}.pkl", ROWS[part::2]) for part in (0, 1)]
    (tmp_path / "scores.tsv").write_text("".join(f"{row[0]}\t{row[0]}.5\n" for row in ROWS))
    assert read([tmp_path / "scores.tsv"], files)[0].tolist() == [int(row[0]) + 0.5 for row in ROWS[::2] + ROWS[1::2]]


@pytest.mark.parametrize("change, kind, expected", [
    (lambda lines: lines[:-2], "log_odds", ["has no score for 2 of 30 examples: 28, 29"]),
    (lambda lines: [*lines, lines[3]], "log_odds", [":31: example '3': has a second score"]),
    (lambda lines: [*lines, "99\t1.0", "100\t1.0"], "log_odds", [":31: example '99': is not in the feature files",
                                                                 ":32: example '100': is not in"]),
    (lambda lines: ["0\t1e39", *lines[1:]], "log_odds", [":1: example '0': score '1e39': expected a finite number"]),
    (lambda lines: ["0\tnan", *lines[1:]], "log_odds", [":1: example '0': score 'nan': expected a finite number"]),
    (lambda lines: ["0\t1.0", *lines[1:]], "probability", [":1: example '0': score '1.0': expected a probability"]),
    (lambda lines: ["0\t0", *lines[1:]], "probability", [":1: example '0': score '0': expected a probability"]),
    (lambda lines: ["q\tp\t0.5", *lines[1:]], "log_odds", [":1: found 3 columns, expected 2"])])
def test_bad_score_files(train, tmp_path, change, kind, expected):
    lines = change([f"{row[0]}\t0.5" for row in ROWS])
    (tmp_path / "scores.tsv").write_text("\n".join(lines) + "\n")
    found, messages = read([tmp_path / "scores.tsv"], [train], kind)
    assert found is None
    for text in expected:
        assert any(text in message for message in messages), messages


def test_a_file_given_twice_is_no_ensemble(train, tmp_path):
    (tmp_path / "scores.tsv").write_text("".join(f"{row[0]}\t0.5\n" for row in ROWS))
    found, messages = read([tmp_path / "scores.tsv"] * 2, [train])
    assert found is None and "names a file twice" in messages[0]


def test_probabilities_taken_for_log_odds_are_warned_of(train, tmp_path, capsys):
    (tmp_path / "scores.tsv").write_text("".join(f"{row[0]}\t0.{row[0]}\n" for row in ROWS))
    read([tmp_path / "scores.tsv"], [train])
    assert "add --teacher_scores probability" in capsys.readouterr().err


def test_repeated_ids_of_feature_files_are_explained(tmp_path, train):
    other = write_features(tmp_path / "other.pkl", ROWS[:3])
    (tmp_path / "scores.tsv").write_text("".join(f"{row[0]}\t0.5\n" for row in ROWS))
    found, messages = read([tmp_path / "scores.tsv"], [train, other])
    assert found is None and len(messages) == 1
    assert "3 ids occur more than once in the feature files (0, 1, 2)" in messages[0] and "NR - 1" in messages[0]


@pytest.mark.parametrize("flags, expected", [
    (["--distill_model", "simplified"], "needs --teacher_model for its attention and hidden terms"),
    (["--distill_model", "finetune"], "--distill_model finetune uses no soft labels")])
def test_flags_that_do_not_fit(golden_models, train, scores, tmp_path, run_here, flags, expected):
    call = arguments(train, golden_models, tmp_path / "out", *flags, "--teacher_scores_file", scores)
    with pytest.raises(UserError, match=expected):
        run_here(distill, *alone(call))


def test_scores_worse_than_chance_are_warned_of(golden_models, train, tmp_path, run_here):
    (tmp_path / "scores.tsv").write_text("".join(f"{row[0]}\t{-row[3]}\n" for row in ROWS))
    call = arguments(train, golden_models, tmp_path / "out", "--distill_model", "standard", "--num_train_epochs", 0.1,
                     "--teacher_scores_file", tmp_path / "scores.tsv")
    assert "worse than chance" in run_here(distill, *alone(call))


def test_other_scores_cannot_resume_a_run(golden_models, train, scores, tmp_path, run_here, interrupted):
    call = alone(arguments(train, golden_models, tmp_path / "out", "--distill_model", "standard", "--train_batch_size",
                           10, "--teacher_scores_file", scores))
    with interrupted(2):
        run_here(distill, *call)
    whole = scores.read_text()
    scores.write_text("0\t9.5\n" + whole.split("\n", 1)[1])
    with pytest.raises(UserError, match="other settings .*teacher_scores was"):
        run_here(distill, *call, "--resume")
    scores.write_text(whole)
    run_here(distill, *call, "--resume")
