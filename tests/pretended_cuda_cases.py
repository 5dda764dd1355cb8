"""Runs training steps, validation, checkpoints and scoring on a pretended GPU, as they are and with seeded faults.

test_pretended_cuda.py runs this in a process of its own. It prints one line of JSON for each case or fault: its kind,
its name, and the error that a GPU would have shown (null: none). With --kernels, it also prints each step's kernels.
"""
import json
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import patch

from benchmarks import cuda_guard

cuda_guard.load()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import BertConfig  # noqa: E402

from benchmarks.pretended_cuda import Watch, pretended_cuda  # noqa: E402
from simplified_tinybert.common.processes import Processes  # noqa: E402
from simplified_tinybert.data.features import Examples  # noqa: E402
from simplified_tinybert.model import batch as batching  # noqa: E402
from simplified_tinybert.model import bert  # noqa: E402
from simplified_tinybert.model.bert import CrossEncoder  # noqa: E402
from simplified_tinybert.model.pretrained import fit_projections  # noqa: E402
from simplified_tinybert.ranking import scoring  # noqa: E402
from simplified_tinybert.training import checkpoints, log, losses, optimizer, validation  # noqa: E402
from simplified_tinybert.training import trainer as training  # noqa: E402
from simplified_tinybert.training.checkpoints import TrainingRun  # noqa: E402
from simplified_tinybert.training.objective import ObjectiveSettings, stage_weights  # noqa: E402
from simplified_tinybert.training.settings import Stage, TrainingSettings  # noqa: E402

DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
METHODS = {"finetune": ("finetune", 0), "standard": ("standard", 0), "tinybert, layers": ("tinybert", 0),
           "tinybert, logits": ("tinybert", 1), "simplified": ("simplified", 0), "rankings": ("simplified", 0)}
# Kernels of a training step with two batches: student 2/32, teacher 4/64, simplified
MOST_KERNELS = {("float32", "masked"): 855, ("bf16", "masked"): 1063, ("bf16", "reference"): 1003,
                ("fp16", "masked"): 1075}


def model(layers: int, hidden_size: int) -> CrossEncoder:
    return CrossEncoder(BertConfig(vocab_size=200, hidden_size=hidden_size, num_hidden_layers=layers,
                                   num_attention_heads=4, intermediate_size=2 * hidden_size))


def random_examples(count: int = 10) -> Examples:
    random = np.random.default_rng(0)
    lengths = random.integers(5, 33, count).astype(np.uint16)
    return Examples(random.integers(5, 200, int(lengths.sum())).astype(np.uint16), lengths,
                    np.full(count, 4, np.uint16), (np.arange(count) % 2).astype(np.int8),
                    [f"q{number // 5}#d{number}" for number in range(count)])


