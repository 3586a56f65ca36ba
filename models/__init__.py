"""The networks, by name, and the weights file that needs nothing beside it.

A model takes float32 [N, 3, H, W] in [0, 1] and returns logits [N, 100]; normalisation is a part of it. It knows
nothing of data sets or of training. `fit_inputs(images)` fits what depends on the inputs' distribution alone.
"""

import inspect
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from models.convnet import ConvNet
from models.mlp import MLP
from models.original import OriginalCNN
from models.resnet import resnet18, wide_resnet

_MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP, "original_cnn": OriginalCNN, "convnet": ConvNet, "resnet18": resnet18, "wide_resnet": wide_resnet,
}
MAX_TENSORS = 10_000  # in a file: three times what a wide ResNet of 1,000 layers has
MAX_SIDE = 64  # to which a model may scale pictures: memory grows with its square, and no weight's shape tells it
MAX_MESSAGE = 500  # characters, since a file's own words may be in it


class WeightsError(ValueError):
    """A weights file, or a model's name or arguments, that cannot be used; the message is one line."""

    def __init__(self, message: str) -> None:
        line = "".join(character if character.isprintable() else "?" for character in " ".join(message.split()))
        super().__init__(line if len(line) <= MAX_MESSAGE else f"{line[:MAX_MESSAGE]} ...")


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

    The file may be a stranger's: nothing in it is executed, nothing is built that it does not hold the weights of, and
    the model has classified a picture. Raises WeightsError if the file is missing, damaged, or does not hold the model
    that its metadata names.
    """
    tensors, metadata = _read_tensors(path)
    try:
        name, arguments = metadata["model"], json.loads(metadata["model_args"])
        with torch.device("meta"), _at_most(len(tensors)), warnings.catch_warnings():  # "meta" allocates nothing
            warnings.simplefilter("ignore")  # PyTorch's, about layers without weights
            model = create_model(name, **arguments)
        if model.model_args.get("side", 1) > MAX_SIDE:
            raise ValueError(f"it scales pictures to {model.model_args['side']} pixels a side, above {MAX_SIDE}")
        model.load_state_dict({name: tensor.float() if tensor.is_floating_point() else tensor
                               for name, tensor in tensors.items()}, assign=True)
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, 32, 32))
    except Exception as error:  # PyTorch raises nearly anything for odd arguments
        raise WeightsError(f"{path} does not hold the weights of a model known here: {error}") from error
    return model.to(device)


def _read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata. Raises WeightsError for any other file."""
    if not Path(path).is_file():
        raise WeightsError(f"{path} cannot be read as a weights file: it is "
                           f"{'no file' if Path(path).exists() else 'missing'}")
    try:
        with safe_open(path, "pt", device="cpu") as file:
            if len(file.keys()) > MAX_TENSORS:
                raise ValueError(f"it has more than {MAX_TENSORS:,} tensors")
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # of types that none of its documentation lists
        raise WeightsError(f"{path} cannot be read as a weights file: {error}") from error


@contextmanager
def _at_most(parameters: int) -> Iterator[None]:
    """Raise ValueError as soon as more parameters than so many are built in the block."""
    count = 0

    def counted(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += 1
        if count > parameters:
            raise ValueError(f"it would have more than the {parameters} tensors that are there")

    hook = register_module_parameter_registration_hook(counted)
    try:
        yield
    finally:
        hook.remove()
