"""The training loop: order of batches, gradient accumulation, validation, checkpoints."""
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from simplified_tinybert.common.device import padded_length
from simplified_tinybert.common.files import UserError, say
from simplified_tinybert.common.processes import data_parallel, exchanging
from simplified_tinybert.common.signals import StopRequests, raise_for
from simplified_tinybert.data.features import Examples, ids_of
from simplified_tinybert.model.batch import to_device
from simplified_tinybert.model.bert import CrossEncoder
from simplified_tinybert.model.cpu_linear import pack_linear_layers
from simplified_tinybert.model.precision import autocast, cast_linear_layers
from simplified_tinybert.training import checkpoints
from simplified_tinybert.training.batches import epoch_batches
from simplified_tinybert.training.checkpoints import TrainingRun
from simplified_tinybert.training.log import GRADIENTS, TrainingLog
from simplified_tinybert.training.objective import mean_over, objective, total_loss
from simplified_tinybert.training.optimizer import ApexScaler, BertAdam, LossScaler, decay_groups, linear_warmup_decay
from simplified_tinybert.training.settings import Stage, TrainingSettings
from simplified_tinybert.training.validation import DevSet

CHECK_EVERY = {"cpu": 1, "cuda": 50}        # batches between checks of losses and signals, which wait for a GPU


@dataclass(frozen=True)
class TrainingSet:
    """Examples, and the feature files that hold their ids. The segments of a corpus have no ids."""
    examples: Examples
    feature_files: list[Path] | None = None
    teacher_scores: np.ndarray | None = None            # (N), log-odds of a file in float32
    queries: np.ndarray | None = None                   # (N), numbers of the queries, for batches of whole queries

    def epoch_size(self, settings: TrainingSettings) -> int:
        """Return the number of examples in an epoch, counting --group_by_query for each query, even if it has fewer."""
        if self.queries is None:
            return len(self.examples)
        return (int(self.queries.max()) + 1) * settings.group_by_query

    def names(self, indices: np.ndarray) -> list[str]:
        """Return names of examples for messages."""
        return ids_of(self.feature_files, indices) if self.feature_files else [f"segment {index}" for index in indices]


