"""Train a CNN on 40,000 training images and measure it on the other 10,000: one row of a search.

    python -m tools.trial                                       # the recipe `fast`
    python -m tools.trial --recipe strong --crop 2 --seed 1     # any setting of train_cnn.py
    python -m tools.trial --synthetic --epochs 1 --sides 16     # runs anywhere: nothing to download

It holds out the validation set and as many images more, so that the standard error is 0.5 points instead of 0.7. It
writes no file. docs/experiments.md has the rows.
"""

import sys
from dataclasses import replace

import torch
from torch import Tensor

import train_cnn
from common.command_line import exit_status
from common.errors import UserError
from common.files import RESULTS_DIR
from common.text import flops_text
from training.flags import parse_command_line
from training.loop import prepare, train
from training.run_folder import NullRun
from utils import add_noise, compute_logits, generator_for, load_cifar100, pixelate, to_float, validation_mask

HELD_OUT = 5  # one in five images of every class
NOISE = 0.05  # standard deviation, for images in [0, 1]
SCRIPT = replace(train_cnn.SCRIPT, file="tools.trial", description=__doc__)


def main(argv: list[str] | None = None) -> int:
    options = parse_command_line(SCRIPT, argv)
    settings = options.settings
    if {"train_on_all", "init_from", "tensorboard"} & options.given.keys() or options.overfit_batch or (
            options.seeds[1:] or options.name or options.resume or options.results_dir != RESULTS_DIR):
        raise UserError("a trial has one seed, holds out its own images and writes no file: leave out --seeds, "
                        "--train-on-all, --init-from, --overfit-batch, --name, --resume, --results-dir and "
                        "--tensorboard")
    everything, _ = load_cifar100(settings.data_folder, train_on_all=True, use_synthetic=settings.synthetic)
    is_held_out = validation_mask(everything, len(everything) // len(everything.fine_names) // HELD_OUT)
    train_split, held_out = everything[~is_held_out], everything[is_held_out]
    model, settings, _ = prepare(SCRIPT, settings, train_split, quiet=options.quiet)
    result = train(model, train_split, held_out, NullRun("trial", settings), quiet=options.quiet)

    def accuracy(images: Tensor, *, mirrored: bool = False) -> float:
        probabilities = compute_logits(model, images).softmax(1)
        if mirrored:
            probabilities += compute_logits(model, images.flip(3)).softmax(1)
        return 100 * float((probabilities.argmax(1) == held_out.fine_labels).float().mean())

    noise = torch.randn(held_out.images.shape, generator=generator_for("trial", "noise"))
    noisy = add_noise(to_float(held_out.images), NOISE, noise).mul(255).round().byte()
    coarse = pixelate(held_out.images.float(), 2).round().byte()
    print(f"{settings.dataset}: {len(train_split):,} to train on, {len(held_out):,} held out; seed {settings.seed}; "
          f"{flops_text(result['train_flops'])} FLOPs\n"
          f"held-out top-1 {result['val_acc']:.1f}% (training {result['train_acc']:.1f}%), "
          f"with noise of {NOISE} {accuracy(noisy):.1f}%, at 16 px {accuracy(coarse):.1f}%, "
          f"averaged over mirror images {accuracy(held_out.images, mirrored=True):.1f}%")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
