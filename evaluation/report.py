"""The report: one self-contained page with the results table, every test image, the figures and the facts.

report.html is its template; report.css and report.js are written into it as they are. Everything is inside the page, so
it works from a disk without a network. Equal inputs give equal bytes: it contains no time stamp. The only other input
is the environment variable GITHUB_REPOSITORY, which GitHub's machines set.
"""

import base64
import html
import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from common.errors import UserError
from common.files import ROOT, write_text
from common.text import flops_text, spaced
from evaluation import corruptions
from evaluation.costs import OURS, measured_costs, read_costs
from evaluation.finished_runs import FinishedRun, TestSet, read_hashes
from evaluation.metrics import softmax
from evaluation.published_runs import Published
from evaluation.tables import CITED, WITHOUT_DUPLICATES, headline, minutes
from utils import load_cifar100

FOLDER = Path(__file__).parent
MAX_BYTES = 10_000_000
SHEET_COLUMNS = 10  # images per row in a sheet
WEBP_QUALITY = 85  # 4.5 MB in base64 for 10,000 images at 32 dB; quality 95 takes 7.0 MB for 34 dB, lossless 21 MB
GUESSES = 5
FIGURE_DPI = 144  # of the images inside a figure
LEAD = ("accuracy-time", "accuracy-flops")  # the first of these figures opens the page
DRAWN_BY_THE_PAGE = ("confusion", "classes", "confused", "mistakes", "reliability")  # for any run, with JavaScript
SORTED_BY = "top-1 (%)"
BEST_FIRST = {  # the columns of the table, each with the order in which the best is first
    "model": "ascending", SORTED_BY: "descending", "±": "ascending", "top-5 (%)": "descending",
    "superclass (%)": "descending", "seeds": "descending", "parameters": "ascending", "minutes": "ascending",
    "FLOPs": "ascending",
}
Cells = list[tuple[str, str | float | None]]  # of a row: what is shown, and what to sort by


