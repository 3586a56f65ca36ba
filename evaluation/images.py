"""Classify any image: read it the way the networks expect it, predict its class, find the weights to do so."""

import io
import os
import struct
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import torch
from PIL import Image, ImageCms, ImageFile, ImageOps
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from common.errors import UserError, warn
from common.files import RESULTS_DIR, read_json, replacing, require_file
from common.run_files import PUBLISHED, places, run_settings
from common.text import printable, spaced
from evaluation.finished_runs import FinishedRun, find_runs, finite_logits, named_run, runs_by_name
from utils import COARSE_NAMES, COARSE_OF_FINE, FINE_NAMES

SIDE = 32
SURE = 0.5  # below this probability, a calibrated network is wrong more often than right
BACKGROUND = "white"  # has 8% of the training images in all four corners; black, the next, has 1%
MAX_PIXELS = 64_000_000  # per image; decoding that many takes up to 1.4 GB
MAX_BYTES = 2**28  # per file, since some decoders read all of it first
NOT_IMAGES = ("EPS", "MPEG")  # known to Pillow: programs, which it would hand to Ghostscript, and films
CONVERT_FIRST = "convert it to JPEG or PNG first"
MAX_FORMATS = 10  # that one warning names
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of a TIFF
WHITE_IS_ZERO, UNSIGNED = 0, 1  # values of the last two


# ---- Reading images -------------------------------------------------------------------------------------------------


def read_image(path: str | Path, *, squeeze: bool = False) -> Tensor:
    """Read the center square of an image, upright, scaled to uint8 [3, 32, 32], with transparency on white.

    It is cropped because CIFAR-100's images are filled to their edges: only 2% of the training images have the bars
    that padding would add. With `squeeze`, the whole image is squeezed to a square instead. Of an animation, read the
    first frame.
    Raises UserError if the file is not an image, is damaged, would take unreasonable memory, or has pixels that
    Pillow cannot decode to the colors one sees. EPS is not supported: it is a program.
    Threads may call this at once: it changes nothing outside itself. So libtiff may print to stderr about damage.
    """
    try:
        small = _decode(Path(path), squeeze)
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        raise UserError(f"{path} is not an image of a supported format: {CONVERT_FIRST}") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path} has more than {MAX_PIXELS:,} pixels: scale it down first") from None
    except Exception as error:  # Pillow raises nearly anything for a damaged file
        raise UserError(f"{path} cannot be read as an image: {str(error) or type(error).__name__}") from error
    return torch.from_numpy(np.asarray(small).transpose(2, 0, 1).copy())


def _decode(path: Path, squeeze: bool) -> Image.Image:
    """`read_image`'s image as Pillow's, RGB. Raises UserError, and whatever Pillow raises."""
    require_file(path)
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path} has more than {MAX_BYTES:,} bytes: scale it down first")
    with open(path, "rb") as file, _open(file) as image:
        if not _is_readable(image.format or ""):
            raise Image.UnidentifiedImageError
        _require_few_pixels(image)
        _scale_transparent_level(image)
        image.draft(None, (8 * SIDE, 8 * SIDE))  # a large JPEG is decoded at a fraction of its size
        image.load()
        _require_few_pixels(image)  # for some formats, size and mode are final only now
        return _shrink(image, squeeze)


def _open(file: BinaryIO) -> ImageFile.ImageFile:
    """Image.open without its warning about large images, which belongs to the process: we refuse them ourselves."""
    Image.init()
    start = file.read(16)
    for kind in Image.ID:
        factory, accept = Image.OPEN[kind]
        accepted = not accept or accept(start)
        if accepted and not isinstance(accepted, str):  # text says what Pillow lacks to read this format
            with suppress(SyntaxError, IndexError, TypeError, struct.error):  # another format, or a damaged file
                file.seek(0)
                return factory(file, file.name)
    raise Image.UnidentifiedImageError


def _is_readable(kind: str) -> bool:
    """Whether Pillow decodes this format to pixels; some it only recognizes."""
    opener = Image.OPEN[kind][0] if kind in Image.OPEN else None
    is_stub = isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile)
    return kind not in NOT_IMAGES and not is_stub


