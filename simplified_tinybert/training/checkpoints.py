"""Checkpoints of a training: what --resume needs, and directories that are always whole."""
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from simplified_tinybert.common.files import Problems, UserError, atomic_writer, sync_directory
from simplified_tinybert.common.records import read_record

STATE_FILE, BEST = "training_state.pt", "best"


def check_output_dir(directory: Path, resume: bool | None, problems: Problems) -> None:
    """An output directory is new or empty, or holds a run that --resume may continue (None: there is no such flag)."""
    if directory.exists() and not directory.is_dir():
        problems.add(f"{directory}: is a file; name a directory")
    elif directory.is_dir() and any(not path.name.startswith(".") for path in directory.iterdir()):
        if not resume:
            way_out = "" if resume is None else ", or continue the run in it with --resume"
            problems.add(f"{directory}: is not empty; name a new directory{way_out}")
        elif not (directory / "run.json").is_file():
            problems.add(f"{directory}: is not empty and holds no run to --resume (no run.json); name another "
                         f"directory")


def find_run(output_dir: Path, settings: dict) -> tuple[bool, Path | None]:
    """Whether the run in the output directory is finished, and the checkpoint to continue from.

    Raises UserError if that run has other settings.
    """
    path = output_dir / "run.json"
    if not path.is_file():
        return False, None
    run = read_record(path)
    if run["settings"].keys() != settings.keys():
        raise UserError(f"{output_dir}: created by another version; only that version can resume it; name another "
                        f"directory, or remove this one to start again")
    changed = [f"{name} was {run['settings'].get(name)}, is {value}"
               for name, value in settings.items() if run["settings"].get(name) != value]
    if changed:
        raise UserError(f"{output_dir}: holds a run with other settings ({'; '.join(changed)}); name another "
                        f"directory, or remove this one to start again")
    return run.get("finished", False), newest_checkpoint(output_dir)


def replace_directory(directory: Path, save_model: Callable[[Path], None], state: dict | None = None) -> None:
    """Write a model, and a training state if given, under a temporary name, then rename: the directory is always whole.

    Replaces an existing directory. If the run is killed in between, --resume comes here again.
    """
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}")
    try:
        save_model(temporary)
        if state:
            with atomic_writer(temporary / STATE_FILE, "wb") as handle:
                torch.save(state, handle)
        if directory.is_dir():
            remove_directory(directory)
        os.rename(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_directory(directory.parent)


def remove_directory(directory: Path) -> None:
    """Remove a checkpoint or the best student; whenever it is killed, no part remains under the directory's name."""
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    os.rename(directory, temporary)
    shutil.rmtree(temporary)


def remove_leftovers(output_dir: Path) -> None:
    """Remove what a killed run left half-written in its output directory."""
    for path in [*output_dir.glob(".checkpoint-*"), *output_dir.glob(f".{BEST}.*"), *output_dir.glob(".*.tmp")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def read_state(checkpoint: Path) -> dict:
    """The training state of a checkpoint, on the CPU. Raises UserError if the file is damaged."""
    try:
        return torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{checkpoint / STATE_FILE}: is damaged; remove {checkpoint}, and --resume continues from the "
                        f"checkpoint before") from error


def checkpoints_of(output_dir: Path) -> list[Path]:
    """The checkpoint directories of a run, oldest first."""
    return sorted((path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)),
                  key=step_of)


def newest_checkpoint(output_dir: Path) -> Path | None:
    return (checkpoints_of(output_dir) or [None])[-1]


def step_of(checkpoint: Path) -> int:
    """Finished steps, from the name of a checkpoint directory."""
    return int(checkpoint.name.removeprefix("checkpoint-"))
