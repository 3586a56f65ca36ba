"""The single-batch check under other conditions: which loss oscillates every 150 epochs and ends at 4.2935?

    python -m benchmarks.overfit_riddle                                    # tables of the published curves
    python -m benchmarks.overfit_riddle --figure docs/figures/riddle.png   # and the figure
    python -m benchmarks.overfit_riddle --folder new                       # train again: up to an hour on one core

A case is one training on one batch of 64 images. We start from the original's settings (Adam, 1e-4, 1000 epochs of
one step) and vary its loss, the scale of its inputs (in [0, 1], as from torchvision's ToTensor; 0 to 255; normalized),
its optimizer, its widths and its seed. Every case has one thread. Its curve is saved in overfit_riddle.npz when it is
done; a case that is in there already is not trained again, so you can stop at any time and start again. At the end
the tables are written next to it, as overfit_riddle.md (all cases), overfit_riddle_shapes.md (a row per shape) and
overfit_riddle_odds.md.

A spike is a stretch in which the loss is more than MIN_HEIGHT above its level, the median of the WINDOW epochs before.
Stretches whose peaks are less than APART epochs apart are one spike. Its height is that of its peak over the level
before it, its period the distance to the next peak. A crossing is a step that takes the loss past 4.2935, in either
direction; every curve that ends below has one on its way down. An epoch is near 4.2935 if its loss differs from it by
less than NEAR. Spikes and epochs are counted in the second half, which has 501 losses.
"""

import itertools
import sys
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

from common.command_line import Parser, absolute_path, exit_status, png_path
from common.errors import UserError
from common.files import RESULTS_DIR, replacing, write_text
from common.plotting import BLUE, ORANGE, PINK, SKY, new_figure, save_figure
from train_mlp import SCRIPT
from training.hardware import prepare_device
from training.loop import INPUT_SAMPLE
from training.losses import LOSSES
from training.overfit import memorize
from training.settings import show
from utils import Augmentation, Split, batches, default_data_dir, derived_seed, load_cifar100, to_float

TARGET = 4.2935225  # the last training loss that the unfinished project reported
MIN_HEIGHT = 0.25  # of a spike: the squared error of an output that is off by half a class and rounds to the wrong one
WINDOW, APART = 50, 40  # epochs
FAILED = 1.0  # an MSE above this is that of a run that has not memorized its images: they are a class off
NEAR = 1.0  # a loss that differs from TARGET by less is near it
SCALES = {"[0, 1]": 1.0, "0 to 255": 255.0, "normalized": 1.0}


@dataclass(frozen=True)
class Case:
    """One training on one batch. The defaults are the original's settings, as far as they are known."""

    loss: str = "mse-index"
    widths: tuple[int, ...] = (512, 256, 128)
    inputs: str = "[0, 1]"
    optimizer: str = "adam"
    lr: float = 1e-4
    seed: int = 0

    @property
    def shape(self) -> str:
        return show(self.widths).replace(",", "-")

    @property
    def condition(self) -> str:
        """All but shape and seed, as a row of the tables begins."""
        return f"{self.loss} | {self.inputs} | {self.optimizer} {self.lr:g}"

    @property
    def name(self) -> str:
        return f"{self.condition} | {self.shape} | {self.seed}"


NARROW, WIDE, WIDEST = (512, 256, 128), (1024, 512, 256), (2048, 1024, 512)
SHAPES = ((128, 64, 32), (256, 128, 64), NARROW, WIDE, (1536, 768, 384), WIDEST, (3072, 1024, 256),
          (64, 64, 64), (256, 256, 256), (512, 512, 512))
