"""The networks, by name, and the weights file that needs nothing beside it.

A model takes float32 [N, 3, H, W] in [0, 1] and returns logits [N, 100]; normalisation is a part of it. It knows
nothing of data sets or of training. `fit_inputs(images)` fits what depends on the inputs' distribution alone.
"""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from models.convnet import ConvNet
from models.mlp import MLP
from models.original import OriginalCNN
from models.resnet import resnet18, wide_resnet

_MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP, "original_cnn": OriginalCNN, "convnet": ConvNet, "resnet18": resnet18, "wide_resnet": wide_resnet,
}


class WeightsError(ValueError):
    """A weights file, or a model's name or arguments, that cannot be used; the message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def list_models() -> list[str]:
    return sorted(_MODELS)


def create_model(name: str, **kwargs: Any) -> nn.Module:
    """A new model with random weights. Raises WeightsError for an unknown name or unknown arguments."""
    if name not in _MODELS:
        raise WeightsError(f"there is no model {name!r}; there are: {', '.join(list_models())}")
    try:
        arguments = inspect.signature(_MODELS[name]).bind(**kwargs)
        arguments.apply_defaults()  # a weights file must not depend on what the defaults are later
        model = _MODELS[name](**arguments.arguments)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"the model {name} cannot be made with {kwargs}: {error}") from error
    model.model_name, model.model_args = name, dict(arguments.arguments)
    return model


def save_model(model: nn.Module, path: str | Path) -> None:
    """Write a model of `create_model` as float16 safetensors, its name and arguments in the file's metadata."""
    tensors = {name: (tensor.half() if tensor.is_floating_point() else tensor).cpu().contiguous()
               for name, tensor in model.state_dict().items()}
    content = save(tensors, metadata={"model": model.model_name, "model_args": json.dumps(model.model_args)})
    Path(path).write_bytes(_with_sorted_header(content))


def _with_sorted_header(content: bytes) -> bytes:
    """The same safetensors file with its header's keys in order: the library leaves the metadata's order to chance, and
    equal weights are to be equal files.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    return content[:8] + header.ljust(end - 8) + content[end:]


def load_model(path: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """The model in a file of `save_model`, in float32 and evaluation mode.

    Raises WeightsError if the file is missing, damaged, or does not hold the model that its metadata names.
    """
    try:
        with safe_open(path, "pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read as a weights file: {error}") from error
    try:
        name, arguments = metadata["model"], json.loads(metadata["model_args"])
        with torch.device("meta"):  # shapes only: nothing is allocated for what the file does not hold
            model = create_model(name, **arguments)
        model.load_state_dict({name: tensor.float() if tensor.is_floating_point() else tensor
                               for name, tensor in tensors.items()}, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{path} does not hold the weights of a model known here: {error}") from error
    return model.to(device).eval()
