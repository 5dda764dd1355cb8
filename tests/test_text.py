"""Byte order marks, other encodings and archives, for every reader; terminals and locales without UTF-8."""
import ast
import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest
from conftest import ROOT, program

import convert_to_trec_results
import general_distill
import tokenize_to_features
from experiments import settings as study_settings
from simplified_tinybert.common.files import Problems, atomic_writer
from simplified_tinybert.common.text import read_lines
from simplified_tinybert.data.collection import read_queries, read_rows
from simplified_tinybert.data.corpus import check_corpus
from simplified_tinybert.data.documents import Document, open_documents
from simplified_tinybert.ranking.trec import read_qrels, read_run

BOM = codecs.BOM_UTF8


def scores_of(path, problems):
    return list(convert_to_trec_results.read_scores(path, problems))


def documents_of(path, problems):
    documents = open_documents(path, path.with_name("cache"), problems)
    return documents and [documents.get("q1"), documents.get("q2")]


# reader, two input lines, expected result
READERS = {
    "queries": (read_queries, "q1\tflow\nq2\twing\n", {"q1": "flow", "q2": "wing"}),
    "qrels": (read_qrels, "q1 0 D1 1\nq2 0 D1 2\n", {"q1": {"D1": 1}, "q2": {"D1": 2}}),
    "run": (read_run, "q1 Q0 D1 1 2.5 t\nq2 Q0 D1 1 1.5 t\n", {"q1": {"D1": 2.5}, "q2": {"D1": 1.5}}),
    "candidates": (lambda path, problems: list(read_rows(path, problems)), "q1 Q0 D1 1 2.5 t\nq2 Q0 D1 1 1.5 t\n",
                   [(1, "q1", "D1", 2.5, "1"), (2, "q2", "D1", 1.5, "1")]),
    "scores": (scores_of, "q1\tD1_0\t2.5\nq2\tD1_0\t1.5\n", [(1, "q1", "D1_0", 2.5), (2, "q2", "D1_0", 1.5)]),
    "pairs": (lambda path, problems: tokenize_to_features.check_pairs(path, "test", problems),
              "q1#D1_0\tflow\twing\nq2#D1_0\tflow\twing\n", 2),
    "documents": (documents_of, "q1\tflow\nq2\twing\n", [Document("", "flow"), Document("", "wing")]),
    "corpus": (lambda path, problems: check_corpus([path], "lines", problems), "q1\tflow\nq2\twing\n", None)}


def read(name, path):
    problems = Problems()
    found = READERS[name][0](path, problems)
    return found, problems.messages


def packed_by(pack, content):
    """Return the content as an archive of this type."""
    out = io.BytesIO()
    if pack == "zip":
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("lines.tsv", content)
    elif pack == "tar":
        with tarfile.open(fileobj=out, mode="w") as archive:
            member = tarfile.TarInfo("lines.tsv")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    else:
        out.write({"bzip2": bz2.compress, "xz": lzma.compress, "zstd": lambda text: b"\x28\xb5\x2f\xfd" + text,
                   "lz4": lambda text: b"\x04\x22\x4d\x18" + text,
                   "parquet": lambda text: b"PAR1\x15\x04" + text, "lzip": lambda text: b"LZIP\x01\x0c" + text,
                   "7z": lambda text: b"7z\xbc\xaf\x27\x1c" + text}[pack](content))
    return out.getvalue()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", READERS)
def test_byte_order_marks_of_joined_files_are_removed(tmp_path, name, packed):
    path, (_, text, expected) = tmp_path / "lines.txt", READERS[name]
    lines = text.encode().splitlines(keepends=True)
    path.write_bytes(text.encode())
    without = read(name, path)
    content = BOM + lines[0] + BOM + BOM + lines[1] + BOM              # the last of the joined files was empty
    path.write_bytes(gzip.compress(content) if packed else content)
    assert read(name, path) == without == (expected or without[0], [])


@pytest.mark.parametrize("encoding, reported", [
    ("utf-16", "UTF-16"), ("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE"), ("utf-32", "UTF-32"),
    ("utf-32-le", "UTF-32LE"), ("utf-32-be", "UTF-32BE")])
@pytest.mark.parametrize("name", READERS)
def test_utf_16_and_32_are_reported_with_a_command(tmp_path, name, encoding, reported):
    text = READERS[name][1]
    for path, content in ((tmp_path / "lines.txt", text.encode(encoding)),
                          (tmp_path / "lines.gz", gzip.compress(text.encode(encoding)))):
        path.write_bytes(content)
        found, messages = read(name, path)
        assert len(messages) == 1 and messages[0].startswith(f"{path}: "), messages
        assert f"iconv -f {reported} -t UTF-8" in messages[0]


