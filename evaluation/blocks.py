"""Tables and sentences in README.md and docs/ that are made from committed files, each between two markers.

A block is `<!-- NAME: written by `COMMAND`, checked by `python evaluate.py --check` -->`, its text, and
`<!-- end of NAME -->`. What its text should be, only the published runs and the labels of the test set say.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.figures import spaced
from evaluation.metrics import (
    Calibration,
    average,
    calibration,
    class_accuracy,
    coarse_of_fine,
    confused_pairs,
    confusion_matrix,
    fit_temperature,
    softmax,
)
from evaluation.pictures import answers, find_weights, in_words
from evaluation.publish import CALIBRATION, read_calibration
from evaluation.runs import FinishedRun, TestPictures
from evaluation.tables import WITHOUT_DUPLICATES, by_recipe, comparison, readme_table, summarise
from models import WeightsError, load_model
from readings import overfit_table
from runs import PUBLISHED, read_json, write_text
from settings import ROOT
from utils import UserError

START = re.compile(r"<!-- (?P<name>[\w-]+): written by `[^`\n]+`, checked by `python evaluate\.py --check` -->")
END = re.compile(r"<!-- end of (?P<name>[\w-]+) -->")
DRAWING = Path("docs/figures/drawing.png")
NAMED = 5  # of the best classes, the worst ones and the most confused pairs


@dataclass(frozen=True)
class Published:
    """All that a block may be made from: the published runs and the real test pictures."""

    results_dir: Path
    runs: list[FinishedRun]
    test: TestPictures

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """What `results.json` should hold."""
        return summarise(self.runs, self.test)

    @cached_property
    def ranked(self) -> list[FinishedRun]:
        """One run a recipe, the best recipe first. It is the first seed: picking the best one would be a choice made
        on the test set. Raises UserError if nothing is published.
        """
        if not self.runs:
            raise UserError(f"nothing is published in {self.results_dir / PUBLISHED}")
        return [by_recipe(self.runs)[row["recipe"]][0] for row in reversed(self.rows)]


# ---------------------------------------------------------------------------------------------------------------------
# What stands in them
# ---------------------------------------------------------------------------------------------------------------------


def _results(published: Published) -> str:
    return readme_table(published.rows)


def _overfit(published: Published) -> str:
    path = published.results_dir / PUBLISHED / "overfit_batch/mlp/overfit.json"
    try:
        return overfit_table(read_json(path)["readings"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds no readings: publish the overfit check again") from error


def _classes(published: Published) -> str:
    run, test = published.ranked[0], published.test
    predicted, names = run.logits(test).argmax(1), [spaced(name) for name in test.fine_names]
    accuracy = class_accuracy(predicted, test.fine_labels, len(names))
    order = np.argsort(accuracy, kind="stable")
    best, worst = (", ".join(f"{names[label]} {accuracy[label]:.0f}" for label in some)
                   for some in (order[:-NAMED - 1:-1], order[:NAMED]))
    pairs = confused_pairs(confusion_matrix(predicted, test.fine_labels, len(names)), NAMED)
    confused = ", ".join(f"{names[label]} for {names[taken_for]} {times}" for label, taken_for, times in pairs)
    wrong, superclass = predicted != test.fine_labels, coarse_of_fine(test.fine_labels, test.coarse_labels, len(names))
    related = 100 * (superclass[predicted] == test.coarse_labels)[wrong].mean()
    return (f"`{run.name}` knows these classes best (% right): {best}; and these worst: {worst}. It most often takes "
            f"(times in {len(test.hashes) // len(names)}): {confused}. Of its wrong guesses {related:.0f}% are at "
            "least of the right superclass; at random it would be 4 in 99.")


def _duplicates(published: Published) -> str:
    test, count = published.test, int((~published.test.distinct).sum())
    if not count:
        raise UserError(f"{published.results_dir / 'data' / 'near_duplicates.csv'} names no test picture: "
                        "run python explore.py")
    rows = [f"| {row['recipe']} | {row['top1']['mean']:.2f} | {row[WITHOUT_DUPLICATES]['mean']:.2f} |"
            for row in reversed(published.rows)]
    return "\n".join([f"Of the {len(test.hashes):,} test pictures {count:,} are near-duplicates of training pictures.",
                      "", "| recipe | test top-1 (%) | without near-duplicates (%) |", "|---|---:|---:|", *rows])


def calibrations(published: Published, run: FinishedRun) -> dict[float, Calibration]:
    """How sure and how right a run is, by temperature: 1 and, if its recipe is calibrated, what was fitted."""
    logits, labels = run.logits(published.test).astype(np.float64), published.test.fine_labels
    held_out = read_calibration(run, published.results_dir)
    temperatures = [1.0] if held_out is None else [1.0, fit_temperature(*held_out)]
    return {temperature: calibration(softmax(logits / temperature), labels) for temperature in temperatures}


def _calibration(published: Published) -> str:
    lines = ["| run | accuracy (%) | mean confidence (%) | ECE (points) | temperature | mean confidence with it (%) "
             "| ECE with it (points) |", "|---|---:|---:|---:|---:|---:|---:|"]
    for run in published.ranked:
        (_, before), *fitted = calibrations(published, run).items()
        for temperature, after in fitted:
            (sure, right), (sure_with_it, _) = before.overall, after.overall
            lines.append(f"| {run.name} | {right:.2f} | {sure:.2f} | {before.ece:.2f} | {temperature:.3f} "
                         f"| {sure_with_it:.2f} | {after.ece:.2f} |")
    if len(lines) == 2:
        raise UserError(f"{published.results_dir / PUBLISHED / CALIBRATION} holds nothing: train a recipe without "
                        "--train-on-all and run python evaluate.py --calibrate on it")
    return "\n".join(lines)


def _compare(published: Published) -> str:
    if len(published.ranked) < 2:
        raise UserError("there are no two published recipes to compare")
    return comparison(*published.ranked[:2], published.test)


def _squeeze(published: Published) -> str:
    lines = ["| recipe | networks | each alone, mean top-1 (%) | their probabilities averaged, top-1 (%) |",
             "|---|---:|---:|---:|"]
    recipes, labels = by_recipe(published.runs), published.test.fine_labels
    for row in reversed(published.rows):
        runs = recipes[row["recipe"]]
        if len(runs) > 1:
            together = average([run.logits(published.test) for run in runs]).argmax(1)
            lines.append(f"| {row['recipe']} | {len(runs)} | {row['top1']['mean']:.2f} "
                         f"| {100 * (together == labels).mean():.2f} |")
    if len(lines) == 2:
        raise UserError(f"no recipe in {published.results_dir / PUBLISHED} has two seeds or more to average")
    return "\n".join(lines)


def _prediction(published: Published) -> str:
    weights = find_weights(None, published.results_dir)
    answer = next(answers(load_model(weights), [ROOT / DRAWING]))
    if "error" in answer:
        raise UserError(answer["error"])
    network = f"the network of {os.path.relpath(weights, ROOT)}"
    words = in_words({**answer, "file": str(DRAWING)})
    return "\n".join(["```", f"$ python predict.py {DRAWING}", network, words, "```"])


def _printed(file: str) -> Callable[[Published], str]:
    """A block that is what a benchmark printed into a file, which only a long measurement could make again."""

    def text(published: Published) -> str:
        path = published.results_dir / PUBLISHED / "benchmarks" / file
        if not path.exists():
            raise UserError(f"{path} is missing: write into it what the benchmark prints")
        return _read_text(path).strip("\n")

    return text


BLOCKS: dict[str, Callable[[Published], str]] = {
    "results": _results, "overfit": _overfit, "classes": _classes, "duplicates": _duplicates,
    "calibration": _calibration, "compare": _compare, "squeeze": _squeeze, "prediction": _prediction,
    "cost": _printed("time_to_accuracy.md"), "riddle": _printed("overfit_riddle.md"),
    "resources": _printed("cost.md"), "scaling": _printed("scaling.md"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Where they stand
# ---------------------------------------------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8 ({error.reason})") from error


def documents(root: Path) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def find_blocks(text: str, document: str) -> Iterator[tuple[str, int, int]]:
    """Name, and where its text begins and ends, of each block. Raises UserError if one has lost a marker."""
    markers = sorted([*START.finditer(text), *END.finditer(text)], key=re.Match.start)
    for start, end in zip(markers[::2], [*markers[1::2], None], strict=False):
        if end is None or start.re is END or end.re is START or start["name"] != end["name"]:
            raise UserError(f"{document} has lost one of the two markers around its block {start['name']}: "
                            "put it back as it was")
        yield start["name"], start.end(), end.start()


def with_blocks(text: str, document: str, write: Callable[[str, str], str]) -> str:
    """The document with each block's text replaced by what `write` gives for its name and that text."""
    parts, done = [], 0
    for name, begins, ends in find_blocks(text, document):
        parts += [text[done:begins], "\n", write(name, text[begins:ends].strip("\n")), "\n"]
        done = ends
    return "".join([*parts, text[done:]])


