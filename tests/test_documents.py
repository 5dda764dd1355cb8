"""Random access to documents: the index, its cache, invalid files, interrupted jobs."""
import gzip
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from simplified_tinybert.common.files import Problems, UserError
from simplified_tinybert.data import documents
from simplified_tinybert.data.documents import Document, open_documents

ids = st.text(st.characters(codec="utf-8", categories=("L", "N", "P")), min_size=1, max_size=4)
texts = st.text(st.characters(codec="utf-8", exclude_characters="\t\r\n"), max_size=20)


def open_(path: Path, cache: Path):
    problems = Problems()
    found = open_documents(path, cache, problems)
    problems.raise_if_any()
    return found


@given(st.dictionaries(ids, st.tuples(texts, texts, texts), min_size=1, max_size=30), st.booleans(), st.booleans(),
       st.sampled_from(["\n", "\r\n"]), st.sampled_from([1, 3, 2 ** 64]))
def test_every_document_is_found_and_no_other(content, packed, short, end, hashes):
    """Also with hash collisions: one hash, three hashes, or the real ones."""
    lines = "".join("\t".join([key, values[2]] if short else [key, *values]) + end for key, values in content.items())
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patched:
        real = documents.hash_of
        patched.setattr(documents, "hash_of", lambda name: np.uint64(int(real(name)) % hashes))
        path = Path(directory) / "docs.tsv"
        path.write_bytes(gzip.compress(lines.encode()) if packed else lines.encode())
        found = open_(path, Path(directory) / "cache")
        assert len(found) == len(content)
        for key, (_, title, body) in content.items():
            assert found.get(key) == (Document("", body) if short else Document(title, body))
        assert found.get("unknown") is None and found.get("") is None


def test_duplicates_are_found_among_colliding_hashes(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "hash_of", lambda name: np.uint64(len(name)))
    (tmp_path / "docs.tsv").write_text("A\tx\nB\tx\nAA\tx\nC\tx\nB\ty\nAA\tz\nB\tz\n")
    with pytest.raises(UserError) as raised:
        open_(tmp_path / "docs.tsv", tmp_path / "cache")
    assert [re.search(r":(\d+): document '(\w+)' .*line (\d+)", line).groups()
            for line in str(raised.value).splitlines()] == [("5", "B", "2"), ("7", "B", "2"), ("6", "AA", "3")]


@pytest.fixture
def docs(tmp_path) -> Path:
    path = tmp_path / "docs.tsv"
    path.write_text("".join(f"D{number}\tu\tt\tbody {number}\n" for number in range(1000)))
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_the_cache_is_used_again_until_the_file_changes(docs, tmp_path, packed):
    if packed:
        docs.write_bytes(gzip.compress(docs.read_bytes()))
    cache = tmp_path / "cache"
    open_(docs, cache)
    directory, = cache.iterdir()
    names = ["documents.tsv"] * packed + ["hashes.npy", "offsets.npy"]
    assert sorted(path.name for path in directory.iterdir()) == names
    times = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert open_(docs, cache).get("D7") == Document("t", "body 7")
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == times
    docs.write_text("D7\tu\tt\tother\n")
    assert open_(docs, cache).get("D7") == Document("t", "other") and len(list(cache.iterdir())) == 2
    assert directory.is_dir()


def test_the_index_is_memory_mapped_with_16_bytes_per_document(docs, tmp_path):
    found = open_(docs, tmp_path / "cache")
    assert isinstance(found.hashes, np.memmap) and isinstance(found.offsets, np.memmap)
    assert found.hashes.nbytes + found.offsets.nbytes == 16 * 1000


def test_a_damaged_index_is_reported(docs, tmp_path):
    open_(docs, tmp_path / "cache")
    directory, = (tmp_path / "cache").iterdir()
    original = (directory / "offsets.npy").read_bytes()
    for content in (b"", original[:100], original[:-8], b"x" * 200):
        (directory / "offsets.npy").write_bytes(content)
        with pytest.raises(UserError, match=f"{directory}: .*docs.tsv is damaged"):
            open_(docs, tmp_path / "cache")
    shutil.rmtree(directory)
    assert open_(docs, tmp_path / "cache").get("D1")


def test_missing_unpacked_documents_are_reported(tmp_path):
    """Otherwise every document of the .gz file would count as missing."""
    path = tmp_path / "docs.tsv.gz"
    path.write_bytes(gzip.compress(b"A\tx\n"))
    open_(path, tmp_path / "cache")
    directory, = (tmp_path / "cache").iterdir()
    (directory / "documents.tsv").unlink()
    with pytest.raises(UserError, match=r"docs.tsv.gz is damaged .*documents.tsv"):
        open_(path, tmp_path / "cache")


@pytest.mark.parametrize(("content", "message"), [
    (b"A\tx\nB\t\xff\n", ":2: byte 3 of the line (0xff) is not UTF-8"),
    (gzip.compress(b"A\tx\n" * 3, mtime=0)[:-9], "the gzip file is damaged"),
    (gzip.compress(b"A\tx\nB\t" + Random(1).randbytes(4000).hex().encode(), mtime=0)[:-900],
     ":2: the gzip file is damaged"),
    (b"\n", ":1: found 1 tab-separated columns"),
    (b"{}\n" * 500, ":20: found 1 tab-separated columns"),
])
def test_invalid_files_leave_nothing_in_the_cache(tmp_path, content, message):
    path = tmp_path / "docs.tsv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        open_(path, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir()) and len(str(raised.value).splitlines()) <= 20


def test_concurrent_jobs_share_one_directory(docs, tmp_path):
    cache, found = tmp_path / "cache", []
    threads = [threading.Thread(target=lambda: found.append(open_(docs, cache))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and len(list(cache.iterdir())) == 1
    assert all(each.get("D999") == Document("t", "body 999") for each in found)


def test_the_temporary_directory_of_a_killed_job_is_not_used(tmp_path):
    docs, cache = tmp_path / "docs.tsv.gz", tmp_path / "cache"
    docs.write_bytes(gzip.compress("".join(f"D{n}\tbody {n}\n" for n in range(200_000)).encode(), 1))
    code = ("import sys, time; from pathlib import Path; from simplified_tinybert.data import documents\n"
            "from simplified_tinybert.common import files\n"
            "real = documents.hash_of\n"
            "def slow(name):\n"
            "    if name == b'D150000': print('half', flush=True); time.sleep(60)\n"
            "    return real(name)\n"
            "documents.hash_of = slow\n"
            "documents.open_documents(Path(sys.argv[1]), Path(sys.argv[2]), files.Problems())")
    job = subprocess.Popen([sys.executable, "-c", code, str(docs), str(cache)], cwd=ROOT, stdout=subprocess.PIPE,
                           stderr=subprocess.DEVNULL)
    assert job.stdout.readline() == b"half\n"
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    job.stdout.close()
    temporary, = cache.iterdir()
    assert temporary.name.startswith(".documents-")
    start = time.time()
    found = open_(docs, cache)
    assert len(found) == 200_000 and found.get("D199999") == Document("", "body 199999")
    assert temporary.is_dir() and max(path.stat().st_mtime for path in temporary.iterdir()) < start


def test_an_interrupt_removes_the_temporary_directory(docs, tmp_path, monkeypatch):
    def interrupt(name):
        raise KeyboardInterrupt
    monkeypatch.setattr(documents, "hash_of", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_(docs, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
