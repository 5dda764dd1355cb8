"""The built-in example: its collection and its committed models."""
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from safetensors.torch import load_file

from examples import build_collection, docstring_collection, docstrings
from simplified_tinybert.common.files import Problems
from simplified_tinybert.model.batch import Batch
from simplified_tinybert.model.pretrained import load_cross_encoder, read_config
from simplified_tinybert.ranking.trec import read_qrels, read_run
from simplified_tinybert.tokenization.tokenizer_files import load_vocabulary
from tokenize_to_features import check_pairs

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The collection's directory, and what its script printed."""
    directory = tmp_path_factory.mktemp("collection")
    done = run_script("examples.build_collection", "--output_dir", directory)
    assert done.returncode == 0, done.stderr
    return directory, done


@pytest.fixture(scope="module")
def collection(built):
    return built[0]


def table(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_collection_is_the_same_everywhere(built):
    """The script compares its bytes with checksums.json; requirements.txt pins the packages."""
    assert "5,302 documents" in built[1].stdout and not built[1].stderr


def test_queries_are_held_out_of_the_documents(collection):
    """No relevant document contains its query, and no training text contains a dev or test query."""
    documents = {docid: body for docid, _, _, body in table(collection / "docs.tsv")}
    examples = {query for _, query, _, _ in table(collection / "train.examples.tsv")}
    corpus = (collection / "corpus.txt").read_text(encoding="utf-8")
    for split, least in (("train", 3000), ("dev", 300), ("test", 400)):
        qrels = read_qrels(collection / f"qrels.{split}.txt", Problems())
        queries = dict(table(collection / f"queries.{split}.tsv"))
        assert queries.keys() == qrels.keys() and len(queries) >= least
        for query_id, text in queries.items():
            (docid, grade), = qrels[query_id].items()
            assert grade == 1 and text not in documents[docid]
            if split != "train":
                assert text not in examples and f" {text} " not in corpus and f" {text}\n" not in corpus


def test_splits_do_not_share_queries(collection):
    splits = [dict(table(collection / f"queries.{split}.tsv")) for split in ("train", "dev", "test")]
    ids = [query_id for split in splits for query_id in split]
    texts = [text for split in splits for text in split.values()]
    assert len(set(ids)) == len(ids) and len(set(texts)) == len(texts)


def test_the_texts_are_clean_english(collection):
    """No code, markup, parameter lists or characters beyond ASCII; sentences from capital letter to full stop."""
    texts = [body for _, _, _, body in table(collection / "docs.tsv")]
    texts += [text for split in ("train", "dev", "test") for _, text in table(collection / f"queries.{split}.tsv")]
    for text in texts:
        assert text.isascii() and text[0].isupper() and text[-1] in ".!?", text
        assert not re.search(r">>>|`|::(?!\w)|\\|%\(|\{|:param|----", text), text


def test_pairs_and_examples_pass_the_tokenizers_checks(collection):
    problems = Problems()
    assert check_pairs(collection / "test.pairs.tsv", "test", problems) == 4000
    assert check_pairs(collection / "train.examples.tsv", "train", problems) == 15020
    assert problems.count == 0, problems.messages


def test_the_pairs_are_passages_of_bm25s_candidates(collection):
    problems = Problems()
    run = read_run(collection / "bm25.test.txt", problems)
    documents = {docid: (title, body) for docid, _, title, body in table(collection / "docs.tsv")}
    for pair_id, _, passage in table(collection / "test.pairs.tsv"):
        query_id, _, passage_id = pair_id.partition("#")
        docid, _, number = passage_id.rpartition("_")
        title, body = documents[docid]
        start = 28 * int(number)
        assert docid in run[query_id] and passage == f"{title} : {' '.join(body.split()[start:start + 40])}"
    assert problems.count == 0 and all(len(scores) <= 10 for scores in run.values())


DOCSTRING = """Return the *mean* of `x`; see :func:`~numpy.sum`. The axis is kept.

    Parameters
    ----------
    x : array_like
        The numbers to
        average.

    Notes
    -----
    It is computed as follows::

        this is code

    .. math:: no text

    The sum comes first.

    >>> mean([1])
    Shown Here.

    Examples
    --------
    Not this one.
    """


def test_a_docstring_is_read_as_sentences():
    summary, sentences = docstrings.split_docstring(DOCSTRING)
    assert summary == "Return the mean of x; see numpy.sum."
    assert sentences == ["The axis is kept.", "The numbers to average.", "The sum comes first."]


def test_a_docstring_of_googles_style_is_read_as_sentences():
    doc = ("Loads a model.\n\n    Args:\n        path (`str`, *optional*):\n            Where the model is.\n"
           "        strict: Whether to fail.\n\n    Raises:\n        OSError: It is missing.\n\n    It is cached.\n")
    assert docstrings.split_docstring(doc) == (
        "Loads a model.", ["Where the model is.", "Whether to fail.", "It is cached."])


def test_indentation_by_tabs_and_carriage_returns_do_not_matter(tmp_path):
    """A wheel of another platform may have other line ends."""
    source = f"def mean(x):\n    \"\"\"{DOCSTRING}\"\"\"\n"
    windows, tabs = source.replace("\n", "\r\n"), source.replace("    ", "\t")
    found = []
    for name, text in (("unix", source), ("windows", windows), ("tabs", tabs)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_bytes(text.encode())
        found.append(list(docstrings.read_package("p", tmp_path / name)))
    assert found[0] == found[1] == found[2] and found[0][0].name == "p.a.mean"


def test_near_duplicates_are_left_out():
    """A near-duplicate could not be called irrelevant. Sentences that many docstrings share are removed."""
    long = "It counts {} along the first axis and returns a new array that holds all these counts together."
    shared = ["The array is never changed by this function."]
    entries = [docstrings.Entry(f"p.f{number}", summary, [long.format(what), *more, *shared])
               for number, (summary, what, more) in enumerate((
                   ("Count the zeros of an array.", "zeros", []),
                   ("Counts the zeros of the array.", "nothing of the kind, but is a duplicate by its summary", []),
                   ("Sum up something else.", "zeros", []),
                   ("Draw a picture of a cat.", "whiskers", ["Cats are drawn from the left to the right, in black."])))]
    documents = docstring_collection.make_documents(entries)
    assert [document.name for document in documents] == ["p.f0", "p.f3"]
    assert not any("never changed" in document.body for document in documents)


@pytest.mark.parametrize("package", ["scipy", "huggingface_hub"])
def test_a_package_with_other_texts_is_named(package):
    """The version may be the right one: it is the texts that are compared."""
    expected = json.loads(build_collection.CHECKSUMS.read_text())
    assert not list(build_collection.differences(expected, expected))
    found = {"packages": expected["packages"] | {package: "another"}, "collection": "another"}
    line, = build_collection.differences(found, expected)
    assert line.startswith(f"{package} ") and f"install {package}==" in line


def test_other_rankings_of_the_same_texts_name_what_ranks():
    expected = json.loads(build_collection.CHECKSUMS.read_text())
    lines = list(build_collection.differences(expected | {"collection": "another"}, expected))
    assert [line.split()[0] for line in lines] == list(build_collection.RANKED_BY)


def test_the_vocabulary_is_cut_without_changing_what_is_left(tmp_path):
    """A text of kept tokens alone gets the same scores from the model as before."""
    text = "return the mean of an array"
    (tmp_path / "texts.txt").write_text(f"{text}\n", encoding="utf-8")
    done = run_script("examples.maintenance.cut_vocabulary", "--model_dir", EXAMPLES / "teacher", "--texts",
                      tmp_path / "texts.txt", "--tokens", 400, "--positions", 32, "--output_dir", tmp_path / "cut")
    assert done.returncode == 0, done.stderr
    scores = []
    for directory in (EXAMPLES / "teacher", tmp_path / "cut"):
        vocabulary, (model, _) = load_vocabulary(directory), load_cross_encoder(directory)
        tokens = ["[CLS]", *vocabulary.tokenizer().encode(text, add_special_tokens=False).tokens, "[SEP]"]
        ids = torch.tensor([[vocabulary.token_ids[token] for token in tokens]])
        scores.append(model.eval()(Batch(ids, torch.zeros_like(ids), torch.ones_like(ids))).logits)
    assert len(load_vocabulary(tmp_path / "cut").token_ids) == 400
    assert torch.equal(*scores)


@pytest.mark.parametrize("name, layers, has_head", [("teacher", 6, True), ("general_student", 3, False)])
def test_committed_models_are_complete(name, layers, has_head):
    folder = EXAMPLES / name
    config = read_config(folder)
    assert (config.num_hidden_layers, config.num_attention_heads) == (layers, 12)
    assert ("classifier.weight" in load_file(folder / "model.safetensors")) == has_head
    assert all(tensor.isfinite().all() for tensor in load_file(folder / "model.safetensors").values())
    if has_head:
        load_cross_encoder(folder)


def test_both_models_together_are_small():
    files = [path for name in ("teacher", "general_student") for path in (EXAMPLES / name).iterdir()]
    assert sum(path.stat().st_size for path in files) < 15e6


def test_teacher_and_student_share_a_vocabulary():
    teacher, student = (load_vocabulary(EXAMPLES / name) for name in ("teacher", "general_student"))
    assert teacher.checksum() == student.checksum() and teacher.lower_case and student.lower_case


def test_the_teacher_ranks_better_than_chance(collection, tmp_path):
    """On 30 queries the best passage of the relevant document scores above most other passages."""
    qrels = read_qrels(collection / "qrels.dev.txt", Problems())
    rows = [row for row in table(collection / "dev.pairs.tsv") if row[0].partition("#")[0] in list(qrels)[:30]]
    (tmp_path / "pairs.tsv").write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    assert run_script("tokenize_to_features.py", "--set_name", "dev", "--raw_data_file", tmp_path / "pairs.tsv",
                      "--output_features_file", tmp_path / "dev.pkl", "--bert_model_dir", EXAMPLES / "teacher",
                      "--max_seq_length", 96).returncode == 0
    assert run_script("reranker.py", "--device", "cpu", "--model_dir", EXAMPLES / "teacher", "--features_file",
                      tmp_path / "dev.pkl", "--output_scores_file", tmp_path / "scores.tsv").returncode == 0
    scores = {}
    for query_id, passage_id, score in table(tmp_path / "scores.tsv"):
        relevant = passage_id.rpartition("_")[0] in qrels[query_id]
        scores.setdefault(query_id, {True: [], False: []})[relevant].append(float(score))
    shares = [np.mean(max(found[True]) > np.array(found[False])) for found in scores.values() if found[True]]
    assert len(shares) > 15 and np.mean(shares) > 0.75
