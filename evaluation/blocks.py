"""Generated blocks: tables and sentences in README.md and docs/ that are derived from published files.

A block is `<!-- NAME: written by `COMMAND`, checked by `python evaluate.py --check` -->`, its text, and
`<!-- end of NAME -->`. Its text is a pure function of the published runs and the test set (class `Published`).
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import ROOT, read_json, write_text
from common.run_files import CALIBRATION, PUBLISHED
from common.text import overfit_table, spaced
from evaluation import corruptions
from evaluation.finished_runs import FinishedRun
from evaluation.images import answer, answer_text, find_weights, model_text
from evaluation.metrics import (
    Calibration,
    average,
    calibration,
    class_accuracy,
    confused_pairs,
    confusion_matrix,
    softmax,
)
from evaluation.publish import fitted_temperature
from evaluation.published_runs import Published
from evaluation.quotes import with_quotes
from evaluation.tables import (
    WITHOUT_DUPLICATES,
    by_recipe,
    comparison,
    full_table,
    headline,
    short_table,
)
from models import WeightsError, load_model

START = re.compile(r"<!-- (?P<name>[\w-]+): written by `[^`\n]+`, checked by `python evaluate\.py --check` -->")
END = re.compile(r"<!-- end of (?P<name>[\w-]+) -->")
DRAWING = Path("docs/figures/drawing.png")
NAMED = 5  # best classes, worst classes and most confused pairs in the block `classes`


# ---- The text of each block -----------------------------------------------------------------------------------------


def _overfit(published: Published) -> str:
    path = published.results_dir / PUBLISHED / "overfit_batch/mlp/overfit.json"
    try:
        return overfit_table(read_json(path)["losses"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} has no table of losses: publish the overfit check again") from error


def _classes(published: Published) -> str:
    run, test = published.ranked[0], published.test
    predicted, names = run.logits(test).argmax(1), [spaced(name) for name in test.fine_names]
    accuracy = class_accuracy(predicted, test.fine_labels, len(names))
    order = np.argsort(accuracy, kind="stable")
    best, worst = (", ".join(f"{names[label]} {accuracy[label]:.0f}" for label in labels)
                   for labels in (order[:-NAMED - 1:-1], order[:NAMED]))
    pairs = confused_pairs(confusion_matrix(predicted, test.fine_labels, len(names)), NAMED)
    confused = ", ".join(f"{names[label]} as {names[taken_for]} {times}" for label, taken_for, times in pairs)
    errors = predicted != test.fine_labels
    related = 100 * (test.coarse_of_fine[predicted] == test.coarse_labels)[errors].mean()
    return (f"Best classes of `{run.name}` (accuracy in %): {best}. Worst classes: {worst}. Most frequent confusions "
            f"(per {len(test) // len(names)} images of the class): {confused}. The superclass is right in "
            f"{related:.0f}% of its errors; by chance it would be in 4 of 99.")


def _duplicates(published: Published) -> str:
    test, count = published.test, int((~published.test.distinct).sum())
    if not count:
        raise UserError(f"{published.results_dir / 'data' / 'near_duplicates.csv'} lists no test image: "
                        "run python -m tools.explore")
    rows = [f"| {row['recipe']} | {row['top1']['mean']:.2f} | {row[WITHOUT_DUPLICATES]['mean']:.2f} |"
            for row in reversed(published.rows)]
    return "\n".join([f"{count:,} of the {len(test):,} test images are near-duplicates of training images.",
                      "", "| model | test accuracy (%) | without near-duplicates (%) |", "|---|---:|---:|", *rows])


def calibrations(published: Published, run: FinishedRun) -> dict[float, Calibration]:
    """The calibration of a run by temperature: 1 and, if its recipe has validation logits, the fitted one."""
    logits, labels = run.logits(published.test).astype(np.float64), published.test.fine_labels
    temperatures = (1.0, fitted_temperature(run, published.results_dir))
    return {temperature: calibration(softmax(logits / temperature), labels) for temperature in temperatures
            if temperature is not None}


def _calibration(published: Published) -> str:
    lines = ["| run | accuracy (%) | mean confidence (%) | ECE (points) | temperature | mean confidence with it (%) "
             "| ECE with it (points) |", "|---|---:|---:|---:|---:|---:|---:|"]
    for run in published.ranked:
        (_, before), *fitted = calibrations(published, run).items()
        for temperature, after in fitted:
            (confidence, accuracy), (scaled_confidence, _) = before.overall, after.overall
            lines.append(f"| {run.name} | {accuracy:.2f} | {confidence:.2f} | {before.ece:.2f} | {temperature:.3f} "
                         f"| {scaled_confidence:.2f} | {after.ece:.2f} |")
    if len(lines) == 2:
        raise UserError(f"{published.results_dir / PUBLISHED / CALIBRATION} is empty: train a recipe without "
                        "--train-on-all and run python evaluate.py --calibrate on it")
    return "\n".join(lines)


def _compare(published: Published) -> str:
    if len(published.ranked) < 2:
        raise UserError("a comparison needs two published recipes")
    best, second = published.ranked[:2]
    return comparison(best, second, published.test).replace(f"{PUBLISHED}/", "")


def _corruptions(published: Published) -> str:
    heading = ["run", "unchanged", *corruptions.CORRUPTIONS, *corruptions.GOALS]
    lines = [f"| {' | '.join(heading)} |", "|---|" + "---:|" * (len(heading) - 1)]
    for run in published.corrupted:
        accuracy = dict(zip(corruptions.CORRUPTIONS, corruptions.accuracy(run, published.test), strict=True))
        goals = [accuracy[name][corruptions.CORRUPTIONS[name].strengths.index(strength)]
                 for name, strength in corruptions.GOALS.values()]
        numbers = [corruptions.clean_accuracy(run, published.test),
                   *(strengths.mean() for strengths in accuracy.values()), *goals]
        lines.append(f"| {run.name} | {' | '.join(f'{number:.1f}' for number in numbers)} |")
    if len(lines) == 2:
        raise UserError(f"no published run is measured on corrupted images: {corruptions.MEASURE}")
    missing = [run.name for run in published.with_weights if run not in published.corrupted]
    strengths = [f"{name} {', '.join(f'{strength:g}' for strength in one.strengths)} ({one.meaning})"
                 for name, one in corruptions.CORRUPTIONS.items()]
    count = len(corruptions.sample(published.test))
    return "\n".join([f"Test accuracy (%) on {count:,} test images; for each corruption, the mean over five strengths.",
                      "", *lines, "", f"Strengths: {'; '.join(strengths)}.",
                      *([f"Not measured yet: {', '.join(missing)}."] if missing else [])])


def _squeeze(published: Published) -> str:
    lines = ["| model | networks | each alone, mean accuracy (%) | ensemble accuracy (%) |", "|---|---:|---:|---:|"]
    recipes, labels = by_recipe(published.runs), published.test.fine_labels
    for row in reversed(published.rows):
        runs = recipes[row["recipe"]]
        if len(runs) > 1:
            predicted = average([run.logits(published.test) for run in runs]).argmax(1)
            lines.append(f"| {row['recipe']} | {len(runs)} | {row['top1']['mean']:.2f} "
                         f"| {100 * (predicted == labels).mean():.2f} |")
    if len(lines) == 2:
        raise UserError(f"no recipe in {published.results_dir / PUBLISHED} has several seeds to average")
    return "\n".join(lines)


def _prediction(published: Published) -> str:
    weights = find_weights(None, published.results_dir)
    model = load_model(weights)
    found = answer(model, ROOT / DRAWING)
    if "error" in found:
        raise UserError(found["error"])
    name = weights.relative_to(published.results_dir.parent).as_posix()
    printed = [model_text(model, name), answer_text({**found, "file": DRAWING.as_posix()})]
    return "\n".join(["```", f"$ python predict.py {DRAWING.as_posix()}", *printed, "```"])


def _weights(published: Published) -> str:
    lines = ["| model | test accuracy of this file (%) | size (MB) | temperature | file |", "|---|---:|---:|---:|---|"]
    ranked = {row["recipe"]: row for row in reversed(published.rows)}
    recipes = by_recipe(published.runs)
    for recipe, row in ranked.items():
        for run in (run for run in recipes[recipe] if run.weights.exists()):
            file = run.weights.relative_to(published.results_dir.parent).as_posix()
            accuracy = row["top1"]["each"][row["seeds"].index(run.seed)]
            temperature = fitted_temperature(run, published.results_dir)
            lines.append(f"| {recipe} | {accuracy:.2f} | {run.weights.stat().st_size / 1e6:.1f} "
                         f"| {'–' if temperature is None else f'{temperature:.3f}'} | [`{file}`]({file}) |")
    return "\n".join(lines)


def _printed(file: str) -> Callable[[Published], str]:
    """A block with the saved output of a benchmark, which only a long measurement could produce again."""

    def text(published: Published) -> str:
        path = published.results_dir / PUBLISHED / "benchmarks" / file
        if not path.exists():
            raise UserError(f"{path} is missing: save the output of the benchmark there")
        return _read_text(path).strip("\n")

    return text


BLOCKS: dict[str, Callable[[Published], str]] = {
    "headline": lambda published: headline(published.rows),
    "results": lambda published: short_table(published.rows),
    "details": lambda published: full_table(published.rows),
    "overfit": _overfit,
    "classes": _classes,
    "duplicates": _duplicates,
    "calibration": _calibration,
    "compare": _compare,
    "squeeze": _squeeze,
    "corruptions": _corruptions,
    "weights": _weights,
    "prediction": _prediction,
    "cost": _printed("time_to_accuracy.md"),
    "cost-bfloat16": _printed("time_to_accuracy_bfloat16.md"),
    "riddle": _printed("overfit_riddle.md"),
    "riddle-shapes": _printed("overfit_riddle_shapes.md"),
    "riddle-odds": _printed("overfit_riddle_odds.md"),
    "resources": _printed("cost.md"),
    "scaling": _printed("scaling.md"),
    "loader": _printed("loader.md"),
}


# ---- Documents with blocks in them ----------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason})") from error


def documents(root: Path) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def find_blocks(text: str, document: str) -> Iterator[tuple[str, int, int]]:
    """Each block's name, and where its text begins and ends. Raises UserError if a block has lost a marker."""
    markers = sorted([*START.finditer(text), *END.finditer(text)], key=re.Match.start)
    for start, end in zip(markers[::2], [*markers[1::2], None], strict=False):
        if end is None or start.re is END or end.re is START or start["name"] != end["name"]:
            raise UserError(f"{document} has lost a marker of its block {start['name']}: put it back")
        yield start["name"], start.end(), end.start()