def write_report(shown: Published, chosen: FinishedRun, figures: dict[str, Any], path: Path, *,
                 copies: dict[int, tuple[Tensor, str]], cited: list[dict[str, Any]]) -> None:
    """Write the page to `path`, whole or not at all.

    The gallery shows the guesses of `chosen` first. figures: matplotlib Figures by file name, with the attributes
    `caption`, what to see, and `finding`, if they have them; copies: of `training_copies`; cited: of `cited_rows`.
    Raises UserError if the page would be larger than MAX_BYTES.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # here: only the report needs it

    test, rows = shown.test, sorted(shown.rows, key=lambda row: -row["top1"]["mean"])
    by_class = np.argsort(test.fine_labels, kind="stable")  # within a class, by hash
    counts = np.bincount(test.fine_labels, minlength=len(test.fine_names))
    copied = [place for place, image in enumerate(by_class.tolist()) if image in copies]
    images = test.images.numpy()
    sheets = {str(label): _sheet(images[test.fine_labels == label]) for label in np.flatnonzero(counts)}
    if copied:
        sheets["copies"] = _sheet(np.stack([copies[by_class[place]][0].numpy() for place in copied]))
    lead = next((name for name in LEAD if name in figures), None)
    ranked = sorted(shown.runs, key=lambda run: (run != chosen, -_accuracy(run, test), run.name))
    environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    text = environment.get_template("report.html").render(
        style=(FOLDER / "report.css").read_text(encoding="utf-8"),
        script=(FOLDER / "report.js").read_text(encoding="utf-8"),
        sheets=sheets, sheet_columns=SHEET_COLUMNS,
        headline=re.sub(r"[*`]", "", headline(rows)), best=rows[0], machine=_machine(rows[0]), minutes=minutes,
        alone=shown.alone, synthetic=chosen.synthetic, images=len(test), duplicates=int((~test.distinct).sum()),
        without_duplicates=WITHOUT_DUPLICATES,
        columns=BEST_FIRST, sorted_by=SORTED_BY,
        table=sorted([*map(_row, rows), *cited], key=lambda row: -row["cells"][0][1]),
        lead=_figure(figures[lead]) if lead else None,
        static=[_figure(figures[name]) for name in DRAWN_BY_THE_PAGE if name in figures],
        figures=[_figure(figure) for name, figure in figures.items() if name not in (lead, *DRAWN_BY_THE_PAGE)],
        superclasses=_superclasses(test),
        runs=[_provenance(run, test, shown.results_dir) for run in ranked],
        corruptions=["unchanged", *corruptions.CORRUPTIONS],
        corrupted=[_corrupted(run, test) for run in shown.corrupted],
        title=_title(), repository=os.environ.get("GITHUB_REPOSITORY"),
        data={
            "names": [spaced(name) for name in test.fine_names],
            "superclasses": [spaced(name) for name in test.coarse_names],
            "superclassOf": test.coarse_of_fine.tolist(),
            "counts": counts.tolist(), "columns": SHEET_COLUMNS, "guesses": GUESSES,
            "places": test.places[by_class].tolist(),
            "copies": {place: spaced(copies[by_class[place]][1]) for place in copied},
            "runs": [{"name": run.name, "guesses": _base64(_guesses(shown.calibrated_logits(run)[by_class]).tobytes())}
                     for run in ranked],
        },
    )
    size = len(text.encode())
    if size > MAX_BYTES:
        raise UserError(f"the report would have {size / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:g} MB: "
                        "lower WEBP_QUALITY in evaluation/report.py")
    write_text(path, text)


# ---- Images and guesses ---------------------------------------------------------------------------------------------


def training_copies(path: Path, test: TestSet, data_dir: str) -> dict[int, tuple[Tensor, str]]:
    """The training image that a test image nearly repeats, uint8 [3, 32, 32], and its class, by position in `test`.

    path: the list of near-duplicates; without it, there are none. Raises UserError if it is damaged, or if the training
    images cannot be loaded.
    """
    pairs = dict(zip(*(read_hashes(path, column).tolist() for column in ("test_hash", "train_hash")), strict=True))
    if not pairs:
        return {}
    train, _ = load_cifar100(data_dir, train_on_all=True)
    found = {train_hash: position for position, train_hash in enumerate(train.hashes.tolist())}
    nearest = {image: found[pairs[test_hash]] for image, test_hash in enumerate(test.hashes.tolist())
               if pairs.get(test_hash) in found}
    return {image: (train.images[position], train.fine_names[train.fine_labels[position]])
            for image, position in nearest.items()}


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _accuracy(run: FinishedRun, test: TestSet) -> float:
    return 100 * float((run.logits(test).argmax(1) == test.fine_labels).mean())


def _guesses(logits: np.ndarray) -> np.ndarray:
    """The most probable classes, then their probabilities in percent: logits [N, C] -> uint8 [N, 2 * GUESSES]."""
    probabilities = softmax(logits)
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :GUESSES]
    percents = np.rint(100 * np.take_along_axis(probabilities, best, axis=1))
    return np.concatenate([best, percents], axis=1).astype(np.uint8)


def _sheet(images: np.ndarray) -> str:
    """Images, uint8 [N, 3, H, W], as one WebP file with rows of SHEET_COLUMNS images, in base64."""
    from PIL import Image  # it comes with torchvision

    count, channels, height, width = images.shape
    rows = -(-count // SHEET_COLUMNS)
    padded = np.zeros((rows * SHEET_COLUMNS, channels, height, width), dtype=np.uint8)
    padded[:count] = images
    grid = padded.reshape(rows, SHEET_COLUMNS, channels, height, width).transpose(0, 3, 1, 4, 2)
    content = io.BytesIO()
    Image.fromarray(grid.reshape(rows * height, SHEET_COLUMNS * width, channels)).save(
        content, format="WEBP", quality=WEBP_QUALITY)
    return _base64(content.getvalue())


# ---- Figures --------------------------------------------------------------------------------------------------------


def _figure(figure: Any) -> dict[str, str]:
    """A figure's title, its caption, and its drawing as SVG with alternative text."""
    title, caption, finding = figure.get_suptitle(), getattr(figure, "caption", ""), getattr(figure, "finding", "")
    axes = [f"{axes.get_ylabel()} against {axes.get_xlabel()}" for axes in figure.axes
            if axes.get_xlabel() and axes.get_ylabel()]
    alt = f"{finding} {caption}".strip() or ": ".join([title, *filter(None, ["; ".join(axes)])])
    return {"title": title, "caption": caption, "svg": _svg(figure, alt)}


