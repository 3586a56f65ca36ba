"""Train the multi-layer perceptron on CIFAR-100, or check that it can memorize one batch.

    python train_mlp.py --overfit-batch                 # the single-batch check: under a minute on two CPU cores
    python train_mlp.py                                 # the recipe on 45,000 images, validated on the other 5,000
    python train_mlp.py --train-on-all --seeds 0,1,2    # the published runs, on all 50,000 training images
    python train_mlp.py --resume mlp-s0                 # continue an interrupted run from its last checkpoint
    python train_mlp.py --synthetic --epochs 3          # runs anywhere: nothing to download
"""

import sys
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from common.command_line import exit_status
from common.errors import UserError
from models import create_model
from training.distributed import join_processes
from training.flags import parse_command_line
from training.loop import prepare, train
from training.overfit import overfit_batch
from training.run_folder import create_run, resume_run
from training.settings import NO_AUGMENTATION, Script, Settings, setting
from utils import load_cifar100

# ---- Settings and recipe --------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class MLPSettings(Settings):
    """The settings shared with train_cnn.py, plus the arguments of `models.mlp.MLP`."""

    widths: tuple[int, ...] = setting((2048, 1024, 512), "units of each hidden layer", low=1, high=65536)
    side: int = setting(32, "average images down to N x N pixels first", low=1, high=32)
    dropout: float = setting(0.0, "share of hidden activations zeroed in training", low=0, high=0.99)
    batch_norm: bool = setting(True, "batch normalization before each activation")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer in ("muon-sgd", "normuon-sgd"):
            raise UserError(f"--optimizer {self.optimizer} needs convolutions, and the MLP has none: "
                            "use --optimizer muon")


# Chosen on the validation set; the search is in docs/experiments.md.
RECIPES: dict[str, dict[str, Any]] = {
    "mlp": dict(
        epochs=60, batch_size=2000,
        optimizer="muon", lr=0.03, other_lr=3e-3, warmup=0.1, schedule="linear", label_smoothing=0.1,
        crop=4, mixup=0.8,
        widths=(2048, 1024, 512), side=16, dropout=0.0, batch_norm=True,
    ),
}

# The settings of the unfinished original, whose widths are unknown. An epoch of the check is one step.
OVERFIT: dict[str, Any] = dict(
    epochs=1000, batch_size=64, optimizer="adam", lr=1e-4, weight_decay=0.0, warmup=0.0, schedule="constant",
    label_smoothing=0.0, precision="float32", widths=(512, 256, 128), side=32, dropout=0.0, batch_norm=False,
    **NO_AUGMENTATION,
)


# By recipe: what to try after it.
AFTER = {"mlp": "python train_cnn.py"}


def build_model(settings: MLPSettings, num_outputs: int = 100) -> nn.Module:
    """The network of `settings` with random weights."""
    return create_model("mlp", widths=settings.widths, side=settings.side, dropout=settings.dropout,
                        batch_norm=settings.batch_norm, num_classes=num_outputs)


SCRIPT = Script("train_mlp.py", __doc__, MLPSettings, RECIPES, OVERFIT, build_model, AFTER)

# ---- The run --------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Train from the command line to the result; returns the exit status."""
    options = parse_command_line(SCRIPT, argv)
    if options.overfit_batch:
        return overfit_batch(SCRIPT, options)

    with join_processes(options.settings.device) as processes:  # a single process unless torchrun started more
        # A resumed run has the settings that it was started with.
        resumed = resume_run(SCRIPT, options, processes) if options.resume else None
        settings = resumed.settings if resumed else options.settings
        processes.require_batch(settings.batch_size)
        if not options.quiet:
            processes.say(f"loading {settings.dataset}")
        with processes.first_goes_ahead():  # it downloads the dataset if that is missing
            train_split, val_split = load_cifar100(
                settings.data_folder, train_on_all=settings.train_on_all, use_synthetic=settings.synthetic)

        # One run per seed. The first one settles what is "auto", so all of them share device, precision and threads.
        for seed in (settings.seed,) if resumed else options.seeds:
            settings = replace(settings, seed=seed)
            model, settings, reasons = prepare(SCRIPT, settings, train_split, processes, quiet=options.quiet)
            with resumed or create_run(SCRIPT, options, settings, processes) as run:
                if not run.finished:
                    run.print_start(len(train_split), reasons)
                    train(model, train_split, val_split, run, processes=processes, quiet=options.quiet)
                run.print_result()
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
