"""general_distill.py: segments of text, starting points of students, output for distill.py, input errors."""
import gzip
import json

import numpy as np
import pytest
import torch
from conftest import loss_terms, random_rows, run_script, tiny_vocabulary, vocabulary, words, write_features
from helpers.training import SHAPE, log_of, torchrun, with_dropout
from helpers.training import arguments as distill_arguments
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModel

import distill
import general_distill
from simplified_tinybert.common.files import Problems, UserError
from simplified_tinybert.data.corpus import COLUMNS, check_corpus, documents, map_corpus, segments
from simplified_tinybert.model.pretrained import load_cross_encoder
from simplified_tinybert.tokenization.pairs import CachedTokenizer


@pytest.fixture
def corpus(tmp_path):
    random = np.random.default_rng(0)
    path = tmp_path / "corpus.txt"
    path.write_text("".join(words(random.integers(5, 200, random.integers(1, 60))) + "\n" for _ in range(60)))
    (tmp_path / "student.json").write_text(json.dumps(SHAPE))
    return path


def arguments(corpus, models, name, *more, shape=None):
    directory = corpus.parent
    return ["--corpus", corpus, "--teacher_model", models["teacher"], "--output_student_dir", directory / name,
            "--cache_file_dir", directory / "cache", "--device", "cpu", "--max_seq_length", 16,
            "--train_batch_size", 16, "--learning_rate", 1e-3, "--train_loss_step", 1,
            *(shape or ["--student_config", directory / "student.json"]), *more]


# Text


def test_documents_of_lines_and_paragraphs(tmp_path):
    (tmp_path / "a").write_text("one\n\n  \ntwo words\nthree")
    (tmp_path / "b.gz").write_bytes(gzip.compress("\ufeffvier\nfünf\n\n\nsechs\n".encode()))
    paths = [tmp_path / "a", tmp_path / "b.gz"]
    assert list(documents(paths, "lines", Problems())) == ["one", "two words", "three", "vier", "fünf", "sechs"]
    assert list(documents(paths, "paragraphs", Problems())) == ["one", "two words three", "vier fünf", "sechs"]


@pytest.mark.parametrize("packed", [False, True])
def test_documents_of_columns_are_title_and_body(tmp_path, packed):
    """Two columns or four, as for prepare_examples.py. The same text has the same checksum."""
    two, four = "D1\tone two\n\ufeffD2\t \nD3\tthree", "D1\tu\tone\ttwo\nD2\tu\t\t\nD3\tu\t\tthree\r\n"
    checksums = set()
    for name, text in (("two", two), ("four", four)):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if packed else text.encode())
        assert list(documents([tmp_path / name], COLUMNS, Problems())) == ["one two", "three"]
        checksums.add(check_corpus([tmp_path / name], COLUMNS, Problems()))
    assert len(checksums) == 1


@pytest.mark.parametrize("content, message", [
    (b"D1\tone\nD2\tu\tt\tbody\n", "docs:2: found 4 tab-separated columns"), (b"D1\tu\tx\n", "docs:1: found 3"),
    (b"D 1\tone\n", "docs:1: found document id 'D 1'"), (b"D1\tna\xefve\n", "docs:1: byte 6"),
    (b"D1\t \n", "no text in the corpus"), (gzip.compress(b"D1\tone\n" * 99, mtime=0)[:-9], "the gzip file is damaged"),
    ("D1\tone\n".encode("utf-16"), "is in UTF-16"), (b"", "no text in the corpus")])
def test_wrong_documents_are_refused(tmp_path, content, message):
    (tmp_path / "docs").write_bytes(content)
    problems = Problems()
    check_corpus([tmp_path / "docs"], COLUMNS, problems)
    assert len(problems.messages) == 1 and message in problems.messages[0], problems.messages


