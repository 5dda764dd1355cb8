"""Random access to the documents of a file by id, with little memory even for large collections.

The index is built once: two memory-mapped arrays of 8 bytes per document (hash of the id, offset of its line), sorted
by hash. Its cache directory is named after the path, size and modification time of the file. Gzip files do not allow
random access, so their unpacked text is stored with the index.
"""
import gzip
import hashlib
import os
import shutil
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from tqdm import tqdm

from simplified_tinybert.common.files import Problems, UserError, atomic_writer, new_directory, say, shorten
from simplified_tinybert.common.text import BOM, GZIP_ERRORS, decoding_error, gzip_damage, is_line, open_binary

COLUMNS = {2: "document_id, text", 4: "document_id, url, title, body"}
VERSION = 2                     # of the index format


class Document(NamedTuple):
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
        """Return a document, or None if the id is unknown."""
        key = document_id.encode("utf-8")
        for offset in self.offsets[_equal_range(self.hashes, hash_of(key))].tolist():       # several if hashes collide
            found, _, columns = _line_at(self.handle, offset).partition(b"\t")
            if found == key:
                return _document(columns)
        return None


def hash_of(document_id: bytes) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(document_id, digest_size=8).digest(), "little"))


def _document(columns: bytes) -> Document:
    """Parse the columns after the id."""
    *_, title, body = ["", *columns.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8").split("\t")]
    return Document(title, body)


def read_documents(path: Path, problems: Problems) -> Iterator[Document]:
    """Yield all documents of a plain or gzip file in order, with duplicates. Input errors are added to `problems`."""
    with problems.collect(), open_binary(path) as source:
        for _, _, line in _checked_lines(path, source, problems):
            yield _document(line.partition(b"\t")[2])


def open_documents(path: Path, cache_dir: Path, problems: Problems) -> DocumentFile | None:
    """Open a document file and index it in `cache_dir`. If it has errors, they are added to `problems` instead."""
    status = path.stat()
    key = f"{VERSION}\n{path.resolve()}\n{status.st_size}\n{status.st_mtime_ns}"
    directory = cache_dir / f"documents-{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}"
    if not directory.is_dir():
        with problems.collect(), new_directory(directory) as temporary:
            _write_index(path, temporary)
        if not directory.is_dir():                      # the file has errors
            return None
    with open_binary(path) as source:
        text = directory / "documents.tsv" if isinstance(source, gzip.GzipFile) else path
    try:
        arrays = [np.load(directory / f"{name}.npy", mmap_mode="r") for name in ("hashes", "offsets")]
        if arrays[0].dtype != np.uint64 or arrays[1].dtype != np.int64 or arrays[0].shape != arrays[1].shape:
            raise ValueError("its arrays contradict each other")
        return DocumentFile(text, *arrays)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{directory}: the index of {path} is damaged ({error}); remove this directory and start "
                        f"again") from error


def _write_index(path: Path, directory: Path) -> None:
    """Write the index of a file. Raises UserError if the file has errors."""
    problems, hashes, offsets = Problems(), array("Q"), array("q")
    with open_binary(path) as source, ExitStack() as stack:
        copy = None
        if isinstance(source, gzip.GzipFile):
            say(f"{path}: is compressed; unpacking it once into {directory.parent} (MS MARCO's documents take 22 GB; "
                f"{shutil.disk_usage(directory).free / 1e9:,.0f} GB are free)")
            copy = stack.enter_context(atomic_writer(directory / "documents.tsv", "wb"))
        for document_id, offset, line in _checked_lines(path, source, problems, "indexing documents"):
            if copy:
                copy.write(line)
            hashes.append(hash_of(document_id))
            offsets.append(offset)
    if not offsets and not problems.count:
        problems.add(f"{path}: is empty; expected one document per line: {' or '.join(COLUMNS.values())}")
    problems.raise_if_any()
    hashes, offsets = np.frombuffer(hashes, np.uint64), np.frombuffer(offsets, np.int64)
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    with open(directory / "documents.tsv" if copy else path, "rb") as handle:
        for line, first_line, name in islice(_duplicates(handle, hashes, offsets, order), problems.limit):
            problems.add(f"{path}:{line}: document {shorten(name)} is a duplicate of line {first_line}; remove one")
    problems.raise_if_any()
    for name, values in (("hashes", hashes), ("offsets", offsets[order])):
        with atomic_writer(directory / f"{name}.npy", "wb") as handle:
            np.save(handle, values)


def _checked_lines(path: Path, source: IO[bytes], problems: Problems, progress_name: str = "") \
        -> Iterator[tuple[bytes, int, bytes]]:
    """Yield (document id, offset in the unpacked text after a byte order mark, line).

    Stops after `problems.limit` invalid lines. A progress bar is shown if it has a name.
    """
    number, offset, expected, limit = 0, 0, 0, problems.count + problems.limit
    on_disk = source.fileobj if isinstance(source, gzip.GzipFile) else source
    size = path.stat().st_size
    with tqdm(total=size, desc=progress_name, unit="B", unit_scale=True, disable=not progress_name) as progress:
        try:
            for number, line in enumerate(filter(is_line, source), start=1):
                start = 0
                while line.startswith(BOM, start):
                    start += len(BOM)
                columns = line.count(b"\t") + 1
                expected = expected or (columns if columns in COLUMNS else 4)
                document_id = line[start:max(line.find(b"\t"), start)]
                if error := _line_error(line, document_id, columns, expected):
                    problems.add(f"{path}:{number}: {error}")
                    if problems.count == limit:
                        return
                else:
                    yield document_id, offset + start, line
                offset += len(line)
                if number % 1000 == 0:
                    progress.update(on_disk.tell() - progress.n)
        except GZIP_ERRORS as error:
            problems.add(f"{path}:{number + 1}: {gzip_damage(error)}")
        progress.update(size - progress.n)


def _line_error(line: bytes, document_id: bytes, columns: int, expected: int) -> str | None:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        return decoding_error(line, error)
    if columns != expected:
        return (f"found {columns} tab-separated columns ({shorten(line[:200].decode('utf-8', 'replace'))}); expected "
                f"{COLUMNS[expected]} (or in every line {COLUMNS[6 - expected]})")
    name = document_id.decode("utf-8")
    if name.split() != [name]:
        return f"found document id {shorten(name)}; expected an id without white space"
    return None


def _duplicates(handle: IO[bytes], hashes: np.ndarray, offsets: np.ndarray, order: np.ndarray) \
        -> Iterator[tuple[int, int, str]]:
    """Yield (line, first line, id) of each duplicate. `order` sorted the `hashes`; `offsets` are in file order."""
    for repeated in np.unique(hashes[1:][hashes[1:] == hashes[:-1]]):
        first_lines = {}
        for index in order[_equal_range(hashes, repeated)].tolist():    # ascending, as the sort is stable
            name = _line_at(handle, int(offsets[index])).partition(b"\t")[0].decode("utf-8")
            if name in first_lines:
                yield index + 1, first_lines[name], name
            else:
                first_lines[name] = index + 1


def _equal_range(hashes: np.ndarray, value: np.uint64) -> slice:
    """Return where `value` occurs in sorted hashes."""
    return slice(np.searchsorted(hashes, value, "left"), np.searchsorted(hashes, value, "right"))


def _line_at(handle: IO[bytes], offset: int) -> bytes:
    handle.seek(offset)
    return handle.readline()
