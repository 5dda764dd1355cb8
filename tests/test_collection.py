"""collection.sh: the whole chain, from documents to the report, on a small collection of made-up words."""
import gzip
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, words

SETTINGS = {"STUDENT_LAYERS": "2", "MAX_SEQ_LENGTH": "32", "EVAL_STEP": "4", "DEPTH": "5", "DEVICE": "cpu",
            "PASSAGE_FLAGS": "--title --window 12 --stride 6", "SAMPLE_FLAGS": "--negatives 1",
            "TEACHER_FLAGS": "--num_train_epochs 2",
            "TRAIN_FLAGS": "--train_batch_size 8 --num_train_epochs 1 --learning_rate 1e-3",
            "GENERAL_FLAGS": "--num_train_epochs 1 --train_batch_size 16 --max_seq_length 32", "OMP_NUM_THREADS": "1",
            "MEASURES": "nDCG@10 RR@10"}


def write_collection(directory):
    """Documents of 25 words, a query of three of its words for each; candidates are the document and nine others."""
    random = np.random.default_rng(7)
    directory.mkdir()
    texts = [random.integers(5, 200, 25).tolist() for _ in range(30)]
    with gzip.open(directory / "docs.tsv.gz", "wt") as handle:
        handle.writelines(f"D{number}\thttp://d/{number}\t{words(text[:2])}\t{words(text)}\n"
                          for number, text in enumerate(texts))
    for part, split in enumerate(("train", "dev", "test")):
        queries = range(part * 10, part * 10 + 10)
        (directory / f"queries.{split}.tsv").write_text(
            "".join(f"q{number}\t{words(random.choice(texts[number], 3).tolist())}\n" for number in queries))
        (directory / f"qrels.{split}.txt").write_text("".join(f"q{number} 0 D{number} 1\n" for number in queries))
        ranked = {number: [number, *random.choice([other for other in range(30) if other != number], 9, False)]
                  for number in queries}
        (directory / f"bm25.{split}.txt").write_text(
            "".join(f"q{number} Q0 D{document} {place} {20 - place} bm25\n" for number in queries
                    for place, document in enumerate(random.permutation(ranked[number]), start=1)))


def chain(*arguments, **environment):
    return subprocess.run(["bash", str(ROOT / "collection.sh"), *map(str, arguments)], capture_output=True, text=True,
                          timeout=1800, env=os.environ | SETTINGS | {"PYTHON": sys.executable} | environment)


def test_from_documents_to_the_report(golden_models, tmp_path):
    write_collection(tmp_path / "raw")
    out = tmp_path / "out"
    done = chain(tmp_path / "raw", out, BERT_MODEL=str(golden_models["teacher"]))
    assert done.returncode == 0, done.stderr
    table = (out / "report" / "table.md").read_text()
    for row in ("BM25", "teacher", "finetune", "standard", "tinybert", "simplified"):
        assert f"| {row}" in table
    assert {"table.md", "table.tex", "effectiveness.png", "report.json"} <= set(os.listdir(out / "report"))
    assert len((out / "test.tsv").read_text().splitlines()) == 10 * 5 * 4     # queries, candidates, windows
    assert json.loads((out / "general" / "config.json").read_text())["num_hidden_layers"] == 2
    for name in ("teacher", "student-finetune", "student-standard", "student-tinybert", "student-simplified"):
        assert (out / name / "best" / "model.safetensors").is_file(), name

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    (out / "run-standard.trec").unlink()                # as if it had been interrupted: only this is done again
    again = chain(tmp_path / "raw", out, BERT_MODEL=str(golden_models["teacher"]))
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("\n== ") + again.stderr.startswith("== ") == 1 and "convert_to_trec" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before


def test_a_teacher_and_a_student_of_ones_own(golden_models, tmp_path):
    """A teacher that is fine-tuned already chooses the passages, and nothing is made that is there."""
    write_collection(tmp_path / "raw")
    out = tmp_path / "out"
    done = chain(tmp_path / "raw", out, TEACHER_MODEL=str(golden_models["teacher"]), METHODS="standard",
                 STUDENT_MODEL=str(golden_models["student_2x24"]))
    assert done.returncode == 0, done.stderr
    assert not (out / "teacher").exists() and not (out / "general").exists()
    assert json.loads((out / "train.tsv.run.json").read_text())["arguments"]["filter_model"]
    labels = [line.split("\t")[3] for line in (out / "train.tsv").read_text().splitlines()]
    assert labels.count("1") == labels.count("0") == 10
    assert "| standard" in (out / "report" / "table.md").read_text()


