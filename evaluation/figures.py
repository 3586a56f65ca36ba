"""Figures of finished runs, each a function of arrays that returns a matplotlib Figure.

Images are uint8 [N, 3, 32, 32], probabilities float64 [N, C], labels int64 [N], and `names` the classes by label.
"""

import math
import re
from itertools import cycle
from typing import Any

import numpy as np

from common.plotting import BLUE, MARKERS, ORANGE, PALETTE, WIDTH, label_ends, new_figure
from common.text import spaced
from evaluation.costs import OURS, measured_costs
from evaluation.metrics import Calibration

EXTREMES = 10  # best and worst classes that are colored
CLASS_COLUMNS = 3  # of class names in their figure
EXAMPLES, LOOKALIKES = 5, 3  # images per pair of confused classes
GALLERY_ROWS, GALLERY_COLUMNS = 5, 6
GALLERY_SIZE = GALLERY_ROWS * GALLERY_COLUMNS
FEW = 20  # images in a bin of confidence, below which its accuracy is mostly chance
ACCURACY_TICKS = (10, 20, 30, 40, 50, 60, 65, 70, 75, 80, 85, 90, 95)  # on an axis that is logarithmic in the error
LEAST_ERROR = 0.1  # points; a smaller error is drawn as this one, since the logarithm of 0 is infinite
MAX_CURVE_COLUMNS = 3  # of panels with learning curves

# Grids of images leave out this superclass (baby, boy, girl, man and woman): some of its photographs are not fit for
# every screen. Numbers never leave it out.
PEOPLE = "people"
ALIKE = 0.85  # correlation of two thumbnails, from which on a grid shows only one of the two images
THUMBNAIL = 4  # pixels a side: few, so that a shifted or enlarged copy is found

# The end of two captions.
BARS = ("Bars show the standard deviation over seeds, where there are several; numbers in brackets are epochs. The "
        "vertical scale is logarithmic in the error: halving the error is always the same step up.")

# By file name: what to see. The documents have these sentences under the figures, and a test compares them.
CAPTIONS = {
    "accuracy-time": "Up and to the left is better: more accuracy from less training time, all timed on one machine. "
                     + BARS,
    "accuracy-flops": "Up and to the left is better: more accuracy from less arithmetic, which unlike time is the same "
                      "on every machine. " + BARS,
    "curves": "Training accuracy over the epochs (blue, one line per seed) and test accuracy at the end (orange). The "
              "gap between their ends shows how much was memorized; augmentation narrows it. Where MixUp or CutMix "
              "mixes images, as in mlp and for most of strong and best, the two cannot be compared.",
    "confused": "Each row is a pair of classes: on the left the most confident mistakes, on the right correctly "
                "classified images of the class that they were taken for. Could you separate them?",
    "mistakes": "Above each image the prediction and its probability, below it the label. Some labels are wrong, and "
                "some images show both.",
    "classes": "Every class, from the least to the most accurate. Animals and people are mostly at the hard end, "
               "objects and scenes of one shape or color at the easy one.",
    "confusion": "Each row is a class, each column a prediction, and zero is white. The blocks along the diagonal are "
                 "the superclasses: they hold far more of the mistakes than chance would put there.",
    "reliability": "On the dotted diagonal, confidence equals accuracy. Above it a network is better than its "
                   "confidence suggests, below it worse; a fitted temperature brings the points closer to it.",
    "filters": "Noise, as on the left, means undertrained; smooth waves, edges and patches of color mean learned.",
    "class-map": "Neighbors look alike to the network. A long line marks a class that looks unlike the rest of its "
                 "superclass.",
    "grad-cam": "Yellow is what spoke most for the prediction: on the thing itself it is a good sign, on the "
                "background a warning.",
    "corruptions": "A panel per corruption, stronger to the right. A line that falls at once is a network that lives "
                   "on fine detail.",
    "search": "Most changes cost accuracy; the dark bars are the few that led to the best row.",
    "search-longer": "Wider layers, mirrored pairs, and more epochs with CutMix led to the best row; the other changes "
                     "lost or gave nothing.",
}


