"""CIFAR-100 in memory: the loader, its splits, and batches with augmentation.

Specific to this project: images are uint8 [N, 3, 32, 32] until they are in a batch. Everything random is a function
of its arguments, never of a generator's hidden state.

Training uses `load_cifar100`, which never reads a test image except to verify a download. Only evaluation uses
`load_test_set`.

    python utils.py        # check the training images in data/ or $CIFAR100_DIR; download the dataset if it is missing
"""

import difflib
import hashlib
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.command_line import Parser, absolute_path, exit_status
from common.errors import UserError
from common.files import ROOT
from dataset import synthetic
from dataset.classes import COARSE_NAMES, COARSE_OF_FINE, FINE_NAMES, NUM_IMAGES
from dataset.download import download, mirror
from dataset.formats import Found, is_there, read_part

CONTENT_DIGESTS = {  # of the official files; see `content_digest`
    "train": "3795f8f205d6d1651ff2659a6044dab3379c35c127403bd96cfde2757219935b",
    "test": "ab99a27592fed27c32d9aa446c668795bde7daaa76989b5bbf0e8835f5633a02",
}
OFFICIAL_ORDER = ROOT / "dataset" / "official-order.npy"  # uint16 [60000]; see `_in_official_order`
VAL_PER_CLASS = 50
NOISE = 0.1  # the largest standard deviation of the noise in `corrupt`, for images in [0, 1]