def _svg(figure: Any, alt: str) -> str:
    """A figure as SVG for this page, without its title, which the page writes above it.

    Black, white and grays become mixtures of the page's text and background, so that it is dark in dark mode.
    """
    from matplotlib import rc_context

    def mixture(match: re.Match[str]) -> str:
        return f": color-mix(in srgb, var(--text) {100 - int(match[1], 16) / 2.55:.0f}%, var(--page))"

    figure.suptitle("")
    content = io.BytesIO()
    with rc_context({"svg.hashsalt": "report"}):  # it makes the names inside the file, which are random otherwise
        figure.savefig(content, format="svg", dpi=FIGURE_DPI,
                       metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = content.getvalue().decode()
    text = text[text.index("<svg"):].replace("<svg", f'<svg role="img" aria-label="{html.escape(alt)}"', 1)
    text = re.sub(r"<style.*?</style>|(?<=<g) id=\"[^\"]*\"", "", text, flags=re.DOTALL)
    return re.sub(r": #([0-9a-f]{2})\1\1\b", mixture, text)


# ---- The table and the facts ----------------------------------------------------------------------------------------


def _machine(row: dict[str, Any]) -> str:
    """The hardware of a row of results.json: the first of its seeds' machines."""
    machine = row["machines"][0]
    threads = f", {machine['threads']} thread{'s' * (machine['threads'] != 1)}" if row["device"] == "cpu" else ""
    return f"{machine['processor']}{threads}, {row['precision']}"


def _minutes(number: float) -> str:
    return f"{number:.1f}" if number < 100 else f"{number:.0f}"


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of results.json for the table: its name, notes and command, and its cells after the first."""
    std = row["top1"]["std"]
    cells: Cells = [
        (f"{row['top1']['mean']:.2f}", row["top1"]["mean"]), ("" if std is None else f"{std:.2f}", std),
        *((f"{row[name]['mean']:.2f}", row[name]["mean"]) for name in ("top5", "superclass")),
        (str(len(row["seeds"])), len(row["seeds"])),
        (f"{row['parameters'] / 1e6:.2f} M", row["parameters"]),
        (_minutes(minutes(row)), minutes(row)),
        (flops_text(row["train_flops"]), row["train_flops"]),
    ]
    return {"name": row["recipe"], "note": _machine(row), "command": row["command"], "cells": cells, "cited": False}


def cited_rows(results_dir: Path) -> list[dict[str, Any]]:
    """Rows of the table that are not ours: guessing, a human, and recipes whose training steps were timed here.

    Raises UserError if the benchmark's table is damaged.
    """
    empty: Cells = [("", None)] * 5
    rows = [{"name": cited["model"], "note": cited["source"],
             "cells": [(cited["top1"], float(cited["top1"])), *empty, *empty[:2]]} for cited in CITED]
    costs = read_costs(results_dir)
    machine = costs.partition("\n")[0].partition(" (")[0]  # without its GFLOP/s
    for cost in measured_costs(costs):
        if cost["accuracy"] is not None and not cost["name"].startswith(OURS):
            rows.append({"name": cost["name"], "note": f"accuracy of its authors; minutes timed by us on {machine}",
                         "cells": [(f"{cost['accuracy']:.1f}", cost["accuracy"]), *empty,
                                   (_minutes(cost["minutes"]), cost["minutes"]),
                                   (flops_text(cost["flops"]), cost["flops"])]})
    return [{"command": "", "cited": True, **row} for row in rows]


def _corrupted(run: FinishedRun, test: TestSet) -> tuple[str, list[float]]:
    """A run's name, and its accuracies in percent: on unchanged images, then averaged over each corruption."""
    accuracies = corruptions.accuracy(run, test)
    return run.name, [corruptions.clean_accuracy(run, test), *(one.mean() for one in accuracies)]


def _superclasses(test: TestSet) -> list[tuple[str, list[str]]]:
    """Each superclass's name, with the names of those of its classes that have images."""
    pairs = sorted(set(zip(test.coarse_labels.tolist(), test.fine_labels.tolist(), strict=True)))
    return [(spaced(name), [spaced(test.fine_names[fine]) for of, fine in pairs if of == coarse])
            for coarse, name in enumerate(test.coarse_names)]


def _provenance(run: FinishedRun, test: TestSet, results_dir: Path) -> dict[str, Any]:
    """A run's accuracy, the command and commit that make it again, and its weights file, if it has one."""
    weights = {}
    if run.weights.exists():
        inside = run.weights.is_relative_to(results_dir.parent)
        weights = {"file": run.weights.relative_to(results_dir.parent).as_posix() if inside else run.weights.name,
                   "megabytes": run.weights.stat().st_size / 1e6}
    return {"name": run.name, "accuracy": _accuracy(run, test), "command": run.config["command"],
            "commit": (run.config.get("git_commit") or "unknown")[:12], "weights": weights}


def _title() -> str:
    """The title under which this repository is cited."""
    found = re.search(r'^title: "(.+)"$', (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else "this repository"