def _require_few_pixels(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError


def _scale_transparent_level(image: ImageFile.ImageFile) -> None:
    """Scale the transparent gray level of a PNG of 2 or 4 bits as Pillow scales the pixels.

    Raises ValueError for a transparent color of 16 bits per channel, since Pillow keeps only 8 of the pixels' bits.
    """
    depth = image.tile[0][3] if image.format == "PNG" and image.tile else ""
    if "transparency" in image.info and depth in ("L;2", "L;4"):
        image.info["transparency"] *= 255 // (2 ** int(depth[-1]) - 1)
    if "transparency" in image.info and depth == "RGB;16B":
        raise ValueError(f"16 bits per channel with a transparent color are not supported: {CONVERT_FIRST}")


def _shrink(image: Image.Image, squeeze: bool) -> Image.Image:
    """The center square, or with `squeeze` everything, upright and opaque, RGB of SIDE x SIDE pixels.

    Every operation before scaling touches each pixel and costs memory, so most of the work comes after it.
    """
    width, height = image.size if squeeze else 2 * (min(image.size),)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    box = (left, top, left + width, top + height)
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if image.mode[0] in "IF":  # gray, with more than 8 bits
        image = _deep_gray(image.crop(box), tags)
        box = (0, 0, width, height)
    elif image.mode in ("La", "RGBa"):  # colors multiplied by their opacity
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode in ("1", "P", "HSV", "RGBX"):  # values that cannot be averaged, or a channel without meaning
        image = image.convert("RGB")
    small = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box)  # antialiased, as in models.layers.Resize
    ImageOps.exif_transpose(small, in_place=True)
    if small.mode[0] in "IF":
        small = _to_8_bits(small, tags)
    elif small.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        small = ImageCms.applyTransform(small, ImageCms.buildTransform(lab, srgb, "LAB", "RGB")) or small
    small = small.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", small.size, BACKGROUND), small).convert("RGB")


