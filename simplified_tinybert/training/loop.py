"""The training loop: order of batches, gradient accumulation, validation, checkpoints to continue from."""
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from simplified_tinybert.common.files import UserError, say
from simplified_tinybert.common.processes import data_parallel, exchanging
from simplified_tinybert.common.signals import StopRequests, end_by
from simplified_tinybert.data.features import Examples, ids_of
from simplified_tinybert.model.bert import CrossEncoder
from simplified_tinybert.model.cpu_linear import pack_linear_layers
from simplified_tinybert.model.precision import ApexScaler, LossScaler, autocast
from simplified_tinybert.training.checkpoints import (
    BEST,
    checkpoints_of,
    read_state,
    remove_directory,
    replace_directory,
    step_of,
)
from simplified_tinybert.training.flags import Stage, TrainingSettings
from simplified_tinybert.training.log import GRADIENTS, TrainingLog
from simplified_tinybert.training.objective import mean_over, objective, total_loss
from simplified_tinybert.training.optimizer import BertAdam, decay_groups, linear_warmup_decay
from simplified_tinybert.training.run import Run
from simplified_tinybert.training.validation import DevSet

CHECK_EVERY = {"cpu": 1, "cuda": 50}        # steps between looks at losses and signals, for which a GPU has to wait
BUCKET_BATCHES = 64                         # batches from which examples of similar length are grouped


@dataclass
class TrainingSet:
    """Examples to learn from. feature_files: where their ids are; without them, examples are segments of a corpus."""
    examples: Examples
    feature_files: list[Path] = field(default_factory=list)

    def names(self, indices: np.ndarray) -> list[str]:
        """Of examples, for messages."""
        if self.feature_files:
            return ids_of(self.feature_files, indices)
        return [f"segment {index}" for index in indices]


