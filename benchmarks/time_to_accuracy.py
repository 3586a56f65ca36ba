"""Training cost of our recipes and of well-known ones, in seconds and FLOPs, all on this machine.

    python -m benchmarks.time_to_accuracy                              # in the faster precision
    python -m benchmarks.time_to_accuracy --precision float32
    python -m benchmarks.time_to_accuracy --figure accuracy-time.png   # also draw accuracy against time
    python -m benchmarks.time_to_accuracy --synthetic                  # without the dataset, at the same cost

We rebuilt the others from their published settings, without the parts that cost nothing (schedules) or nearly nothing
(the speedrun's lookahead, ResNet-18's warm-up epoch and rotations). NAVIER-STOKED computes all that its authors' code
does: our network has filters in mirrored pairs, and leaves out the rows that pooling drops and the padding of small
maps. We time real training steps (augmentation, forward, backward, optimizer) at every resolution that a recipe uses.
All contestants take turns over several rounds, and the median is multiplied by the recipe's epochs on 50,000 images.
Nothing is trained to the end: accuracies are the authors' own and, for our recipes, those in results/results.json.
Takes about seven minutes on two CPU cores.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import MobileNetV2

import train_cnn
import train_mlp
from common.command_line import Parser, exit_status, png_path
from common.errors import UserError
from common.files import RESULTS_DIR, read_json
from common.plotting import save_figure
from common.text import flops_text, machine_text
from evaluation.costs import OURS
from evaluation.figures import accuracy_time_figure
from models.layers import Norm, Resize, set_side
from models.mirrornet import KERNELS, LOGIT_SCALE
from models.resnet import BasicBlock, ResNet
from train_cnn import CNNSettings
from training.distributed import ALONE
from training.hardware import choose_precision, keep_freed_memory, machine_facts, prepare_device, synchronize
from training.loop import fit_and_place, forward_flops, loss_of, make_mix, training_step
from training.optimizers import make_optimizers, set_rates
from utils import Split, batches, default_data_dir, load_cifar100

IMAGES = 50_000
ROUNDS = 3
SECONDS_PER_TURN = 3.0
REFERENCE = "crisostomi/cifar100-speedrun"


@dataclass
class Contestant:
    """A recipe whose cost is measured.

    accuracies: by epochs, its published accuracy on the test set, in percent; seconds: of the training step, per
    image, by side, one value per round; flops: of one image's forward pass, by side.
    """

    name: str
    settings: Any
    model: nn.Module
    accuracies: dict[float, float | None]
    seconds: dict[int, list[float]] = field(default_factory=dict)
    flops: dict[int, int] = field(default_factory=dict)

    @property
    def sides(self) -> tuple[int, ...]:
        """The sides, in pixels, of the images in equal parts of the training."""
        return getattr(self.settings, "sides", None) or (self.settings.side,)

    def total(self, epochs: float, per_image: Callable[[int], float]) -> float:
        """The cost of a whole training, in which an image of `side` pixels a side costs `per_image(side)`."""
        return IMAGES * epochs / len(self.sides) * sum(map(per_image, self.sides))

    def total_flops(self, epochs: float) -> float:
        return 3 * self.total(epochs, self.flops.__getitem__)

    def total_seconds(self, epochs: float) -> float:
        return self.total(epochs, lambda side: statistics.median(self.seconds[side]))


# ---- The others -----------------------------------------------------------------------------------------------------


class _ResNetDBlock(BasicBlock):
    """A basic block whose shortcut averages before it projects (ResNet-D: He et al. 2018, arXiv 1812.01187)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(inputs, outputs, stride)
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.AvgPool2d(stride, ceil_mode=True),
                                          nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))


def speedrun_model() -> nn.Module:
    """crisostomi/cifar100-speedrun's network: widths 64-128-256, two blocks each."""
    blocks: list[nn.Module] = [nn.BatchNorm2d(64), nn.ReLU(), _ResNetDBlock(64, 64, 1), _ResNetDBlock(64, 64, 1)]
    for inputs, outputs in ((64, 128), (128, 256)):
        blocks += [_ResNetDBlock(inputs, outputs, 2), _ResNetDBlock(outputs, outputs, 1)]
    return ResNet(64, nn.Sequential(*blocks), 256, 32, 100)


