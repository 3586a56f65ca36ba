"""Tables of finished runs: one row per recipe for results.json and the documents, one line per run for the screen."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from common.errors import UserError
from common.text import flops_text, machines_text, printable
from evaluation.finished_runs import FinishedRun, TestSet
from evaluation.metrics import average, interval95, mcnemar, measure
from evaluation.publish import require_alike
from models import WeightsError

CITED = (
    {"model": "guessing", "top1": "1.0", "source": "one class in a hundred"},
    {"model": "a human annotator", "top1": "59.8",
     "source": "on training images: CIFAR-100N, Wei et al. 2022, arXiv 2110.12088"},
)
WITHOUT_DUPLICATES = "top1_without_duplicates"


def measure_on(test: TestSet, logits: np.ndarray) -> dict[str, float]:
    """`measure` on the test set and, if that contains near-duplicates, the top-1 accuracy without them."""
    numbers = measure(logits, test.fine_labels, test.coarse_labels)
    if not test.distinct.all():
        correct = logits.argmax(1) == test.fine_labels
        numbers[WITHOUT_DUPLICATES] = 100 * float(correct[test.distinct].mean())
    return numbers


# ---- One row per recipe ---------------------------------------------------------------------------------------------


def summarize(runs: list[FinishedRun], test: TestSet) -> list[dict[str, Any]]:
    """One row per recipe, worst first, over its seeds: the content of `results.json`."""
    rows = [_summary(recipe, seeds, test) for recipe, seeds in by_recipe(runs).items()]
    return sorted(rows, key=lambda row: row["top1"]["mean"])


def by_recipe(runs: list[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """The runs of each recipe, by seed."""
    recipes: dict[str, list[FinishedRun]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        recipes.setdefault(run.recipe, []).append(run)
    return recipes


def _summary(recipe: str, runs: list[FinishedRun], test: TestSet) -> dict[str, Any]:
    require_alike(runs)
    first, seeds = runs[0], [run.seed for run in runs]
    measured = [measure_on(test, run.logits(test)) for run in runs]
    row: dict[str, Any] = {"recipe": recipe, "seeds": seeds, "parameters": first.result["parameters"]}
    for name in measured[0]:
        values = [numbers[name] for numbers in measured]
        row[name] = {"mean": round(float(np.mean(values)), 4),
                     "std": round(float(np.std(values, ddof=1)), 4) if len(values) > 1 else None,
                     "each": [round(value, 4) for value in values]}
    row["interval95"] = [round(bound, 2) for bound in interval95(row["top1"]["mean"], len(test))]
    row["train_seconds"] = [run.result["train_seconds"] for run in runs]
    row["train_flops"] = first.result["train_flops"]
    row["precision"], row["device"] = first.settings["precision"], first.settings["device"]
    row["machines"] = [run.result["machine"] for run in runs]
    seed_flag = f"--seeds {','.join(map(str, seeds))}" if len(seeds) > 1 else f"--seed {seeds[0]}"
    row["command"] = f"{first.recipe_command} {seed_flag}"
    return row


def headline(rows: list[dict[str, Any]]) -> str:
    """One sentence: the best recipe and, if it is another one, the best that a script trains by default."""
    ranked = sorted(rows, key=lambda row: -row["top1"]["mean"])
    if not ranked:
        raise UserError("no recipe is published")
    best = ranked[0]
    cost = f"after {_duration(best)} of training on {_hardware(best)}"
    sentence = f"**{best['top1']['mean']:.2f}% on the test set {cost}** ({_averaged(best)})"
    default = next((row for row in ranked if "--recipe " not in row["command"]), best)
    if default is not best:
        elsewhere = "" if _hardware(default) == _hardware(best) else f" on {_hardware(default)}"
        sentence += (f"; {default['top1']['mean']:.2f}% after {_duration(default)}{elsewhere} "
                     f"({_averaged(default)})")
    return f"{sentence}."


def minutes(row: dict[str, Any]) -> float:
    """The training time of a row of `results.json`, a mean over its seeds."""
    return float(np.mean(row["train_seconds"])) / 60


def _duration(row: dict[str, Any]) -> str:
    return f"{minutes(row):.0f} minutes" if minutes(row) >= 1.5 else f"{60 * minutes(row):.0f} seconds"


def _hardware(row: dict[str, Any]) -> str:
    machine = row["machines"][0]
    if row["device"] != "cpu":
        return machine["processor"]
    return f"{machine['threads']} CPU core{'s' * (machine['threads'] != 1)}"


def _averaged(row: dict[str, Any]) -> str:
    seeds = len(row["seeds"])
    return f"`{row['recipe']}`, " + (f"mean of {seeds} seeds" if seeds > 1 else "one seed")


def short_table(rows: list[dict[str, Any]]) -> str:
    """The README's table, Markdown, from the rows of `results.json`, best first, above guessing."""
    lines = ["| model | test accuracy (%) | seeds | minutes | command |", "|---|---:|---:|---:|---|"]
    for row in sorted(rows, key=lambda row: -row["top1"]["mean"]):
        std = row["top1"]["std"]
        accuracy = f"{row['top1']['mean']:.2f}" + ("" if std is None else f" ± {std:.2f}")
        lines.append(f"| {row['recipe']} | **{accuracy}** | {len(row['seeds'])} | {minutes(row):.1f} "
                     f"| `{row['command']}` |")
    return "\n".join([*lines, f"| *{CITED[0]['model']}* | *{CITED[0]['top1']}* | | | |"])


