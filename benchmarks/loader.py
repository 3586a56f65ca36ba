"""How fast training pictures come: `utils.batches` beside torchvision's usual pipeline, on this machine.

    python benchmarks/loader.py                 # on CIFAR-100
    python benchmarks/loader.py --synthetic     # anywhere

Both deliver normalised float32 batches with the same random flip and crop. Ours draws them for a whole batch at once
with PyTorch's threads; the usual pipeline draws them picture by picture, on PIL images, in two worker processes. They
take turns over several rounds and the median counts. Exits 1 if ours is not five times as fast.
"""

import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is there, the project's is not

from settings import Parser, exit_status
from utils import PICTURES, Augmentation, Split, UserError, batches, default_data_dir, load_cifar100, to_float

WORKERS = 2
ROUNDS = 5
WARM_UP = 8  # batches; the workers have up to 4 ready before anyone asks for one
REQUIRED_RATIO = 5.0

Batches = Iterator[tuple[Tensor, Tensor]]


class Pictures(Dataset):
    """A split as torchvision serves it: one PIL image at a time, transformed, with its fine label."""

    def __init__(self, split: Split, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images = split.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.fine_labels = split.fine_labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.fine_labels[index]


def our_batches(split: Split, batch_size: int, augmentation: Augmentation, mean: Tensor, std: Tensor) -> Batches:
    """Epoch after epoch of `utils.batches`, normalised as the models do it."""
    mean, std = mean.view(3, 1, 1), std.view(3, 1, 1)
    for epoch in itertools.count():
        for images, labels in batches(split, batch_size, augmentation, seed=0, epoch=epoch):
            yield (images - mean) / std, labels


def torchvision_batches(split: Split, batch_size: int, mean: Tensor, std: Tensor) -> Batches:
    """The usual pipeline; one iterator goes through very many epochs, so that no pause between them is measured."""
    pictures = Pictures(split, transforms.Compose([
        transforms.RandomCrop(32, padding=4, padding_mode="reflect"),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(mean.tolist(), std.tolist()),
    ]))
    order = RandomSampler(pictures, num_samples=10_000 * len(pictures))
    yield from DataLoader(pictures, batch_size, sampler=order, num_workers=WORKERS)


def images_per_second(source: Batches, seconds: float) -> float:
    for _ in range(WARM_UP):
        next(source)
    images, elapsed, start = 0, 0.0, time.perf_counter()
    while elapsed < seconds:
        images += len(next(source)[0])
        elapsed = time.perf_counter() - start
    return images / elapsed


def median_speeds(sources: dict[str, Callable[[], Batches]], seconds: float) -> dict[str, float]:
    """Images per second of each source, each measured for `seconds` in all, in turns: the machine's moods hit all."""
    speeds: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(ROUNDS):
        for name, start in sources.items():
            speeds[name].append(images_per_second(start(), seconds / ROUNDS))
    return {name: statistics.median(values) for name, values in speeds.items()}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10, help="how long to measure each (default: 10)")
    parser.add_argument("--batch-size", type=int, default=500, help="pictures a batch (default: 500)")
    parser.add_argument("--synthetic", action="store_true", help="use procedurally drawn pictures")
    options = parser.parse_args(argv)
    if not (math.isfinite(options.seconds) and options.seconds > 0):
        raise UserError(f"--seconds must be a finite number above 0, not {options.seconds:g}")
    if not 1 <= options.batch_size <= PICTURES["train"]:
        raise UserError(f"--batch-size must be 1 to {PICTURES['train']}, not {options.batch_size}")

    split, _ = load_cifar100(default_data_dir(), use_synthetic=options.synthetic)
    std, mean = torch.std_mean(to_float(split.images[:10_000]), dim=(0, 2, 3))
    size, usual, fair = options.batch_size, "torchvision, flip + crop 4", "`utils.batches`, flip + crop 4"
    speeds = median_speeds({
        usual: lambda: torchvision_batches(split, size, mean, std),
        fair: lambda: our_batches(split, size, Augmentation(flip=True, crop=4), mean, std),
        "`utils.batches`, flip + crop 4 + cutout 8":
            lambda: our_batches(split, size, Augmentation(flip=True, crop=4, cutout=8), mean, std),
    }, options.seconds)

    print(f"Batches of {size}; {torch.get_num_threads()} PyTorch threads against {WORKERS} worker processes; "
          f"median of {ROUNDS} rounds.\n")
    print("| source of batches | images/s | ratio |\n|---|---:|---:|")
    for name, speed in speeds.items():
        print(f"| {name} | {speed:,.0f} | {speed / speeds[usual]:.1f} |")
    if speeds[fair] < REQUIRED_RATIO * speeds[usual]:
        print(f"\nbelow the required ratio of {REQUIRED_RATIO:g}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
