"""Anybody's pictures: reading them as the networks take them, and what a network says of them."""

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

from evaluation.runs import find_runs, finite_logits, runs_by_name
from runs import PUBLISHED, read_json
from settings import RESULTS_DIR
from utils import COARSE_NAMES, COARSE_OF_FINE, FINE_NAMES, UserError

SIDE = 32
BACKGROUND = "white"  # has 8% of the training pictures in all four corners; black, the next, has 1%
MAX_PIXELS = 64_000_000  # of a picture; decoding so many takes up to 1.2 GB
MAX_BYTES = 2**28  # of a file, since some decoders begin by reading all of it
STDERR = 2  # the file descriptor


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def read_picture(path: str | Path) -> Tensor:
    """The middle square of a picture, upright, on white where it is transparent, scaled down: uint8 [3, 32, 32].

    Cut, because CIFAR-100's pictures are filled to their edges: bars beside the picture, which would keep all of it,
    are in 2% of the training pictures only. Of an animation it is the first frame.
    Raises UserError for whatever is no picture, is damaged, or would take unreasonable memory. EPS is not read: it is a
    program, which Pillow hands to Ghostscript.
    """
    try:
        with warnings.catch_warnings(), _quiet_decoders():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # of a picture within a file
            small = _decode(Path(path))
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        raise UserError(f"{path} is no picture, or of a format that is not read") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UserError(f"{path} has more than {MAX_PIXELS:,} pixels: scale it down first") from None
    except Exception as error:  # Pillow raises nearly anything for a damaged file
        raise UserError(f"{path} cannot be read as a picture: {str(error) or type(error).__name__}") from error
    return torch.from_numpy(np.asarray(small).transpose(2, 0, 1).copy())


@contextmanager
def _quiet_decoders() -> Iterator[None]:
    """Nothing on stderr from C: libtiff writes there itself, a line for each damaged row."""
    stderr = os.dup(STDERR)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), STDERR)
        yield
    finally:
        os.dup2(stderr, STDERR)
        os.close(stderr)


def _decode(path: Path) -> Image.Image:
    """`read_picture`'s picture as Pillow's, RGB. Raises what Pillow raises, and UserError."""
    if not path.is_file():
        raise UserError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path} has more than {MAX_BYTES:,} bytes: scale it down first")
    with Image.open(path) as image:
        if image.format == "EPS":
            raise Image.UnidentifiedImageError
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        image.draft(None, (8 * SIDE, 8 * SIDE))  # a large JPEG is decoded at a fraction of its size
        image.load()  # of some formats size and mode are final only now
        return _middle(image)


def _middle(image: Image.Image) -> Image.Image:
    """The middle square, upright and opaque, RGB of SIDE x SIDE pixels.

    What comes before scaling is done to every pixel and costs memory, so as little as possible comes before it.
    """
    if image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode in ("1", "P"):  # of which no averages can be taken
        image = image.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    small = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box)  # antialiased, as in models.layers.Resize
    small = ImageOps.exif_transpose(small)
    if small.mode[0] in "IF":
        small = _eight_bits(small)
    small = small.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", small.size, BACKGROUND), small).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Finer levels of grey as 8 bits: 16 bits are scaled; others, of which no file tells the range, are stretched."""
    levels = np.nan_to_num(np.asarray(image, dtype=np.float64))
    low, high = levels.min(), levels.max()
    if image.mode != "F" and low >= 0 and high <= 65535:
        low, high = 0, 65535
    return Image.fromarray(np.uint8(np.rint(255 * (levels - low) / max(high - low, 1e-12))))


def find_pictures(path: Path) -> list[Path]:
    """A file itself; of a folder the files in it that are named like pictures, in order.

    Raises UserError if there are none.
    """
    if not path.is_dir():
        return [path]
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes and file.name[0] != "."
                   and file.is_file())
    if not found:
        raise UserError(f"{path} has no pictures in it (the folders in it are not searched)")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What a network says of them