SEEDS = (0, 1, 2)
CASES = [
    *(Case(widths=widths, seed=seed) for widths in SHAPES for seed in SEEDS),
    *(Case(widths=widths, inputs="0 to 255") for widths in ((128, 64, 32), NARROW, WIDE, (512, 512, 512))),
    *(Case(widths=widths, inputs="normalized") for widths in (NARROW, WIDE)),
    *(Case(widths=widths, lr=lr) for widths in (NARROW, WIDE) for lr in (1e-5, 1e-3)),
    *(Case(optimizer="sgd", lr=lr) for lr in (1e-4, 1e-2)),
    *(Case("softmax-twice", seed=seed) for seed in SEEDS), Case("softmax-twice", WIDE), Case("softmax-twice", lr=1e-3),
    *(Case("cross-entropy", lr=lr) for lr in (1e-5, 1e-4, 1e-3)), Case("cross-entropy", WIDE),
    Case("mse-onehot"),
]


@dataclass(frozen=True)
class Curve:
    """A case's loss before each step and after the last, float32 [epochs + 1], and how many images were memorized."""

    losses: np.ndarray
    memorized: int

    @property
    def half(self) -> int:
        """The epoch at which the second half begins."""
        return len(self.losses) // 2

    def late_spikes(self) -> list["Spike"]:
        return [spike for spike in spikes(self.losses) if spike.epoch >= self.half]

    def gaps(self) -> list[int]:
        """Epochs from each late spike to the next."""
        return [after.epoch - before.epoch for before, after in itertools.pairwise(self.late_spikes())]

    def epochs_failed(self) -> int:
        return int((self.losses[self.half:] > FAILED).sum())

    def epochs_near(self) -> int:
        return int((abs(self.losses[self.half:] - TARGET) < NEAR).sum())


@dataclass(frozen=True)
class Spike:
    """The epoch of its peak, the level before it and the height of its peak over that level."""

    epoch: int
    level: float
    height: float


def spikes(losses: np.ndarray) -> list[Spike]:
    """The spikes of a curve, float [epochs], in order; none before epoch WINDOW, or if the loss is not finite."""
    if not np.isfinite(losses).all() or len(losses) <= WINDOW:
        return []
    levels = np.median(np.lib.stride_tricks.sliding_window_view(losses, WINDOW)[:-1], axis=1)
    high = np.flatnonzero(losses[WINDOW:] - levels > MIN_HEIGHT) + WINDOW
    stretches = np.split(high, np.flatnonzero(np.diff(high) > 1) + 1)
    found: list[Spike] = []
    for stretch in filter(len, stretches):
        peak = int(stretch[losses[stretch].argmax()])
        level = float(levels[stretch[0] - WINDOW])
        if found and peak - found[-1].epoch < APART:
            level = found[-1].level
            peak = max(peak, found.pop().epoch, key=losses.__getitem__)
        found.append(Spike(peak, level, float(losses[peak]) - level))
    return found


def crossings(losses: np.ndarray, target: float = TARGET) -> int:
    """The number of steps after which the loss is on the other side of `target`; 0 if it is not finite."""
    if not np.isfinite(losses).all():
        return 0
    above = losses > target
    return int((above[1:] != above[:-1]).sum())


# ---- Training and saving --------------------------------------------------------------------------------------------


def train_case(split: Split, case: Case) -> Curve:
    """Train a case on the first batch of its seed."""
    changes = {name: value for name, value in asdict(case).items() if name not in ("loss", "inputs")}
    settings = prepare_device(SCRIPT.recipe_settings("mlp", **{**SCRIPT.overfit, **changes}, device="cpu", threads=1))
    images, labels = next(batches(split, settings.batch_size, Augmentation(), seed=case.seed, epoch=0))
    torch.manual_seed(derived_seed("init", case.seed))
    model: Any = SCRIPT.build_model(settings, LOSSES[case.loss].num_outputs)
    if case.inputs == "normalized":  # until it is fitted, the model's normalization does nothing
        model.fit_inputs(to_float(split.images[:INPUT_SAMPLE]))
    outcome = memorize(model, images * SCALES[case.inputs], labels, LOSSES[case.loss], settings, quiet=True)
    return Curve(np.array(outcome.curve, dtype=np.float32), outcome.memorized)


