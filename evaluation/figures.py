"""Figures of finished runs, each a function of arrays that returns a matplotlib Figure.

Images are uint8 [N, 3, 32, 32], probabilities float64 [N, C], labels int64 [N], and `names` the classes by label.
"""

from typing import Any

import numpy as np

from common.plotting import BLUE, MARKERS, ORANGE, PALETTE, new_figure
from common.text import spaced
from evaluation.metrics import Calibration

EXTREMES = 10  # best and worst classes that are named
EXAMPLES, LOOKALIKES = 6, 3  # images per pair of confused classes
GALLERY_ROWS, GALLERY_COLUMNS = 4, 8
GALLERY_SIZE = GALLERY_ROWS * GALLERY_COLUMNS


def confusion_figure(confusion: np.ndarray, coarse_of_fine: np.ndarray, coarse_names: tuple[str, ...], title: str):
    """The confusion matrix, int64 [C, C], with the classes ordered by superclass."""
    from matplotlib.colors import PowerNorm

    figure = new_figure(9, 8, title)
    axes = figure.subplots()
    order = np.argsort(coarse_of_fine, kind="stable")
    share = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    share = np.ma.masked_equal(share[np.ix_(order, order)], 0)  # confusions that never happened stay white
    image = axes.imshow(share, cmap="magma_r", norm=PowerNorm(0.4, 0, 100), interpolation="none")
    ends = np.flatnonzero(np.diff(coarse_of_fine[order])) + 0.5  # between two superclasses
    edges = np.concatenate([[-0.5], ends, [len(order) - 0.5]])
    present = [spaced(coarse_names[coarse]) for coarse in sorted(set(coarse_of_fine.tolist()))]
    for draw_line in (axes.axhline, axes.axvline):
        for end in ends:
            draw_line(end, color="0.8", lw=0.6)
    middles = (edges[:-1] + edges[1:]) / 2
    axes.set_xticks(middles, present, rotation=90, fontsize=8)
    axes.set_yticks(middles, present, fontsize=8)
    axes.set(xlabel="predicted superclass", ylabel="superclass of the image")
    figure.colorbar(image, label="% of the class's images", shrink=0.7, ticks=(0, 1, 5, 10, 25, 50, 100))
    return figure


def class_accuracy_figure(accuracy: np.ndarray, names: tuple[str, ...], title: str):
    """The accuracy of every class, percent [C], in order, and of the worst and the best classes by name."""
    figure = new_figure(9, 3.9, title)
    every, worst, best = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
    order = np.argsort(accuracy, kind="stable")
    colors = np.full(len(order), "0.75", dtype=object)
    colors[:EXTREMES], colors[-EXTREMES:] = ORANGE, BLUE
    every.bar(np.arange(len(order)), accuracy[order], width=1, color=colors.tolist())
    every.axhline(np.nanmean(accuracy), color="0.3", lw=1, ls="--", label=f"mean {np.nanmean(accuracy):.1f}%")
    every.set(xlabel="class, in order of accuracy", ylabel="top-1 accuracy (%)", ylim=(0, 100), title="all classes")
    every.legend(frameon=False, loc="upper left")
    for axes, labels, color, title in ((worst, order[:EXTREMES][::-1], ORANGE, "worst classes"),
                                       (best, order[-EXTREMES:], BLUE, "best classes")):
        bars = axes.barh([spaced(names[label]) for label in labels], accuracy[labels], color=color)
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
        axes.tick_params(axis="y", labelsize=8)
        axes.set(xlabel="top-1 accuracy (%)", xlim=(0, 115), xticks=(0, 50, 100), title=title)
    return figure


def _show(axes: Any, image: np.ndarray) -> None:
    axes.imshow(image.transpose(1, 2, 0), interpolation="nearest")
    axes.set(xticks=[], yticks=[])


def confused_pairs_figure(images: np.ndarray, probabilities: np.ndarray, labels: np.ndarray,
                          pairs: list[tuple[int, int, int]], names: tuple[str, ...], title: str):
    """One row per pair of `metrics.confused_pairs`: the most confident mistakes, and images of the predicted class."""
    figure = new_figure(9, 0.55 + 1.12 * len(pairs), title)
    figure.get_layout_engine().set(h_pad=0.12)  # inches: for the text above each row
    grid = figure.subplots(len(pairs), EXAMPLES + LOOKALIKES, squeeze=False)
    predicted = probabilities.argmax(1)
    for row, (label, taken_for, times) in zip(grid, pairs, strict=True):
        by_confidence = np.argsort(-probabilities[:, taken_for], kind="stable")
        by_confidence = by_confidence[predicted[by_confidence] == taken_for]
        mistakes = by_confidence[labels[by_confidence] == label]
        recognized = by_confidence[labels[by_confidence] == taken_for]
        for axes in row:
            axes.axis("off")
        for axes, at in zip(row[:EXAMPLES], mistakes, strict=False):
            _show(axes, images[at])
        for axes, at in zip(row[EXAMPLES:], recognized, strict=False):
            _show(axes, images[at])
        confusion = (f"{spaced(names[label])}, predicted as {spaced(names[taken_for])} {times} times "
                     f"in {int((labels == label).sum())}")
        for axes, text in ((row[0], confusion), (row[EXAMPLES], f"{spaced(names[taken_for])}, correct")):
            axes.annotate(text, (0, 1), xytext=(0, 3), xycoords="axes fraction", textcoords="offset points",
                          fontsize=9).set_in_layout(False)
    return figure