def confusion_figure(confusion: np.ndarray, coarse_of_fine: np.ndarray, coarse_names: tuple[str, ...], title: str):
    """The confusion matrix, int64 [C, C], with the classes ordered by superclass."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    figure = new_figure(WIDTH, 5.8, title)
    axes = figure.subplots()
    order = np.argsort(coarse_of_fine, kind="stable")
    share = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    from_white = LinearSegmentedColormap.from_list(
        "from white", ["white", *colormaps["magma_r"](np.linspace(0.08, 1, 12))])
    image = axes.imshow(share[np.ix_(order, order)], cmap=from_white, norm=PowerNorm(0.5, 0, 100),
                        interpolation="none")
    ends = np.flatnonzero(np.diff(coarse_of_fine[order])) + 0.5  # between two superclasses
    edges = np.concatenate([[-0.5], ends, [len(order) - 0.5]])
    present = sorted(set(coarse_of_fine.tolist()))
    for draw_line in (axes.axhline, axes.axvline):
        for end in ends:
            draw_line(end, color="0.8", lw=0.6)
    middles, numbers = (edges[:-1] + edges[1:]) / 2, range(1, len(present) + 1)
    axes.set_xticks(middles, numbers, fontsize=8.5)
    axes.set_yticks(middles, [f"{spaced(coarse_names[coarse])}  {number}"
                              for coarse, number in zip(present, numbers, strict=True)], fontsize=8.5)
    axes.set(xlabel="prediction, by superclass", ylabel="class of the image, by superclass")
    figure.colorbar(image, label="% of the class's images (square-root scale)", location="bottom",
                    aspect=40, pad=0.02, ticks=(0, 1, 5, 10, 25, 50, 100))
    return figure


def class_accuracy_figure(accuracy: np.ndarray, names: tuple[str, ...], title: str):
    """The accuracy of every class by name, percent [C], from the worst to the best."""
    order = np.argsort(accuracy, kind="stable")
    rows = -(-len(order) // CLASS_COLUMNS)
    figure = new_figure(WIDTH, 0.9 + 0.165 * rows, title)
    colors = np.full(len(order), "0.75", dtype=object)
    colors[:EXTREMES], colors[-EXTREMES:] = ORANGE, BLUE
    panels = figure.subplots(1, CLASS_COLUMNS, sharex=True)
    for axes, labels, color in zip(panels, np.split(order, [rows, 2 * rows]), np.split(colors, [rows, 2 * rows]),
                                   strict=True):
        bars = axes.barh(np.arange(len(labels)), accuracy[labels], color=color.tolist(), height=0.8)
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
        axes.set_yticks(np.arange(len(labels)), [spaced(names[label]) for label in labels], fontsize=8)
        axes.set(xlim=(0, 112), ylim=(rows - 0.4, -0.6), xticks=(0, 50, 100))
        axes.tick_params(axis="y", length=0, pad=2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"test top-1 accuracy (%), {np.nanmean(accuracy):.1f} on average; "
                     f"colored: the {EXTREMES} worst and best", fontsize=9.5)
    return figure


# ---- Grids of images ------------------------------------------------------------------------------------------------


def fit_to_show(coarse_labels: np.ndarray, coarse_names: tuple[str, ...]) -> np.ndarray:
    """Which images a grid may show, bool [N]: not those of PEOPLE."""
    return np.isin(coarse_labels, [at for at, name in enumerate(coarse_names) if name == PEOPLE], invert=True)


def all_different(images: np.ndarray, positions: np.ndarray, count: int, shown: list[np.ndarray]) -> list[int]:
    """The first `count` of `positions` whose images are not ALIKE to one another, nor to the `shown` thumbnails.

    Their own thumbnails are added to `shown`.
    """
    side = images.shape[-1] // THUMBNAIL * THUMBNAIL
    chosen: list[int] = []
    for at in positions:
        if len(chosen) == count:
            break
        blocks = images[at, :, :side, :side].reshape(3, THUMBNAIL, side // THUMBNAIL, THUMBNAIL, -1).mean((2, 4))
        thumbnail = blocks - blocks.mean((1, 2), keepdims=True)
        thumbnail /= max(np.linalg.norm(thumbnail), 1e-9)
        if all((thumbnail * other).sum() < ALIKE for other in shown):
            chosen.append(int(at))
            shown.append(thumbnail)
    return chosen


def _show(axes: Any, image: np.ndarray) -> None:
    axes.imshow(image.transpose(1, 2, 0), interpolation="nearest")
    axes.set(xticks=[], yticks=[])


def confused_pairs_figure(images: np.ndarray, probabilities: np.ndarray, labels: np.ndarray, fit: np.ndarray,
                          pairs: list[tuple[int, int, int]], names: tuple[str, ...], title: str):
    """One row per pair of `metrics.confused_pairs`: the most confident mistakes, and images of the predicted class.

    fit: which images may be shown, bool [N]. No image comes twice.
    """
    figure = new_figure(WIDTH, 0.4 + 1.13 * len(pairs), title)
    figure.get_layout_engine().set(h_pad=0.11)  # inches: for the text above each row
    grid = figure.subplots(len(pairs), EXAMPLES + LOOKALIKES, squeeze=False)
    predicted = probabilities.argmax(1)
    shown: list[np.ndarray] = []
    for row, (label, taken_for, times) in zip(grid, pairs, strict=True):
        by_confidence = np.argsort(-probabilities[:, taken_for], kind="stable")
        by_confidence = by_confidence[(predicted[by_confidence] == taken_for) & fit[by_confidence]]
        mistakes = by_confidence[labels[by_confidence] == label]
        recognized = by_confidence[labels[by_confidence] == taken_for]
        for axes in row:
            axes.axis("off")
        for panels, positions in ((row[:EXAMPLES], mistakes), (row[EXAMPLES:], recognized)):
            for axes, at in zip(panels, all_different(images, positions, len(panels), shown), strict=False):
                _show(axes, images[at])
        confusion = (f"{spaced(names[label])}, predicted as {spaced(names[taken_for])} "
                     f"({times} of {int((labels == label).sum())})")
        for axes, text, color in ((row[0], confusion, ORANGE),
                                  (row[EXAMPLES], f"{spaced(names[taken_for])}, correct", BLUE)):
            axes.annotate(text, (0, 1), xytext=(0, 3), xycoords="axes fraction", textcoords="offset points",
                          fontsize=9.5, color=color).set_in_layout(False)
    return figure


def mistakes_figure(images: np.ndarray, probabilities: np.ndarray, labels: np.ndarray, positions: np.ndarray,
                    names: tuple[str, ...], title: str):
    """A gallery of the images at `positions`, as far as they fit: above each its prediction, below it its label."""
    figure = new_figure(WIDTH, 1.5 * GALLERY_ROWS + 0.5, title)
    grid = figure.subplots(GALLERY_ROWS, GALLERY_COLUMNS)
    for axes in grid.flat:
        axes.axis("off")
    for axes, at in zip(grid.flat, all_different(images, positions, GALLERY_SIZE, []), strict=False):
        predicted = probabilities[at].argmax()
        _show(axes, images[at])
        axes.axis("on")
        axes.spines[:].set_visible(False)
        axes.set_title(f"{spaced(names[predicted])} {100 * probabilities[at, predicted]:.0f}%", fontsize=8.5, pad=3,
                       color=ORANGE)
        axes.set_xlabel(spaced(names[labels[at]]), fontsize=8.5, labelpad=3, color=BLUE)
    figure.supxlabel("above, orange: the prediction and its probability; below, blue: the label", fontsize=9.5)
    return figure


# ---- Numbers over numbers -------------------------------------------------------------------------------------------


def reliability_figure(variants: dict[str, Calibration], title: str):
    """Accuracy against confidence, and the images per bin of confidence, for each variant by name.

    Bins of fewer than FEW images are left out above.
    """
    figure = new_figure(WIDTH, 6.2, title)
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    axes.plot([0, 100], [0, 100], color="0.5", lw=1, ls=":", label="perfect calibration")
    for (name, found), color, marker in zip(variants.items(), PALETTE, MARKERS, strict=False):
        enough = found.count >= FEW
        label = f"{name}: mean gap (ECE) {found.ece:.2f} points"
        axes.plot(found.confidence[enough], found.accuracy[enough], marker + "-", color=color, ms=5, label=label)
        edges = np.linspace(0, 100, len(found.count) + 1)
        counts.stairs(found.count, edges, color=color, lw=1.8)
    axes.set(ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 100))
    axes.legend(frameon=False, loc="lower right")
    counts.set(xlabel=f"confidence (%), in {len(edges) - 1} bins; those below {FEW} images have no point",
               ylabel="images per bin")
    for panel in (axes, counts):
        panel.grid(alpha=0.3)
    return figure


def learning_curves_figure(curves: dict[str, list[dict[str, list[float]]]], accuracy: dict[str, float], title: str):
    """Training accuracy over the epochs in one panel per recipe, one line per run, and the test accuracy at the end.

    curves: by recipe, the columns of each seed's `metrics.csv`; accuracy: by recipe, on the test set, in percent.
    """
    columns = min(len(curves), 2 if len(curves) <= 4 else MAX_CURVE_COLUMNS)
    rows = -(-len(curves) // columns)
    figure = new_figure(WIDTH, 0.7 + 1.9 * rows, title)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes in panels.flat[len(curves):]:
        axes.axis("off")
    ranked = sorted(curves, key=lambda recipe: -accuracy[recipe])
    for axes, recipe in zip(panels.flat, ranked, strict=False):
        seeds = curves[recipe]
        for one in seeds:
            axes.plot(one["epoch"], one["train_acc"], color=BLUE, lw=1.2)
        axes.axhline(accuracy[recipe], color=ORANGE, lw=1.2, ls="--")
        at_end = float(np.mean([one["train_acc"][-1] for one in seeds]))
        axes.set_title(f"{recipe}, {len(seeds)} seeds" if len(seeds) > 1 else recipe, fontsize=10)
        axes.set(xlim=(0, seeds[0]["epoch"][-1]), ylim=(0, 100))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        label_ends(axes, [(at_end, f"{at_end:.0f}", BLUE), (accuracy[recipe], f"{accuracy[recipe]:.0f}", ORANGE)])
    figure.supxlabel("epoch (blue: training, one line per seed; orange: the test set, at the end)", fontsize=10)
    figure.supylabel("top-1 accuracy (%)", fontsize=10)
    return figure


def corruptions_figure(runs: dict[str, tuple[float, np.ndarray]], strengths: dict[str, tuple[str, tuple[float, ...]]],
                       title: str):
    """Accuracy against strength, one panel per corruption.

    runs: by name, the accuracy on unchanged images and on corrupted ones, [corruptions, strengths], in percent;
    strengths: by corruption, their meaning and their values, mildest first.
    """
    rows = -(-(len(strengths) + 1) // 3)  # the legend has a panel of its own
    figure = new_figure(WIDTH, 2.3 * rows, title)
    figure.supylabel("test accuracy (%)", fontsize=9)
    *panels, last = figure.subplots(rows, 3, sharey=True).flat
    for index, (corruption, (meaning, values)) in enumerate(strengths.items()):
        axes = panels[index]
        for (name, (clean, accuracy)), color, marker in zip(runs.items(), cycle(PALETTE), cycle(MARKERS)):
            axes.plot(range(len(values) + 1), [clean, *accuracy[index]], marker + "-", color=color, ms=4, label=name)
        axes.set(title=corruption, ylim=(0, None))
        axes.set_xlabel(meaning, fontsize=8)
        axes.set_xticks(range(len(values) + 1), ["none", *(f"{value:g}" for value in values)], fontsize=8)
        axes.grid(alpha=0.3)
    for axes in (*panels[len(strengths):], last):
        axes.axis("off")
    last.legend(*panels[0].get_legend_handles_labels(), loc="center", frameon=False)
    return figure


def accuracy_against(series: dict[str, dict[str, tuple[float, float, float | None]]], xlabel: str, title: str):
    """Test accuracy against a cost. The cost's axis is logarithmic, the accuracy's in the error, 100 - accuracy.

    series: by label in the legend, points (cost, top-1 in percent, its standard deviation over seeds or None) by name.
    """
    figure = new_figure(WIDTH, 4.4, title)
    axes = figure.subplots()
    for (label, points), color, marker in zip(series.items(), PALETTE, MARKERS, strict=False):
        costs, accuracies, deviations = zip(*points.values(), strict=True) if points else ((), (), ())
        if any(deviations):
            bars = [math.nan if deviation is None else deviation for deviation in deviations]
            axes.errorbar(costs, accuracies, bars, fmt=marker, color=color, capsize=4, label=label)
        else:
            axes.plot(costs, accuracies, marker, color=color, label=label)
    axes.set(ylabel="test top-1 accuracy (%)")
    axes.set_yscale("function", functions=(lambda top1: -np.log(np.maximum(100 - top1, LEAST_ERROR)),
                                           lambda scaled: 100 - np.exp(-scaled)))
    axes.set_yticks(ACCURACY_TICKS)
    axes.margins(x=0.25, y=0.15)
    _logarithmic(axes, xlabel)
    _name_points(axes, [(name, cost, accuracy, color) for points, color in zip(series.values(), PALETTE, strict=False)
                        for name, (cost, accuracy, _) in points.items()])
    if len(series) > 1:
        axes.legend(frameon=False, loc="lower right")
    return figure


def _name_points(axes: Any, points: list[tuple[str, float, float, str]], size: float = 9) -> None:
    """Write names, each with its point and color, above their points, or where no other point or name is."""
    width, height = (72 * inches for inches in axes.figure.get_size_inches())
    scale = np.array([0.88 * width, 0.75 * height])  # the axes in points, about
    to_fraction = (axes.transScale + axes.transLimits).transform
    places = [scale * to_fraction((x, y)) for _, x, y, _ in points]
    taken = [(*place, 6.0, 6.0) for place in places]  # middles, and half of widths and heights
    for (name, x, y, color), (left, up) in zip(points, places, strict=True):
        half = 0.3 * size * len(name)  # of its width
        offsets = ((0, 1.3 * size, "center"), (0, -1.3 * size, "center"), (size, 0, "left"), (-size, 0, "right"),
                   *((dx * size, dy * size, align) for dx, align in ((-1, "right"), (1, "left")) for dy in (-1.2, 1.2)),
                   (0, 2.6 * size, "center"))
        boxes = [(left + dx + {"center": 0, "left": half, "right": -half}[align], up + dy, half, 0.6 * size)
                 for dx, dy, align in offsets]
        free = [all(abs(box[0] - other[0]) > box[2] + other[2] or abs(box[1] - other[1]) > box[3] + other[3]
                    for other in taken) for box in boxes]
        best = free.index(True) if any(free) else 0
        taken.append(boxes[best])
        dx, dy, align = offsets[best]
        axes.annotate(name, (x, y), xytext=(dx, dy), ha=align, va="center", fontsize=size, color=color,
                      textcoords="offset points")


def _logarithmic(axes: Any, xlabel: str) -> None:
    """Give the x axis a logarithmic scale, and draw a grid; numbers are plain up to 10,000."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set(xscale="log", xlabel=xlabel)
    axes.grid(alpha=0.3)
    if axes.get_xlim()[1] < 1e5:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.xaxis.set_minor_formatter(NullFormatter())


