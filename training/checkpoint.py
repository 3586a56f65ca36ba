"""Checkpoints: everything a training needs to continue to the same bits, in one safetensors file.

The file holds the tensors of model and optimizers; its metadata holds the rest as JSON and a SHA-256 of both, since
safetensors has no checksum of its own. Loading one executes nothing.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from common.errors import UserError
from common.run_files import METRICS
from models import MAX_HEADER_BYTES

MAX_COUNT = 2**53  # far above any count; converts exactly to a float and to an int64
MAX_TENSORS = 100_000  # several times what a ResNet of 1,000 layers and its optimizer have
STATE_NAMES = {  # by optimizer: the tensors that it keeps for each parameter, from the first step on
    "Muon": ("momentum",),
    "NorMuon": ("momentum", "row_squares"),
    "SGD": ("momentum_buffer",),
    "Average": ("step", "average"),
    **dict.fromkeys(("Adam", "AdamW"), ("step", "exp_avg", "exp_avg_sq")),
}

Optimizers = list[torch.optim.Optimizer]
Checkpoint = tuple[dict[str, Tensor], dict[str, Any]]  # the tensors, and the rest: what JSON can hold


@dataclass
class Progress:
    """How far a training has come. `loss` and `correct` are sums over the `images` of the current epoch so far, in all
    processes; `rows` are those of metrics.csv.
    """

    epoch: int = 0
    step: int = 0
    images: int = 0
    loss: float = 0.0
    correct: int = 0
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)

    def require_possible(self, epochs: int) -> None:
        """Raise ValueError unless a training of `epochs` epochs can have come this far."""
        counts = (self.epoch, self.step, self.images, self.correct)
        logged = [value for row in self.rows for name, value in row.items()
                  if value is not None or name not in ("val_loss", "val_acc")]
        numbers = [self.loss, self.seconds, *logged]
        if any(type(count) is not int or not 0 <= count <= MAX_COUNT for count in counts) \
                or any(type(number) not in (int, float) for number in numbers) \
                or any(abs(number) > MAX_COUNT for number in numbers if type(number) is int) \
                or not math.isfinite(self.loss) or not math.isfinite(self.seconds) \
                or self.epoch > epochs or (self.epoch == epochs and self.step) or self.step > self.images \
                or [row["epoch"] for row in self.rows] != [*range(1, self.epoch + 1)] \
                or any(row.keys() != set(METRICS) or not row["seconds"] > 0 for row in self.rows):
            raise ValueError("its progress is inconsistent")


def checkpoint_bytes(model: nn.Module, optimizers: Optimizers, progress: Progress, settings: dict[str, Any]) -> bytes:
    """The content of a checkpoint file."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        tensors |= {f"optimizer.{number}.{parameter}.{name}": torch.as_tensor(value)
                    for parameter, values in optimizer.state_dict()["state"].items()
                    for name, value in values.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    rest = json.dumps({"progress": asdict(progress), "settings": settings})
    return save(tensors, {"rest": rest, "sha256": _digest(tensors, rest)})


def read_checkpoint(path: Path) -> Checkpoint:
    """The contents of a checkpoint file. Raises ValueError if it is damaged, OSError if it is unreadable."""
    if not path.is_file():
        raise ValueError("it is not a file")
    with path.open("rb") as file:  # safetensors hides why a file cannot be opened
        header = int.from_bytes(file.read(8), "little")
    try:
        if header > MAX_HEADER_BYTES:
            raise ValueError("it was not written here")
        with safe_open(path, "pt", device="cpu") as opened:
            metadata, names = opened.metadata(), opened.keys()
            if len(names) > MAX_TENSORS:
                raise ValueError("it was not written here")
            tensors = {name: opened.get_tensor(name) for name in names}
        intact = metadata["sha256"] == _digest(tensors, metadata["rest"])
        rest = json.loads(metadata["rest"])
    except Exception as error:  # safetensors raises types that its documentation does not list
        reason = str(error) if type(error) is ValueError else f"it cannot be read: {type(error).__name__}"
        raise ValueError(reason) from error
    if not intact or not isinstance(rest, dict) or not isinstance(rest.get("settings"), dict):
        raise ValueError("its contents do not match their SHA-256")
    return tensors, rest


def restore(saved: Checkpoint, model: nn.Module, optimizers: Optimizers, run_name: str, epochs: int) -> Progress:
    """Put a checkpoint back into `model` and `optimizers`; returns its progress.

    Raises UserError if it does not fit them, or a training of `epochs` epochs.
    """
    tensors, rest = saved
    try:
        progress = Progress(**rest["progress"])
        if asdict(progress).keys() != rest["progress"].keys():
            raise ValueError("its progress is incomplete")
        progress.require_possible(epochs)
        weights = _below("model", tensors)
        states = [_below(f"optimizer.{number}", tensors) for number in range(len(optimizers))]
        if _layout(weights) != _layout(model.state_dict()) or len(weights) + sum(map(len, states)) != len(tensors):
            raise ValueError("its tensors have other names, shapes or types")
        model.load_state_dict(weights)
        for optimizer, state in zip(optimizers, states, strict=True):  # hyperparameters follow from the settings
            optimizer.load_state_dict(optimizer.state_dict() | {"state": _optimizer_state(state, optimizer)})
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the checkpoint of {run_name} does not fit the network that its config.json describes "
                        f"({error})") from error
    return progress


def _optimizer_state(tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """The `state` of an optimizer's state_dict, each tensor in the memory format of its parameter.

    Raises ValueError for tensors that this optimizer cannot have; PyTorch does not check them.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = STATE_NAMES[type(optimizer).__name__]
    if tensors and tensors.keys() != {f"{index}.{name}" for index in range(len(parameters)) for name in names}:
        raise ValueError("the state of an optimizer has other tensors")
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".")
        parameter = parameters[int(index)]
        shape = {"step": (), "row_squares": parameter.shape[:1]}.get(name, parameter.shape)
        if tensor.shape != shape or tensor.dtype != torch.float32:
            raise ValueError("the state of an optimizer has another shape or type")
        if name == "step" and not tensor >= 1:
            raise ValueError("the state of an optimizer has an impossible number of steps")
        if shape == parameter.shape:
            tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        state.setdefault(int(index), {})[name] = tensor
    return state


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items()
            if name.startswith(f"{prefix}.")}


def _layout(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def _digest(tensors: dict[str, Tensor], rest: str) -> str:
    """A SHA-256 of `rest` and of the names, types, shapes and bytes of all tensors."""
    sha256 = hashlib.sha256(rest.encode())
    for name, tensor in sorted(tensors.items()):
        sha256.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        if tensor.numel():
            sha256.update(tensor.flatten().view(torch.uint8).numpy().data)
    return sha256.hexdigest()