def make_trainer(directory: str, device: torch.device, method: str, dtype: str, padding: str) -> training.Trainer:
    """Return a trainer in the middle of a stage, with the real models, loss scaling and log."""
    name, stage = METHODS[method]
    student = model(2, 32)
    fit_projections(student, 64, torch.Generator().manual_seed(0))
    teacher = model(4, 64).eval().requires_grad_(False).to(device) if name != "finetune" else None
    settings = TrainingSettings(batch_size=8, max_seq_length=32, accumulation=2, group_by_length=padding == "masked",
                                group_by_query=4, dtype=DTYPES[dtype], warmup_proportion=0.0)
    run = TrainingRun(args=Namespace(output_student_dir=Path(directory)), settings={},
                      processes=Processes(device=device), save_model=lambda student, directory: None)
    training_set, weights = training.TrainingSet(random_examples()), stage_weights(name)[stage]
    if method == "rankings":                            # with the teacher's scores from a file
        weights |= {"margin": 1.0, "listwise": 1.0}
        training_set = replace(training_set, queries=np.arange(10) // 5, teacher_scores=np.zeros(10, np.float32))
    trainer = training.Trainer(student.to(device), teacher, training_set, settings, run)
    trainer.stage = Stage(objective=ObjectiveSettings(weights=weights, padding=padding, scores_from_file=method ==
                                                      "rankings"), epochs=1, learning_rate=1e-4)
    trainer.first_step, trainer.last_step, trainer.postfix = 0, 100, {}
    trainer._begin(100)
    trainer.student.train()
    return trainer


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def scratch_directory() -> tempfile.TemporaryDirectory:
    """After a seeded fault, TensorBoard's thread may still write into the directory while it is removed."""
    return tempfile.TemporaryDirectory(ignore_cleanup_errors=True)


def check_step(method: str, dtype: str, padding: str) -> None:
    """The second step, with two batches: nothing waits for the device but GradScaler, and types are right."""
    batches = [np.arange(8), np.arange(8, 10)]
    with scratch_directory() as directory, pretended_cuda() as device:
        trainer = make_trainer(directory, device, method, dtype, padding)
        with Watch():                                                       # creates the optimizer's state
            trainer._advance(1, batches[1:], tqdm(disable=True))
        with Watch() as seen:
            trainer._advance(2, batches, tqdm(disable=True))
    expect(not seen.to_host, f"copies to the host in a step: {seen.to_host}")
    expect(seen.scaler_steps == (dtype == "fp16"), f"GradScaler asked the device {seen.scaler_steps} times")
    states = {tensor.device for state in trainer.optimizer.state.values() for tensor in state.values()}
    expect(states == {device}, f"the optimizer's state is on {states}")
    if trainer.stage.objective.uses("layers"):
        expect("attention" not in trainer.stage.objective.weights or seen.grams == {torch.float32},
               f"types of Gram products: {seen.grams}")
    if dtype != "float32":
        counts = seen.products[DTYPES[dtype]], seen.products[torch.float32]
        expect(counts[0] > counts[1], f"{counts[0]} products in {dtype}, {counts[1]} in float32")
    if "--kernels" in sys.argv:
        print(method, dtype, padding, seen.kernels.total(), seen.kernels.most_common(), file=sys.stderr)
    most = MOST_KERNELS.get((dtype, padding)) if method == "simplified" else None
    expect(most is None or seen.kernels.total() <= most, f"{seen.kernels.total()} kernels in a step, expected {most}")


def check_checkpoint(dtype: str) -> None:
    """What a checkpoint holds, and where the parts are after resuming from it."""
    saved = {}
    with scratch_directory() as directory, pretended_cuda() as device, ExitStack() as stack:
        for place, name, replacement in (
                (checkpoints, "replace_directory", lambda path, save, state: saved.update(state)),
                (optimizer.LossScaler, "state_dict", lambda self: {}),      # these two need numbers
                (optimizer.LossScaler, "load_state_dict", lambda self, state: None)):
            stack.enter_context(patch.object(place, name, replacement))
        trainer = make_trainer(directory, device, "simplified", dtype, "masked")
        with Watch():
            trainer._advance(1, [np.arange(8)], tqdm(disable=True))
        with patch.object(trainer, "_check_losses"):                        # needs numbers
            trainer._save_checkpoint(1)
        own, = saved["processes"]
        expect(own.keys() == {"random", "cuda_random", "log"}, f"states of a process: {sorted(own)}")
        expect(own["log"]["sums"].device.type == "cpu", "the sums of the log are saved from the device")
        other = make_trainer(directory, device, "simplified", dtype, "masked")
        # the file is read to the CPU
        saved["optimizer"]["state"] = {number: {name: tensor.cpu() for name, tensor in state.items()}
                                       for number, state in saved["optimizer"]["state"].items()}
        with patch.object(checkpoints, "read_state", lambda path: saved):
            expect(other._restore(Path("checkpoint-1")) == 1, "another step than saved")
            own.pop("cuda_random")                                          # as in a checkpoint made on a CPU
            expect(other._restore(Path("checkpoint-1")) == 1, "another step than a CPU saved")
        states = {tensor.device for state in other.optimizer.state.values() for tensor in state.values()}
        expect(states == {device}, f"the optimizer's state is on {states} after resuming")
        expect(other.log.sums.device == device, "the log's sums are not on the device after resuming")


def check_validation(dtype: str) -> None:
    examples = random_examples()
    with scratch_directory() as directory, pretended_cuda() as device, \
            patch.object(scoring, "read_chunks", lambda path: iter([examples, examples])):
        trainer = make_trainer(directory, device, "simplified", dtype, "masked")
        dev = validation.DevSet(Namespace(paths=[Path("dev.pkl")], examples=20), {"q0": {"d0": 1}, "q1": {"d7": 1}})
        with Watch() as seen:
            dev.measures(trainer.student, device, DTYPES[dtype], Processes(device=device))
    expect(not seen.to_host, f"scoring waits for the device: {seen.to_host}")
    expect(seen.waits == 2, f"{seen.waits} waits for two chunks")


def check_scoring(dtype: str, hidden_size: int = 32) -> None:
    with pretended_cuda() as device:
        ranker = model(3, hidden_size).eval().requires_grad_(False).to(device)
        scoring.prepare(ranker, DTYPES[dtype], int8=False)
        with Watch() as seen:
            scored = scoring.score_chunk(ranker, random_examples(), [np.arange(6), np.arange(6, 10)])
            expect(not seen.waits, "the logits are read before they are needed")
            scored.logits()
    expect(not seen.to_host, f"scoring waits for the device: {seen.to_host}")
    expect(seen.waits == 1, f"{seen.waits} waits for a chunk")
    packs = dtype != "float32" and hidden_size == 32                        # with heads of 8
    expect(("_varlen_attn" in seen.kernels) == packs, f"kernels of attention: {sorted(seen.kernels)}")
    products = seen.products[DTYPES[dtype] or torch.float32]
    expect(products > 0.8 * seen.products.total() - 4, f"products: {dict(seen.products)}")


CASES: dict[str, Callable[[], None]] = {
    **{f"step: {method}, {dtype}, {padding}": partial(check_step, method, dtype, padding)
       for method, dtype, padding in product(METHODS, DTYPES, ("reference", "masked"))},
    **{f"checkpoint: {dtype}": partial(check_checkpoint, dtype) for dtype in DTYPES},
    **{f"validation: {dtype}": partial(check_validation, dtype) for dtype in DTYPES},
    **{f"scoring: {dtype}": partial(check_scoring, dtype) for dtype in DTYPES},
    "scoring: bf16, heads of 12": partial(check_scoring, "bf16", 48)}

# Faults that a GPU would show, each with a case that must find it


def constant_on_the_cpu(real, *inputs):
    return real(*inputs) * torch.arange(1.0, 2.0)


def log_that_reads_the_loss(real, self, number, examples, made=True):
    real(self, number, examples, made)
    self.last = float(self.sums[0])


def step_that_depends_on_data(real, self, batch, layers=None):
    batch.has_padding = bool((batch.attention_mask == 0).any())
    return real(self, batch, layers)


def mask_on_the_cpu(real, self, batch, layers=None):
    batch.attention_mask = batch.attention_mask.to("cpu")
    return real(self, batch, layers)


def shape_that_depends_on_data(real, self, batch, layers=None):
    batch.input_ids[batch.attention_mask.bool()].sum()
    return real(self, batch, layers)


def state_on_the_cpu(real, self, parameters, decay):
    for parameter in parameters:
        if not self.state[parameter]:
            self.state[parameter] = {name: torch.zeros(parameter.shape) for name in ("mean", "square")}
    return real(self, parameters, decay)


def norm_compared_on_the_host(real, self, parameters, decay):
    for parameter in parameters:
        if parameter.grad.norm() > 1:
            parameter.grad.mul_(0.5)
    return real(self, parameters, decay)


def kernel_for_each_tensor(real, *lists):
    yield from (tuple([tensor] for tensor in tensors) for tensors in zip(*lists, strict=True))


def teacher_cast_in_each_step(real, teacher, dtype):
    pass


def boolean_mask(real, batch, dtype):
    return batch.attention_mask[:, None, None, :].bool()


def scores_read_batch_by_batch(real, self, batch, layers=None):
    return replace(outputs := real(self, batch, layers), logits=outputs.logits.cpu())


def scores_read_without_waiting(real, self):
    self.copied = None
    return real(self)


def heads_of_any_size(real, heads):
    return heads


def scores_read_twice(real, self):
    return real(self) + real(self)


def random_state_of_the_cpu_only(real, device):
    return real(torch.device("cpu"))


def log_saved_from_the_device(real, self):
    return real(self) | {"sums": self.sums}


def batch_left_on_the_cpu(real, tensor, device):
    return tensor


def expanded_tensor(real, tensor, device):
    return real(tensor[:1].expand(len(tensor), *tensor.shape[1:]) if tensor.ndim == 1 else tensor, device)


def scaler_that_asks_twice(real, self, chosen):
    made = real(self, chosen)
    self._maybe_opt_step(chosen, {"found_inf_per_device": True})
    return made


def autocast_that_cannot_be_disabled(real, *args, enabled=True, **kwargs):
    return real(*args, **kwargs) if enabled else nullcontext()


STEP = "step: simplified, {}, {}"
FAULTS = {
    "a constant on the CPU in a loss": (losses, "hidden_loss", constant_on_the_cpu, STEP.format("float32", "masked")),
    "the log reads the loss in each step": (log.TrainingLog, "step", log_that_reads_the_loss,
                                            STEP.format("float32", "masked")),
    "a branch that depends on data": (CrossEncoder, "forward", step_that_depends_on_data,
                                      STEP.format("bf16", "masked")),
    "a mask on the CPU": (CrossEncoder, "forward", mask_on_the_cpu, STEP.format("bf16", "reference")),
    "a shape that depends on data": (CrossEncoder, "forward", shape_that_depends_on_data,
                                     STEP.format("bf16", "masked")),
    "optimizer's state on the CPU": (optimizer.BertAdam, "_update", state_on_the_cpu,
                                     STEP.format("float32", "masked")),
    "a norm compared on the host": (optimizer.BertAdam, "_update", norm_compared_on_the_host,
                                    STEP.format("float32", "masked")),
    "a kernel for each tensor in the optimizer": (optimizer, "in_blocks", kernel_for_each_tensor,
                                                  STEP.format("float32", "masked")),
    "Gram products in half precision": (losses.torch, "autocast", autocast_that_cannot_be_disabled,
                                         STEP.format("bf16", "reference")),
    "the teacher is cast in each step": (training, "cast_linear_layers", teacher_cast_in_each_step,
                                         STEP.format("bf16", "masked")),
    "a boolean mask": (bert, "padding_mask", boolean_mask, STEP.format("bf16", "masked")),
    "the batch stays on the CPU": (batching, "to_device", batch_left_on_the_cpu, STEP.format("float32", "reference")),
    "an expanded tensor is pinned": (batching, "to_device", expanded_tensor, STEP.format("float32", "reference")),
    "GradScaler asks twice": (optimizer.LossScaler, "step", scaler_that_asks_twice, STEP.format("fp16", "masked")),
    "scores are read batch by batch": (CrossEncoder, "forward", scores_read_batch_by_batch, "scoring: bf16"),
    "scores are read without waiting": (scoring.ScoredChunk, "logits", scores_read_without_waiting, "scoring: bf16"),
    "heads without a fast kernel": (bert, "pad_heads", heads_of_any_size, "scoring: bf16, heads of 12"),
    "scores are read twice in validation": (scoring.ScoredChunk, "logits", scores_read_twice, "validation: bf16"),
    "a checkpoint without the GPU's random state": (checkpoints, "random_state", random_state_of_the_cpu_only,
                                                    "checkpoint: float32"),
    "a checkpoint with the log's tensor of the device": (log.TrainingLog, "state", log_saved_from_the_device,
                                                         "checkpoint: fp16")}


def seeded(place: object, name: str, fault: Callable, case: str) -> None:
    """Run a case with a fault in place of a function; the fault gets the real function as its first argument."""
    real = getattr(place, name)
    with patch.object(place, name, lambda *args, **kwargs: fault(real, *args, **kwargs)):
        CASES[case]()


def outcome(check: Callable[[], None]) -> str | None:
    """Return the error that a case ends in, if any."""
    try:
        check()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def main() -> None:
    for name, check in CASES.items():
        print(json.dumps(["case", name, outcome(check)]), flush=True)
    for name, fault in FAULTS.items():
        print(json.dumps(["fault", name, outcome(partial(seeded, *fault))]), flush=True)


if __name__ == "__main__":
    main()
