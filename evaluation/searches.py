"""The search for a recipe as a waterfall: a table of experiments in, a figure of what each change gave out.

A table of docs/experiments.md is drawn if `<!-- NAME: drawn by `python evaluate.py --figures` -->` is above it. Its
first column names the rows. The columns "change", "predicted" and "held-out ..." are found by their headings; the last
begins with the accuracy in percent. A row is compared with the finished row that its prediction names ("against `a7`"),
else with the first one that its change names in backticks, else with the first row of the table.
"""

import re
import textwrap
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from common.errors import UserError
from common.files import require_file
from common.plotting import BLUE, ON_PAGE, ORANGE, new_figure

START = re.compile(r"<!-- (?P<name>[\w-]+): drawn by `python evaluate\.py --figures` -->\s*\n(?P<table>(?:\|.*\n?)+)")
COLUMNS = ("change", "predicted", "held-out")
ACCURACY = re.compile(r"\**(\d+(?:\.\d+)?)\**(?: \([^)]*\))?(?:$|[:;])")  # not "27.3 after 2 epochs": it was stopped
SIGNED = re.compile(r"([+-]) ?(\d+(?:\.\d+)?)")
LEVEL = re.compile(r"\d+(?:\.\d+)?")
LABEL = 60  # characters of a row's change in the figure
SIZE = 14  # points: readable on a phone, where the figure is 390 pixels wide


@dataclass(frozen=True)
class Trial:
    """A finished row of a search: accuracies in percent; `against`: the name of the row that it is compared with."""

    name: str
    change: str
    against: str | None
    accuracy: float
    predicted: float | None


def read_searches(path: Path) -> dict[str, list[Trial]]:
    """The finished rows of each marked table in a document, by the name of the table.

    Raises UserError if a table lacks a column, or a row lacks cells.
    """
    require_file(path)
    tables = START.finditer(path.read_text(encoding="utf-8"))
    return {table["name"]: _read_table(table["table"], f"{path}, table {table['name']}") for table in tables}


def _read_table(table: str, place: str) -> list[Trial]:
    heading, _, *rows = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in table.splitlines()]
    missing = [start for start in COLUMNS if not any(cell.startswith(start) for cell in heading)]
    if missing:
        raise UserError(f"{place}: no heading begins with {missing[0]!r}")
    columns = [next(at for at, cell in enumerate(heading) if cell.startswith(start)) for start in COLUMNS]
    trials: dict[str, Trial] = {}
    for row in rows:
        if len(row) != len(heading):
            raise UserError(f"{place}: the row {row[0]} has {len(row)} cells instead of {len(heading)}")
        change, predicted, result = (row[at] for at in columns)
        if accuracy := ACCURACY.match(result):
            named = re.findall("against `([^`]+)`", predicted) + re.findall("`([^`]+)`", change)
            against = next((name for name in [*named, *trials] if name in trials), None)
            level = trials[against].accuracy if against else 0.0
            trials[row[0]] = Trial(row[0], change, against, float(accuracy[1]), _prediction(predicted, level))
    return list(trials.values())


def _prediction(text: str, level: float) -> float | None:
    """The accuracy that a prediction such as "+ 0.5 against `nor`", "0" or "70.3, noise 50" stands for, if any."""
    if signed := SIGNED.match(text):
        return level + float(signed[1] + signed[2])
    number = LEVEL.match(text)
    return None if number is None else float(number[0]) or level


def best_chain(trials: list[Trial]) -> list[Trial]:
    """The rows that led to the most accurate one, from the first to that."""
    by_name = {trial.name: trial for trial in trials}
    chain = [max(trials, key=lambda trial: trial.accuracy)]
    while chain[0].against is not None:
        chain.insert(0, by_name[chain[0].against])
    return chain


def waterfall_figure(trials: list[Trial], title: str):
    """A bar per row, from the accuracy that it is compared with to its own; those that led to the best are darker."""
    from matplotlib.patches import Patch

    by_name = {trial.name: trial for trial in trials}
    chain = best_chain(trials)
    figure = new_figure(9, 1.5 + 0.56 * len(trials), title)
    figure.suptitle(title, fontsize=SIZE)
    axes = figure.subplots()
    for row, trial in enumerate(trials):
        start = by_name[trial.against].accuracy if trial.against else trial.accuracy
        gain, leads = trial.accuracy - start, trial in chain
        color = BLUE if gain >= 0 else ORANGE
        axes.barh(row, gain, left=start, height=0.32, color=color, alpha=1 if leads else 0.4)
        axes.plot([trial.accuracy] * 2, [row - 0.2, row + 0.2], color=color, lw=3)
        if trial.predicted is not None:
            axes.plot(trial.predicted, row, "D", color="white", mec="black", ms=8, zorder=3)
        points = f"{trial.accuracy:.1f}" + (f" ({gain:+.1f})".replace("-", "−") if trial.against else "")
        end = max(start, trial.accuracy, trial.predicted or 0)
        axes.annotate(points, (end, row), (9, 0), textcoords="offset points", va="center", fontsize=SIZE,
                      fontweight="bold" if leads else "normal")
        text = textwrap.shorten(trial.change.replace("`", ""), LABEL, placeholder=" …")
        axes.annotate(f"{trial.name}: {text}", (0, row - 0.25), xycoords=("axes fraction", "data"), fontsize=SIZE,
                      va="bottom", fontweight="bold" if leads else "normal", bbox=ON_PAGE).set_in_layout(False)
    for before, after in pairwise(chain):
        axes.vlines(before.accuracy, trials.index(before), trials.index(after), color=BLUE, lw=1.2, ls=":", zorder=1)
    axes.plot([], [], "D", color="white", mec="black", ms=8, label="predicted")
    axes.set(ylim=(len(trials) - 0.4, -0.9), yticks=[])
    axes.set_xlabel("held-out accuracy (%)", fontsize=SIZE)
    axes.tick_params(labelsize=SIZE)
    axes.margins(x=0.12)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["left", "right", "top"]].set_visible(False)
    handles = [Patch(color=BLUE, label="gain"), Patch(color=ORANGE, label="loss"), *axes.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=SIZE)
    return figure
