"""Distill a BERT cross-encoder (teacher) into a small one (student): section 3 of the paper.

    python distill.py --features_file train.pkl --teacher_model nboost/pt-bert-base-uncased-msmarco \\
        --general_student_model huawei-noah/TinyBERT_General_6L_768D --output_student_dir student \\
        --distill_model simplified --device 0 --bf16

In: feature file(s) of labelled training pairs (tokenize_to_features.py --set_name train), a teacher fine-tuned for
ranking, and a general student (a pre-trained small BERT). Models are folders or Hugging Face hub ids.

    finetune      hard                                      no teacher: how a teacher is made; the baseline without KD
    standard      alpha · soft + (1 - alpha) · hard         standard KD
    simplified    attention + hidden + soft + hard          Simplified TinyBERT: all of it in one stage

Out, in --output_student_dir: the finished student as a Hugging Face folder (config.json, model.safetensors, tokenizer,
fit_dense.safetensors), train_loss.jsonl (a row every --train_loss_step steps: global_step, loss = cls_loss + att_loss +
rep_loss, the unweighted soft_loss and hard_loss, learning_rate, examples_per_second), the same for TensorBoard, and
checkpoint-<step>/ every --save_model_step steps (checkpoint-0: the student before the first), from which --resume goes
on to the same student.

Several GPUs of a machine, or processes on its CPU, share every batch and end in the same student as one:

    torchrun --standalone --nproc_per_node=4 distill.py --features_file train.pkl ...
"""
import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from simplified_tinybert import losses
from simplified_tinybert.checkpoints import (
    fit_projections,
    load_cross_encoder,
    save_cross_encoder,
    weights_fingerprint,
)
from simplified_tinybert.cpu_linear import pack_linear_layers
from simplified_tinybert.description import describe_run, model_card
from simplified_tinybert.distributed import WHOLE, Processes, Share, process_group
from simplified_tinybert.feature_cache import map_examples
from simplified_tinybert.features import Examples, FeatureSummary, summarise
from simplified_tinybert.files import Problems, UserError, locked, process_count, run_main, say
from simplified_tinybert.modeling import Batch, CrossEncoder
from simplified_tinybert.optimizer import BertAdam, decay_groups, linear_warmup_decay
from simplified_tinybert.precision import ApexScaler, LossScaler, import_apex_amp, select_precision
from simplified_tinybert.preflight import (
    check_flags,
    check_length,
    check_model_fits,
    check_output_dir,
    check_pair,
    find_models,
    find_run,
)
from simplified_tinybert.records import record
from simplified_tinybert.runtime import keep_freed_memory, select_device
from simplified_tinybert.tokenization import has_vocabulary
from simplified_tinybert.training import Plan, Training, remove_leftovers, step_of
from simplified_tinybert.training_log import TrainingLog


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--features_file", type=Path, nargs="+", required=True, help="feature file(s) of labelled pairs")
    add("--teacher_model", help="folder or hub id of the teacher; not needed with finetune")
    add("--general_student_model", required=True, help="folder or hub id of the student to start from")
    add("--output_student_dir", type=Path, required=True, help="new or empty folder for the student")
    add("--distill_model", choices=("finetune", "standard", "simplified"), default="simplified",
        help="objective, see above (default: simplified)")
    add("--cache_file_dir", type=Path, default=Path("cache"),
        help="folder for memory-mapped features, in a subfolder of its own that later runs use again (default: cache)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, or a CUDA index such as 0 (default: auto)")
    add("--no_cuda", action="store_true", help="compute on the CPU whatever --device says")
    add("--max_seq_length", type=int, help="positions to pad to (default: as the features were made)")
    add("--padding", choices=losses.PADDING_MODES, default="reference",
        help="reference: pad to max_seq_length and let padding count in attention and hidden losses, as the original "
             "does; masked: count real tokens only and batch pairs of similar length, faster (default: reference)")
    add("--do_lower_case", action="store_true", help="refuse features that were not made lower-cased")
    add("--train_batch_size", type=int, default=64,
        help="examples of one forward pass, in all processes together (default: 64)")
    add("--gradient_accumulation_steps", type=int, default=1, help="forward passes of one optimizer step (default: 1)")
    add("--num_train_epochs", type=float, default=2.0, help="passes over the data; fractions allowed (default: 2)")
    add("--learning_rate", type=float, default=5e-5, help="peak learning rate (default: 5e-5)")
    add("--warmup_proportion", type=float, default=0.1, help="share of steps in which it rises (default: 0.1)")
    add("--weight_decay", "--wd", type=float, default=1e-2, help="decay of all but biases and norms (default: 0.01)")
    add("--alpha", type=float, default=0.5, help="weight of the soft loss in standard (default: 0.5)")
    add("--temperature", type=float, default=1.0, help="softens teacher and student in the soft loss (default: 1)")
    add("--pooled_relu", action="store_true",
        help="relu before the classifier, as the original did while distilling; stored in the student's configuration, "
             "which reranker.py obeys, but other tools do not know it")
    add("--fp16", action="store_true", help="mixed precision in float16 with loss scaling (CUDA)")
    add("--fp16_backend", choices=("torch", "apex"), default="torch", help="what --fp16 uses (default: torch)")
    add("--fp16_opt_level", choices=("O0", "O1", "O2", "O3"), default="O1", help="apex level (default: O1)")
    add("--bf16", action="store_true", help="mixed precision in bfloat16, no loss scaling")
    add("--seed", type=int, default=42, help="of dropout, batch order and new parameters (default: 42)")
    add("--train_loss_step", type=int, default=1000, help="steps between rows of the log (default: 1000)")
    add("--save_model_step", type=int, default=3000, help="steps between checkpoints (default: 3000)")
    add("--tensorboard_dir", type=Path, help="folder for TensorBoard (default: tensorboard in --output_student_dir)")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --output_student_dir, if any")
    return parser.parse_args()


