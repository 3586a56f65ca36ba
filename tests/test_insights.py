"""A look inside networks whose answers are known: their first filters, the map of their classes, where they look."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.plotting import save_figure
from evaluation.insights import (
    EXAMPLES,
    FILTERS,
    SLACK,
    class_features,
    class_map,
    confident_examples,
    filters_figure,
    first_layers,
    grad_cam,
    is_convolutional,
    looks_figure,
    map_figure,
    spread,
    with_random_weights,
)
from models import create_model, list_models
from utils import COARSE_NAMES, COARSE_OF_FINE, FINE_NAMES


class ColorNet(nn.Module):
    """The mean of red, green and blue over a map of 4x4 cells: class 0 is red, 1 green, 2 blue."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.Conv2d(3, 3, 8, stride=8, bias=False)
        self.head = nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.cells.weight.copy_(torch.eye(3)[:, :, None, None].expand(3, 3, 8, 8) / 64)
            self.head.weight.copy_(torch.eye(3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.cells(images).mean((2, 3)))


# ---- Filters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_models())
def test_the_filters_of_every_network_have_three_colors(name: str) -> None:
    model = create_model(name).eval()
    *fixed, trained = first_layers(model)
    assert trained.trained and not any(layer.trained for layer in fixed)
    for layer in (*fixed, trained):
        count, channels, height, width = layer.filters.shape
        assert count == min(FILTERS, layer.total) and channels == 3
        assert 2 <= height == width <= 32
        assert np.isfinite(layer.filters).all() and np.abs(layer.filters).max((1, 2, 3)).min() > 0


def test_the_filters_of_a_convolution_are_its_weights() -> None:
    """In the order of their size."""
    model = create_model("original_cnn").eval()
    weights = next(module for module in model.modules() if isinstance(module, nn.Conv2d)).weight.detach().numpy()
    (layer,) = first_layers(model)
    order = np.argsort(-np.linalg.norm(weights.reshape(len(weights), -1), axis=1), kind="stable")
    np.testing.assert_allclose(layer.filters, weights[order], rtol=1e-5)


def test_mirrored_filters_are_one_layer() -> None:
    """The filters of a pair's first half are shown, as they act on pixels, and not its two parts."""
    torch.manual_seed(0)
    model = create_model("mirrornet", widths=(8, 8, 8), inner=(4, 4, 4)).eval()
    model.fit_inputs(torch.rand(20, 3, 32, 32))  # with this whitening, each part's filters equal their mirror images
    for part in model.groups[0].first.children():
        nn.init.normal_(part.weight)
    whitening, trained = first_layers(model)
    assert (whitening.trained, whitening.total, trained.trained, trained.total) == (False, 24, True, 4)
    assert not np.allclose(np.abs(trained.filters), np.abs(trained.filters[..., ::-1]), rtol=0.1)


def test_the_filters_of_an_mlp_are_seen_in_pixels() -> None:
    """A network with side 16 averages 2x2 pixels, of which each then has a quarter of the weight."""
    model = create_model("mlp", widths=(5, 4), side=16).eval()
    (layer,) = first_layers(model, count=1)
    weights = model.layers[0].weight.detach()
    largest = weights[weights.norm(dim=1).argmax()].view(3, 16, 16)
    np.testing.assert_allclose(layer.filters[0], largest.numpy().repeat(2, 1).repeat(2, 2) / 4, rtol=1e-5)


def test_random_weights_leave_the_network_as_it_is() -> None:
    """They replace trained layers only, and are the same each time."""
    model = create_model("mirrornet", widths=(8, 8, 8), inner=(4, 4, 4)).eval()
    before, state = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    one, other = first_layers(with_random_weights(model)), first_layers(with_random_weights(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    for fresh, again, layer in zip(one, other, first_layers(model), strict=True):
        assert np.array_equal(fresh.filters, again.filters)
        assert np.array_equal(fresh.filters, layer.filters) != layer.trained


# ---- A map of the classes -------------------------------------------------------------------------------------------


def test_class_features_are_the_mean_inputs_of_the_head() -> None:
    images, labels = torch.zeros(6, 3, 32, 32, dtype=torch.uint8), np.array([1, 0, 2, 1, 1, 0])
    for at, level in enumerate((51, 102, 255, 153, 255, 0)):
        images[at, labels[at]] = level
    found = class_features(ColorNet().eval(), images, labels, per_class=2)
    np.testing.assert_allclose(found, np.diag([0.2, 0.4, 1.0]), atol=1e-6)


@pytest.fixture(scope="module")
def grouped() -> np.ndarray:
    """Features of a hundred classes: those of a superclass are alike."""
    generator = np.random.default_rng(0)
    return 3 * generator.normal(size=(20, 64))[list(COARSE_OF_FINE)] + generator.normal(size=(100, 64))


@pytest.fixture(scope="module")
def points(grouped: np.ndarray) -> np.ndarray:
    return class_map(grouped)


def test_the_map_is_the_same_each_time(grouped: np.ndarray, points: np.ndarray) -> None:
    state = np.random.get_state()[1].copy()
    assert np.array_equal(points, class_map(grouped.copy()))
    assert np.array_equal(np.random.get_state()[1], state)
    assert points.shape == (100, 2) and points.min() == 0 and points.max() == 1


def test_like_classes_are_close_on_the_map(points: np.ndarray) -> None:
    coarse = np.array(COARSE_OF_FINE)
    distances = np.linalg.norm(points[:, None] - points, axis=2)
    nearest = np.argsort(distances, axis=1)[:, 1:5]
    assert (coarse[nearest] == coarse[:, None]).mean() > 0.95


def test_boxes_are_spread_until_none_overlap() -> None:
    generator = np.random.default_rng(0)
    sizes, bounds = generator.uniform((0.5, 0.2), (1.5, 0.25), (100, 2)), np.array([9.0, 9.0])
    places = spread(generator.normal(4.5, 1, (100, 2)), sizes, bounds)
    overlap = (np.abs(places[:, None] - places) < (sizes[:, None] + sizes) / 2 - SLACK).all(2)
    assert np.array_equal(overlap, np.eye(100, dtype=bool))
    assert (places - sizes / 2 >= -1e-9).all() and (places + sizes / 2 <= bounds + 1e-9).all()
    assert np.array_equal(spread(places, sizes, bounds), places)  # nothing moves without need


def test_every_class_is_named_on_the_map(points: np.ndarray) -> None:
    figure = map_figure(points, np.array(COARSE_OF_FINE), FINE_NAMES, COARSE_NAMES, "a map")
    (axes,) = figure.axes
    assert sorted(text.get_text() for text in axes.texts) == [name.replace("_", " ") for name in FINE_NAMES]
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(one.shrunk(0.95, 0.8).overlaps(other.shrunk(0.95, 0.8))
                   for at, one in enumerate(boxes) for other in boxes[:at])


# ---- Where it looks -------------------------------------------------------------------------------------------------


def test_grad_cam_finds_the_part_that_decides() -> None:
    """Red in the cell of row 1 and column 2, blue in that of row 3 and column 0: each speaks for its class."""
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[0, 8:16, 16:24] = image[2, 24:, :8] = 255
    for label, (row, column) in ((0, (1, 2)), (2, (3, 0))):
        cam = grad_cam(ColorNet().eval(), image, label)
        assert cam.shape == (32, 32) and cam.min() == 0 and cam.max() == pytest.approx(1)
        cells = cam.reshape(4, 8, 4, 8).mean((1, 3))
        assert np.unravel_index(cells.argmax(), (4, 4)) == (row, column)
        far = np.abs(np.arange(4)[:, None] - row) + np.abs(np.arange(4) - column) > 2
        assert (cells[far] == 0).all()
    assert not grad_cam(ColorNet().eval(), image, 1).any()  # there is no green


def test_grad_cam_leaves_out_what_speaks_against_a_class() -> None:
    model = ColorNet().eval()
    model.head.weight.data[0, 2] = -1  # blue speaks against red
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[0, :, :16], image[2, :, 16:] = 128, 255
    cam = grad_cam(model, image, 0)
    np.testing.assert_allclose(cam[:, :12], 1, rtol=1e-5)
    assert (cam[:, 20:] == 0).all()


@pytest.mark.parametrize("name", list_models())
def test_grad_cam_works_on_every_convolutional_network(name: str) -> None:
    model, image = create_model(name).eval(), torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    assert is_convolutional(model) == (name != "mlp")
    if name != "mlp":
        assert grad_cam(model, image, 7).shape == (32, 32)
        assert all(parameter.grad is None for parameter in model.parameters())


def test_examples_are_confident_various_and_never_of_people() -> None:
    """Classes 0 and 1 are insects, 2 is people, 3 and 4 are trees."""
    superclasses, names = np.array([0, 0, 1, 2, 2]), ("insects", "people", "trees")
    cases = [(0, 0, 0.9), (1, 1, 0.95), (2, 2, 0.99), (3, 3, 0.5), (3, 4, 0.6), (4, 2, 0.99), (2, 4, 0.99),
             (3, 0, 0.7), (0, 1, 0.4)]  # label, prediction, confidence
    labels = np.array([label for label, _, _ in cases])
    probabilities = np.full((len(cases), 5), 0.0)
    for at, (_, predicted, confidence) in enumerate(cases):
        probabilities[at] = (1 - confidence) / 4
        probabilities[at, predicted] = confidence
    found = confident_examples(probabilities, labels, superclasses, names)
    assert {kind: positions.tolist() for kind, positions in found.items()} == {"right": [1, 3], "wrong": [7, 8]}


def test_figures_of_filters_and_looks_are_drawn(tmp_path: Path) -> None:
    model = create_model("mirrornet", widths=(16, 16, 16), inner=(8, 8, 8)).eval()
    images = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    probabilities, labels = np.full((6, 100), 0.01), np.arange(6)
    looks = looks_figure(model, images, probabilities, labels, {"right": labels[:3], "wrong": labels[3:5]}, FINE_NAMES,
                         "looks")
    assert sum(len(axes.images) for axes in looks.axes) == 2 * 5 and len(looks.axes) == 4 * EXAMPLES
    filters = filters_figure({"a": model, "b": create_model("mlp", widths=(8,), side=8).eval()}, "filters")
    assert [axes.get_title(loc="left") for axes in filters.axes] == [
        "a, layer 1, fixed: all 24", "a, layer 2, with random weights", "a, layer 2, trained: all 8",
        "b, layer 1, with random weights", "b, layer 1, trained: all 8"]
    for figure in (looks, filters):
        save_figure(figure, tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size < 300_000