def test_the_command_for_utf_16_works(tmp_path):
    for encoding in ("utf-16", "utf-16-be", "utf-32"):
        (tmp_path / "queries.tsv").write_bytes("q1\tflüssig\n".encode(encoding))
        command = re.search(r"iconv [\w -]+", read("queries", tmp_path / "queries.tsv")[1][0])[0]
        (tmp_path / "right.tsv").write_bytes(subprocess.run([*command.split(), tmp_path / "queries.tsv"],
                                                            capture_output=True, check=True).stdout)
        assert read("queries", tmp_path / "right.tsv") == ({"q1": "flüssig"}, [])


@pytest.mark.parametrize("line, reported", [
    ("q2\t机翼流动".encode("utf-16-le"), "UTF-16"), (codecs.BOM_UTF16_LE + "q2\twing".encode("utf-16-le"), "UTF-16"),
    (b"q2\tfl\xfcssig", "LATIN1"), (b"q2\t\x93wing\x94", "WINDOWS-1252")])
def test_a_later_line_in_another_encoding_is_reported(tmp_path, line, reported):
    (tmp_path / "queries.tsv").write_bytes(b"q1\tflow\n" + line)
    found, messages = read("queries", tmp_path / "queries.tsv")
    assert len(messages) == 1 and "queries.tsv:2: " in messages[0] and f"iconv -f {reported} -t UTF-8" in messages[0]


def test_nul_characters_are_part_of_the_text(tmp_path):
    (tmp_path / "queries.tsv").write_bytes(b"q1\tflow \x00 wing\nq2\twing\n")
    assert read("queries", tmp_path / "queries.tsv") == ({"q1": "flow \x00 wing", "q2": "wing"}, [])


@pytest.mark.parametrize("line", ["PAR1\tsome text", "PAR1 Q0 D1", "LZIP1\tsome text", "BZh9\tsome text"])
def test_text_may_begin_like_an_archive(tmp_path, line):
    (tmp_path / "lines.tsv").write_text(f"{line}\n")
    problems = Problems()
    assert list(read_lines(tmp_path / "lines.tsv", problems)) == [(1, line)] and not problems.messages


@pytest.mark.parametrize("pack, command", [("zip", "unzip"), ("bzip2", "bunzip2"), ("xz", "unxz"), ("zstd", "unzstd"),
                                           ("lz4", "unlz4"), ("7z", "7z x"), ("tar", "tar -xf"),
                                           ("lzip", "lzip -d"), ("parquet", "read_parquet")])
@pytest.mark.parametrize("name", READERS)
def test_archives_are_recognised_under_any_file_name(tmp_path, name, pack, command):
    archive = packed_by(pack, READERS[name][1].encode())
    for path, content in ((tmp_path / "lines.gz", archive), (tmp_path / "packed", gzip.compress(archive))):
        path.write_bytes(content)
        found, messages = read(name, path)
        assert len(messages) == 1 and messages[0].startswith(f"{path}: is ") and command in messages[0], messages
        assert pack in messages[0].lower()


def test_a_text_may_begin_like_an_archive(tmp_path):
    (tmp_path / "queries.tsv").write_bytes(b"BZh9\tflow\n")
    assert read("queries", tmp_path / "queries.tsv") == ({"BZh9": "flow"}, [])


def test_byte_order_marks_are_not_part_of_document_ids(tmp_path):
    (tmp_path / "docs.tsv").write_bytes(BOM + b"D1\tu\tt\tone\n" + BOM + b"D2\tu\tt\ttwo\n")
    documents = open_documents(tmp_path / "docs.tsv", tmp_path / "cache", Problems())
    assert [documents.get(name) for name in ("D1", "D2", "\ufeffD2")] == [Document("t", "one"), Document("t", "two"),
                                                                         None]


def test_toml_settings_are_read_like_other_text_files(tmp_path):
    path, problems = tmp_path / "study.toml", Problems()
    path.write_bytes(BOM + b"seeds = [1]\n")
    assert study_settings.read_toml(path) == {"seeds": [1]}
    path.write_bytes("seeds = [1]\n".encode("utf-16"))
    assert study_settings.read_settings(path, problems) is None
    assert len(problems.messages) == 1 and "study.toml: is in UTF-16" in problems.messages[0]


# Terminals and locales without UTF-8

ASCII = {"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
LATIN = {"PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"}
C_LOCALE = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}


def run_in(environment, name, *arguments):
    """Run a script with these encoding settings only; arguments may be bytes."""
    encodings = ("LC_ALL", "LC_CTYPE", "LANG", "PYTHONIOENCODING", "PYTHONUTF8", "PYTHONCOERCECLOCALE")
    others = {name: value for name, value in os.environ.items() if name not in encodings}
    arguments = [each if isinstance(each, bytes) else str(each) for each in arguments]
    return subprocess.run([sys.executable, *program(name), *arguments], capture_output=True, timeout=300,
                          env=others | environment | {"PYTHONPATH": str(ROOT)})


