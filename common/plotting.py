"""Figure style. matplotlib is imported inside functions, because importing it takes more than a second."""

from pathlib import Path
from typing import Any

from common.files import replacing

# The palette of Okabe and Ito, whose colors color-blind readers can distinguish.
BLUE, ORANGE, GREEN, PINK, SKY, YELLOW = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
PALETTE = (BLUE, ORANGE, GREEN, PINK, SKY, YELLOW)
MARKERS = "osD^vP"


def new_figure(width: float, height: float, title: str, *, synthetic: bool = False) -> Any:
    """An empty matplotlib Figure of `width` x `height` inches, whose title warns of a `synthetic` dataset."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(f"{title} – SYNTHETIC IMAGES, not CIFAR-100" if synthetic else title)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib Figure as PNG; equal figures give equal bytes."""
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=110, metadata={"Software": None})
