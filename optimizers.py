"""What turns gradients into steps: Muon, which parameters it takes and which it leaves, and the learning rates."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from settings import Settings
from utils import UserError

WIDE = 3  # columns a row, from which on orthogonalising by way of the gram matrix pays
SGD_MOMENTUM, SHIFT_RATE, HEAD_RATE = 0.85, 8.0, 4.0  # of SGD beside Muon: see docs/experiments.md


class Muon(torch.optim.Optimizer):
    """Momentum whose step is orthogonalised: for a weight matrix, every direction is followed at the same rate.

    Jordan et al. 2024 (kellerjordan.github.io/posts/muon), Nesterov momentum. Takes parameters of two dimensions or
    more, [out, in, ...]; filters are read as matrices [out, in * ...]. `torch.optim.Muon` takes only matrices and
    always computes in bfloat16, which is 10 times slower than float32 on processors without instructions for it.

    fixed_norm: before each step a parameter is scaled to the norm sqrt(out), that of `out` filters of norm 1, and the
    step is not scaled by the matrix's shape: `lr` is then the angle of a step. For layers followed by batch norm, to
    which their scale means nothing.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.9, weight_decay: float = 0.0,
                 iterations: int = 3, fixed_norm: bool = False, precision: str = "float32") -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "iterations": iterations}
        super().__init__(params, defaults)
        self.fixed_norm, self.dtype = fixed_norm, getattr(torch, precision)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].mul_(group["momentum"]).add_(parameter.grad)
                direction = parameter.grad.add(momentum, alpha=group["momentum"]).flatten(1).to(self.dtype)
                update = orthogonalise(direction, group["iterations"]).view_as(parameter)
                scale = 1.0 if self.fixed_norm else max(1, direction.shape[0] / direction.shape[1]) ** 0.5
                kept = len(parameter) ** 0.5 / parameter.norm() if self.fixed_norm \
                    else 1 - group["lr"] * group["weight_decay"]
                parameter.mul_(kept)
                parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * scale)


def orthogonalise(matrix: Tensor, iterations: int) -> Tensor:
    """[M, N] with all singular values brought near 1 by Newton-Schulz iterations, in the matrix's own dtype.

    The quintic and its coefficients are Jordan's (2024). Five iterations bring every singular value that is not tiny to
    between 0.65 and 1.25; three leave the smallest of a random matrix of the MLP's shapes at about half.

    Every iterate is a polynomial in the gram matrix times the first one. Where N is far above M, as it is for filters,
    that polynomial is worked out on M x M matrices alone, for half the operations.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    if x.shape[1] >= WIDE * x.shape[0]:
        gram, identity = x @ x.T, torch.eye(len(x), dtype=x.dtype, device=x.device)
        product = identity
        for iteration in range(iterations):
            polynomial = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
            product = polynomial @ product if iteration else polynomial
            if iteration < iterations - 1:
                gram = polynomial @ gram @ polynomial
        x = product @ x
    else:
        for _ in range(iterations):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def make_optimizers(model: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """What the settings name, each parameter group with its own `peak_lr`.

    Weight decay acts on matrices and filters, not on shifts and scales. "muon" takes the matrices and filters below
    `model.head` and leaves the rest to AdamW; "muon-sgd" takes the filters only, keeps their norms, and leaves the rest
    to SGD, shifts and the head at larger rates.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    in_head = {id(p) for p in model.head.parameters()}
    matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    decay, no_decay = {"weight_decay": settings.weight_decay}, {"weight_decay": 0.0}
    groups = [{"params": matrices, **decay}, {"params": vectors, **no_decay}]
    muon = {"lr": settings.lr, "weight_decay": settings.weight_decay, "precision": settings.precision}
    if settings.optimizer == "muon":
        hidden = [p for p in matrices if id(p) not in in_head]
        groups[0]["params"] = [p for p in matrices if id(p) in in_head]
        optimizers = [Muon(hidden, momentum=settings.momentum, **muon),
                      torch.optim.AdamW(groups, lr=settings.other_lr)]
    elif settings.optimizer == "muon-sgd":
        filters = [p for p in parameters if p.ndim == 4]
        if not filters:
            raise UserError("--optimizer muon-sgd is for networks with convolutions: this one has no filters")
        small = [p for p in matrices if p.ndim < 4 and id(p) not in in_head]
        groups = [{"params": small, **decay},
                  {"params": vectors, "lr": SHIFT_RATE * settings.other_lr, **no_decay},
                  {"params": [p for p in matrices if id(p) in in_head], "lr": HEAD_RATE * settings.other_lr, **decay}]
        optimizers = [Muon(filters, momentum=settings.momentum, fixed_norm=True, **muon),
                      torch.optim.SGD(groups, lr=settings.other_lr, momentum=SGD_MOMENTUM, nesterov=True)]
    elif settings.optimizer == "sgd":
        optimizers = [torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)]
    else:
        adam = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer]
        optimizers = [adam(groups, lr=settings.lr)]
    for group in all_groups(optimizers):
        group["peak_lr"] = group["lr"]
    return optimizers


def all_groups(optimizers: list[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def set_rates(optimizers: list[torch.optim.Optimizer], settings: Settings, progress: float) -> None:
    """Every group's learning rate when the share `progress` of all steps is done."""
    for group in all_groups(optimizers):
        group["lr"] = group["peak_lr"] * rate_factor(settings.schedule, settings.warmup, progress)


def rate_factor(schedule: str, warmup: float, progress: float) -> float:
    """What the peak learning rate is multiplied by when the share `progress` of all steps is done."""
    if progress < warmup:
        return progress / warmup
    left = (1 - progress) / (1 - warmup) if warmup < 1 else 1.0
    return {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[schedule]