# ---- Costs ----------------------------------------------------------------------------------------------------------


def accuracy_time_figure(rows: list[dict[str, Any]], text: str):
    """Test accuracy against training time, of the recipes in `rows` of results.json and of others'.

    text: as `benchmarks.time_to_accuracy` writes it, the machine and a table.
    """
    machine = text.splitlines()[0].replace(" (", "\n(")
    return accuracy_against(_costs_and_accuracies(rows, text, "minutes"),
                            f"minutes of training on {machine}", "Test accuracy against training time")


def accuracy_flops_figure(rows: list[dict[str, Any]], text: str):
    """The same against training FLOPs; `text` may be empty."""
    return accuracy_against(_costs_and_accuracies(rows, text, "flops"), "training FLOPs",
                            "Test accuracy against the arithmetic of the training")


def _costs_and_accuracies(
    rows: list[dict[str, Any]], text: str, cost: str
) -> dict[str, dict[str, tuple[float, float, float | None]]]:
    """Points (cost, top-1, its standard deviation or None) by name, for `accuracy_against`.

    cost: "flops", or "minutes", which are known only for the recipes in the table.
    """
    measured = measured_costs(text)
    known = {row["name"].removeprefix(OURS): row[cost] for row in measured if row["name"].startswith(OURS)}
    if cost == "flops":
        known = {row["recipe"]: row["train_flops"] for row in rows}
    ours = {row["recipe"]: (known[row["recipe"]], row["top1"]["mean"], row["top1"]["std"])
            for row in rows if row["recipe"] in known}
    others = {re.split(", |/", row["name"])[-1].replace(" epochs)", ")"): (row[cost], row["accuracy"], None)
              for row in measured if not row["name"].startswith(OURS)}
    return {"ours": ours} | ({"published by others": others} if others else {})
