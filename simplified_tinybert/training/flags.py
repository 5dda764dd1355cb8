"""Flags that distill.py and general_distill.py share, and the typed settings that are made of them, once."""
import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from simplified_tinybert.common.files import Problems, UserError, process_count
from simplified_tinybert.model.precision import import_apex_amp
from simplified_tinybert.training.losses import PADDING_MODES
from simplified_tinybert.training.objective import ObjectiveSettings

# What must not change when a run is resumed
RESUMABLE = ("padding", "train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "learning_rate",
             "warmup_proportion", "weight_decay", "fp16", "fp16_backend", "bf16", "seed", "train_loss_step")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How a student is trained, whatever it minimizes. dtype: of mixed precision. apex_level: None without apex."""
    batch_size: int                                     # examples of a forward pass, in all processes together
    max_seq_length: int                                 # to pad to where padding counts
    accumulation: int = 1                               # forward passes of an optimizer step
    seed: int = 42
    warmup_proportion: float = 0.1
    weight_decay: float = 1e-2
    group_by_length: bool = False                       # batches of examples of similar length
    dtype: torch.dtype | None = None
    apex_level: str | None = None
    log_every: int = 1000                               # steps, as are the next two
    save_every: int = 3000
    eval_every: int = 1000
    keep_checkpoints: int | None = None                 # the newest; None: all
    log_gradients: bool = False
    tensorboard_dir: Path | None = None

    @classmethod
    def from_args(cls, args: argparse.Namespace, dtype: torch.dtype | None, max_seq_length: int,
                  eval_every: int | None = None) -> "TrainingSettings":
        apex = args.fp16 and args.fp16_backend == "apex"
        return cls(batch_size=args.train_batch_size, max_seq_length=max_seq_length,
                   accumulation=args.gradient_accumulation_steps, seed=args.seed,
                   warmup_proportion=args.warmup_proportion, weight_decay=args.weight_decay,
                   group_by_length=args.padding == "masked", dtype=None if apex else dtype,
                   apex_level=args.fp16_opt_level if apex else None, log_every=args.train_loss_step,
                   save_every=args.save_model_step, eval_every=eval_every or cls.eval_every,
                   keep_checkpoints=args.keep_checkpoints,
                   log_gradients=args.log_gradients, tensorboard_dir=args.tensorboard_dir)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a training with an objective, a learning rate and a schedule of its own."""
    objective: ObjectiveSettings
    epochs: float
    learning_rate: float                                # the peak

    def pad_to(self, settings: TrainingSettings) -> int | None:
        """Sequence length to pad to; None: the longest of the batch. Only --padding reference sees how far."""
        fixed = self.objective.uses("layers") and self.objective.padding == "reference"
        return settings.max_seq_length if fixed else None

    def steps_per_epoch(self, examples: int, settings: TrainingSettings) -> int:
        """Smaller last batches and groups of batches count: every example is used."""
        return math.ceil(math.ceil(examples / settings.batch_size) / settings.accumulation)

    def total_steps(self, examples: int, settings: TrainingSettings) -> int:
        return max(1, round(self.epochs * self.steps_per_epoch(examples, settings))) if self.epochs else 0


