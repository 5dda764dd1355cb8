"""The log of a training: means of the loss terms over intervals of steps, as JSON lines and for TensorBoard."""
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from simplified_tinybert.distributed import Processes
from simplified_tinybert.files import UserError, atomic_writer

TERMS = ("loss", "cls_loss", "att_loss", "rep_loss", "soft_loss", "hard_loss")


class TrainingLog:
    """Means of the loss terms over intervals of steps, to train_loss.jsonl and TensorBoard by the first process."""

    def __init__(self, path: Path, tensorboard_dir: Path, device: torch.device, processes: Processes,
                 finished_steps: int = 0):
        self.path, self.processes, self.tensorboard = path, processes, None
        self.sums = torch.zeros(len(TERMS), dtype=torch.float64, device=device)            # of this process
        self.steps, self.examples, self.since = 0, 0, time.perf_counter()
        if not processes.first:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only training needs it

        self.tensorboard = SummaryWriter(str(tensorboard_dir), purge_step=finished_steps + 1)
        kept = [line for line in path.read_text().splitlines() if json.loads(line)["global_step"] <= finished_steps] \
            if path.is_file() else []
        with atomic_writer(path) as handle:
            handle.writelines(line + "\n" for line in kept)

    def add(self, terms: dict[str, Tensor], weight: float) -> None:
        """Count the terms of one batch with its share `weight` of the step's examples; asks nothing of the device."""
        zero = self.sums.new_zeros(())
        self.sums += weight * torch.stack([terms.get(name, zero).detach().double() for name in TERMS])

    def step(self, examples: int) -> None:
        self.steps += 1
        self.examples += examples

    def write(self, global_step: int, learning_rate: float) -> dict[str, float]:
        """Append a row for the steps since the last one. Raises UserError if the loss is no longer a number."""
        sums = self.check(global_step)
        seconds = time.perf_counter() - self.since
        row = {"global_step": global_step, **{name: value / self.steps for name, value in zip(TERMS, sums)},
               "learning_rate": learning_rate, "examples_per_second": self.examples / seconds}
        if self.processes.first:
            with open(self.path, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")
            for name, value in list(row.items())[1:]:
                self.tensorboard.add_scalar(name, value, global_step)
            self.tensorboard.flush()
        self.sums.zero_()
        self.steps, self.examples, self.since = 0, 0, time.perf_counter()
        return row

    def check(self, global_step: int) -> list[float]:
        """Sums of the terms since the last row, over all processes.

        Raises UserError, in every process, if a loss was not a number: neither a row nor a checkpoint may hold it.
        """
        sums = self.processes.total(self.sums).tolist()
        if not math.isfinite(sums[0]):
            raise UserError(f"the loss of steps {global_step - self.steps + 1} to {global_step} is {sums[0]}; lower "
                            f"--learning_rate, or use --bf16 in place of --fp16; if it is so from the first step on, "
                            f"the weights of teacher or student are broken")
        return sums

    def state(self) -> dict:
        return {"sums": self.sums.cpu(), "steps": self.steps, "examples": self.examples,
                "seconds": time.perf_counter() - self.since}

    def restore(self, state: dict) -> None:
        self.sums.copy_(state["sums"])
        self.steps, self.examples = state["steps"], state["examples"]
        self.since = time.perf_counter() - state["seconds"]

    def close(self) -> None:
        if self.tensorboard:
            self.tensorboard.close()
