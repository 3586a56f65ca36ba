"""Check a network and its training in short experiments, before you trust any long run.

    python -m tools.sanity_checks                  # the MLP and the CNN of the results table
    python -m tools.sanity_checks --model mlp      # one of them
    python -m tools.sanity_checks --synthetic      # runs anywhere: nothing to download

The checks and their order are Karpathy's (2019, karpathy.github.io/2019/04/25/recipe). We added three, for stale
gradients, validation and batch normalization, since those bugs pass all the others. The checks call the functions that
train and measure every run, with the recipe's own network and settings, shortened: 5,000 training images, seven
epochs, and 16 x 16 pixels for the CNN. Everything runs on the CPU, where sums have a fixed order.

Each check prints one line with the number that decides. The predictions over time are also drawn, in
results/sanity_checks/<model>/film_strip.png. The exit status is 0 if all checks pass and 1 if any fails.
"""

import contextlib
import copy
import math
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_cnn
import train_mlp
from common.command_line import Parser, exit_status
from common.errors import Interrupted, UserError
from common.plotting import BLUE, ORANGE, WIDTH, new_figure, only_warning, save_figure
from common.text import spaced
from training.distributed import ALONE
from training.hardware import choose_precision, prepare_device
from training.loop import loss_of, new_model, refresh_norms, train, training_step
from training.optimizers import all_groups, make_optimizers
from training.run_folder import NullRun
from training.settings import Script, Settings
from utils import Augmentation, Split, batches, compute_logits, default_data_dir, load_cifar100, to_float

TRAIN_IMAGES, FEW_IMAGES = 5_000, 1_000
WATCHED, SHOWN = 500, 8  # validation images that are classified after every epoch, and those in the film strip
STRIP = "film_strip.png"
REFRESHED = 500  # images for the statistics of batch norm before training
MARGIN = 0.1  # nats: smaller differences between losses do not count
FIRST_MARGIN = 0.2  # nats above ln 100 for the first loss; a few seeds gave 4.67 to 4.71 (mlp) and 4.61 to 4.65 (cnn)


@dataclass(frozen=True)
class Network:
    """A network that can be checked.

    recipe: of `script`, trains it; changes: the settings that shorten or replace some of the recipe's; smaller: the
    settings that reduce the network's capacity.
    """

    script: Script
    recipe: str
    changes: dict[str, Any]
    smaller: dict[str, Any]


# The CNN's recipe recomputes batch norm's statistics after the last epoch, which would hide it if training got them
# wrong. So that is off here, and with it the averaged weights, which need it.
NETWORKS = {
    "mlp": Network(train_mlp.SCRIPT, "mlp", dict(epochs=7, batch_size=500), dict(widths=(512, 256, 128))),
    "cnn": Network(train_cnn.SCRIPT, "fast",
                   dict(epochs=7, batch_size=64, sides=(16,), label_smoothing=0.0, average=0.0, refresh_norms=0),
                   dict(widths=(16, 64, 192), inner=(16, 48, 128))),
}


