"""The training log, as JSON lines and for TensorBoard: mean losses per interval, dev measures."""
import json
import math
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from simplified_tinybert.common.files import UserError, atomic_writer, name_in_errors, shorten
from simplified_tinybert.common.processes import Processes
from simplified_tinybert.training.objective import RANKING, TERMS

LOSSES = ("loss", "cls_loss", "att_loss", "rep_loss", *(term.column for term in TERMS.values() if term.column))
RANKING_LOSSES = {TERMS[name].column for name in RANKING}           # only in the log if they are used
GRADIENTS = {name: name.replace("_loss", "_grad") for name in LOSSES[2:]}       # att_loss → att_grad ...


class TrainingLog:
    """Writes train_loss.jsonl (mean losses) and dev.jsonl (dev measures), also to TensorBoard, in the first process."""

    def __init__(self, directory: Path, tensorboard_dir: Path | None, device: torch.device, processes: Processes,
                 finished_steps: int = 0):
        self.loss_file, self.dev_file, self.best = directory / "train_loss.jsonl", directory / "dev.jsonl", -math.inf
        self.processes, self.tensorboard = processes, None
        self.used: set[str] = set()                     # names of losses
        self.sums = torch.zeros(len(LOSSES), dtype=torch.float64, device=device)           # of this process
        self.steps, self.skipped, self.examples, self.start = 0, 0, 0, time.perf_counter()
        self.bad_step = torch.zeros((), dtype=torch.int64, device=device)   # first with a NaN or infinite loss; 0: none
        if not processes.first:
            return
        # With a module of this name, TensorBoard does not import TensorFlow, which is slow and prints many messages
        sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only training needs it

        self.tensorboard = SummaryWriter(str(tensorboard_dir or directory / "tensorboard"),
                                         purge_step=finished_steps + 1)
        keep_rows(self.loss_file, finished_steps)
        self.best = max(map(first_measure, keep_rows(self.dev_file, finished_steps)), default=-math.inf)

    def add(self, losses: dict[str, Tensor], weight: float) -> None:
        """Add the losses of a batch with its weight in the step. Does not wait for the device."""
        zero = self.sums.new_zeros(())
        self.used |= losses.keys()
        self.sums += weight * torch.stack([losses.get(name, zero).detach().double() for name in LOSSES])

    def step(self, number: int, examples: int, made: bool = True) -> None:
        """Count a finished step, or one that loss scaling skipped. Does not wait for the device."""
        self.steps += 1
        self.skipped += not made
        self.examples += examples
        self.bad_step = torch.where(~torch.isfinite(self.sums[0]) & (self.bad_step == 0), number, self.bad_step)

    def write(self, global_step: int, learning_rate: float, norms: dict[str, float]) -> dict[str, float]:
        """Append a row for the steps since the last row. norms: gradient norms at the last step."""
        sums = self.processes.total(self.sums).tolist()
        seconds = time.perf_counter() - self.start
        losses = {name: value / self.steps for name, value in zip(LOSSES, sums, strict=True)
                  if name in self.used or name not in RANKING_LOSSES}
        row = {"global_step": global_step, **losses,
               "learning_rate": learning_rate, "examples_per_second": self.examples / seconds, **norms,
               **({"skipped_steps": self.skipped} if self.skipped else {})}
        self._append(self.loss_file, row)
        self.sums.zero_()
        self.steps, self.skipped, self.examples, self.start = 0, 0, 0, time.perf_counter()
        return row

    def write_dev(self, global_step: int, measures: dict[str, float]) -> bool:
        """Append a row of dev measures. Returns True in the first process if the first measure is the best so far."""
        row = {"global_step": global_step, **measures}
        self._append(self.dev_file, row, "dev/")
        better = self.processes.first and first_measure(row) > self.best
        self.best = max(self.best, first_measure(row))
        return better

    def _append(self, path: Path, row: dict[str, float], prefix: str = "") -> None:
        if not self.processes.first:
            return
        with name_in_errors(path), open(path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")
        for name, value in list(row.items())[1:]:
            self.tensorboard.add_scalar(prefix + name, value, row["global_step"])
        self.tensorboard.flush()

    def exclude(self, seconds: float) -> None:
        """Exclude time that was not spent on training from examples_per_second."""
        self.start += seconds

    def state(self) -> dict:
        return {"sums": self.sums.cpu(), "steps": self.steps, "skipped": self.skipped, "examples": self.examples,
                "seconds": time.perf_counter() - self.start}

    def restore(self, states: list[dict]) -> None:
        """Add up the saved states of the processes whose work this process continues.

        They are several if there were more processes before.
        """
        for state in states:
            self.sums += state["sums"].to(self.sums.device)
            self.steps, self.skipped, self.examples = state["steps"], state["skipped"], state["examples"]
            self.start = time.perf_counter() - state["seconds"]

    def close(self) -> None:
        if self.tensorboard:
            self.tensorboard.close()


def keep_rows(path: Path, finished_steps: int) -> list[dict]:
    """Remove rows after `finished_steps`, and an incomplete last row, from a log. Returns the remaining rows."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    kept = [row for row in rows_of(path, text.split("\n")[:-1]) if row["global_step"] <= finished_steps]
    lines = "".join(json.dumps(row) + "\n" for row in kept)
    if lines != text:
        with atomic_writer(path) as handle:
            handle.write(lines)
    return kept


def rows_of(path: Path, lines: list[str]) -> Iterator[dict]:
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row["global_step"], int) or len(row) < 2:
                raise ValueError
        except (ValueError, TypeError, LookupError):
            raise UserError(f"{path}:{number}: is no row of this log ({shorten(line)}); remove the line, and --resume "
                            f"continues") from None
        yield row


def first_measure(row: dict[str, float]) -> float:
    """Return the value that selects the best student from a row of dev.jsonl."""
    return list(row.values())[1]
