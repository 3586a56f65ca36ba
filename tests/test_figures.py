"""Figures: they name what they show, their labels do not overlap, and nobody has to look twice before showing one."""

import re
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train_cnn
import train_mlp
from common.command_line import exit_status
from common.errors import UserError
from common.files import ROOT, read_json
from common.plotting import DPI, MAX_BYTES, WIDTH, label_ends, new_figure, png_bytes
from common.run_files import METRICS
from evaluation import figures
from evaluation.costs import measured_costs
from evaluation.metrics import Calibration, calibration
from tests.helpers import error_line
from tools import redraw
from training.run_folder import learning_curves

DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))
NAMES = tuple(f"class {label}" for label in range(100))
COSTS = """A CPU, 2 threads

| recipe | epochs | training FLOPs | ms per image, by side | training time | relative to speedrun | test accuracy (%) |
|---|---:|---:|---|---:|---:|---:|
| --recipe ours | 9 | 1.9e14 | 0.48 at 16, 0.81 at 20 | 7.5 min | 0.42 | 70.4 |
| --recipe unpublished | 9 | 1.9e14 | 0.48 at 16 | 7.4 min | 0.42 |  |
| someone/repository, ResNet-18 | 200 | 3.3e16 | 4.90 at 32 | 2.5 h | 47 | 75.6 |"""
ROWS = [{"recipe": "ours", "train_flops": 2e14, "top1": {"mean": 71.0, "std": 0.5}},
        {"recipe": "untimed", "train_flops": 3e14, "top1": {"mean": 42.0, "std": None}}]


def boxes_of(figure: Any, texts: list[Any]) -> list[Any]:
    """The boxes of these texts, in pixels, after the figure is laid out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return [text.get_window_extent(canvas.get_renderer()) for text in texts]


def overlaps(figure: Any, texts: list[Any]) -> list[tuple[str, str]]:
    pairs = combinations(zip(texts, boxes_of(figure, texts), strict=True), 2)
    return [(a.get_text(), b.get_text()) for (a, box), (b, other) in pairs if box.overlaps(other)]


def pictures(figure: Any) -> list[bytes]:
    """The images that a grid shows."""
    return [np.asarray(image.get_array()).transpose(2, 0, 1).tobytes() for axes in figure.axes for image in axes.images]


# ---- Files and documents --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_figure_has_a_sentence_under_it(document: Path) -> None:
    """In the documents; for evaluate.py's figures it is the one in CAPTIONS."""
    text = re.sub(r"\s+", " ", document.read_text(encoding="utf-8"))
    for stem, after in re.findall(r"!\[[^\]]*\]\(\S*?([\w-]+)\.png\) (.{,600})", text):
        assert re.match(r"\*[A-Z][^*]*[.?]\*( |$)", after), stem
        assert stem not in figures.CAPTIONS or after.startswith(f"*{figures.CAPTIONS[stem]}*"), stem


def test_a_figure_is_sharp_and_small() -> None:
    """Twice as wide as a README's column, and small enough for a repository even if it is full of photographs."""
    figure = new_figure(WIDTH, 5, "noise")
    noise = np.random.default_rng(0).random((60, 84, 3))
    figure.subplots().imshow(noise)
    assert 1700 < WIDTH * DPI < 2000
    assert len(png_bytes(figure)) < MAX_BYTES < 300_000


@pytest.mark.parametrize("values", [(1, 1.1, 0.9), (1e4, 1e-12, 2), (5, 5, 5, 5)])
def test_labels_at_the_ends_of_lines_do_not_overlap(values: tuple[float, ...]) -> None:
    figure = new_figure(WIDTH, 4.4, "")
    axes = figure.subplots()
    for value in values:
        axes.plot([0, 1], [1, value])
    axes.set(yscale="log")
    label_ends(axes, [(value, f"two lines\nat {value}", "black") for value in values])
    assert overlaps(figure, axes.texts) == []
    assert all(box.x0 >= axes.get_window_extent().x1 for box in boxes_of(figure, axes.texts))
    assert all(box.x1 <= figure.bbox.x1 for box in boxes_of(figure, axes.texts))


# ---- Grids of images ------------------------------------------------------------------------------------------------


def test_grids_leave_out_people() -> None:
    fit = figures.fit_to_show(np.array([2, 0, 1, 2]), ("fish", "people", "trees"))
    assert fit.tolist() == [True, True, False, True]
    assert figures.fit_to_show(np.array([0, 1]), ("fish", "trees")).all()


