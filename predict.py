"""Classify your own images, or export a network for other programs.

    python predict.py cat.jpg holiday/          # the five most probable classes of each, by the best published network
    python predict.py cat.jpg --model mlp-s0    # use a run (its name or folder), or any weights file
    python predict.py holiday/ --json           # the same, for programs, with the official names of the classes
    python predict.py cat.jpg --squeeze --show  # squeeze the whole image to a square, and write what the network saw
    python predict.py --export model.onnx       # write the network as ONNX: float32 [N, 3, 32, 32] in [0, 1] -> logits

Images may have any size and nearly any format. For a folder, all images in it are classified, without those in
subfolders; one line on stderr counts the files that are left out. Only the center square of an image is used, unless
you --squeeze it. --show writes those 32x32 pixels to the current folder, as cat-32x32.png or cat-squeezed-32x32.png;
it overwrites no other file. The exit status is 0 if all images were classified, and 1 if some could not be; each of
those has a line on stderr.

The answer is always one of CIFAR-100's classes, whatever the image shows. It is "not sure" if the first guess is below
50%. Where the probabilities are calibrated, such a guess is wrong more often than right, on images like CIFAR-100's;
photographs of anything else are harder. Where they are not, the first line says so.
"""

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common.command_line import Parser, exit_status, expanded_path
from common.devices import float32_device
from common.errors import UserError, say_on_stderr, warn
from common.files import replacing
from common.text import printable, short_path
from evaluation.finished_runs import require_classes
from evaluation.images import (
    SIDE,
    answer,
    answer_text,
    classify,
    find_images,
    find_weights,
    model_text,
    read_image,
    temperature_of,
)
from models import load_model
from utils import FINE_NAMES, to_float

__all__ = ["classify", "find_weights", "read_image"]  # for your own programs, as the README shows
STDERR = 2  # the file descriptor
EXPORT_TOLERANCE = 1e-3  # of a logit: float32 kernels add in different orders


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="predict.py", description=__doc__)
    one_of = parser.add_mutually_exclusive_group(required=True)
    one_of.add_argument("images", nargs="*", type=expanded_path, metavar="IMAGE", default=[],
                        help="an image, or a folder")
    one_of.add_argument("--export", type=expanded_path, metavar="FILE",
                        help="write the network as ONNX, and do nothing else")
    parser.add_argument("--model", metavar="RUN", help="a run's name or folder, published/NAME, or a weights file "
                        "(default: the published run that is best on the test set)")
    parser.add_device("where to run the network (default: auto)")
    parser.add_argument("--squeeze", action="store_true",
                        help="use the whole image, squeezed to a square, instead of its center square")
    parser.add_argument("--show", action="store_true",
                        help="write the 32x32 pixels that the network saw as a PNG file in the current folder")
    parser.add_argument("--json", action="store_true", help="print a JSON array with one object per file, errors too")
    parser.add_results_dir()
    options = parser.parse_args(argv)
    given = {"--json": options.json, "--device": options.device != "auto", "--show": options.show,
             "--squeeze": options.squeeze}
    if options.export and any(given.values()):
        raise UserError(f"{next(flag for flag in given if given[flag])} has no effect with --export")

    weights = find_weights(options.model, options.results_dir)
    model = load_model(weights, "cpu" if options.export else float32_device(options.device))
    require_classes(model, len(FINE_NAMES), str(weights))
    if options.export:
        comparison = export(model, options.export)
        print(f"exported {short_path(weights)} to {options.export}; {comparison}")
        return 0
    return report(model, options.images, as_json=options.json, name=short_path(weights), squeeze=options.squeeze,
                  show=options.show)


def report(model: nn.Module, paths: list[Path], *, as_json: bool, name: str, squeeze: bool = False,
           show: bool = False) -> int:
    """Print the predictions for each image, and errors to stderr; returns the exit status."""
    if not as_json:
        print(model_text(model, name))
    given = []
    for found in answers(model, paths, squeeze=squeeze, show=show):
        given.append(found)
        if "error" in found:
            say_on_stderr(f"error: {printable(found['error'])}")
        elif not as_json:
            print(answer_text(found))
    if as_json:
        print(json.dumps(given, indent=2))
    return int(any("error" in found for found in given))


def answers(model: nn.Module, paths: list[Path], *, squeeze: bool, show: bool) -> Iterator[dict[str, Any]]:
    """One object of `--json` per image; warns of the files in a folder that are left out."""
    for path in paths:
        try:
            files, left_out = find_images(path)
        except (UserError, OSError) as problem:
            yield {"file": str(path), "error": str(problem)}
            continue
        if left_out:
            warn(printable(left_out))
        for file in files:
            with quiet_decoders():
                found = answer(model, file, squeeze=squeeze, show=show)
            yield found


@contextmanager
def quiet_decoders() -> Iterator[None]:
    """Silence what decoders say about a damaged image: libtiff prints to stderr in C, and Pillow logs and warns.

    It acts on the whole process, so only this command uses it.
    """
    logger = logging.getLogger("PIL")
    level = logger.level
    try:
        stderr = os.dup(STDERR)
    except OSError:  # closed by the shell, as with 2>&-
        stderr = None
    try:
        logger.setLevel(logging.CRITICAL)
        if stderr is not None:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), STDERR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if stderr is not None:
            os.dup2(stderr, STDERR)
            os.close(stderr)


def export(model: nn.Module, path: Path) -> str:
    """Write the model to a new ONNX file, and return a comparison of its logits with PyTorch's.

    The file's input `images`, float32 [N, 3, 32, 32] in [0, 1], and its output `logits`, float32 [N, 100], accept any
    N; its metadata lists the `classes` in order, and has the `temperature` that calibrates the logits if they are
    divided by it. Raises UserError if the file exists, if a package is missing, or if the logits differ; without
    onnxruntime they are not compared.
    """
    if path.exists():
        raise UserError(f"{path} exists: choose another name, or delete it first")
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: the folder {path.parent} does not exist")
    try:
        import onnxscript  # noqa: F401 (PyTorch's exporter needs it, and it brings onnx)
    except ImportError:
        raise UserError("--export needs the packages onnx and onnxscript: "
                        "pip install -r requirements-extra.txt") from None
    noise = torch.randint(256, (7, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = to_float(noise)
    with replacing(path) as partial, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
        program = torch.onnx.export(model, (images[:2],), dynamo=True, verbose=False, input_names=["images"],
                                    output_names=["logits"], dynamic_shapes=({0: "N"},))
        assert program is not None  # dynamo=True returns a program
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # they name folders of this machine
        program.model.metadata_props["classes"] = " ".join(FINE_NAMES)
        program.model.metadata_props["temperature"] = str(temperature_of(model))
        program.save(partial, external_data=False)
        try:
            import onnxruntime
        except ImportError:
            return "not compared with PyTorch, since onnxruntime is not installed"
        session = onnxruntime.InferenceSession(partial, providers=["CPUExecutionProvider"])
        (exported,) = session.run(["logits"], {"images": images.numpy()})
        with torch.inference_mode():
            difference = float(np.abs(exported - model(images).numpy()).max())
        if not difference <= EXPORT_TOLERANCE:
            raise UserError(f"nothing exported: the logits in onnxruntime differ from PyTorch's by {difference:.2g}")
    return f"on {len(images)} noise images, onnxruntime's logits differ from PyTorch's by at most {difference:.1g}"


if __name__ == "__main__":
    sys.exit(exit_status(main))