def with_blocks(text: str, document: str, write: Callable[[str, str], str]) -> str:
    """The document with the text of each block replaced by `write(name, text)`."""
    parts, done = [], 0
    for name, begins, ends in find_blocks(text, document):
        parts += [text[done:begins], "\n", write(name, text[begins:ends].strip("\n")), "\n"]
        done = ends
    return "".join([*parts, text[done:]])


def updated(path: Path, published: Published, root: Path) -> tuple[str, list[str], list[str]]:
    """A document with its blocks and quoted numbers brought up to date, what changed, and a line per failed one."""
    stale, problems, document = [], [], str(path.relative_to(root))

    def write(name: str, old: str) -> str:
        try:
            if name not in BLOCKS:
                raise UserError(f"unknown block; choose one of: {', '.join(BLOCKS)}")
            text = BLOCKS[name](published)
        except (UserError, WeightsError) as problem:
            problems.append(f"{document}, block {name}: {problem}")
            return old
        stale.extend([name] if text != old else [])
        return text

    text = _read_text(path)
    if path == root / "README.md" and not any(name == "results" for name, *_ in find_blocks(text, document)):
        raise UserError("README.md has lost the markers around its results table")
    text, changed, failed = with_quotes(with_blocks(text, document, write), published)
    return (text, [*(f"block {name}" for name in stale), *(f"number {key!r}" for key in changed)],
            [*problems, *(f"{document}: {problem}" for problem in failed)])


def renew_blocks(published: Published, root: Path) -> list[str]:
    """Bring every document up to date; returns a line for each block or quoted number that could not be."""
    problems = []
    for path in documents(root):
        text, stale, failed = updated(path, published, root)
        problems += failed
        if stale:
            write_text(path, text)
    return problems


def check_blocks(published: Published, root: Path) -> list[str]:
    """A line for each block or quoted number in a document that does not follow from the published files."""
    problems = []
    for path in documents(root):
        _, stale, failed = updated(path, published, root)
        problems += failed + [f"{path.relative_to(root)}: the {name} does not match the published files: "
                              "run python evaluate.py" for name in stale]
    return problems
