"""A training run and its output directory: one writer at a time, a record of what made it, the finished student."""
import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from simplified_tinybert.common.files import locked, say
from simplified_tinybert.common.processes import Processes
from simplified_tinybert.common.records import record
from simplified_tinybert.model.bert import CrossEncoder
from simplified_tinybert.model.pretrained import save_cross_encoder
from simplified_tinybert.training.checkpoints import find_run, remove_leftovers


@dataclass(frozen=True, kw_only=True)
class SavedAs:
    """What stands beside the weights of a saved student. general: it is saved without its classifier."""
    tokenizer_dir: Path | None
    lower_case: bool
    card: str
    general: bool = False

    def save(self, student: CrossEncoder, directory: Path) -> None:
        save_cross_encoder(student, directory, self.tokenizer_dir, self.lower_case, self.card, self.general)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run in its output directory. metadata: what run.json holds beside the arguments; "settings" must not change.

    saved_as is known once the models are loaded; `with_models` adds it.
    """
    args: argparse.Namespace
    metadata: dict
    processes: Processes
    finished: bool
    checkpoint: Path | None                             # to continue from
    saved_as: SavedAs | None = None

    @property
    def output_dir(self) -> Path:
        return self.args.output_student_dir

    def save(self, student: CrossEncoder, directory: Path) -> None:
        self.saved_as.save(student, directory)

    def finish(self, student: CrossEncoder) -> None:
        """Write the finished student and mark the run as finished."""
        if self.processes.first:
            self.save(student, self.output_dir)
            self._record(finished=True)
            say(f"student      {self.output_dir}")

    def _record(self, finished: bool) -> None:
        record(self.output_dir / "run.json", self.args, **self.metadata, finished=finished)


def find_output_run(args: argparse.Namespace, metadata: dict, processes: Processes) -> Run:
    """The run that --output_student_dir holds or will hold. Raises UserError if one with other settings is there."""
    finished, checkpoint = find_run(args.output_student_dir, metadata["settings"])
    processes.check_agreement(metadata["settings"] | {"checkpoint": checkpoint})
    if finished:
        say(f"{args.output_student_dir}: the student is already finished; remove the directory to make it again")
    return Run(args=args, metadata=metadata, processes=processes, finished=finished, checkpoint=checkpoint)


@contextmanager
def output_run(run: Run, saved_as: SavedAs) -> Iterator[Run]:
    """The run, in an output directory that no other process writes to meanwhile."""
    run = replace(run, saved_as=saved_as)
    if not run.processes.first:
        yield run
        return
    run.output_dir.mkdir(parents=True, exist_ok=True)
    with locked(run.output_dir):
        remove_leftovers(run.output_dir)
        run._record(finished=False)
        yield run
