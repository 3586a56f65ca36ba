"""Numbers in the prose of README.md and docs/ that are derived from published files.

A number is followed by a comment that says what it is: `76.1<!-- top1 of fast -->%`. Readers do not see it. Such a
number is renewed by `python evaluate.py`, with as many decimals as it has, and checked by `--check`.
"""

import re

import numpy as np

from common.errors import UserError
from evaluation import corruptions
from evaluation.costs import OURS, measured_costs, read_costs
from evaluation.published_runs import Published
from evaluation.tables import by_recipe

QUOTE = re.compile(r"(?<![\d.,])(?P<number>\d+(?:\.(?P<decimals>\d+))?)(?P<comment><!--\s(?P<key>[^<>]+)\s-->)")
RATIO = re.compile(r"(?P<cost>minutes|flops) of (?P<one>.+) over (?P<other>.+)")
MEASURED = ("top1", "spread", "top5", "superclass", "training", "unchanged")


def quantity(key: str, published: Published) -> float:
    """The number that a comment names. Raises UserError if it names none, or if it was not measured.

    "top1 of fast": mean over seeds, percent; likewise top5, superclass and training (accuracy in the last epoch).
    "spread of fast": the standard deviation of top1. "noise 0.05 of fast": accuracy on images with a corruption of this
    strength; "noise of fast": its mean over all strengths; "unchanged of fast": on the same images. "minutes of fast
    over NAME", "flops of fast over NAME": ratios of the costs in the table of recipes.
    """
    if ratio := RATIO.fullmatch(key):
        return _cost(ratio["one"], ratio["cost"], published) / _cost(ratio["other"], ratio["cost"], published)
    what, _, recipe = key.rpartition(" of ")
    name, _, strength = what.partition(" ")
    row = next((row for row in published.rows if row["recipe"] == recipe), None)
    if row is None or (what not in MEASURED and name not in corruptions.CORRUPTIONS) or (
            what == "spread" and row["top1"]["std"] is None):
        raise UserError(f"nothing published is called {key!r}: see evaluation/quotes.py")
    if name == "spread":
        return row["top1"]["std"]
    if name == "training":
        return float(np.mean([run.curves()["train_acc"][-1] for run in by_recipe(published.runs)[recipe]]))
    if name in row:
        return row[name]["mean"]
    return _corrupted(name, strength, recipe, published)


def _corrupted(name: str, strength: str, recipe: str, published: Published) -> float:
    run = next((run for run in published.corrupted if run.recipe == recipe), None)
    if run is None:
        raise UserError(f"{recipe} is not measured on corrupted images: {corruptions.MEASURE}")
    if name == "unchanged":
        return corruptions.clean_accuracy(run, published.test)
    accuracies = corruptions.accuracy(run, published.test)[list(corruptions.CORRUPTIONS).index(name)]
    strengths = [f"{one:g}" for one in corruptions.CORRUPTIONS[name].strengths]
    if strength and strength not in strengths:
        raise UserError(f"the strengths of {name} are {', '.join(strengths)}, not {strength}")
    return float(accuracies[strengths.index(strength)] if strength else accuracies.mean())


def _cost(name: str, cost: str, published: Published) -> float:
    """The cost of a recipe, ours or another's, in the table that `benchmarks.time_to_accuracy` writes."""
    rows = measured_costs(read_costs(published.results_dir))
    found = next((row for row in rows if row["name"].removeprefix(OURS) == name), None)
    if found is None:
        raise UserError(f"the table of training costs has no recipe {name}")
    return found[cost]


def with_quotes(text: str, published: Published) -> tuple[str, list[str], list[str]]:
    """A document with its numbers brought up to date, the keys of those that changed, and a line per failed one."""
    stale, problems = [], []

    def write(match: re.Match[str]) -> str:
        key = " ".join(match["key"].split())  # a line may break in it
        try:
            number = f"{quantity(key, published):.{len(match['decimals'] or '')}f}"
        except UserError as problem:
            problems.append(str(problem))
            return match[0]
        stale.extend([key] if number != match["number"] else [])
        return number + match["comment"]

    return QUOTE.sub(write, text), stale, problems
