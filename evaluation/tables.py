"""Tables of finished runs: rows a recipe for `results.json` and the README, lines a run for the screen."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from evaluation.metrics import average, interval95, mcnemar, measure
from evaluation.publish import require_alike
from evaluation.runs import FinishedRun, TestPictures
from models import WeightsError
from utils import UserError

CITED = (
    {"model": "guessing", "top1": "1.0", "source": "one class in a hundred"},
    {"model": "original author's CNN (their checkpoint)", "top1": "33.0",
     "source": "measured on the same pictures; 99.8 on the training set"},
    {"model": "a human annotator", "top1": "59.8", "source": "CIFAR-100N, Wei et al. 2022, arXiv 2110.12088"},
)
WITHOUT_DUPLICATES = "top1_without_duplicates"


def measure_on(test: TestPictures, logits: np.ndarray) -> dict[str, float]:
    """What `measure` gives on these pictures and, if near-duplicates are among them, the top-1 without those."""
    numbers = measure(logits, test.fine_labels, test.coarse_labels)
    if not test.distinct.all():
        numbers[WITHOUT_DUPLICATES] = 100 * float((logits.argmax(1) == test.fine_labels)[test.distinct].mean())
    return numbers


# ---------------------------------------------------------------------------------------------------------------------
# A row a recipe
# ---------------------------------------------------------------------------------------------------------------------


def summarise(runs: list[FinishedRun], test: TestPictures) -> list[dict[str, Any]]:
    """One row a recipe, over its seeds: what `results.json` holds and the README's table is made from."""
    rows = [_summary(recipe, seeds, test) for recipe, seeds in by_recipe(runs).items()]
    return sorted(rows, key=lambda row: row["top1"]["mean"])


