"""Measure finished runs on the test set, publish them, and write every table and figure that is made from them.

    python evaluate.py                        # every run with weights: prints a table, renews results.json and all
                                              # tables in README.md and docs/
    python evaluate.py mlp-s0                 # these runs only; nothing is renewed
    python evaluate.py fast-s0 --tta flip     # the same with guesses averaged over mirror images, in a line of its own
    python evaluate.py --ensemble fast-s0 fast-s1 fast-s2    # the mean of their probabilities, in a line of its own
    python evaluate.py --compare fast-s0 mlp-s0    # is one better than the other, or is it chance?
    python evaluate.py --publish mlp-s0       # copy a finished run to results/published/ first
    python evaluate.py --calibrate fast-s0    # publish the held-out pictures' logits of a run on the other 45,000
    python evaluate.py --figures              # draw the published runs into docs/figures/; say of which run with a name
    python evaluate.py --report               # write results/report.html, a page that needs nothing beside it
    python evaluate.py --check                # change nothing; exit 1 if a published number does not hold

A published run is called by its name, and published/<name> if you have one of the same name. The test set is opened
for evaluation and nowhere in training. Logits are computed once a run, in float32, and kept as `predictions.npz`;
every number is a pure function of logits and labels.
"""

import argparse
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import figures
from evaluation.blocks import Published, calibrations, renew_blocks
from evaluation.check import check
from evaluation.metrics import (
    class_accuracy,
    coarse_of_fine,
    confident_mistakes,
    confused_pairs,
    confusion_matrix,
    softmax,
)
from evaluation.publish import publish, publish_calibration, publish_overfit
from evaluation.runs import FinishedRun, TestPictures, find_runs, runs_by_name
from evaluation.tables import by_recipe, comparison, ensemble_table, run_table
from runs import save_figure, write_json
from settings import RESULTS_DIR, ROOT, Parser, exit_status
from utils import UserError, default_data_dir

