"""Check a network and its training in short experiments, before any long run is believed.

    python sanity_checks.py                     # the MLP and the convolutional network of the results table
    python sanity_checks.py --model mlp         # one of them
    python sanity_checks.py --synthetic         # anywhere: no data set, no network

The checks and their order are Karpathy's (2019, karpathy.github.io/2019/04/25/recipe); those for the gradients of the
step before, for the validation and for batch normalisation are added, since the bugs that they find pass all others.
They use the functions that train and measure every run, with the recipe's own network and settings, shortened: 5,000
training pictures, seven epochs, pictures of 16 x 16 for the convolutional networks. All is done on the CPU, where sums
have one order.

Each check is one line with the number that decides; the predictions over time are drawn too, in
results/sanity_checks/<model>/film_strip.png. The exit status is 0 if all pass and 1 if any fails.
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
from engine import Interrupted, fit_and_place, train, training_step
from hardware import choose_precision, prepare_device
from optimizers import all_groups, make_optimizers
from runs import BLUE, ORANGE, Unwritten, save_figure
from settings import RESULTS_DIR, Parser, Script, Settings, exit_status
from utils import (
    Augmentation,
    Split,
    UserError,
    batches,
    compute_logits,
    default_data_dir,
    derived_seed,
    load_cifar100,
    to_float,
)

TRAIN_PICTURES, FEW_PICTURES = 5_000, 1_000
WATCHED, SHOWN = 500, 8  # validation pictures asked about after every epoch, and those of them in the film strip
STRIP = "film_strip.png"
MARGIN = 0.1  # nats: losses are told apart if they differ by more


@dataclass(frozen=True)
class Network:
    """A network that can be checked.

    recipe: of `script`, what it is trained with; changes: what of it is shortened or replaced; smaller: what makes the
    network one of less capacity; first_loss: by how much the loss of its first step may be above ln 100.
    """

    script: Script
    recipe: str
    changes: dict[str, Any]
    smaller: dict[str, Any]
    first_loss: float = 0.2


# The convnet's head starts with weights of unit variance (arXiv 2404.00498), so it is sure of something before it has
# seen anything. `first_loss` was set after measuring a few seeds: 4.67 to 4.71 (mlp), 6.24 to 6.85 (convnet). The
# convnet's recipe takes batch norms' statistics anew after the last epoch, which would hide that training got them
# wrong: not here.
NETWORKS = {
    "mlp": Network(train_mlp.SCRIPT, "mlp", dict(epochs=7, batch_size=500), dict(widths=(512, 256, 128))),
    "convnet": Network(train_cnn.SCRIPT, "fast", dict(epochs=7, sides=(16,), refresh_norms=0),
                       dict(widths=(16, 48, 96)), first_loss=3.0),
}


# ---------------------------------------------------------------------------------------------------------------------
# What is checked
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A finished training: the model, each epoch's row of `metrics.csv`, and the logits of the first WATCHED
    validation pictures, float32 [WATCHED, 100], before the first epoch and after each.
    """

    model: nn.Module
    rows: list[dict[str, Any]]
    moments: list[Tensor]


@dataclass(frozen=True)
class Subject:
    """What the checks are given: a network's settings, as this machine trains it, and pictures."""

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

    def fresh(self, settings: Settings) -> nn.Module:
        """The network as a training starts with it, in training mode."""
        torch.manual_seed(derived_seed("init", settings.seed))
        model = self.network.script.build_model(settings, self.classes)
        return fit_and_place(model, self.train_split, settings).train()

    def first_batch(self, settings: Settings) -> tuple[Tensor, Tensor]:
        """Pictures as they are, float32 [batch_size, 3, 32, 32], and labels, int64 [batch_size]."""
        return next(batches(self.train_split, settings.batch_size, Augmentation(), seed=settings.seed, epoch=0))

    def train_fresh(self, settings: Settings, train_split: Split, val_split: Split | None) -> Trained:
        """A fresh network, trained by `engine.train`. Raises UserError if its loss is no longer finite."""
        model, watched = self.fresh(settings), self.val_split.images[:WATCHED]
        rows, moments = [], [compute_logits(model, watched)]

        def note(row: dict[str, Any], settings: Settings) -> None:
            rows.append(row)
            if val_split is not None:
                moments.append(compute_logits(model, watched))

        train(model, train_split, val_split, Unwritten(self.name, settings), after_epoch=note)
        return Trained(model, rows, moments)

    @cached_property
    def trained(self) -> Trained:
        """The training that several checks look at."""
        return self.train_fresh(self.settings, self.train_split, self.val_split)


@dataclass(frozen=True)
class Outcome:
    """What a check came to: its verdict, the number behind it, and what that should have been."""

    passed: bool
    number: str
    expected: str


# ---------------------------------------------------------------------------------------------------------------------
# The checks
# ---------------------------------------------------------------------------------------------------------------------