def full_table(rows: list[dict[str, Any]]) -> str:
    """All columns, Markdown, from the rows of `results.json`, best first, with the cited rows among them."""
    lines = ["| model | parameters | test top-1 (%) | top-5 (%) | superclass (%) | training | hardware "
             "| command or source |", "|---|---:|---:|---:|---:|---:|---|---|"]
    ranked = [(float(cited["top1"]), f"| *{cited['model']}* | | *{cited['top1']}* | | | | | *{cited['source']}* |")
              for cited in CITED]
    ranked += [(row["top1"]["mean"], _full_row(row)) for row in rows]
    return "\n".join([*lines, *(line for _, line in sorted(ranked, reverse=True))])


def _full_row(row: dict[str, Any]) -> str:
    if row["top1"]["std"] is None:
        low, high = row["interval95"]
        top1 = f"**{row['top1']['mean']:.2f}** (one seed; 95% interval {low:.1f} to {high:.1f})"
    else:
        top1 = f"**{row['top1']['mean']:.2f}** ± {row['top1']['std']:.2f} ({len(row['seeds'])} seeds)"
    time = f"{minutes(row):.1f} min" if minutes(row) >= 1 else f"{60 * minutes(row):.1f} s"
    return (f"| {row['recipe']} | {row['parameters'] / 1e6:.2f} M | {top1} | {row['top5']['mean']:.2f} "
            f"| {row['superclass']['mean']:.2f} | {time}, {flops_text(row['train_flops'])} FLOPs "
            f"| {machines_text(row['machines'], row['precision'])} | `{row['command']}` |")


# ---- One line per run -----------------------------------------------------------------------------------------------

COLUMNS = ("run", "top-1 (95% interval)", "top-5", "superclass", "minutes", "trained on")
MORE_COLUMNS = ("cross-entropy", "deduplicated", "parameters")  # of a wide table, after the superclass
MAX_NAME = 32  # characters in the column of names, so that a line of the table that is not wide has at most 100


def run_table(runs: Iterable[FinishedRun], test_set: Callable[[bool], TestSet], *, strict: bool,
              flip: bool = False, wide: bool = False) -> str:
    """One line per run, for the screen; `test_set(synthetic)` gives the images to measure it on.

    With `flip`, a second line has the predictions averaged over each image and its mirror image. The line of a run
    that cannot be measured says why; if `strict`, or if the run is published, raise the UserError instead.
    """
    lines, runs = [], list(runs)
    for run, name in zip(runs, short_names(runs), strict=True):
        try:
            test = test_set(run.synthetic)
            lines.append([name, *_cells([run], run.logits(test), test, wide)])
            if flip:
                lines.append(["+ flip averaging", *_cells([run], run.flip_averaged(test), test, wide)])
        except (UserError, WeightsError) as problem:
            if strict or run.published:
                raise
            lines.append([name, f"left out: {problem}"])
    return _aligned(lines, wide)


