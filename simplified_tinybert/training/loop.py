"""The training loop: order of batches, gradient accumulation, validation, checkpoints to go on from."""
import math
import os
import pickle
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from simplified_tinybert.common.files import UserError, atomic_writer, say, sync_folder
from simplified_tinybert.common.processes import Processes, Share, data_parallel, exchanging
from simplified_tinybert.common.signals import StopRequests, end_by
from simplified_tinybert.data.features import Examples
from simplified_tinybert.model.bert import Batch, CrossEncoder
from simplified_tinybert.model.precision import ApexScaler, LossScaler, autocast
from simplified_tinybert.training.log import GRADIENTS, TrainingLog
from simplified_tinybert.training.objective import Weights, uses_labels
from simplified_tinybert.training.optimizer import BertAdam
from simplified_tinybert.training.validation import DevSet

STATE_FILE, BEST = "training_state.pt", "best"
HEED_EVERY = {"cpu": 1, "cuda": 50}         # steps after which losses and signals are looked at, which a GPU waits for
POOL = 64          # batches from which examples of similar length are put together


@dataclass
class Plan:
    """How the examples become the optimizer steps of a stage, and what these minimize.

    width: positions to pad to, None for the longest of the batch.
    """
    batch_size: int
    accumulation: int
    epochs: float
    seed: int
    width: int | None
    bucket: bool
    log_every: int
    save_every: int
    eval_every: int
    weights: Weights
    learning_rate: float
    keep: int | None = None                             # newest checkpoints; None: all
    log_gradients: bool = False

    def steps_per_epoch(self, examples: int) -> int:
        """Smaller last batches and groups of batches count: every example is used."""
        return math.ceil(math.ceil(examples / self.batch_size) / self.accumulation)

    def total_steps(self, examples: int) -> int:
        return max(1, round(self.epochs * self.steps_per_epoch(examples))) if self.epochs else 0


