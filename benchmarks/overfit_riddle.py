"""What was it that ended at 4.2935 and oscillated every 150 epochs? The single-batch check over widths and rates.

    python benchmarks/overfit_riddle.py            # about ten minutes on two CPU cores; prints a Markdown table

For each setting and each reading of "the loss": the last and the lowest loss, how often it spiked in the second half of
the 1000 epochs and how far apart, and the pictures memorised. A spike is a stretch in which the loss is above three
times its median over the 50 epochs before it.
"""

import itertools
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's modules are one folder up

from hardware import prepare_device
from overfit import READINGS, run_reading
from settings import Parser, exit_status, show
from train_mlp import SCRIPT
from utils import Split, default_data_dir, load_cifar100

WIDTHS = ((512, 256, 128), (1024, 512, 256), (128, 64, 32))
RATES = (("adam", 1e-4), ("adam", 1e-3), ("adam", 1e-2), ("sgd", 1e-4), ("sgd", 1e-2))
WINDOW, FACTOR = 50, 3.0


def spikes(curve: np.ndarray) -> list[int]:
    """The steps at which a spike begins."""
    before = np.lib.stride_tricks.sliding_window_view(curve, WINDOW)[:-1]
    high = np.concatenate([np.zeros(WINDOW, dtype=bool), curve[WINDOW:] > FACTOR * np.median(before, axis=1)])
    return list(np.flatnonzero(high[1:] & ~high[:-1]) + 1)


def row(reading_name: str, widths: tuple[int, ...], optimizer: str, rate: float, split: Split) -> str:
    """One setting under one reading, as a row of the table."""
    overfit = {**SCRIPT.overfit, "widths": widths, "optimizer": optimizer, "lr": rate}
    settings = prepare_device(SCRIPT.recipe_settings("mlp", **overfit))
    outcome = run_reading(SCRIPT, settings, READINGS[reading_name], split, quiet=True)
    curve = np.array(outcome.curve)
    begins = [step for step in spikes(curve) if step >= len(curve) // 2] if np.isfinite(curve).all() else []
    spacing = f"{np.diff(begins).mean():.0f}" if len(begins) > 1 else "–"
    losses = " | ".join(f"{loss:.4g}" for loss in (curve[-1], curve.min(), curve[len(curve) // 2:].max()))
    return (f"| {reading_name} | {show(widths).replace(',', '-')} | {optimizer} | {rate:g} | {losses} | {len(begins)} "
            f"| {spacing} | {outcome.memorised} |")


def main() -> int:
    parser = Parser(prog="benchmarks/overfit_riddle.py", description=__doc__)
    parser.add_argument("--data-dir", default=default_data_dir(), metavar="FOLDER", help="folder of the data set")
    split, _ = load_cifar100(parser.parse_args().data_dir)
    print("| loss | widths | optimizer | rate | last | lowest | highest in the second half | spikes there "
          "| epochs between | memorised of 64 |\n|---|---|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    for reading_name, (optimizer, rate), widths in itertools.product(READINGS, RATES, WIDTHS):
        print(row(reading_name, widths, optimizer, rate, split), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