# ---- Subject and outcome of a check ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A finished training.

    rows: each epoch's row of `metrics.csv`; moments: logits of the first WATCHED validation images, float32
    [WATCHED, 100], before the first epoch, with batch norm's statistics of REFRESHED training images, and after each.
    """

    model: nn.Module
    rows: list[dict[str, Any]]
    moments: list[Tensor]


@dataclass(frozen=True)
class Subject:
    """The input of every check: a network, its settings on this machine, and images."""

    name: str
    network: Network
    settings: Settings
    train_split: Split
    val_split: Split

    @property
    def classes(self) -> int:
        return len(self.train_split.fine_names)

    @property
    def chance_loss(self) -> float:
        return math.log(self.classes)

    def one_batch(self) -> Settings:
        """The settings of the CNN's single-batch check, as far as this network has them."""
        return replace(self.settings, **{name: value for name, value in train_cnn.OVERFIT.items()
                                         if hasattr(self.settings, name)})

    def fresh(self, settings: Settings) -> nn.Module:
        """The network with its initial weights, in training mode."""
        return new_model(self.network.script, settings, self.train_split).train()

    def first_batch(self, settings: Settings) -> tuple[Tensor, Tensor]:
        """Unaugmented images, float32 [batch_size, 3, 32, 32], and labels, int64 [batch_size]."""
        return next(batches(self.train_split, settings.batch_size, Augmentation(), seed=settings.seed, epoch=0))

    def train_fresh(self, settings: Settings, train_split: Split, val_split: Split | None) -> Trained:
        """Train a fresh network with `training.loop.train`. Raises UserError if its loss is no longer finite."""
        model, watched = self.fresh(settings), self.val_split.images[:WATCHED]
        rows, moments = [], []
        if val_split is not None:
            start = copy.deepcopy(model)
            refresh_norms(start, self.train_split, REFRESHED, seed=settings.seed)  # untrained, it has no statistics
            moments.append(compute_logits(start, watched))

        def note(row: dict[str, Any], settings: Settings) -> None:
            rows.append(row)
            if val_split is not None:
                moments.append(compute_logits(model, watched))

        train(model, train_split, val_split, NullRun(self.name, settings), after_epoch=note)
        return Trained(model, rows, moments)

    @cached_property
    def trained(self) -> Trained:
        """The training that several checks share."""
        return self.train_fresh(self.settings, self.train_split, self.val_split)


@dataclass(frozen=True)
class Outcome:
    """The result of a check: its verdict, the number behind it, and the expected number."""

    passed: bool
    number: str
    expected: str


# ---- The checks -----------------------------------------------------------------------------------------------------


def loss_at_initialization(subject: Subject) -> Outcome:
    """Check that the loss of the first step is that of uniform predictions, ln 100, or slightly more.

    It is far from it if the head starts too large, or with wrong biases, a wrong number of outputs, or a wrong loss.
    """
    settings = replace(subject.settings, label_smoothing=0.0)
    _, loss = training_step(subject.fresh(settings), [], *subject.first_batch(settings), loss_of(settings),
                            settings.precision)
    low, high = subject.chance_loss - MARGIN, subject.chance_loss + FIRST_MARGIN
    return Outcome(low <= loss.item() <= high, f"{loss.item():.3f}",
                   f"{low:.3f} to {high:.3f}, around ln {subject.classes}, {subject.chance_loss:.3f}")


def same_seed_same_loss(subject: Subject) -> Outcome:
    """Check that two short trainings with the same settings end with the same loss."""
    settings, few = replace(subject.settings, epochs=1), subject.train_split[torch.arange(FEW_IMAGES)]
    one, other = (subject.train_fresh(settings, few, None).rows[-1]["train_loss"] for _ in range(2))
    return Outcome(one == other, f"{abs(one - other):.3g}", f"0 between two trainings, to the last bit of {one!r}")


def input_independent_baseline(subject: Subject) -> Outcome:
    """Check that the network learns from real images and not from a single one in place of all.

    For the single image we look at the training loss. Label smoothing and MixUp cannot bring it below the loss of
    guessing, so a lower one means that the labels leak into the network's inputs. Validation would not show that: its
    images are all alike, and each class has equally many, so the accuracy is always 1%. Zeroed images would do for the
    MLP, but batch norm enlarges the rounding errors of constant maps until the loss of a CNN is no longer finite.
    """
    images = subject.train_split.images
    alike = replace(subject.train_split, images=images[:1].expand_as(images))
    blind = subject.train_fresh(subject.settings, alike, None).rows[-1]["train_loss"]
    seeing, limit = subject.trained.rows[-1]["val_loss"], subject.chance_loss - MARGIN
    return Outcome(seeing < limit <= blind, f"{seeing:.3f}, {blind:.3f}",
                   f"validation loss below {limit:.3f}, training loss on a single image not below it")