@dataclass
class Training:
    """A student, what it minimizes (`objective`: batch → its share of the loss terms), and all that has a state."""
    student: CrossEncoder
    objective: Callable[[Batch, Share], dict[str, Tensor]]
    examples: Examples
    plan: Plan
    first_step: int                                     # steps that earlier stages have done
    optimizer: BertAdam
    scaler: LossScaler | ApexScaler
    log: TrainingLog
    device: torch.device
    dtype: torch.dtype | None
    output_dir: Path
    save_model: Callable[[Path], None]
    processes: Processes
    names: Callable[[np.ndarray], list[str]]            # of examples, for messages
    requests: StopRequests
    dev_set: DevSet | None = None

    def __post_init__(self):
        self.terms = data_parallel(self.student, self.objective, self.processes,
                                   all_learn=uses_labels(self.plan.weights))

    def run(self, checkpoint: Path | None = None) -> None:
        """Train to the last step of the plan, from `checkpoint` on if there is one, else from a new checkpoint.

        Asked to end by a signal, it saves a checkpoint first. Raises UserError if a loss is no longer a number.
        """
        step = self._restore(checkpoint) if checkpoint else self.first_step
        total = self.first_step + self.plan.total_steps(len(self.examples))
        if not checkpoint:
            self._save_checkpoint(step)
        self.student.train()
        with tqdm(total=total, initial=step, desc="distilling", unit=" steps",
                  disable=not self.processes.first) as progress:
            shown = {}
            for group in self._groups(step, total):
                step += 1
                logged = step % self.plan.log_every == 0 or step == total
                norms = self._gradient_norms(group[0]) if logged and self.plan.log_gradients else {}
                self._step(step, group)
                progress.update()
                if logged:
                    self._check()
                    shown["loss"] = f"{self.log.write(step, self.optimizer.learning_rate, norms)['loss']:.4g}"
                if self.dev_set and (step % self.plan.eval_every == 0 or step == total):
                    shown |= {name: f"{value:.4f}" for name, value in self._validate(step).items()}
                progress.set_postfix(shown, refresh=False)
                if step % self.plan.save_every == 0 and step < total:
                    self._save_checkpoint(step)
                alone = self.processes.count == 1 and self.requests.signal      # which asks nothing of the device
                if (alone or step % HEED_EVERY[self.device.type] == 0) and step < total:
                    self._heed(step)
        self.student.eval()

    def _groups(self, first: int, total: int) -> Iterator[list[np.ndarray]]:
        """The batches of each optimizer step, from step `first` on."""
        per_epoch = self.plan.steps_per_epoch(len(self.examples))
        for step in range(first - self.first_step, total - self.first_step):
            if step == first - self.first_step or step % per_epoch == 0:
                batches = epoch_batches(self.examples.lengths, self.plan.batch_size, self.plan.seed, step // per_epoch,
                                        self.plan.bucket)
            start = step % per_epoch * self.plan.accumulation
            yield batches[start:start + self.plan.accumulation]

    def _heed(self, step: int) -> None:
        """End the run, in all processes together, if one of them has met a loss that is no number, or a signal."""
        asked, bad = self.processes.total(torch.stack([self.log.bad_step.new_tensor(self.requests.signal > 0),
                                                       self.log.bad_step > 0]).long()).tolist()
        if bad:
            self._check()
        if asked:
            if step % self.plan.save_every:             # otherwise it has just been saved
                self._save_checkpoint(step)
            self.processes.barrier()                    # soon after one has ended torchrun kills the rest
            if self.processes.first:
                say(f"checkpoint-{step} is saved; the same command with --resume goes on from there")
            end_by(self.requests.signal or signal.SIGTERM)

    def _check(self) -> None:
        """Raise UserError, in every process, if a loss was not a number: neither a row nor a checkpoint may hold it."""
        bad = [step for step in self.processes.gather(int(self.log.bad_step)) if step]
        if not bad:
            return
        step = min(bad) - self.first_step - 1
        rate = self.plan.learning_rate * self.optimizer.schedule(step)
        group, = self._groups(step + self.first_step, step + self.first_step + 1)
        raise UserError(f"the loss of step {min(bad)} is not a finite number; learning rate {rate:.3g}, examples "
                        f"{', '.join(self.names(np.concatenate(group)))}; lower --learning_rate, or use --bf16 in "
                        f"place of --fp16; if it is so from the first step on, the weights of teacher or student are "
                        f"broken")

    def _step(self, number: int, group: list[np.ndarray]) -> None:
        """One optimizer step on the mean over all examples of the group, however its batches are cut and shared."""
        size = sum(len(indices) for indices in group)
        for part, indices in enumerate(group, start=1):
            mine, share = self.processes.share(indices, self.examples.lengths)
            batch = self.examples.batch(mine, self.plan.width).to(self.device)
            weight = len(indices) / size
            with exchanging(self.terms, now=part == len(group)):
                with autocast(self.device, self.dtype):
                    terms = self.terms(batch, share=share)
                # Gradients become means over the processes, but their shares have to be added up
                self.scaler.backward(terms["loss"] * (weight * self.processes.count))
            self.log.add(terms, weight)
        self.scaler.step(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        self.log.step(number, size)

    def _gradient_norms(self, indices: np.ndarray) -> dict[str, float]:
        """Euclidean norm of the gradient of each loss term alone, on one batch, before the step that uses it.

        Over the parameters that scoring needs, so without the projections. Random numbers stay as they were.
        """
        mine, share = self.processes.share(indices, self.examples.lengths)
        batch = self.examples.batch(mine, self.plan.width).to(self.device)
        learning = [parameter for name, parameter in self.student.named_parameters() if "projections." not in name]
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            with autocast(self.device, self.dtype):
                terms = self.objective(batch, share=share)
            norms, scale = {}, 2.0 ** 10 if self.dtype == torch.float16 else 1.0
            for term, name in GRADIENTS.items():
                if term in terms:
                    # in float16 what is small would vanish without the scale
                    gradients = torch.autograd.grad(terms[term] * scale, learning, retain_graph=True, allow_unused=True)
                    flat = torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])
                    norms[name] = float(self.processes.total(flat).norm()) / scale
        return norms

    def _validate(self, step: int) -> dict[str, float]:
        """Measures on the dev set; the student that does best by the first of them is kept."""
        start = time.perf_counter()
        self._check()
        measures = self.dev_set.measures(self.student, self.device, self.dtype, self.processes)
        if self.log.write_dev(step, measures):
            save_folder(self.output_dir / BEST, self.save_model)
        self.log.leave_out(time.perf_counter() - start)
        return measures

    def _save_checkpoint(self, step: int) -> None:
        self._check()
        state = self._state(step)
        if self.processes.first:
            save_folder(self.output_dir / f"checkpoint-{step}", self.save_model, state)
            for old in checkpoints_of(self.output_dir)[:-self.plan.keep] if self.plan.keep else ():
                remove_folder(old)

    def _state(self, step: int) -> dict:
        own = {"random": torch.get_rng_state(), "log": self.log.state()}
        if self.device.type == "cuda":
            own["cuda_random"] = torch.cuda.get_rng_state(self.device)
        return {"step": step, "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "processes": self.processes.gather(own)}

    def _restore(self, checkpoint: Path) -> int:
        """Take up the state of a checkpoint; the student's weights have been loaded from it already."""
        try:
            state = torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise UserError(f"{checkpoint / STATE_FILE}: is damaged; remove {checkpoint}, and --resume goes on from "
                            f"the checkpoint before") from error
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        own = state["processes"][self.processes.rank]
        self.log.restore(own["log"])
        torch.set_rng_state(own["random"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda_random"], self.device)
        return state["step"]


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int, bucket: bool) -> list[np.ndarray]:
    """Indices of each batch of an epoch: a function of seed and epoch alone; the last batch may be smaller.

    With `bucket` the examples of a batch have similar lengths: each pool of POOL batches is sorted by length, cut, and
    the batches of the epoch are shuffled again.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    if bucket:
        pools = [order[start:start + POOL * batch_size] for start in range(0, len(order), POOL * batch_size)]
        order = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
    batches = [order[start:start + batch_size] for start in range(0, len(order), batch_size)]
    if bucket:
        batches = [batches[number] for number in random.permutation(len(batches))]
    return batches


def padding_share(lengths: np.ndarray, batches: list[np.ndarray], width: int | None) -> float:
    """Share of positions that hold padding when batches are padded to `width`, or to their longest example."""
    padded = sum(len(batch) * (width or int(lengths[batch].max())) for batch in batches)
    return 1.0 - float(lengths.sum(dtype=np.int64)) / padded


def save_folder(folder: Path, save_model: Callable[[Path], None], state: dict | None = None) -> None:
    """Write a model, and a training state if given, aside, then rename: the folder is always whole.

    One that is there already gives way. If the run is killed just then, --resume comes by here again.
    """
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        save_model(aside)
        if state:
            with atomic_writer(aside / STATE_FILE, "wb") as handle:
                torch.save(state, handle)
        if folder.is_dir():
            remove_folder(folder)
        os.rename(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    sync_folder(folder.parent)


def remove_folder(folder: Path) -> None:
    """Remove a checkpoint or the best student: nobody, whenever it is killed, finds a part of it under its name."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    os.rename(folder, aside)
    shutil.rmtree(aside)


def remove_leftovers(output_dir: Path) -> None:
    """Remove what a killed run had begun to write in its output folder."""
    for path in [*output_dir.glob(".checkpoint-*"), *output_dir.glob(f".{BEST}.*"), *output_dir.glob(".*.tmp")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def checkpoints_of(output_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    return sorted((path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)),
                  key=step_of)


def newest_checkpoint(output_dir: Path) -> Path | None:
    return (checkpoints_of(output_dir) or [None])[-1]


def step_of(checkpoint: Path) -> int:
    """Finished steps, from the name of a checkpoint folder."""
    return int(checkpoint.name.removeprefix("checkpoint-"))
