"""A collection of documents on disk: any of them by its id, in memory that hardly grows with the collection.

The index, built once, is two arrays of 8 bytes a document (hash of the id, where its line begins), sorted by hash and
memory-mapped. It lies in a directory of its own in the cache, named after the file's path, size and time of change, with
the unpacked text if the file is compressed, for a gzip file cannot be entered in its middle.
"""
import gzip
import hashlib
import os
import shutil
import uuid
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from tqdm import tqdm

from simplified_tinybert.common.files import Problems, UserError, atomic_writer, say, shorten, sync_directory
from simplified_tinybert.common.text import BAD_GZIP, MARK, damaged, is_line, not_utf8, open_binary

COLUMNS = {2: "document_id, text", 4: "document_id, url, title, body"}
VERSION = 2                     # of the index, part of its directory's name
ENOUGH = 20                     # problems, after which a file is not read on
LINES_A_STEP = 1000             # of the progress bar


class Document(NamedTuple):
    """The parts of a document that make passages, as they stand in the collection."""
    title: str
    body: str


class DocumentFile:
    """Documents of a tab-separated file by id. `hashes` (N) uint64, sorted; `offsets` (N) int64, bytes."""

    def __init__(self, text: Path, hashes: np.ndarray, offsets: np.ndarray):
        self.hashes, self.offsets = hashes, offsets
        self.handle = open(text, "rb")

    def __len__(self) -> int:
        return len(self.hashes)

    def get(self, document_id: str) -> Document | None:
        """The document, or None if the collection has none of this id."""
        wanted = document_id.encode("utf-8")
        first, last = _range_of(self.hashes, hash_of(wanted))
        for offset in self.offsets[first:last].tolist():                # more than one if hashes collide
            found, _, rest = _line_at(self.handle, offset).partition(b"\t")
            if found == wanted:
                return _document(rest)
        return None


def hash_of(document_id: bytes) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(document_id, digest_size=8).digest(), "little"))


def _document(columns: bytes) -> Document:
    """Of a line's columns after the id."""
    *_, title, body = ["", *columns.decode("utf-8").split("\t")]
    return Document(title, body)


def read_documents(path: Path, problems: Problems) -> Iterator[Document]:
    """All documents of a plain or .gz file, one after the other.

    A line that is wrong is added to `problems`, not yielded; after ENOUGH of them the rest of the file is not read.
    Duplicate ids are not noticed.
    """
    try:
        with open_binary(path) as source:
            for _, _, line in _checked_lines(path, source, problems):
                yield _document(line.removesuffix(b"\n").removesuffix(b"\r").partition(b"\t")[2])
    except UserError as error:
        problems.add(str(error))


def open_documents(path: Path, cache_dir: Path, problems: Problems) -> DocumentFile | None:
    """The documents of a plain or .gz file; what is wrong with it is added to `problems`, and nothing is kept then.

    Jobs that share `cache_dir` never meet in one directory half-made.
    """
    status = path.stat()
    key = f"{VERSION}\n{path.resolve()}\n{status.st_size}\n{status.st_mtime_ns}"
    directory = cache_dir / f"documents-{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}"
    if not directory.is_dir() and not _build(path, directory, problems):
        return None
    with open_binary(path) as source:
        text = directory / "documents.tsv" if isinstance(source, gzip.GzipFile) else path
    try:
        arrays = [np.load(directory / f"{name}.npy", mmap_mode="r") for name in ("hashes", "offsets")]
        if arrays[0].dtype != np.uint64 or arrays[1].dtype != np.int64 or arrays[0].shape != arrays[1].shape:
            raise ValueError("its arrays do not go together")
        return DocumentFile(text, *arrays)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{directory}: the index of {path} is damaged ({error}); remove this directory and start "
                        f"again") from error


def _build(path: Path, directory: Path, problems: Problems) -> bool:
    """Make `directory` of an index, unless the file has problems. Returns whether the directory is there."""
    aside = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    aside.mkdir(parents=True)
    try:
        if not _write_index(path, aside, problems):
            return False
        os.rename(aside, directory)
        sync_directory(directory.parent)
    except UserError as error:                          # a file of another kind
        problems.add(str(error))
        return False
    except OSError:
        if not directory.is_dir():                         # otherwise another job was faster: its directory serves as well
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return True


