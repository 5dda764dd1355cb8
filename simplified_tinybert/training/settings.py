"""Flags that distill.py and general_distill.py share, and the typed settings made from them."""
import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from simplified_tinybert.common.files import Problems, check_ranges, process_count, warn
from simplified_tinybert.training.checkpoints import check_output_dir
from simplified_tinybert.training.losses import PADDING_MODES
from simplified_tinybert.training.objective import RANKING, ObjectiveSettings, parse_loss_weights, stage_weights
from simplified_tinybert.training.optimizer import import_apex_amp

SMALLER_BATCHES = "lower --train_batch_size, and raise --gradient_accumulation_steps as much to keep the steps the same"


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How a student is trained, independent of its objective."""
    batch_size: int                                     # examples per forward pass, over all processes
    max_seq_length: int                                 # padded length with --padding reference
    accumulation: int = 1                               # forward passes per optimizer step
    seed: int = 42
    warmup_proportion: float = 0.1
    weight_decay: float = 1e-2
    group_by_length: bool = False                       # batches of examples of similar length
    group_by_query: int | None = None                   # examples of each query in a batch; None: any examples
    dtype: torch.dtype | None = None                    # of mixed precision; None: float32, or apex
    apex_level: str | None = None
    log_every: int = 1000                               # in steps, as are the next two
    save_every: int = 3000
    eval_every: int = 1000
    keep_checkpoints: int | None = None                 # how many; None: all
    log_gradients: bool = False
    compile: bool = False                               # the forward pass, by PyTorch's compiler
    tensorboard_dir: Path | None = None

    @classmethod
    def from_args(cls, args: argparse.Namespace, dtype: torch.dtype | None, max_seq_length: int,
                  eval_every: int = eval_every, group_by_query: int | None = None) -> "TrainingSettings":
        apex = args.fp16 and args.fp16_backend == "apex"
        same = ("seed", "warmup_proportion", "weight_decay", "keep_checkpoints", "log_gradients", "compile",
                "tensorboard_dir")
        return cls(batch_size=args.train_batch_size, max_seq_length=max_seq_length,
                   accumulation=args.gradient_accumulation_steps, group_by_length=args.padding == "masked",
                   dtype=None if apex else dtype, apex_level=args.fp16_opt_level if apex else None,
                   log_every=args.train_loss_step, save_every=args.save_model_step, eval_every=eval_every,
                   group_by_query=group_by_query,
                   **{name: getattr(args, name) for name in same})


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the training with its own objective and learning rate schedule."""
    objective: ObjectiveSettings
    epochs: float
    learning_rate: float                                # peak

    def pad_to(self, settings: TrainingSettings) -> int | None:
        """Return the length to pad to. If padding has no effect: None, for the longest example of each batch."""
        fixed = self.objective.uses("layers") and self.objective.padding == "reference"
        return settings.max_seq_length if fixed else None

    def steps_per_epoch(self, examples: int, settings: TrainingSettings) -> int:
        """Return the optimizer steps of an epoch. The last batch may be smaller.

        examples: the size of an epoch, from `TrainingSet.epoch_size`.
        """
        return math.ceil(math.ceil(examples / settings.batch_size) / settings.accumulation)

    def total_steps(self, examples: int, settings: TrainingSettings) -> int:
        return max(1, round(self.epochs * self.steps_per_epoch(examples, settings))) if self.epochs else 0


def make_stages(args: argparse.Namespace, problems: Problems) -> list[Stage]:
    """Return the stages of distill.py's --distill_model, with the weights of --loss_weights."""
    try:
        changed = parse_loss_weights(args.loss_weights)
    except ValueError as error:
        problems.add(str(error))
        return []
    weights = stage_weights(args.distill_model, args.alpha, changed)
    schedules = [(args.intermediate_epochs, args.intermediate_learning_rate),
                 (args.num_train_epochs, args.learning_rate)][-len(weights):]
    if not args.group_by_query and (ranking := [term for stage in weights for term in stage if term in RANKING]):
        problems.add(f"--loss_weights: {' and '.join(ranking)} compare the passages of a query; add --group_by_query N "
                     f"for batches with N passages of each query")
    for number, stage in enumerate(weights, start=1):
        if not any(stage.values()):
            problems.add(f"--loss_weights {' '.join(args.loss_weights)}: all weights in stage {number} of "
                         f"{args.distill_model} are 0; set at least one above 0")
    return [Stage(objective=ObjectiveSettings(weights=stage, padding=args.padding, temperature=args.temperature,
                                              layer_map=args.layer_map,
                                              scores_from_file=bool(args.teacher_scores_file)),
                  epochs=epochs, learning_rate=rate)
            for stage, (epochs, rate) in zip(weights, schedules)]


def uses(stages: list[Stage], need: str) -> bool:
    """Whether a stage's objective uses something (see `ObjectiveSettings.uses`)."""
    return any(stage.objective.uses(need) for stage in stages)


def runs_teacher(stages: list[Stage]) -> bool:
    return any(stage.objective.runs_teacher for stage in stages)


def warn_of_unused(args: argparse.Namespace, stages: list[Stage]) -> None:
    """Warn if flags of distill.py have no effect, because the method lacks the terms that they belong to."""
    terms = {term for stage in stages for term in stage.objective.weights}
    without_effect = {"--alpha": args.alpha != 0.5 and args.distill_model != "standard",
                      "--temperature": args.temperature != 1.0 and not terms & {"soft", "listwise"},
                      "--layer_map": args.layer_map is not None and not uses(stages, "layers")}
    for flag in (flag for flag, is_unused in without_effect.items() if is_unused):
        warn(f"{flag} has no effect: --distill_model {args.distill_model} minimizes {', '.join(sorted(terms))}")


