"""The single-batch overfit check: a correct network and loss can memorize one batch completely.

Karpathy 2019 (karpathy.github.io/2019/04/25/recipe): "Overfit one batch."
"""

import math
import textwrap
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.command_line import launched, say
from common.errors import UserError
from common.files import write_csv, write_json
from common.plotting import WIDTH, label_ends, new_figure, only_warning, save_figure
from common.text import overfit_table
from training.flags import Options
from training.loop import new_model, prepare, training_step
from training.losses import LOSSES, Loss
from training.optimizers import make_optimizers, set_rates
from training.run_folder import provenance
from training.settings import Script, Settings, machine_words
from utils import Augmentation, Split, batches, load_cifar100

CHANCE = math.log(100)  # the cross-entropy of guessing
BAR = "{desc} |{bar}| {n_fmt}/{total_fmt} steps{postfix}, ETA {remaining}"  # for tqdm


@dataclass(frozen=True)
class Outcome:
    """The result for one loss. `curve` has the loss before each step and, at its end, after the last."""

    title: str
    curve: tuple[float, ...]
    memorized: int
    batch_size: int

    @property
    def passed(self) -> bool:
        return self.memorized == self.batch_size

    def summary(self) -> dict[str, Any]:
        """Its entry in `overfit.json`, where a loss that is not finite is null."""
        losses = {"first": self.curve[0], "last": self.curve[-1], "lowest": min(self.curve)}
        finite = {name: value if math.isfinite(value) else None for name, value in losses.items()}
        return {"title": self.title, **finite, "memorized": self.memorized, "batch_size": self.batch_size,
                "passed": self.passed}


def overfit_batch(script: Script, options: Options) -> int:
    """Run the check, write figure, curves and numbers to <results>/overfit_batch/<recipe>, print a table.

    Returns the exit status: 0 only if the network memorized the whole batch with plain cross-entropy.
    """
    if launched()[1] > 1:
        raise UserError("--overfit-batch needs a single process: start it with python, not with torchrun")
    settings = options.settings
    losses = {name: loss for name, loss in LOSSES.items()
              if options.loss in (None, name) or name == "cross-entropy"}
    if not options.quiet:
        say(f"loading {settings.dataset}")
    split, _ = load_cifar100(settings.data_folder, train_on_all=settings.train_on_all,
                             use_synthetic=settings.synthetic)
    _, settings, reasons = prepare(script, settings, split, quiet=options.quiet, brief=True)
    say(f"overfitting one batch of {settings.batch_size} {settings.dataset} for {settings.epochs} steps, with "
        f"{machine_words(settings, reasons)}")
    outcomes = {name: memorize_first_batch(script, settings, loss, split, quiet=options.quiet)
                for name, loss in losses.items()}

    folder = options.results_dir / "overfit_batch" / settings.recipe
    folder.mkdir(parents=True, exist_ok=True)
    summaries = {name: outcome.summary() for name, outcome in outcomes.items()}
    write_json(folder / "overfit.json", {"losses": summaries, "given": _given(options), "settings": asdict(settings),
                                         **provenance()})
    curves = zip(*(outcome.curve for outcome in outcomes.values()), strict=True)
    write_csv(folder / "curves.csv", ["step", *outcomes],
              ([step, *(f"{value:.6g}" for value in values)] for step, values in enumerate(curves)))
    with only_warning(folder / "overfit.png"):
        save_figure(overfit_figure(outcomes, settings), folder / "overfit.png")
    print(overfit_table(summaries))
    print(f"figure, curves and numbers are in {folder}")
    return 0 if outcomes["cross-entropy"].passed else 1


def _given(options: Options) -> dict[str, Any]:
    """The flags that make this check differ from its recipe's plain `--overfit-batch`."""
    plain = {"recipe"} | {f.name for f in fields(options.settings) if f.metadata["machine"]}
    changes = {name: value for name, value in options.given.items() if name not in plain}
    return changes if options.loss is None else {**changes, "loss": options.loss}


def memorize_first_batch(
    script: Script, settings: Settings, loss: Loss, split: Split, *, quiet: bool = False
) -> Outcome:
    """Minimize one loss on the first batch of `settings.seed`, from fresh weights."""
    images, labels = next(batches(split, settings.batch_size, Augmentation(), seed=settings.seed, epoch=0))
    model = new_model(script, settings, split, loss.num_outputs)
    return memorize(model, images.to(settings.device), labels.to(settings.device), loss, settings, quiet=quiet)


def memorize(
    model: nn.Module, images: Tensor, labels: Tensor, loss: Loss, settings: Settings, *, quiet: bool = False
) -> Outcome:
    """Take `settings.epochs` steps on one batch: images float32 [B, 3, 32, 32] and labels int64 [B]."""
    optimizers = make_optimizers(model, settings)
    model.train()
    curve = []
    with tqdm(range(settings.epochs), desc=loss.title, bar_format=BAR, dynamic_ncols=True,
              disable=True if quiet else None) as bar:
        for step in bar:
            set_rates(optimizers, settings, step / settings.epochs)
            curve.append(training_step(model, optimizers, images, labels, loss.function)[1].item())
            bar.set_postfix_str(f"loss {curve[-1]:.3g}", refresh=False)
    with torch.no_grad():
        outputs = model(images)
    memorized = int((loss.predict(outputs) == labels).sum())
    return Outcome(loss.title, (*curve, loss.function(outputs, labels).item()), memorized, len(labels))


def overfit_figure(outcomes: dict[str, Outcome], settings: Settings) -> Any:
    """The loss curves on a logarithmic scale, each labeled at its end, as a matplotlib Figure."""
    title = (f"Overfitting one batch of {settings.batch_size}: {settings.optimizer}, "
             f"learning rate {settings.lr:g}")
    figure = new_figure(WIDTH, 4.4, title, synthetic=settings.synthetic)
    axes = figure.subplots()
    ends = []
    for name, outcome in outcomes.items():
        finite = [value if math.isfinite(value) and value > 0 else math.nan for value in outcome.curve]
        axes.plot(finite, color=LOSSES[name].color, lw=1.3)
        last = next(filter(math.isfinite, reversed(finite)), 1.0)
        label = textwrap.fill(f"{outcome.title}:", 22, break_on_hyphens=False)
        ends.append((last, f"{label}\n{outcome.memorized} of {outcome.batch_size} memorized", LOSSES[name].color))
    axes.axhline(CHANCE, color="0.4", lw=1, ls=":")
    ends.append((CHANCE, "cross-entropy of\nguessing: ln 100", "0.3"))
    axes.set(yscale="log", xlabel="step (the same batch every time)", ylabel="loss", xlim=(0, settings.epochs))
    axes.grid(alpha=0.3)
    label_ends(axes, ends)
    return figure