def renewed(path: Path, published: Published, root: Path) -> tuple[str, list[str], list[str]]:
    """A document with its blocks as they should be, which of them are not so, and why some cannot be told."""
    stale, problems, document = [], [], str(path.relative_to(root))

    def write(name: str, old: str) -> str:
        try:
            if name not in BLOCKS:
                raise UserError(f"there is no such block; there are: {', '.join(BLOCKS)}")
            text = BLOCKS[name](published)
        except (UserError, WeightsError) as problem:
            problems.append(f"{document}, block {name}: {problem}")
            return old
        stale.extend([name] if text != old else [])
        return text

    text = _read_text(path)
    if path.name == "README.md" and not any(name == "results" for name, *_ in find_blocks(text, document)):
        raise UserError("README.md has lost the markers around its results table")
    return with_blocks(text, document, write), stale, problems


def renew_blocks(published: Published, root: Path) -> list[str]:
    """Write every document anew; returns why some blocks were left as they were, a line each."""
    problems = []
    for path in documents(root):
        text, stale, missing = renewed(path, published, root)
        problems += missing
        if stale:
            write_text(path, text)
    return problems


def check_blocks(published: Published, root: Path) -> list[str]:
    """What stands in a document's block but is not what the published files give, a line each."""
    problems = []
    for path in documents(root):
        _, stale, missing = renewed(path, published, root)
        problems += missing + [f"{path.relative_to(root)}: the block {name} is not what the published files give: "
                               "run python evaluate.py" for name in stale]
    return problems