def test_documents_of_two_columns(golden_models, tmp_path):
    write_collection(tmp_path / "raw")
    with gzip.open(tmp_path / "raw" / "docs.tsv.gz", "rt") as handle:
        rows = [line.rstrip("\n").split("\t") for line in handle]
    (tmp_path / "raw" / "docs.tsv.gz").unlink()
    (tmp_path / "raw" / "docs.tsv").write_text("".join(f"{row[0]}\t{row[3]}\n" for row in rows))
    model = str(golden_models["teacher"])
    done = chain(tmp_path / "raw", tmp_path / "out", BERT_MODEL=model, TEACHER_MODEL=model, METHODS="standard")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "general" / "run.json").read_text())["settings"]["documents"] == "columns"


@pytest.mark.parametrize("missing", [["docs.tsv.gz"], ["queries.dev.tsv", "bm25.test.txt"]])
def test_what_a_collection_lacks_is_told_at_once(tmp_path, missing):
    write_collection(tmp_path / "raw")
    for name in missing:
        (tmp_path / "raw" / name).unlink()
    done = chain(tmp_path / "raw", tmp_path / "out")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert f"has none of {' '.join(missing).replace('.gz', '')}, plain or .gz" in done.stderr


def test_wrong_calls(golden_models, tmp_path):
    assert "expected two arguments, found 1" in chain(tmp_path).stderr
    write_collection(tmp_path / "raw")
    done = chain(tmp_path / "raw", tmp_path / "out", BERT_MODEL=str(tmp_path / "none"))
    assert done.returncode == 2 and "none" in done.stderr and "Traceback" not in done.stderr
    for setting, complaint in (({"METHODS": "finetune tinybrt"}, "there is no tinybrt; expected some of finetune"),
                               ({"MEASURES": "nDCG@10 XY"}, "XY"),
                               ({"STUDENT_LAYERS": "3"}, "a teacher of 4 layers cannot be mapped evenly"),
                               ({"STUDENT_MODEL": str(other_words(golden_models["student_2x24"], tmp_path / "other"))},
                                "has another vocabulary")):
        done = chain(tmp_path / "raw", tmp_path / "out", BERT_MODEL=str(golden_models["teacher"]), **setting)
        assert done.returncode == 2 and complaint in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_all_settings_are_checked_before_anything_is_made(golden_models, tmp_path):
    write_collection(tmp_path / "raw")
    (tmp_path / "raw" / "qrels.test.txt").write_text("q20 0 D20 5\n")
    done = chain(tmp_path / "raw", tmp_path / "out", BERT_MODEL=str(golden_models["teacher"]), STUDENT_LAYERS="two",
                 DEPTH="0", EVAL_STEP="08", PROCESSES="-1", MAX_SEQ_LENGTH="1e3", DEVICE="gpu", MEASURES="ERR@10\nXY",
                 PASSAGE_FLAGS="--title\n--windw 3", TRAIN_FLAGS="--warmup_proportion 2", GENERAL_FLAGS="--epochs 2")
    assert done.returncode == 2 and not (tmp_path / "out").exists() and "Traceback" not in done.stderr
    for said in ("STUDENT_LAYERS=two:", "DEPTH=0:", "EVAL_STEP=08:", "PROCESSES=-1:", "MAX_SEQ_LENGTH=1e3:",
                 "DEVICE=gpu:", "--measures XY:", "qrels.test.txt:1: found grade 5", "prepare_examples.py: ", "--windw",
                 "--warmup_proportion 2.0", "general_distill.py: ", "--epochs"):
        assert said in done.stderr, (said, done.stderr)


def other_words(model, directory):
    shutil.copytree(model, directory)
    (directory / "vocab.txt").write_text((directory / "vocab.txt").read_text().replace("w100", "v100"))
    return directory
