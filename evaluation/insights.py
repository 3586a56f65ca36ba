"""A look inside a network: its first filters, where it sees the classes, and which part of an image decides.

A network comes from `load_model`: it is in evaluation mode, and its last layer is its `head`. Images are uint8
[N, 3, 32, 32], labels int64 [N].
"""

import colorsys
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.plotting import ON_PAGE, new_figure
from common.text import spaced
from evaluation.figures import PEOPLE
from models.mirrornet import MirrorConv
from utils import compute_logits, to_float

FILTERS, FILTER_COLUMNS = 24, 6  # of each layer: at most, and in a row
PER_CLASS = 25  # images whose features are averaged: with 100, the map is hardly better
STEP = 80  # of gradient descent; t-SNE of 100 points converges for half and for twice of it
NEIGHBORS = 10  # perplexity: the number of nearest classes that the map tries to keep close
SIZE = 14  # points of text: readable on a phone, where the figure is 390 pixels wide
MAP_SIZE = (8.8, 8.6)  # inches
SLACK = 0.01  # inches that two names may come closer than their boxes allow
EXAMPLES = 3  # right predictions, and as many wrong ones
NOT_SHOWN = (PEOPLE, "fish")  # superclasses; anglers hold up their fish
LUMINANCES = (0.13, 0.25)  # of text; their contrast with white and with black is at least 3.5
GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are far apart: hues of many classes


