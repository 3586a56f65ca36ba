"""CIFAR-100 in memory: the loader, its splits, and batches with augmentation.

Specific to this project: pictures are always uint8 [N, 3, 32, 32] until a batch is made of them, and everything
random here is a pure function of its arguments, never of a generator's hidden state.

The training scripts see `load_cifar100`, which never reads a test picture. `load_test_set` is for whoever reports.
"""

import errno
import hashlib
import http.client
import math
import os
import socket
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data import synthetic

SUPERCLASSES = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple oak palm pine willow",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
COARSE_NAMES = tuple(SUPERCLASSES)
FINE_NAMES = tuple(sorted(" ".join(SUPERCLASSES.values()).split()))
COARSE_OF_FINE = tuple(
    next(coarse for coarse, names in enumerate(SUPERCLASSES.values()) if fine in names.split()) for fine in FINE_NAMES
)

PICTURES = {"train": 50_000, "test": 10_000}
CONTENT = {  # `content_digest` of the official files
    "train": "3795f8f205d6d1651ff2659a6044dab3379c35c127403bd96cfde2757219935b",
    "test": "ab99a27592fed27c32d9aa446c668795bde7daaa76989b5bbf0e8835f5633a02",
}
RECORD_BYTES = 2 + 3 * 32 * 32  # coarse label, fine label, then the red, green and blue planes
VAL_PER_CLASS = 50
BINARY_FOLDER, PYTHON_FOLDER = "cifar-100-binary", "cifar-100-python"
NETWORK_TIMEOUT = 30.0  # seconds without a byte before a download is given up


class UserError(Exception):
    """Something the user can put right: one line that says what is wrong, where, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


# ---------------------------------------------------------------------------------------------------------------------
# The data set
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Pictures and their labels, all in memory.

    images: uint8 [N, 3, 32, 32]; fine_labels and coarse_labels: int64 [N]; the names that the labels index.
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
        """`picture_hashes` of the images, uint64 [N], computed once."""
        return picture_hashes(self.images)

    def __getitem__(self, index: Tensor) -> "Split":
        """The pictures that `index`, a boolean mask or int64 positions, picks."""
        return Split(self.images[index], self.fine_labels[index], self.coarse_labels[index],
                     self.fine_names, self.coarse_names)

    def to(self, device: torch.device | str) -> "Split":
        return Split(self.images.to(device), self.fine_labels.to(device), self.coarse_labels.to(device),
                     self.fine_names, self.coarse_names)


def default_data_dir() -> str:
    """Where the data set is looked for unless told otherwise: $CIFAR100_DIR, else the folder `data/` here."""
    return os.environ.get("CIFAR100_DIR") or str(Path(__file__).resolve().parent / "data")


def load_cifar100(
    data_dir: str | Path, *, train_on_all: bool = False, use_synthetic: bool = False
) -> tuple[Split, Split | None]:
    """The training pictures as (train, val): 45,000 and 5,000; with `train_on_all` (all 50,000, None).

    Looks in `data_dir` for the official binary version, then for the python version, and else downloads the latter.
    Raises UserError for anything wrong with the files, the folder or the network.
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
    """The 10,000 test pictures: read to report a finished run, never to choose anything."""
    return _synthetic_split("test") if use_synthetic else _load_official(Path(data_dir), "test")


def picture_hashes(images: Tensor) -> np.ndarray:
    """Name pictures by their content: uint8 [N, 3, 32, 32] -> uint64 [N].

    A hash is the first 8 bytes, little-endian, of the SHA-256 of a picture's 3,072 channel-first bytes. SHA-256 takes
    one picture at a time; all 50,000 take a fifth of a second, once.
    """
    rows = images.flatten(1).contiguous().cpu().numpy()
    return np.array([int.from_bytes(hashlib.sha256(row).digest()[:8], "little") for row in rows], dtype=np.uint64)


def content_digest(split: Split) -> str:
    """A SHA-256 of all pictures and their fine labels, as hexadecimal digits: the same in whatever order they are."""
    labels = split.fine_labels.numpy().astype(np.uint8)
    order = np.lexsort((labels, split.hashes))  # of pictures that are there twice, the labels decide
    return hashlib.sha256(split.hashes[order].astype("<u8").tobytes() + labels[order].tobytes()).hexdigest()


