"""Look at the dataset before training on it: figures and lists in results/data/.

    python -m tools.explore                # a minute or two on two CPU cores
    python -m tools.explore --synthetic    # the procedurally drawn images, in results/data-synthetic/

    superclasses.png      one training image per class, by superclass, with the names of all classes
    means.png             the mean training image of each class, in the same order
    extremes.png          the darkest and brightest images, lowest and highest contrast and saturation
    inputs.png            network inputs with the recipe `fast`, epoch by epoch
    inputs_mlp.png        the same with the recipe `mlp`
    label_counts.csv      training, validation and test images per class
    baselines.csv         validation accuracy of rules that need no training
    near_duplicates.png   test images next to the training images that they nearly repeat
    near_duplicates.csv   all of these pairs, each image named by its hash (`utils.image_hashes`)

Of the figures, only those that show every class have images of people: some are not fit for every screen.

The test set is opened only to count its images and to find near-duplicates of training images. Nothing is chosen by
the result: no training reads these files, and `evaluate.py` only adds the accuracy without near-duplicates.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_cnn
import train_mlp
from common.command_line import Parser, exit_status
from common.files import write_csv
from common.plotting import ORANGE, WIDTH, new_figure, save_figure
from common.text import spaced
from evaluation.figures import fit_to_show
from evaluation.metrics import coarse_of_fine
from models.layers import set_side
from training.loop import fit_and_place, make_mix
from training.settings import Script, Settings
from utils import (
    Split,
    batches,
    default_data_dir,
    derived_seed,
    image_hashes,
    load_cifar100,
    load_test_set,
    steps_per_epoch,
    to_float,
)

EXTREMES = 8  # images at each end
VIEWED, MAX_EPOCHS = 5, 9  # images and epochs in the figures of network inputs
PAIRS_PER_ROW, PAIR_ROWS = 4, 4
NAME_SIZE = 7.5  # points of the names of classes below their images

# We compared pairs by hand, once, with Barz and Denzler's list (github.com/cvjena/cifair). Nearly all pairs above 0.8
# are one photograph, edited, or one object on white; in three of four the training image is on their list. Below come
# horizons, apples and beetles that only look alike: half are on the list at 0.75 to 0.8, a third from 0.7 on.
SIMILAR = 0.8
COARSE_SIDE = 8  # side in pixels of the images that are compared when looking for candidates
CANDIDATES = 5  # training images that are compared closely with each test image
MAX_SHIFT = 2  # pixels
DETAIL = 9  # side in pixels of the squares whose mean is subtracted: edges and texture are left
BARZ_AND_DENZLER = 891  # rows of meta/duplicates_cifar100.csv in that repository


# ---- Numbers --------------------------------------------------------------------------------------------------------


def brightness(images: Tensor) -> Tensor:
    """The mean of an image, 0 to 100%: uint8 [N, 3, 32, 32] -> float32 [N]."""
    return 100 * to_float(images).mean((1, 2, 3))


def contrast(images: Tensor) -> Tensor:
    """The standard deviation of an image's gray values, 0 to 50%: uint8 [N, 3, 32, 32] -> float32 [N]."""
    return 100 * to_float(images).mean(1).flatten(1).std(1, correction=0)


def saturation(images: Tensor) -> Tensor:
    """The range of the three channels relative to the largest, 0 to 100%: uint8 [N, 3, 32, 32] -> float32 [N].

    Both are averaged over the image first, since a black pixel has no saturation.
    """
    largest, smallest = (to_float(channel) for channel in (images.amax(1), images.amin(1)))
    return 100 * (largest - smallest).mean((1, 2)) / largest.mean((1, 2)).clamp_min(1e-6)


def extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the smallest values, smallest first, and of the largest, largest first."""
    order = values.argsort(stable=True)
    return order[:EXTREMES], order.flip(0)[:EXTREMES]


def mean_images(split: Split) -> Tensor:
    """The mean image of each class, float32 [C, 3, 32, 32] in [0, 1]."""
    return torch.stack([(split.images[split.fine_labels == label].double().mean(0) / 255).float()
                        for label in range(len(split.fine_names))])


def superclass_of_class(split: Split) -> np.ndarray:
    """The superclass of each class, int64 [C], read off the labels."""
    return coarse_of_fine(split.fine_labels.numpy(), split.coarse_labels.numpy(), len(split.fine_names))


def label_counts(splits: Sequence[Split]) -> list[list[Any]]:
    """One row per class, ordered by superclass: superclass name, class name, number of images in each split."""
    names, coarse = splits[0], superclass_of_class(splits[0])
    counts = [torch.bincount(split.fine_labels, minlength=len(coarse)).tolist() for split in splits]
    return [[names.coarse_names[coarse[fine]], names.fine_names[fine], *(count[fine] for count in counts)]
            for fine in np.argsort(coarse, kind="stable").tolist()]


# ---- Trivial baselines ----------------------------------------------------------------------------------------------


def baselines(train: Split, val: Split) -> dict[str, float]:
    """Accuracy on `val`, in percent, of rules without any training: every network has to beat them."""
    most_frequent = torch.bincount(train.fine_labels).argmax()
    small_val, small_train = (F.adaptive_avg_pool2d(split.images.float(), COARSE_SIDE) for split in (val, train))
    guesses = {
        "most frequent class": most_frequent.expand(len(val)),
        "class with the nearest mean image": nearest(to_float(val.images), mean_images(train)),
        f"class of the nearest training image at {COARSE_SIDE} x {COARSE_SIDE} pixels":
            train.fine_labels[nearest(small_val, small_train)],
    }
    return {name: 100 * float((guess == val.fine_labels).double().mean()) for name, guess in guesses.items()}


def nearest(images: Tensor, others: Tensor) -> Tensor:
    """For each of `images`, the position in `others` of the one at the least Euclidean distance, int64 [N].

    Computed in float64, so that the order in which a processor adds does not change the answer.
    """
    images, others = images.flatten(1).double(), others.flatten(1).double()
    squares = others.square().sum(1)
    return torch.cat([(squares - 2 * chunk @ others.T).argmin(1) for chunk in images.split(500)])


# ---- Network inputs -------------------------------------------------------------------------------------------------


def network_inputs(
    script: Script, settings: Settings, split: Split, positions: Sequence[int], epochs: Sequence[int]
) -> list[Tensor]:
    """The network's inputs for the training images at `positions`: per epoch float32 [P, 3, S, S].

    Made by the same calls in the same order as in `training.loop.train`, so a training with these settings sees these
    very inputs: augmented and mixed batches, the network's own scaling and normalization. The normalization is undone
    again, so that 0 is black and 1 is white; jitter may go beyond.
    """
    numbered = dataclasses.replace(split, fine_labels=torch.arange(len(split)))  # to recognize the images
    model = fit_and_place(script.build_model(settings, len(split.fine_names)), split, settings)
    mix = make_mix(settings, num_classes=len(split.fine_names))
    steps = steps_per_epoch(len(split), settings.batch_size)
    inputs_per_epoch = []
    for epoch in epochs:
        set_side(model, settings.side_in(epoch))
        found: dict[int, Tensor] = {}
        shuffled = batches(numbered, settings.batch_size, settings.augmentation, seed=settings.seed, epoch=epoch)
        for step, (images, numbers) in enumerate(shuffled):
            wanted = [row for row, number in enumerate(numbers.tolist()) if number in positions]
            if wanted:
                torch.manual_seed(derived_seed("model", settings.seed, epoch, step))
                fraction = settings.fraction_done(epoch, step, steps)
                images, _ = mix(images, split.fine_labels[numbers], fraction)
                inputs = _without_normalization(model, _first_layer_input(model, images[wanted]))
                found |= dict(zip(numbers[wanted].tolist(), inputs, strict=True))
        inputs_per_epoch.append(torch.stack([found[position] for position in positions]))
    return inputs_per_epoch


@torch.no_grad()
def _first_layer_input(model: nn.Module, images: Tensor) -> Tensor:
    """The input of the first layer with weights, when `images` enter the model."""
    seen: list[Tensor] = []
    first = next(module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))
    hook = first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.eval()(images)  # batch norms, which come later, then accept a single image
    hook.remove()
    return seen[0]


def _without_normalization(model: nn.Module, inputs: Tensor) -> Tensor:
    """Inputs, flattened or not, as images [N, 3, S, S], with the model's normalization undone if it has one."""
    side = math.isqrt(inputs[0].numel() // 3)
    images = inputs.reshape(len(inputs), 3, side, side)
    normalize = getattr(model, "normalize", None)
    return images if normalize is None else images * normalize.std + normalize.mean


# ---- Near-duplicates ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matches:
    """For each test image, the most similar training image: positions, int64 [N], and similarity, float32 [N]."""

    train: Tensor
    similarity: Tensor

    @property
    def ranking(self) -> Tensor:
        """Positions of the test images, int64 [N], from the most to the least similar to a training image."""
        return self.similarity.argsort(descending=True, stable=True)

    @property
    def near_duplicates(self) -> Tensor:
        """Positions of the test images that nearly repeat a training image, the most similar first."""
        return self.ranking[:int((self.similarity >= SIMILAR).sum())]


def match(test: Tensor, train: Tensor) -> Matches:
    """Search `train` for each image of `test`, both uint8 [N, 3, 32, 32]: all of it coarsely, then a few closely.

    Finds copies that are shifted by up to two pixels, mirrored, or changed in brightness, contrast and, in part,
    color, but not scaled ones. So it finds fewer than Barz and Denzler (2020, arXiv 1902.00423), who took candidates
    from a network and judged them by eye.
    """
    found = candidates(test, train)
    similarities = torch.cat([
        torch.stack([similarity(images, train[column]) for column in chunk.T], 1)
        for images, chunk in zip(test.split(500), found.split(500), strict=True)])
    best, which = similarities.max(1)
    return Matches(found.gather(1, which[:, None])[:, 0], best)


def candidates(test: Tensor, train: Tensor) -> Tensor:
    """The training images nearest to each test image, mirrored or not, int64 [N, CANDIDATES].

    Compares images of 8 x 8 pixels after whitening: each principal direction of the training images is scaled to
    about unit variance. Otherwise the bright top or dark middle that most images share would dominate.
    """
    test, train = (F.adaptive_avg_pool2d(images.float(), COARSE_SIDE) for images in (test, train))
    mean = train.mean(0)
    variances, directions = torch.linalg.eigh(torch.cov((train - mean).flatten(1).T).double())
    whiten = (directions / (variances + 0.01 * variances.mean()).sqrt()).float()
    queries, plain, mirrored = (F.normalize((images - mean).flatten(1) @ whiten, dim=1)
                                for images in (test, train, train.flip(3)))
    return torch.cat([torch.maximum(chunk @ plain.T, chunk @ mirrored.T).topk(CANDIDATES, dim=1).indices
                      for chunk in queries.split(500)])


def similarity(images: Tensor, others: Tensor) -> Tensor:
    """The similarity of two images, at most 1, for pairs of uint8 [N, 3, 32, 32] -> float32 [N].

    It is the largest correlation between the details in the middle of one image and those in any part of the other
    that is equally large, mirrored or not.
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
    """[N, 3, H, W] -> vectors [N, 3HW] of length 1 and mean 0 in each channel, whose products are correlations."""
    return F.normalize((details - details.mean((2, 3), keepdim=True)).flatten(1), dim=1)


def near_duplicate_rows(matches: Matches, test: Split, train: Split) -> list[list[str]]:
    """The rows of `near_duplicates.csv`: the hashes of both images, their similarity, the classes of both."""
    of_test = matches.near_duplicates
    of_train = matches.train[of_test]
    hashes = zip(image_hashes(test.images[of_test]), image_hashes(train.images[of_train]), strict=True)
    return [[f"{test_hash:016x}", f"{train_hash:016x}", f"{matches.similarity[t]:.4f}",
             test.fine_names[test.fine_labels[t]], train.fine_names[train.fine_labels[n]]]
            for (test_hash, train_hash), t, n in zip(hashes, of_test, of_train, strict=True)]


# ---- Figures --------------------------------------------------------------------------------------------------------


def superclasses_figure(split: Split, *, synthetic: bool = False) -> Any:
    """The first training image of each class, one row per superclass, as a matplotlib Figure."""
    first = [int((split.fine_labels == fine).nonzero()[0, 0]) for fine in range(len(split.fine_names))]
    return _by_superclass(split, split.images[first], "One training image per class, by superclass", synthetic)


def means_figure(split: Split, *, synthetic: bool = False) -> Any:
    """The mean training image of each class, one row per superclass, as a matplotlib Figure."""
    return _by_superclass(split, mean_images(split), "Mean training image of each class, by superclass", synthetic)


def _by_superclass(split: Split, images: Tensor, title: str, synthetic: bool) -> Any:
    """One image per class, [C, 3, 32, 32], each with its name, below the names of the superclasses in two columns."""
    coarse, names = superclass_of_class(split), split.coarse_names
    rows = -(-len(names) // 2)
    figure = new_figure(WIDTH, 0.4 + 1.02 * rows, title, synthetic=synthetic)
    for axes, group in zip(figure.subplots(1, 2), (range(rows), range(rows, len(names))), strict=True):
        members = [np.flatnonzero(coarse == superclass).tolist() for superclass in group]
        _draw_grid(axes, [list(images[fine]) for fine in members], height=1.55,
                   below=[[spaced(split.fine_names[at]) for at in fine] for fine in members])
        for row, superclass in enumerate(group):
            axes.annotate(spaced(names[superclass]), (0, 1.55 * row), xytext=(0, 2), textcoords="offset points",
                          fontsize=9, fontweight="bold", annotation_clip=False)
    return figure


def extremes_figure(split: Split, *, synthetic: bool = False) -> Any:
    """The training images with the lowest and highest brightness, contrast and saturation, as a Figure."""
    fit = fit_to_show(split.coarse_labels.numpy(), split.coarse_names)
    images, rows, names = split.images[torch.from_numpy(fit)], [], []
    for measure in (brightness, contrast, saturation):
        values = measure(images)
        for which, word in zip(extremes(values), ("lowest", "highest"), strict=True):
            rows.append(list(images[which]))
            low, high = values[which].min(), values[which].max()
            names.append(f"{word} {measure.__name__}\n({low:.1f} to {high:.1f}%)")
    figure = new_figure(WIDTH, 4.5, "Extremes among the training images", synthetic=synthetic)
    _draw_grid(figure.subplots(), rows, names)
    return figure


def inputs_figure(script: Script, settings: Settings, split: Split, epochs: Sequence[int]) -> Any:
    """Some training images, and the network's inputs for them in these epochs, as a matplotlib Figure."""
    fit = fit_to_show(split.coarse_labels.numpy(), split.coarse_names)
    viewed = np.flatnonzero(fit)[:VIEWED].tolist()
    inputs = network_inputs(script, settings, split, viewed, epochs)
    columns = ["as stored\n32 x 32", *(f"epoch {epoch + 1}\n{images.shape[2]} x {images.shape[3]}"
                                       for epoch, images in zip(epochs, inputs, strict=True))]
    classes = [spaced(split.fine_names[label]) for label in split.fine_labels[viewed]]
    mixed = (", each image mixed with another" if settings.mixup
             else ", some with a part of another" if settings.cutmix else "")
    figure = new_figure(WIDTH, 3.9, f"Network inputs with the recipe {settings.recipe}, seed {settings.seed}{mixed}",
                        synthetic=settings.synthetic)
    _draw_grid(figure.subplots(), list(zip(split.images[viewed], *inputs, strict=True)), classes, columns)
    return figure


def near_duplicates_figure(matches: Matches, test: Split, train: Split, *, synthetic: bool = False) -> Any:
    """Pairs of a test and a training image with both labels, as a matplotlib Figure.

    Those with one label range from the most to the least similar; then come some with two, and the first pairs below
    SIMILAR.
    """
    counted = matches.near_duplicates
    fit = torch.from_numpy(fit_to_show(test.coarse_labels.numpy(), test.coarse_names))
    agree = test.fine_labels == train.fine_labels[matches.train]
    shown, differing = counted[fit[counted] & agree[counted]], counted[fit[counted] & ~agree[counted]]
    below = matches.ranking[len(counted):]
    spread = np.linspace(0, max(0, len(shown) - 1), min(len(shown), PAIRS_PER_ROW * PAIR_ROWS)).astype(int)
    rows = [(f"{matches.similarity[row[0]]:.2f} to\n{matches.similarity[row[-1]]:.2f}", row)
            for row in shown[spread].split(PAIRS_PER_ROW) if len(row)]
    rows += [("two\nlabels", differing[:PAIRS_PER_ROW]),
             (f"below\n{SIMILAR:.2f}: not\ncounted", below[fit[below]][:PAIRS_PER_ROW])]
    rows = [(name, row) for name, row in rows if len(row)]
    title = f"{len(counted):,} of {len(test):,} test images nearly repeat a training image"
    figure = new_figure(WIDTH, 0.7 + 1.0 * len(rows), title, synthetic=synthetic)
    images, labels = [], []
    for _, row in rows:
        pairs = list(zip(row.tolist(), matches.train[row].tolist(), strict=True))
        images.append([image for t, n in pairs for image in (test.images[t], train.images[n])])
        labels.append([spaced(name) for t, n in pairs for name in (test.fine_names[test.fine_labels[t]],
                                                                  train.fine_names[train.fine_labels[n]])])
    axes = figure.subplots()
    _draw_grid(axes, images, [name for name, _ in rows], ["test", "training"] * PAIRS_PER_ROW, height=1.3,
               below=labels, pairs=True)
    axes.set_ylabel("similarity")
    return figure


def _draw_grid(axes: Any, rows: Sequence[Sequence[Tensor]], row_names: Sequence[str] = (),
               column_names: Sequence[str] = (), *, height: float = 1, below: Sequence[Sequence[str]] = (),
               pairs: bool = False) -> None:
    """Draw rows of images, uint8 or float in [0, 1], [3, H, W], each in a cell of the same size, 1 wide.

    below: a name for each image. pairs: each two images belong together; names that differ are orange.
    """
    width = 0.94

    def left(column: int) -> float:
        return column - 0.04 * (column % 2) + 0.04 if pairs else column

    for down, row in enumerate(rows):
        for right, image in enumerate(row):
            image = to_float(image) if image.dtype == torch.uint8 else image.clamp(0, 1)
            axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest",
                        extent=(left(right), left(right) + width, height * down + width, height * down))
            if below:
                differ = pairs and below[down][right] != below[down][right ^ 1]
                axes.annotate(below[down][right].replace(" ", "\n"), (left(right) + width / 2, height * down + width),
                              xytext=(0, -1), textcoords="offset points", ha="center", va="top", fontsize=NAME_SIZE,
                              linespacing=0.9, color=ORANGE if differ else "black", annotation_clip=False)
    axes.set(xlim=(0, max(map(len, rows))), ylim=(height * len(rows), 0), aspect="equal")
    axes.set_anchor("NW")  # in the middle of its place, a grid could be too close to the edge for its names
    axes.set_xticks([left(column) + width / 2 for column in range(len(column_names))], column_names, fontsize=8.5)
    axes.set_yticks(height * np.arange(len(row_names)) + width / 2, row_names, fontsize=8.5)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)


