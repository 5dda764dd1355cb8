"""Ranking losses and batches of whole queries: independent computations, resuming, several processes."""
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, random_rows, write_features
from helpers.training import arguments, assert_same_student, log_of, torchrun, with_dropout
from hypothesis import given, settings
from hypothesis import strategies as st

import distill
from simplified_tinybert.common.files import UserError
from simplified_tinybert.common.processes import Processes
from simplified_tinybert.data.features import Examples, read_chunks
from simplified_tinybert.training.batches import check_queries, number_queries, query_batches
from simplified_tinybert.training.losses import listwise_loss, margin_loss

groups = st.lists(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9), st.integers(0, 1)), min_size=1, max_size=5),
                  min_size=1, max_size=4)


def tensors(drawn):
    rows = [(number, *passage) for number, group in enumerate(drawn) for passage in group]
    queries, student, teacher, labels = zip(*rows)
    return (torch.tensor(student, dtype=torch.float64, requires_grad=True), torch.tensor(teacher, dtype=torch.float64),
            torch.tensor(labels), torch.tensor(queries))


@settings(max_examples=100, deadline=None)
@given(groups)
def test_margin_loss_is_a_mean_over_the_pairs(drawn):
    student, teacher, labels, queries = tensors(drawn)
    expected = [((s - s2) - (t - t2)) ** 2 for group in drawn for s, t, relevant in group if relevant
                for s2, t2, other in group if not other]
    loss = margin_loss(student, teacher, labels, queries)
    assert loss.item() == pytest.approx(sum(expected) / max(1, len(expected)), rel=1e-9, abs=1e-12)
    assert torch.autograd.gradcheck(lambda scores: margin_loss(scores, teacher, labels, queries), student)


@settings(max_examples=100, deadline=None)
@given(groups, st.sampled_from([0.5, 1.0, 3.0]))
def test_listwise_loss_is_a_mean_over_the_queries(drawn, temperature):
    student, teacher, labels, queries = tensors(drawn)

    def softmax(values):
        powers = [math.exp(value / temperature) for value in values]
        return [power / sum(powers) for power in powers]
    expected = 0.0
    for group in drawn:
        ours, theirs = softmax([passage[0] for passage in group]), softmax([passage[1] for passage in group])
        expected += sum(t * math.log(t / s) for s, t in zip(ours, theirs, strict=True)) / len(drawn)
    loss = listwise_loss(student, teacher, queries, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-10)
    assert torch.autograd.gradcheck(lambda scores: listwise_loss(scores, teacher, queries, temperature), student)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(2, 5), st.integers(1, 4), st.integers(0, 99))
def test_batches_hold_whole_queries(sizes, examples_of_each, per_batch, seed):
    """Every query once in an epoch, with as many examples as it may have, and drawn anew in the next epoch."""
    queries = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    batches = query_batches(queries, examples_of_each, per_batch, np.random.default_rng([seed, 0]))
    assert len(batches) == -(-len(sizes) // per_batch)
    seen = []
    for batch in batches:
        numbers, counts = np.unique(queries[batch], return_counts=True)
        assert len(set(batch.tolist())) == len(batch) and len(numbers) <= per_batch
        assert counts.tolist() == [min(sizes[number], examples_of_each) for number in numbers]
        seen += numbers.tolist()
    assert sorted(seen) == list(range(len(sizes)))
    again = query_batches(queries, examples_of_each, per_batch, np.random.default_rng([seed, 0]))
    assert all(np.array_equal(*pair) for pair in zip(batches, again, strict=True))


def test_passages_are_drawn_anew_in_each_epoch():
    """Of 100 queries with 8 passages, 4 are drawn: of each passage, about half of the epochs."""
    queries, counts = np.repeat(np.arange(100), 8), np.zeros(800)
    for epoch in range(20):
        for batch in query_batches(queries, 4, 10, np.random.default_rng([1, epoch])):
            counts[batch] += 1
    assert counts.mean() == 10.0 and 0 < counts.min() and counts.max() < 20


def test_numbers_of_queries_are_the_same_in_each_process(train):
    """Python's own hashes are not."""
    code = ("import sys\nfrom simplified_tinybert.data.features import read_chunks\n"
            "from simplified_tinybert.training.batches import number_queries\n"
            "print(number_queries(next(read_chunks(sys.argv[1])), 64).tolist())")
    printed = {subprocess.run([sys.executable, "-c", code, str(train)], capture_output=True, text=True, check=True,
                              env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}).stdout
               for seed in ("1", "2")}
    assert len(printed) == 1


def test_a_truncated_query_is_still_one_query():
    """Truncation leaves a long query more or less tokens, depending on the passage."""
    tokens = [[2, *range(10, 10 + length), 3, *range(50, 50 + 26 - length), 3] for length in (14, 20)]
    examples = Examples(np.concatenate(tokens).astype(np.uint16), np.array([29, 29], np.uint16),
                        np.array([16, 22], np.uint16), np.array([0, 1], np.int8))
    assert number_queries(examples, 29).tolist() == [0, 0]


@pytest.mark.parametrize("term, labels, expected", [("margin", [1, 1, 0], "no query has examples with both labels"),
                                                    ("listwise", [0, 1, 0], "every query has a single example")])