@contextmanager
def _recorded(model: nn.Module) -> Iterator[list[tuple[nn.Module, Tensor]]]:
    """Collect all layers and their outputs in the order in which they are computed."""
    outputs: list[tuple[nn.Module, Tensor]] = []

    def record(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append((module, output))

    hooks = [module.register_forward_hook(record) for module in model.modules()]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


# ---- Filters --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer of `total` units, some of which are in `filters`, float32 [units, 3, h, w], as they act on pixels.

    Of filters that come in mirrored pairs, one of each pair counts.
    """

    trained: bool
    total: int
    filters: np.ndarray


def first_layers(model: nn.Module, count: int = FILTERS) -> list[Layer]:
    """The layers with weights up to the first trained one, each with its `count` units of largest weights.

    A filter is the gradient of a unit, at the center of its map, with respect to the pixels of a gray image. So it has
    colors whatever comes before its layer. It is cut to the window of pixels that the layer's units see.
    """
    gray = torch.full((1, 3, 32, 32), 0.5, device=next(model.parameters()).device, requires_grad=True)
    with _recorded(model) as outputs:
        model(gray)
    # A MirrorConv computes its filters with two layers of its own; its `weight` has a row per pair of them.
    parts = {part for module in model.modules() if isinstance(module, MirrorConv) for part in module.children()}
    layers = []
    for module, output in outputs:
        if isinstance(module, nn.Conv2d | nn.Linear | MirrorConv) and module not in parts:
            filters = _gradients(module.weight, output, gray, count)
            layers.append(Layer(module.weight.requires_grad, len(module.weight), filters))
            if module.weight.requires_grad:
                break
    return layers


def _gradients(weight: Tensor, output: Tensor, gray: Tensor, count: int) -> np.ndarray:
    units = output[0] if output.dim() == 2 else output[0, :, output.shape[2] // 2, output.shape[3] // 2]
    largest = weight.detach().flatten(1).norm(dim=1).argsort(descending=True, stable=True)[:count]
    filters = torch.cat([torch.autograd.grad(units[unit], gray, retain_graph=True)[0] for unit in largest])
    rows, columns = (filters.abs().amax(others).nonzero() for others in ((0, 1, 3), (0, 1, 2)))
    return filters[:, :, rows.min():rows.max() + 1, columns.min():columns.max() + 1].cpu().numpy()


def with_random_weights(model: nn.Module) -> nn.Module:
    """A copy with new weights, drawn by PyTorch's defaults with seed 0, in each convolution and linear layer that is
    trained.
    """
    fresh = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in fresh.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.requires_grad:
                module.reset_parameters()
    return fresh


def filters_figure(networks: dict[str, nn.Module], title: str):
    """The first layers of each network by name; the trained one next to the same with random weights."""
    rows: list[dict[str, np.ndarray]] = []
    for name, model in networks.items():
        random_layers = first_layers(with_random_weights(model))
        for number, (layer, random) in enumerate(zip(first_layers(model), random_layers, strict=True), start=1):
            place, count = f"{name}, layer {number}", len(layer.filters)
            amount = f"{count} of {layer.total}" if count < layer.total else f"all {count}"
            rows.append({f"{place}, with random weights": random.filters, f"{place}, trained: {amount}": layer.filters}
                        if layer.trained else {f"{place}, fixed: {amount}": layer.filters})
    pictures = [{text: _tiles(filters, FILTER_COLUMNS * (3 - len(row))) for text, filters in row.items()}
                for row in rows]
    heights = [0.4 + 9 / len(row) * max(image.shape[0] / image.shape[1] for image in row.values()) for row in pictures]
    figure = new_figure(9, 0.5 + sum(heights), title)
    figure.suptitle(title, fontsize=SIZE)
    grid = figure.add_gridspec(len(rows), 2, height_ratios=heights)
    for at, row in enumerate(pictures):
        for column, (text, image) in enumerate(row.items()):
            axes = figure.add_subplot(grid[at, column] if len(row) == 2 else grid[at, :])
            axes.imshow(image, interpolation="none")
            axes.set_axis_off()
            axes.set_title(text, fontsize=SIZE, loc="left")
    return figure


def _tiles(filters: np.ndarray, columns: int) -> np.ndarray:
    """Filters as one picture, float [H, W, 4] in [0, 1]: gray is 0, each scaled by its largest weight; gaps show the
    page.
    """
    largest = np.abs(filters).max((1, 2, 3), keepdims=True)
    scale, gap = -(-24 // filters.shape[2]), 4  # pixels
    pictures = np.kron(0.5 + 0.5 * filters / np.maximum(largest, 1e-30), np.ones((scale, scale)))
    opaque = np.concatenate([pictures, np.ones_like(pictures[:, :1])], axis=1)
    padded = np.pad(opaque, ((0, -len(opaque) % columns), (0, 0), (0, gap), (0, gap)))
    rows = padded.reshape(-1, columns, *padded.shape[1:])
    return rows.transpose(0, 3, 1, 4, 2).reshape(len(rows) * padded.shape[2], -1, 4)[:-gap, :-gap]


# ---- A map of the classes -------------------------------------------------------------------------------------------


def class_features(model: nn.Module, images: Tensor, labels: np.ndarray, per_class: int = PER_CLASS) -> np.ndarray:
    """The mean input of the model's head over the first `per_class` images of each class, float64 [C, features].

    Each of the C classes needs an image.
    """
    chosen = [np.flatnonzero(labels == label)[:per_class] for label in range(labels.max() + 1)]
    features: list[Tensor] = []
    head = cast(nn.Module, model.head)
    hook = head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].cpu().double()))
    try:
        compute_logits(model, images[torch.from_numpy(np.concatenate(chosen))])
    finally:
        hook.remove()
    ends = np.cumsum([len(positions) for positions in chosen])[:-1]
    return np.stack([one.mean(0) for one in np.split(torch.cat(features).numpy(), ends)])


def class_map(features: np.ndarray) -> np.ndarray:
    """Points in a plane, float64 [C, 2] in [0, 1], that are close together if the classes' features are alike.

    t-SNE (van der Maaten and Hinton 2008) of the angles between [C, features] after subtracting their mean. It starts
    from their principal components, so it draws no random numbers.
    """
    directions = features - features.mean(0)
    directions /= np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), 1e-30)
    near = _neighborhoods(directions)
    components, sizes, _ = np.linalg.svd(directions - directions.mean(0), full_matrices=False)
    points = components[:, :2] * sizes[:2]
    points *= np.sign(points[np.abs(points).argmax(0), (0, 1)]) * 0.1 / points.std()  # svd leaves the signs open
    velocity = np.zeros_like(points)
    for step in range(1000):
        early = step < 250
        apart = points[:, None] - points
        kernel = 1 / (1 + (apart**2).sum(2))
        np.fill_diagonal(kernel, 0)
        force = ((4 if early else 1) * near - kernel / kernel.sum()) * kernel
        velocity = (0.5 if early else 0.8) * velocity - STEP * (force[:, :, None] * apart).sum(1)
        points = points + velocity
    return (points - points.min(0)) / np.ptp(points, axis=0)


def _neighborhoods(directions: np.ndarray) -> np.ndarray:
    """t-SNE's probabilities of being neighbors, float64 [C, C], symmetric, with the sum 1."""
    squared = np.maximum(2 - 2 * directions @ directions.T, 0)
    np.fill_diagonal(squared, np.inf)
    squared -= squared.min(1, keepdims=True)
    low, high = np.full((len(squared), 1), 1e-3), np.full((len(squared), 1), 1e6)
    entropy = np.log(min(NEIGHBORS, (len(squared) - 1) / 2))
    for _ in range(50):  # bisect for the width of each row
        middle = np.sqrt(low * high)
        near = np.exp(-middle * squared)
        near /= near.sum(1, keepdims=True)
        wide = -(near * np.log(near + 1e-30)).sum(1, keepdims=True) > entropy
        low, high = np.where(wide, middle, low), np.where(wide, high, middle)
    return (near + near.T) / (2 * len(near))


def spread(centers: np.ndarray, sizes: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Centers, float64 [N, 2], of boxes of `sizes` [N, 2] in inches, moved apart inside [0, bounds].

    Afterwards no two overlap by more than SLACK in both directions, unless there is no room for all.
    """
    for _ in range(3000):
        centers = np.clip(centers, sizes / 2, bounds - sizes / 2)
        apart = centers[:, None] - centers
        missing = (sizes[:, None] + sizes) / 2 - np.abs(apart)
        overlap = (missing > SLACK).all(2, keepdims=True) & ~np.eye(len(centers), dtype=bool)[:, :, None]
        if not overlap.any():
            break
        shares = missing[:, :, ::-1] / np.where(overlap, missing.sum(2, keepdims=True), 1)  # most in the shorter way
        centers = centers + 0.5 * np.where(overlap, np.sign(apart) * missing * shares, 0).sum(1)
    return centers


def _readable(hue: float, luminance: float) -> tuple[float, float, float]:
    """The color of this hue and luminance, as red, green and blue."""
    shades = np.array([colorsys.hls_to_rgb(hue, lightness, 0.85) for lightness in np.linspace(0, 1, 201)])
    linear = np.where(shades > 0.04045, ((shades + 0.055) / 1.055) ** 2.4, shades / 12.92)
    return tuple(shades[np.abs(linear @ (0.2126, 0.7152, 0.0722) - luminance).argmin()])


def map_figure(points: np.ndarray, coarse_of_fine: np.ndarray, names: tuple[str, ...], coarse_names: tuple[str, ...],
               title: str):
    """The names of all classes at their `points` [C, 2] of `class_map`, joined to the center of their superclass."""
    from matplotlib.textpath import TextPath

    figure = new_figure(9, MAP_SIZE[1] + 2.5, title)
    figure.suptitle(title, fontsize=SIZE)
    axes = figure.subplots()
    axes.set(xlim=(0, MAP_SIZE[0]), ylim=(0, MAP_SIZE[1]))
    axes.set_axis_off()
    texts = [spaced(name) for name in names]
    widths = [TextPath((0, 0), text, size=SIZE).get_extents().width / 72 for text in texts]
    sizes = np.array([(width + 0.1, 1.15 * SIZE / 72) for width in widths])  # inches
    bounds = np.array(MAP_SIZE)
    places = spread(sizes / 2 + points * (bounds - sizes), sizes, bounds)
    for coarse, name in enumerate(coarse_names):
        color = _readable(coarse * GOLDEN % 1, LUMINANCES[coarse % 2])
        members = np.flatnonzero(coarse_of_fine == coarse)
        for fine in members:
            axes.plot(*zip(places[fine], np.median(places[members], axis=0), strict=True), color=color, lw=1.2,
                      alpha=0.35, zorder=1)
            axes.text(*places[fine], texts[fine], color=color, fontsize=SIZE, ha="center", va="center",
                      bbox=ON_PAGE)
        axes.plot([], [], "s", color=color, label=spaced(name))
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=12, handletextpad=0, columnspacing=1)
    return figure


# ---- Where it looks -------------------------------------------------------------------------------------------------


def is_convolutional(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d) for module in model.modules())


def grad_cam(model: nn.Module, image: Tensor, label: int) -> np.ndarray:
    """How much each part of an image, uint8 [3, H, W], speaks for a class: float32 [H, W], from 0 to 1.

    Grad-CAM (Selvaraju et al. 2016, arXiv 1610.02391): the sum over the channels of the last map with more than one
    pixel, each weighted by the mean gradient of the class's logit; its positive part, enlarged bilinearly and scaled.
    The network must be convolutional.
    """
    pixels = to_float(image[None].to(next(model.parameters()).device)).requires_grad_()
    with _recorded(model) as outputs:
        logits = model(pixels)
    first = next(at for at, (module, _) in enumerate(outputs) if isinstance(module, nn.Conv2d))
    last = [output for _, output in outputs[first:] if output.dim() == 4 and min(output.shape[2:]) > 1][-1]
    (gradient,) = torch.autograd.grad(logits[0, label], last)
    cam = F.relu((gradient.mean((2, 3), keepdim=True) * last.detach()).sum(1, keepdim=True))
    cam = F.interpolate(cam, image.shape[1:], mode="bilinear")[0, 0]
    return ((cam - cam.min()) / (cam.max() - cam.min()).clamp(min=1e-30)).cpu().numpy()


def confident_examples(probabilities: np.ndarray, labels: np.ndarray, superclasses: np.ndarray,
                       coarse_names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Positions of the EXAMPLES most confident "right" and "wrong" predictions, from probabilities [N, C].

    No two of a kind show the same superclass, and neither class is one of NOT_SHOWN. superclasses: int64 [C].
    """
    predicted = probabilities.argmax(1)
    may_be_shown = ~np.isin(coarse_names, NOT_SHOWN)[superclasses]
    fit = may_be_shown[labels] & may_be_shown[predicted]
    chosen = {}
    for kind, fits in (("right", fit & (predicted == labels)), ("wrong", fit & (predicted != labels))):
        positions = np.flatnonzero(fits)
        positions = positions[np.argsort(-probabilities[positions].max(1), kind="stable")]
        first_of_each = np.sort(np.unique(superclasses[labels[positions]], return_index=True)[1])
        chosen[kind] = positions[first_of_each[:EXAMPLES]]
    return chosen


def looks_figure(model: nn.Module, images: Tensor, probabilities: np.ndarray, labels: np.ndarray,
                 positions: dict[str, np.ndarray], names: tuple[str, ...], title: str):
    """The images at `positions` with their class; next to each, the predicted class and what speaks for it."""
    from matplotlib import colormaps

    figure = new_figure(9, 0.9 + 2.6 * EXAMPLES, title)
    figure.suptitle(title, fontsize=SIZE)
    for part, (kind, chosen) in zip(figure.subfigures(1, len(positions), wspace=0.03), positions.items(), strict=True):
        part.suptitle(kind, fontsize=16, fontweight="bold")
        grid = part.subplots(EXAMPLES, 2)
        for axes in grid.flat:
            axes.set_axis_off()
        for (picture, heat), at in zip(grid, chosen, strict=False):
            predicted, pixels = int(probabilities[at].argmax()), images[at].permute(1, 2, 0).numpy() / 255
            picture.imshow(pixels, interpolation="none")
            picture.set_title(spaced(names[labels[at]]), fontsize=SIZE)
            colors = colormaps["inferno"](grad_cam(model, images[at], predicted))[:, :, :3]
            heat.imshow(0.45 * pixels.mean(2, keepdims=True) + 0.55 * colors, interpolation="none")
            heat.set_title(f"{spaced(names[predicted])} {100 * probabilities[at, predicted]:.0f}%", fontsize=SIZE)
    return figure
