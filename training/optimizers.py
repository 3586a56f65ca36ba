"""Muon, the parameter groups of every optimizer, and learning-rate schedules."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from training.settings import Settings

WIDE = 3  # columns per row at which orthogonalizing through the Gram matrix becomes cheaper
SGD_MOMENTUM = 0.9  # of SGD next to Muon, Nesterov
ROW_BETA = 0.95  # decay of the mean squares in NorMuon


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with an orthogonalized step: a weight matrix moves equally fast in every direction.

    Jordan et al. 2024 (kellerjordan.github.io/posts/muon). Takes parameters of two or more dimensions,
    [out, in, ...], and treats filters as matrices [out, in * ...]. `torch.optim.Muon` takes only
    matrices and always computes in bfloat16, which is 10 times slower than float32 on processors
    without bfloat16 instructions.

    fixed_norm: scale each parameter to the norm sqrt(out), that of `out` filters of norm 1, before
    each step, and do not scale the step by the matrix's shape. `lr` is then the angle of a step. Use it
    for layers before a batch norm, which cancels their scale.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.9, weight_decay: float = 0.0,
                 iterations: int = 3, fixed_norm: bool = False, precision: str = "float32") -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "iterations": iterations}
        super().__init__(params, defaults)
        self.fixed_norm, self.dtype = fixed_norm, getattr(torch, precision)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # a closure is not supported
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].mul_(group["momentum"]).add_(parameter.grad)
                direction = parameter.grad.add(momentum, alpha=group["momentum"]).flatten(1).to(self.dtype)
                update = self._update(direction, group["iterations"], state).view_as(parameter)
                if self.fixed_norm:
                    scale, kept = 1.0, len(parameter) ** 0.5 / parameter.norm()
                else:
                    scale = max(1, direction.shape[0] / direction.shape[1]) ** 0.5
                    kept = 1 - group["lr"] * group["weight_decay"]
                parameter.mul_(kept)
                parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * scale)

    def _update(self, direction: Tensor, iterations: int, state: dict[str, Tensor]) -> Tensor:
        return orthogonalize(direction, iterations)


class NorMuon(Muon):
    """Muon whose steps are also divided, row by row, by the root of their running mean square.

    So all filters move at similar rates; the norm of the whole step stays (Li et al. 2025, arXiv 2510.05491).
    """

    def _update(self, direction: Tensor, iterations: int, state: dict[str, Tensor]) -> Tensor:
        update = super()._update(direction, iterations, state).float()
        squares = update.square().mean(1)
        mean = state.setdefault("row_squares", squares.clone()).lerp_(squares, 1 - ROW_BETA)
        even = update / (mean.sqrt()[:, None] + 1e-8)
        return even * (update.norm() / even.norm().clamp(min=1e-8))


def orthogonalize(matrix: Tensor, iterations: int) -> Tensor:
    """Bring all singular values of a matrix, [M, N], near 1 by Newton-Schulz iterations in its own dtype.

    The quintic and its coefficients are Jordan's (2024). Five iterations bring every singular value
    that is not tiny to between 0.65 and 1.25. Three leave the smallest one of a random matrix of the
    MLP's shapes at about half.

    Every iterate is a polynomial in the Gram matrix times the first one. Where N is far above M, as in
    filters, computing that polynomial on M x M matrices takes half the operations.
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


class Average(torch.optim.Optimizer):
    """The running mean of the weights, as the last of the optimizers: its step changes no weight.

    So a checkpoint keeps the mean with the states of the others. Its decay is smaller in the first steps, where the
    mean spans about a ninth of them, so that a short training does not end with a part of its initial weights.
    Averaging does what the last part of a falling learning rate does (Polyak and Juditsky 1992; Izmailov et al. 2018,
    arXiv 1803.05407).
    """

    def __init__(self, params: Iterable[Any], decay: float) -> None:
        super().__init__(params, {"lr": 0.0})
        self.decay = decay

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # a closure is not supported
        (group,) = self.param_groups
        for parameter in group["params"]:
            state = self.state[parameter]
            if not state:
                state.update(step=torch.tensor(0.0), average=parameter.clone())
            count = state["step"].add_(1).item()
            state["average"].lerp_(parameter, 1 - min(self.decay, count / (count + 9)))


@torch.no_grad()
def replace_by_average(optimizers: list[torch.optim.Optimizer]) -> None:
    """Put the running mean in the place of the weights, if there is an Average."""
    for average in (optimizer for optimizer in optimizers if isinstance(optimizer, Average)):
        for parameter, state in average.state.items():
            parameter.copy_(state["average"])


def make_optimizers(model: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """The optimizers that `settings` name; each parameter group has its own `peak_lr`.

    Weight decay acts on matrices and filters, not on biases and scales. "muon" updates the matrices and
    filters below `model.head`, and AdamW the rest. "muon-sgd" updates only the filters, keeping their
    norms, and SGD the rest; "normuon-sgd" does the same with NorMuon. With `settings.average`, an Average of
    all weights comes last. Raises UserError if Muon would have nothing to update.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    decay, no_decay = {"weight_decay": settings.weight_decay}, {"weight_decay": 0.0}
    groups = [{"params": matrices, **decay}, {"params": vectors, **no_decay}]
    optimizers: list[torch.optim.Optimizer]
    muon: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay, "precision": settings.precision}
    if settings.optimizer == "muon":
        in_head = {id(p) for p in model.get_submodule("head").parameters()}
        hidden = _required([p for p in matrices if id(p) not in in_head], "muon needs hidden layers")
        groups[0]["params"] = [p for p in matrices if id(p) in in_head]
        optimizers = [Muon(hidden, momentum=settings.momentum, **muon),
                      torch.optim.AdamW(groups, lr=settings.other_lr)]
    elif settings.optimizer in ("muon-sgd", "normuon-sgd"):
        filters = _required([p for p in matrices if p.ndim == 4], f"{settings.optimizer} needs convolutions")
        groups[0]["params"] = [p for p in matrices if p.ndim < 4]
        of_filters = NorMuon if settings.optimizer == "normuon-sgd" else Muon
        optimizers = [of_filters(filters, momentum=settings.momentum, fixed_norm=True, **muon),
                      torch.optim.SGD(groups, lr=settings.other_lr, momentum=SGD_MOMENTUM, nesterov=True)]
    elif settings.optimizer == "sgd":
        optimizers = [torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)]
    else:
        adam = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer]
        optimizers = [adam(groups, lr=settings.lr)]
    if settings.average:
        optimizers.append(Average(parameters, settings.average))
    for group in all_groups(optimizers):
        group["peak_lr"] = group["lr"]
    return optimizers


def _required(parameters: list[nn.Parameter], needs: str) -> list[nn.Parameter]:
    """`parameters`, if there are any. Raises UserError that the optimizer `needs` them."""
    if not parameters:
        raise UserError(f"--optimizer {needs}, and this network has none: use --optimizer adamw")
    return parameters


def all_groups(optimizers: list[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def set_rates(optimizers: list[torch.optim.Optimizer], settings: Settings, progress: float) -> None:
    """Set every group's learning rate for when the fraction `progress` of all steps is done."""
    for group in all_groups(optimizers):
        group["lr"] = group["peak_lr"] * rate_factor(settings.schedule, settings.warmup, progress, settings.lr_floor)


def rate_factor(schedule: str, warmup: float, progress: float, floor: float = 0.0) -> float:
    """The learning rate, relative to its peak, when the fraction `progress` of all steps is done."""
    if progress < warmup:
        return progress / warmup
    left = (1 - progress) / (1 - warmup) if warmup < 1 else 1.0
    return max(floor, {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[schedule])