def add_training_flags(parser: argparse.ArgumentParser, batch_size: int, learning_rate: float, epochs: float) -> None:
    add, default = parser.add_argument, TrainingSettings
    add("--output_student_dir", type=Path, required=True, help="new or empty directory for the student")
    add("--cache_file_dir", type=Path, default=Path("cache"),
        help="directory for memory-mapped features; later runs on the same features use them again (default: cache)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, or a CUDA index such as 0 (default: auto)")
    add("--no_cuda", action="store_true", help="compute on the CPU whatever --device says")
    add("--padding", choices=PADDING_MODES, default=ObjectiveSettings.padding,
        help="reference: pad to max_seq_length and let padding count in the attention and hidden losses, as the "
             "original does; masked: count real tokens only and batch examples of similar length, which is faster "
             "(default: reference)")
    add("--train_batch_size", type=int, default=batch_size,
        help=f"examples of one forward pass, in all processes together (default: {batch_size})")
    add("--gradient_accumulation_steps", type=int, default=default.accumulation,
        help=f"forward passes of one optimizer step (default: {default.accumulation})")
    add("--num_train_epochs", type=float, default=epochs,
        help=f"passes over the data; fractions allowed (default: {epochs:g})")
    add("--learning_rate", type=float, default=learning_rate, help=f"peak learning rate (default: {learning_rate:g})")
    add("--warmup_proportion", type=float, default=default.warmup_proportion,
        help=f"share of the steps in which the learning rate rises (default: {default.warmup_proportion:g})")
    add("--weight_decay", "--wd", type=float, default=default.weight_decay,
        help=f"decay of all parameters but biases and layer norms (default: {default.weight_decay:g})")
    add("--fp16", action="store_true", help="mixed precision in float16 with loss scaling (CUDA)")
    add("--fp16_backend", choices=("torch", "apex"), default="torch", help="what --fp16 uses (default: torch)")
    add("--fp16_opt_level", choices=("O0", "O1", "O2", "O3"), default="O1", help="apex level (default: O1)")
    add("--bf16", action="store_true", help="mixed precision in bfloat16, no loss scaling")
    add("--seed", type=int, default=default.seed,
        help=f"of dropout, batch order and new parameters (default: {default.seed})")
    add("--train_loss_step", type=int, default=default.log_every,
        help=f"steps between rows of the log (default: {default.log_every})")
    add("--log_gradients", action="store_true", help="also log the norm of each loss term's gradient (att_grad, "
        "rep_grad, soft_grad, hard_grad); costs one more batch for each row of the log")
    add("--save_model_step", type=int, default=default.save_every,
        help=f"steps between checkpoints (default: {default.save_every})")
    add("--keep_checkpoints", type=int, metavar="N", help="keep the N newest checkpoints only (default: keep all)")
    add("--tensorboard_dir", type=Path,
        help="directory for TensorBoard (default: tensorboard in --output_student_dir)")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --output_student_dir, if any")


def check_flags(args: argparse.Namespace, problems: Problems, further: list[tuple[str, bool, str]]) -> None:
    """Complain about flags that no training can work with. `further` rules: (flag, whether it holds, expected)."""
    several = f" for each of {process_count()} processes" if process_count() > 1 else ""
    rules = [("train_batch_size", args.train_batch_size >= process_count(), f"1 or more{several}"),
             ("gradient_accumulation_steps", args.gradient_accumulation_steps >= 1, "1 or more"),
             ("learning_rate", 0 <= args.learning_rate < math.inf, "0 or more"),
             ("warmup_proportion", 0 <= args.warmup_proportion < 1, "0 to less than 1"),
             ("weight_decay", 0 <= args.weight_decay < math.inf, "0 or more"),
             ("train_loss_step", args.train_loss_step >= 1, "1 or more"),
             ("save_model_step", args.save_model_step >= 1, "1 or more"),
             ("seed", 0 <= args.seed < 2 ** 62, "0 or more, below 2^62"),
             ("keep_checkpoints", args.keep_checkpoints is None or args.keep_checkpoints >= 1, "1 or more"), *further]
    for name, holds, expected in rules:
        if not holds:
            problems.add(f"--{name} {getattr(args, name)}: expected {expected}")
    for directory in filter(None, (args.cache_file_dir, args.tensorboard_dir)):
        if directory.exists() and not directory.is_dir():
            problems.add(f"{directory}: is a file; name a directory")


def check_apex(args: argparse.Namespace, stages: int, problems: Problems) -> None:
    """Complain where --fp16_backend apex is asked for and cannot be had."""
    if not (args.fp16 and args.fp16_backend == "apex"):
        return
    try:
        import_apex_amp()
    except UserError as error:
        problems.add(str(error))
    if process_count() > 1 or stages > 1:
        problems.add("--fp16_backend apex works in one process and one stage only; --fp16_backend torch works in all")
