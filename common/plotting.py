"""Figure style. matplotlib is imported inside functions, because importing it takes more than a second."""

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import chdir, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

from common.errors import warn
from common.files import replacing

# The palette of Okabe and Ito, whose colors color-blind readers can distinguish.
BLUE, ORANGE, GREEN, PINK, SKY, YELLOW = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
PALETTE = (BLUE, ORANGE, GREEN, PINK, SKY, YELLOW)
MARKERS = "osD^vP"
WIDTH = 7.0  # inches of every figure, so that text has the same size in all of them and is readable on a phone
DPI = 256  # twice the pixels of a README's column, for sharp screens
MAX_BYTES = 290_000  # of a PNG; one with many photographs is reduced to fewer levels, then to 256 colors
ON_PAGE = {"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}  # of text on lines
LINE_HEIGHT = 1.25  # of text, relative to its size
MAX_REASON = 300  # characters of an error of matplotlib in a warning


def new_figure(width: float, height: float, title: str, *, synthetic: bool = False) -> Any:
    """An empty matplotlib Figure of `width` x `height` inches, whose title warns of a `synthetic` dataset."""
    figure = _figure_class()(figsize=(width, height), layout="constrained")
    figure.suptitle(f"{title}\nSYNTHETIC IMAGES, not CIFAR-100" if synthetic else title)
    return figure


@cache
def _figure_class() -> Any:
    """matplotlib's Figure, imported without MPLBACKEND and matplotlibrc files, which can make it fail or talk.

    A program that has imported matplotlib before keeps its own settings.
    """
    if "matplotlib" not in sys.modules:
        outside = {name: os.environ.pop(name, None) for name in ("MPLBACKEND", "MATPLOTLIBRC")}
        os.environ["MATPLOTLIBRC"] = os.devnull  # instead of the user's file, but that of the current folder goes first
        elsewhere = chdir(Path(__file__).parent) if os.path.exists("matplotlibrc") else nullcontext()
        logger = logging.getLogger("matplotlib")
        level = logger.level
        logger.setLevel(logging.CRITICAL)  # it reports a missing font cache
        try:
            with elsewhere, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import matplotlib.figure  # noqa: F401 (read its settings now)
        finally:
            logger.setLevel(level)
            del os.environ["MATPLOTLIBRC"]
            os.environ.update({name: value for name, value in outside.items() if value is not None})
    from matplotlib.figure import Figure

    return Figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib Figure as PNG; equal figures give equal bytes."""
    with replacing(path) as partial:
        partial.write_bytes(png_bytes(figure))


def png_bytes(figure: Any) -> bytes:
    """A matplotlib Figure as the content of a PNG file of at most about MAX_BYTES."""
    from PIL import Image  # matplotlib needs it too

    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI, metadata={"Software": None})
    if content.tell() > MAX_BYTES:
        with Image.open(content) as image:
            drawn = image.convert("RGB")
        content = _png(drawn.point([round(round(level * 63 / 255) * 255 / 63) for level in range(256)] * 3))
    if content.tell() > MAX_BYTES:
        content = _png(drawn.quantize(256, Image.Quantize.MEDIANCUT, kmeans=1, dither=Image.Dither.NONE))
    return content.getvalue()


def _png(image: Any) -> io.BytesIO:
    content = io.BytesIO()
    image.save(content, format="PNG", optimize=True)
    return content


def label_ends(axes: Any, labels: list[tuple[float, str, str]], *, size: float = 9) -> None:
    """Write a label to the right of the axes for each line that ends there: its last value, text and color.

    Labels that would overlap move apart. Call it when the limits of the y axis are final.
    """
    box = axes.get_position()
    points = 72 * axes.figure.get_figheight() * box.height * 0.9  # the height of the axes, about
    to_fraction = (axes.transScale + axes.transLimits).transform
    ranked = sorted((float(to_fraction((axes.get_xlim()[1], value))[1]), text, color) for value, text, color in labels)
    heights = [(text.count("\n") + 1) * LINE_HEIGHT * size / points for _, text, _ in ranked]
    middles, lowest = [], 0.0
    for (middle, _, _), height in zip(ranked, heights, strict=True):
        middles.append(max(middle, lowest + height / 2))
        lowest = middles[-1] + height / 2
    highest = 1.0
    for at in reversed(range(len(ranked))):
        middles[at] = min(middles[at], highest - heights[at] / 2)
        highest = middles[at] - heights[at] / 2
    for middle, (_, text, color) in zip(middles, ranked, strict=True):
        axes.annotate(text, (1, middle), xytext=(4, 0), xycoords="axes fraction", textcoords="offset points",
                      va="center", color=color, fontsize=size, annotation_clip=False)


@contextmanager
def only_warning(path: Path) -> Iterator[None]:
    """Turn whatever fails in the block, which draws `path`, into a warning: the work before it must not be lost."""
    try:
        yield
    except Exception as error:  # of any type: matplotlib has many parts
        warn(f"{path} could not be drawn ({(str(error) or type(error).__name__)[:MAX_REASON]})")
