"""Reading text files: UTF-8, plain or gzip, with or without byte order marks. What else a file can be is named.

Every text file of a user is read by these functions. Which kind of file it is, its first bytes tell, not its name.
"""
import codecs
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from simplified_tinybert.common.files import Problems, UserError

BUFFER = 2 ** 17        # bytes; Python's own 8 KiB make a system call of every few lines
BLOCK = 2 ** 18         # bytes
MARK = codecs.BOM_UTF8  # of a line: files that were joined have one wherever a part begins
BAD_GZIP = (EOFError, zlib.error, gzip.BadGzipFile)

# First bytes → what the file is, and the command that makes a text file of it
KINDS = {
    b"PK\x03\x04": ("a zip archive", "unzip"),
    b"BZh": ("compressed by bzip2", "bunzip2"),
    b"\xfd7zXZ\x00": ("compressed by xz", "unxz"),
    b"]\x00\x00\x80\x00": ("compressed by lzma", "unlzma"),
    b"LZIP": ("compressed by lzip", "lzip -d"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "unzstd"),
    b"\x50\x2a\x4d\x18": ("compressed by zstd", "unzstd"),
    b"\x04\x22\x4d\x18": ("compressed by lz4", "unlz4"),
    b"\x1f\x9d": ("compressed by compress", "uncompress"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "7z x"),
    b"Rar!\x1a\x07": ("a rar archive", "unrar x"),
    b"PAR1": ("a Parquet file", "pandas.read_parquet, then DataFrame.to_csv(sep='\\t')"),
    b"version https://git-lfs": ("a Git LFS pointer, not the file itself", "git lfs pull"),
}
TAR = 257, b"ustar"     # where a tar archive says what it is
ENCODINGS = {           # in this order: UTF-32's mark begins with one of UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


@contextmanager
def open_binary(path: Path) -> Iterator[IO[bytes]]:
    """Open a plain or gzip file of text for reading its bytes.

    Raises UserError for a file of another kind or encoding, as far as its first bytes tell. Where a gzip file is
    damaged later on, reading it raises one of BAD_GZIP.
    """
    with open(path, "rb", buffering=BUFFER) as handle:
        # Peeked at, not read and opened anew: what has been read from a pipe is gone.
        if handle.peek(2)[:2] == b"\x1f\x8b":
            with gzip.open(handle) as unpacked:
                try:
                    start = unpacked.peek(BUFFER)
                except BAD_GZIP as error:
                    raise UserError(f"{path}:1: {damaged(error)}") from error
                _check_start(path, start)
                yield unpacked
        else:
            _check_start(path, handle.peek(BUFFER))
            yield handle


def _check_start(path: Path, start: bytes) -> None:
    """Raise UserError if a file that begins so is no UTF-8 text."""
    if encoding := encoding_of(start):
        raise UserError(f"{path}: is in {encoding}; {convert_from(encoding)}")
    found = next((KINDS[magic] for magic in KINDS if start.startswith(magic)), None)
    if found and found[1] == "bunzip2" and start[4:10] != b"1AY&SY":
        found = None                                    # "BZh" could begin a text
    if start[TAR[0]:].startswith(TAR[1]):
        found = "a tar archive", "tar -xf"
    if found:
        raise UserError(f"{path}: is {found[0]}; expected text in UTF-8, plain or gzip; unpack it first: {found[1]}")


def encoding_of(start: bytes) -> str | None:
    """UTF-16 or UTF-32, where the beginning of a file shows it by a byte order mark or its NUL bytes; else None.

    Without a mark, ASCII in UTF-16 has a NUL at every second byte; in UTF-32 three of four bytes are.
    """
    for mark, name in ENCODINGS.items():
        if start.startswith(mark):
            return name
    quarter = min(len(start), 4096) // 4
    nuls = [start[place:4 * quarter:4].count(0) for place in range(4)]
    if quarter and nuls[3] == quarter and nuls[2] > 0.9 * quarter and nuls[0] < 0.1 * quarter:
        return "UTF-32LE"
    if quarter and nuls[0] == quarter and nuls[1] > 0.9 * quarter and nuls[3] < 0.1 * quarter:
        return "UTF-32BE"
    even, odd = nuls[0] + nuls[2], nuls[1] + nuls[3]
    if max(even, odd) > 0.6 * 2 * quarter and min(even, odd) < 0.1 * 2 * quarter:
        return "UTF-16LE" if even < odd else "UTF-16BE"
    return None


def convert_from(encoding: str) -> str:
    return f"convert the file first, for example: iconv -f {encoding} -t UTF-8"


def not_utf8(line: bytes, error: UnicodeDecodeError) -> str:
    """What is wrong with such a line, and the way out."""
    if line.startswith(b"\x1f\x8b"):
        return "is compressed by gzip twice; unpack it once: gunzip"
    encoding = ("UTF-16" if b"\0" in line or line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else
                "WINDOWS-1252" if any(0x80 <= byte < 0xa0 for byte in line[error.start:]) else "LATIN1")
    return f"byte {error.start + 1} of the line ({line[error.start]:#04x}) is not UTF-8; {convert_from(encoding)}"


def damaged(error: Exception) -> str:
    return f"the gzip file is damaged or cut off here ({error}); fetch it again"


def read_lines(path: Path, problems: Problems) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text without its line end) of a plain or .gz file in UTF-8.

    Only \\n (and \\r\\n) ends a line: other separators, such as U+2028 or a lone \\r, are part of the text. A byte
    order mark at the beginning of a line is dropped. A line that is not UTF-8 and a file that is no text or a damaged
    archive are added to `problems`, not yielded.
    """
    number = 0
    try:
        with open_binary(path) as handle:
            for number, line in enumerate(filter(is_line, handle), start=1):
                try:
                    yield number, _text(line)
                except UnicodeDecodeError as error:
                    problems.add(f"{path}:{number}: {not_utf8(line, error)}")
    except BAD_GZIP as error:
        problems.add(f"{path}:{number + 1}: {damaged(error)}")
    except UserError as error:
        problems.add(str(error))


def is_line(line: bytes) -> bool:
    """A file that is empty but for its mark, joined to the end of another one, adds no line."""
    return line.endswith(b"\n") or bool(line.replace(MARK, b""))


def _text(line: bytes) -> str:
    return line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8").lstrip("\ufeff")


def read_blocks(handle: IO[bytes]) -> Iterator[bytes]:
    """A text file in blocks of about 256 KiB that end where a line does."""
    while block := handle.read(BLOCK):
        yield block + handle.readline()


def lines_of(block: bytes) -> list[str]:
    """The lines of such a block, as `read_lines` yields them. Raises UnicodeDecodeError."""
    return list(map(_text, filter(is_line, io.BytesIO(block))))


def read_text(path: Path) -> str:
    """A whole file (a vocabulary, settings) without its byte order mark; line ends stay as they are.

    Raises UserError if it is no text in UTF-8.
    """
    try:
        with open_binary(path) as handle:
            content = handle.read()
        return content.decode("utf-8").removeprefix("\ufeff")
    except BAD_GZIP as error:
        raise UserError(f"{path}: {damaged(error)}") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{line + 1}: byte {content[error.start]:#04x} is not UTF-8; "
                        f"{convert_from('LATIN1')}") from error


def argument_text(argument: str) -> str:
    """An argument of the command line as it was typed, also where the locale knows nothing but ASCII.

    Python then keeps its bytes as surrogates, which no file can hold. Bytes that are no UTF-8 become \\xNN.
    """
    if any("\ud800" <= letter <= "\udfff" for letter in argument):
        return os.fsencode(argument).decode("utf-8", "backslashreplace")
    return argument
