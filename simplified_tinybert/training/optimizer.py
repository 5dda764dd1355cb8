"""BertAdam, the optimizer of the original BERT and TinyBERT code, and loss scaling for float16.

Differences from AdamW: no bias correction of the moments, epsilon 1e-6, weight decay added to the update before it is
scaled by the learning rate, and each parameter tensor's gradient clipped to norm 1 separately. An update starts few
kernels on a GPU, and reads each tensor from memory only once on a CPU.
"""
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from simplified_tinybert.common.files import UserError
from simplified_tinybert.model.bert import CrossEncoder

APEX_HELP = ("--fp16_backend apex: {found}; expected a version of NVIDIA apex with apex.amp, built from NVIDIA's "
             "repository (the package apex on PyPI is something else); --fp16_backend torch needs no apex")
CPU_BLOCK = 1 << 18             # elements
INITIAL_SCALE = 2.0 ** 16       # of losses in float16


def linear_warmup_decay(step: int, total_steps: int, warmup_proportion: float) -> float:
    """Return the factor of the learning rate after `step` steps: from 0 (as in the original) to 1, then down to 0."""
    progress = step / total_steps
    if progress < warmup_proportion:
        return progress / warmup_proportion
    return max((progress - 1.0) / (warmup_proportion - 1.0), 0.0)


def decay_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict]:
    """Return two parameter groups; biases and layer norms have no weight decay."""
    decay, no_decay = [], []
    for name, parameter in named_parameters:
        (no_decay if name.endswith(("bias", "LayerNorm.weight")) else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]


class BertAdam(torch.optim.Optimizer):
    """Adam as in the original. Parameters without gradients stay unchanged. schedule: finished steps → factor of lr."""

    def __init__(self, groups: list[dict], lr: float, schedule: Callable[[int], float],
                 betas: tuple[float, float] = (0.9, 0.999), epsilon: float = 1e-6, max_grad_norm: float = 1.0):
        super().__init__(groups, {"lr": lr, "finished_steps": 0})
        self.schedule, self.betas, self.epsilon, self.max_grad_norm = schedule, betas, epsilon, max_grad_norm
        self.learning_rate = 0.0                        # of the last step

    @torch.no_grad()
    def step(self, closure: None = None) -> float:
        """Make a step and return its learning rate."""
        self.count_step()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update(parameters, group["weight_decay"])
        return self.learning_rate

    def count_step(self) -> None:
        """Set the learning rate of the next step. The schedule also counts steps that loss scaling skips."""
        for group in self.param_groups:
            self.learning_rate = group["lr"] * self.schedule(group["finished_steps"])
            group["finished_steps"] += 1

    def _update(self, parameters: list[nn.Parameter], weight_decay: float) -> None:
        gradients = [parameter.grad for parameter in parameters]
        scales = torch._foreach_norm(gradients)         # each gradient is clipped to `max_grad_norm`, in place
        torch._foreach_add_(scales, 1e-6)
        torch._foreach_reciprocal_(scales)
        torch._foreach_mul_(scales, self.max_grad_norm)
        torch._foreach_clamp_max_(scales, 1.0)
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {"mean": torch.zeros_like(parameter), "square": torch.zeros_like(parameter)}
        means = [self.state[parameter]["mean"] for parameter in parameters]
        squares = [self.state[parameter]["square"] for parameter in parameters]
        for tensors in in_blocks(parameters, gradients, means, squares, scales):
            self._move(*tensors, weight_decay)

    def _move(self, parameters: list[Tensor], gradients: list[Tensor], means: list[Tensor],
              squares: list[Tensor], scales: list[Tensor], weight_decay: float) -> None:
        """Scale the gradients; update moments and parameters. Everything in place."""
        beta1, beta2 = self.betas
        torch._foreach_mul_(gradients, scales)
        torch._foreach_mul_(means, beta1)
        torch._foreach_add_(means, gradients, alpha=1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        updates = torch._foreach_sqrt(squares)
        torch._foreach_add_(updates, self.epsilon)
        updates = torch._foreach_div(means, updates)
        if weight_decay:
            torch._foreach_add_(updates, parameters, alpha=weight_decay)
        torch._foreach_add_(parameters, updates, alpha=-self.learning_rate)


def in_blocks(*lists: list[Tensor]) -> Iterator[Sequence[list[Tensor]]]:
    """Yield parallel lists of tensors: on a GPU all at once, on a CPU one block of each list, with the same elements.

    A block stays in the processor's cache while all operations are applied to it. The last list has one number for
    each tensor of the others. On a GPU it is expanded, because only lists of equal shapes share a launch.
    """
    *first, scales = lists
    if scales[0].device.type != "cpu":
        sizes = [tensor.numel() for tensor in first[0]]
        expanded = torch.cat([scale.expand(size) for scale, size in zip(scales, sizes, strict=True)]).split(sizes)
        yield *first, [scale.view_as(tensor) for scale, tensor in zip(expanded, first[0], strict=True)]
        return
    for *tensors, scale in zip(*lists, strict=True):
        contiguous = all(tensor.is_contiguous() for tensor in tensors)
        for blocks in zip(*(tensor.view(-1).split(CPU_BLOCK) if contiguous else [tensor] for tensor in tensors),
                          strict=True):
            yield *([block] for block in blocks), [scale]


def import_apex_amp() -> object:
    """Return NVIDIA's apex.amp. Raises UserError if it is missing."""
    try:
        from apex import amp
    except ImportError as error:
        raise UserError(APEX_HELP.format(found=error)) from error
    if not hasattr(amp, "initialize"):
        raise UserError(APEX_HELP.format(found="the installed apex has no amp.initialize"))
    return amp


class LossScaler(torch.amp.GradScaler):
    """Backward pass and optimizer step, with PyTorch's loss scaling if `dtype` is float16."""

    def __init__(self, device: torch.device, dtype: torch.dtype | None):
        super().__init__(device.type, init_scale=INITIAL_SCALE, enabled=dtype == torch.float16)

    def backward(self, loss: Tensor) -> None:
        self.scale(loss).backward()

    def step(self, optimizer: BertAdam) -> bool:
        """Make a step. Returns False if it was skipped because a gradient was not finite; the scale is then halved."""
        self.unscale_(optimizer)                        # before the optimizer clips
        made = super().step(optimizer) is not None
        if not made:
            optimizer.count_step()
        self.update()
        return made


class ApexScaler:
    """Does the same as LossScaler with apex, which casts operations itself and needs no autocast context."""

    def __init__(self, student: CrossEncoder, optimizer: torch.optim.Optimizer, opt_level: str):
        self.amp, self.optimizer = import_apex_amp(), optimizer
        self.state_dict, self.load_state_dict = self.amp.state_dict, self.amp.load_state_dict
        self.amp.initialize(student, optimizer, opt_level=opt_level)

    def backward(self, loss: Tensor) -> None:
        with self.amp.scale_loss(loss, self.optimizer) as scaled:
            scaled.backward()

    def step(self, optimizer: BertAdam) -> bool:
        optimizer.step()                                # replaced by apex, which does not say whether it skips steps
        return True
