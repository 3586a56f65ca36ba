"""Become one with the data: pictures and numbers to look at before, and beside, any training.

    python explore.py                # writes results/data/; a minute or two on two CPU cores
    python explore.py --synthetic    # the same of the procedurally drawn pictures, in results/data-synthetic/

    superclasses.png      one training picture of every class, by superclass
    means.png             the mean training picture of every class
    extremes.png          the darkest and brightest pictures, the least and most contrast and saturation
    inputs.png            what enters the network of the recipe `fast` of some pictures, epoch by epoch
    inputs_mlp.png        the same for the recipe `mlp`
    label_counts.csv      training, held-out and test pictures of each class
    baselines.csv         how often rules without any training are right on the held-out pictures
    near_duplicates.png   test pictures beside the training pictures that they nearly repeat
    near_duplicates.csv   all of these pairs, each picture named by its hash (`utils.picture_hashes`)

The test set is opened to count it and to say how much of it can be known by heart. Nothing is chosen by what is found:
no training reads a file of this folder, and `evaluate.py` only reports accuracy without the near-duplicates as well.
"""

import csv
import dataclasses
import io
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_cnn
import train_mlp
from engine import fit_and_place, make_mixup
from models.layers import set_side
from runs import save_figure, write_text
from settings import RESULTS_DIR, Parser, Script, Settings, exit_status
from utils import (
    Split,
    batches,
    default_data_dir,
    derived_seed,
    load_cifar100,
    load_test_set,
    picture_hashes,
    to_float,
)

EXTREMES = 8  # pictures at each end
VIEWED, MOST_EPOCHS = 5, 9  # pictures whose views are shown, and in how many epochs
PAIRS_IN_A_ROW, PAIR_ROWS = 6, 5

# Near-duplicates. Of the pairs sorted by similarity, nearly all above 0.8 are one photograph, edited, or one object on
# white; below come ever more horizons, apples and beetles that only look alike. They were compared once, by hand, with
# Barz and Denzler's list in github.com/cvjena/cifair: above 0.8 three in four have a training picture that is on it,
# from 0.75 to 0.8 a half, from 0.7 on a third.
SIMILAR = 0.8
COARSE_SIDE = 8  # pixels a side of the pictures among which candidates are looked for
CANDIDATES = 5  # training pictures that are compared closely with each test picture
MAX_SHIFT = 2  # pixels
DETAIL = 9  # pixels a side of the squares whose mean is subtracted: what is left is edges and texture
BARZ_AND_DENZLER = 891  # rows of meta/duplicates_cifar100.csv in that repository


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


def brightness(images: Tensor) -> Tensor:
    """The mean of a picture, 0 to 100%: uint8 [N, 3, 32, 32] -> float32 [N]."""
    return 100 * to_float(images).mean((1, 2, 3))


def contrast(images: Tensor) -> Tensor:
    """The standard deviation of a picture's grey values, 0 to 50%: uint8 [N, 3, 32, 32] -> float32 [N]."""
    return 100 * to_float(images).mean(1).flatten(1).std(1, correction=0)


def saturation(images: Tensor) -> Tensor:
    """How far the channels are apart, as a share of the largest, 0 to 100%: uint8 [N, 3, 32, 32] -> float32 [N].

    Both are averaged over the picture first, since black pixels have no saturation of their own.
    """
    largest, smallest = (to_float(channel) for channel in (images.amax(1), images.amin(1)))
    return 100 * (largest - smallest).mean((1, 2)) / largest.mean((1, 2)).clamp_min(1e-6)


def extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the smallest values, the smallest first, and of the largest, the largest first."""
    order = values.argsort(stable=True)
    return order[:EXTREMES], order.flip(0)[:EXTREMES]


def mean_pictures(split: Split) -> Tensor:
    """The mean picture of every class, float32 [C, 3, 32, 32] in [0, 1]."""
    return torch.stack([(split.images[split.fine_labels == label].double().mean(0) / 255).float()
                        for label in range(len(split.fine_names))])


def coarse_of_fine(split: Split) -> Tensor:
    """The superclass of each class, int64 [C], as the labels have it."""
    table = torch.zeros(len(split.fine_names), dtype=torch.int64)
    table[split.fine_labels] = split.coarse_labels
    return table


def label_counts(splits: Sequence[Split]) -> list[list[Any]]:
    """A row for each class, superclass by superclass: its superclass's name, its own, its pictures in each split."""
    names, coarse = splits[0], coarse_of_fine(splits[0])
    counts = [torch.bincount(split.fine_labels, minlength=len(coarse)).tolist() for split in splits]
    return [[names.coarse_names[coarse[fine]], names.fine_names[fine], *(count[fine] for count in counts)]
            for fine in coarse.argsort(stable=True).tolist()]