# ---- The dataset ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Images and their labels, all in memory.

    images: uint8 [N, 3, 32, 32]; fine_labels and coarse_labels: int64 [N], indices into fine_names and coarse_names.
    """

    images: Tensor
    fine_labels: Tensor
    coarse_labels: Tensor
    fine_names: tuple[str, ...] = FINE_NAMES
    coarse_names: tuple[str, ...] = COARSE_NAMES

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def hashes(self) -> np.ndarray:
        """`image_hashes` of the images, uint64 [N], computed once."""
        return image_hashes(self.images)

    def __getitem__(self, index: Tensor) -> "Split":
        """The images at `index`: a mask, bool [N], or positions, int64 [M]."""
        return Split(self.images[index], self.fine_labels[index], self.coarse_labels[index],
                     self.fine_names, self.coarse_names)

    def to(self, device: torch.device | str) -> "Split":
        return Split(self.images.to(device), self.fine_labels.to(device), self.coarse_labels.to(device),
                     self.fine_names, self.coarse_names)


def default_data_dir() -> str:
    """The default folder of the dataset, an absolute path: $CIFAR100_DIR, else data/ in this repository."""
    return str(absolute_path(os.environ.get("CIFAR100_DIR") or str(ROOT / "data")))


@overload
def load_cifar100(data_dir: str | Path, *, train_on_all: Literal[False] = False, use_synthetic: bool = False
                  ) -> tuple[Split, Split]: ...


@overload
def load_cifar100(data_dir: str | Path, *, train_on_all: bool, use_synthetic: bool = False
                  ) -> tuple[Split, Split | None]: ...


def load_cifar100(
    data_dir: str | Path, *, train_on_all: bool = False, use_synthetic: bool = False
) -> tuple[Split, Split | None]:
    """Load the training images as (train, val): 45,000 and 5,000, or all 50,000 and None with `train_on_all`.

    `data_dir` may have them in any form that `dataset.formats` reads; the images, their order and the split are always
    the same. If it has none, the dataset is downloaded; test images are read only to verify that. Raises UserError if
    files are damaged or missing, the folder does not exist or cannot be used, or the download fails.
    """
    if use_synthetic:
        train, val = _synthetic_split("train"), _synthetic_split("val")
        return (_concatenate(train, val), None) if train_on_all else (train, val)
    everything = _load_official(Path(data_dir), "train")
    if train_on_all:
        return everything, None
    is_val = validation_mask(everything)
    return everything[~is_val], everything[is_val]


def load_test_set(data_dir: str | Path, *, use_synthetic: bool = False) -> Split:
    """Load the 10,000 test images, which measure finished runs and never choose anything."""
    return _synthetic_split("test") if use_synthetic else _load_official(Path(data_dir), "test")


def image_hashes(images: Tensor) -> np.ndarray:
    """Hash images by their content: uint8 [N, 3, 32, 32] -> uint64 [N].

    A hash is the first 8 bytes, little-endian, of the SHA-256 of an image's 3,072 channel-first bytes. Hashing all
    50,000 takes a fifth of a second.
    """
    rows = images.flatten(1).contiguous().cpu().numpy()
    return np.array([int.from_bytes(hashlib.sha256(row).digest()[:8], "little") for row in rows], dtype=np.uint64)


def content_digest(split: Split) -> str:
    """The SHA-256, in hexadecimal, of all images and their fine labels, whatever their order."""
    labels, order = split.fine_labels.numpy().astype(np.uint8), _content_order(split)
    return hashlib.sha256(split.hashes[order].astype("<u8").tobytes() + labels[order].tobytes()).hexdigest()


def _content_order(split: Split) -> np.ndarray:
    """The positions of the images by hash, for equal images by label: int64 [N]."""
    return np.lexsort((split.fine_labels.numpy(), split.hashes))


def validation_mask(split: Split, per_class: int = VAL_PER_CLASS) -> Tensor:
    """A mask of the validation images, bool [N]: the `per_class` images of each fine class with the smallest hashes.

    The choice depends on the images alone, not on a seed, a file format or the order of the images.
    """
    fine = split.fine_labels.numpy()
    by_class_then_hash = np.lexsort((split.hashes, fine)).reshape(len(split.fine_names), -1)
    mask = torch.zeros(len(split), dtype=torch.bool)
    mask[torch.from_numpy(by_class_then_hash[:, :per_class].flatten())] = True
    return mask


def _synthetic_split(part: str) -> Split:
    images, fine_labels = synthetic.make_synthetic(part)
    coarse_labels = torch.tensor(synthetic.COARSE_OF_FINE)[fine_labels]
    return Split(images, fine_labels, coarse_labels, synthetic.FINE_NAMES, synthetic.COARSE_NAMES)


def _concatenate(a: Split, b: Split) -> Split:
    return Split(torch.cat([a.images, b.images]), torch.cat([a.fine_labels, b.fine_labels]),
                 torch.cat([a.coarse_labels, b.coarse_labels]), a.fine_names, a.coarse_names)


def _load_official(data_dir: Path, part: str, data_url: str = "") -> Split:
    """Load `part` ("train" or "test") of CIFAR-100, or download it, from `data_url` or $CIFAR100_URL if that works."""
    data_dir = absolute_path(str(data_dir))
    try:
        if not is_there(data_dir):
            raise UserError(f"the folder {data_dir} does not exist{_suggestion(data_dir)}: create it to download "
                            "CIFAR-100 into it, or name another one with --data-dir or $CIFAR100_DIR")
        found = read_part(data_dir, part)
        if found is None:
            url = data_url or os.environ.get("CIFAR100_URL")
            download(data_dir, mirror(url) if url else (), _checked)
            found = read_part(data_dir, part)
            assert found is not None
        elif data_url:
            print(f"nothing is downloaded from --data-url: {found.source} is there")
        return _checked(found, part)
    except OSError as error:
        raise UserError(f"cannot use the data folder {data_dir} ({error.strerror or error}): "
                        "name another one with --data-dir or $CIFAR100_DIR") from error


def _suggestion(missing: Path) -> str:
    """A question that names the folder with the most similar name, if there is one."""
    siblings = [path.name for path in missing.parent.iterdir() if path.is_dir()] if is_there(missing.parent) else []
    similar = difflib.get_close_matches(missing.name, siblings, n=1)
    return f" (is it {missing.parent / similar[0]}?)" if similar else ""


def _checked(found: Found, part: str) -> Split:
    """These images as a Split in the official order. Raises UserError unless they are the official ones."""
    images, fine_labels, coarse_labels, source, advice = found
    for kind, labels, names in (("fine", fine_labels, FINE_NAMES), ("coarse", coarse_labels, COARSE_NAMES)):
        wrong = labels[(labels < 0) | (labels >= len(names))]
        if len(wrong):
            raise UserError(f"{source} has the {kind} label {wrong[0]}, not one from 0 to {len(names) - 1}: {advice}")
    per_class = NUM_IMAGES[part] // len(FINE_NAMES)
    counts = torch.bincount(fine_labels, minlength=len(FINE_NAMES))
    if (counts != per_class).any():
        worst = int((counts - per_class).abs().argmax())
        raise UserError(f"{source} has {int(counts[worst])} images of the class {FINE_NAMES[worst]} "
                        f"instead of {per_class}: {advice}")
    if (torch.tensor(COARSE_OF_FINE)[fine_labels] != coarse_labels).any():
        raise UserError(f"{source} has fine labels with the wrong superclass: {advice}")
    split = Split(images, fine_labels, coarse_labels)
    if content_digest(split) != CONTENT_DIGESTS[part]:
        raise UserError(f"{source} has images or labels that are not the official ones: {advice}")
    return _in_official_order(split, part)


def _in_official_order(split: Split, part: str) -> Split:
    """The same images in the order of the official files, since batches are drawn by position.

    OFFICIAL_ORDER has the place of each official image in `_content_order`, first for train, then for test.
    """
    train, test = np.split(np.load(OFFICIAL_ORDER), [NUM_IMAGES["train"]])
    index = _content_order(split)[train if part == "train" else test]
    return split if (index == np.arange(len(split))).all() else split[torch.from_numpy(index)]


# ---- Batches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of a training batch; by default, none.

    flip: mirror images left to right at random; alternate: flip each image in every other epoch instead (Jordan 2024,
    arXiv 2404.00498); crop: shift by up to `crop` pixels, reflected at the edges; jitter: change brightness and
    contrast by up to this fraction; corrupt: the fraction of images that `corrupt` makes noisy, coarse or blurred.
    """

    flip: bool = False
    alternate: bool = False
    crop: int = 0
    jitter: float = 0.0
    corrupt: float = 0.0