def test_columns_give_the_same_student_as_lines(golden_models, corpus, tmp_path, run_here):
    texts = corpus.read_text().splitlines()
    (tmp_path / "docs.tsv").write_text("".join(f"D{number}\t{text}\n" for number, text in enumerate(texts)))
    run_here(general_distill, *arguments(corpus, golden_models, "lines", "--num_train_epochs", 1))
    flags = ["--docs", tmp_path / "docs.tsv", *arguments(corpus, golden_models, "columns", "--num_train_epochs", 1)[2:]]
    run_here(general_distill, *flags)
    assert (tmp_path / "lines" / "model.safetensors").read_bytes() == (
        tmp_path / "columns" / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "columns" / "run.json").read_text())["settings"]["documents"] == COLUMNS
    assert "already finished" in run_here(general_distill, *flags, "--resume")
    with pytest.raises(UserError, match="documents was columns, is lines"):
        run_here(general_distill, *arguments(corpus, golden_models, "columns", "--num_train_epochs", 1, "--resume"))


def test_segments_by_hand():
    texts = [words(range(5, 18)), words([20]), " \t", words(range(30, 36))]
    examples = segments(texts, CachedTokenizer(vocabulary(), 8))
    found = [examples.tokens[start:end].tolist() for start, end in zip(examples.offsets, examples.offsets[1:])]
    assert found == [[2, 5, 6, 7, 8, 9, 10, 3], [2, 11, 12, 13, 14, 15, 16, 3], [2, 17, 3], [2, 20, 3],
                     [2, 30, 31, 32, 33, 34, 35, 3]]
    batch = examples.batch(np.array([0, 2]))
    assert batch.token_type_ids.sum() == 0 and batch.attention_mask.tolist() == [[1] * 8, [1] * 3 + [0] * 5]
    assert (examples.labels == -1).all()


@given(texts=st.lists(st.text(alphabet=" \tw1234.,;Σσ\u00a0é", max_size=80), max_size=5), length=st.integers(8, 20))
def test_segments_contain_all_tokens_of_each_text_in_order(texts, length):
    examples = segments(texts, CachedTokenizer(vocabulary(), length))
    tokenizer, expected = vocabulary().tokenizer(), []
    for text in texts:
        ids = tokenizer.encode(text.lower() if "Σ" in text else text, add_special_tokens=False).ids
        expected += [[2, *ids[start:start + length - 2], 3] for start in range(0, len(ids), length - 2)]
    assert expected == [examples.tokens[start:end].tolist()
                        for start, end in zip(examples.offsets, examples.offsets[1:])]


def test_the_corpus_is_cached_and_does_not_depend_on_the_number_of_workers(tmp_path, monkeypatch):
    path = tmp_path / "corpus.txt"
    random = np.random.default_rng(0)
    path.write_text("".join(words(random.integers(5, 200, 400)) + "\n" for _ in range(1200)))
    assert path.stat().st_size > 2 ** 20                # enough for several workers
    first = map_corpus([path], "lines", vocabulary(), 16, "content", tmp_path / "cache")
    monkeypatch.setattr("simplified_tinybert.data.corpus.default_workers", lambda: 1)
    second = map_corpus([path], "lines", vocabulary(), 16, "content", tmp_path / "other")
    assert np.array_equal(first.tokens, second.tokens) and np.array_equal(first.lengths, second.lengths)
    path.write_text("")                                 # must not be read again
    again = map_corpus([path], "lines", vocabulary(), 16, "content", tmp_path / "cache")
    assert np.array_equal(first.tokens, again.tokens) and len(again) == 1200 * 29
    with pytest.raises(UserError, match="no tokens"):
        map_corpus([path], "paragraphs", vocabulary(), 16, "content", tmp_path / "cache")   # has its own cache


# Students


