"""Train the multi-layer perceptron on CIFAR-100, or check that it can memorise one batch.

    python train_mlp.py --overfit-batch        # the single-batch check, under a minute on two CPU cores
    python train_mlp.py                        # the recipe, on 45,000 pictures, measured on the other 5,000
    python train_mlp.py --train-on-all --seeds 0,1,2    # the published runs, on all 50,000
    python train_mlp.py --synthetic --epochs 3          # anywhere, at once: no data set, no network
"""

import sys
from dataclasses import dataclass

from torch import nn

from engine import train_runs
from models import create_model
from overfit import LOSSES, overfit_batch
from settings import Script, Settings, exit_status, parse_command_line, setting
from utils import UserError


@dataclass(kw_only=True)
class MLPSettings(Settings):
    """What both scripts are told, and the arguments of `models.MLP`."""

    widths: tuple[int, ...] = setting((2048, 1024, 512), "units of each hidden layer", low=1, high=65536)
    side: int = setting(32, "average pictures down to so many pixels a side first", low=1, high=32)
    dropout: float = setting(0.0, "share of hidden activations zeroed while training", low=0, high=0.99)
    batch_norm: bool = setting(True, "batch normalisation before each activation")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer == "muon-sgd":
            raise UserError("--optimizer muon-sgd is for networks with convolutions: this one has no filters")


# Chosen on the validation split; the search is in docs/experiments.md.
RECIPES = {
    "mlp": dict(epochs=60, batch_size=2000, optimizer="muon", lr=0.03, other_lr=3e-3, warmup=0.1, schedule="linear",
                label_smoothing=0.1, crop=4, mixup=0.8,
                widths=(2048, 1024, 512), side=16, dropout=0.0, batch_norm=True),
}

# The unfinished original's settings; its widths are not known.
OVERFIT = dict(epochs=1000, batch_size=64, optimizer="adam", lr=1e-4, weight_decay=0.0, warmup=0.0, schedule="constant",
               label_smoothing=0.0, flip=False, crop=0, mixup=0.0, precision="float32",
               widths=(512, 256, 128), side=32, dropout=0.0, batch_norm=False)


def build_model(settings: MLPSettings, num_outputs: int = 100) -> nn.Module:
    return create_model("mlp", widths=settings.widths, side=settings.side, dropout=settings.dropout,
                        batch_norm=settings.batch_norm, num_classes=num_outputs)


SCRIPT = Script("train_mlp.py", __doc__, MLPSettings, RECIPES, OVERFIT, build_model)


def main(argv: list[str] | None = None) -> int:
    command = parse_command_line(SCRIPT, LOSSES, argv)
    return overfit_batch(command) if command.overfit_batch else train_runs(command)


if __name__ == "__main__":
    sys.exit(exit_status(main))