def derived_seed(*key: int | str) -> int:
    """A seed that depends only on `key`, for example ("augment", seed, epoch, step)."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "little")


def generator_for(*key: int | str) -> torch.Generator:
    """A generator with this `derived_seed`. It is on the CPU, so that every device gets the same numbers."""
    return torch.Generator().manual_seed(derived_seed(*key))


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    return math.ceil(num_images / batch_size)


def batches(
    split: Split, batch_size: int, augmentation: Augmentation, *, seed: int, epoch: int, first_step: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one epoch in random order, from step `first_step` on, on the split's device.

    Yields images, float32 [B, 3, 32, 32] in [0, 1] (or slightly outside it with jitter), and fine labels, int64 [B].
    Each image comes once. The sizes of batches differ by at most one and never exceed `batch_size`. A step's batch
    depends only on the arguments and the step, so an interrupted epoch can be resumed at any step.
    """
    order = torch.randperm(len(split), generator=generator_for("order", seed, epoch))
    alternating = torch.randint(2, (len(split),), generator=generator_for("flip", seed)) == epoch % 2
    for step, index in enumerate(order.tensor_split(steps_per_epoch(len(split), batch_size))):
        if step < first_step:
            continue
        generator = generator_for("augment", seed, epoch, step)
        flipped = alternating[index].to(split.images.device) if augmentation.alternate else None
        index = index.to(split.images.device)
        images = to_float(augment(split.images[index], augmentation, generator, flipped))
        images = jitter(images, augmentation.jitter, generator)
        yield corrupt(images, augmentation.corrupt, generator), split.fine_labels[index]


def to_float(images: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] -> float32 [N, 3, H, W] in [0, 1], the input of every model.

    Raises TypeError for any other dtype, since such images may be in [0, 1] already.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, not {str(images.dtype).removeprefix('torch.')}")
    return images.float().div_(255)  # in place: float() has made a copy


