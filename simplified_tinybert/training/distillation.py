"""What distill.py and general_distill.py share: flags, and the way from checked settings to a finished student."""
import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from simplified_tinybert.common.files import Problems, UserError, locked, process_count, say
from simplified_tinybert.common.processes import Processes
from simplified_tinybert.common.records import record
from simplified_tinybert.common.signals import StopRequests
from simplified_tinybert.data.features import Examples
from simplified_tinybert.model.bert import CrossEncoder
from simplified_tinybert.model.cpu_linear import pack_linear_layers
from simplified_tinybert.model.precision import ApexScaler, LossScaler, import_apex_amp
from simplified_tinybert.training.log import TrainingLog
from simplified_tinybert.training.loop import Plan, Training, remove_leftovers, step_of
from simplified_tinybert.training.losses import PADDING_MODES
from simplified_tinybert.training.objective import Weights, objective, uses_labels, uses_layers
from simplified_tinybert.training.optimizer import BertAdam, decay_groups, linear_warmup_decay
from simplified_tinybert.training.validation import DevSet

# What must not change when a run is resumed
SETTINGS = ("padding", "train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "learning_rate",
            "warmup_proportion", "weight_decay", "fp16", "fp16_backend", "bf16", "seed", "train_loss_step")


def add_training_flags(parser: argparse.ArgumentParser, batch_size: int, learning_rate: float, epochs: float) -> None:
    add = parser.add_argument
    add("--output_student_dir", type=Path, required=True, help="new or empty folder for the student")
    add("--cache_file_dir", type=Path, default=Path("cache"),
        help="folder for memory-mapped features, in a subfolder of its own that later runs use again (default: cache)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, or a CUDA index such as 0 (default: auto)")
    add("--no_cuda", action="store_true", help="compute on the CPU whatever --device says")
    add("--padding", choices=PADDING_MODES, default="reference",
        help="reference: pad to max_seq_length and let padding count in attention and hidden losses, as the original "
             "does; masked: count real tokens only and batch examples of similar length, faster (default: reference)")
    add("--train_batch_size", type=int, default=batch_size,
        help=f"examples of one forward pass, in all processes together (default: {batch_size})")
    add("--gradient_accumulation_steps", type=int, default=1, help="forward passes of one optimizer step (default: 1)")
    add("--num_train_epochs", type=float, default=epochs,
        help=f"passes over the data; fractions allowed (default: {epochs:g})")
    add("--learning_rate", type=float, default=learning_rate, help=f"peak learning rate (default: {learning_rate:g})")
    add("--warmup_proportion", type=float, default=0.1, help="share of steps in which it rises (default: 0.1)")
    add("--weight_decay", "--wd", type=float, default=1e-2, help="decay of all but biases and norms (default: 0.01)")
    add("--fp16", action="store_true", help="mixed precision in float16 with loss scaling (CUDA)")
    add("--fp16_backend", choices=("torch", "apex"), default="torch", help="what --fp16 uses (default: torch)")
    add("--fp16_opt_level", choices=("O0", "O1", "O2", "O3"), default="O1", help="apex level (default: O1)")
    add("--bf16", action="store_true", help="mixed precision in bfloat16, no loss scaling")
    add("--seed", type=int, default=42, help="of dropout, batch order and new parameters (default: 42)")
    add("--train_loss_step", type=int, default=1000, help="steps between rows of the log (default: 1000)")
    add("--log_gradients", action="store_true", help="also log the norm of each loss term's gradient (att_grad, "
        "rep_grad, soft_grad, hard_grad): one batch more for each row of the log")
    add("--save_model_step", type=int, default=3000, help="steps between checkpoints (default: 3000)")
    add("--keep_checkpoints", type=int, metavar="N", help="remove all but the N newest checkpoints (default: keep all)")
    add("--tensorboard_dir", type=Path, help="folder for TensorBoard (default: tensorboard in --output_student_dir)")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --output_student_dir, if any")


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


def make_plan(args: argparse.Namespace, weights: Weights, width: int, epochs: float, learning_rate: float) -> Plan:
    """The plan of a stage. Only layers' losses with the reference padding see how far a batch is padded."""
    fixed = uses_layers(weights) and args.padding == "reference"
    return Plan(args.train_batch_size, args.gradient_accumulation_steps, epochs, args.seed, width if fixed else None,
                args.padding == "masked", args.train_loss_step, args.save_model_step,
                getattr(args, "eval_step", args.save_model_step), weights, learning_rate,
                args.keep_checkpoints, args.log_gradients)


def train(args: argparse.Namespace, student: CrossEncoder, teacher: CrossEncoder | None, examples: Examples,
          plans: list[Plan], dtype: torch.dtype | None, save_model: Callable[[Path], None], checkpoint: Path | None,
          processes: Processes, names: Callable[[np.ndarray], list[str]], dev_set: DevSet | None = None) -> None:
    """Train the student stage after stage, from the checkpoint on if there is one."""
    if teacher and not dtype:
        pack_linear_layers(teacher)
    device, resumed = student.classifier.weight.device, step_of(checkpoint) if checkpoint else 0
    log = TrainingLog(args.output_student_dir, args.tensorboard_dir, device, processes, resumed)
    torch.manual_seed(args.seed + processes.rank)
    end = 0
    with StopRequests(patient=processes.count > 1) as requests:
        for plan in plans:
            start, steps = end, plan.total_steps(len(examples))
            end += steps
            if checkpoint and resumed >= end:           # this stage was finished before
                continue
            student.projections.requires_grad_("hidden" in plan.weights)
            schedule = partial(linear_warmup_decay, total_steps=steps, warmup_proportion=args.warmup_proportion)
            groups = decay_groups(student.named_parameters(), args.weight_decay)
            optimizer = BertAdam(groups, plan.learning_rate, schedule)
            apex = args.fp16 and args.fp16_backend == "apex"
            scaler = ApexScaler(student, optimizer, args.fp16_opt_level) if apex else LossScaler(device, dtype)
            terms = partial(objective, student, teacher, weights=plan.weights, padding=args.padding,
                            temperature=getattr(args, "temperature", 1.0), layer_map=getattr(args, "layer_map", None))
            training = Training(student, terms, examples, plan, start, optimizer, scaler, log, device,
                                None if apex else dtype, args.output_student_dir, save_model, processes, names,
                                requests, dev_set if uses_labels(plan.weights) else None)
            training.run(checkpoint)
            checkpoint = None
    log.close()


def make_student(args: argparse.Namespace, facts: dict, processes: Processes, save_model: Callable[[Path], None],
                 run: Callable[[], None]) -> None:
    """`run` in the output folder, which no other run may use meanwhile; then the finished student and its record."""
    if not processes.first:
        run()
        return
    output = args.output_student_dir
    output.mkdir(parents=True, exist_ok=True)
    with locked(output):
        remove_leftovers(output)
        record(output / "run.json", args, **facts, finished=False)
        run()
        save_model(output)
        record(output / "run.json", args, **facts, finished=True)
    say(f"student      {output}")
