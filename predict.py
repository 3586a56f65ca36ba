"""Classify your own pictures, or export a network for other programs.

    python predict.py cat.jpg holiday/          # the five likeliest classes of each, by the best published network
    python predict.py cat.jpg --model mlp-s0    # by a run of yours, a published one, or any weights file
    python predict.py holiday/ --json           # the same for programs
    python predict.py --export model.onnx       # the network as ONNX: float32 [N, 3, 32, 32] in [0, 1] -> logits

Pictures may be of any size and of nearly any format and kind; of a folder, every picture in it, without the folders
inside. The middle square is what is looked at. The exit status is 0 if all were classified and 1 if some were not,
of which each has a line on stderr.

The answer is always one of CIFAR-100's classes, whatever the picture shows.
"""

import json
import logging
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from evaluation.pictures import SIDE, answers, classify, find_weights, in_words, printable, read_picture
from models import load_model
from runs import replacing
from settings import RESULTS_DIR, Parser, exit_status
from utils import FINE_NAMES, UserError, to_float

__all__ = ["classify", "find_weights", "read_picture"]  # for programs of one's own, as the README shows
EXPORT_TOLERANCE = 1e-3  # of a logit: between float32 kernels that add in different orders


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="predict.py", description=__doc__)
    parser.add_argument("pictures", nargs="*", type=Path, metavar="PICTURE", help="a picture, or a folder of them")
    parser.add_argument("--model", metavar="RUN", help="a run's name, published/NAME, or a weights file (default: the "
                        "published one that is best on the test set)")
    parser.add_argument("--json", action="store_true", help="print one JSON array, an object a file, errors included")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write the network as ONNX, and nothing else")
    parser.add_argument("--results-dir", type=Path, default=RESULTS_DIR, metavar="FOLDER", help="folder of all runs")
    options = parser.parse_args(argv)
    if bool(options.pictures) == bool(options.export):
        raise UserError("name pictures to classify, or a file with --export, but not both (see --help)")
    if options.export and options.json:
        raise UserError("--export and --json are two different things: do one of them")
    weights = find_weights(options.model, options.results_dir)
    model = load_model(weights)
    if model.model_args["num_classes"] != len(FINE_NAMES):
        raise UserError(f"{weights} does not tell CIFAR-100's {len(FINE_NAMES)} classes apart")
    if options.export:
        comparison = export(model, options.export)
        print(f"{options.export} is the network of {os.path.relpath(weights)}; {comparison}")
        return 0
    return report(model, options.pictures, as_json=options.json, network=os.path.relpath(weights))


def report(model: nn.Module, paths: list[Path], *, as_json: bool, network: str) -> int:
    """Print what each picture shows, and errors to stderr; returns the exit status."""
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # it would add lines to the errors
    if not as_json:
        print(f"the network of {network}")
    told = []
    for answer in answers(model, paths):
        told.append(answer)
        if "error" in answer:
            print(f"error: {printable(answer['error'])}", file=sys.stderr)
        elif not as_json:
            print(in_words(answer))
    if as_json:
        print(json.dumps(told, indent=2))
    return int(any("error" in answer for answer in told))


def export(model: nn.Module, path: Path) -> str:
    """Write the model as ONNX, a new file, and say how its logits compare with PyTorch's, where onnxruntime is there.

    The file's input `images`, float32 [N, 3, 32, 32] in [0, 1], and its output `logits`, float32 [N, 100], have any
    N; its metadata names the `classes`, in order. Raises UserError if the file exists, if a package is missing, or if
    the logits differ.
    """
    if path.exists():
        raise UserError(f"{path} exists: choose another name, or delete it first")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent} to write to")
    try:
        import onnxscript  # noqa: F401 (PyTorch's exporter needs it, and it brings onnx)
    except ImportError:
        raise UserError("--export needs the packages onnx and onnxscript: "
                        "pip install -r requirements-extra.txt") from None
    images = to_float(torch.randint(256, (7, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0)))
    with replacing(path) as partial, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about its own insides
        program = torch.onnx.export(model, (images[:2],), dynamo=True, verbose=False, input_names=["images"],
                                    output_names=["logits"], dynamic_shapes=({0: "N"},))
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # where in this machine's folders it came from
        program.model.metadata_props["classes"] = " ".join(FINE_NAMES)
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
            raise UserError(f"the exported network's logits differ from PyTorch's by {difference:.2g}: not written")
    return f"on {len(images)} pictures of noise onnxruntime's logits differ from PyTorch's by at most {difference:.1g}"


if __name__ == "__main__":
    sys.exit(exit_status(main))
