"""The networks, by name, and their weights file, from which alone a network can be loaded.

A network takes images, float32 [N, 3, H, W] in [0, 1], and returns logits, [N, num_classes]. It normalizes the images
itself; `fit_inputs(images)` fits that to training images. Nothing here knows a dataset or how to train.

To add a network, write it in a file of its own and give it a line in `_PLACES` (docs/own-network.md). Its last layer is
called `head`. Its arguments need defaults and must be JSON values, since the weights file holds them; `num_classes` is
one of them. Imports between the networks are relative: hubconf.py imports this package under another name, since many
programs have their own `models`.
"""

import inspect
import json
import pkgutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

_PLACES = {  # by name, its module and the class or function in that
    "mlp": "mlp:MLP",
    "mirrornet": "mirrornet:MirrorNet",
    "original_cnn": "original:OriginalCNN",
    "resnet18": "resnet:resnet18",
}
_MODELS: dict[str, Callable[..., nn.Module]] = {
    name: pkgutil.resolve_name(f"{__name__}.{place}") for name, place in _PLACES.items()
}
MAX_HEADER_BYTES = 2**24  # of a safetensors file: the library unpacks a header to 20 times its size
MAX_TENSORS = 10_000  # in a file; a ResNet of 1,000 layers has 6,000
MAX_SIDE = 64  # of the images in a network: memory grows with its square, and no weight's shape depends on it
MAX_TEMPERATURE = 1000.0  # of a calibration, and the inverse of its minimum; beyond, probabilities lose their meaning
MAX_MESSAGE = 500  # characters, since a message may quote the file


class WeightsError(ValueError):
    """An unusable weights file, or unusable name or arguments of a network; the message is one line."""

    def __init__(self, message: str) -> None:
        line = "".join(character if character.isprintable() else "?" for character in " ".join(message.split()))
        super().__init__(line if len(line) <= MAX_MESSAGE else f"{line[:MAX_MESSAGE]} ...")


def list_models() -> list[str]:
    return sorted(_MODELS)


def default_arguments(name: str) -> dict[str, Any]:
    """The arguments that the model `name` takes, with their defaults."""
    return {argument.name: argument.default for argument in inspect.signature(_MODELS[name]).parameters.values()}


def models_with(argument: str) -> tuple[str, ...]:
    """Names of the models that take this argument."""
    return tuple(name for name in list_models() if argument in default_arguments(name))


