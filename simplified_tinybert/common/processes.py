"""Several processes of one job, started by torchrun: who computes what, and how results are exchanged.

torchrun numbers the processes in environment variables (RANK, LOCAL_RANK, WORLD_SIZE). A process started without it is
the only one: nothing is exchanged, and scripts need no separate code path.
"""
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simplified_tinybert.common.files import UserError, process_count, process_number, reason
from simplified_tinybert.common.signals import signals_unhandled

if TYPE_CHECKING:
    from simplified_tinybert.data.features import Examples

GPU_TIMEOUT, LONG_TIMEOUT = timedelta(minutes=15), timedelta(hours=6)
# The share of a batch that one process computes, for each thing that a loss may average over: examples, tokens, pairs
# of tokens and, for ranking losses, queries and pairs of a relevant and a non-relevant passage
Share = dict[str, float]
FULL_BATCH: Share = {"examples": 1.0, "tokens": 1.0, "pairs": 1.0, "queries": 1.0, "margins": 1.0}


@dataclass(frozen=True)
class Processes:
    """This process and its job. In a job of one process, every exchange returns its input immediately."""
    rank: int = 0
    local_rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")          # of this process
    waiting: dist.ProcessGroup | None = None            # the same processes, on CPUs, with a long timeout; None: all

    @property
    def first(self) -> bool:
        """True in the one process that writes files and messages."""
        return self.rank == 0

    def barrier(self, group: dist.ProcessGroup | None = None) -> None:
        if self.count > 1:
            dist.barrier(group)

    def gather(self, value: object) -> list:
        """Return the values of all processes, in order of rank."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def total(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the processes. It must be on the processes' device; the result is, too."""
        if self.count == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def merge(self, values: np.ndarray) -> np.ndarray:
        """Add float32 arrays. Each element is nonzero in at most one process. Adding integers keeps -0.0 and NaN.

        The CPUs add them, so nothing waits for what a GPU has still to compute.
        """
        if self.count == 1:
            return values
        total = torch.from_numpy(values.view(np.int32).copy())
        dist.all_reduce(total, group=self.waiting)
        return total.numpy().view(np.float32)

    @contextmanager
    def first_on_machine(self) -> Iterator[None]:
        """Run the body in the first process of each machine, then in the others. They may wait for hours."""
        if self.local_rank > 0:
            self.barrier(self.waiting)
        yield
        if self.local_rank == 0:
            self.barrier(self.waiting)

    def check_agreement(self, settings: dict) -> None:
        """Raise UserError if the processes have different settings because their machines hold different files."""
        for rank, others in enumerate(self.gather(settings)):
            differing = [f"{name} is {settings[name]} here, {others[name]} in process {rank}"
                         for name in settings if settings[name] != others[name]]
            if differing:
                raise UserError(f"the processes found different files ({'; '.join(differing)}); use storage that all "
                                f"machines share, or copy the files to each machine")

    def share(self, indices: np.ndarray, examples: "Examples",
              queries: np.ndarray | None = None) -> tuple[np.ndarray, Share]:
        """Return the examples of a batch that this process computes, and their share of the batch.

        Takes every n-th example, so that shares are similar even if the batch is sorted by length; with `queries` (the
        number of each example's query), every n-th query with all its examples. If a batch has fewer examples (or
        queries) than there are processes, the others compute one of them with weight zero: all must exchange gradients.
        """
        number = np.arange(len(indices)) if queries is None else np.unique(queries[indices], return_inverse=True)[1]
        own = indices[number % self.count == self.rank]
        if not len(own):
            return indices[number == 0], dict.fromkeys(FULL_BATCH, 0.0)
        part, batch = (unit_counts(chosen, examples, queries) for chosen in (own, indices))
        return own, {name: part[name] / max(batch[name], 1.0) for name in FULL_BATCH}