def overfit_one_batch(subject: Subject) -> Outcome:
    """Check that a hundred steps of Adam memorize 64 images.

    The loss decides: with softmax applied twice it stays above 3.62, even if every image is classified correctly.
    """
    settings = subject.one_batch()
    batch = subject.train_split[torch.arange(settings.batch_size)]
    row = subject.train_fresh(settings, batch, None).rows[-1]
    return Outcome(row["train_loss"] < 0.1, f"{row['train_loss']:.4f}",
                   f"below 0.1; {row['train_acc']:.0f}% of {len(batch)} images are classified correctly")


def gradients_are_reset(subject: Subject) -> Outcome:
    """Check that two steps on one batch, at a learning rate of 0, have the same gradient.

    Without zero_grad the second one is the sum of both. Overfitting one batch does not show that, because Adam does
    not depend on the scale of a gradient.
    """
    settings = subject.one_batch()
    model, (images, labels) = subject.fresh(settings), subject.first_batch(settings)
    optimizers = make_optimizers(model, settings)
    for group in all_groups(optimizers):
        group["lr"] = 0.0
    norms = []
    for _ in range(2):
        training_step(model, optimizers, images, labels, loss_of(settings), settings.precision)
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item())
    return Outcome(math.isclose(*norms, rel_tol=0.01), f"{norms[1]:.4g}",
                   f"{norms[0]:.4g}, the gradient's norm on the same batch one step before")


def more_capacity_lower_loss(subject: Subject) -> Outcome:
    """Check that a smaller network, trained the same way, has a higher training loss."""
    settings = replace(subject.settings, **subject.network.smaller)
    smaller = subject.train_fresh(settings, subject.train_split, None).rows[-1]["train_loss"]
    larger = subject.trained.rows[-1]["train_loss"]
    return Outcome(larger < smaller, f"{larger:.3f}", f"training loss below the smaller network's {smaller:.3f}")


def gradient_of_one_example(subject: Subject) -> Outcome:
    """Check that the loss of one image does not depend on the other images in its batch.

    This runs in evaluation mode, since batch normalization mixes images in training mode, and should.
    """
    images, labels = (tensor[:8] for tensor in subject.first_batch(subject.settings))
    images.requires_grad_()
    model, example = subject.fresh(subject.settings).eval(), 3
    loss = F.cross_entropy(model(images)[example], labels[example])
    (gradient,) = torch.autograd.grad(loss, images, materialize_grads=True)  # zeros if no image is used at all
    largest = gradient.flatten(1).abs().amax(1)
    own, others = largest[example].item(), largest[torch.arange(len(largest)) != example].max().item()
    return Outcome(others == 0 < own, f"{others:.3g}",
                   f"0, the largest gradient at the batch's other images; at its own, above 0: {own:.3g}")


def predictions_over_time(subject: Subject) -> Outcome:
    """Check that the mean probability of the right class grows on a fixed validation batch (see `film_strip`)."""
    labels = subject.val_split.fine_labels[:WATCHED, None]
    first, *_, last = (logits.softmax(1).gather(1, labels).mean().item() for logits in subject.trained.moments)
    return Outcome(last > 2 * first, f"{last:.4f}",
                   f"probability of the right class above twice that at the start, {first:.4f}; see {STRIP}")


def train_val_gap(subject: Subject) -> Outcome:
    """Check that the loss is lower on training than on validation images, and there lower than by guessing.

    Both losses are measured alike: unaugmented images, evaluation mode, the last weights.
    """
    train_loss, val_loss = (_loss(subject.trained.model, split) for split in (subject.train_split, subject.val_split))
    return Outcome(train_loss + MARGIN < val_loss < subject.chance_loss, f"{val_loss - train_loss:+.3f}",
                   f"above {MARGIN:+}: validation loss {val_loss:.3f}, below ln {subject.classes}, minus training loss "
                   f"{train_loss:.3f}")