class Trainer:
    """Trains a student stage by stage; resumes from the run's checkpoint.

    A stage sets `stage`, `first_step` (steps that earlier stages have done), `optimizer`, `scaler` and `terms`, which
    computes the loss terms of a batch.
    """

    def __init__(self, student: CrossEncoder, teacher: CrossEncoder | None, training_set: TrainingSet,
                 settings: TrainingSettings, run: Run, dev_set: DevSet | None = None):
        self.student, self.teacher, self.training_set, self.settings = student, teacher, training_set, settings
        self.run, self.processes, self.dev_set = run, run.processes, dev_set
        self.examples, self.device = training_set.examples, student.classifier.weight.device
        self.checkpoint, self.end = run.checkpoint, 0
        resumed = step_of(self.checkpoint) if self.checkpoint else 0
        self.log = TrainingLog(run.output_dir, settings.tensorboard_dir, self.device, self.processes, resumed)
        self.requests = StopRequests(patient=self.processes.count > 1)      # one at the end of a stage stops the next
        torch.manual_seed(settings.seed + self.processes.rank)

    def train(self, stage: Stage) -> None:
        """Train to the last step of a stage, unless the checkpoint says that this is done.

        Stops at a signal, after saving a checkpoint. Raises UserError if a loss is NaN or infinite.
        """
        self.stage, self.first_step, self.shown = stage, self.end, {}
        steps = stage.total_steps(len(self.examples), self.settings)
        self.end += steps
        if self.checkpoint and step_of(self.checkpoint) >= self.end:
            return
        with self.requests:
            self._begin(steps)
            done = self._restore(self.checkpoint) if self.checkpoint else self.first_step
            if not self.checkpoint:
                self._save_checkpoint(done)
            self.checkpoint = None
            self.student.train()
            with tqdm(total=self.end, initial=done, desc="distilling", unit=" steps",
                      disable=not self.processes.first) as progress:
                for step, group in enumerate(self._groups(done, self.end), start=done + 1):
                    self._advance(step, group, progress)
            self.student.eval()

    def finish(self) -> None:
        """Close the log and write the finished student."""
        self.log.close()
        self.run.finish(self.student)

    def _begin(self, steps: int) -> None:
        """Optimizer, loss scaling and objective of a stage."""
        settings, chosen = self.settings, self.stage.objective
        if self.teacher and not (settings.dtype or settings.apex_level):
            pack_linear_layers(self.teacher)            # once: a second time changes nothing
        self.student.projections.requires_grad_("hidden" in chosen.weights)
        schedule = partial(linear_warmup_decay, total_steps=steps, warmup_proportion=settings.warmup_proportion)
        groups = decay_groups(self.student.named_parameters(), settings.weight_decay)
        self.optimizer = BertAdam(groups, self.stage.learning_rate, schedule)
        self.scaler = (ApexScaler(self.student, self.optimizer, settings.apex_level) if settings.apex_level
                       else LossScaler(self.device, settings.dtype))
        alone = partial(objective, self.student, self.teacher, settings=chosen)
        self.terms = data_parallel(self.student, alone, self.processes, all_learn=chosen.uses("head"))
        self.terms_alone = alone                        # as this process alone computes them

    def _advance(self, step: int, group: list[np.ndarray], progress: tqdm) -> None:
        """One step, and what is due after it: a row of the log, validation, a checkpoint, a look at signals."""
        settings, shown = self.settings, self.shown
        logged = step % settings.log_every == 0 or step == self.end
        norms = self._gradient_norms(group[0]) if logged and settings.log_gradients else {}
        self._step(step, group)
        progress.update()
        if logged:
            self._check_losses()
            shown["loss"] = f"{self.log.write(step, self.optimizer.learning_rate, norms)['loss']:.4g}"
        validates = self.dev_set and self.stage.objective.uses("head")
        if validates and (step % settings.eval_every == 0 or step == self.end):
            shown |= {name: f"{value:.4f}" for name, value in self._validate(step).items()}
        progress.set_postfix(shown, refresh=False)
        if step % settings.save_every == 0 and step < self.end:
            self._save_checkpoint(step)
        alone = self.processes.count == 1 and self.requests.signal      # which asks nothing of the device
        if (alone or step % CHECK_EVERY[self.device.type] == 0) and step < self.end:
            self._stop_if_requested(step)

    def _groups(self, first: int, last: int) -> Iterator[list[np.ndarray]]:
        """The batches of each optimizer step, after step `first` up to step `last`."""
        settings = self.settings
        per_epoch = self.stage.steps_per_epoch(len(self.examples), settings)
        for step in range(first - self.first_step, last - self.first_step):
            if step == first - self.first_step or step % per_epoch == 0:
                batches = epoch_batches(self.examples.lengths, settings, step // per_epoch)
            start = step % per_epoch * settings.accumulation
            yield batches[start:start + settings.accumulation]

    def _losses(self, terms: Callable[..., dict[str, Tensor]], indices: np.ndarray) -> dict[str, Tensor]:
        """The loss of a batch and its parts: this process's share of them."""
        chosen = self.stage.objective
        mine, share = self.processes.share(indices, self.examples.lengths)
        batch = self.examples.batch(mine, self.stage.pad_to(self.settings)).to(self.device)
        with autocast(self.device, self.settings.dtype):
            found = {name: value * share.of(mean_over(name, chosen.padding)) for name, value in terms(batch).items()}
            return total_loss(found, chosen.weights)

    def _step(self, number: int, group: list[np.ndarray]) -> None:
        """One optimizer step on the mean over all examples of the group, however its batches are cut and shared."""
        size = sum(len(indices) for indices in group)
        for part, indices in enumerate(group, start=1):
            weight = len(indices) / size
            with exchanging(self.terms, now=part == len(group)):
                losses = self._losses(self.terms, indices)
                # Gradients become means over the processes, but their shares have to be added up.
                self.scaler.backward(losses["loss"] * (weight * self.processes.count))
            self.log.add(losses, weight)
        self.scaler.step(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        self.log.step(number, size)

    def _gradient_norms(self, indices: np.ndarray) -> dict[str, float]:
        """Euclidean norm of the gradient of each loss term alone, on one batch, before the step that uses it.

        Over the parameters that scoring needs, so without the projections. Random numbers stay as they were.
        """
        learning = [parameter for name, parameter in self.student.named_parameters() if "projections." not in name]
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            losses = self._losses(self.terms_alone, indices)
            norms, scale = {}, 2.0 ** 10 if self.settings.dtype == torch.float16 else 1.0
            for column, name in GRADIENTS.items():
                if column in losses:
                    # In float16, small gradients would vanish without the scale.
                    gradients = torch.autograd.grad(losses[column] * scale, learning, retain_graph=True,
                                                    allow_unused=True)
                    flat = torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])
                    norms[name] = float(self.processes.total(flat).norm()) / scale
        return norms

    def _validate(self, step: int) -> dict[str, float]:
        """Measures on the dev set; the student that does best by the first of them is kept."""
        start = time.perf_counter()
        self._check_losses()
        measures = self.dev_set.measures(self.student, self.device, self.settings.dtype, self.processes)
        if self.log.write_dev(step, measures):
            replace_directory(self.run.output_dir / BEST, self._save_model)
        self.log.leave_out(time.perf_counter() - start)
        return measures

    def _check_losses(self) -> None:
        """Raise UserError, in every process, if a loss was NaN or infinite: no row and no checkpoint may hold it."""
        bad = [step for step in self.processes.gather(int(self.log.bad_step)) if step]
        if not bad:
            return
        step = min(bad) - self.first_step - 1
        rate = self.stage.learning_rate * self.optimizer.schedule(step)
        group, = self._groups(step + self.first_step, step + self.first_step + 1)
        raise UserError(f"the loss of step {min(bad)} is NaN or infinite; learning rate {rate:.3g}, examples "
                        f"{', '.join(self.training_set.names(np.concatenate(group)))}; lower --learning_rate, or use "
                        f"--bf16 in place of --fp16; if this happens from the first step on, the weights of teacher or "
                        f"student are broken")

    def _stop_if_requested(self, step: int) -> None:
        """End the run, in all processes together, if one of them has met a NaN or infinite loss, or a signal."""
        asked, bad = self.processes.total(torch.stack([self.log.bad_step.new_tensor(self.requests.signal > 0),
                                                       self.log.bad_step > 0]).long()).tolist()
        if bad:
            self._check_losses()
        if asked:
            if step % self.settings.save_every:         # otherwise it has just been saved
                self._save_checkpoint(step)
            self.processes.barrier()                    # soon after one process has ended, torchrun kills the rest
            if self.processes.first:
                say(f"checkpoint-{step} is saved; the same command with --resume continues from there")
            end_by(self.requests.signal or signal.SIGTERM)

    def _save_model(self, directory: Path) -> None:
        self.run.save(self.student, directory)

    def _save_checkpoint(self, step: int) -> None:
        self._check_losses()
        state = self._state(step)
        if self.processes.first:
            replace_directory(self.run.output_dir / f"checkpoint-{step}", self._save_model, state)
            keep = self.settings.keep_checkpoints
            for old in checkpoints_of(self.run.output_dir)[:-keep] if keep else ():
                remove_directory(old)

    def _state(self, step: int) -> dict:
        own = {"random": torch.get_rng_state(), "log": self.log.state()}
        if self.device.type == "cuda":
            own["cuda_random"] = torch.cuda.get_rng_state(self.device)
        return {"step": step, "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "processes": self.processes.gather(own)}

    def _restore(self, checkpoint: Path) -> int:
        """Restore the state of a checkpoint; the student's weights have been loaded from it already."""
        state = read_state(checkpoint)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        own = state["processes"][self.processes.rank]
        self.log.restore(own["log"])
        torch.set_rng_state(own["random"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda_random"], self.device)
        return state["step"]


def epoch_batches(lengths: np.ndarray, settings: TrainingSettings, epoch: int) -> list[np.ndarray]:
    """Indices of each batch of an epoch: a function of seed and epoch only; the last batch may be smaller.

    With `group_by_length`, the examples of a batch have similar lengths: each BUCKET_BATCHES batches are sorted by
    length and cut, and the batches of the epoch are shuffled again.
    """
    random, batch_size = np.random.default_rng([settings.seed, epoch]), settings.batch_size
    order = random.permutation(len(lengths))
    if settings.group_by_length:
        size = BUCKET_BATCHES * batch_size
        buckets = [order[start:start + size] for start in range(0, len(order), size)]
        order = np.concatenate([bucket[np.argsort(lengths[bucket], kind="stable")] for bucket in buckets])
    batches = [order[start:start + batch_size] for start in range(0, len(order), batch_size)]
    if settings.group_by_length:
        batches = [batches[number] for number in random.permutation(len(batches))]
    return batches


def padding_share(lengths: np.ndarray, batches: list[np.ndarray], pad_to: int | None) -> float:
    """Share of positions that hold padding when batches are padded to `pad_to`, or to their longest example."""
    padded = sum(len(batch) * (pad_to or int(lengths[batch].max())) for batch in batches)
    return 1.0 - float(lengths.sum(dtype=np.int64)) / padded
