"""collection.sh: the whole chain, from documents to the report, on a small collection of made-up words."""
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from helpers.collection import write_collection

SETTINGS = {"STUDENT_LAYERS": "2", "MAX_SEQ_LENGTH": "32", "EVAL_STEP": "4", "DEPTH": "5", "DEVICE": "cpu",
            "PASSAGE_FLAGS": "--title --window 12 --stride 6", "SAMPLE_FLAGS": "--negatives 1",
            "TEACHER_FLAGS": "--num_train_epochs 2",
            "TRAIN_FLAGS": "--train_batch_size 8 --num_train_epochs 1 --learning_rate 1e-3",
            "GENERAL_FLAGS": "--num_train_epochs 1 --train_batch_size 16 --max_seq_length 32", "OMP_NUM_THREADS": "1",
            "MEASURES": "nDCG@10 RR@10"}


def chain(*arguments, **environment):
    return subprocess.run(["bash", str(ROOT / "collection.sh"), *map(str, arguments)], capture_output=True, text=True,
                          timeout=1800, env=os.environ | SETTINGS | {"PYTHON": sys.executable} | environment)


@pytest.mark.parametrize("setting", [{"METHODS": "simplified"}, pytest.param({}, marks=pytest.mark.slow)])
def test_from_documents_to_the_report(golden_models, tmp_path, monkeypatch, setting):
    """In a directory whose name awk would take for a variable."""
    monkeypatch.chdir(tmp_path)
    write_collection(tmp_path / "raw")
    out, setting = Path("seed=1"), setting | {"BERT_MODEL": str(golden_models["teacher"])}
    methods = setting.get("METHODS", "finetune standard tinybert simplified").split()
    out.mkdir()
    (out / "test.pkl").write_text("of reranker.sh")
    done = chain(tmp_path / "raw", out, **setting)
    assert done.returncode == 2 and "seed=1: is not empty, and has no inputs.json" in done.stderr
    (out / "test.pkl").rename(out / "log.txt")
    done = chain(tmp_path / "raw", out, **setting)
    assert done.returncode == 0, done.stderr
    table = (out / "report" / "table.md").read_text()
    for row in ("BM25", "teacher", *methods):
        assert f"| {row}" in table
    assert {"table.md", "table.tex", "effectiveness.png", "report.json"} <= set(os.listdir(out / "report"))
    assert len((out / "test.tsv").read_text().splitlines()) == 10 * 5 * 4     # queries, candidates, windows
    assert json.loads((out / "general" / "config.json").read_text())["num_hidden_layers"] == 2
    for name in ("teacher", *(f"student-{method}" for method in methods)):
        assert (out / name / "best" / "model.safetensors").is_file(), name
        ranked = out / f"run-{name.removeprefix('student-')}.tsv.run.json"
        assert json.loads(ranked.read_text())["arguments"]["model_dir"] == str(out / name / "best")
    student = json.loads((out / "student-simplified" / "run.json").read_text())
    assert student["arguments"]["teacher_model"] == str(out / "teacher" / "best")

    ranked = [line.split() for line in (out / "bm25.trec").read_text().splitlines()]
    candidates = {}
    for line in (tmp_path / "raw" / "bm25.test.txt").read_text().splitlines():
        candidates.setdefault(line.split()[0], []).append(line.split()[2])
    assert len(ranked) == 10 * 5                        # the row BM25 has the same documents as the others
    assert all(document in candidates[query][:5] for query, _, document, *_ in ranked)
    assert json.loads((out / "report" / "report.json").read_text())["systems"][0]["run"] == str(out / "bm25.trec")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    (out / "run-simplified.trec").unlink()                # as after an interruption: only this file is made again
    again = chain(tmp_path / "raw", out, **setting)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("\n== ") + again.stderr.startswith("== ") == 1 and "convert_to_trec" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before
    check_other_inputs(tmp_path / "raw", out, setting)


def check_other_inputs(collection, out, setting):
    """Results are never combined with those of other settings or files."""
    done = chain(collection, out, **setting, DEPTH="3", TRAIN_FLAGS="--seed 1", TEACHER_MODEL=setting["BERT_MODEL"])
    assert done.returncode == 2 and f"{out}: was started with other inputs" in done.stderr
    assert all(part in done.stderr for part in ("DEPTH was '5', is '3'", "TRAIN_FLAGS was", "TEACHER_MODEL was ''"))
    qrels = collection / "qrels.test.txt"
    qrels.write_text("".join(qrels.read_text().splitlines(keepends=True)[1:]))
    done = chain(collection, out, **setting)
    assert done.returncode == 2 and "qrels.test was {" in done.stderr and "\n== " not in done.stderr