def test_distill_takes_the_general_student(golden_models, corpus, tmp_path, run_here):
    printed = run_here(general_distill, *arguments(corpus, golden_models, "general", "--num_train_epochs", 6))
    out, rows = tmp_path / "general", log_of(tmp_path / "general")
    assert "2 layers, hidden size 24, 4 heads" in printed and "1 × attention + 1 × hidden\n" in printed
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert all(row["cls_loss"] == 0 and row["loss"] == pytest.approx(row["att_loss"] + row["rep_loss"]) for row in rows)
    weights = load_file(out / "model.safetensors")
    assert not any(name.startswith("classifier.") for name in weights) and "bert.pooler.dense.weight" in weights
    assert load_file(out / "fit_dense.safetensors")["fit_dense.weight"].shape == (48, 24)
    _, loading = AutoModel.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values()), loading
    assert (out / "vocab.txt").read_text().split("\n")[:200] == tiny_vocabulary()

    features = write_features(tmp_path / "train.pkl", random_rows(16))
    call = distill_arguments(features, golden_models | {"student_2x24": out}, tmp_path / "student")
    printed = run_here(distill, *call)
    assert "newly initialised: classifier.bias, classifier.weight" in printed and "fit_dense, " not in printed
    assert (tmp_path / "student" / "model.safetensors").is_file()


def test_the_loss_is_attention_and_hidden_of_the_simplified_objective(golden_models, corpus, tmp_path, run_here):
    """The first step uses checkpoint-0, and the whole corpus is one batch."""
    run_here(general_distill, *arguments(corpus, golden_models, "out", "--train_batch_size", 4096))
    student, _ = load_cross_encoder(tmp_path / "out" / "checkpoint-0", new_head=torch.Generator())
    teacher, _ = load_cross_encoder(golden_models["teacher"])
    examples = segments(corpus.read_text().splitlines(), CachedTokenizer(vocabulary(), 16))
    batch = examples.batch(np.arange(len(examples)), 16)
    terms = loss_terms(student, teacher, batch, {"attention": 1.0, "hidden": 1.0})
    row = log_of(tmp_path / "out")[0]
    assert (row["att_loss"], row["rep_loss"]) == pytest.approx(
        (terms["att_loss"].item(), terms["rep_loss"].item()), rel=1e-4)


def test_init_from_teacher_copies_every_second_layer(golden_models, corpus, tmp_path, run_here):
    run_here(general_distill, *arguments(corpus, golden_models, "out", "--init_from_teacher", "--num_train_epochs", 0,
                                         shape=["--student_layers", 2]))
    student, teacher = load_file(tmp_path / "out/model.safetensors"), load_file(golden_models["teacher"] /
                                                                                "model.safetensors")
    for name, tensor in student.items():
        source = name.replace("layer.1.", "layer.3.").replace("layer.0.", "layer.1.")
        assert torch.equal(tensor, teacher[source].float()), name
    assert json.loads((tmp_path / "out/config.json").read_text())["num_hidden_layers"] == 2
    assert not (tmp_path / "out" / "train_loss.jsonl").exists()


def test_init_from_teacher_with_all_layers_copies_the_teacher(golden_models, corpus, tmp_path, run_here):
    run_here(general_distill, *arguments(corpus, golden_models, "out", "--init_from_teacher", shape=["--student_layers",
                                                                                                     4]))
    assert log_of(tmp_path / "out")[0]["att_loss"] == pytest.approx(0, abs=1e-9)


def test_a_compressed_teacher_starts_with_a_smaller_loss(golden_models, corpus, tmp_path, run_here):
    """On the same first batch, compared with the teacher's layers and, for a smaller hidden size, random weights."""
    first = {}
    for name, shape, start in (("random", None, ()), ("narrow", None, ("--compress_teacher",)),
                               ("layers", ["--student_layers", 2], ("--init_from_teacher",)),
                               ("half", ["--student_layers", 2], ("--compress_teacher",))):
        run_here(general_distill, *arguments(corpus, golden_models, name, *start, shape=shape))
        first[name] = log_of(tmp_path / name)[0]
    assert first["half"]["loss"] < 0.5 * first["layers"]["loss"]
    assert first["narrow"]["loss"] < 0.5 * first["random"]["loss"]