class _NavierGroup(nn.Module):
    """Our group (models/mirrornet.py) with ordinary filters, all rows that pooling drops, and all padding."""

    def __init__(self, inputs: int, outputs: int, middle: int, first: int, pair: tuple[int, int]) -> None:
        super().__init__()

        def convolution(before: int, after: int, size: int) -> list[nn.Module]:
            return [nn.Conv2d(before, after, size, padding=size // 2, bias=False), Norm(after), nn.SiLU()]

        self.padding = 2 * ((first - 1) // 2, first // 2)
        self.first = nn.Sequential(nn.Conv2d(inputs, outputs, first, bias=False), nn.MaxPool2d(2), Norm(outputs),
                                   nn.SiLU())
        self.pair = nn.Sequential(*convolution(outputs, middle, pair[0]), *convolution(middle, outputs, pair[1]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(F.pad(x, self.padding))
        return x + self.pair(x)


class NavierNet(nn.Module):
    """NAVIER-STOKED's network (github.com/AIDDA-Institute/CIFAR-100-speedrun): ours, with ordinary filters."""

    def __init__(self) -> None:
        super().__init__()
        self.resize, self.whiten = Resize(32), nn.Conv2d(3, 24, 2, bias=False).requires_grad_(False)
        shapes = zip((24, 64, 256), (64, 256, 768), (64, 192, 512), KERNELS, strict=True)
        self.groups = nn.Sequential(*(_NavierGroup(inputs, outputs, middle, *sizes)
                                      for inputs, outputs, middle, sizes in shapes))
        self.head = nn.Linear(768, 100, bias=False)

    def fit_inputs(self, images: Tensor) -> None:
        """Do nothing: the cost does not depend on the filters of the whitening."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.groups(F.silu(self.whiten(self.resize(images))))
        return self.head(x.amax((2, 3)) + x.mean((2, 3))) * LOGIT_SCALE


def mobilenet_v2() -> nn.Module:
    """weiaicunzai/pytorch-cifar100's MobileNetV2 (arXiv 1801.04381): ImageNet's, with two strides of 1 instead of 2."""
    stages = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 1], [6, 320, 1, 1]]
    model = MobileNetV2(num_classes=100, inverted_residual_setting=stages)
    model.features[0][0].stride = (1, 1)
    model.fit_inputs, model.head = (lambda images: None), model.classifier  # the training loop expects both
    return model


def published_rows() -> list[dict[str, Any]]:
    """The rows of results.json. Raises UserError if they lack recipe and accuracy."""
    path = RESULTS_DIR / "results.json"
    try:
        return [row for row in read_json(path) if row["recipe"] and float(row["top1"]["mean"])]
    except (TypeError, ValueError, LookupError) as error:
        raise UserError(f"{path} is damaged: run python evaluate.py to write it again") from error


def contestants() -> list[Contestant]:
    """Our recipes, and four well-known ones as their authors describe them."""
    known = {row["recipe"]: float(row["top1"]["mean"]) for row in published_rows()}
    ours = [(script, script.recipe_settings(name)) for script in (train_cnn.SCRIPT, train_mlp.SCRIPT)
            for name in script.recipes]
    speedrun = CNNSettings(epochs=7, sides=(18, 32), batch_size=1024, optimizer="muon-sgd", lr=0.055, other_lr=0.02,
                           label_smoothing=0.15, crop=3)
    # 15% of the steps at 20 pixels, 35% at 24, the rest at 32.
    navier = CNNSettings(sides=(20,) * 3 + (24,) * 7 + (32,) * 10, batch_size=1024, optimizer="muon-sgd", lr=0.18,
                         other_lr=1.38, momentum=0.6, weight_decay=5e-4, label_smoothing=0.25, alternate=True, crop=2)
    usual = CNNSettings(model="resnet18", epochs=200, batch_size=128, optimizer="sgd", lr=0.1, weight_decay=5e-4,
                        crop=4)
    return [
        *(Contestant(f"{OURS}{settings.recipe}", settings, script.build_model(settings, 100),
                     {settings.epochs: known.get(settings.recipe)}) for script, settings in ours),
        Contestant("NAVIER-STOKED", navier, NavierNet(), {8.75: 75.19, 11.5: 76.2}),
        Contestant(REFERENCE, speedrun, speedrun_model(), {7: 70.7}),
        Contestant("weiaicunzai/pytorch-cifar100, ResNet-18", usual, train_cnn.build_model(usual), {200: 75.6}),
        Contestant("weiaicunzai/pytorch-cifar100, MobileNetV2", usual, mobilenet_v2(), {200: 68.1}),
    ]


# ---- Measuring ------------------------------------------------------------------------------------------------------


def training_steps(contestant: Contestant, split: Split) -> Iterator[int]:
    """Train endlessly and yield the number of images in each step. The model's side may change between steps."""
    settings = contestant.settings
    optimizers = make_optimizers(contestant.model, settings)
    set_rates(optimizers, settings, settings.warmup)
    contestant.model.train()
    mix = make_mix(settings, num_classes=100)
    for epoch in itertools.count():
        for images, labels in batches(split, settings.batch_size, settings.augmentation, seed=0, epoch=epoch):
            images, labels = mix(images, labels, 0.0)  # as at the start, where CutMix mixes too
            training_step(contestant.model, optimizers, images, labels, loss_of(settings), settings.precision)
            yield len(labels)


def time_turn(contestant: Contestant, steps: Iterator[int], side: int) -> float:
    """Seconds per image at this side, over a few seconds of training after one step to warm up."""
    set_side(contestant.model, side)
    next(steps)
    synchronize(contestant.settings.device)
    start, images, now = time.perf_counter(), 0, 0.0
    while now < SECONDS_PER_TURN:
        images += next(steps)
        synchronize(contestant.settings.device)
        now = time.perf_counter() - start
    return now / images


def measure(everyone: list[Contestant], split: Split, precision: str, device: str) -> None:
    """Measure the seconds and FLOPs of every contestant."""
    settings = prepare_device(replace(everyone[0].settings, precision=precision, device=device))
    keep_freed_memory(settings.device)  # as a training does
    for contestant in everyone:
        contestant.settings = replace(contestant.settings, device=settings.device, threads=settings.threads)
        contestant.model = fit_and_place(contestant.model, split, contestant.settings)
    precision = choose_precision(everyone[0].model, split, settings, ALONE)[0].precision
    steps = {}
    for contestant in everyone:
        contestant.settings = replace(contestant.settings, precision=precision)
        steps[contestant.name] = training_steps(contestant, split)
    for round_number in range(ROUNDS):
        for contestant in everyone:
            for side in dict.fromkeys(contestant.sides):
                set_side(contestant.model, side)
                contestant.flops[side] = forward_flops(contestant.model)
                seconds = time_turn(contestant, steps[contestant.name], side)
                contestant.seconds.setdefault(side, []).append(seconds)
        print(f"finished round {round_number + 1} of {ROUNDS}", file=sys.stderr, flush=True)


def table(everyone: list[Contestant]) -> str:
    """The costs as a Markdown table, with ratios to the reference."""
    reference = next(contestant for contestant in everyone if contestant.name == REFERENCE)
    (unit,) = (reference.total_seconds(epochs) for epochs in reference.accuracies)
    lines = ["| recipe | epochs | training FLOPs | GFLOP/s | ms per image, by side | training time "
             "| relative to speedrun | test accuracy (%) |", "|---|---:|---:|---:|---|---:|---:|---:|"]
    rows = [(one.total_seconds(epochs), epochs, accuracy, one)
            for one in everyone for epochs, accuracy in one.accuracies.items()]
    for seconds, epochs, accuracy, one in sorted(rows, key=lambda row: row[0]):
        sides = ", ".join(f"{1000 * statistics.median(times):.2f} at {side}"
                          for side, times in sorted(one.seconds.items()))
        flops, minutes = one.total_flops(epochs), seconds / 60
        name = one.name if len(one.accuracies) == 1 else f"{one.name} ({epochs:g} epochs)"
        time_needed = f"{minutes:.1f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
        lines.append(f"| {name} | {epochs:g} | {flops_text(flops)} | {flops / seconds / 1e9:.0f} | {sides} "
                     f"| {time_needed} | {seconds / unit:.2g} | {'' if accuracy is None else f'{accuracy:.1f}'} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.time_to_accuracy", description=__doc__)
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
                        help="arithmetic of the training steps; on a CPU, auto takes the faster one")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to train")
    parser.add_argument("--figure", type=png_path, metavar="FILE",
                        help="draw accuracy against time into this PNG file")
    parser.add_data_dir()
    parser.add_synthetic()
    options = parser.parse_args(argv)
    split, _ = load_cifar100(options.data_dir or default_data_dir(), use_synthetic=options.synthetic)
    torch.manual_seed(0)
    everyone = contestants()
    measure(everyone, split, options.precision, options.device)
    settings = everyone[0].settings
    machine = machine_text(machine_facts(settings.device), settings.precision)
    text = f"{machine}\n\n{table(everyone)}"
    print(text)
    if options.figure:
        save_figure(accuracy_time_figure(published_rows(), text), options.figure)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