NEAR_DUPLICATES = Path("data") / "near_duplicates.csv"  # below results/; python explore.py writes it
BEST = ""  # the run that figures and report are about, unless one is named
PAIRS = 6  # of confused classes in their figure


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    results_dir = options.results_dir.resolve()

    @cache
    def test_set(synthetic: bool) -> TestPictures:
        return TestPictures(options.data_dir, synthetic=synthetic, near_duplicates=results_dir / NEAR_DUPLICATES)

    def published() -> Published:
        return Published(results_dir, [run for run in find_runs(results_dir) if run.published], test_set(False))

    if options.check:
        problems, count = check(published(), ROOT), len(published().runs)
        print("\n".join(problems) or f"every published number holds: {count} runs")
        return 1 if problems else 0
    if options.compare:
        a, b = _chosen(find_runs(results_dir), options.compare, results_dir)
        if a.synthetic != b.synthetic:
            raise UserError(f"{a.label} and {b.label} are of different pictures: they cannot be compared")
        print(comparison(a, b, test_set(a.synthetic)))
    elif options.ensemble:
        print(ensemble_table(_chosen(find_runs(results_dir), options.ensemble, results_dir), test_set))
    elif options.calibrate:
        print(f"published: {publish_calibration(options.calibrate, results_dir, options.data_dir)}")
    elif options.figures is not None:
        _write_figures(published(), options.figures)
    elif options.report is not None:
        _write_report(published(), options.report)
    else:
        for name in options.publish:
            is_overfit = (results_dir / name / "overfit.json").exists()
            target = publish_overfit(name, results_dir) if is_overfit else publish(name, results_dir, test_set(False))
            print(f"published: {target}")
        runs = _chosen(find_runs(results_dir), options.runs, results_dir)
        print(run_table(runs, test_set, strict=bool(options.runs), flip=options.tta == "flip"))
        if any(run.published for run in runs) and not options.runs and results_dir == RESULTS_DIR:
            _renew(published())
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Raises UserError if it asks for two things at once."""
    parser = Parser(prog="evaluate.py", description=__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="measure these runs only (default: all)")
    parser.add_argument("--tta", choices=("flip",), help="measure the named runs with averaged guesses too")
    parser.add_argument("--ensemble", nargs="+", metavar="RUN", default=[], help="measure these runs together")
    parser.add_argument("--compare", nargs=2, metavar="RUN", default=[], help="the paired McNemar test of two runs")
    parser.add_argument("--publish", metavar="NAME", nargs="+", default=[],
                        help="copy these finished runs to results/published/ first")
    parser.add_argument("--calibrate", metavar="NAME",
                        help="publish held-out pictures' logits, from which a temperature is fitted")
    parser.add_argument("--figures", metavar="RUN", nargs="?", const=BEST,
                        help="draw the published runs, and this one's mistakes (default: the best), to docs/figures/")
    parser.add_argument("--report", metavar="RUN", nargs="?", const=BEST, help="write results/report.html")
    parser.add_argument("--check", action="store_true",
                        help="change nothing, exit 1 if a published number does not hold")
    parser.add_argument("--data-dir", default=default_data_dir(), metavar="FOLDER", help="folder of the data set")
    parser.add_argument("--results-dir", type=Path, default=RESULTS_DIR, metavar="FOLDER", help="folder of all runs")
    options = parser.parse_args(argv)
    asked = [f"--{flag}" for flag in ("ensemble", "compare", "publish", "calibrate", "figures", "report", "check")
             if getattr(options, flag) not in (None, [], False)] + ["naming runs to measure"] * bool(options.runs)
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} are different things: do one of them")
    for name in (*options.publish, *filter(None, [options.calibrate])):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{name} is no name of a run: give it as it is called in {options.results_dir}")
    if options.tta and not options.runs:
        raise UserError("--tta needs the names of the runs to measure")
    return options


def _chosen(runs: list[FinishedRun], names: list[str], results_dir: Path) -> list[FinishedRun]:
    """The runs of these names, or all of them. Raises UserError for a name that is none, or if there are no runs."""
    if not runs:
        raise UserError(f"there is no finished run in {results_dir}: train one first, say with python train_mlp.py")
    by_name = runs_by_name(runs)
    missing = [name for name in names if name not in by_name]
    if missing:
        raise UserError(f"no finished run in {results_dir} is called {', '.join(missing)}; "
                        f"there are: {', '.join(sorted({run.label for run in runs}))}")
    return [by_name[name] for name in names] if names else runs


def _renew(published: Published) -> None:
    """Write results.json and every block of README.md and docs/ anew, and say what could not be written."""
    write_json(published.results_dir / "results.json", published.rows)
    problems = renew_blocks(published, ROOT)
    print("\n".join([*problems, "README.md, docs/ and results/results.json are up to date"
                     + (" but for that" if problems else "")]))


# ---------------------------------------------------------------------------------------------------------------------
# Figures and report
# ---------------------------------------------------------------------------------------------------------------------


def _write_figures(published: Published, name: str) -> None:
    folder = ROOT / "docs" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for file, figure in draw(published, _subject(published, name)).items():
        save_figure(figure, folder / f"{file}.png")
        print(f"drawn: {folder / file}.png")


def _write_report(published: Published, name: str) -> None:
    from evaluation.report import write_report  # here: it needs packages that the numbers do not

    subject, path = _subject(published, name), published.results_dir / "report.html"
    by_title = {figure.get_suptitle(): figure for figure in draw(published, subject).values()}
    write_report(published.runs, published.rows, published.test, subject, by_title, path)
    print(f"written: {path}")


def _subject(published: Published, name: str) -> FinishedRun:
    """The published run of this name, or the best one."""
    runs = _chosen(published.runs, [name] if name else [], published.results_dir)
    return runs[0] if name else published.ranked[0]


def draw(published: Published, run: FinishedRun) -> dict[str, Any]:
    """Every figure of the published runs by the name of its file; what is about one run is about `run`.

    But for the reliability: if `run` is not calibrated, it is about the best one that is.
    """
    test, recipes = published.test, by_recipe(published.runs)
    labels, names, classes = test.fine_labels, test.fine_names, len(test.fine_names)
    images, probabilities = test.images.numpy(), softmax(run.logits(test))
    calibrated = next((one for one in (run, *published.ranked) if len(calibrations(published, one)) > 1), run)
    confusion = confusion_matrix(probabilities.argmax(1), labels, classes)
    top1 = {row["recipe"]: row["top1"]["mean"] for row in published.rows}
    parameters = {row["recipe"]: (row["parameters"] / 1e6, row["top1"]["mean"]) for row in published.rows}
    minutes = {row["recipe"]: (float(np.mean(row["train_seconds"])) / 60, row["top1"]["mean"])
               for row in published.rows}
    return {
        "confusion": figures.confusion_figure(
            confusion, coarse_of_fine(labels, test.coarse_labels, classes), test.coarse_names,
            f"{run.name}: what the test pictures of each class are taken for"),
        "classes": figures.class_accuracy_figure(
            class_accuracy(probabilities.argmax(1), labels, classes), names, f"{run.name}: test accuracy by class"),
        "confused": figures.confused_pairs_figure(
            images, probabilities, labels, confused_pairs(confusion, PAIRS), names,
            f"{run.name}: the classes confused most often"),
        "mistakes": figures.mistakes_figure(
            images, probabilities, labels, confident_mistakes(probabilities, labels, figures.GALLERY_SIZE), names,
            f"{run.name}: its most confident mistakes"),
        "reliability": figures.reliability_figure(
            {"as trained" if temperature == 1 else f"temperature {temperature:.3f}": found
             for temperature, found in calibrations(published, calibrated).items()},
            f"{calibrated.name}: is it as often right as it is sure?"),
        "curves": figures.learning_curves_figure(
            {recipe: [seed.curves() for seed in seeds] for recipe, seeds in recipes.items()}, top1,
            "Every published run, on all 50,000 training pictures"),
        "accuracy-parameters": figures.accuracy_against(
            {"ours": parameters}, "parameters (millions)", "Test accuracy against the size of the network"),
        "accuracy-minutes": figures.accuracy_against(
            {"ours": minutes}, "minutes of training (the machines are in the results table)",
            "Test accuracy against training time"),
    }


if __name__ == "__main__":
    sys.exit(exit_status(main))
