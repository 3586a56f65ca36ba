"""Speed of loading training images: `utils.batches` against torchvision's usual pipeline, on this machine.

    python -m benchmarks.loader                 # on CIFAR-100
    python -m benchmarks.loader --synthetic     # anywhere

Both deliver normalized float32 batches with the same random flip and crop. Ours augments a whole batch at once with
PyTorch's threads; the usual pipeline augments PIL images one by one, in two worker processes. They take turns over
several rounds and the median counts. Exits with 1 if ours is not at least five times as fast.
"""

import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

from common.command_line import Parser, exit_status
from common.errors import UserError
from utils import NUM_IMAGES, Augmentation, Split, batches, default_data_dir, load_cifar100, to_float

WORKERS = 2
ROUNDS = 5
WARM_UP = 8  # batches; the workers prepare up to 4 before the first one is requested
REQUIRED_RATIO = 5.0

Batches = Iterator[tuple[Tensor, Tensor]]


class Images(Dataset):
    """A split in torchvision's style: one PIL image at a time, transformed, with its fine label."""

    def __init__(self, split: Split, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images = split.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.fine_labels = split.fine_labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.fine_labels[index]


def our_batches(split: Split, batch_size: int, augmentation: Augmentation, mean: Tensor, std: Tensor) -> Batches:
    """Endless epochs of `utils.batches`, normalized as in the models."""
    mean, std = mean.view(3, 1, 1), std.view(3, 1, 1)
    for epoch in itertools.count():
        for images, labels in batches(split, batch_size, augmentation, seed=0, epoch=epoch):
            yield (images - mean) / std, labels


def torchvision_batches(split: Split, batch_size: int, mean: Tensor, std: Tensor) -> Batches:
    """The usual pipeline, as one iterator over many epochs, so that pauses between epochs are not measured."""
    images = Images(split, transforms.Compose([
        transforms.RandomCrop(32, padding=4, padding_mode="reflect"),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(mean.tolist(), std.tolist()),
    ]))
    order = RandomSampler(images, num_samples=10_000 * len(images))
    yield from DataLoader(images, batch_size, sampler=order, num_workers=WORKERS)


def images_per_second(source: Batches, seconds: float) -> float:
    for _ in range(WARM_UP):
        next(source)
    images, elapsed, start = 0, 0.0, time.perf_counter()
    while elapsed < seconds:
        images += len(next(source)[0])
        elapsed = time.perf_counter() - start
    return images / elapsed


def median_speeds(sources: dict[str, Callable[[], Batches]], seconds: float) -> dict[str, float]:
    """Images per second of each source: the median of rounds that take `seconds` in total.

    The sources take turns, so that machine noise affects all of them.
    """
    speeds: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(ROUNDS):
        for name, start in sources.items():
            speeds[name].append(images_per_second(start(), seconds / ROUNDS))
    return {name: statistics.median(values) for name, values in speeds.items()}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.loader", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10, metavar="X", help="seconds per source (default: 10)")
    parser.add_argument("--batch-size", type=int, default=500, metavar="N", help="images per batch (default: 500)")
    parser.add_data_dir()
    parser.add_synthetic()
    options = parser.parse_args(argv)
    if not (math.isfinite(options.seconds) and options.seconds > 0):
        raise UserError(f"--seconds must be a finite number above 0, not {options.seconds:g}")
    if not 1 <= options.batch_size <= NUM_IMAGES["train"]:
        raise UserError(f"--batch-size must be 1 to {NUM_IMAGES['train']}, not {options.batch_size}")

    split, _ = load_cifar100(options.data_dir or default_data_dir(), use_synthetic=options.synthetic)
    std, mean = torch.std_mean(to_float(split.images[:10_000]), dim=(0, 2, 3))
    size, usual, ours = options.batch_size, "torchvision, flip + crop 4", "`utils.batches`, flip + crop 4"
    speeds = median_speeds({
        usual: lambda: torchvision_batches(split, size, mean, std),
        ours: lambda: our_batches(split, size, Augmentation(flip=True, crop=4), mean, std),
        "`utils.batches`, flip + crop 4 + jitter 0.2":
            lambda: our_batches(split, size, Augmentation(flip=True, crop=4, jitter=0.2), mean, std),
    }, options.seconds)

    print(f"Batches of {size}; {torch.get_num_threads()} PyTorch threads against {WORKERS} worker processes; "
          f"median of {ROUNDS} rounds.\n")
    print("| source of batches | images/s | ratio |\n|---|---:|---:|")
    for name, speed in speeds.items():
        print(f"| {name} | {speed:,.0f} | {speed / speeds[usual]:.1f} |")
    if speeds[ours] < REQUIRED_RATIO * speeds[usual]:
        print(f"\nbelow the required ratio of {REQUIRED_RATIO:g}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