# ---------------------------------------------------------------------------------------------------------------------
# Dumb baselines
# ---------------------------------------------------------------------------------------------------------------------


def baselines(train: Split, val: Split) -> dict[str, float]:
    """How often rules without any training are right on `val`, in percent: what every network has to beat."""
    most_frequent = torch.bincount(train.fine_labels).argmax()
    small, others = (F.adaptive_avg_pool2d(split.images.float(), COARSE_SIDE) for split in (val, train))
    guesses = {
        "the most frequent class": most_frequent.expand(len(val)),
        "the class with the nearest mean picture": nearest(to_float(val.images), mean_pictures(train)),
        f"the class of the nearest picture of {COARSE_SIDE} x {COARSE_SIDE} pixels":
            train.fine_labels[nearest(small, others)],
    }
    return {name: 100 * float((guess == val.fine_labels).double().mean()) for name, guess in guesses.items()}


def nearest(pictures: Tensor, others: Tensor) -> Tensor:
    """For each of `pictures` the position, int64 [N], of the one among `others` at the least Euclidean distance.

    In float64, so that the order in which a processor adds decides nothing.
    """
    pictures, others = pictures.flatten(1).double(), others.flatten(1).double()
    squares = others.square().sum(1)
    return torch.cat([(squares - 2 * some @ others.T).argmin(1) for some in pictures.split(500)])


# ---------------------------------------------------------------------------------------------------------------------
# What enters a network
# ---------------------------------------------------------------------------------------------------------------------


def network_inputs(
    script: Script, settings: Settings, split: Split, positions: Sequence[int], epochs: Sequence[int]
) -> list[Tensor]:
    """What the network sees of the training pictures at `positions`, decoded: for each epoch float32 [P, 3, S, S].

    Made by the training's own calls in its own order (`engine.train`), so these are the very views of a training with
    these settings: batches with augmentation, MixUp, the network's own scaling and normalisation. The latter is undone
    to look at them; 0 is black and 1 white, and jitter may go beyond.
    """
    numbered = dataclasses.replace(split, fine_labels=torch.arange(len(split)))  # to know the pictures again
    model = fit_and_place(script.build_model(settings, len(split.fine_names)), split, settings)
    mix = make_mixup(settings.mixup, num_classes=len(split.fine_names))
    views = []
    for epoch in epochs:
        set_side(model, settings.side_in(epoch))
        found: dict[int, Tensor] = {}
        for step, (images, numbers) in enumerate(batches(
                numbered, settings.batch_size, settings.augmentation, seed=settings.seed, epoch=epoch)):
            wanted = [row for row, number in enumerate(numbers.tolist()) if number in positions]
            if wanted:
                torch.manual_seed(derived_seed("model", settings.seed, epoch, step))
                images, _ = mix(images, split.fine_labels[numbers])
                inputs = _decoded(model, _input_of_first_layer(model, images[wanted]))
                found |= dict(zip(numbers[wanted].tolist(), inputs, strict=True))
        views.append(torch.stack([found[position] for position in positions]))
    return views


@torch.no_grad()
def _input_of_first_layer(model: nn.Module, images: Tensor) -> Tensor:
    """What the first layer with weights is given when the model is given `images`."""
    seen: list[Tensor] = []
    first = next(module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))
    hook = first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.eval()(images)  # a single picture will do for batch norms then, and they come later
    hook.remove()
    return seen[0]


