"""On which device a script computes, and the record it leaves."""
import argparse
import json
import platform
import sys
from pathlib import Path

import torch
import transformers

from simplified_tinybert.files import UserError, atomic_writer, warn


def select_device(name: str, no_cuda: bool = False) -> torch.device:
    """Device of --device: auto, cpu, cuda, cuda:1, or a CUDA index as the original took it. Raises UserError.

    As in the original a bare index on a machine without CUDA means the CPU; `cuda` asked for by name is an error there.
    """
    available = 0 if no_cuda or not torch.cuda.is_available() else torch.cuda.device_count()
    if name == "cpu" or no_cuda or (name == "auto" and not available):
        return torch.device("cpu")
    if name in ("auto", "cuda"):
        name = "cuda:0"
    index = name.removeprefix("cuda:")
    if not index.isdecimal():
        raise UserError(f"--device {name}: expected auto, cpu, cuda, cuda:1, or the index of one CUDA device")
    if not available and name == index:
        warn(f"--device {name}: no CUDA device here, computing on the CPU")
        return torch.device("cpu")
    if int(index) >= available:
        raise UserError(f"--device {name}: {available} CUDA devices can be used here; --device cpu works everywhere")
    return torch.device("cuda", int(index))


def record(path: Path, args: argparse.Namespace, **facts: object) -> None:
    """Write run.json: arguments, versions and whatever else tells how the files beside it came about."""
    content = {"script": Path(sys.argv[0]).name,
               "arguments": {name: plain(value) for name, value in vars(args).items()},
               "versions": {"python": platform.python_version(), "torch": torch.__version__,
                            "transformers": transformers.__version__}, **facts}
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


def plain(value: object) -> object:
    """Paths, alone or in lists, as strings, so that JSON can hold them."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value