def objective(student: CrossEncoder, teacher: CrossEncoder | None, batch: Batch, args: argparse.Namespace,
              share: Share = WHOLE) -> dict[str, Tensor]:
    """Loss terms of a batch; "loss" = cls_loss + att_loss + rep_loss is what the student minimizes.

    Where the batch is a `share` of a larger one, its terms are what it contributes to the larger one's means.
    """
    if args.distill_model == "finetune":
        hard = share.examples * losses.hard_loss(student(batch).logits, batch.labels)
        return {"loss": hard, "cls_loss": hard, "hard_loss": hard}

    mapped = None                                        # teacher layer that each student layer learns from
    if args.distill_model == "simplified":
        mapped = losses.layer_map(student.config.num_hidden_layers, teacher.config.num_hidden_layers)
    with torch.inference_mode():
        taught = teacher(batch, layers=mapped)
    learnt = student(batch, layers=mapped and list(range(1, len(mapped) + 1)))
    soft = share.examples * losses.soft_loss(learnt.logits, taught.logits, args.temperature)
    hard = share.examples * losses.hard_loss(learnt.logits, batch.labels)
    if args.distill_model == "standard":
        loss = args.alpha * soft + (1 - args.alpha) * hard
        return {"loss": loss, "cls_loss": loss, "soft_loss": soft, "hard_loss": hard}

    masked = args.padding == "masked"                   # means over real tokens; otherwise examples weigh the same
    attention = sum(losses.attention_loss(learnt.queries[layer], learnt.keys[layer], taught.queries[source],
                                          taught.keys[source], batch.attention_mask, args.padding)
                    for layer, source in enumerate(mapped, start=1)) * (share.pairs if masked else share.examples)
    hidden = sum(losses.hidden_loss(student.project(layer, learnt.hidden_states[layer]), taught.hidden_states[source],
                                    batch.attention_mask, args.padding)
                 for layer, source in enumerate([0, *mapped])) * (share.tokens if masked else share.examples)
    return {"loss": attention + hidden + soft + hard, "cls_loss": soft + hard, "att_loss": attention,
            "rep_loss": hidden, "soft_loss": soft, "hard_loss": hard}


def load_models(args: argparse.Namespace, models: dict, checkpoint: Path | None, device: torch.device) \
        -> tuple[CrossEncoder, CrossEncoder | None]:
    """Student (from a checkpoint if given) and teacher on the device, with the head that --pooled_relu asks for."""
    generator = torch.Generator().manual_seed(args.seed)
    folder, config = models["general student"]
    student, notes = load_cross_encoder(checkpoint or folder, None if checkpoint else config, new_head=generator)
    teacher = None
    if args.distill_model != "finetune":
        teacher, more = load_cross_encoder(*models["teacher"])
        teacher.requires_grad_(False)
        notes += more
    for role, model in (("general student", student), ("teacher", teacher)):
        if model and model.config.num_labels != 2:
            raise UserError(f"{models[role][0]}: the {role} has {model.config.num_labels} classes; expected 2 (not "
                            f"relevant, relevant)")
        if model:
            model.config.pooled_relu = args.pooled_relu or getattr(model.config, "pooled_relu", False)
    if args.distill_model == "simplified":
        notes += fit_projections(student, teacher.config.hidden_size, generator)
    student.projections.requires_grad_(args.distill_model == "simplified")
    for note in notes:
        say(f"note         {note}")
    return student.to(device), teacher and teacher.to(device)


def settings(args: argparse.Namespace, models: dict, summary: FeatureSummary) -> dict:
    """What must not change when a run is resumed."""
    names = ("distill_model", "max_seq_length", "padding", "train_batch_size", "gradient_accumulation_steps",
             "num_train_epochs", "learning_rate", "warmup_proportion", "weight_decay", "alpha", "temperature",
             "pooled_relu", "fp16", "fp16_backend", "bf16", "seed", "train_loss_step")
    inputs = {role: weights_fingerprint(folder) for role, (folder, _) in models.items()}
    return {name: getattr(args, name) for name in names} | inputs | {"features": summary.fingerprint,
                                                                     "processes": process_count()}


