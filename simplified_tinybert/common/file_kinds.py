"""Recognise files that are not what they should be: archives, Git LFS pointers, web pages, broken JSON or pickles."""
import json
import pickle
import pickletools
import re
from codecs import BOM_UTF8
from pathlib import Path
from typing import IO

from simplified_tinybert.common.files import UserError, reason

# First bytes → kind of file, command that turns it into text
ARCHIVES = {
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
}
LFS_POINTER = re.compile(rb"version https://[\w.-]+/spec/v1\b")
INSTRUCTIONS = frozenset(      # of pickles without classes and functions
    "PROTO FRAME STOP MARK EMPTY_DICT SETITEM SETITEMS MEMOIZE BINGET LONG_BINGET NEWTRUE NEWFALSE BININT BININT1 "
    "BININT2 LONG1 SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8".split())
WEB_PAGE = re.compile(rb"\s*<(!doctype|html|head|body|\?xml|error|!--)", re.IGNORECASE)


class _PlainUnpickler(pickle.Unpickler):
    """A second barrier: rejects classes and functions even if INSTRUCTIONS let one through."""

    def find_class(self, module: str, name: str) -> object:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


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
        start = handle.read(1024).removeprefix(BOM_UTF8)
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


def load_frame(handle: IO[bytes], path: Path, where: str) -> dict:
    """Read the next pickle frame of a feature file; nothing is executed. Raises UserError if it is not a plain dict."""
    if not handle.peek(1):
        raise UserError(f"{path}: is cut off {where}; create or copy the file again")
    start = handle.tell()
    try:
        for instruction, _, _ in pickletools.genops(handle):
            if instruction.name not in INSTRUCTIONS:
                raise pickle.UnpicklingError(f"pickle instruction {instruction.name} is not allowed; nothing in the "
                                             f"file was executed")
        handle.seek(start)
        frame = _PlainUnpickler(handle).load()
    except Exception as error:          # a damaged pickle can raise almost any exception
        raise UserError(f"{path}: is not a feature file, or damaged or cut off {where} "
                        f"({error or type(error).__name__}); run tokenize_to_features.py again") from error
    if not isinstance(frame, dict):
        raise UserError(f"{path}: has a {type(frame).__name__} {where}; expected a feature file")
    return frame