@pytest.mark.parametrize("stop_after", [0, 3, 7])
def test_an_interrupted_run_resumes_to_the_same_student(golden_models, corpus, tmp_path, run_here, interrupted,
                                                        stop_after):
    models = golden_models | {"teacher": with_dropout(golden_models["teacher"], tmp_path / "dropout")}
    more = ("--save_model_step", 2, "--num_train_epochs", 1)
    shape = ["--student_layers", 2]
    run_here(general_distill, *arguments(corpus, models, "whole", *more, shape=shape))
    with interrupted(stop_after):
        run_here(general_distill, *arguments(corpus, models, "halves", *more, shape=shape))
    run_here(general_distill, *arguments(corpus, models, "halves", *more, "--resume", shape=shape))
    for name in ("model.safetensors", "fit_dense.safetensors"):
        assert (tmp_path / "halves" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [row["loss"] for row in log_of(tmp_path / "halves")] == [row["loss"] for row in log_of(tmp_path / "whole")]
    corpus.write_text(corpus.read_text() + "w7\n")
    with pytest.raises(UserError, match="corpus was"):
        run_here(general_distill, *arguments(corpus, models, "halves", *more, "--resume", shape=shape))


@pytest.mark.slow
def test_two_processes_give_the_same_student(golden_models, corpus, tmp_path):
    for processes, name in ((1, "one"), (2, "two")):
        more = arguments(corpus, golden_models, name, "--num_train_epochs", 1)
        done = torchrun(2, "general_distill.py", *more) if processes == 2 else run_script("general_distill.py", *more)
        assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-6)


# Refusals


def test_all_problems_at_once(golden_models, corpus, tmp_path):
    (tmp_path / "student.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": 3, "num_attention_heads": 3,
                                                               "vocab_size": 100}))
    done = run_script("general_distill.py", *arguments(
        tmp_path / "none.txt", golden_models, "out", "--init_from_teacher", "--max_seq_length", 65,
        "--learning_rate", -1, "--seed", -1))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for message in ("none.txt", "4 layers cannot be mapped evenly", "4 attention heads, the student 3",
                    "vocab_size is 100, but the teacher's is 200", "--max_seq_length 65: the student has 64",
                    "--learning_rate -1.0: ", "--seed -1: ", "--init_from_teacher: ",
                    "vocab_size is 100, not 200; hidden_size is 24, not 48"):
        assert message in done.stderr, message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes, message", [
    ({"hidden_size": 96, "intermediate_size": 300}, "the student's hidden_size is 96, the teacher's 48"),
    ({"intermediate_size": 300}, "the student's intermediate_size is 300, the teacher's 96"),
    ({"max_position_embeddings": 32}, "max_position_embeddings is 32, not 64")])
def test_shapes_that_cannot_be_compressed(golden_models, corpus, tmp_path, run_here, changes, message):
    (tmp_path / "student.json").write_text(json.dumps(SHAPE | changes))
    with pytest.raises(UserError) as raised:
        run_here(general_distill, *arguments(corpus, golden_models, "out", "--compress_teacher"))
    assert message in str(raised.value)


@pytest.mark.parametrize("content, message", [
    (b"", "no text in the corpus"), (b"\n \n", "no text in the corpus"), (b"w7\n\xff\n", "is not UTF-8"),
    ("\u0001\n".encode(), "no tokens")])
def test_refused_corpora(golden_models, corpus, tmp_path, run_here, content, message):
    corpus.write_bytes(content)
    with pytest.raises(UserError, match=message):
        run_here(general_distill, *arguments(corpus, golden_models, "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [["--student_layers", 0], ["--student_layers", 3]])
def test_refused_depths(golden_models, corpus, run_here, shape):
    with pytest.raises(UserError, match="layers"):
        run_here(general_distill, *arguments(corpus, golden_models, "out", shape=shape))


def test_a_file_in_place_of_the_cache_is_refused(golden_models, corpus, tmp_path):
    (tmp_path / "cache").write_text("not a directory")
    done = run_script("general_distill.py", *arguments(corpus, golden_models, "out"))
    assert done.returncode == 2 and str(tmp_path / "cache") in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "cache").read_text() == "not a directory"