# ---- The command ----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m tools.explore", description=__doc__)
    parser.add_data_dir()
    parser.add_results_dir()
    parser.add_synthetic()
    options = parser.parse_args(argv)
    data_dir, synthetic = options.data_dir or default_data_dir(), options.synthetic
    train, val = load_cifar100(data_dir, use_synthetic=synthetic)
    everything, _ = load_cifar100(data_dir, train_on_all=True, use_synthetic=synthetic)
    test = load_test_set(data_dir, use_synthetic=synthetic)
    folder = options.results_dir / ("data-synthetic" if synthetic else "data")
    folder.mkdir(parents=True, exist_ok=True)

    # Labels.
    parts = ("training", "validation", "test")
    counts = label_counts((train, val, test))
    write_csv(folder / "label_counts.csv", ["superclass", "class", *parts], counts)
    for column, part in enumerate(parts, start=2):
        each = [row[column] for row in counts]
        print(f"{sum(each):>6,} {part} images, {min(each)} to {max(each)} in each of {len(each)} classes", flush=True)

    # Trivial baselines.
    rules = [[name, f"{accuracy:.2f}"] for name, accuracy in baselines(train, val).items()]
    write_csv(folder / "baselines.csv", ["rule", "validation accuracy (%)"], rules)
    print("validation accuracy of rules that need no training:")
    print("\n".join(f"{accuracy:>6}% {name}" for name, accuracy in rules), flush=True)

    # Training images, as they are stored and as they enter a network.
    for draw, file in ((superclasses_figure, "superclasses.png"), (means_figure, "means.png"),
                       (extremes_figure, "extremes.png")):
        save_figure(draw(everything, synthetic=synthetic), folder / file)
    for script, recipe, file in ((train_cnn.SCRIPT, "fast", "inputs.png"), (train_mlp.SCRIPT, "mlp", "inputs_mlp.png")):
        settings = script.recipe_settings(recipe, device="cpu", synthetic=synthetic)
        epochs = range(min(settings.epochs, MAX_EPOCHS))
        save_figure(inputs_figure(script, settings, everything, epochs), folder / file)

    # Near-duplicates.
    matches = match(test.images, everything.images)
    pairs = near_duplicate_rows(matches, test, everything)
    write_csv(folder / "near_duplicates.csv",
              ["test_hash", "train_hash", "similarity", "test_class", "train_class"], pairs)
    save_figure(near_duplicates_figure(matches, test, everything, synthetic=synthetic), folder / "near_duplicates.png")
    identical = sum(test_hash == train_hash for test_hash, train_hash, *_ in pairs)
    mislabeled = sum(test_class != train_class for *_, test_class, train_class in pairs)
    print(f"{len(pairs):,} of {len(test):,} test images ({100 * len(pairs) / len(test):.1f}%) nearly repeat a training "
          f"image: {identical:,} byte for byte, {mislabeled:,} with another class")
    if not synthetic:
        print(f"Barz and Denzler (2020), judging a network's proposals by eye, found {BARZ_AND_DENZLER}")
    print(f"figures and lists are in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