def load_curves(path: Path) -> dict[str, Curve]:
    """The saved curves by the name of their case; {} if `path` is missing. Raises UserError if it is damaged."""
    if not path.exists():
        return {}
    try:
        with np.load(path) as saved:
            return {str(name): Curve(losses, int(memorized)) for name, losses, memorized
                    in zip(saved["cases"], saved["losses"], saved["memorized"], strict=True)}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} does not hold curves ({error}): move it away") from error


def save_curves(path: Path, curves: dict[str, Curve]) -> None:
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, cases=np.array(list(curves)), losses=np.stack([c.losses for c in curves.values()]),
                            memorized=np.array([c.memorized for c in curves.values()]))


def measure(path: Path, data_dir: str) -> dict[str, Curve]:
    """The curves of all cases: those that `path` lacks are trained, and each is saved there when it is done."""
    curves = load_curves(path)
    missing = [case for case in sorted(CASES, key=lambda case: case.seed) if case.name not in curves]
    if missing:
        split, _ = load_cifar100(data_dir)
        path.parent.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(missing, start=1):
        print(f"training case {number} of {len(missing)}: {case.name}", file=sys.stderr, flush=True)
        curve = train_case(split, case)
        curves = {**load_curves(path), case.name: curve}  # another process may have saved some meanwhile
        save_curves(path, curves)
    return curves


# ---- Tables and figure ----------------------------------------------------------------------------------------------


def full_table(curves: dict[str, Curve]) -> str:
    """A row per case, as Markdown."""
    lines = ["| loss | inputs | optimizer | widths | seed | first loss | last | lowest | crossings of 4.2935 "
             "| epochs above 1 | epochs near 4.2935 | spikes: epoch (height) | memorized (of 64) |",
             "|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|---|---:|"]
    for case in CASES:
        curve = curves[case.name]
        late = ", ".join(f"{spike.epoch} ({_short(spike.height)})" for spike in curve.late_spikes()) or "none"
        ends = " | ".join(f"{value:.4g}" for value in (curve.losses[0], curve.losses[-1], curve.losses.min()))
        lines.append(f"| {case.name} | {ends} | {crossings(curve.losses)} | {curve.epochs_failed()} "
                     f"| {curve.epochs_near()} | {late} | {curve.memorized} |")
    return "\n".join(lines)


def shapes_table(curves: dict[str, Curve]) -> str:
    """A row per shape of MSE against the class index at the original's rate, over its seeds, as Markdown."""
    lines = ["| inputs | widths | last loss, by seed | crossings of 4.2935 | epochs above 1 | epochs near 4.2935 "
             "| spikes | height: median, highest | epochs between spikes: mean, longest |",
             "|---|---|---|---|---|---|---|---|---|"]
    cases = [case for case in CASES if case.condition == Case(inputs=case.inputs).condition]
    for (inputs, shape), group in itertools.groupby(cases, lambda case: (case.inputs, case.shape)):
        runs = [curves[case.name] for case in group]
        late = [run.late_spikes() for run in runs]
        heights = [spike.height for found in late for spike in found]
        periods = [gap for run in runs for gap in run.gaps()]
        by_seed = [[_short(float(run.losses[-1])), crossings(run.losses), run.epochs_failed(), run.epochs_near(),
                    len(found)] for run, found in zip(runs, late, strict=True)]
        columns = ["; ".join(map(str, values)) for values in zip(*by_seed, strict=True)]
        columns.append(f"{_short(median(heights))}, {_short(max(heights))}" if heights else "–")
        columns.append(f"{mean(periods):.0f}, {max(periods)}" if periods else "–")
        lines.append(f"| {inputs} | {shape} | {' | '.join(columns)} |")
    return "\n".join(lines)


def odds(curves: dict[str, Curve]) -> str:
    """How much the curves of wide networks are like the reported one, in sentences."""
    wide = [curves[case.name] for case in CASES if case.condition == Case().condition and case.widths[0] >= WIDE[0]]
    late = sum(len(run.losses) - run.half for run in wide)
    failed, near = (sum(count(run) for run in wide) for count in (Curve.epochs_failed, Curve.epochs_near))
    ends = sum(run.losses[-1] > FAILED for run in wide)
    slower = sum(run.gaps()[-1:] > run.gaps()[:1] for run in wide)
    return (f"{len(wide)} runs on inputs in [0, 1] have a first layer of {WIDE[0]} units or more. {failed:,} of the "
            f"{late:,} losses in their second halves are above 1, and {near} are within 1 of 4.2935. Runs that end "
            f"above 1: {ends}. Runs whose last two spikes are further apart than their first two: {slower}.")