def loss_at_initialisation(subject: Subject) -> Outcome:
    """Whoever knows nothing and says so loses ln 100; to lose less would be to know something.

    In training mode, as the first step has it, a head that starts too large shows, but only as far as `first_loss`
    says what is too large; for the convnet that is what was measured, and nothing derived. In evaluation mode batch
    norms do nothing yet, the logits of a deep network are all near 0, and the loss is ln 100 whatever the head's
    weights: off are then its biases, its number of outputs or the loss itself.
    """
    settings, few = replace(subject.settings, label_smoothing=0.0), subject.train_split[torch.arange(FEW_PICTURES)]
    unseen = _loss(subject.fresh(settings), few)
    first = training_step(subject.fresh(settings), [], *subject.first_batch(settings), settings)[1].item()
    low, high = subject.chance_loss - MARGIN, subject.chance_loss + subject.network.first_loss
    return Outcome(low <= first <= high and abs(unseen - subject.chance_loss) <= MARGIN, f"{first:.3f}, {unseen:.3f}",
                   f"{low:.3f} to {high:.3f} in training mode, and within {MARGIN} of ln {subject.classes}, "
                   f"{subject.chance_loss:.3f}, in evaluation mode")


def same_seed_same_loss(subject: Subject) -> Outcome:
    """Two short trainings that are told the same."""
    settings, few = replace(subject.settings, epochs=1), subject.train_split[torch.arange(FEW_PICTURES)]
    one, other = (subject.train_fresh(settings, few, None).rows[-1]["train_loss"] for _ in range(2))
    return Outcome(one == other, f"{abs(one - other):.3g}", f"0 between two trainings, to the last bit of {one!r}")


def input_independent_baseline(subject: Subject) -> Outcome:
    """Zeroed pictures say nothing of their labels, real ones do.

    The zeroed ones are judged by the training loss, which neither label smoothing nor MixUp can make less than that of
    chance: what leaks on the way from the split to the network is learnt. On validation pictures, all alike and as
    many of each class, their accuracy is 1% whatever was learnt.
    """
    zeroed = replace(subject.train_split, images=torch.zeros_like(subject.train_split.images))
    blind = subject.train_fresh(subject.settings, zeroed, None).rows[-1]["train_loss"]
    seeing, limit = subject.trained.rows[-1]["val_loss"], subject.chance_loss - MARGIN
    return Outcome(seeing < limit <= blind, f"{seeing:.3f}, {blind:.3f}",
                   f"validation loss below {limit:.3f}, and the training loss of zeroed pictures not")


def overfit_one_batch(subject: Subject) -> Outcome:
    """A hundred steps of Adam on 64 pictures: what can learn at all knows them by heart.

    The loss decides: after a softmax too many it stays above 3.62, even where every picture is recognised.
    """
    settings = replace(subject.settings, **train_cnn.OVERFIT)
    batch = subject.train_split[torch.arange(settings.batch_size)]
    row = subject.train_fresh(settings, batch, None).rows[-1]
    return Outcome(row["train_loss"] < 0.1, f"{row['train_loss']:.4f}",
                   f"below 0.1; {row['train_acc']:.0f}% of {len(batch)} pictures are recognised")


def gradients_are_forgotten(subject: Subject) -> Outcome:
    """A second step on the same batch at a learning rate of 0 has the first one's gradient, not both added up.

    Overfitting one batch does not show that: Adam, to which the scale of a gradient means nothing, succeeds on sums.
    """
    settings = replace(subject.settings, **train_cnn.OVERFIT)
    model, (images, labels) = subject.fresh(settings), subject.first_batch(settings)
    optimizers = make_optimizers(model, settings)
    for group in all_groups(optimizers):
        group["lr"] = 0.0
    norms = []
    for _ in range(2):
        training_step(model, optimizers, images, labels, settings)
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item())
    return Outcome(math.isclose(*norms, rel_tol=0.01), f"{norms[1]:.4g}",
                   f"{norms[0]:.4g}, the norm of the same batch's gradient one step before")


def more_capacity_lower_loss(subject: Subject) -> Outcome:
    """A smaller network, trained the same: as long as little is memorised, more weights fit better."""
    settings = replace(subject.settings, **subject.network.smaller)
    smaller = subject.train_fresh(settings, subject.train_split, None).rows[-1]["train_loss"]
    larger = subject.trained.rows[-1]["train_loss"]
    return Outcome(larger < smaller, f"{larger:.3f}", f"training loss below the smaller network's {smaller:.3f}")


