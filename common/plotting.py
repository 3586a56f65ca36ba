"""Figure style. matplotlib is imported inside functions, because importing it takes more than a second."""

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
MAX_REASON = 300  # characters of an error of matplotlib in a warning


def new_figure(width: float, height: float, title: str, *, synthetic: bool = False) -> Any:
    """An empty matplotlib Figure of `width` x `height` inches, whose title warns of a `synthetic` dataset."""
    figure = _figure_class()(figsize=(width, height), layout="constrained")
    figure.suptitle(f"{title} – SYNTHETIC IMAGES, not CIFAR-100" if synthetic else title)
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
        figure.savefig(partial, format="png", dpi=110, metadata={"Software": None})


@contextmanager
def only_warning(path: Path) -> Iterator[None]:
    """Turn whatever fails in the block, which draws `path`, into a warning: the work before it must not be lost."""
    try:
        yield
    except Exception as error:  # of any type: matplotlib has many parts
        warn(f"{path} could not be drawn ({(str(error) or type(error).__name__)[:MAX_REASON]})")
