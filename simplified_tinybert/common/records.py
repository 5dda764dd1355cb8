"""Provenance records: JSON files written next to outputs. Imports no model library, to keep light scripts fast."""
import argparse
import hashlib
import json
import platform
import sys
from pathlib import Path

from simplified_tinybert.common.files import UserError, atomic_writer

LIBRARIES = ("torch", "transformers", "ir_datasets")
MAX_HASHED_BYTES = 2 ** 32      # hashing 22 GB takes minutes


def record(path: Path, args: argparse.Namespace, **metadata: object) -> None:
    """Write a record: script, arguments, versions and further metadata."""
    loaded = {name: sys.modules[name].__version__ for name in LIBRARIES if name in sys.modules}
    content = {"script": Path(sys.argv[0]).name,
               "arguments": vars(args),
               "versions": {"python": platform.python_version()} | loaded, **metadata}
    with atomic_writer(path) as handle:
        json.dump(content, handle, indent=2, default=str)       # paths
        handle.write("\n")


def read_record(path: Path) -> dict:
    """Read the record of a run with settings. Raises UserError if the file is something else."""
    content = _read_json(path)
    if isinstance(content.get("settings"), dict):
        return content
    raise UserError(f"{path}: is damaged, or not the record of a run of this tool; restore it, or remove it "
                    "and the files that it describes, to start again")


def script_of(path: Path) -> str | None:
    """Return the name of the script that wrote a record, or None."""
    return _read_json(path).get("script")


def _read_json(path: Path) -> dict:
    """Return the JSON object in a file; {} if the file is damaged or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def file_state(path: Path) -> dict:
    """Return size (bytes) and modification time (ns) of a file, and its SHA-256 unless it is huge."""
    status = path.stat()
    state = {"bytes": status.st_size, "changed": status.st_mtime_ns}
    if path.is_file() and status.st_size <= MAX_HASHED_BYTES:
        state["sha256"] = sha256_of(path)
    return state


def file_identity(path: Path) -> dict:
    """Return the part of a file's state that a copy keeps: its SHA-256; for a huge file, its modification time."""
    state = file_state(path)
    return {name: state[name] for name in ("bytes", "sha256" if "sha256" in state else "changed")}


def record_path(path: Path) -> Path:
    return path.with_name(path.name + ".run.json")


def record_file(output: Path, args: argparse.Namespace, inputs: list[Path], **metadata: object) -> None:
    """Write the record of a finished file, including the records of its inputs.

    This way, a ranking can be traced back to its scores, and the scores to the model and the features.
    """
    made_from = []
    for path in inputs:
        state = file_state(path)
        known = _record_of(path, state)
        made_from.append({"file": str(path), **state} | ({"record": known} if known else {}))
    record(record_path(output), args, output=file_state(output), made_from=made_from, **metadata)


def _record_of(path: Path, state: dict) -> dict | None:
    """Return the record next to a file, or None if it does not describe the file's present content."""
    try:
        content = _read_json(record_path(path))
        same = all(content["output"].get(name) == state.get(name) for name in ("bytes", "sha256"))
    except (OSError, LookupError, TypeError, AttributeError):
        return None
    return content if same else None