# ---------------------------------------------------------------------------------------------------------------------


class Guess(NamedTuple):
    """One of the classes that a picture may show."""

    name: str
    superclass: str
    probability: float


def classify(model: nn.Module, picture: Tensor, count: int = 5) -> list[Guess]:
    """The `count` likeliest classes of a picture, uint8 [3, 32, 32], the likeliest first.

    Raises UserError if the network was not trained for CIFAR-100, or if its weights are damaged.
    """
    probabilities = finite_logits(model, picture[None], len(FINE_NAMES), "the network")[0].double().softmax(0)
    return [Guess(FINE_NAMES[fine], COARSE_NAMES[COARSE_OF_FINE[fine]], float(probabilities[fine]))
            for fine in probabilities.argsort(descending=True, stable=True)[:count].tolist()]


def answers(model: nn.Module, paths: list[Path]) -> Iterator[dict[str, Any]]:
    """What `predict.py --json` says of each picture: its file, and either what it may show or why that is not known."""
    for path in paths:
        try:
            files = find_pictures(path)
        except (UserError, OSError) as problem:
            yield {"file": str(path), "error": str(problem)}
        else:
            yield from (_answer(model, file) for file in files)


def _answer(model: nn.Module, file: Path) -> dict[str, Any]:
    try:
        guesses = classify(model, read_picture(file))
    except UserError as problem:
        return {"file": str(file), "error": str(problem)}
    return {"file": str(file), "guesses": [{"class": guess.name, "superclass": guess.superclass,
                                            "probability": round(guess.probability, 6)} for guess in guesses]}


def in_words(answer: dict[str, Any]) -> str:
    """An answer for people: the file, and a line for each guess with a bar as long as it is likely."""
    lines = [f"{guess['probability']:>7.1%} {'█' * round(20 * guess['probability']):<20} {guess['class']:<14} "
             f"{guess['superclass']}" for guess in answer["guesses"]]
    return "\n".join([printable(answer["file"]), *lines])


def printable(text: str) -> str:
    """`text` on one line: a file's name may hold line breaks, commands to the terminal and bytes that are no text."""
    return "".join(character if character.isprintable() else "?" for character in text)


# ---------------------------------------------------------------------------------------------------------------------
# Whose weights
# ---------------------------------------------------------------------------------------------------------------------


def find_weights(name: str | None, results_dir: Path = RESULTS_DIR) -> Path:
    """The weights of a run, or the weights file of that path; of None, the best published ones.

    A run is called as in `runs_by_name`. The best are those of the recipe that results.json gives the highest mean
    accuracy. Raises UserError if there are no such weights, or if they are of a run on synthetic pictures.
    """
    found = [run for run in find_runs(results_dir) if run.weights.exists()]
    runs = runs_by_name(found)
    if name is None:
        table = results_dir / "results.json"
        try:
            rows = sorted(read_json(table), key=lambda row: -row["top1"]["mean"])
            by_accuracy = [f"{PUBLISHED}/{row['recipe']}-s{seed}" for row in rows for seed in row["seeds"]]
        except (KeyError, TypeError) as error:
            raise UserError(f"{table} does not say which published run is the best: name one with --model, or make "
                            "that file again with python evaluate.py") from error
        name = next((run for run in by_accuracy if run in runs), None)
        if name is None:
            raise UserError(f"there are no weights in {results_dir / PUBLISHED}: name a run of yours with --model")
    if name in runs:
        if runs[name].synthetic:
            raise UserError(f"the run {name} was trained on synthetic pictures: it knows none of CIFAR-100's classes")
        return runs[name].weights
    if Path(name).is_file():
        return Path(name)
    raise UserError(f"no weights file and no run with weights in {results_dir} is called {name}; there are: "
                    f"{', '.join(sorted(run.label for run in found)) or 'none'}")