def mistakes_figure(images: np.ndarray, probabilities: np.ndarray, labels: np.ndarray, positions: np.ndarray,
                    names: tuple[str, ...], title: str):
    """A gallery of the images at `positions`, as far as they fit, each with its predicted and its true class."""
    figure = new_figure(9, 1.45 * GALLERY_ROWS + 0.3, title)
    grid = figure.subplots(GALLERY_ROWS, GALLERY_COLUMNS)
    for axes in grid.flat:
        axes.axis("off")
    for axes, at in zip(grid.flat, positions, strict=False):
        predicted = probabilities[at].argmax()
        _show(axes, images[at])
        axes.set_title(f"{spaced(names[predicted])} {100 * probabilities[at, predicted]:.1f}%\n"
                       f"is {spaced(names[labels[at]])}", fontsize=7.5)
    return figure


def reliability_figure(variants: dict[str, Calibration], title: str):
    """Accuracy against confidence, and the distribution of confidence, for each variant by name."""
    figure = new_figure(9, 4.6, title)
    axes, counts = figure.subplots(1, 2)
    axes.plot([0, 100], [0, 100], color="0.5", lw=1, ls=":", label="perfect calibration")
    for (name, found), color, marker in zip(variants.items(), PALETTE, MARKERS, strict=False):
        filled = found.count > 0
        axes.plot(found.confidence[filled], found.accuracy[filled], marker + "-", color=color, ms=5,
                  label=f"{name}: ECE {found.ece:.2f} points")
        edges = np.linspace(0, 100, len(found.count) + 1)
        counts.stairs(100 * found.count / found.count.sum(), edges, color=color, lw=2)
    axes.set(xlabel="confidence (%)", ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 100))
    counts.set(xlabel="confidence (%)", ylabel="share of the images (%)", xlim=(0, 100))
    for panel in (axes, counts):
        panel.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def learning_curves_figure(curves: dict[str, list[dict[str, list[float]]]], accuracy: dict[str, float], title: str):
    """Training loss and accuracy over the epochs, one line per run.

    curves: by recipe, the columns of each seed's `metrics.csv`; accuracy: by recipe, on the test set, in percent.
    """
    figure = new_figure(9, 4.2, title)
    loss, acc = figure.subplots(1, 2)
    for (recipe, seeds), color, marker in zip(curves.items(), PALETTE, MARKERS, strict=False):
        for columns in seeds:
            label = (f"{recipe}, {len(seeds)} seeds" if len(seeds) > 1 else recipe) if columns is seeds[0] else None
            loss.plot(columns["epoch"], columns["train_loss"], color=color, lw=1.3, label=label)
            acc.plot(columns["epoch"], columns["train_acc"], color=color, lw=1.3, label=label)
        acc.plot(seeds[0]["epoch"][-1], accuracy[recipe], marker, color=color, ms=8, mec="black", zorder=3)
    acc.plot([], [], "o", color="white", ms=8, mec="black", label="test accuracy at the end")
    loss.set(ylabel="training loss: cross-entropy (nats)")
    acc.set(ylabel="training top-1 accuracy (%)", ylim=(0, 100))
    for axes in (loss, acc):
        _logarithmic(axes, "epoch")
    figure.legend(*acc.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _logarithmic(axes: Any, xlabel: str) -> None:
    """Give the x axis a logarithmic scale with plain numbers, and draw a grid."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set(xscale="log", xlabel=xlabel)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)


def accuracy_against(series: dict[str, dict[str, tuple[float, float]]], xlabel: str, title: str):
    """Test accuracy against a cost, on a logarithmic axis.

    series: by label in the legend, points (cost, top-1 in percent) by name.
    """
    figure = new_figure(9, 4.2, title)
    axes = figure.subplots()
    for (label, points), color, marker in zip(series.items(), PALETTE, MARKERS, strict=False):
        axes.plot(*zip(*points.values(), strict=True) if points else ([], []), marker, color=color, label=label)
        for name, point in points.items():
            axes.annotate(name, point, xytext=(7, -3), fontsize=9, textcoords="offset points")
    axes.set(ylabel="test accuracy (%)")
    _logarithmic(axes, xlabel)
    axes.margins(x=0.2, y=0.1)
    if len(series) > 1:
        axes.legend(frameon=False, loc="lower right")
    return figure
