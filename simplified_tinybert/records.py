"""The record that a run leaves beside what it wrote. Needs no model library, so that light scripts stay light."""
import argparse
import hashlib
import json
import platform
import sys
from pathlib import Path

from simplified_tinybert.files import UserError, atomic_writer

LIBRARIES = ("torch", "transformers", "ir_datasets")
SMALL = 2 ** 26         # bytes; of larger inputs size and time must do: hashing 22 GB takes minutes


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


def input_facts(path: Path) -> dict:
    """Size (bytes) and time of change (ns) of an input file, and the SHA-256 of a small one."""
    status = path.stat()
    facts = {"bytes": status.st_size, "changed": status.st_mtime_ns}
    if status.st_size <= SMALL:
        facts["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return facts