def _deep_gray(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """A gray image of more than 8 bits that can be averaged: without NaN, and a transparent level as opacity.

    Raises ValueError if Pillow has decoded its levels to others.
    """
    levels = np.asarray(image)
    if image.mode == "F" and not (finite := np.isfinite(levels)).all():
        low, high = levels.min(where=finite, initial=np.inf), levels.max(where=finite, initial=-np.inf)
        if low > high:
            raise ValueError("it has no finite levels")
        return _like(image, Image.fromarray(np.nan_to_num(levels, nan=low, posinf=high, neginf=low)))
    if image.mode == "I" and tags.get(SAMPLE_FORMAT) == (UNSIGNED,) and int(levels.min()) < 0:
        raise ValueError(f"gray levels of 32 bits are not supported: {CONVERT_FIRST}")
    if "transparency" in image.info:  # Pillow's own conversion cuts levels off at 255
        alpha = np.uint8(255) * (levels != image.info["transparency"])
        return _like(image, Image.merge("LA", [_to_8_bits(image, tags), Image.fromarray(alpha)]))
    return image


def _like(image: Image.Image, made: Image.Image) -> Image.Image:
    """`made` with the metadata of `image`, such as its orientation, but no transparent level."""
    made.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return made


def _to_8_bits(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Reduce finer gray levels to 8 bits: scale those of 12 or 16 bits, stretch others, whose range no file gives."""
    levels = np.asarray(image, dtype=np.float32)
    black, white = float(levels.min()), float(levels.max())
    if image.mode != "F" and black >= 0 and white <= 65535:
        black, white = 0, 4095 if tags.get(BITS_PER_SAMPLE) == (12,) else 65535
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow inverts only 8 bits
        black, white = white, black
    scale = 255 / (white - black) if white != black else 0.0
    return Image.fromarray(np.uint8(np.rint((levels - black) * scale)))


def find_images(path: Path) -> tuple[list[Path], str]:
    """The files to read for `path`, sorted, and a text about the files of a folder that are left out.

    A file stands for itself. In a folder, read every file whose suffix is that of an image, except hidden ones.
    Raises UserError if a folder has none.
    """
    if not path.is_dir():
        return [path], ""
    readable = {suffix for suffix, kind in Image.registered_extensions().items()
                if kind in Image.OPEN and _is_readable(kind)} | {".mpo"}  # JPEG with further images
    entries = sorted(entry for entry in path.iterdir() if entry.name[0] != ".")
    files = [entry for entry in entries if entry.is_file()]
    found = [file for file in files if file.suffix.lower() in readable]
    suffixes = [file.suffix.lower() for file in files]
    skipped = Counter(suffix or "without a suffix" for suffix in suffixes if suffix not in readable)
    folders = sum(entry.is_dir() for entry in entries)
    left_out = _left_out(skipped, folders)
    if not found:
        raise UserError(f"{path} contains no images{f': {left_out}' if left_out else ''}")
    return found, f"{path}: {left_out}" if left_out else ""


def _left_out(skipped: Counter[str], folders: int) -> str:
    """The counts of files by suffix, and of subfolders, that are left out of a folder."""
    named = [f"{count} {suffix}" for suffix, count in sorted(skipped.most_common(MAX_FORMATS))]
    others = skipped.total() - sum(count for _, count in skipped.most_common(MAX_FORMATS))
    parts = []
    if skipped:
        counts = ", ".join([*named, *([f"{others} other"] if others else [])])
        parts.append(f"skipped {skipped.total()} file{'s' * (skipped.total() > 1)} that cannot be read here "
                     f"({counts}): convert images to JPEG or PNG first")
    if folders:
        parts.append(f"skipped {folders} subfolder{'s' * (folders > 1)}, which are not searched")
    return "; ".join(parts)


# ---- Predictions ----------------------------------------------------------------------------------------------------


class Guess(NamedTuple):
    """A class that an image may show."""

    name: str
    superclass: str
    probability: float


def classify(model: nn.Module, image: Tensor, count: int = 5) -> list[Guess]:
    """The `count` most probable classes of an image, uint8 [3, 32, 32], most probable first.

    Their probabilities are calibrated if the weights have a temperature. Raises UserError for any other image, if the
    network was not trained on CIFAR-100, or if its weights are damaged.
    """
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.shape != (3, SIDE, SIDE):
        found = f"{str(image.dtype).removeprefix('torch.')} {[*image.shape]}" if isinstance(image, Tensor) \
            else type(image).__name__
        raise UserError(f"an image must be a uint8 tensor [3, {SIDE}, {SIDE}] with levels 0 to 255, as read_image "
                        f"gives it, not {found}")
    logits = finite_logits(model, image[None], len(FINE_NAMES), "the network")[0]
    probabilities = (logits.double() / temperature_of(model)).softmax(0)
    return [Guess(FINE_NAMES[fine], COARSE_NAMES[COARSE_OF_FINE[fine]], float(probabilities[fine]))
            for fine in probabilities.argsort(descending=True, stable=True)[:count].tolist()]


def temperature_of(model: nn.Module) -> float:
    """The divisor of a model's logits that calibrates its probabilities; 1 for a model that is not calibrated."""
    return cast(float, model.temperature)


def answer(model: nn.Module, file: Path, *, squeeze: bool = False, show: bool = False) -> dict[str, Any]:
    """The object of `predict.py --json` for an image: its file, and either guesses or an error.

    With `show`, the pixels that the network gets are also written to a PNG file in the current folder. If that fails,
    this only warns.
    """
    try:
        image = read_image(file, squeeze=squeeze)
        guesses = classify(model, image)
    except UserError as problem:
        return {"file": str(file), "error": str(problem)}
    shown = {}
    if show:
        try:
            shown = {"shown": str(_write_pixels(image, f"{file.stem}{'-squeezed' * squeeze}"))}
        except UserError as problem:
            warn(printable(str(problem)))
    return {"file": str(file), **shown, "sure": guesses[0].probability >= SURE,
            "guesses": [{"class": guess.name, "superclass": guess.superclass,
                         "probability": round(guess.probability, 6)} for guess in guesses]}


def _write_pixels(image: Tensor, stem: str) -> Path:
    """Write an image, uint8 [3, 32, 32], as a PNG to the current folder. Raises UserError if another file is there."""
    path, content = Path(f"{stem}-{SIDE}x{SIDE}.png"), io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(content, "PNG")
    if os.path.lexists(path) and not (path.is_file() and path.read_bytes() == content.getvalue()):
        raise UserError(f"{path} exists and is another file: move it away, or use --show in another folder")
    with replacing(path) as partial:
        partial.write_bytes(content.getvalue())
    return path


def model_text(model: nn.Module, name: str) -> str:
    """The first line that `predict.py` prints."""
    return f"model: {name}" + (" (probabilities not calibrated)" if temperature_of(model) == 1 else "")


def answer_text(answer: dict[str, Any]) -> str:
    """An answer as text: the file, and one line per guess with a bar for its probability."""
    lines = [printable(answer["file"])]
    if "shown" in answer:
        lines.append(f"  the network saw {printable(answer['shown'])}")
    if not answer["sure"]:
        lines.append(f"  not sure: the first guess is below {SURE:.0%}")
    return "\n".join([*lines, *(
        f"{guess['probability']:>7.1%} {'█' * round(20 * guess['probability']):<20} {spaced(guess['class']):<14} "
        f"{spaced(guess['superclass'])}" for guess in answer["guesses"])])


# ---- Weights --------------------------------------------------------------------------------------------------------


def find_weights(name: str | None, results_dir: Path = RESULTS_DIR) -> Path:
    """The weights of the run `name` (see `named_run`), or the weights file of that path.

    None stands for the published recipe with the highest mean accuracy in results.json, as far as it has weights.
    Raises UserError if they do not exist, or if the run was trained on synthetic images.
    """
    if name is None:
        runs = runs_by_name([run for run in find_runs(results_dir) if run.weights.exists()])
        name = next((run for run in _published_by_accuracy(results_dir) if run in runs), None)
        if name is None:
            raise UserError(f"{results_dir / PUBLISHED} has no weights: name one of your runs with --model")
    given = next(filter(os.path.exists, places(name, results_dir)), None)
    if given is not None and given.is_file():
        _require_weights(given)
        run, weights = FinishedRun(given.parent), given
    else:
        run = named_run(name, results_dir, with_weights=True)
        weights = run.weights
    if run_settings(run.folder) and run.synthetic:
        raise UserError(f"the run {run.name} was trained on synthetic images: it cannot predict CIFAR-100's classes")
    return weights


def _require_weights(path: Path) -> None:
    """Raise UserError with what a file is and which one to take, if that can be said; `load_model` checks the rest."""
    weights = path.with_name("model.safetensors")
    if path == weights:
        return
    kind = _other_kind(path)
    if weights.is_file():
        advice = f"take {weights}"
    elif run_settings(path.parent):
        advice = "the weights are in model.safetensors once its run is finished"
    else:
        advice = "give the model.safetensors of a run"
    if kind:
        raise UserError(f"{path} is {kind}, not the weights of a network: {advice}")


def _other_kind(path: Path) -> str:
    """A name for a file that does not hold weights, from its content; "" if it may hold them."""
    with open(path, "rb") as file:
        start = file.read(16)
    try:
        with safe_open(path, "pt", device="cpu") as tensors:
            metadata = tensors.metadata() or {}
    except (SafetensorError, OSError):
        if start[:2] == b"PK" or start[:1] == b"\x80":
            return "a pickle, which can run any code when it is loaded"
        if start.lstrip()[:1] in (b"{", b"["):
            return "a JSON file"
        if start[:1] == b"\x08" and path.suffix == ".onnx":
            return "an ONNX file for other programs"
        return f"a {path.suffix} file" if path.with_name("model.safetensors").exists() else ""
    if "model" in metadata:
        return ""
    return "a training checkpoint" if {"rest", "sha256"} <= metadata.keys() else "a safetensors file of another program"


def _published_by_accuracy(results_dir: Path) -> list[str]:
    """The labels of the published runs, best recipe first, according to results.json."""
    table = results_dir / "results.json"
    if not table.exists():
        return []
    try:
        rows = sorted(read_json(table), key=lambda row: -row["top1"]["mean"])
        return [f"{PUBLISHED}/{row['recipe']}-s{seed}" for row in rows for seed in row["seeds"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{table} does not tell which published run is best: name one with --model, or renew that "
                        "file with python evaluate.py") from error