@pytest.fixture
def evaluation(tmp_path):
    (tmp_path / "qrels.txt").write_text("fräge 0 D1 1\nq2 0 D2 1\n", encoding="utf-8")
    (tmp_path / "run.trec").write_text("fräge Q0 D1 1 2 t\nfräge Q0 D2 2 1 t\nq2 Q0 D2 1 1 t\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("environment, shown", [(ASCII, rb"fr\xe4ge" + b"\tMRR\t1.0"), (LATIN, b"fr\xe4ge\tMRR\t1.0"),
                                                (C_LOCALE, rb"fr\xe4ge" + b"\tMRR\t1.0")])
def test_characters_that_a_terminal_lacks_are_escaped(evaluation, environment, shown):
    done = run_in(environment, "msmarco_mrr_eval.py", evaluation / "qrels.txt", evaluation / "run.trec", "--per_query")
    assert done.returncode == 0 and shown in done.stdout and b"Traceback" not in done.stderr, done.stderr


def test_a_report_is_written_and_shown_in_any_locale(evaluation):
    """The table contains ×, –, daggers and the user's system names."""
    done = run_in(C_LOCALE, "report.py", "--qrels", evaluation / "qrels.txt", "--system", "Schüler".encode(),
                  evaluation / "run.trec", "--teacher", "Schüler".encode(), "--measures", "MRR", "--device", "cpu",
                  "--output_dir", evaluation / "report")
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    table = (evaluation / "report" / "table.md").read_text(encoding="utf-8")
    assert "| Schüler |" in table and "–" in table and rb"| Sch\xfcler |" in done.stdout
    assert json.loads((evaluation / "report" / "report.json").read_text(encoding="utf-8"))["systems"][0][
        "name"] == "Schüler"


@pytest.mark.parametrize("name", ["report.py", "general_distill.py", "benchmarks.tokenization",
                                  "examples.build_collection", "experiments.findings"])
def test_help_is_shown_on_any_terminal(name):
    done = run_in(ASCII, name, "--help")
    assert done.returncode == 0 and b"usage:" in done.stdout and b"Traceback" not in done.stderr, done.stderr


def test_file_names_that_are_not_utf8_are_printed_and_recorded(evaluation):
    name = os.fsencode(evaluation) + b"/r\xfcn.trec"
    os.rename(evaluation / "run.trec", name)
    arguments = [sys.executable, str(ROOT / "msmarco_mrr_eval.py"), str(evaluation / "qrels.txt"), name]
    done = subprocess.run([*arguments, "--compare", name, "--per_query"], capture_output=True, timeout=300)
    assert done.returncode == 0 and b"Traceback" not in done.stderr and b"query_num: 2" in done.stdout, done.stderr
    with atomic_writer(evaluation / "record.json") as handle:
        json.dump({"run": os.fsdecode(name)}, handle, ensure_ascii=False)
    assert json.loads((evaluation / "record.json").read_text(encoding="utf-8"))["run"].endswith("/r\udcfcn.trec")


def test_texts_are_opened_in_utf8_in_any_locale():
    """Without an explicit encoding, Python uses the locale's."""
    calls = 0
    for path in (path for directory in (".", "simplified_tinybert/**", "experiments", "benchmarks", "examples")
                 for path in ROOT.glob(f"{directory}/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", None) or "." + getattr(node.func, "attr", "")
                modes = [value.value for value in node.args[1:2] if isinstance(value, ast.Constant)]
                if name in ("open", ".read_text", ".write_text") and not any("b" in str(mode) for mode in modes):
                    calls += 1
                    assert {"encoding", None} & {keyword.arg for keyword in node.keywords}, (path, node.lineno)
    assert calls > 20


def test_general_distillation_accepts_columns_or_lines_but_not_both(monkeypatch, capsys):
    flags = ["general_distill.py", "--teacher_model", "t", "--student_layers", "1", "--output_student_dir", "o"]
    for more in (["--docs", "d", "--corpus", "c"], ["--docs", "d", "--documents", "lines"], []):
        monkeypatch.setattr(sys, "argv", flags + more)
        with pytest.raises(SystemExit, match="2"):
            general_distill.parse_args()


def test_gzip_in_gzip_is_reported(tmp_path):
    (tmp_path / "pairs.gz").write_bytes(gzip.compress(gzip.compress(b"q\ttext\n")))
    problems = Problems()
    assert list(read_lines(tmp_path / "pairs.gz", problems)) == []
    assert "pairs.gz:1: " in problems.messages[0] and "gzip twice" in problems.messages[0]