class Trainer:
    """Trains a student stage by stage, starting from the run's checkpoint if it has one.

    Each stage sets `stage`, `first_step` (number of steps of the earlier stages), `optimizer`, `scaler`, and `terms`,
    which computes the loss terms of a batch.
    """

    def __init__(self, student: CrossEncoder, teacher: CrossEncoder | None, training_set: TrainingSet,
                 settings: TrainingSettings, run: TrainingRun, dev_set: DevSet | None = None):
        self.student, self.teacher, self.training_set, self.settings = student, teacher, training_set, settings
        self.run, self.processes, self.device, self.dev_set = run, run.processes, run.processes.device, dev_set
        self.examples, self.checkpoint, self.last_step = training_set.examples, run.checkpoint, 0
        self.epoch_size = training_set.epoch_size(settings)
        self.save_model = partial(run.save_model, student)                      # to a directory
        resumed = checkpoints.step_of(self.checkpoint) if self.checkpoint else 0
        self.log = TrainingLog(run.output_dir, settings.tensorboard_dir, self.device, self.processes, resumed)
        # Shared by all stages: a signal in the last step of one stage stops the next
        self.requests = StopRequests(ignore_repeats=self.processes.count > 1)
        torch.manual_seed(settings.seed + self.processes.rank)

    def train(self, stages: list[Stage]) -> None:
        """Train the stages, and write the finished student. Raises UserError if a loss is NaN or infinite."""
        for stage in stages:
            self._train_stage(stage)
        self.log.close()
        self.run.finish(self.student)

    def _train_stage(self, stage: Stage) -> None:
        self.stage, self.first_step, self.postfix = stage, self.last_step, {}
        steps = stage.total_steps(self.epoch_size, self.settings)
        self.last_step += steps
        if self.checkpoint and checkpoints.step_of(self.checkpoint) >= self.last_step:
            return                                      # the checkpoint is from a later stage
        with self.requests:
            self._begin(steps)
            finished = self._restore(self.checkpoint) if self.checkpoint else self.first_step
            if not self.checkpoint:
                self._save_checkpoint(finished)
            self.checkpoint = None
            self.student.train()
            with tqdm(total=self.last_step, initial=finished, desc="distilling", unit=" steps",
                      disable=not self.processes.first) as progress:
                for step, batches in enumerate(self._batches(finished, self.last_step), start=finished + 1):
                    self._advance(step, batches, progress)
            self.student.eval()

    def _begin(self, steps: int) -> None:
        """Make the optimizer, the loss scaling and the objective of a stage."""
        settings, chosen = self.settings, self.stage.objective
        if self.teacher and settings.dtype:             # in a second stage, they are converted already
            cast_linear_layers(self.teacher, settings.dtype)
        elif self.teacher and not settings.apex_level:
            pack_linear_layers(self.teacher)
        self.student.projections.requires_grad_("hidden" in chosen.weights)
        schedule = partial(linear_warmup_decay, total_steps=steps, warmup_proportion=settings.warmup_proportion)
        groups = decay_groups(self.student.named_parameters(), settings.weight_decay)
        self.optimizer = BertAdam(groups, self.stage.learning_rate, schedule)
        self.scaler = (ApexScaler(self.student, self.optimizer, settings.apex_level) if settings.apex_level
                       else LossScaler(self.device, settings.dtype))
        self.local_terms = partial(objective, self.student, self.teacher, settings=chosen)     # no gradient exchange
        if self.device.type == "cuda" and not settings.compile:
            self._try_longest_batch()
        terms = torch.compile(self.local_terms, dynamic=True, fullgraph=True) if settings.compile else self.local_terms
        self.terms = data_parallel(self.student, terms, self.processes, all_used=chosen.uses("head"))

    def _try_longest_batch(self) -> None:
        """Compute the longest examples' gradients. If a GPU's memory is too small, the run ends here, not later."""
        longest = np.argsort(self.examples.lengths, kind="stable")[-self.settings.batch_size:]
        self.student.train()
        with torch.random.fork_rng([self.device]):
            self._losses(self.local_terms, longest)["loss"].backward()
        self.optimizer.zero_grad(set_to_none=True)

    def _advance(self, step: int, batches: list[np.ndarray], progress: tqdm) -> None:
        """Make one step. Then write the log, validate, save a checkpoint and check for signals, if these are due."""
        settings, last = self.settings, step == self.last_step
        log_row = step % settings.log_every == 0 or last
        norms = self._gradient_norms(batches[0]) if log_row and settings.log_gradients else {}
        self._step(step, batches)
        progress.update()
        if log_row:
            self._check_losses()
            self.postfix["loss"] = f"{self.log.write(step, self.optimizer.learning_rate, norms)['loss']:.4g}"
        if self.dev_set and self.stage.objective.uses("head") and (step % settings.eval_every == 0 or last):
            self.postfix |= {name: f"{value:.4f}" for name, value in self._validate(step).items()}
        progress.set_postfix(self.postfix, refresh=False)
        if last:
            return
        if step % settings.save_every == 0:
            self._save_checkpoint(step)
        local_request = self.processes.count == 1 and self.requests.signal      # known without waiting for the device
        if local_request or step % max(1, CHECK_EVERY[self.device.type] // settings.accumulation) == 0:
            self._stop_if_requested(step)

    def _batches(self, first: int, last: int) -> Iterator[list[np.ndarray]]:
        """Yield the batches of each optimizer step after step `first`, up to step `last`."""
        settings = self.settings
        per_epoch = self.stage.steps_per_epoch(self.epoch_size, settings)
        for step in range(first - self.first_step, last - self.first_step):
            if step == first - self.first_step or step % per_epoch == 0:
                batches = epoch_batches(self.examples.lengths, settings, step // per_epoch, self.training_set.queries)
            start = step % per_epoch * settings.accumulation
            yield batches[start:start + settings.accumulation]

    def _losses(self, compute_terms: Callable[..., dict[str, Tensor]], indices: np.ndarray) -> dict[str, Tensor]:
        """Return this process's share of the loss of a batch and of its parts."""
        chosen = self.stage.objective
        data = self.training_set
        own, share = self.processes.share(indices, self.examples, data.queries)
        batch = self.examples.batch(own, self.stage.pad_to(self.settings) or padded_length(
            int(self.examples.lengths[own].max()), self.device, self.settings.max_seq_length), self.device)
        if data.teacher_scores is not None:
            batch.teacher_scores = to_device(torch.from_numpy(data.teacher_scores[own]), self.device)
        if data.queries is not None:
            batch.queries = to_device(torch.from_numpy(data.queries[own]), self.device)
        with autocast(self.device, self.settings.dtype):
            terms = {name: value * share[mean_over(name, chosen.padding)]
                     for name, value in compute_terms(batch).items()}
            return total_loss(terms, chosen.weights)

    def _step(self, number: int, batches: list[np.ndarray]) -> None:
        """Make an optimizer step on the mean over all examples. It does not depend on their division into batches.

        Ranking losses are the exception: a mean over pairs or queries of a batch weighs as much as its examples.
        """
        examples = sum(map(len, batches))
        for part, indices in enumerate(batches, start=1):
            weight = len(indices) / examples
            with exchanging(self.terms, now=part == len(batches)):
                losses = self._losses(self.terms, indices)
                # The exchange averages gradients over the processes, but shares must be added up.
                self.scaler.backward(losses["loss"] * (weight * self.processes.count))
            self.log.add(losses, weight)
        made = self.scaler.step(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        self.log.step(number, examples, made)

    def _gradient_norms(self, indices: np.ndarray) -> dict[str, float]:
        """Return the norm of each term's gradient on a batch, without projections. The random state stays unchanged."""
        weights = [parameter for name, parameter in self.student.named_parameters() if "projections." not in name]
        # In float16, small gradients would vanish without scaling.
        norms, scale = {}, 2.0 ** 10 if self.settings.dtype == torch.float16 else 1.0
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            losses = self._losses(self.local_terms, indices)
            for column in [column for column in GRADIENTS if column in losses]:
                gradients = torch.autograd.grad(losses[column] * scale, weights, retain_graph=True, allow_unused=True)
                flat = torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])
                norms[GRADIENTS[column]] = float(self.processes.total(flat).norm()) / scale
        return norms

    def _validate(self, step: int) -> dict[str, float]:
        """Return the measures on the dev set; save the student if it is the best so far."""
        start = time.perf_counter()
        self._check_losses()
        measures = self.dev_set.measures(self.student, self.device, self.settings.dtype, self.processes)
        if self.log.write_dev(step, measures):
            checkpoints.replace_directory(self.run.output_dir / checkpoints.BEST, self.save_model)
        self.log.exclude(time.perf_counter() - start)
        return measures

    def _check_losses(self) -> None:
        """Raise UserError in every process if a loss was NaN or infinite, before it is logged or saved."""
        bad = [step for step in self.processes.gather(int(self.log.bad_step)) if step]
        if not bad:
            return
        step = min(bad)
        rate = self.stage.learning_rate * self.optimizer.schedule(step - self.first_step - 1)
        batches, = self._batches(step - 1, step)
        raise UserError(f"the loss of step {step} is NaN or infinite; learning rate {rate:.3g}, examples "
                        f"{', '.join(self.training_set.names(np.concatenate(batches)))}; lower --learning_rate, or use "
                        f"--bf16 instead of --fp16; if this happens from the first step on, the weights of teacher or "
                        f"student are broken")

    def _stop_if_requested(self, step: int) -> None:
        """Stop all processes together. A signal saves a checkpoint first; a NaN or infinite loss raises UserError."""
        requested, bad = self.processes.total(torch.stack([self.log.bad_step.new_tensor(self.requests.signal > 0),
                                                           self.log.bad_step > 0]).long()).tolist()
        if bad:
            self._check_losses()
        if requested:
            if step % self.settings.save_every:         # otherwise it has just been saved
                self._save_checkpoint(step)
            self.processes.barrier()                    # when one process ends, torchrun soon kills the others
            if self.processes.first:
                say(f"checkpoint-{step} is saved; the same command with --resume continues from there")
            raise_for(self.requests.signal or signal.SIGTERM)

    def _save_checkpoint(self, step: int) -> None:
        self._check_losses()
        own_state = checkpoints.random_state(self.device) | {"log": self.log.state()}
        state = {"step": step, "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                 "processes": self.processes.gather(own_state)}
        if self.processes.first:
            checkpoints.replace_directory(self.run.output_dir / f"checkpoint-{step}", self.save_model, state)
            keep = self.settings.keep_checkpoints
            for old in checkpoints.checkpoints_of(self.run.output_dir)[:-keep] if keep else ():
                checkpoints.remove_directory(old)

    def _restore(self, checkpoint: Path) -> int:
        """Restore a checkpoint, except for the weights, which are loaded already. Returns the finished steps."""
        state = checkpoints.read_state(checkpoint)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        states, rank, count = state["processes"], self.processes.rank, self.processes.count
        self.log.restore([saved["log"] for saved in states[rank::count]])
        if not checkpoints.restore_random_state(states, rank, count, self.device) and self.processes.first:
            say(f"note         {checkpoint} is from another device or number of processes; dropout will differ from "
                f"that of an uninterrupted run")
        return state["step"]
