"""A training run's output directory: a lock, run.json, checkpoints that are never incomplete, the finished student."""
import argparse
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from simplified_tinybert.common.files import Problems, UserError, atomic_writer, say, sync_directory
from simplified_tinybert.common.processes import Processes, locked
from simplified_tinybert.common.records import read_record, record
from simplified_tinybert.model.bert import CrossEncoder

STATE_FILE, BEST = "training_state.pt", "best"
STATE_KEYS = {"step", "optimizer", "scaler", "processes"}
OPTIONAL = {"teacher", "teacher_scores", "group_by_query"}   # settings that are only recorded if they are used


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A run in its output directory. settings: what must not change when it is resumed."""
    args: argparse.Namespace
    settings: dict
    processes: Processes
    finished: bool = False
    checkpoint: Path | None = None                      # to resume from
    save_model: Callable[[CrossEncoder, Path], None] | None = None

    @property
    def output_dir(self) -> Path:
        return self.args.output_student_dir

    def finish(self, student: CrossEncoder) -> None:
        """Write the finished student and mark the run as finished."""
        if self.processes.first:
            self.save_model(student, self.output_dir)
            self.record(finished=True)
            say(f"student      {self.output_dir}")

    def record(self, finished: bool) -> None:
        record(self.output_dir / "run.json", self.args, settings=self.settings, device=str(self.processes.device),
               finished=finished)


def find_run(args: argparse.Namespace, settings: dict, processes: Processes) -> TrainingRun:
    """Return the run in --output_student_dir, or a new one. Raises UserError if that run has other settings."""
    run = TrainingRun(args=args, settings=settings, processes=processes)
    if (run.output_dir / "run.json").is_file():
        content = read_record(run.output_dir / "run.json")
        check_same_settings(run.output_dir, content["settings"], settings)
        run = replace(run, finished=content.get("finished", False), checkpoint=newest_checkpoint(run.output_dir))
    processes.check_agreement(settings | {"checkpoint": run.checkpoint})
    if run.finished:
        say(f"{run.output_dir}: the student is already finished; remove the directory to make it again")
    return run


def check_same_settings(output_dir: Path, before: dict, now: dict) -> None:
    """Raise UserError if a setting has changed. The number of processes may change: it changes dropout only."""
    way_out = "name another directory, or remove this one to start again"
    if before.keys() - OPTIONAL != now.keys() - OPTIONAL:
        raise UserError(f"{output_dir}: created by another version; only that version can resume it; {way_out}")
    changed = [f"{name} was {before.get(name)}, is {now.get(name)}" for name in {**before, **now}
               if before.get(name) != now.get(name) and name != "processes"]
    if changed:
        raise UserError(f"{output_dir}: holds a run with other settings ({'; '.join(changed)}); {way_out}")


@contextmanager
def output_run(run: TrainingRun, save_model: Callable[[CrossEncoder, Path], None]) -> Iterator[TrainingRun]:
    """Lock the output directory against other jobs and start the run in it."""
    run = replace(run, save_model=save_model)
    if not run.processes.first:
        yield run
        return
    run.output_dir.mkdir(parents=True, exist_ok=True)
    with locked(run.output_dir):
        if (run.output_dir / "run.json").exists() and newest_checkpoint(run.output_dir) != run.checkpoint:
            raise UserError(f"{run.output_dir}: another job has saved a checkpoint while this one was starting; run "
                            "the same command again")
        remove_leftovers(run.output_dir)
        run.record(finished=False)
        yield run


def check_output_dir(directory: Path, resume: bool | None, problems: Problems) -> None:
    """Check that the directory is new or empty, or holds a run to resume. resume=None: the script has no --resume."""
    if directory.exists() and not directory.is_dir():
        problems.add(f"{directory}: is a file; name a directory")
    elif directory.is_dir() and any(not path.name.startswith(".") for path in directory.iterdir()):
        if not resume:
            way_out = "" if resume is None else ", or use --resume to continue the run in it"
            problems.add(f"{directory}: is not empty; name a new directory{way_out}")
        elif not (directory / "run.json").is_file():
            problems.add(f"{directory}: is not empty and holds no run to --resume (no run.json); name a new directory, "
                         f"or remove this one")
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if existing.is_dir() and not os.access(existing, os.W_OK | os.X_OK):
        problems.add(f"{directory}: cannot be written: {existing} is not writable")


def replace_directory(directory: Path, save_model: Callable[[Path], None], state: dict | None = None) -> None:
    """Write a model, and a training state if given, under a temporary name; then replace `directory` by it."""
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}")
    try:
        save_model(temporary)
        if state:
            with atomic_writer(temporary / STATE_FILE, "wb") as handle:
                torch.save(state, handle)
        if directory.is_dir():
            remove_directory(directory)                 # a run killed here writes it again when resumed
        os.rename(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_directory(directory.parent)


def remove_directory(directory: Path) -> None:
    """Remove a directory. If the process is killed meanwhile, no part of it remains under its name."""
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    os.rename(directory, temporary)
    shutil.rmtree(temporary)


def remove_leftovers(output_dir: Path) -> None:
    """Remove the unfinished files of a killed run."""
    for path in [*output_dir.glob(".checkpoint-*"), *output_dir.glob(f".{BEST}.*"), *output_dir.glob(".*.tmp")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def read_state(checkpoint: Path) -> dict:
    """Read the training state of a checkpoint to the CPU. Raises UserError if the file is damaged."""
    path = checkpoint / STATE_FILE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not STATE_KEYS <= set(state):
            raise ValueError
        return state
    except (OSError, RuntimeError, EOFError, ValueError, TypeError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: is missing or damaged; {way_out(checkpoint)}") from error


@contextmanager
def name_way_out(checkpoint: Path | None) -> Iterator[None]:
    """Add a way out to errors of reading a checkpoint's model."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}; or {way_out(checkpoint)}" if checkpoint else str(error)) from error


def way_out(checkpoint: Path) -> str:
    return f"remove {checkpoint}, and --resume continues from the previous checkpoint"


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of the random generators that this process uses."""
    cuda = {"cuda_random": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"random": torch.get_rng_state(), **cuda}


def restore_random_state(states: list[dict], rank: int, count: int, device: torch.device) -> bool:
    """Restore a process's random state. Returns False if the run had other processes or was not on this kind of device.

    The random state then stays as it is: dropout differs from an uninterrupted run, but not the order of the examples.
    """
    if len(states) != count or (device.type == "cuda") != ("cuda_random" in states[rank]):
        return False
    torch.set_rng_state(states[rank]["random"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[rank]["cuda_random"], device)
    return True


def checkpoints_of(output_dir: Path) -> list[Path]:
    """Return the checkpoint directories of a run, oldest first."""
    return sorted((path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)),
                  key=step_of)


def newest_checkpoint(output_dir: Path) -> Path | None:
    return (checkpoints_of(output_dir) or [None])[-1]


def step_of(checkpoint: Path) -> int:
    """Return the number of finished steps, from the name of a checkpoint directory."""
    return int(checkpoint.name.removeprefix("checkpoint-"))