def validation_mask(split: Split, per_class: int = VAL_PER_CLASS) -> Tensor:
    """Which training pictures are held out, bool [N]: of every fine class the `per_class` with the smallest hashes.

    The choice depends on the pictures alone: not on a seed, nor on the distribution of the files or their order.
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


def _load_official(data_dir: Path, part: str) -> Split:
    """`part` ("train" or "test") of the real data set, from the first place that has it."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        binary = data_dir / BINARY_FOLDER / f"{part}.bin"
        if _is_there(binary):
            return _checked(*_read_binary(binary, PICTURES[part]), part, binary)
        if not _is_there(data_dir / PYTHON_FOLDER):
            with tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir) as folder:
                _download(Path(folder))  # there first, so that no half of it is ever trusted
                try:
                    os.replace(Path(folder) / PYTHON_FOLDER, data_dir / PYTHON_FOLDER)
                except OSError as error:
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # another process was faster
                        raise
        return _checked(*_read_python(data_dir, part), part, data_dir / PYTHON_FOLDER)
    except OSError as error:
        raise UserError(f"cannot use the data folder {data_dir}: {error.strerror or error}; "
                        "name a folder that can be read and written with --data-dir or $CIFAR100_DIR") from error


def _is_there(path: Path) -> bool:
    """Like `Path.exists`, which in newer Pythons takes a folder that may not be read for an empty one."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


def _read_binary(path: Path, pictures: int) -> tuple[Tensor, Tensor, Tensor]:
    expected, size = pictures * RECORD_BYTES, path.stat().st_size
    if size != expected:
        raise UserError(f"{path} has {size:,} bytes instead of {expected:,}: it is incomplete or something else; "
                        "delete it and unpack the official archive again")
    records = np.fromfile(path, dtype=np.uint8).reshape(pictures, RECORD_BYTES)
    images = torch.from_numpy(records[:, 2:].reshape(pictures, 3, 32, 32))
    coarse_labels, fine_labels = torch.from_numpy(records[:, :2].astype(np.int64).T.copy())
    return images.contiguous(), fine_labels, coarse_labels


def _read_python(data_dir: Path, part: str) -> tuple[Tensor, Tensor, Tensor]:
    from torchvision.datasets import CIFAR100  # here, because importing torchvision takes a second

    try:
        official = CIFAR100(str(data_dir), train=part == "train")
    except RuntimeError as error:  # torchvision has compared each file's MD5 before unpickling it
        raise UserError(f"{data_dir / PYTHON_FOLDER} is incomplete or damaged (its MD5 sums do not match); "
                        "delete that folder and start again") from error
    images = torch.from_numpy(official.data.transpose(0, 3, 1, 2)).contiguous()
    fine_labels = torch.tensor(official.targets)
    return images, fine_labels, torch.tensor(COARSE_OF_FINE)[fine_labels.clamp(0, len(FINE_NAMES) - 1)]


def _checked(images: Tensor, fine_labels: Tensor, coarse_labels: Tensor, part: str, source: Path) -> Split:
    """A Split of these tensors, if they are what the data set's authors describe."""
    advice = "it is not the official CIFAR-100; delete it and unpack the official archive again"
    for kind, labels, names in (("fine", fine_labels, FINE_NAMES), ("coarse", coarse_labels, COARSE_NAMES)):
        if int(labels.max()) >= len(names):
            raise UserError(f"{source} has the {kind} label {int(labels.max())}, above {len(names) - 1}: {advice}")
    per_class, counts = PICTURES[part] // len(FINE_NAMES), torch.bincount(fine_labels, minlength=len(FINE_NAMES))
    if (counts != per_class).any():
        worst = int((counts - per_class).abs().argmax())
        raise UserError(f"{source} has {int(counts[worst])} pictures of the class {FINE_NAMES[worst]} "
                        f"instead of {per_class}: {advice}")
    if (torch.tensor(COARSE_OF_FINE)[fine_labels] != coarse_labels).any():
        raise UserError(f"{source} puts some fine classes into the wrong superclass: {advice}")
    split = Split(images, fine_labels, coarse_labels)
    if content_digest(split) != CONTENT[part]:
        raise UserError(f"{source} has pictures or labels that are not the official ones: {advice}")
    return split


def _download(folder: Path) -> None:
    """Fetch the python version into `folder`, through torchvision, with a progress bar."""
    from torchvision.datasets import CIFAR100

    print(f"CIFAR-100 is not in {folder.parent}: downloading it (169 MB) from {CIFAR100.url}", flush=True)
    try:
        with _network_timeout():
            CIFAR100(str(folder), download=True)
    except (OSError, RuntimeError, EOFError, tarfile.TarError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise UserError(f"cannot download CIFAR-100 into {folder.parent} ({reason}): connect to a network, or put the "
                        "data set there as data/README.md says, or train with --synthetic") from error


@contextmanager
def _network_timeout() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training batch: a random horizontal flip, a random crop out of the picture reflected at its
    edges by up to `crop` pixels, and a square of `cutout` pixels (DeVries and Taylor 2017, arXiv 1708.04552) filled
    with the mean colour; then brightness and contrast changed by up to the share `jitter`. 0 or False turns one off.

    alternate: a picture is flipped in every second epoch instead of at random (Jordan 2024, arXiv 2404.00498).
    """

    flip: bool = False
    alternate: bool = False
    crop: int = 0
    cutout: int = 0
    jitter: float = 0.0


def derived_seed(*key: int | str) -> int:
    """A seed that depends on all of `key` (say "augment", seed, epoch, step) and on nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "little")