def test_ranking_terms_without_anything_to_compare(term, labels, expected):
    queries = np.array([0, 0, 1] if term == "margin" else [0, 1, 2])
    with pytest.raises(UserError, match=expected):
        check_queries(queries, np.array(labels, np.int8), {term: 1.0})
    check_queries(np.array([0, 0, 0]), np.array([1, 0, 0], np.int8), {term: 1.0})


def grouped_rows(queries, of_each):
    """Rows in which the examples of a query have the same tokens in the first segment; labels alternate."""
    rows = []
    for query, (_, first, end, _) in enumerate(random_rows(queries, 20, seed=5)):
        for _, tokens, query_length, label in random_rows(of_each + query % 2, 20, seed=query):
            rows.append((str(len(rows)), [*first[:end], *tokens[query_length:]], end, label))
    return rows


@pytest.fixture
def train(tmp_path):
    return write_features(tmp_path / "train.pkl", grouped_rows(9, 5), max_seq_length=64)


def test_queries_are_known_by_their_tokens(train):
    numbers = number_queries(next(read_chunks(train)), 64)
    expected = [query for query in range(9) for _ in range(5 + query % 2)]
    assert len(set(zip(numbers.tolist(), expected, strict=True))) == len(set(expected)) == 9


@pytest.mark.parametrize("count", [2, 3, 5])
def test_shares_of_several_processes_add_up_and_keep_queries_together(train, count):
    examples = next(read_chunks(train))
    queries = number_queries(examples, 64)
    for batch in query_batches(queries, 4, 2, np.random.default_rng(0)):
        parts = [Processes(rank, rank, count).share(batch, examples, queries) for rank in range(count)]
        weighted = [own for own, share in parts if share["queries"]]
        assert sorted(np.concatenate(weighted).tolist()) == sorted(batch.tolist())
        assert sum(len(set(queries[own].tolist())) for own in weighted) == len(set(queries[batch].tolist()))
        for name in ("examples", "tokens", "pairs", "queries", "margins"):
            assert sum(share[name] for _, share in parts) == pytest.approx(1.0)


RANKING = ["--loss_weights", "margin=0.5", "listwise=2", "--group_by_query", 4, "--train_batch_size", 8,
           "--learning_rate", 1e-3, "--train_loss_step", 1]


def test_ranking_losses_on_the_command_line(golden_models, train, tmp_path, run_here, interrupted):
    """Simplified TinyBERT with both; resumed after an interruption, to the bit, with dropout."""
    random = golden_models | {"student_2x24": with_dropout(golden_models["student_2x24"], tmp_path / "dropout")}
    printed = run_here(distill, *arguments(train, random, tmp_path / "whole", *RANKING))
    assert "queries      9, up to 4 examples of each in a batch" in printed and "10 = 2 epochs × 5 steps" in printed
    rows = log_of(tmp_path / "whole")
    assert all(row["margin_loss"] > 0 and row["listwise_loss"] > 0 for row in rows)
    for row in rows:
        parts = row["soft_loss"] + row["hard_loss"] + 0.5 * row["margin_loss"] + 2 * row["listwise_loss"]
        assert row["cls_loss"] == pytest.approx(parts, rel=1e-5)
        assert row["loss"] == pytest.approx(row["cls_loss"] + row["att_loss"] + row["rep_loss"], rel=1e-5)
    call = arguments(train, random, tmp_path / "halves", *RANKING, "--save_model_step", 3)
    with interrupted(7):
        run_here(distill, *call)
    run_here(distill, *call, "--resume")
    assert (tmp_path / "halves/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


@pytest.mark.slow
def test_ranking_losses_in_several_processes(golden_models, train, tmp_path, run_here):
    run_here(distill, *arguments(train, golden_models, tmp_path / "one", *RANKING))
    done = torchrun(2, "distill.py", *arguments(train, golden_models, tmp_path / "two", *RANKING))
    assert done.returncode == 0, done.stderr
    assert_same_student(tmp_path / "one", tmp_path / "two")


def test_other_losses_are_those_of_other_batches(golden_models, train, tmp_path, run_here):
    """--group_by_query alone changes which examples share a batch; there are no columns of ranking losses."""
    run_here(distill, *arguments(train, golden_models, tmp_path / "out", "--distill_model", "standard", "--padding",
                                 "masked", *RANKING[3:]))
    assert all("margin_loss" not in row for row in log_of(tmp_path / "out"))


@pytest.mark.parametrize("flags, expected", [
    (["--loss_weights", "margin=1"], "margin compare the passages of a query; add --group_by_query"),
    (["--group_by_query", 3, "--train_batch_size", 8], "expected a multiple of --group_by_query 3"),
    (["--group_by_query", 1], "--group_by_query 1: expected 2 to --train_batch_size"),
    (["--group_by_query", 16, "--train_batch_size", 8], "--group_by_query 16: expected 2 to --train_batch_size")])
def test_flags_that_do_not_fit(golden_models, train, tmp_path, run_here, flags, expected):
    with pytest.raises(UserError, match=expected):
        run_here(distill, *arguments(train, golden_models, tmp_path / "out", *flags))


def test_a_group_without_both_labels_has_no_margin():
    queries, labels = torch.tensor([0, 0, 1, 1]), torch.tensor([1, 1, 0, 0])
    assert margin_loss(torch.randn(4), torch.randn(4), labels, queries).item() == 0.0