def ensemble_table(runs: list[FinishedRun], test_set: Callable[[bool], TestSet], *, wide: bool = False) -> str:
    """One line per run, and one for their mean probabilities, with the sum of their costs."""
    if len({run.folder for run in runs}) < 2 or len({run.synthetic for run in runs}) > 1:
        raise UserError("an ensemble needs at least two different runs on the same dataset")
    test = test_set(runs[0].synthetic)
    logits = [run.logits(test) for run in runs]
    members = [[name, *_cells([run], one, test, wide)]
               for run, one, name in zip(runs, logits, short_names(runs), strict=True)]
    return _aligned([*members, [f"ensemble of these {len(runs)}", *_cells(runs, average(logits), test, wide)]], wide)


def short_names(runs: list[FinishedRun]) -> list[str]:
    """A name of at most MAX_NAME characters for each run: its own, or its label if another run has the same name."""
    counts = Counter(run.name for run in runs)
    names = [printable(run.name) if counts[run.name] == 1 else run.label for run in runs]
    start, end = (MAX_NAME - 3) // 2, MAX_NAME - 3 - (MAX_NAME - 3) // 2
    return [name if len(name) <= MAX_NAME else f"{name[:start]}...{name[-end:]}" for name in names]


def _aligned(lines: list[list[str]], wide: bool) -> str:
    """Lines in columns below a heading; a line of two cells is a name and a remark."""
    headings = [*COLUMNS[:4], *(MORE_COLUMNS if wide else ()), *COLUMNS[4:]]
    rows = [headings, *(line for line in lines if len(line) == len(headings))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[0] = max(len(line[0]) for line in [headings, *lines])
    aligned = []
    for name, *cells in [headings, *lines]:
        *numbers, last = cells
        columns = [f"{cell:>{width}}" for cell, width in zip(numbers, widths[1:], strict=False)]
        aligned.append("  ".join([f"{name:<{widths[0]}}", *columns, last]))
    return "\n".join(aligned)


def _cells(runs: list[FinishedRun], logits: np.ndarray, test: TestSet, wide: bool) -> list[str]:
    """The cells after the name for one run, or for several that gave these logits together."""
    numbers = measure_on(test, logits)
    low, high = interval95(numbers["top1"], len(test))
    more = [f"{numbers['cross_entropy']:.4f}",
            f"{numbers[WITHOUT_DUPLICATES]:.2f}" if WITHOUT_DUPLICATES in numbers else "–",
            f"{sum(run.result['parameters'] for run in runs):,}"]
    return [f"{numbers['top1']:.2f} ({low:.2f}–{high:.2f})", f"{numbers['top5']:.2f}", f"{numbers['superclass']:.2f}",
            *(more if wide else ()), f"{sum(run.result['train_seconds'] for run in runs) / 60:.1f}",
            ", ".join(sorted({_training_images(run) for run in runs}))]


def _training_images(run: FinishedRun) -> str:
    if run.synthetic:
        return "SYNTHETIC"
    return "50,000" if run.settings["train_on_all"] else "45,000"


def comparison(a: FinishedRun, b: FinishedRun, test: TestSet) -> str:
    """Two runs' top-1 accuracies and whether chance alone explains the difference, in words."""
    correct_a, correct_b = (run.logits(test).argmax(1) == test.fine_labels for run in (a, b))
    outcome = mcnemar(correct_a, correct_b)
    p = "p < 1e-99" if outcome.p < 1e-99 else f"p = {outcome.p:.2g}"
    verdict = "chance alone does not explain the difference" if outcome.p < 0.05 \
        else "chance may explain the difference"
    return (f"{a.label} {100 * correct_a.mean():.2f}%, {b.label} {100 * correct_b.mean():.2f}%, on the same "
            f"{len(test):,} images.\nOnly {a.label} is correct on {outcome.only_a:,} of them, only {b.label} on "
            f"{outcome.only_b:,}: {p} (exact McNemar test), {verdict}.")
