"""Several processes of one job, started by torchrun: what each of them does, and what they tell one another.

torchrun names a process by environment variables (RANK, LOCAL_RANK, WORLD_SIZE). A process that was started without it
is the only one: it forms no group and talks to nobody, and scripts need no second path for it.
"""
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simplified_tinybert.common.files import UserError, process_count, process_number

VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Share:
    """What a process computes of a batch: which part of its examples, of their tokens, of their pairs of tokens."""
    examples: float = 1.0
    tokens: float = 1.0
    pairs: float = 1.0

    def of(self, unit: str) -> float:
        """The share of the batch's examples, tokens or pairs."""
        return getattr(self, unit)


WHOLE = Share()


@dataclass(frozen=True)
class Processes:
    """This process among those of its job. One process alone gets back at once what it gives."""
    rank: int = 0
    local_rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")          # where tensors must be to be exchanged

    @property
    def first(self) -> bool:
        """True in the one process that writes files and speaks."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.count > 1:
            dist.barrier()

    def gather(self, value: object) -> list:
        """What each process gave, by rank."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def total(self, tensor: Tensor) -> Tensor:
        """Sum of the tensors that the processes gave, on the device of this one's."""
        if self.count == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def merge(self, values: np.ndarray) -> np.ndarray:
        """Of float32 arrays whose places are zero in all processes but one: what that one has there, to the last bit.

        They are summed as integers, for which -0.0 and numbers that are none are like any other.
        """
        return self.total(torch.from_numpy(values.view(np.int32))).numpy().view(np.float32)

    @contextmanager
    def first_on_machine(self) -> Iterator[None]:
        """The first process of a machine goes through the body before the others; all have come this far by then."""
        if self.local_rank > 0:
            self.barrier()
        yield
        if self.local_rank == 0:
            self.barrier()

    def check_agreement(self, facts: dict) -> None:
        """Raise UserError if not all processes came to the same facts, because their machines hold other files."""
        for rank, others in enumerate(self.gather(facts)):
            differing = [f"{name} is {facts[name]} here, {others[name]} in process {rank}"
                         for name in facts if facts[name] != others[name]]
            if differing:
                raise UserError(f"the processes found different files ({'; '.join(differing)}); use storage that all "
                                f"machines share, or copy the files to each of them")

    def share(self, indices: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, Share]:
        """The examples of a batch that this process computes, and how much of the batch they are.

        Every n-th example: parts are alike also where a batch is sorted by length. Where there are fewer examples than
        processes, some have none; they take part with one that counts nothing.
        """
        mine = indices[self.rank::self.count]
        if not len(mine):
            return indices[:1], Share(0.0, 0.0, 0.0)
        part, whole = (lengths[chosen].astype(np.float64) for chosen in (mine, indices))
        return mine, Share(len(part) / len(whole), float(part.sum() / whole.sum()),
                           float((part ** 2).sum() / (whole ** 2).sum()))


@contextmanager
def process_group(device: torch.device) -> Iterator[Processes]:
    """The processes that torchrun started, connected; without torchrun this one alone.

    Raises UserError if another process cannot be reached or breaks off; why, that one has told.
    """
    count = process_count()
    if count == 1:
        yield Processes()
        return
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE is {count}, but {', '.join(missing)} not set; start several processes with "
                        f"torchrun, or unset WORLD_SIZE for one")
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    try:
        # Hours, for the others wait while the first process of a machine tokenizes a corpus; torchrun notices the dead
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=6),
                                device_id=device if cuda else None)
        processes = Processes(process_number("RANK"), process_number("LOCAL_RANK"), count, device)
        yield processes
        processes.barrier()
        dist.destroy_process_group()
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise UserError(f"the connection to another process is lost; it should have told why "
                        f"({str(error).partition(chr(10))[0]})") from error


class _Passes(nn.Module):
    """A student's parameters and what it minimizes: what DistributedDataParallel has to see, buffers left out."""

    def __init__(self, student: nn.Module, objective: Callable[..., dict[str, Tensor]]):
        super().__init__()
        self.weights, self.objective = nn.ParameterList(student.parameters()), objective

    def forward(self, *inputs: object, **more: object) -> dict[str, Tensor]:
        if not inputs:                                  # a pass over all parameters, last ones first on the way back
            return {"loss": 0.0 * sum(weight.sum() for weight in self.weights if weight.requires_grad)}
        return self.objective(*inputs, **more)


def data_parallel(student: nn.Module, objective: Callable[..., dict[str, Tensor]],
                  processes: Processes, all_learn: bool = True) -> Callable[..., dict[str, Tensor]]:
    """`objective`, after whose backward pass the student's gradients are means over all processes.

    The student takes over the weights of the first process. Unless `all_learn`, the objective leaves some of its
    parameters, the head for one, without a gradient.
    """
    if processes.count == 1:
        return objective
    passes = DistributedDataParallel(_Passes(student, objective), gradient_as_bucket_view=True,
                                     find_unused_parameters=not all_learn)
    if all_learn:
        # After its first backward pass DistributedDataParallel regroups the gradients, whose sums over three or more
        # processes are then rounded otherwise. That pass must not be a step, or resumed runs would end in other bits.
        # Where it looks for unused parameters it never regroups, and warns if the first pass has none.
        passes()["loss"].backward()
        student.zero_grad(set_to_none=True)
    return passes


def exchanging(objective: Callable[..., dict[str, Tensor]], now: bool) -> AbstractContextManager:
    """Context of a forward and backward pass of `data_parallel`: gradients are exchanged after the last one only."""
    return objective.no_sync() if isinstance(objective, DistributedDataParallel) and not now else nullcontext()
