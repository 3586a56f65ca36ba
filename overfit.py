"""The single-batch overfit check: can this network, with this loss, memorise one batch?

Karpathy (2019): "overfit a single batch of only a few examples ... verify that we can reach the lowest achievable
loss". Beside plain cross-entropy the check runs three losses that are easily mistaken for it, since a bug in the loss
shows here first. Both training scripts share it.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine import descend, make_optimizers, new_model, set_rates
from hardware import prepare_device
from parallel import launched
from readings import READINGS, Reading, overfit_table
from runs import provenance, replacing, save_figure, write_json
from settings import Command, Script, Settings
from utils import Augmentation, Split, UserError, batches, load_cifar100

LOSSES = tuple(READINGS)


@dataclass(frozen=True)
class Outcome:
    """What one reading came to. `curve` has the loss before each step and, as its last entry, after the last one."""

    curve: tuple[float, ...]
    memorised: int
    batch_size: int

    @property
    def passed(self) -> bool:
        return self.memorised == self.batch_size

    @property
    def losses(self) -> dict[str, float]:
        return {"first": self.curve[0], "last": self.curve[-1], "lowest": min(self.curve),
                "highest_in_second_half": max(self.curve[len(self.curve) // 2:])}

    def summary(self) -> dict[str, Any]:
        """What `overfit.json` says of it; a loss that is not finite is null there."""
        finite = {name: value if math.isfinite(value) else None for name, value in self.losses.items()}
        return {**finite, "memorised": self.memorised, "batch_size": self.batch_size, "passed": self.passed}


def overfit_batch(command: Command) -> int:
    """Run the check, write its figure, curves and numbers to <results>/overfit_batch/<recipe>, print the table.

    Returns the exit status: 0 only if plain cross-entropy memorised the whole batch.
    """
    if launched().count > 1:
        raise UserError("--overfit-batch is for one process: start it with python, not with torchrun")
    settings = prepare_device(command.settings)
    readings = {name: reading for name, reading in READINGS.items()
                if command.loss in (None, name) or name == "cross-entropy"}
    split, _ = load_cifar100(settings.data_folder, train_on_all=settings.train_on_all, use_synthetic=settings.synthetic)
    print(f"overfitting one batch of {settings.batch_size} {settings.pictures} for {settings.epochs} epochs")
    outcomes = {name: run_reading(command.script, settings, reading, split, quiet=command.quiet)
                for name, reading in readings.items()}
    folder = command.results_dir / "overfit_batch" / settings.recipe
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "overfit.json", {
        "readings": {name: outcome.summary() for name, outcome in outcomes.items()},
        "given": _given(command), "settings": asdict(settings), **provenance(),
    })
    _write_curves(outcomes, folder / "curves.csv")
    save_figure(overfit_figure(outcomes, settings), folder / "overfit.png")
    print(overfit_table({name: outcome.summary() for name, outcome in outcomes.items()}))
    print(f"figure, curves and numbers are in {folder}")
    return 0 if outcomes["cross-entropy"].passed else 1


def _given(command: Command) -> dict[str, Any]:
    """The flags that made this check another one than the plain `--overfit-batch` of its recipe."""
    plain = {"recipe"} | {f.name for f in fields(command.settings) if f.metadata["machine"]}
    changes = {name: value for name, value in command.given.items() if name not in plain}
    return changes if command.loss is None else {**changes, "loss": command.loss}


def run_reading(script: Script, settings: Settings, reading: Reading, split: Split, *, quiet: bool = False) -> Outcome:
    """One reading on the first batch that `settings.seed` gives, with fresh weights."""
    images, labels = next(batches(split, settings.batch_size, Augmentation(), seed=settings.seed, epoch=0))
    model = new_model(script, settings, split, reading.num_outputs)
    return memorise(model, images.to(settings.device), labels.to(settings.device), reading, settings, quiet=quiet)


def memorise(
    model: nn.Module, images: Tensor, labels: Tensor, reading: Reading, settings: Settings, *, quiet: bool = False
) -> Outcome:
    """Train on one fixed batch, images float32 [B, 3, 32, 32] and labels int64 [B], for `settings.epochs` steps."""
    optimizers = make_optimizers(model, settings)
    model.train()
    curve = []
    for step in tqdm(range(settings.epochs), desc=reading.title, unit="step", leave=False,
                     disable=True if quiet else None):
        set_rates(optimizers, settings, step / settings.epochs)
        loss = reading.loss(model(images), labels)
        descend(loss, optimizers)
        curve.append(loss.item())
    with torch.no_grad():
        outputs = model(images)
    memorised = int((reading.predict(outputs) == labels).sum())
    return Outcome((*curve, reading.loss(outputs, labels).item()), memorised, len(labels))


def overfit_figure(outcomes: dict[str, Outcome], settings: Settings):
    """The loss curves on a logarithmic scale, as a matplotlib Figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, outcome in outcomes.items():
        finite = [value if math.isfinite(value) and value > 0 else math.nan for value in outcome.curve]
        axes.plot(finite, color=READINGS[name].colour, lw=1.3,
                  label=f"{READINGS[name].title}: {outcome.memorised} of {outcome.batch_size}")
    axes.axhline(math.log(100), color="0.5", lw=1, ls=":", label="ln 100 = 4.605: cross-entropy of guessing")
    axes.set(yscale="log", xlabel="step (the same batch every time)", ylabel="loss")
    axes.grid(alpha=0.3)
    figure.legend(title="loss: pictures memorised", loc="outside lower center", ncols=2, frameon=False)
    data = "SYNTHETIC PICTURES, not CIFAR-100" if settings.synthetic else "CIFAR-100"
    figure.suptitle(f"Overfitting one batch of {settings.batch_size}, {data}: {settings.optimizer}, lr {settings.lr:g}")
    return figure


def _write_curves(outcomes: dict[str, Outcome], path: Path) -> None:
    curves: Sequence[Sequence[float]] = [outcome.curve for outcome in outcomes.values()]
    with replacing(path) as partial, open(partial, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", *outcomes])
        for step, values in enumerate(zip(*curves, strict=True)):
            writer.writerow([step, *(f"{value:.6g}" for value in values)])
