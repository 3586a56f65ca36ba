"""Accuracy of a run on corrupted test images: eight corruptions of our own, and the files of CIFAR-100-C.

Ours have five strengths each and are made here, from 20 test images of every class. CIFAR-100-C (D. Hendrycks,
T. Dietterich, 2019, arXiv 1903.12261) is read from its official files; its corruptions differ from ours, also where
their names are alike.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.errors import UserError
from common.files import replacing, require_file
from evaluation.finished_runs import FinishedRun, TestSet, finite_logits, read_arrays
from models import load_model
from utils import add_noise, blur, generator_for, image_hashes, pixelate, to_float

PER_CLASS = 20  # test images that we corrupt; with all 100, a large network would take an hour on two CPU cores
BATCH = 100  # images; on a CPU faster than larger ones, which do not fit into its caches
STRENGTHS = 5
OFFICIAL = "CIFAR-100-C"  # the folder of the official files, in the data folder
FILE = "corruptions.npz"  # in a run's folder
MEASURE = "run python evaluate.py --corruptions"


# ---- Our corruptions ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corruption:
    """A way to corrupt images: `apply(images, strength)` takes and returns uint8 [N, 3, 32, 32].

    strengths: mildest first; meaning: of a strength, in words.
    """

    apply: Callable[[Tensor, Any], Tensor]
    strengths: tuple[float, ...]
    meaning: str


def _noise(images: Tensor, deviation: float) -> Tensor:
    """Each image has its own noise, the same at every strength and in every order of the images."""
    noise = [torch.randn(images.shape[1:], generator=generator_for("noise", int(one))) for one in image_hashes(images)]
    return _to_bytes(add_noise(to_float(images), deviation, torch.stack(noise)))


def _blur(images: Tensor, strength: float) -> Tensor:
    return _to_bytes(blur(to_float(images), strength))


def _pixelate(images: Tensor, block: int) -> Tensor:
    return _to_bytes(pixelate(to_float(images), block))


def _to_bytes(images: Tensor) -> Tensor:
    """float32 in [0, 1] -> uint8: the nearest of the 256 levels."""
    return (255 * images).round_().to(torch.uint8)


def _compress(images: Tensor, quality: int) -> Tensor:
    """By Pillow: torchvision's own functions for JPEG give the same pixels, and will be removed."""
    compressed = []
    for image in images.permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        compressed.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(compressed)).permute(0, 3, 1, 2)