def validation_by_hand(subject: Subject) -> Outcome:
    """Check the reported validation loss against one computed here, in evaluation mode on unaugmented images.

    The batches differ from the training's. So the losses differ if validation images are augmented, or if a prediction
    depends on the other images of its batch, as with batch normalization in training mode.
    """
    model, split = subject.trained.model.eval(), subject.val_split
    order = torch.arange(len(split)).flip(0).split(300)
    with torch.no_grad():
        losses = [F.cross_entropy(model(to_float(split.images[index])), split.fine_labels[index], reduction="sum")
                  for index in order]
    by_hand, reported = torch.stack(losses).sum().item() / len(split), subject.trained.rows[-1]["val_loss"]
    return Outcome(abs(by_hand - reported) < 1e-3, f"{abs(by_hand - reported):.1e}",
                   f"below 1e-3, the difference between the reported validation loss {reported:.4f} and ours")


def modes_agree(subject: Subject) -> Outcome:
    """Check that batch normalization gives similar losses with a batch's statistics and with the running ones.

    They differ a little, because the running statistics are those of augmented images. With MixUp, the MLP's losses
    differ by 0.1.
    """
    few = subject.train_split[torch.arange(FEW_IMAGES)]
    in_evaluation = _loss(subject.trained.model, few)
    model = copy.deepcopy(subject.trained.model).train()  # a copy, since this changes the running statistics
    with torch.no_grad():
        in_training = F.cross_entropy(model(to_float(few.images)), few.fine_labels).item()
    return Outcome(abs(in_training - in_evaluation) < 0.3, f"{in_training - in_evaluation:+.3f}",
                   "within 0.3, the loss of training images in training mode minus that in evaluation mode")


def _loss(model: nn.Module, split: Split) -> float:
    return F.cross_entropy(compute_logits(model, split.images), split.fine_labels).item()


CHECKS: dict[str, Callable[[Subject], Outcome]] = {
    "loss at initialization": loss_at_initialization,
    "same seed, same loss": same_seed_same_loss,
    "input-independent baseline": input_independent_baseline,
    "overfit one batch": overfit_one_batch,
    "gradients are reset": gradients_are_reset,
    "more capacity, lower loss": more_capacity_lower_loss,
    "gradient of one example": gradient_of_one_example,
    "predictions over time": predictions_over_time,
    "train/val gap": train_val_gap,
    "validation by hand": validation_by_hand,
    "batch norm's two modes": modes_agree,
}


def run_check(check: Callable[[Subject], Outcome], subject: Subject) -> Outcome:
    """A check's outcome. A training whose loss is no longer finite fails too."""
    try:
        return check(subject)
    except UserError as problem:
        return Outcome(False, "none", str(problem))


# ---- The film strip -------------------------------------------------------------------------------------------------