def gradient_of_one_example(subject: Subject) -> Outcome:
    """The loss of one picture depends on none of the others in its batch.

    In evaluation mode: in training mode batch normalisation does mix them, and is meant to.
    """
    images, labels = (tensor[:8] for tensor in subject.first_batch(subject.settings))
    images.requires_grad_()
    model, example = subject.fresh(subject.settings).eval(), 3
    loss = F.cross_entropy(model(images)[example], labels[example])
    (gradient,) = torch.autograd.grad(loss, images, materialize_grads=True)  # zeros if the images are not used at all
    reached = gradient.flatten(1).abs().amax(1)
    own, others = reached[example].item(), reached[torch.arange(len(reached)) != example].max().item()
    return Outcome(others == 0 < own, f"{others:.3g}",
                   f"0, the largest gradient at the other pictures of a batch; at its own, above 0, {own:.3g}")


def predictions_over_time(subject: Subject) -> Outcome:
    """The probability of the right class, mean over a fixed validation batch, of which the film strip shows a part."""
    labels = subject.val_split.fine_labels[:WATCHED, None]
    first, *_, last = (logits.softmax(1).gather(1, labels).mean().item() for logits in subject.trained.moments)
    return Outcome(last > 2 * first, f"{last:.4f}",
                   f"probability of the right class above twice that at the start, {first:.4f}; see {STRIP}")


def train_val_gap(subject: Subject) -> Outcome:
    """What was trained on is known better than what was not, which in turn is known better than nothing.

    Both losses by one measure: pictures as they are, in evaluation mode, the last weights.
    """
    train_loss, val_loss = (_loss(subject.trained.model, split) for split in (subject.train_split, subject.val_split))
    return Outcome(train_loss + MARGIN < val_loss < subject.chance_loss, f"{val_loss - train_loss:+.3f}",
                   f"above {MARGIN:+}, validation loss {val_loss:.3f} less training loss {train_loss:.3f}; "
                   f"the former below ln {subject.classes}")


def validation_by_hand(subject: Subject) -> Outcome:
    """The validation loss that the training reports is that of the pictures as they are, in evaluation mode.

    By hand it is taken in other batches, so it differs if validation pictures are augmented, and if what is said of
    one depends on its neighbours, as with batch normalisation in training mode.
    """
    model, split = subject.trained.model.eval(), subject.val_split
    order = torch.arange(len(split)).flip(0).split(300)
    with torch.no_grad():
        losses = [F.cross_entropy(model(to_float(split.images[index])), split.fine_labels[index], reduction="sum")
                  for index in order]
    by_hand, reported = sum(losses).item() / len(split), subject.trained.rows[-1]["val_loss"]
    return Outcome(abs(by_hand - reported) < 1e-3, f"{abs(by_hand - reported):.1e}",
                   f"below 1e-3 between the validation loss reported, {reported:.4f}, and the one by hand")


def modes_agree(subject: Subject) -> Outcome:
    """Batch normalisation says of training pictures much the same with the batch's statistics and with those kept.

    Not quite the same, since those kept are of augmented pictures: MixUp makes them 0.1 too different for the MLP.
    """
    few = subject.train_split[torch.arange(FEW_PICTURES)]
    kept = _loss(subject.trained.model, few)
    model = copy.deepcopy(subject.trained.model).train()  # a copy, for this changes what is kept
    with torch.no_grad():
        of_batch = F.cross_entropy(model(to_float(few.images)), few.fine_labels).item()
    return Outcome(abs(of_batch - kept) < 0.3, f"{of_batch - kept:+.3f}",
                   "within 0.3, the loss of training pictures in training mode less that in evaluation mode")


def _loss(model: nn.Module, split: Split) -> float:
    return F.cross_entropy(compute_logits(model, split.images), split.fine_labels).item()


CHECKS: dict[str, Callable[[Subject], Outcome]] = {
    "loss at initialisation": loss_at_initialisation,
    "same seed, same loss": same_seed_same_loss,
    "input-independent baseline": input_independent_baseline,
    "overfit one batch": overfit_one_batch,
    "gradients are forgotten": gradients_are_forgotten,
    "more capacity, lower loss": more_capacity_lower_loss,
    "gradient of one example": gradient_of_one_example,
    "predictions over time": predictions_over_time,
    "train/val gap": train_val_gap,
    "validation by hand": validation_by_hand,
    "batch norm's two modes": modes_agree,
}


def run_check(check: Callable[[Subject], Outcome], subject: Subject) -> Outcome:
    """A check's outcome; a training whose loss is no longer finite is a failure too."""
    try:
        return check(subject)
    except UserError as problem:
        return Outcome(False, "none", str(problem))


# ---------------------------------------------------------------------------------------------------------------------
# The film strip
# ---------------------------------------------------------------------------------------------------------------------