def create_model(name: str, **kwargs: Any) -> nn.Module:
    """A new model with random weights: not calibrated (`temperature` 1), and without names of its `classes`.

    Raises WeightsError for an unknown name or unknown arguments.
    """
    if name not in _MODELS:
        raise WeightsError(f"unknown model {name!r}; choose one of: {', '.join(list_models())}")
    try:
        arguments = inspect.signature(_MODELS[name]).bind(**kwargs)
        arguments.apply_defaults()  # a weights file must not depend on future defaults
        model: Any = _MODELS[name](**arguments.arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(f"the model {name} cannot be created with {kwargs}: {error}") from error
    model.model_name, model.model_args = name, dict(arguments.arguments)
    model.temperature, model.classes = 1.0, ()
    return model


def save_model(model: nn.Module, path: str | Path) -> None:
    """Write a model of `create_model` as float16 safetensors, with its name and arguments as metadata."""
    tensors = {name: (tensor.half() if tensor.is_floating_point() else tensor).cpu().contiguous()
               for name, tensor in model.state_dict().items()}
    metadata = {"model": str(model.model_name), "model_args": json.dumps(model.model_args)}
    Path(path).write_bytes(_with_metadata(save(tensors, metadata), {}))


def labeled(path: str | Path, *, temperature: float | None = None, classes: Sequence[str] = ()) -> bytes:
    """The content of the weights file `path` with this temperature and these class names in place of its own, if any.

    By default, it has neither, as after training: the same bytes as `save_model` wrote. Raises WeightsError if the
    file is missing or has no readable header.
    """
    labels = {"temperature": None if temperature is None else str(temperature), "classes": " ".join(classes) or None}
    try:
        return _with_metadata(Path(path).read_bytes(), labels)
    except (AttributeError, OSError, RecursionError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as a weights file: {error}") from error


def _with_metadata(content: bytes, changes: dict[str, str | None]) -> bytes:
    """A safetensors file with these entries in its metadata, None for no entry, and sorted keys in its header.

    The library writes the metadata in random order, but equal weights must give equal files.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    if end - 8 > MAX_HEADER_BYTES:
        raise ValueError(f"its header has more than {MAX_HEADER_BYTES:,} bytes")
    header = json.loads(content[8:end])
    metadata = {**header.get("__metadata__", {}), **changes}
    header["__metadata__"] = {key: value for key, value in metadata.items() if value is not None}
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # as the library aligns the tensors
    return len(text).to_bytes(8, "little") + text + content[end:]


def load_model(path: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """Load the model in a file of `save_model`, in float32 and evaluation mode.

    The file may be untrusted: nothing in it is executed, no layer is built whose weights it lacks, and the model has
    classified one image before it is returned. Its `classes` are the names of the classes, () if the file has none,
    and `(logits / model.temperature).softmax(1)` are its calibrated probabilities; 1 means that it is not calibrated.
    Raises WeightsError if the file is missing, damaged, or does not hold the model that its metadata names.
    """
    tensors, metadata = _read_tensors(path)
    try:
        name, arguments = metadata["model"], json.loads(metadata["model_args"])
        with torch.device("meta"), _at_most(len(tensors)), warnings.catch_warnings():  # "meta" allocates nothing
            warnings.simplefilter("ignore")  # PyTorch warns about layers without weights
            model: Any = create_model(name, **arguments)
        if model.model_args.get("side", 1) > MAX_SIDE:
            raise ValueError(f"its side is {model.model_args['side']}, above {MAX_SIDE} pixels")
        model.load_state_dict({name: tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
                               for name, tensor in tensors.items()}, assign=True)  # else the file may change them later
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, 32, 32))
        model.temperature, model.classes = _read_labels(metadata, model.model_args["num_classes"])
    except Exception as error:  # PyTorch raises nearly anything for odd arguments
        raise WeightsError(f"{path} does not hold the weights of a known model: {error}") from error
    return model.to(device)


def _read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata. Raises WeightsError for any other file."""
    if not Path(path).is_file():
        problem = "not a file" if Path(path).exists() else "missing"
        raise WeightsError(f"{path} cannot be read as a weights file: it is {problem}")
    try:
        with open(path, "rb") as file:
            if int.from_bytes(file.read(8), "little") > MAX_HEADER_BYTES:
                raise ValueError(f"its header has more than {MAX_HEADER_BYTES:,} bytes")
        with safe_open(path, "pt", device="cpu") as opened:
            names = opened.keys()
            if len(names) > MAX_TENSORS:
                raise ValueError(f"it has more than {MAX_TENSORS:,} tensors")
            return {name: opened.get_tensor(name) for name in names}, opened.metadata() or {}
    except Exception as error:  # safetensors raises types that its documentation does not list
        raise WeightsError(f"{path} cannot be read as a weights file: {error}") from error


def _read_labels(metadata: dict[str, str], num_classes: int) -> tuple[float, tuple[str, ...]]:
    """The temperature and the class names in a file's metadata; 1 and () if it has none. Raises ValueError."""
    temperature, classes = float(metadata.get("temperature", "1")), tuple(metadata.get("classes", "").split())
    if not 1 / MAX_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise ValueError(f"its temperature {temperature} is not between {1 / MAX_TEMPERATURE} and {MAX_TEMPERATURE}")
    if classes and (not len(classes) == len(set(classes)) == num_classes or not "".join(classes).isprintable()):
        raise ValueError(f"it does not name {num_classes} different classes")
    return temperature, classes


@contextmanager
def _at_most(parameters: int) -> Iterator[None]:
    """Raise ValueError as soon as the block builds more than `parameters` parameters."""
    count = 0

    def check(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += 1
        if count > parameters:
            raise ValueError(f"it needs more than the {parameters} tensors in the file")

    hook = register_module_parameter_registration_hook(check)
    try:
        yield
    finally:
        hook.remove()
