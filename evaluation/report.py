"""The report: one page with the table, the figures and every test picture, which needs nothing beside it.

Pictures, figures, styles and script are all inside the file, so it works from a disk with no network. Equal inputs
give equal bytes: nothing in it tells the time.
"""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.figures import spaced
from evaluation.metrics import softmax
from evaluation.runs import FinishedRun, TestPictures
from runs import write_text
from utils import UserError

TEMPLATE = Path(__file__).with_name("report.html")
MAX_BYTES = 10_000_000
COLUMNS = 10  # pictures side by side in the sheet of a class
WEBP_QUALITY = 85  # 4.5 MB in base64 for 10,000 pictures at 32 dB; quality 95 takes 7.0 MB for 34 dB, lossless 21 MB
GUESSES = 5
SORTED_BY = "top-1 (%)"


def write_report(runs: list[FinishedRun], rows: list[dict[str, Any]], test: TestPictures, chosen: FinishedRun,
                 figures: dict[str, Any], path: Path) -> None:
    """Write the page to `path`, whole or not at all.

    runs: published ones, whose guesses the gallery can show, `chosen`'s first; rows: those of results.json, for the
    table; figures: matplotlib's, by their titles. Raises UserError if the page would be larger than MAX_BYTES.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # here: only the report needs it

    runs = [chosen, *(run for run in runs if run != chosen)]
    by_class = np.argsort(test.fine_labels, kind="stable")  # and in a class by hash
    counts = np.bincount(test.fine_labels, minlength=len(test.fine_names))
    images = test.images.numpy()
    environment = Environment(loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    text = environment.get_template(TEMPLATE.name).render(
        rows=[_cells(row) for row in sorted(rows, key=lambda row: -row["top1"]["mean"])],
        sorted_by=SORTED_BY,
        figures=[_figure(title, figure) for title, figure in figures.items()],
        runs=[_provenance(run) for run in runs],
        pictures=len(images),
        columns=COLUMNS,
        guesses=GUESSES,
        sheets={label: _sheet(images[test.fine_labels == label]) for label in np.flatnonzero(counts)},
        superclasses=_superclasses(test),
        first_label=int(test.fine_labels.min()),
        data={"names": [spaced(name) for name in test.fine_names], "counts": counts.tolist(),
              "guesses": [_base64(_guesses(run.logits(test)[by_class]).tobytes()) for run in runs]},
    )
    size = len(text.encode())
    if size > MAX_BYTES:
        raise UserError(f"the report would have {size / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:g} MB: "
                        "lower WEBP_QUALITY in evaluation/report.py")
    write_text(path, text)


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _guesses(logits: np.ndarray) -> np.ndarray:
    """The most probable classes and, behind them, their probabilities in percent: [N, C] -> uint8 [N, 2 * GUESSES]."""
    probabilities = softmax(logits)
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :GUESSES]
    percents = np.rint(100 * np.take_along_axis(probabilities, best, axis=1))
    return np.concatenate([best, percents], axis=1).astype(np.uint8)


def _sheet(images: np.ndarray) -> str:
    """Pictures, uint8 [N, 3, H, W], in rows of COLUMNS in one WebP file, base64."""
    from PIL import Image  # it comes with torchvision

    count, channels, height, width = images.shape
    rows = -(-count // COLUMNS)
    padded = np.zeros((rows * COLUMNS, channels, height, width), dtype=np.uint8)
    padded[:count] = images
    grid = padded.reshape(rows, COLUMNS, channels, height, width).transpose(0, 3, 1, 4, 2)
    content = io.BytesIO()
    Image.fromarray(grid.reshape(rows * height, COLUMNS * width, channels)).save(
        content, format="WEBP", quality=WEBP_QUALITY)
    return _base64(content.getvalue())


def _figure(title: str, figure: Any) -> dict[str, str]:
    """A figure as base64 PNG, with a description for who cannot see it: its title and what its axes are."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
    axes = [f"{axes.get_ylabel()} against {axes.get_xlabel()}" for axes in figure.axes
            if axes.get_xlabel() and axes.get_ylabel()]
    return {"title": title, "alt": ": ".join([title, *filter(None, ["; ".join(axes)])]),
            "png": _base64(content.getvalue())}


def _superclasses(test: TestPictures) -> list[tuple[str, list[tuple[int, str]]]]:
    """Each superclass's name with the labels and names of its classes, as far as there are pictures of them."""
    pairs = sorted(set(zip(test.coarse_labels.tolist(), test.fine_labels.tolist(), strict=True)))
    return [(spaced(name), [(fine, spaced(test.fine_names[fine])) for of, fine in pairs if of == coarse])
            for coarse, name in enumerate(test.coarse_names)]


def _provenance(run: FinishedRun) -> dict[str, str]:
    """What has to be known of a run to make it again."""
    commit = run.config.get("git_commit") or "unknown"
    return {"name": run.name, "command": run.config["command"], "commit": commit[:12]}


def _cells(row: dict[str, Any]) -> dict[str, tuple[str, str | float]]:
    """A row of the table by its columns' headings: what a cell shows, and what it is sorted by."""
    std, minutes, machine = row["top1"]["std"], float(np.mean(row["train_seconds"])) / 60, row["machines"][0]
    threads = f", {machine['threads']} threads" if row["device"] == "cpu" else ""
    return {
        "recipe": (row["recipe"], row["recipe"]),
        SORTED_BY: (f"{row['top1']['mean']:.2f}", row["top1"]["mean"]),
        "±": ("–" if std is None else f"{std:.2f}", -1.0 if std is None else std),
        "seeds": (str(len(row["seeds"])), len(row["seeds"])),
        "top-5 (%)": (f"{row['top5']['mean']:.2f}", row["top5"]["mean"]),
        "superclass (%)": (f"{row['superclass']['mean']:.2f}", row["superclass"]["mean"]),
        "parameters": (f"{row['parameters'] / 1e6:.2f} M", row["parameters"]),
        "minutes": (f"{minutes:.1f}", minutes),
        "FLOPs": (f"{row['train_flops']:.1e}".replace("e+", "e"), row["train_flops"]),
        "machine": (f"{machine['processor']}{threads}, {row['precision']}", machine["processor"]),
        "command": (row["command"], row["command"]),
    }
