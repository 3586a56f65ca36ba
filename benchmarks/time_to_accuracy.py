"""What a training costs on this machine: our recipes beside well-known ones, in seconds and in FLOPs.

    python benchmarks/time_to_accuracy.py                          # in the precision that --precision auto takes
    python benchmarks/time_to_accuracy.py --precision float32
    python benchmarks/time_to_accuracy.py --figure accuracy-time.png           # draw it too
    python benchmarks/time_to_accuracy.py --synthetic              # without the data set: the cost is the same

The others are rebuilt from their published settings, less what costs them nothing (schedules) or nearly nothing (the
speedrun's lookahead, ResNet-18's warm-up epoch and rotations). Real training steps (augmentation, forward, backward,
optimizer) are timed at every resolution that a recipe uses; all contestants take turns over several rounds, the median
counts and is multiplied out to the recipe's epochs on 50,000 pictures. Nothing is trained to its end here: accuracies
are their authors' and, for ours, those of results/results.json. About five minutes on two CPU cores.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from torchvision.models import MobileNetV2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is there, the project's is not

from engine import fit_and_place, forward_flops, training_step
from evaluation.figures import accuracy_against
from hardware import choose_precision, machine_facts, prepare_device, wait_for
from models.layers import set_side
from models.resnet import BasicBlock, ResNet
from optimizers import make_optimizers, set_rates
from runs import read_json, save_figure
from settings import RESULTS_DIR, Parser, exit_status
from train_cnn import SCRIPT, CNNSettings, build_model
from utils import Split, UserError, batches, default_data_dir, load_cifar100

PICTURES = 50_000
ROUNDS = 3
SECONDS_A_TURN = 3.0
OURS = {"cpu": ("fast", "strong", "original"), "cuda": ("sprint", "best")}  # what is meant for which device
REFERENCE = "crisostomi/cifar100-speedrun"


@dataclass
class Contestant:
    """A recipe whose cost is measured. `accuracy` is the test top-1 in percent that it is known for."""

    name: str
    settings: CNNSettings
    model: nn.Module
    accuracy: float | None
    seconds: dict[int, list[float]] = field(default_factory=dict)  # of a picture's step by side, a value a round
    flops: dict[int, int] = field(default_factory=dict)  # of a picture's forward pass by side

    def total(self, per_picture: Callable[[int], float]) -> float:
        """What a whole training costs, where a picture at a side of so many pixels costs `per_picture(side)`."""
        parts = self.settings.sides
        return PICTURES * self.settings.epochs / len(parts) * sum(map(per_picture, parts))

    @property
    def total_flops(self) -> float:
        return 3 * self.total(self.flops.__getitem__)

    @property
    def total_seconds(self) -> float:
        return self.total(lambda side: statistics.median(self.seconds[side]))


# ---------------------------------------------------------------------------------------------------------------------
# The others
# ---------------------------------------------------------------------------------------------------------------------


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


def mobilenet_v2() -> nn.Module:
    """weiaicunzai/pytorch-cifar100's MobileNetV2 (arXiv 1801.04381): ImageNet's with two strides fewer."""
    stages = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 1], [6, 320, 1, 1]]
    model = MobileNetV2(num_classes=100, inverted_residual_setting=stages)
    model.features[0][0].stride = (1, 1)
    model.fit_inputs, model.head = (lambda images: None), model.classifier  # as the training loop calls them
    return model


def contestants(device: str) -> list[Contestant]:
    """Our recipes, and three well-known ones as their authors describe them."""
    path = RESULTS_DIR / "results.json"
    try:
        known = {row["recipe"]: float(row["top1"]["mean"]) for row in read_json(path)}
    except (TypeError, ValueError, LookupError) as error:
        raise UserError(f"{path} is damaged: make it again with python evaluate.py") from error
    ours = [(name, SCRIPT.recipe_settings(name)) for name in OURS["cuda" if device == "cuda" else "cpu"]]
    speedrun = CNNSettings(epochs=7, sides=(18, 32), batch_size=1024, optimizer="muon-sgd", lr=0.055, other_lr=0.02,
                           label_smoothing=0.15, crop=3)
    usual = CNNSettings(model="resnet18", epochs=200, batch_size=128, optimizer="sgd", lr=0.1, weight_decay=5e-4,
                        crop=4)
    return [
        *(Contestant(f"--recipe {name}", settings, build_model(settings), known.get(name))
          for name, settings in ours),
        Contestant(REFERENCE, speedrun, speedrun_model(), 70.7),
        Contestant("weiaicunzai/pytorch-cifar100, ResNet-18", usual, build_model(usual), 75.6),
        Contestant("weiaicunzai/pytorch-cifar100, MobileNetV2", usual, mobilenet_v2(), 68.1),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def training_steps(contestant: Contestant, split: Split) -> Iterator[int]:
    """Train for ever; yields the number of pictures of each step. The model's side may be changed between steps."""
    settings = contestant.settings
    optimizers = make_optimizers(contestant.model, settings)
    set_rates(optimizers, settings, settings.warmup)
    contestant.model.train()
    for epoch in itertools.count():
        for images, labels in batches(split, settings.batch_size, settings.augmentation, seed=0, epoch=epoch):
            training_step(contestant.model, optimizers, images, labels, settings)
            yield len(labels)


