"""A training run and its output directory: a lock, run.json, and the finished student."""
import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from simplified_tinybert.common.files import UserError, say
from simplified_tinybert.common.processes import Processes, locked
from simplified_tinybert.common.records import read_record, record
from simplified_tinybert.model.bert import CrossEncoder
from simplified_tinybert.training.checkpoints import newest_checkpoint, remove_leftovers

OPTIONAL = {"tf32", "teacher", "teacher_scores", "group_by_query"}   # settings that are only recorded if they are used


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
