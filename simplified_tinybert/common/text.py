"""Read UTF-8 text files, plain or gzip, with or without byte order marks, and recognise other types of files.

The file type is recognised by the first bytes, not by the file name.
"""
import codecs
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

from simplified_tinybert.common.files import Problems, UserError, reason

BUFFER = 2 ** 17        # bytes; Python's default of 8 KiB needs a system call every few lines
BLOCK = 2 ** 18         # bytes
BOM = codecs.BOM_UTF8   # concatenated files have one at the start of each part
GZIP_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)
Item = TypeVar("Item")

ENCODINGS = {           # UTF-32 first: its little-endian byte order mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
# First bytes → kind of file, command that turns it into text
ARCHIVES = {
    b"PK\x03\x04": ("a zip archive", "unzip"),
    b"BZh": ("compressed by bzip2", "bunzip2"),
    b"\xfd7zXZ\x00": ("compressed by xz", "unxz"),
    b"]\x00\x00\x80\x00": ("compressed by lzma", "unlzma"),
    b"LZIP\x01": ("compressed by lzip", "lzip -d"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "unzstd"),
    b"\x50\x2a\x4d\x18": ("compressed by zstd", "unzstd"),
    b"\x04\x22\x4d\x18": ("compressed by lz4", "unlz4"),
    b"\x1f\x9d": ("compressed by compress", "uncompress"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "7z x"),
    b"Rar!\x1a\x07": ("a rar archive", "unrar x"),
    b"PAR1\x15": ("a Parquet file", "pandas.read_parquet, then DataFrame.to_csv(sep='\\t')"),
}
LFS_POINTER = re.compile(rb"version https://[\w.-]+/spec/v1\b")
WEB_PAGE = re.compile(rb"\s*<(!doctype|html|head|body|\?xml|error|!--)", re.IGNORECASE)


@contextmanager
def open_binary(path: Path) -> Iterator[IO[bytes]]:
    """Open a plain or gzip text file in binary mode.

    Raises UserError if the first bytes show another file type or encoding. Damage further inside a gzip file raises
    one of GZIP_ERRORS while reading.
    """
    with open(path, "rb", buffering=BUFFER) as handle:
        # peek() instead of reading and reopening: bytes read from a pipe would be lost
        packed = handle.peek(2)[:2] == b"\x1f\x8b"
        with gzip.open(handle) if packed else handle as source:
            try:
                start = source.peek(BUFFER)
            except GZIP_ERRORS as error:
                raise UserError(f"{path}:1: {gzip_damage(error)}") from error
            _check_start(path, start)
            yield source


def _check_start(path: Path, start: bytes) -> None:
    """Raise UserError unless the first bytes of a file can be UTF-8 text."""
    if encoding := wide_encoding(start):
        raise UserError(f"{path}: is in {encoding}; {conversion_hint(encoding)}")
    if pointer := lfs_pointer(start):
        raise UserError(f"{path}: {pointer}")
    if archive := archive_kind(start):
        kind, command = archive
        raise UserError(f"{path}: is {kind}; expected text in UTF-8, plain or gzip; unpack it first: {command}")


def wide_encoding(start: bytes) -> str | None:
    """Return the UTF-16 or UTF-32 variant that a byte order mark or NUL bytes reveal; None for other encodings.

    Without a mark: in ASCII text, every second byte of UTF-16 and three of four bytes of UTF-32 are NUL.
    """
    for mark, name in ENCODINGS.items():
        if start.startswith(mark):
            return name
    quarter = min(len(start), 4096) // 4
    nuls = [start[offset:4 * quarter:4].count(0) for offset in range(4)]
    if quarter and nuls[3] == quarter and nuls[2] > 0.9 * quarter and nuls[0] < 0.1 * quarter:
        return "UTF-32LE"
    if quarter and nuls[0] == quarter and nuls[1] > 0.9 * quarter and nuls[3] < 0.1 * quarter:
        return "UTF-32BE"
    even, odd = nuls[0] + nuls[2], nuls[1] + nuls[3]
    if max(even, odd) > 0.6 * 2 * quarter and min(even, odd) < 0.1 * 2 * quarter:
        return "UTF-16LE" if even < odd else "UTF-16BE"
    return None


def conversion_hint(encoding: str) -> str:
    return f"convert the file first, for example: iconv -f {encoding} -t UTF-8"


def decoding_error(line: bytes, error: UnicodeDecodeError) -> str:
    """Describe why a line is not UTF-8 and how to fix it."""
    if line.startswith(b"\x1f\x8b"):
        return "is compressed by gzip twice; unpack it once: gunzip"
    encoding = ("UTF-16" if b"\0" in line or line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else
                "WINDOWS-1252" if any(0x80 <= byte < 0xa0 for byte in line[error.start:]) else "LATIN1")
    return f"byte {error.start + 1} of the line ({line[error.start]:#04x}) is not UTF-8; {conversion_hint(encoding)}"


def gzip_damage(error: Exception) -> str:
    return f"the gzip file is damaged or cut off here ({error}); fetch it again"


def read_lines(path: Path, problems: Problems) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text without its line end) of a plain or gzip file in UTF-8.

    Lines end in \\n or \\r\\n; other separators, for example U+2028 or a lone \\r, are part of the text. A byte order
    mark at the start of a line is dropped. Input errors are added to `problems`.
    """
    number = 0
    try:
        with open_binary(path) as handle:
            for number, line in enumerate(filter(is_line, handle), start=1):
                try:
                    yield number, _text(line)
                except UnicodeDecodeError as error:
                    problems.add(f"{path}:{number}: {decoding_error(line, error)}")
    except GZIP_ERRORS as error:
        problems.add(f"{path}:{number + 1}: {gzip_damage(error)}")
    except UserError as error:
        problems.add(str(error))


def is_line(line: bytes) -> bool:
    """Whether this counts as a line. A byte order mark alone, at the end of a concatenated file, does not."""
    return line.endswith(b"\n") or bool(line.replace(BOM, b""))


def _text(line: bytes) -> str:
    return line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8").lstrip("\ufeff")


def read_blocks(handle: IO[bytes]) -> Iterator[bytes]:
    """Yield a text file in blocks of about 256 KiB that end at line ends."""
    while block := handle.read(BLOCK):
        yield block + handle.readline()


def lines_of(block: bytes) -> list[str]:
    """Return the lines of a block, as `read_lines` yields them. Raises UnicodeDecodeError."""
    return list(map(_text, filter(is_line, io.BytesIO(block))))


def read_text(path: Path) -> str:
    """Return the content of a text file without its byte order mark. Raises UserError if it is not UTF-8."""
    try:
        with open_binary(path) as handle:
            content = handle.read()
        return content.decode("utf-8").removeprefix("\ufeff")
    except GZIP_ERRORS as error:
        raise UserError(f"{path}: {gzip_damage(error)}") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{line + 1}: byte {content[error.start]:#04x} is not UTF-8; "
                        f"{conversion_hint('LATIN1')}") from error


def archive_kind(start: bytes) -> tuple[str, str] | None:
    """Return the kind of an archive, from its first bytes, and the command that unpacks it; else None."""
    if start[257:].startswith(b"ustar"):
        return "a tar archive", "tar -xf"
    if start.startswith(b"BZh") and start[4:10] != b"1AY&SY":           # text may begin with BZh, too
        return None
    return next((kind for magic, kind in ARCHIVES.items() if start.startswith(magic)), None)


def lfs_pointer(start: bytes) -> str | None:
    """Return an error message if a file that begins with these bytes is a Git LFS pointer, else None."""
    if not LFS_POINTER.match(start):
        return None
    size = re.search(rb"^size (\d+)", start, re.MULTILINE)
    return (f"is a Git LFS pointer, not the file itself ({int(size[1]) if size else 0:,} bytes); fetch the file: "
            f"git lfs pull in the clone, or hf download")


def failed_download(path: Path) -> str | None:
    """Return an error message if a file is empty, a Git LFS pointer or a web page, else None."""
    with open(path, "rb") as handle:
        start = handle.read(1024).removeprefix(BOM)
    if not start.strip():
        return "is empty; fetch it again"
    if WEB_PAGE.match(start):
        return ("is a web page (HTML or XML), not the file itself; fetch the file by hf download, or from its address "
                "with /resolve/ in place of /blob/; a private model needs a login")
    return lfs_pointer(start)


def read_json(path: Path, what: str = "JSON file") -> dict:
    """Read a JSON object; {} if there is no such file. Raises UserError if the file is not a valid `what`."""
    if not path.is_file():
        return {}
    if error := failed_download(path):
        raise UserError(f"{path}: {error}")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not a valid {what}: {reason(error)}; fetch or write it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a valid {what}: holds a {type(content).__name__}; expected a JSON object")
    return content


def in_groups(items: Iterable[Item], size: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """Yield lists of consecutive items. A list ends as soon as the sizes of its items add up to `limit`."""
    group, total = [], 0
    for item in items:
        group.append(item)
        total += size(item)
        if total >= limit:
            yield group
            group, total = [], 0
    if group:
        yield group


def gives_flag(word: str, flags: Iterable[str]) -> bool:
    """Whether a word of a command line gives one of the flags, perhaps abbreviated, as argparse allows."""
    name = word.partition("=")[0]
    return len(name) > 2 and any(flag.startswith(name) for flag in flags)


def argument_text(argument: str) -> str:
    """Return an argument as typed, even if an ASCII locale made it surrogates. Bytes outside UTF-8 become \\xNN."""
    if any("\ud800" <= character <= "\udfff" for character in argument):
        return os.fsencode(argument).decode("utf-8", "backslashreplace")
    return argument