def test_no_picture_is_shown_twice() -> None:
    """Neither in two rows nor shifted, and none that is not fit to be shown."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (60, 3, 4, 4), dtype=np.uint8)
    images = blocks.repeat(8, axis=2).repeat(8, axis=3)
    images[10:20] = np.roll(images[:10], 1, axis=3)  # copies
    labels = np.arange(60) % 3
    probabilities = np.tile([0.2, 0.7, 0.1], (60, 1))  # all are taken for class 1
    fit = np.arange(60) >= 5
    figure = figures.confused_pairs_figure(images, probabilities, labels, fit, [(0, 1, 20), (2, 1, 20)], NAMES, "")
    shown = pictures(figure)
    known = {image.tobytes(): at for at, image in enumerate(images)}
    found = {known[one] for one in shown}
    assert len(shown) == len(found) == 2 * (figures.EXAMPLES + figures.LOOKALIKES)
    assert not found & set(range(5))
    assert not {at - 10 for at in found} & found & set(range(10))
    chosen = figures.all_different(images, np.arange(20), 20, [])
    assert chosen == list(range(10))


def test_predictions_are_above_and_labels_below() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    figure = figures.mistakes_figure(images, np.array([[0.1, 0.9], [0.8, 0.2]]), np.array([0, 1]), np.array([1, 0]),
                                     ("sweet_pepper", "cup"), "")
    first, second = figure.axes[:2]
    assert (first.get_title(), first.get_xlabel()) == ("sweet pepper 80%", "cup")
    assert (second.get_title(), second.get_xlabel()) == ("cup 90%", "sweet pepper")


# ---- Plots ----------------------------------------------------------------------------------------------------------


def test_every_class_is_named() -> None:
    figure = figures.class_accuracy_figure(np.linspace(0, 100, 100), NAMES, "")
    named = [label for axes in figure.axes for label in axes.get_yticklabels()]
    assert [label.get_text() for label in named] == list(NAMES)
    assert overlaps(figure, named) == []


def test_no_confusion_is_white_and_the_scale_is_named() -> None:
    confusion = 60 * np.eye(100, dtype=np.int64)
    confusion[0, 1] = 1
    figure = figures.confusion_figure(confusion, np.arange(100) // 5, tuple(f"super {i}" for i in range(20)), "")
    matrix, colors = figure.axes
    image = matrix.images[0]
    assert image.cmap(image.norm(0.0)) == (1, 1, 1, 1)
    assert min(image.cmap(image.norm(1.0))[:3]) < 0.9
    assert "square-root scale" in colors.get_xlabel()


def test_bins_with_few_images_have_no_point() -> None:
    count = np.array([19, 20, 500])
    found = Calibration(np.array([20.0, 50.0, 80.0]), np.array([90.0, 50.0, 80.0]), count, 1.5)
    figure = figures.reliability_figure({"as trained": found}, "")
    above, below = figure.axes
    assert above.lines[1].get_xdata().tolist() == [50, 80]
    assert below.patches[0].get_data().values.tolist() == count.tolist()
    assert "images" in below.get_ylabel()


def test_a_whole_reliability_diagram_is_drawn() -> None:
    probabilities = np.random.default_rng(0).dirichlet(np.ones(3), 500)
    found = calibration(probabilities, probabilities.argmax(1))
    assert len(figures.reliability_figure({"a": found, "b": found}, "").axes) == 2


@pytest.mark.parametrize("count", [1, 4, 8])
def test_every_recipe_has_its_panel(count: int) -> None:
    curves = {f"recipe-{number}": 2 * [{"epoch": [1.0, 2.0, 3.0], "train_acc": [1.0, 20.0, 50.0 + number]}]
              for number in range(count)}
    figure = figures.learning_curves_figure(curves, {recipe: 50.0 for recipe in curves}, "")
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert sorted(axes.get_title() for axes in panels) == [f"{recipe}, 2 seeds" for recipe in curves]
    assert [len(axes.texts) for axes in panels] == [2] * count
    assert overlaps(figure, [text for axes in panels for text in axes.texts]) == []


def test_costs_are_read_from_the_published_table() -> None:
    ours, unpublished, resnet = measured_costs(COSTS)
    assert ours == {"name": "--recipe ours", "flops": 1.9e14, "minutes": 7.5, "accuracy": 70.4}
    assert unpublished["accuracy"] is None and resnet["minutes"] == 150
    assert measured_costs("") == []
    assert len(measured_costs((ROOT / "results/published/benchmarks/time_to_accuracy.md").read_text())) >= 4


@pytest.mark.parametrize(("old", "new"), [("1.9e14", "much"), ("7.5 min", "soon"), ("70.4", "high"),
                                          ("70.4 |", "70.4 | 1 |"), ("| training time", "| time")])
def test_a_damaged_table_of_costs_is_one_error_line(old: str, new: str) -> None:
    with pytest.raises(UserError, match="write it again with"):
        measured_costs(COSTS.replace(old, new, 1))


def test_accuracy_is_drawn_against_time_and_arithmetic() -> None:
    """Against time only what was timed; our accuracies are those of results.json, with their spread over seeds."""
    time, flops = (figure.axes[0] for figure in (figures.accuracy_time_figure(ROWS, COSTS),
                                                 figures.accuracy_flops_figure(ROWS, COSTS)))
    assert [text.get_text() for text in time.texts] == ["ours", "ResNet-18"]
    assert [text.get_text() for text in flops.texts] == ["ours", "untimed", "ResNet-18"]
    ours = time.containers[0]
    assert ours[0].get_xydata().tolist() == [[7.5, 71.0]]
    assert ours[2][0].get_segments()[0].tolist() == [[7.5, 70.5], [7.5, 71.5]]
    assert time.get_xlabel() == "minutes of training on A CPU, 2 threads"
    alone = figures.accuracy_flops_figure(ROWS, "").axes[0]
    assert [text.get_text() for text in alone.texts] == ["ours", "untimed"]


def test_the_accuracy_axis_is_logarithmic_in_the_error() -> None:
    to_axis = figures.accuracy_flops_figure(ROWS, COSTS).axes[0].transScale.transform
    low, middle, high = to_axis([(1e14, 60.0), (1e14, 80.0), (1e14, 90.0)])[:, 1]
    assert middle - low == pytest.approx(high - middle)  # the error halves twice
    assert np.isfinite(to_axis((1e14, 100.0))).all()


def test_names_of_close_points_do_not_overlap() -> None:
    points = {f"a long name {number}": (100.0 + 3 * number, 70.0 + number / 4, None) for number in range(3)}
    figure = figures.accuracy_against({"ours": points, "others": {"another": (101.0, 71.0, None)}}, "cost", "")
    assert overlaps(figure, figure.axes[0].texts) == []


@pytest.mark.parametrize("draw", [figures.accuracy_time_figure, figures.accuracy_flops_figure])
def test_names_in_the_published_figures_do_not_overlap(draw: Callable[[list[dict[str, Any]], str], Any]) -> None:
    costs = (ROOT / "results/published/benchmarks/time_to_accuracy.md").read_text()
    figure = draw(read_json(ROOT / "results/results.json"), costs)
    assert overlaps(figure, figure.axes[0].texts) == []
    inside = figure.axes[0].get_window_extent()
    assert all(inside.x0 < box.x0 and box.x1 < inside.x1 for box in boxes_of(figure, figure.axes[0].texts))


# ---- Drawing again --------------------------------------------------------------------------------------------------


def test_the_legend_says_augmented_only_if_it_is_true() -> None:
    augments = {recipe: script.recipe_settings(recipe).augments for script in (train_mlp.SCRIPT, train_cnn.SCRIPT)
                for recipe in script.recipes}
    assert augments["mlp"] and augments["fast"] and not augments["original"]
    assert train_mlp.SCRIPT.recipe_settings("mlp", crop=0, mixup=0.0, flip=False).augments is False
    assert train_mlp.SCRIPT.recipe_settings("mlp", crop=0, mixup=0.0, flip=False, cutmix=0.5).augments is True
    rows = [dict.fromkeys(METRICS, 1.0)]
    for augmented, label in ((True, "training, augmented"), (False, "training")):
        figure = learning_curves(rows, "x", augmented=augmented)
        for axes in figure.axes:
            legend = axes.get_legend()
            assert [text.get_text() for text in legend.get_texts()] == [label, "validation"]
            boxes = boxes_of(figure, legend.get_texts())
            assert all(box.y0 >= axes.get_window_extent().y1 for box in boxes)  # above the lines


def test_published_curves_can_be_drawn_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published = tmp_path / "published"
    for source in ("original-s0", "overfit_batch/mlp"):
        shutil.copytree(ROOT / "results" / "published" / source, published / source,
                        ignore=shutil.ignore_patterns("*.png", "*.npz", "*.safetensors"))
    assert exit_status(lambda: redraw.main(["--results-dir", str(tmp_path)])) == 0
    paths = [published / "original-s0" / "loss.png", published / "overfit_batch" / "mlp" / "overfit.png"]
    assert capsys.readouterr().out.splitlines() == [f"drawn: {path}" for path in paths]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_what_cannot_be_drawn_again_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*names: str) -> str:
        assert exit_status(lambda: redraw.main([*names, "--results-dir", str(tmp_path)])) == 2
        return error_line(capsys)

    assert "nothing is published" in fails()
    assert "neither metrics.csv nor overfit.json" in fails("missing")
    check = tmp_path / "overfit_batch" / "mlp"
    shutil.copytree(ROOT / "results/published/overfit_batch/mlp", check)
    (check / "curves.csv").write_text("step,cross-entropy\n0,much\n")
    before = (check / "overfit.png").read_bytes()
    assert "damaged" in fails("overfit_batch/mlp")
    assert (check / "overfit.png").read_bytes() == before
