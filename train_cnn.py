"""Train a convolutional network on CIFAR-100, or check that it can memorize one batch.

    python train_cnn.py                                 # recipe `fast` on 45,000 images, validated on the other 5,000
    python train_cnn.py --recipe strong                 # another recipe; any flag overrides one of its settings
    python train_cnn.py --train-on-all --seeds 0,1,2    # the published runs, on all 50,000 training images
    python train_cnn.py --resume fast-s0                # continue an interrupted run from its last checkpoint
    python train_cnn.py --overfit-batch                 # the single-batch check: a minute on two CPU cores
    python train_cnn.py --synthetic --epochs 3          # runs anywhere: nothing to download
    torchrun --nproc_per_node=2 train_cnn.py            # in two processes: one per GPU, or one per CPU core
"""

import sys
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from common.command_line import exit_status
from models import create_model, default_arguments, list_models, models_with
from training.distributed import join_processes
from training.flags import parse_command_line
from training.loop import prepare, train
from training.overfit import overfit_batch
from training.run_folder import create_run, resume_run
from training.settings import NO_AUGMENTATION, Script, Settings, setting
from utils import load_cifar100

# ---- Settings and recipes -------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class CNNSettings(Settings):
    """The settings shared with train_mlp.py, plus the network, its arguments and its schedule of image sizes.

    A network gets each of these that it has an argument for; an empty one leaves it its own default.
    """

    model: str = setting("mirrornet", "the network", choices=tuple(name for name in list_models() if name != "mlp"))
    widths: tuple[int, ...] = setting((), "filters of each group (default: the network's own)", low=1, high=4096,
                                      needs={"model": models_with("widths")})
    inner: tuple[int, ...] = setting((), "filters inside the residual pair of each group (default: the network's own)",
                                     low=1, high=4096, needs={"model": models_with("inner")})
    sides: tuple[int, ...] = setting((32,), "sides, in pixels, that images are scaled to: each for an equal share of "
                                     "the epochs; the network keeps the last one", low=8, high=64,
                                     needs={"model": models_with("side")})

    def side_in(self, epoch: int) -> int:
        return self.sides[epoch * len(self.sides) // self.epochs]


# Chosen on held-out training images; the search is in docs/experiments.md.
FAST: dict[str, Any] = dict(
    epochs=13, sides=(20,) * 4 + (24,) * 4 + (32,) * 5, batch_size=256,
    optimizer="normuon-sgd", lr=0.12, other_lr=0.35, momentum=0.6, weight_decay=5e-4, warmup=0.25, label_smoothing=0.2,
    lr_floor=0.15, average=0.98, refresh_norms=5000, alternate=True, crop=3, jitter=0.2, corrupt=0.03,
)
STRONG: dict[str, Any] = {
    **FAST, "epochs": 20, "sides": (20,) * 6 + (24,) * 6 + (32,) * 8, "cutmix": 0.5, "average": 0.995,
    "widths": (112, 352, 1024), "inner": (112, 256, 704),
}
RECIPES: dict[str, dict[str, Any]] = {
    "fast": FAST,
    "strong": STRONG,
    "best": {**STRONG, "epochs": 23, "sides": (20,) * 7 + (24,) * 7 + (32,) * 9,
             "widths": (160, 512, 1472), "inner": (160, 384, 1024)},
    # The network and settings of the unfinished project that this one grew from.
    "original": dict(model="original_cnn", epochs=65, batch_size=32, optimizer="sgd", lr=2.5e-4, schedule="constant",
                     flip=False),
}

# The single-batch check repeats one unchanged batch: an epoch is one step.
OVERFIT: dict[str, Any] = dict(
    epochs=100, batch_size=64, optimizer="adam", lr=1e-3, weight_decay=0.0, warmup=0.0, schedule="constant",
    lr_floor=0.0, average=0.0, refresh_norms=0, label_smoothing=0.0, alternate=False, sides=(20,), precision="float32",
    **NO_AUGMENTATION,
)


# By recipe: what to try after it.
AFTER = {"fast": "python train_cnn.py --recipe strong", "strong": "python train_cnn.py --recipe best",
         "original": "python train_cnn.py"}


def network_arguments(settings: CNNSettings) -> dict[str, Any]:
    """All arguments of the network of `settings`, at its final image size."""
    given = {f.name: getattr(settings, f.name) for f in fields(CNNSettings) if not hasattr(Settings, f.name)}
    given["side"] = settings.side_in(settings.epochs - 1)
    return {name: default if given.get(name, ()) == () else given[name]
            for name, default in default_arguments(settings.model).items()}


def build_model(settings: CNNSettings, num_outputs: int = 100) -> nn.Module:
    """The network of `settings` with random weights."""
    return create_model(settings.model, **{**network_arguments(settings), "num_classes": num_outputs})


SCRIPT = Script("train_cnn.py", __doc__, CNNSettings, RECIPES, OVERFIT, build_model, AFTER)

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