def add_training_flags(parser: argparse.ArgumentParser, batch_size: int, learning_rate: float, epochs: float) -> None:
    add, default = parser.add_argument, TrainingSettings
    add("--output_student_dir", type=Path, required=True, help="new or empty directory for the student")
    add("--cache_file_dir", type=Path, default=Path("cache"),
        help="directory for memory-mapped features, which later runs reuse (default: cache)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, or a CUDA index such as 0 (default: auto)")
    add("--no_cuda", action="store_true", help="use the CPU and ignore --device")
    add("--padding", choices=PADDING_MODES, default=ObjectiveSettings.padding,
        help="reference (default): pad to max_seq_length and count padding in the attention and hidden losses, as the "
             "original does; masked: count real tokens only and batch examples of similar length, which is faster")
    add("--train_batch_size", type=int, default=batch_size,
        help=f"examples per forward pass, over all processes (default: {batch_size})")
    add("--gradient_accumulation_steps", type=int, default=default.accumulation,
        help=f"forward passes per optimizer step (default: {default.accumulation})")
    add("--num_train_epochs", type=float, default=epochs,
        help=f"passes over the data; may be a fraction (default: {epochs:g})")
    add("--learning_rate", type=float, default=learning_rate, help=f"peak learning rate (default: {learning_rate:g})")
    add("--warmup_proportion", type=float, default=default.warmup_proportion,
        help=f"fraction of the steps in which the learning rate rises (default: {default.warmup_proportion:g})")
    add("--weight_decay", "--wd", type=float, default=default.weight_decay,
        help=f"weight decay of all parameters except biases and layer norms (default: {default.weight_decay:g})")
    add("--fp16", action="store_true", help="mixed precision in float16 with loss scaling (CUDA)")
    add("--fp16_backend", choices=("torch", "apex"), default="torch", help="library for --fp16 (default: torch)")
    add("--fp16_opt_level", choices=("O0", "O1", "O2", "O3"), default="O1", help="apex level (default: O1)")
    add("--bf16", action="store_true", help="mixed precision in bfloat16, without loss scaling")
    add("--tf32", action="store_true", help="compute float32 products with 10-bit mantissas (CUDA)")
    add("--compile", action="store_true", help="compile the models with torch.compile (CUDA): fewer, larger kernels; "
        "takes minutes at the start")
    add("--seed", type=int, default=default.seed,
        help=f"random seed for dropout, batch order and new parameters (default: {default.seed})")
    add("--train_loss_step", type=int, default=default.log_every,
        help=f"steps between rows of the log (default: {default.log_every})")
    add("--log_gradients", action="store_true", help="also log the norm of each loss term's gradient (att_grad, "
        "rep_grad, soft_grad, hard_grad, ...); each row costs a forward pass more, and a backward pass for each term")
    add("--save_model_step", type=int, default=default.save_every,
        help=f"steps between checkpoints (default: {default.save_every})")
    add("--keep_checkpoints", type=int, metavar="N", help="keep only the N newest checkpoints (default: all)")
    add("--tensorboard_dir", type=Path, help="directory for TensorBoard (default: tensorboard in --output_student_dir)")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --output_student_dir, if any")


def check_training_flags(args: argparse.Namespace, stages: int, problems: Problems,
                         more_rules: list[tuple[str, bool, str]]) -> None:
    """Check the ranges of flags, the directories, and apex. more_rules: further rules for `check_ranges`."""
    per_process = f" for each of {process_count()} processes" if process_count() > 1 else ""
    check_ranges(args, problems, [
        ("train_batch_size", args.train_batch_size >= process_count(), f"1 or more{per_process}"),
        ("gradient_accumulation_steps", args.gradient_accumulation_steps >= 1, "1 or more"),
        ("learning_rate", 0 <= args.learning_rate < math.inf, "0 or more"),
        ("warmup_proportion", 0 <= args.warmup_proportion < 1, "0 to less than 1"),
        ("weight_decay", 0 <= args.weight_decay < math.inf, "0 or more"),
        ("train_loss_step", args.train_loss_step >= 1, "1 or more"),
        ("save_model_step", args.save_model_step >= 1, "1 or more"),
        ("seed", 0 <= args.seed < 2 ** 62, "0 or more, below 2^62"),
        ("keep_checkpoints", args.keep_checkpoints is None or args.keep_checkpoints >= 1, "1 or more"), *more_rules])
    for directory in filter(None, (args.cache_file_dir, args.tensorboard_dir)):
        if directory.exists() and not directory.is_dir():
            problems.add(f"{directory}: is a file; name a directory")
    check_output_dir(args.output_student_dir, args.resume, problems)
    if args.fp16 and args.fp16_backend == "apex":
        with problems.collect():
            import_apex_amp()
        if process_count() > 1 or stages > 1 or args.compile:
            problems.add("--fp16_backend apex: works with one process and one stage only, without --compile; use "
                         "--fp16_backend torch")


def resumable_settings(args: argparse.Namespace, names: tuple[str, ...]) -> dict:
    """Return the settings that must not change when a run is resumed; `names`: flags of the script."""
    names += ("padding", "train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "learning_rate",
              "warmup_proportion", "weight_decay", "fp16", "fp16_backend", "bf16", "tf32", "seed", "train_loss_step")
    return {name: getattr(args, name) for name in names} | {"processes": process_count()}
