"""The published networks for `torch.hub`: one entry point per recipe whose weights are in results/published/.

    model = torch.hub.load("OWNER/REPO", "fast")    # or the folder of a clone, with source="local"
    torch.hub.list("OWNER/REPO")                    # the recipes
    print(torch.hub.help("OWNER/REPO", "fast"))     # its test accuracy, and how to use it

A program that does this may have packages `models`, `utils` or `data` of its own. Nothing here is therefore imported by
such a name: our package `models` becomes `cifar100_models`, and the two packages below are all that it needs.
"""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

dependencies = ["torch", "safetensors"]

ROOT = Path(__file__).resolve().parent
PACKAGE = "cifar100_models"  # the name of models/ in the program that loads a network
ENTRY_POINT = """{recipe}: {accuracy:.2f}% on the test set of CIFAR-100, {parameters:.2f} million parameters.

    Takes images, float32 [N, 3, 32, 32] in [0, 1], which it normalizes itself, and returns logits, [N, 100].
    `model.classes` are the names of the 100 classes, and `(logits / model.temperature).softmax(1)` the probabilities;
    a temperature of 1 means that they are not calibrated. The model is on the CPU and in evaluation mode.

    Args:
        pretrained (bool): if False, the weights are random, and the model is in training mode; before you train it,
            call `model.fit_inputs(images)` with training images.

    Trained with: {command}
    """


def __dir__() -> list[str]:
    """The names that torch.hub may use."""
    return ["dependencies", *_published()]


def __getattr__(name: str) -> Callable[..., Any]:
    """The entry point of a published recipe."""
    if name.startswith("__") or name not in _published():
        raise AttributeError(f"no recipe {name!r} is published in {ROOT}")
    row, seed, weights = _published()[name]

    def load(pretrained: bool = True) -> Any:
        models = _import_models()
        model = models.load_model(weights)
        return model if pretrained else models.create_model(model.model_name, **model.model_args)

    load.__name__ = load.__qualname__ = name
    load.__doc__ = ENTRY_POINT.format(recipe=name, accuracy=row["top1"]["each"][row["seeds"].index(seed)],
                                      parameters=row["parameters"] / 1e6, command=row["command"])
    return load


def _published() -> dict[str, tuple[dict[str, Any], int, Path]]:
    """The row in results.json, the seed and the weights of each recipe that has published weights, best first."""
    results = ROOT / "results"
    rows = json.loads((results / "results.json").read_text(encoding="utf-8"))
    found = [(row, seed, results / "published" / f"{row['recipe']}-s{seed}" / "model.safetensors")
             for row in reversed(rows) for seed in row["seeds"]]
    return {row["recipe"]: (row, seed, weights) for row, seed, weights in found if weights.is_file()}


def _import_models() -> Any:
    """The package in models/ of this copy, imported as PACKAGE."""
    source = ROOT / "models" / "__init__.py"
    package = sys.modules.get(PACKAGE)
    if package is None or package.__file__ != str(source):
        for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
            del sys.modules[name]  # those of another copy
        spec = importlib.util.spec_from_file_location(PACKAGE, source)
        assert spec is not None and spec.loader is not None  # since it is a Python file
        package = sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
    return package
