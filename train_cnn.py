"""Train a convolutional network on CIFAR-100, or check that it can memorise one batch.

    python train_cnn.py                        # the recipe `fast` on 45,000 pictures, measured on the other 5,000
    python train_cnn.py --recipe strong        # another recipe; any flag overrides a part of it
    python train_cnn.py --train-on-all --seeds 0,1,2    # the published runs, on all 50,000
    python train_cnn.py --overfit-batch        # the single-batch check, about a minute on two CPU cores
    python train_cnn.py --synthetic --epochs 3          # anywhere, at once: no data set, no network
"""

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

from engine import train_runs
from models import create_model
from overfit import LOSSES, overfit_batch
from settings import Script, Settings, exit_status, parse_command_line, setting, show
from utils import UserError


@dataclass(kw_only=True)
class CNNSettings(Settings):
    """What both scripts are told, the network and its arguments, and the resolution over time."""

    model: str = setting("convnet", "the network", choices=("convnet", "original_cnn", "resnet18", "wide_resnet"))
    widths: tuple[int, ...] = setting((64, 192, 384), "convnet: filters of each stage", low=1, high=4096,
                                      needs={"model": ("convnet",)})
    blocks: tuple[int, ...] = setting((1, 1, 2), "convnet: residual blocks of each stage", low=1, high=100,
                                      needs={"model": ("convnet",)})
    depth: int = setting(28, "wide_resnet: layers, 6n + 4", low=10, high=1000, needs={"model": ("wide_resnet",)})
    width: int = setting(10, "wide_resnet: width", low=1, high=100, needs={"model": ("wide_resnet",)})
    dropout: float = setting(0.0, "wide_resnet: share of activations zeroed between convolutions", low=0, high=0.99,
                             needs={"model": ("wide_resnet",)})
    sides: tuple[int, ...] = setting((32,), "pixels a side that pictures are scaled to: the training is divided into "
                                     "as many equal parts, and the last is what the network is used at",
                                     low=8, high=64, needs={"model": ("convnet", "resnet18", "wide_resnet")})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model == "convnet" and len(self.widths) != len(self.blocks):
            raise UserError(f"--widths and --blocks must each have a number for every stage, not {show(self.widths)} "
                            f"and {show(self.blocks)}")
        if self.model == "wide_resnet" and self.depth % 6 != 4:
            raise UserError(f"--depth must be 6n + 4, say 10, 16, 22 or 28, not {self.depth}")
        if self.model == "convnet" and min(self.sides) <= 2 ** len(self.widths):
            raise UserError(f"--sides must be above {2 ** len(self.widths)}, each of {len(self.widths)} stages "
                            f"halving the picture, not {min(self.sides)}")

    def side_in(self, epoch: int) -> int:
        return self.sides[epoch * len(self.sides) // self.epochs]


# Chosen on held-out training pictures; the search is in docs/experiments.md.
FAST: dict[str, Any] = dict(
    epochs=9, sides=(16, 20, 32), batch_size=250, optimizer="muon-sgd", lr=0.15, other_lr=0.03, momentum=0.6,
    warmup=0.1, label_smoothing=0.1, alternate=True, crop=4, jitter=0.2, refresh_norms=5000)
RECIPES: dict[str, dict[str, Any]] = {
    "fast": FAST,
    "strong": {**FAST, "epochs": 12, "widths": (128, 256, 512), "blocks": (2, 2, 2)},
    "sprint": {**FAST, "batch_size": 1000, "lr": 0.24, "other_lr": 0.06},  # for one GPU, not tuned
    "best": dict(model="wide_resnet", depth=28, width=10, epochs=80, batch_size=512, optimizer="sgd", lr=0.2,
                 weight_decay=5e-4, warmup=0.05, schedule="cosine", label_smoothing=0.1, crop=4, cutout=8,
                 mixup=0.2),  # for one GPU, not tuned
    "original": dict(model="original_cnn", epochs=65, batch_size=32, optimizer="sgd", lr=2.5e-4, schedule="constant",
                     flip=False),
}

OVERFIT = dict(epochs=100, batch_size=64, optimizer="adam", lr=1e-3, weight_decay=0.0, warmup=0.0, schedule="constant",
               label_smoothing=0.0, flip=False, alternate=False, crop=0, cutout=0, jitter=0.0, mixup=0.0,
               refresh_norms=0, precision="float32")


def build_model(settings: CNNSettings, num_outputs: int = 100) -> nn.Module:
    side = settings.side_in(settings.epochs - 1)  # the network is used as it was trained last
    arguments: dict[str, dict[str, Any]] = {
        "convnet": dict(widths=settings.widths, blocks=settings.blocks, side=side),
        "original_cnn": {},
        "resnet18": dict(side=side),
        "wide_resnet": dict(depth=settings.depth, width=settings.width, dropout=settings.dropout, side=side),
    }
    return create_model(settings.model, **arguments[settings.model], num_classes=num_outputs)


SCRIPT = Script("train_cnn.py", __doc__, CNNSettings, RECIPES, OVERFIT, build_model)


def main(argv: list[str] | None = None) -> int:
    command = parse_command_line(SCRIPT, LOSSES, argv)
    return overfit_batch(command) if command.overfit_batch else train_runs(command)


if __name__ == "__main__":
    sys.exit(exit_status(main))