def generator_for(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by `derived_seed`: on every device the same numbers, since they are drawn on the CPU."""
    return torch.Generator().manual_seed(derived_seed(*key))


def steps_per_epoch(pictures: int, batch_size: int) -> int:
    return math.ceil(pictures / batch_size)


def batches(
    split: Split, batch_size: int, augmentation: Augmentation, *, seed: int, epoch: int, first_step: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in a random order, from step `first_step` on, on the device that `split` is on.

    Yields images, float32 [B, 3, 32, 32] in [0, 1] (beyond it with jitter), and fine labels, int64 [B]. Every picture
    comes once; the batches differ by at most one picture and are never larger than `batch_size`. Step k is the same
    however often and wherever it is asked for.
    """
    order = torch.randperm(len(split), generator=generator_for("order", seed, epoch))
    turn = torch.randint(2, (len(split),), generator=generator_for("flip", seed)) == epoch % 2  # if they alternate
    fill = split.images[:1000].float().mean((0, 2, 3)).to(torch.uint8)  # the mean colour, near enough
    for step, index in enumerate(order.tensor_split(steps_per_epoch(len(split), batch_size))):
        if step >= first_step:
            generator = generator_for("augment", seed, epoch, step)
            turned = turn[index].to(split.images.device) if augmentation.flip and augmentation.alternate else None
            index = index.to(split.images.device)
            images = to_float(augment(split.images[index], augmentation, generator, fill, turned))
            yield jitter(images, augmentation.jitter, generator), split.fine_labels[index]


def to_float(images: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] -> float32 in [0, 1], what every model's `forward` takes."""
    return images.float().div_(255)


def jitter(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Change each picture's contrast by a factor and its brightness by a summand, both off by up to `strength`."""
    if not strength:
        return images
    drawn = torch.rand(2, len(images), 1, 1, 1, generator=generator).to(images.device)
    contrast, brightness = strength * (2 * drawn - 1)
    return (images - 0.5) * (1 + contrast) + 0.5 + brightness


def augment(
    images: Tensor, augmentation: Augmentation, generator: torch.Generator, fill: Tensor, turned: Tensor | None = None
) -> Tensor:
    """Augment a batch, uint8 [B, C, H, W], on its device, but for jitter, which is for floats.

    fill: uint8 [C], the colour of what is cut out; turned: bool [B], which to flip instead of random ones.
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
        columns = torch.where(draw(0, 1) == 1 if turned is None else turned[:, None], columns.flip(1), columns)
    if augmentation.crop or augmentation.flip:
        images = images.gather(2, rows[:, None, :, None].expand_as(images))
        images = images.gather(3, columns[:, None, None, :].expand_as(images))
    if augmentation.cutout:
        side = augmentation.cutout
        below = torch.arange(height, device=device) - (draw(0, height - side % 2) - side // 2)
        right = torch.arange(width, device=device) - (draw(0, width - side % 2) - side // 2)
        in_rows, in_columns = (below >= 0) & (below < side), (right >= 0) & (right < side)
        square = in_rows[:, None, :, None] & in_columns[:, None, None, :]
        images = torch.where(square, fill.view(1, -1, 1, 1), images)
    return images


def _reflect(index: Tensor, size: int) -> Tensor:
    """Fold positions outside [0, size) back at the edges, which are not repeated: -1 -> 1, size -> size - 2."""
    return (size - 1) - ((size - 1) - index.abs()).abs()


@torch.inference_mode()
def compute_logits(model: nn.Module, images: Tensor, batch_size: int = 1000) -> Tensor:
    """The model's logits, float32 [N, 100] on the CPU, for uint8 images [N, 3, 32, 32]: in evaluation mode, in float32.

    Leaves the model in the mode (training or evaluation) it was in.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    logits = torch.cat([model(to_float(batch.to(device))).float().cpu() for batch in images.split(batch_size)])
    model.train(was_training)
    return logits


def _main() -> None:
    train, val = load_cifar100(default_data_dir())
    print(f"CIFAR-100 is in {default_data_dir()}: {len(train):,} pictures to train on, {len(val):,} held out")


if __name__ == "__main__":  # fetch the data set, or check what is there
    try:
        _main()
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
