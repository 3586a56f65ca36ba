"""The single-batch check under other conditions: which loss ends at 4.2935 and oscillates every 150 steps?

    python -m benchmarks.overfit_riddle            # a few minutes on two CPU cores; prints a Markdown table

We change one thing at a time from the original's settings (Adam, 1e-4, batch 64, 1000 steps): the loss, the range of
the inputs (normalized; in [0, 1], as from torchvision's ToTensor; 0 to 255), the optimizer and its learning rate, the
widths, the seed. A spike is a stretch in which the loss is above three times its median over the 50 steps before it.
Spikes are counted in the second half.
"""

import sys
from typing import Any

import numpy as np
import torch

from common.command_line import Parser, exit_status
from train_mlp import SCRIPT
from training.hardware import prepare_device
from training.loop import INPUT_SAMPLE
from training.losses import LOSSES
from training.overfit import memorize
from training.settings import show
from utils import Augmentation, Split, batches, default_data_dir, derived_seed, load_cifar100, to_float

SCALES = {"normalized": 1.0, "[0, 1]": 1.0, "0 to 255": 255.0}
ORIGINAL: dict[str, Any] = {"inputs": "[0, 1]", "optimizer": "adam", "lr": 1e-4, "widths": (512, 256, 128), "seed": 0}
SUSPECTS = ("mse-index", "softmax-twice")
CASES: list[dict[str, Any]] = [
    *({**ORIGINAL, "loss": loss, "inputs": inputs} for inputs in SCALES for loss in LOSSES),
    *({**ORIGINAL, "loss": loss, "optimizer": optimizer, "lr": lr} for loss in ("cross-entropy", *SUSPECTS)
      for optimizer, lr in (("adam", 1e-5), ("adam", 1e-3), ("sgd", 1e-4), ("sgd", 1e-2))),
    *({**ORIGINAL, "loss": loss, "widths": widths}
      for loss in SUSPECTS for widths in ((128, 64, 32), (1024, 512, 256))),
    *({**ORIGINAL, "loss": loss, "seed": seed} for loss in SUSPECTS for seed in (1, 2)),
]
WINDOW, FACTOR = 50, 3.0


def spikes(curve: np.ndarray) -> list[int]:
    """The steps at which a spike begins."""
    before = np.lib.stride_tricks.sliding_window_view(curve, WINDOW)[:-1]
    high = np.concatenate([np.zeros(WINDOW, dtype=bool), curve[WINDOW:] > FACTOR * np.median(before, axis=1)])
    return list(np.flatnonzero(high[1:] & ~high[:-1]) + 1)


def row(split: Split, loss: str, inputs: str, optimizer: str, lr: float, widths: tuple[int, ...], seed: int) -> str:
    """One case as a row of the table."""
    changes = {**SCRIPT.overfit, "optimizer": optimizer, "lr": lr, "widths": widths, "seed": seed}
    settings = prepare_device(SCRIPT.recipe_settings("mlp", **changes, device="cpu"))
    images, labels = next(batches(split, settings.batch_size, Augmentation(), seed=seed, epoch=0))
    torch.manual_seed(derived_seed("init", seed))
    model: Any = SCRIPT.build_model(settings, LOSSES[loss].num_outputs)
    if inputs == "normalized":  # until it is fitted, the model's normalization does nothing
        model.fit_inputs(to_float(split.images[:INPUT_SAMPLE]))
    outcome = memorize(model, images * SCALES[inputs], labels, LOSSES[loss], settings, quiet=True)
    curve = np.array(outcome.curve)
    late = curve[len(curve) // 2:]
    begins = [step for step in spikes(curve) if step >= len(curve) // 2] if np.isfinite(curve).all() else []
    gap = f"{np.diff(begins).mean():.0f}" if len(begins) > 1 else "–"
    losses = " | ".join(f"{value:.4g}" for value in (curve[-1], curve.min(), late.max()))
    return (f"| {loss} | {inputs} | {optimizer} {lr:g} | {show(widths).replace(',', '-')} | {seed} | {losses} "
            f"| {len(begins)} | {gap} | {outcome.memorized} |")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.overfit_riddle", description=__doc__)
    parser.add_data_dir()
    split, _ = load_cifar100(parser.parse_args(argv).data_dir or default_data_dir())
    print("| loss | inputs | optimizer | widths | seed | last | lowest | highest in 2nd half | spikes in 2nd half "
          "| steps between spikes | memorized (of 64) |", flush=True)
    print("|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    for case in CASES:
        print(row(split, **case), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