def _rotate(images: Tensor, degrees: float) -> Tensor:
    """Rotate about the center; the corners show the image reflected at its edges."""
    from torchvision.transforms.v2 import InterpolationMode, functional

    padded = functional.pad(images, [images.shape[-1] // 4], padding_mode="reflect")
    rotated = functional.rotate(padded, degrees, interpolation=InterpolationMode.BILINEAR)
    return functional.center_crop(rotated, list(images.shape[-2:]))


def _torchvision(name: str) -> Callable[[Tensor, float], Tensor]:
    """The function of this name in torchvision, which is imported on the first call, since that takes a second."""

    def apply(images: Tensor, strength: float) -> Tensor:
        from torchvision.transforms.v2 import functional

        return getattr(functional, name)(images, strength)

    return apply


CORRUPTIONS = {  # noise, blur and pixelation are those that `--corrupt` trains on
    "noise": Corruption(_noise, (0.01, 0.02, 0.05, 0.1, 0.2), "standard deviation"),
    "blur": Corruption(_blur, (0.2, 0.4, 0.6, 0.8, 1), "share of 3 x 3 mean"),
    "brightness": Corruption(_torchvision("adjust_brightness"), (0.8, 0.6, 0.4, 0.2, 0.1), "factor"),
    "contrast": Corruption(_torchvision("adjust_contrast"), (0.8, 0.6, 0.4, 0.2, 0.1), "factor"),
    "saturation": Corruption(_torchvision("adjust_saturation"), (0.8, 0.6, 0.4, 0.2, 0), "factor, 0 is gray"),
    "JPEG": Corruption(_compress, (80, 60, 40, 20, 10), "quality"),
    "pixelation": Corruption(_pixelate, (2, 3, 4, 5, 6), "pixels along a block"),
    "rotation": Corruption(_rotate, (5, 10, 20, 30, 45), "degrees"),
}
GOALS = {"noise of 0.05": ("noise", 0.05), "16 x 16 pixels": ("pixelation", 2)}  # those that we work on
CELLS = np.array([[f"{name} {strength:g}" for strength in one.strengths] for name, one in CORRUPTIONS.items()])


def sample(test: TestSet) -> np.ndarray:
    """The positions of the test images that we corrupt, int64 [M]: PER_CLASS of each class, those with small hashes."""
    by_class = np.argsort(test.fine_labels, kind="stable").reshape(len(test.fine_names), -1)
    return np.sort(by_class[:, :PER_CLASS].flatten())


def measured(run: FinishedRun, test: TestSet) -> Iterator[tuple[str, np.ndarray]]:
    """Each corruption's name, and the run's accuracy at its five strengths, float64 [5], in percent.

    Predictions are read if they were saved for these weights, else they are computed and, after the last, saved.
    Raises UserError or WeightsError if the weights cannot be used.
    """
    labels, predicted = test.fine_labels[sample(test), None], _predict(run, test)
    with suppress(UserError):
        predicted = iter(read_predicted(run, test).swapaxes(0, 1))
    for classes, name in zip(predicted, CORRUPTIONS, strict=True):
        yield name, 100 * (classes == labels).mean(0)


def _predict(run: FinishedRun, test: TestSet) -> Iterator[np.ndarray]:
    """The classes that `run` predicts under each corruption, uint8 [M, strengths]; after the last, save them."""
    digest, model = run.weights_digest(), load_model(run.weights, test.device)
    images, predicted = test.images[torch.from_numpy(sample(test))], []
    for corruption in CORRUPTIONS.values():
        at_strengths = (corruption.apply(images, strength) for strength in corruption.strengths)
        predicted.append(np.stack([_classify(model, corrupted, test, run) for corrupted in at_strengths], 1))
        yield predicted[-1]
    with replacing(run.folder / FILE) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, predicted=np.stack(predicted, 1), cells=CELLS, weights_sha256=np.array(digest))


def _classify(model: Any, images: Tensor, test: TestSet, run: FinishedRun) -> np.ndarray:
    """The most probable class of each image, uint8 [N]."""
    logits = [finite_logits(model, batch, len(test.fine_names), str(run.weights)) for batch in images.split(BATCH)]
    return torch.cat(logits).argmax(1).numpy().astype(np.uint8)


def read_predicted(run: FinishedRun, test: TestSet) -> np.ndarray:
    """The saved classes that `run` predicts, uint8 [M, corruptions, strengths], for the images of `sample`.

    Raises UserError if there are none, or for other weights, images or corruptions than today's.
    """
    path = run.folder / FILE
    predicted, cells, digest = read_arrays(path, "predicted", "cells", "weights_sha256")
    if str(digest) != run.weights_digest():
        raise UserError(f"{path} was made with other weights: {MEASURE}")
    expected = (len(sample(test)), *CELLS.shape)
    if predicted.dtype != np.uint8 or predicted.shape != expected or not np.array_equal(cells, CELLS):
        raise UserError(f"{path} was made with other images or corruptions: {MEASURE}")
    return predicted


def accuracy(run: FinishedRun, test: TestSet) -> np.ndarray:
    """The accuracy that was measured for each corruption and strength, percent [corruptions, strengths].

    Raises UserError as `read_predicted` does.
    """
    return 100 * (read_predicted(run, test) == test.fine_labels[sample(test), None, None]).mean(0)


def clean_accuracy(run: FinishedRun, test: TestSet) -> float:
    """The accuracy on the same images, unchanged, in percent."""
    chosen = sample(test)
    return 100 * float((run.logits(test)[chosen].argmax(1) == test.fine_labels[chosen]).mean())


def differing(run: FinishedRun, test: TestSet, images: int) -> dict[str, int]:
    """Predict again for `images` images at each strength: by corruption, how many saved predictions differ.

    Raises UserError as `read_predicted` does.
    """
    saved, chosen = read_predicted(run, test), sample(test)
    few = np.linspace(0, len(chosen) - 1, images).astype(np.int64)
    model, unchanged, counts = load_model(run.weights, test.device), test.images[torch.from_numpy(chosen[few])], {}
    for index, (name, corruption) in enumerate(CORRUPTIONS.items()):
        corrupted = torch.cat([corruption.apply(unchanged, strength) for strength in corruption.strengths])
        counts[name] = int((_classify(model, corrupted, test, run) != saved[few, index].T.ravel()).sum())
    return counts


# ---- CIFAR-100-C ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OfficialFiles:
    """The files of CIFAR-100-C: images, uint8 [5 N, 32, 32, 3], by corruption, and their labels, int64 [5 N].

    The N test images come in their official order at the first strength, then at the second, and so on. The images are
    read from the disk when they are used.
    """

    images: dict[str, np.ndarray]
    labels: np.ndarray


def find_official(data_dir: Path, test: TestSet) -> OfficialFiles | None:
    """The files in `data_dir`/CIFAR-100-C; None without that folder. Raises UserError if they have another form."""
    folder, count = data_dir / OFFICIAL, STRENGTHS * len(test)
    if not folder.is_dir():
        return None
    labels = _open_array(folder / "labels.npy", (count,))
    fifths = np.sort(labels.reshape(STRENGTHS, -1), axis=1)
    if labels.dtype.kind not in "iu" or (fifths != np.sort(test.fine_labels)).any():
        raise UserError(f"{folder / 'labels.npy'} has other labels than the test set, five times: is it CIFAR-10-C's?")
    images = {path.stem: _open_array(path, (count, 32, 32, 3), np.uint8)
              for path in sorted(folder.glob("[!.]*.npy")) if path.name != "labels.npy"}  # macOS adds ._fog.npy
    if not images:
        raise UserError(f"{folder} has no images: it needs files such as gaussian_noise.npy (data/README.md)")
    return OfficialFiles(images, labels.astype(np.int64))


def _open_array(path: Path, shape: tuple[int, ...], dtype: type | None = None) -> np.ndarray:
    """An .npy file of this shape, not yet in memory. Raises UserError for any other file."""
    require_file(path)
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # refuses pickles
    except Exception as error:  # numpy raises nearly anything for a damaged file
        raise UserError(f"{path} cannot be read as an .npy file ({type(error).__name__}): copy it again") from error
    if array.shape != shape or (dtype and array.dtype != dtype):
        wanted = f"{np.dtype(dtype)} {list(shape)}" if dtype else str(list(shape))
        raise UserError(f"{path} has {array.dtype} {list(array.shape)} instead of {wanted}: is it {OFFICIAL}'s?")
    return array


def measured_official(run: FinishedRun, test: TestSet, files: OfficialFiles) -> Iterator[tuple[str, np.ndarray]]:
    """Each official corruption's name, and the run's accuracy at its five strengths, float64 [5], in percent."""
    model, labels = load_model(run.weights, test.device), files.labels.reshape(STRENGTHS, -1)
    for name, images in files.images.items():
        parts = (torch.from_numpy(part.transpose(0, 3, 1, 2).copy()) for part in np.split(images, STRENGTHS))
        correct = [_classify(model, part, test, run) == fifth for part, fifth in zip(parts, labels, strict=True)]
        yield name, 100 * np.mean(correct, axis=1)