def film_strip(subject: Subject) -> Any:
    """The first SHOWN watched images, one per row, with their predictions epoch by epoch, as a matplotlib Figure.

    The color of a cell is stronger the more probable the prediction; correct ones are framed and ticked.
    """
    names = [spaced(name) for name in subject.val_split.fine_names]
    labels = subject.val_split.fine_labels[:SHOWN].tolist()
    moments = [logits[:SHOWN].softmax(1).max(1) for logits in subject.trained.moments]
    title = f"{subject.name}: predictions over time (blue, ✓: correct; orange: wrong)"
    figure = new_figure(WIDTH, 0.6 * SHOWN + 1, title, synthetic=subject.settings.synthetic)
    axes = figure.subplots()
    for row, label in enumerate(labels):
        axes.imshow(subject.val_split.images[row].permute(1, 2, 0).numpy(), interpolation="nearest", aspect="auto",
                    extent=(-1.3, -0.58, row + 0.46, row - 0.46))
        for column, (probabilities, predicted) in enumerate(moments):
            _draw_cell(axes, column, row, names[predicted[row]], float(probabilities[row]), predicted[row] == label)
    axes.set(xlim=(-1.4, len(moments) - 0.45), ylim=(SHOWN - 0.5, -0.5), xlabel="epochs trained",
             ylabel="validation image and its class")
    axes.set_xticks(range(len(moments)))
    axes.set_yticks(range(SHOWN), [textwrap.fill(names[label], 14) for label in labels])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def _draw_cell(axes: Any, column: int, row: int, name: str, probability: float, correct: bool) -> None:
    from matplotlib.patches import Rectangle

    color = BLUE if correct else ORANGE
    axes.add_patch(Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, facecolor=(color, 0.08 + 0.6 * probability),
                             edgecolor=color if correct else "none", linewidth=2))
    words = "\n".join([*name.split(), f"{'✓ ' if correct else ''}{100 * probability:.0f}%"])
    axes.text(column, row, words, fontsize=8, ha="center", va="center", fontweight="bold" if correct else "normal")


# ---- The command ----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m tools.sanity_checks", description=__doc__)
    parser.add_argument("--model", choices=tuple(NETWORKS), metavar="|".join(NETWORKS),
                        help="check only this network (default: all of them)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of everything random (default: 0)")
    parser.add_synthetic()
    parser.add_data_dir()
    parser.add_results_dir()
    options = parser.parse_args(argv)
    Settings(seed=options.seed)  # refuses a bad seed now, before the dataset is downloaded
    data_dir = options.data_dir or default_data_dir()
    train_split, val_split = load_cifar100(data_dir, use_synthetic=options.synthetic)
    train_split = train_split[torch.arange(TRAIN_IMAGES)]
    try:
        passed = [check_network(make_subject(name, options.seed, options.synthetic, train_split, val_split),
                                options.results_dir)
                  for name in ([options.model] if options.model else NETWORKS)]
    except Interrupted as stop:  # its message is about resuming a run
        print("stopped", file=sys.stderr)
        return stop.status
    return 0 if all(passed) else 1


def make_subject(name: str, seed: int, synthetic: bool, train_split: Split, val_split: Split) -> Subject:
    """The network `name` of NETWORKS, in the precision that is faster on this machine."""
    network = NETWORKS[name]
    settings = prepare_device(network.script.recipe_settings(network.recipe, **network.changes, seed=seed,
                                                             synthetic=synthetic, device="cpu"))
    subject = Subject(name, network, settings, train_split, val_split)
    settings, _ = choose_precision(subject.fresh(settings), train_split, settings, ALONE)
    return replace(subject, settings=settings)


def check_network(subject: Subject, results_dir: Path) -> bool:
    """Print one line per check and draw the film strip; returns whether all checks passed."""
    settings, start = subject.settings, time.monotonic()
    folder = results_dir / "sanity_checks" / subject.name
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{subject.name}: recipe {settings.recipe}, {settings.epochs} epochs on {len(subject.train_split):,} "
          f"{settings.dataset}, {settings.precision} on the CPU with {settings.threads} threads", flush=True)
    passed = []
    for name, check in CHECKS.items():
        outcome = run_check(check, subject)
        passed.append(outcome.passed)
        print(f"{'PASS' if outcome.passed else 'FAIL'}  {name:<27} {outcome.number:<14} {outcome.expected}", flush=True)
    with only_warning(folder / STRIP), contextlib.suppress(UserError):  # a diverged training has nothing to draw
        save_figure(film_strip(subject), folder / STRIP)
        print(f"predictions over time are drawn in {folder / STRIP}")
    print(f"{subject.name}: {sum(passed)} of {len(passed)} passed, {time.monotonic() - start:.0f} s", flush=True)
    return all(passed)


if __name__ == "__main__":
    sys.exit(exit_status(main))
