"""The report: one self-contained page with the results table, the figures and every test image.

Images, figures, styles and script are all inside the file, so it works from a disk without a network. Equal inputs
give equal bytes: it contains no time stamp.
"""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import write_text
from common.text import flops_text, spaced
from evaluation.finished_runs import FinishedRun, TestSet
from evaluation.metrics import softmax
from evaluation.tables import minutes

TEMPLATE = Path(__file__).with_name("report.html")
MAX_BYTES = 10_000_000
COLUMNS = 10  # images per row in the sheet of a class
WEBP_QUALITY = 85  # 4.5 MB in base64 for 10,000 images at 32 dB; quality 95 takes 7.0 MB for 34 dB, lossless 21 MB
GUESSES = 5
SORTED_BY = "top-1 (%)"


def write_report(runs: list[FinishedRun], rows: list[dict[str, Any]], test: TestSet, chosen: FinishedRun,
                 figures: dict[str, Any], path: Path) -> None:
    """Write the page to `path`, whole or not at all.

    runs: the published runs whose guesses the gallery can show, `chosen` first, or a user's own run alone; rows: those
    of results.json, for the table; figures: matplotlib Figures by title. Raises UserError if the page would be larger
    than MAX_BYTES.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # here: only the report needs it

    runs = [chosen, *(run for run in runs if run != chosen)]
    by_class = np.argsort(test.fine_labels, kind="stable")  # within a class, by hash
    counts = np.bincount(test.fine_labels, minlength=len(test.fine_names))
    images = test.images.numpy()
    environment = Environment(loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    text = environment.get_template(TEMPLATE.name).render(
        rows=[_cells(row) for row in sorted(rows, key=lambda row: -row["top1"]["mean"])],
        sorted_by=SORTED_BY,
        alone=not chosen.published,
        synthetic=chosen.synthetic,
        figures=[_figure(title, figure) for title, figure in figures.items()],
        runs=[_provenance(run) for run in runs],
        images=len(images),
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
    """The most probable classes, then their probabilities in percent: logits [N, C] -> uint8 [N, 2 * GUESSES]."""
    probabilities = softmax(logits)
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :GUESSES]
    percents = np.rint(100 * np.take_along_axis(probabilities, best, axis=1))
    return np.concatenate([best, percents], axis=1).astype(np.uint8)


def _sheet(images: np.ndarray) -> str:
    """Images, uint8 [N, 3, H, W], as one WebP file with rows of COLUMNS images, in base64."""
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
    """A figure as base64 PNG, with its title and axes as alternative text."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
    axes = [f"{axes.get_ylabel()} against {axes.get_xlabel()}" for axes in figure.axes
            if axes.get_xlabel() and axes.get_ylabel()]
    return {"title": title, "alt": ": ".join([title, *filter(None, ["; ".join(axes)])]),
            "png": _base64(content.getvalue())}


def _superclasses(test: TestSet) -> list[tuple[str, list[tuple[int, str]]]]:
    """Each superclass's name, with the labels and names of those of its classes that have images."""
    pairs = sorted(set(zip(test.coarse_labels.tolist(), test.fine_labels.tolist(), strict=True)))
    return [(spaced(name), [(fine, spaced(test.fine_names[fine])) for of, fine in pairs if of == coarse])
            for coarse, name in enumerate(test.coarse_names)]


def _provenance(run: FinishedRun) -> dict[str, str]:
    """The command and commit that reproduce a run."""
    commit = run.config.get("git_commit") or "unknown"
    return {"name": run.name, "command": run.config["command"], "commit": commit[:12]}


def _cells(row: dict[str, Any]) -> dict[str, tuple[str, str | float]]:
    """The cells of a table row by column heading: the text that is shown, and the value to sort by."""
    std, machine = row["top1"]["std"], row["machines"][0]
    threads = f", {machine['threads']} threads" if row["device"] == "cpu" else ""
    return {
        "recipe": (row["recipe"], row["recipe"]),
        SORTED_BY: (f"{row['top1']['mean']:.2f}", row["top1"]["mean"]),
        "±": ("–" if std is None else f"{std:.2f}", -1.0 if std is None else std),
        "seeds": (str(len(row["seeds"])), len(row["seeds"])),
        "top-5 (%)": (f"{row['top5']['mean']:.2f}", row["top5"]["mean"]),
        "superclass (%)": (f"{row['superclass']['mean']:.2f}", row["superclass"]["mean"]),
        "parameters": (f"{row['parameters'] / 1e6:.2f} M", row["parameters"]),
        "minutes": (f"{minutes(row):.1f}", minutes(row)),
        "FLOPs": (flops_text(row["train_flops"]), row["train_flops"]),
        "machine": (f"{machine['processor']}{threads}, {row['precision']}", machine["processor"]),
        "command": (row["command"], row["command"]),
    }