def time_turn(contestant: Contestant, steps: Iterator[int], side: int) -> float:
    """Seconds a picture at this side, over a few seconds of training, after one step to warm up."""
    set_side(contestant.model, side)
    next(steps)
    wait_for(contestant.settings.device)
    start, pictures, now = time.perf_counter(), 0, 0.0
    while now < SECONDS_A_TURN:
        pictures += next(steps)
        wait_for(contestant.settings.device)
        now = time.perf_counter() - start
    return now / pictures


def measure(everyone: list[Contestant], split: Split, precision: str, device: str) -> None:
    """Fill in every contestant's seconds and FLOPs."""
    settings = prepare_device(replace(everyone[0].settings, precision=precision, device=device))
    for contestant in everyone:
        contestant.settings = replace(contestant.settings, device=settings.device, threads=settings.threads)
        contestant.model = fit_and_place(contestant.model, split, contestant.settings)
    precision = choose_precision(everyone[0].model, split, settings).precision
    steps = {}
    for contestant in everyone:
        contestant.settings = replace(contestant.settings, precision=precision)
        steps[contestant.name] = training_steps(contestant, split)
    for round_number in range(ROUNDS):
        for contestant in everyone:
            for side in dict.fromkeys(contestant.settings.sides):
                set_side(contestant.model, side)
                contestant.flops[side] = forward_flops(contestant.model)
                seconds = time_turn(contestant, steps[contestant.name], side)
                contestant.seconds.setdefault(side, []).append(seconds)
        print(f"round {round_number + 1} of {ROUNDS} is done", file=sys.stderr, flush=True)


def table(everyone: list[Contestant]) -> str:
    """The costs as a Markdown table, with ratios to the reference."""
    reference = next(contestant for contestant in everyone if contestant.name == REFERENCE)
    lines = ["| recipe | epochs | training FLOPs | ms an image, by side | training | against the speedrun "
             "| test top-1 |", "|---|---:|---:|---|---:|---:|---:|"]
    for contestant in sorted(everyone, key=lambda contestant: contestant.total_seconds):
        sides = ", ".join(f"{1000 * statistics.median(contestant.seconds[side]):.2f} at {side}"
                          for side in sorted(contestant.seconds))
        minutes = contestant.total_seconds / 60
        accuracy = "" if contestant.accuracy is None else f"{contestant.accuracy:.1f}"
        time_needed = f"{minutes:.1f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
        lines.append(f"| {contestant.name} | {contestant.settings.epochs} | {contestant.total_flops:.1e} | {sides} "
                     f"| {time_needed} | {contestant.total_seconds / reference.total_seconds:.2g} "
                     f"| {accuracy} |".replace("e+", "e"))
    return "\n".join(lines)


def draw(everyone: list[Contestant], machine: str):
    """Accuracy against training time, ours and the others', as a matplotlib Figure."""
    known = [contestant for contestant in everyone if contestant.accuracy is not None]
    series = {label: {contestant.name.replace("/pytorch-cifar100, ", "\n"):
                      (contestant.total_seconds / 60, contestant.accuracy)
                      for contestant in known if contestant.name.startswith("--recipe") is ours}
              for label, ours in (("ours, measured", True), ("published", False))}
    return accuracy_against(series, f"minutes of training on {machine}",
                            "CIFAR-100: accuracy against training time, all timed on the same machine")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="benchmarks/time_to_accuracy.py", description=__doc__)
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    parser.add_argument("--synthetic", action="store_true", help="on procedurally drawn pictures")
    parser.add_argument("--data-dir", default=default_data_dir(), metavar="FOLDER", help="folder of the data set")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw accuracy against time into this PNG")
    options = parser.parse_args(argv)
    if options.figure and (options.figure.suffix != ".png" or not options.figure.parent.is_dir()):
        raise UserError(f"--figure must be a file in a folder that is there, with a name that ends in .png, "
                        f"not {options.figure}")
    split, _ = load_cifar100(options.data_dir, use_synthetic=options.synthetic)
    torch.manual_seed(0)
    device = prepare_device(CNNSettings(device=options.device)).device
    everyone = contestants(device)
    measure(everyone, split, options.precision, device)
    settings = everyone[0].settings
    facts = machine_facts(settings.device)
    machine = (f"{facts['processor']}, {facts['threads']} threads, {settings.precision} "
               f"({facts[f'conv3x3_{settings.precision}_gflops']:.0f} GFLOP/s in one 3x3 convolution)")
    print(f"{machine}\n\n{table(everyone)}")
    if options.figure:
        save_figure(draw(everyone, machine), options.figure)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
