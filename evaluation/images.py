"""Classify any image: read it the way the networks expect it, predict its class, find the weights to do so."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from common.errors import UserError
from common.files import RESULTS_DIR, read_json, require_file
from common.run_files import PUBLISHED
from common.text import printable
from evaluation.finished_runs import find_runs, finite_logits, runs_by_name
from utils import COARSE_NAMES, COARSE_OF_FINE, FINE_NAMES

SIDE = 32
BACKGROUND = "white"  # has 8% of the training images in all four corners; black, the next, has 1%
MAX_PIXELS = 64_000_000  # per image; decoding that many takes up to 1.2 GB
MAX_BYTES = 2**28  # per file, since some decoders read all of it first
STDERR = 2  # the file descriptor


# ---- Reading images -------------------------------------------------------------------------------------------------


def read_image(path: str | Path) -> Tensor:
    """Read the center square of an image, upright, scaled to uint8 [3, 32, 32], with transparency on white.

    It is cropped because CIFAR-100's images are filled to their edges: only 2% of the training images have the bars
    that padding would add. Of an animation, read the first frame.
    Raises UserError if the file is not an image, is damaged, or would take unreasonable memory. EPS is not supported:
    it is a program, which Pillow would hand to Ghostscript.
    """
    try:
        with warnings.catch_warnings(), _quiet_decoders():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # for an image inside a file
            small = _decode(Path(path))
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        raise UserError(f"{path} is not an image of a supported format") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UserError(f"{path} has more than {MAX_PIXELS:,} pixels: scale it down first") from None
    except Exception as error:  # Pillow raises nearly anything for a damaged file
        raise UserError(f"{path} cannot be read as an image: {str(error) or type(error).__name__}") from error
    return torch.from_numpy(np.asarray(small).transpose(2, 0, 1).copy())


@contextmanager
def _quiet_decoders() -> Iterator[None]:
    """Silence stderr at the level of C: libtiff prints a line there for each damaged row."""
    stderr = os.dup(STDERR)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), STDERR)
        yield
    finally:
        os.dup2(stderr, STDERR)
        os.close(stderr)


def _decode(path: Path) -> Image.Image:
    """`read_image`'s image as Pillow's, RGB. Raises UserError, and whatever Pillow raises."""
    require_file(path)
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path} has more than {MAX_BYTES:,} bytes: scale it down first")
    with Image.open(path) as image:
        if image.format == "EPS":
            raise Image.UnidentifiedImageError
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        image.draft(None, (8 * SIDE, 8 * SIDE))  # a large JPEG is decoded at a fraction of its size
        image.load()  # for some formats, size and mode are final only now
        return _center(image)


def _center(image: Image.Image) -> Image.Image:
    """The center square, upright and opaque, RGB of SIDE x SIDE pixels.

    Every operation before scaling touches each pixel and costs memory, so most of the work comes after it.
    """
    if image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode in ("1", "P"):  # their values cannot be averaged
        image = image.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    small = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box)  # antialiased, as in models.layers.Resize
    small = ImageOps.exif_transpose(small)
    if small.mode[0] in "IF":
        small = _to_8_bits(small)
    small = small.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", small.size, BACKGROUND), small).convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Reduce finer gray levels to 8 bits: scale 16-bit images, stretch others, whose range no file gives."""
    levels = np.nan_to_num(np.asarray(image, dtype=np.float64))
    low, high = levels.min(), levels.max()
    if image.mode != "F" and low >= 0 and high <= 65535:
        low, high = 0, 65535
    return Image.fromarray(np.uint8(np.rint(255 * (levels - low) / max(high - low, 1e-12))))


def find_images(path: Path) -> list[Path]:
    """The files to read for `path`: itself, or in a folder every file with the suffix of an image, sorted.

    Raises UserError if a folder has none.
    """
    if not path.is_dir():
        return [path]
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = sorted(file for file in path.iterdir()
                   if file.suffix.lower() in suffixes and file.name[0] != "." and file.is_file())
    if not found:
        raise UserError(f"{path} contains no images (subfolders are not searched)")
    return found


# ---- Predictions ----------------------------------------------------------------------------------------------------


class Guess(NamedTuple):
    """A class that an image may show."""

    name: str
    superclass: str
    probability: float


def classify(model: nn.Module, image: Tensor, count: int = 5) -> list[Guess]:
    """The `count` most probable classes of an image, uint8 [3, 32, 32], most probable first.

    Raises UserError if the network was not trained on CIFAR-100, or if its weights are damaged.
    """
    logits = finite_logits(model, image[None], len(FINE_NAMES), "the network")[0]
    probabilities = logits.double().softmax(0)
    return [Guess(FINE_NAMES[fine], COARSE_NAMES[COARSE_OF_FINE[fine]], float(probabilities[fine]))
            for fine in probabilities.argsort(descending=True, stable=True)[:count].tolist()]


def answers(model: nn.Module, paths: list[Path]) -> Iterator[dict[str, Any]]:
    """One object of `predict.py --json` per image: its file, and either guesses or an error."""
    for path in paths:
        try:
            files = find_images(path)
        except (UserError, OSError) as problem:
            yield {"file": str(path), "error": str(problem)}
        else:
            yield from (_answer(model, file) for file in files)


def _answer(model: nn.Module, file: Path) -> dict[str, Any]:
    try:
        guesses = classify(model, read_image(file))
    except UserError as problem:
        return {"file": str(file), "error": str(problem)}
    return {"file": str(file), "guesses": [{"class": guess.name, "superclass": guess.superclass,
                                            "probability": round(guess.probability, 6)} for guess in guesses]}


def answer_text(answer: dict[str, Any]) -> str:
    """An answer as text: the file, and one line per guess with a bar for its probability."""
    lines = [f"{guess['probability']:>7.1%} {'█' * round(20 * guess['probability']):<20} {guess['class']:<14} "
             f"{guess['superclass']}" for guess in answer["guesses"]]
    return "\n".join([printable(answer["file"]), *lines])


# ---- Weights --------------------------------------------------------------------------------------------------------


def find_weights(name: str | None, results_dir: Path = RESULTS_DIR) -> Path:
    """The weights of the run `name` (see `runs_by_name`), or the weights file of that path.

    None stands for the published recipe with the highest mean accuracy in results.json, as far as it has weights.
    Raises UserError if there are no such weights, or if the run was trained on synthetic images.
    """
    found = [run for run in find_runs(results_dir) if run.weights.exists()]
    runs = runs_by_name(found)
    if name is None:
        name = next((run for run in _published_by_accuracy(results_dir) if run in runs), None)
        if name is None:
            raise UserError(f"there are no weights in {results_dir / PUBLISHED}: name one of your runs with --model")
    if name in runs:
        if runs[name].synthetic:
            raise UserError(f"the run {name} was trained on synthetic images: it cannot predict CIFAR-100's classes")
        return runs[name].weights
    if Path(name).is_file():
        return Path(name)
    raise UserError(f"no weights file and no run with weights in {results_dir} is called {name}; there are: "
                    f"{', '.join(sorted(run.label for run in found)) or 'none'}")


def _published_by_accuracy(results_dir: Path) -> list[str]:
    """The labels of the published runs, best recipe first, according to results.json."""
    table = results_dir / "results.json"
    try:
        rows = sorted(read_json(table), key=lambda row: -row["top1"]["mean"])
        return [f"{PUBLISHED}/{row['recipe']}-s{seed}" for row in rows for seed in row["seeds"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{table} does not tell which published run is best: name one with --model, or renew that "
                        "file with python evaluate.py") from error