def _short(value: float) -> str:
    """Two digits, and no exponent for a large number."""
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


SHOWN = (  # in the figure: case, color, label
    (Case(widths=WIDEST), ORANGE, "MSE on the class index, 2048-1024-512"),
    (Case(), SKY, "MSE on the class index, 512-256-128"),
    (Case("softmax-twice"), PINK, "softmax applied twice, 512-256-128"),
    (Case("cross-entropy"), BLUE, "cross-entropy, 512-256-128"),
)


def riddle_figure(curves: dict[str, Curve]) -> Any:
    """The candidates' curves, linear around 4.29 and logarithmic, with the spikes of the first, as a Figure."""
    figure = new_figure(7, 7.6, "Which loss oscillates, and ends at 4.2935?")
    linear, logarithmic = figure.subplots(2, sharex=True)
    for axes in (linear, logarithmic):
        for case, color, label in SHOWN:
            axes.plot(curves[case.name].losses, color=color, lw=1.1, label=label)
        axes.axhline(TARGET, color="black", lw=1, ls="--", label="4.2935, the loss that was reported")
        axes.grid(alpha=0.3)
    linear.set(ylim=(0, 2 * TARGET), ylabel="loss (linear)", xlim=(0, len(curves[CASES[0].name].losses) - 1))
    logarithmic.set(yscale="log", ylim=(1e-4, 1e6), ylabel="loss (logarithmic)",
                    xlabel="epoch (one step on the same 64 images)")
    _mark_spikes(linear, logarithmic, spikes(curves[SHOWN[0][0].name].losses))
    figure.legend(*linear.get_legend_handles_labels(), loc="outside lower center", ncols=1, frameon=False)
    return figure


def _mark_spikes(linear: Any, logarithmic: Any, found: list[Spike]) -> None:
    """A triangle and the height above each spike, and between two of them their distance in epochs."""
    for spike in found:
        peak = spike.level + spike.height
        linear.plot(spike.epoch, min(peak, 1.93 * TARGET), marker="v", color="black", ms=5)
        logarithmic.plot(spike.epoch, 2 * peak, marker="v", color="black", ms=5)
        logarithmic.annotate(f"{spike.height:.1f}", (spike.epoch, 3.5 * peak), ha="center")
    for before, after in itertools.pairwise(found):
        logarithmic.annotate("", (before.epoch, 2e4), (after.epoch, 2e4), arrowprops={"arrowstyle": "<->"})
        logarithmic.annotate(f"{after.epoch - before.epoch}", ((before.epoch + after.epoch) / 2, 3e4), ha="center")
    if found:
        logarithmic.annotate("epochs from spike to spike: ", (found[0].epoch, 2e4), ha="right", va="center")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.overfit_riddle", description=__doc__)
    parser.add_argument("--folder", type=absolute_path, default=RESULTS_DIR / "published" / "benchmarks",
                        help="where curves and tables are (default: results/published/benchmarks)")
    parser.add_argument("--figure", type=png_path, metavar="FILE", help="draw the curves into this PNG file")
    parser.add_data_dir()
    options = parser.parse_args(argv)
    path = options.folder / "overfit_riddle.npz"
    curves = measure(path, options.data_dir or default_data_dir())
    for suffix, table in (("", full_table(curves)), ("_shapes", shapes_table(curves)), ("_odds", odds(curves))):
        write_text(path.with_name(f"{path.stem}{suffix}.md"), f"{table}\n")
    print(shapes_table(curves), odds(curves), sep="\n\n")
    if options.figure:
        save_figure(riddle_figure(curves), options.figure)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