def check_all(args: argparse.Namespace, problems: Problems) -> tuple[dict, FeatureSummary, int]:
    """Models, features and padded length, once everything is known to fit. Raises UserError with all that does not."""
    check_flags(args, problems)
    if args.fp16 and args.fp16_backend == "apex":
        try:
            import_apex_amp()
        except UserError as error:
            problems.add(str(error))
        if process_count() > 1:
            problems.add("--fp16_backend apex works in one process only; --fp16_backend torch works in several")
    check_output_dir(args.output_student_dir, args.resume, problems)
    roles = {"general student": args.general_student_model}
    if args.distill_model != "finetune":
        roles["teacher"] = args.teacher_model
    models, summary, width = find_models(roles, problems), summarise(args.features_file, problems), 0
    if summary:
        width = check_length(args.max_seq_length, summary, problems)
        for role, (folder, config) in models.items():
            check_model_fits(role, folder, config, summary, width, problems)
        if summary.labelled < summary.examples:
            problems.add(f"{summary.examples - summary.labelled} of {summary.examples} examples have no label; "
                         f"training needs features made with --set_name train")
        if args.do_lower_case and not summary.header["lower_case"]:
            problems.add("--do_lower_case: the features are cased; tokenize again with --do_lower_case")
    if args.distill_model == "simplified" and len(models) == 2:
        check_pair(models["teacher"][1], models["general student"][1], problems)
    problems.raise_if_any()
    return models, summary, width


def make_plan(args: argparse.Namespace, width: int) -> Plan:
    # Only the layer losses of the reference padding see how far a batch is padded
    fixed = args.distill_model == "simplified" and args.padding == "reference"
    return Plan(args.train_batch_size, args.gradient_accumulation_steps, args.num_train_epochs, args.seed,
                width if fixed else None, args.padding == "masked", args.train_loss_step, args.save_model_step)


def train(args: argparse.Namespace, student: CrossEncoder, teacher: CrossEncoder | None, examples: Examples, plan: Plan,
          dtype: torch.dtype | None, save_model: Callable[[Path], None], checkpoint: Path | None,
          processes: Processes) -> None:
    """Distill, from the checkpoint on if there is one."""
    if teacher and not dtype:
        pack_linear_layers(teacher)
    device, total = student.classifier.weight.device, plan.total_steps(len(examples))
    optimizer = BertAdam(decay_groups(student.named_parameters(), args.weight_decay), args.learning_rate,
                         schedule=lambda step: linear_warmup_decay(step, total, args.warmup_proportion))
    apex = args.fp16 and args.fp16_backend == "apex"
    scaler = ApexScaler(student, optimizer, args.fp16_opt_level) if apex else LossScaler(device, dtype)
    log = TrainingLog(args.output_student_dir / "train_loss.jsonl",
                      args.tensorboard_dir or args.output_student_dir / "tensorboard", device, processes,
                      finished_steps=step_of(checkpoint) if checkpoint else 0)
    torch.manual_seed(args.seed + processes.rank)
    training = Training(student, lambda batch, share: objective(student, teacher, batch, args, share), examples, plan,
                        optimizer, scaler, log, device, None if apex else dtype, args.output_student_dir, save_model,
                        processes)
    training.run(checkpoint)


def distill(args: argparse.Namespace, device: torch.device, processes: Processes) -> None:
    problems = Problems()
    dtype = select_precision(args.fp16, args.bf16, device, problems)
    models, summary, width = check_all(args, problems)
    output, facts = args.output_student_dir, {"settings": settings(args, models, summary), "device": str(device)}
    finished, checkpoint = find_run(output, facts["settings"])
    processes.check_agreement(facts["settings"] | {"checkpoint": checkpoint})
    if finished:
        say(f"{output}: the student is finished already; remove the folder to distill it again")
        return

    student, teacher = load_models(args, models, checkpoint, device)
    args.cache_file_dir.mkdir(parents=True, exist_ok=True)
    with processes.first_on_machine():
        examples, plan = map_examples(args.features_file, summary, args.cache_file_dir), make_plan(args, width)
    describe_run(args, student, teacher, examples, summary, plan, processes)
    tokenizer_folder = next((folder for folder, _ in models.values() if has_vocabulary(folder)), None)

    def save_model(folder: Path) -> None:
        save_cross_encoder(student, folder, tokenizer_folder, summary.header["lower_case"], model_card(args, student))

    run = partial(train, args, student, teacher, examples, plan, dtype, save_model, checkpoint, processes)
    if not processes.first:
        run()
        return
    output.mkdir(parents=True, exist_ok=True)
    with locked(output):
        remove_leftovers(output)
        record(output / "run.json", args, **facts, finished=False)
        run()
        save_model(output)
        record(output / "run.json", args, **facts, finished=True)
    say(f"student      {output}")


def main() -> None:
    args = parse_args()
    device = select_device(args.device, args.no_cuda)
    keep_freed_memory(device)
    with process_group(device) as processes:
        distill(args, device, processes)


if __name__ == "__main__":
    run_main(main, several=True)
