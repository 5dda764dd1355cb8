"""The record that a run leaves beside what it wrote. Needs no model library, so that light scripts stay light."""
import argparse
import hashlib
import json
import platform
import sys
from pathlib import Path

from simplified_tinybert.common.files import UserError, atomic_writer

LIBRARIES = ("torch", "transformers", "ir_datasets")
SMALL = 2 ** 32         # bytes; of larger inputs size and time must do: hashing 22 GB takes minutes


def record(path: Path, args: argparse.Namespace, **facts: object) -> None:
    """Write run.json: arguments, versions and whatever else tells how the files beside it came about."""
    loaded = {name: sys.modules[name].__version__ for name in LIBRARIES if name in sys.modules}
    content = {"script": Path(sys.argv[0]).name,
               "arguments": {name: plain(value) for name, value in vars(args).items()},
               "versions": {"python": platform.python_version()} | loaded, **facts}
    with atomic_writer(path) as handle:
        json.dump(content, handle, indent=2)
        handle.write("\n")


def read_record(path: Path) -> dict:
    """What `record` wrote. Raises UserError if it is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and isinstance(content.get("settings"), dict):
            return content
    except ValueError:
        pass
    raise UserError(f"{path}: is not the record of a run of this tool, or damaged; remove it to start again")


def script_of(path: Path) -> str | None:
    """Name of the script whose run left a record; None if the file does not tell."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return content.get("script") if isinstance(content, dict) else None


def plain(value: object) -> object:
    """Paths, alone or in lists, as strings, so that JSON can hold them."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def file_state(path: Path) -> dict:
    """Size (bytes) and time of change (ns) of a file, and its SHA-256 unless it is huge."""
    status = path.stat()
    facts = {"bytes": status.st_size, "changed": status.st_mtime_ns}
    if path.is_file() and status.st_size <= SMALL:
        with open(path, "rb") as handle:
            facts["sha256"] = hashlib.file_digest(handle, "sha256").hexdigest()
    return facts


def file_identity(path: Path) -> dict:
    """What tells that a file is still the same one: its SHA-256, or, where it is huge, its time of change.

    A copy of a file has another time of change; that is no reason to give up work that is half done.
    """
    facts = file_state(path)
    return {name: facts[name] for name in ("bytes", "sha256" if "sha256" in facts else "changed")}


def record_path(path: Path) -> Path:
    """Where the record of a file lies: beside it."""
    return path.with_name(path.name + ".run.json")


def record_file(output: Path, args: argparse.Namespace, inputs: list[Path], **facts: object) -> None:
    """Write the record of a finished file: with its inputs, and with the records these have themselves.

    So a ranking of documents can be followed back, through the scores, to the model and the features.
    """
    made_from = []
    for path in inputs:
        made_from.append({"file": str(path), **file_state(path)})
        if known := _record_of(path, made_from[-1]):
            made_from[-1]["record"] = known
    record(record_path(output), args, output=file_state(output), made_from=made_from, **facts)


def _record_of(path: Path, facts: dict) -> dict | None:
    """The record beside a file, if it can be read and is of this content, not of a file that was here before."""
    try:
        content = json.loads(record_path(path).read_text(encoding="utf-8"))
        same = all(content["output"].get(name) == facts.get(name) for name in ("bytes", "sha256"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return content if same else None