def film_strip(subject: Subject):
    """The first SHOWN watched pictures, a row each, with what the network takes them for from epoch to epoch, as a
    matplotlib Figure. A cell is the fuller the surer the network is; right ones are framed and ticked.
    """
    from matplotlib.figure import Figure

    names = [name.replace("_", " ") for name in subject.val_split.fine_names]
    labels = subject.val_split.fine_labels[:SHOWN].tolist()
    moments = [logits[:SHOWN].softmax(1).max(1) for logits in subject.trained.moments]
    figure = Figure(figsize=(10.5, 0.75 * SHOWN + 1), layout="constrained")
    axes = figure.subplots()
    for row, label in enumerate(labels):
        axes.imshow(subject.val_split.images[row].permute(1, 2, 0).numpy(), interpolation="nearest", aspect="auto",
                    extent=(-1.3, -0.58, row + 0.46, row - 0.46))
        for column, (probabilities, predicted) in enumerate(moments):
            _draw_cell(axes, column, row, names[predicted[row]], float(probabilities[row]), predicted[row] == label)
    axes.set(xlim=(-1.4, len(moments) - 0.45), ylim=(SHOWN - 0.5, -0.5), xlabel="epochs trained",
             ylabel="validation picture, and its class")
    axes.set_xticks(range(len(moments)))
    axes.set_yticks(range(SHOWN), [textwrap.fill(names[label], 14) for label in labels])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    data = "SYNTHETIC PICTURES, not CIFAR-100" if subject.settings.synthetic else "CIFAR-100"
    figure.suptitle(f"{subject.name}, {data}: the most probable class and its probability "
                    "(blue, ✓: right; orange: wrong)")
    return figure


def _draw_cell(axes: Any, column: int, row: int, name: str, probability: float, right: bool) -> None:
    from matplotlib.patches import Rectangle

    colour = BLUE if right else ORANGE
    axes.add_patch(Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, facecolor=(colour, 0.08 + 0.6 * probability),
                             edgecolor=colour if right else "none", linewidth=2))
    axes.text(column, row, f"{textwrap.fill(name, 13)}\n{'✓ ' if right else ''}{100 * probability:.0f}%", fontsize=8,
              ha="center", va="center", fontweight="bold" if right else "normal")


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="sanity_checks.py", description=__doc__)
    parser.add_argument("--model", choices=tuple(NETWORKS), metavar="|".join(NETWORKS),
                        help="check only this network (default: all of them)")
    parser.add_argument("--synthetic", action="store_true", help="use procedurally drawn pictures")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="decides all that is random (default: 0)")
    parser.add_argument("--data-dir", default=default_data_dir(), metavar="FOLDER", help="folder of the data set")
    parser.add_argument("--results-dir", type=Path, default=RESULTS_DIR, metavar="FOLDER", help="folder of all runs")
    options = parser.parse_args(argv)
    Settings(seed=options.seed)  # complains of it now, before the data set is fetched
    train_split, val_split = load_cifar100(options.data_dir, use_synthetic=options.synthetic)
    train_split = train_split[torch.arange(TRAIN_PICTURES)]
    try:
        failed = [name for name in ([options.model] if options.model else NETWORKS)
                  if not check_network(make_subject(name, options.seed, options.synthetic, train_split, val_split),
                                       options.results_dir)]
    except Interrupted as stop:
        print(f"{stop}: stopped", file=sys.stderr)
        return stop.status
    return 1 if failed else 0


def make_subject(name: str, seed: int, synthetic: bool, train_split: Split, val_split: Split) -> Subject:
    """The network `name` of NETWORKS, in the precision that is faster on this machine."""
    network = NETWORKS[name]
    settings = prepare_device(network.script.recipe_settings(network.recipe, **network.changes, seed=seed,
                                                             synthetic=synthetic, device="cpu"))
    subject = Subject(name, network, settings, train_split, val_split)
    return replace(subject, settings=choose_precision(subject.fresh(settings), train_split, settings))


def check_network(subject: Subject, results_dir: Path) -> bool:
    """Print a line a check, draw the film strip; returns whether all passed."""
    settings, start = subject.settings, time.monotonic()
    folder = results_dir / "sanity_checks" / subject.name
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{subject.name}: the recipe {settings.recipe}, {settings.epochs} epochs on {len(subject.train_split):,} "
          f"{settings.pictures}, {settings.precision} on the CPU with {settings.threads} threads", flush=True)
    passed = []
    for name, check in CHECKS.items():
        outcome = run_check(check, subject)
        passed.append(outcome.passed)
        print(f"{'PASS' if outcome.passed else 'FAIL'}  {name:<27} {outcome.number:<14} {outcome.expected}", flush=True)
    with contextlib.suppress(UserError):  # a training that did not get to its end has nothing to show
        save_figure(film_strip(subject), folder / STRIP)
        print(f"the predictions over time are drawn in {folder / STRIP}")
    print(f"{subject.name}: {sum(passed)} of {len(passed)} passed, {time.monotonic() - start:.0f} s", flush=True)
    return all(passed)


if __name__ == "__main__":
    sys.exit(exit_status(main))