@pytest.mark.slow
def test_existing_teacher_and_general_student(golden_models, tmp_path):
    """A given teacher chooses the passages; neither teacher nor general student is trained."""
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


@pytest.mark.slow
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
def test_missing_files_are_reported_before_anything_is_made(tmp_path, missing):
    write_collection(tmp_path / "raw")
    for name in missing:
        (tmp_path / "raw" / name).unlink()
    done = chain(tmp_path / "raw", tmp_path / "out")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert f"cannot find {' '.join(missing).replace('.gz', '')}, plain or .gz" in done.stderr


def test_wrong_calls(golden_models, tmp_path):
    assert "expected two arguments, found 1" in chain(tmp_path).stderr
    write_collection(tmp_path / "raw")
    done = chain(tmp_path / "raw", tmp_path / "out", BERT_MODEL=str(tmp_path / "none"))
    assert done.returncode == 2 and "none" in done.stderr and "Traceback" not in done.stderr
    other = other_words(golden_models["student_2x24"], tmp_path / "other")
    for setting, part in (({"METHODS": "finetune tinybrt"}, "tinybrt"), ({"METHODS": " "}, "METHODS="),
                          ({"METHODS": "standard standard"}, "METHODS=standard standard"),
                          ({"MEASURES": "nDCG@10 XY"}, "XY"),
                          ({"STUDENT_LAYERS": "3"}, "4 layers"), ({"STUDENT_MODEL": str(other)}, str(other))):
        done = chain(tmp_path / "raw", tmp_path / "out", BERT_MODEL=str(golden_models["teacher"]), **setting)
        assert done.returncode == 2 and part in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_all_files_are_checked_before_anything_is_made(golden_models, tmp_path):
    write_collection(tmp_path / "raw")
    for name, line in (("qrels.dev.txt", "q1 0 D1\n"), ("queries.train.tsv", "q 1\n")):
        (tmp_path / "raw" / name).write_text(line)
    done = chain(tmp_path / "raw", tmp_path / "out", BERT_MODEL=str(golden_models["teacher"]))
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "out").exists()
    assert "qrels.dev.txt:1: found 3 columns" in done.stderr and "queries.train.tsv:1: " in done.stderr
    (tmp_path / "file").write_text("")
    done = chain(tmp_path / "raw", tmp_path / "file")
    assert done.returncode == 2 and "file: is a file; name a directory" in done.stderr


def test_all_settings_are_checked_before_anything_is_made(golden_models, tmp_path):
    write_collection(tmp_path / "raw")
    (tmp_path / "raw" / "qrels.test.txt").write_text("q20 0 D20 5\n")
    done = chain(tmp_path / "raw", tmp_path / "out", BERT_MODEL=str(golden_models["teacher"]), PROCESSES="9")
    assert done.returncode == 2 and "--train_batch_size 8: expected 1 or more for each of 9 processes" in done.stderr
    done = chain(tmp_path / "raw", tmp_path / "out", BERT_MODEL=str(golden_models["teacher"]), STUDENT_LAYERS="two",
                 DEPTH="0", EVAL_STEP="08", PROCESSES="-1", MAX_SEQ_LENGTH="1e3", DEVICE="gpu", MEASURES="ERR@10\nXY",
                 PASSAGE_FLAGS="--title\n--windw 3", TRAIN_FLAGS="--warmup_proportion 2", GENERAL_FLAGS="--epochs 2",
                 SAMPLE_FLAGS="--out=x", TEACHER_FLAGS="-- y")
    assert done.returncode == 2 and not (tmp_path / "out").exists() and "Traceback" not in done.stderr
    for part in ("STUDENT_LAYERS=two:", "DEPTH=0:", "EVAL_STEP=08:", "PROCESSES=-1:", "MAX_SEQ_LENGTH=1e3:",
                 "DEVICE=gpu:", "--measures XY:", "qrels.test.txt:1: found grade 5", "prepare_examples.py: ", "--windw",
                 "--warmup_proportion 2.0", "general_distill.py: ", "--epochs",
                 "SAMPLE_FLAGS=--out=x: expected flags other", "the argument -- before y"):
        assert part in done.stderr, (part, done.stderr)


def other_words(model, directory):
    """Copy a model with a changed vocabulary."""
    shutil.copytree(model, directory)
    (directory / "vocab.txt").write_text((directory / "vocab.txt").read_text().replace("w100", "v100"))
    return directory