def by_recipe(runs: list[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """The runs of each recipe, by seed."""
    recipes: dict[str, list[FinishedRun]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        recipes.setdefault(run.recipe, []).append(run)
    return recipes


def _summary(recipe: str, runs: list[FinishedRun], test: TestPictures) -> dict[str, Any]:
    seeds = [run.seed for run in runs]
    require_alike(runs)
    measured = [measure_on(test, run.logits(test)) for run in runs]
    several = f"--seeds {','.join(map(str, seeds))}" if len(seeds) > 1 else f"--seed {seeds[0]}"
    row: dict[str, Any] = {"recipe": recipe, "seeds": seeds, "parameters": runs[0].result["parameters"]}
    for name in measured[0]:
        values = [numbers[name] for numbers in measured]
        row[name] = {"mean": round(float(np.mean(values)), 4),
                     "std": round(float(np.std(values, ddof=1)), 4) if len(values) > 1 else None,
                     "each": [round(value, 4) for value in values]}
    row["interval95"] = [round(bound, 2) for bound in interval95(row["top1"]["mean"], len(test.hashes))]
    row["train_seconds"] = [run.result["train_seconds"] for run in runs]
    row["train_flops"] = runs[0].result["train_flops"]
    row["precision"], row["device"] = (runs[0].settings[key] for key in ("precision", "device"))
    row["machines"] = [run.result["machine"] for run in runs]
    row["command"] = f"{runs[0].recipe_command} {several}"
    return row


def readme_table(rows: list[dict[str, Any]]) -> str:
    """The README's table, Markdown, from the rows of `results.json`, with the cited ones among them."""
    lines = ["| model | parameters | test top-1 (%) | top-5 (%) | superclass (%) | training | hardware "
             "| command or source |", "|---|---:|---:|---:|---:|---:|---|---|"]
    ranked = [(float(cited["top1"]), f"| *{cited['model']}* | | *{cited['top1']}* | | | | | *{cited['source']}* |")
              for cited in CITED]
    ranked += [(row["top1"]["mean"], _readme_row(row)) for row in rows]
    return "\n".join([*lines, *(line for _, line in sorted(ranked))])


def _readme_row(row: dict[str, Any]) -> str:
    if row["top1"]["std"] is None:
        low, high = row["interval95"]
        top1 = f"**{row['top1']['mean']:.2f}** (one seed; 95% interval {low:.1f} to {high:.1f})"
    else:
        top1 = f"**{row['top1']['mean']:.2f}** ± {row['top1']['std']:.2f} ({len(row['seeds'])} seeds)"
    seconds = float(np.mean(row["train_seconds"]))
    time = f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"
    flops = f"{row['train_flops']:.1e}".replace("e+", "e")
    speed = float(np.mean([machine[f"conv3x3_{row['precision']}_gflops"] for machine in row["machines"]])) / 1000
    machines = sorted({machine["processor"] + (f", {machine['threads']} threads" if row["device"] == "cpu" else "")
                       for machine in row["machines"]})
    return (f"| {row['recipe']} | {row['parameters'] / 1e6:.2f} M | {top1} | {row['top5']['mean']:.2f} "
            f"| {row['superclass']['mean']:.2f} | {time}, {flops} FLOPs "
            f"| {' or '.join(machines)}, {row['precision']} at {speed:.2g} TFLOP/s | `{row['command']}` |")


# ---------------------------------------------------------------------------------------------------------------------
# A line a run
# ---------------------------------------------------------------------------------------------------------------------


def run_table(runs: Iterable[FinishedRun], test_set: Callable[[bool], TestPictures], *, strict: bool,
              flip: bool = False) -> str:
    """One line a run, for the screen; `test_set(synthetic)` gives the pictures to measure it on.

    flip: under it stands another with its guesses averaged over each picture and its mirror image. An own run that
    cannot be measured has a line that says why; if `strict`, or if it is published, UserError comes.
    """
    lines = []
    for run in runs:
        try:
            test = test_set(run.synthetic)
            lines.append((run.label, _line([run], run.logits(test), test)))
            if flip:
                lines.append((f"{run.label} + flip averaging", _line([run], run.flip_averaged(test), test)))
        except (UserError, WeightsError) as problem:
            if strict or run.published:
                raise
            lines.append((run.label, f"left out: {problem}"))
    return _aligned(lines)


def ensemble_table(runs: list[FinishedRun], test_set: Callable[[bool], TestPictures]) -> str:
    """One line a run, and under them one of the mean of their probabilities; its cost is theirs together."""
    if len({run.folder for run in runs}) < 2 or len({run.synthetic for run in runs}) > 1:
        raise UserError("an ensemble takes two different runs or more, all of the same pictures")
    test = test_set(runs[0].synthetic)
    logits = [run.logits(test) for run in runs]
    members = [(run.label, _line([run], one, test)) for run, one in zip(runs, logits, strict=True)]
    name = f"ensemble of {', '.join(run.label for run in runs)}"
    return _aligned([*members, (name, _line(runs, average(logits), test))])


def _aligned(lines: list[tuple[str, str]]) -> str:
    """A name and what belongs to it in each line, below a heading."""
    width = max(28, *(len(name) for name, _ in lines))
    heading = (f"{'top-1 (95% interval)':>22} {'top-5':>7} {'superclass':>10} {'cross-entropy':>13} "
               f"{'deduplicated':>12} {'parameters':>11} {'training':>10}  trained on")
    return "\n".join(f"{name:<{width}} {line}" for name, line in [("run", heading), *lines])


def _line(runs: list[FinishedRun], logits: np.ndarray, test: TestPictures) -> str:
    """What is known of one or more runs that gave these logits together."""
    numbers = measure_on(test, logits)
    low, high = interval95(numbers["top1"], len(test.hashes))
    top1 = f"{numbers['top1']:.2f} ({low:.2f}–{high:.2f})"
    deduplicated = f"{numbers[WITHOUT_DUPLICATES]:.2f}" if WITHOUT_DUPLICATES in numbers else "–"
    pictures = " or ".join(sorted({"SYNTHETIC" if run.synthetic else "all 50,000" if run.settings["train_on_all"]
                                   else "45,000" for run in runs}))
    return (f"{top1:>22} {numbers['top5']:>7.2f} {numbers['superclass']:>10.2f} {numbers['cross_entropy']:>13.4f} "
            f"{deduplicated:>12} {sum(run.result['parameters'] for run in runs):>11,} "
            f"{sum(run.result['train_seconds'] for run in runs):>8.0f} s  {pictures}")


def comparison(a: FinishedRun, b: FinishedRun, test: TestPictures) -> str:
    """Two runs' top-1 accuracies and whether chance alone explains the difference, in words."""
    right_a, right_b = (run.logits(test).argmax(1) == test.fine_labels for run in (a, b))
    outcome = mcnemar(right_a, right_b)
    p = "p < 1e-99" if outcome.p < 1e-99 else f"p = {outcome.p:.2g}"
    verdict = "chance alone does not explain the difference" if outcome.p < 0.05 \
        else "chance may explain the difference"
    return (f"{a.label} {100 * right_a.mean():.2f}%, {b.label} {100 * right_b.mean():.2f}%, on the same "
            f"{len(test.hashes):,} pictures.\nOnly {a.label} is right on {outcome.only_a:,} of them, only {b.label} on "
            f"{outcome.only_b:,}: {p} (exact McNemar test), {verdict}.")