def unit_counts(indices: np.ndarray, examples: "Examples", queries: np.ndarray | None) -> dict[str, float]:
    """Return how many of each unit of FULL_BATCH are in a batch. Loss terms are means over one of these units."""
    lengths, labels = examples.lengths[indices].astype(np.float64), examples.labels[indices]
    counts = {"examples": len(indices), "tokens": float(lengths.sum()), "pairs": float((lengths ** 2).sum()),
                "queries": 1.0, "margins": 1.0}
    if queries is not None:
        number = np.unique(queries[indices], return_inverse=True)[1]
        relevant, others = (np.bincount(number, weights=labels == label) for label in (1, 0))
        counts |= {"queries": float(len(relevant)), "margins": float((relevant * others).sum())}
    return counts


@contextmanager
def process_group(device: torch.device) -> Iterator[Processes]:
    """Connect the processes that torchrun started. Raises UserError if another process fails.

    `device` is set up already (`prepare_device`).
    """
    count = process_count()
    if count == 1:
        yield Processes(device=device)
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE is {count}, but these are not set: {', '.join(missing)}; start several processes "
                        f"with torchrun, or unset WORLD_SIZE to run one")
    rank, port = process_number("RANK"), os.environ["MASTER_PORT"]
    if rank >= count or not port.isdecimal():
        raise UserError(f"RANK is {rank}, WORLD_SIZE {count}, MASTER_PORT {port}; expected a rank below WORLD_SIZE and "
                        f"the number of a port, as torchrun sets them")
    cuda = device.type == "cuda"
    try:
        # GPUs exchange something every few seconds: a hung one should not idle the others for hours. But the others
        # wait long while the first process of a machine tokenizes a corpus. torchrun detects processes that died.
        with signals_unhandled():                       # Python would not handle them before all processes have come
            dist.init_process_group("nccl" if cuda else "gloo", timeout=GPU_TIMEOUT if cuda else LONG_TIMEOUT,
                                    device_id=device if cuda else None)
        waiting = dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)
        processes = Processes(process_number("RANK"), process_number("LOCAL_RANK"), count, device, waiting)
        yield processes
        processes.barrier()
        dist.destroy_process_group()
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        cause = str(error).strip().splitlines()[-1].strip()     # NCCL names it last
        texts = dict.fromkeys([reason(error), cause])
        raise UserError(f"lost the connection to another process, or this process's GPU failed; the messages of the "
                        f"other processes may say why ({'; '.join(texts)})") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a file or directory against other processes of this tool. Raises UserError if it is locked already."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{path}: another process is writing here; wait for it, or name another output") from error
        except OSError:                                 # the file system has no locks
            pass
        yield
    finally:
        os.close(descriptor)


class _ObjectiveModule(nn.Module):
    """The student's parameters and its objective, as DistributedDataParallel needs them (without buffers)."""

    def __init__(self, student: nn.Module, objective: Callable[..., dict[str, Tensor]]):
        super().__init__()
        self.weights, self.objective = nn.ParameterList(student.parameters()), objective

    def forward(self, *inputs: object) -> dict[str, Tensor]:
        if not inputs:
            # A loss of 0 with a gradient for every parameter, for the pass before the first step (see data_parallel).
            return {"loss": 0.0 * sum(weight.sum() for weight in self.weights if weight.requires_grad)}
        return self.objective(*inputs)


def data_parallel(student: nn.Module, objective: Callable[..., dict[str, Tensor]],
                  processes: Processes, all_used: bool = True) -> Callable[..., dict[str, Tensor]]:
    """Wrap `objective`: the student takes the first process's weights, and gradients are averaged over processes."""
    if processes.count == 1:
        return objective
    module = DistributedDataParallel(_ObjectiveModule(student, objective), gradient_as_bucket_view=True,
                                     find_unused_parameters=not all_used)
    if all_used:
        # DistributedDataParallel regroups the gradients after the first backward pass, which changes the rounding of
        # sums over three or more processes. The first pass must not be a training step, or a resumed run would differ
        # in the last bits. With find_unused_parameters it never regroups.
        module()["loss"].backward()
        student.zero_grad(set_to_none=True)
    return module


def exchanging(objective: Callable[..., dict[str, Tensor]], now: bool) -> AbstractContextManager:
    """Context for the passes over one batch of a `data_parallel` objective: exchange gradients only if `now`."""
    return objective.no_sync() if isinstance(objective, DistributedDataParallel) and not now else nullcontext()