def _write_index(path: Path, directory: Path, problems: Problems) -> bool:
    before, hashes, offsets = problems.count, array("Q"), array("q")
    with ExitStack() as stack:
        source, copy = stack.enter_context(open_binary(path)), None
        if isinstance(source, gzip.GzipFile):
            say(f"{path}: is compressed; unpacking it once into {directory.parent}, where it stays (MS MARCO's documents "
                f"take 22 GB; {shutil.disk_usage(directory).free / 1e9:,.0f} GB are free there)")
            copy = stack.enter_context(atomic_writer(directory / "documents.tsv", "wb"))
        for document_id, offset, line in _checked_lines(path, source, problems, "indexing documents"):
            if copy:
                copy.write(line)
            hashes.append(hash_of(document_id))
            offsets.append(offset)
    if not offsets and problems.count == before:
        problems.add(f"{path}: is empty; expected a document a line: {' or '.join(COLUMNS.values())}")
    if problems.count > before:
        return False
    hashes, offsets = np.frombuffer(hashes, np.uint64), np.frombuffer(offsets, np.int64)
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    _check_duplicates(path, directory / "documents.tsv" if copy else path, hashes, offsets, order, problems)
    for name, values in (("hashes", hashes), ("offsets", offsets[order])):
        with atomic_writer(directory / f"{name}.npy", "wb") as handle:
            np.save(handle, values)
    return problems.count == before


def _checked_lines(path: Path, source: IO[bytes], problems: Problems, doing: str = "") \
        -> Iterator[tuple[bytes, int, bytes]]:
    """Yield (id, where its line begins once unpacked, line); after ENOUGH problems the rest of the file is not read.

    A line begins after its byte order mark. Progress is shown under the name of `doing`.
    """
    number, offset, expected, limit = 0, 0, 0, problems.count + ENOUGH
    on_disk = source.fileobj if isinstance(source, gzip.GzipFile) else source
    with tqdm(total=path.stat().st_size, desc=doing, unit="B", unit_scale=True, disable=not doing) as progress:
        try:
            for number, line in enumerate(filter(is_line, source), start=1):
                start = 0
                while line.startswith(MARK, start):
                    start += len(MARK)
                columns = line.count(b"\t") + 1
                expected = expected or (columns if columns in COLUMNS else 4)
                document_id = line[start:max(line.find(b"\t"), start)]
                if complaint := _complaint(line, document_id, columns, expected):
                    problems.add(f"{path}:{number}: {complaint}")
                    if problems.count == limit:
                        return
                else:
                    yield document_id, offset + start, line
                offset += len(line)
                if number % LINES_A_STEP == 0:
                    progress.update(on_disk.tell() - progress.n)
        except BAD_GZIP as error:
            problems.add(f"{path}:{number + 1}: {damaged(error)}")
        progress.update(path.stat().st_size - progress.n)


def _complaint(line: bytes, document_id: bytes, columns: int, expected: int) -> str | None:
    """What is wrong with a line, as 'found ...; expected ...'."""
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        return not_utf8(line, error)
    if columns != expected:
        return (f"found {columns} tab-separated columns ({shorten(line[:200].decode('utf-8', 'replace'))}); expected "
                f"{COLUMNS[expected]}; or for all lines {COLUMNS[6 - expected]}")
    name = document_id.decode("utf-8")
    if name.split() != [name]:
        return f"found document id {shorten(name)}; expected one without white space"
    return None


def _check_duplicates(path: Path, text: Path, hashes: np.ndarray, offsets: np.ndarray, order: np.ndarray,
                      problems: Problems) -> None:
    """Add a problem for each id that occurs again. `hashes` are sorted by `order`, `offsets` stand as in the file."""
    limit = problems.count + ENOUGH
    with open(text, "rb") as handle:
        for repeated in np.unique(hashes[1:][hashes[1:] == hashes[:-1]]):
            first, last = _range_of(hashes, repeated)
            first_seen = {}
            for line in order[first:last].tolist():                     # in the order of the file: the sort is stable
                name = _line_at(handle, int(offsets[line])).partition(b"\t")[0].decode("utf-8")
                if name in first_seen and problems.count < limit:
                    problems.add(f"{path}:{line + 1}: document {shorten(name)} stands already in line "
                                 f"{first_seen[name]}; each may occur once")
                first_seen.setdefault(name, line + 1)


def _range_of(hashes: np.ndarray, wanted: np.uint64) -> tuple[int, int]:
    """Where `wanted` begins and ends among sorted hashes."""
    return tuple(int(np.searchsorted(hashes, wanted, side)) for side in ("left", "right"))


def _line_at(handle: IO[bytes], offset: int) -> bytes:
    handle.seek(offset)
    return handle.readline().removesuffix(b"\n").removesuffix(b"\r")