def jitter(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Change each image's brightness and contrast at random by up to `strength`; images: float32 [B, 3, H, W]."""
    if not strength:
        return images
    drawn = torch.rand(2, len(images), 1, 1, 1, generator=generator).to(images.device)
    contrast, brightness = strength * (2 * drawn - 1)
    return (images - 0.5) * (1 + contrast) + 0.5 + brightness


def corrupt(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Corrupt the first `share` of a batch, so that a network also learns from poor images; float32 [B, C, H, W].

    A third of them gets Gaussian noise, with a standard deviation of up to NOISE; a third has half the resolution; the
    last third is blurred, each image more or less.
    """
    third = min(round(share * len(images) / 3), len(images) // 3)
    if not third:
        return images
    noisy, coarse, sharp, rest = images.split([third, third, third, len(images) - 3 * third])
    strength = torch.rand(2, third, 1, 1, 1, generator=generator).to(images.device)
    noise = torch.randn(noisy.shape, generator=generator).to(images.device)
    noisy = add_noise(noisy, NOISE * strength[0], noise)
    return torch.cat([noisy, pixelate(coarse, 2), blur(sharp, strength[1]), rest])


# Three ways to spoil images, float32 [B, C, H, W] in [0, 1]: for training, and to measure how robust a network is.


def add_noise(images: Tensor, deviation: Tensor | float, noise: Tensor) -> Tensor:
    """Add `deviation` times `noise`, which is standard normal and as large as the images."""
    return (images + deviation * noise).clamp(0, 1)


def pixelate(images: Tensor, block: int) -> Tensor:
    """Replace each block of `block` x `block` pixels by its mean; blocks of 2 x 2 leave half the resolution."""
    height, width = images.shape[-2:]
    means = F.avg_pool2d(images, block, ceil_mode=True)
    return F.interpolate(means, scale_factor=block)[..., :height, :width]


def blur(images: Tensor, strength: Tensor | float) -> Tensor:
    """Move each pixel toward the mean of the 3 x 3 pixels around it: not at all at strength 0, to the mean at 1."""
    means = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    return images.lerp(means, strength)


def augment(
    images: Tensor, augmentation: Augmentation, generator: torch.Generator, flipped: Tensor | None = None
) -> Tensor:
    """Shift and flip a batch, uint8 [B, C, H, W], on its device. `jitter` follows, since it needs floats.

    flipped: bool [B], the images to flip instead of random ones.
    """
    batch, _, height, width = images.shape
    device = images.device

    def draw(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (batch, 1), generator=generator).to(device)

    rows = torch.arange(height, device=device).expand(batch, -1)
    columns = torch.arange(width, device=device).expand(batch, -1)
    if augmentation.crop:
        rows = _reflect(rows + draw(-augmentation.crop, augmentation.crop), height)
        columns = _reflect(columns + draw(-augmentation.crop, augmentation.crop), width)
    if augmentation.flip:
        mirrored = draw(0, 1) == 1 if flipped is None else flipped[:, None]
        columns = torch.where(mirrored, columns.flip(1), columns)
    if augmentation.crop or augmentation.flip:
        images = images.gather(2, rows[:, None, :, None].expand_as(images))
        images = images.gather(3, columns[:, None, None, :].expand_as(images))
    return images


def _reflect(index: Tensor, size: int) -> Tensor:
    """Reflect positions outside [0, size) at the edges, without repeating these: -1 -> 1, size -> size - 2."""
    return (size - 1) - ((size - 1) - index.abs()).abs()


@torch.inference_mode()
def compute_logits(model: nn.Module, images: Tensor, batch_size: int = 1000) -> Tensor:
    """The model's logits, float32 [N, num_classes] on the CPU, for images, uint8 [N, 3, 32, 32].

    They are computed in evaluation mode and float32; afterwards the model is in its previous mode.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    logits = torch.cat([model(to_float(batch.to(device))).float().cpu() for batch in images.split(batch_size)])
    model.train(was_training)
    return logits


DESCRIPTION = """Download CIFAR-100, or check the training images if the data folder has any.

A download is up to 170 MB. It comes from Hugging Face (needs pyarrow), fast.ai or the official host, whichever works
first, and becomes 184 MB in cifar-100-binary/. The SHA-256 of its images and labels must be that of the official ones.
"""


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="utils.py", description=DESCRIPTION)
    parser.add_data_dir()
    parser.add_argument("--data-url", default="", metavar="URL", help="an archive (.tar.gz) or a folder (/) from which "
                        "to download first; see data/README.md (default: $CIFAR100_URL)")
    options = parser.parse_args(argv)
    if options.data_url:
        mirror(options.data_url)  # refuses an address that cannot be one, also if the data is there
    data_dir = options.data_dir or default_data_dir()
    train = _load_official(Path(data_dir), "train", options.data_url)
    print(f"CIFAR-100 is in {data_dir}: its {len(train):,} training images are complete and unchanged")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