def _decoded(model: nn.Module, inputs: Tensor) -> Tensor:
    """Inputs, flattened or not, as pictures [N, 3, S, S], the model's normalisation undone if it has one."""
    side = math.isqrt(inputs[0].numel() // 3)
    pictures = inputs.reshape(len(inputs), 3, side, side)
    normalize = getattr(model, "normalize", None)
    return pictures if normalize is None else pictures * normalize.std + normalize.mean


# ---------------------------------------------------------------------------------------------------------------------
# Near-duplicates
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matches:
    """For every test picture the training picture most like it: positions, int64 [N], and similarity, float32 [N]."""

    train: Tensor
    similarity: Tensor

    @property
    def ranking(self) -> Tensor:
        """Positions of the test pictures, int64 [N], from the most to the least similar to a training picture."""
        return self.similarity.argsort(descending=True, stable=True)

    @property
    def near_duplicates(self) -> Tensor:
        """Positions of the test pictures that nearly repeat a training picture, the most similar first."""
        return self.ranking[:int((self.similarity >= SIMILAR).sum())]


def match(test: Tensor, train: Tensor) -> Matches:
    """Look for each picture of `test` in `train`, both uint8 [N, 3, 32, 32]: coarsely among all, closely among a few.

    It knows shifts by two pixels, mirror images and changes of brightness, contrast and, in part, colour; not those of
    scale, so it finds fewer than Barz and Denzler (2020, arXiv 1902.00423), who asked a network for candidates and
    judged them by eye.
    """
    found = candidates(test, train)
    similarities = torch.cat([
        torch.stack([similarity(images, train[column]) for column in some.T], 1)
        for images, some in zip(test.split(500), found.split(500), strict=True)])
    best, which = similarities.max(1)
    return Matches(found.gather(1, which[:, None])[:, 0], best)


def candidates(test: Tensor, train: Tensor) -> Tensor:
    """The training pictures nearest to each test picture, int64 [N, CANDIDATES], mirrored or not.

    Compared are pictures of 8 x 8 pixels, whitened: each principal direction of the training pictures scaled to about
    unit variance, since most pictures have a bright top or a dark middle in common.
    """
    test, train = (F.adaptive_avg_pool2d(images.float(), COARSE_SIDE) for images in (test, train))
    mean = train.mean(0)
    variances, directions = torch.linalg.eigh(torch.cov((train - mean).flatten(1).T).double())
    whiten = (directions / (variances + 0.01 * variances.mean()).sqrt()).float()
    asked, plain, mirrored = (F.normalize((images - mean).flatten(1) @ whiten, dim=1)
                              for images in (test, train, train.flip(3)))
    return torch.cat([torch.maximum(some @ plain.T, some @ mirrored.T).topk(CANDIDATES, dim=1).indices
                      for some in asked.split(500)])


def similarity(images: Tensor, others: Tensor) -> Tensor:
    """How alike two pictures are, at most 1, for pairs of uint8 [N, 3, 32, 32] -> float32 [N].

    It is the correlation between the details of the one's middle and of any equally large part of the other, mirrored
    or not: the largest of all.
    """
    side = images.shape[3] - 2 * MAX_SHIFT
    middle = _direction(_details(images)[:, :, MAX_SHIFT:MAX_SHIFT + side, MAX_SHIFT:MAX_SHIFT + side])
    details, best = _details(others), torch.full((len(images),), -1.0)
    for other in (details, details.flip(3)):
        for down in range(2 * MAX_SHIFT + 1):
            for right in range(2 * MAX_SHIFT + 1):
                part = _direction(other[:, :, down:down + side, right:right + side])
                best = torch.maximum(best, (middle * part).sum(1))
    return best


def _details(images: Tensor) -> Tensor:
    images = to_float(images)
    return images - F.avg_pool2d(images, DETAIL, stride=1, padding=DETAIL // 2, count_include_pad=False)


def _direction(details: Tensor) -> Tensor:
    """[N, 3, H, W] -> vectors [N, 3HW] of mean 0 in each channel and of length 1, so their product is a correlation."""
    return F.normalize((details - details.mean((2, 3), keepdim=True)).flatten(1), dim=1)


def near_duplicate_rows(matches: Matches, test: Split, train: Split) -> list[list[str]]:
    """The rows of `near_duplicates.csv`: the hashes of both pictures, their similarity, the classes of both."""
    of_test = matches.near_duplicates
    of_train = matches.train[of_test]
    hashes = zip(picture_hashes(test.images[of_test]), picture_hashes(train.images[of_train]), strict=True)
    return [[f"{one:016x}", f"{other:016x}", f"{matches.similarity[t]:.4f}",
             test.fine_names[test.fine_labels[t]], train.fine_names[train.fine_labels[n]]]
            for (one, other), t, n in zip(hashes, of_test, of_train, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def superclasses_figure(split: Split):
    """The first training picture of every class, each superclass a row, as a matplotlib Figure."""
    first = {fine: int((split.fine_labels == fine).nonzero()[0, 0]) for fine in range(len(split.fine_names))}
    return _by_superclass(split, [split.images[first[fine]] for fine in range(len(split.fine_names))],
                          "One training picture of every class, by superclass")


def means_figure(split: Split):
    """The mean training picture of every class, each superclass a row, as a matplotlib Figure."""
    return _by_superclass(split, mean_pictures(split), "The mean training picture of every class, by superclass")


def _by_superclass(split: Split, pictures: Sequence[Tensor], title: str):
    """One picture a class, in the order of the labels; the superclasses in two columns of axes."""
    coarse, names = coarse_of_fine(split), split.coarse_names
    figure = _figure(8.6, 5.7, title)
    half = len(names) // 2
    for axes, group in zip(figure.subplots(1, 2), (range(half), range(half, len(names))), strict=True):
        _draw_grid(axes, [[pictures[fine] for fine in (coarse == c).nonzero()[:, 0].tolist()] for c in group],
                   [_two_lines(names[c]) for c in group])
    return figure


def extremes_figure(split: Split):
    """The training pictures at both ends of brightness, contrast and saturation, as a matplotlib Figure."""
    rows, names = [], []
    for measure in (brightness, contrast, saturation):
        values = measure(split.images)
        for which, word in zip(extremes(values), ("least", "most"), strict=True):
            rows.append(list(split.images[which]))
            low, high = values[which].min(), values[which].max()
            names.append(f"{word} {measure.__name__}\n({low:.1f} to {high:.1f}%)")
    figure = _figure(9, 5.6, "The extremes among the training pictures")
    _draw_grid(figure.subplots(), rows, names)
    return figure


def inputs_figure(script: Script, settings: Settings, split: Split, epochs: Sequence[int]):
    """Some training pictures and what the network sees of them in these epochs, as a matplotlib Figure."""
    positions = range(VIEWED)
    views = network_inputs(script, settings, split, positions, epochs)
    rows = [split.images[:VIEWED], *views]
    names = ["as stored\n32 x 32", *(f"epoch {epoch + 1}\n{view.shape[2]} x {view.shape[3]}"
                                     for epoch, view in zip(epochs, views, strict=True))]
    mixed = ", each mixed with another picture" if settings.mixup else ""
    figure = _figure(9, 4.8, f"What enters the network of the recipe {settings.recipe}, seed {settings.seed}{mixed}")
    _draw_grid(figure.subplots(), list(zip(*rows, strict=True)),
               [split.fine_names[split.fine_labels[position]] for position in positions], names)
    return figure


def near_duplicates_figure(matches: Matches, test: Split, train: Split):
    """Pairs of a test and a training picture, from the most similar to the last one counted and, in the last row, the
    first ones not counted, as a matplotlib Figure.
    """
    counted = matches.near_duplicates
    shown = counted[np.linspace(0, max(0, len(counted) - 1), min(len(counted), PAIRS_IN_A_ROW * PAIR_ROWS)).astype(int)]
    rows = [*shown.split(PAIRS_IN_A_ROW), matches.ranking[len(counted):][:PAIRS_IN_A_ROW]]
    rows = [row for row in rows if len(row)]
    names = [f"similarity\n{matches.similarity[row[0]]:.2f} to {matches.similarity[row[-1]]:.2f}" for row in rows]
    if len(counted) < len(test):
        names[-1] = f"not counted:\nbelow {SIMILAR:.2f}"
    figure = _figure(9, 4.8, f"{len(counted):,} of {len(test):,} test pictures nearly repeat a training picture")
    _draw_grid(figure.subplots(), [[picture for t in row.tolist()
                                    for picture in (test.images[t], train.images[matches.train[t]])] for row in rows],
               names, ["test", "training"] * PAIRS_IN_A_ROW)
    return figure


def _figure(width: float, height: float, title: str):
    from matplotlib.figure import Figure  # here, because importing matplotlib takes a good second

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title)
    return figure


def _draw_grid(axes: Any, rows: Sequence[Sequence[Tensor]], row_names: Sequence[str],
               column_names: Sequence[str] = ()) -> None:
    """Draw rows of pictures, uint8 or float in [0, 1], [3, H, W], each in a cell of the same size."""
    for down, row in enumerate(rows):
        for right, picture in enumerate(row):
            picture = to_float(picture) if picture.dtype == torch.uint8 else picture.clamp(0, 1)
            levels = (63 * picture).round() / 63  # nobody sees the difference, and the file is a third smaller
            axes.imshow(levels.permute(1, 2, 0).numpy(), interpolation="nearest",
                        extent=(right, right + 0.94, down + 0.94, down))
    axes.set(xlim=(0, max(map(len, rows))), ylim=(len(rows), 0), aspect="equal")
    axes.set_xticks(np.arange(len(column_names)) + 0.47, column_names, fontsize=8)
    axes.set_yticks(np.arange(len(rows)) + 0.47, [name.replace("_", " ") for name in row_names], fontsize=8)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)


def _two_lines(name: str) -> str:
    """A long name broken at the underscore or space nearest to its middle."""
    words = name.replace("_", " ")
    breaks = [i for i, letter in enumerate(words) if letter == " "]
    if len(words) < 16 or not breaks:
        return words
    middle = min(breaks, key=lambda i: abs(i - len(words) / 2))
    return f"{words[:middle]}\n{words[middle + 1:]}"


# ---------------------------------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="explore.py", description=__doc__)
    parser.add_argument("--data-dir", default=default_data_dir(), metavar="FOLDER", help="folder of the data set")
    parser.add_argument("--results-dir", type=Path, default=RESULTS_DIR, metavar="FOLDER", help="folder of all runs")
    parser.add_argument("--synthetic", action="store_true", help="look at the procedurally drawn pictures instead")
    options = parser.parse_args(argv)
    train, val = load_cifar100(options.data_dir, use_synthetic=options.synthetic)
    whole, _ = load_cifar100(options.data_dir, train_on_all=True, use_synthetic=options.synthetic)
    test = load_test_set(options.data_dir, use_synthetic=options.synthetic)
    folder = options.results_dir / ("data-synthetic" if options.synthetic else "data")
    folder.mkdir(parents=True, exist_ok=True)

    counts = label_counts((train, val, test))
    _write_csv(folder / "label_counts.csv", ["superclass", "class", "training", "held-out", "test"], counts)
    for column, part in enumerate(("training", "held-out", "test"), start=2):
        each = [row[column] for row in counts]
        print(f"{sum(each):>6,} {part} pictures, {min(each)} to {max(each)} of each of {len(each)} classes", flush=True)
    rows = [[name, f"{accuracy:.2f}"] for name, accuracy in baselines(train, val).items()]
    _write_csv(folder / "baselines.csv", ["rule", "held-out accuracy (%)"], rows)
    print("what is right of the held-out pictures without any training, by guessing")
    print("\n".join(f"{accuracy:>6}% {name}" for name, accuracy in rows), flush=True)
    save_figure(superclasses_figure(whole), folder / "superclasses.png")
    save_figure(means_figure(whole), folder / "means.png")
    save_figure(extremes_figure(whole), folder / "extremes.png")
    for script, recipe, file in ((train_cnn.SCRIPT, "fast", "inputs.png"), (train_mlp.SCRIPT, "mlp", "inputs_mlp.png")):
        settings = script.recipe_settings(recipe, device="cpu")
        epochs = range(min(settings.epochs, MOST_EPOCHS))
        save_figure(inputs_figure(script, settings, whole, epochs), folder / file)

    matches = match(test.images, whole.images)
    rows = near_duplicate_rows(matches, test, whole)
    _write_csv(folder / "near_duplicates.csv",
               ["test_hash", "train_hash", "similarity", "test_class", "train_class"], rows)
    save_figure(near_duplicates_figure(matches, test, whole), folder / "near_duplicates.png")
    identical, of_another_class = (sum(row[0] == row[1] for row in rows), sum(row[-2] != row[-1] for row in rows))
    print(f"{len(rows):,} of {len(test):,} test pictures ({100 * len(rows) / len(test):.1f}%) nearly repeat a training "
          f"picture, {identical:,} of them byte for byte, {of_another_class:,} one of another class")
    if not options.synthetic:
        print(f"Barz and Denzler (2020), judging by eye what a network proposed, found {BARZ_AND_DENZLER}")
    print(f"pictures and lists are in {folder}")
    return 0


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


if __name__ == "__main__":
    sys.exit(exit_status(main))
