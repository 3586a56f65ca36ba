"""Measure finished runs on the test set, publish them, and derive every published table and figure from them.

    python evaluate.py                        # all runs with weights: print a table, and update results.json and the
                                              # tables in README.md and docs/
    python evaluate.py mlp-s0                 # only these runs; updates nothing
    python evaluate.py fast-s0 --tta flip     # adds a line with predictions averaged over mirror images
    python evaluate.py --ensemble fast-s0 fast-s1 fast-s2    # adds a line for the mean of their probabilities
    python evaluate.py --compare fast-s0 mlp-s0    # is one better than the other, or is it chance?
    python evaluate.py --publish mlp-s0       # copy a finished run to results/published/, then measure all runs
    python evaluate.py --calibrate fast-s0    # publish the validation logits of a run that was trained on 45,000 images
    python evaluate.py --figures              # draw the published runs into docs/figures/
    python evaluate.py --report               # write results/report.html, a self-contained page
    python evaluate.py --check                # change nothing; exit 1 if a published number does not hold

A published run is called by its name, or published/<name> if one of your own runs has the same name. The test set is
opened for evaluation and nowhere in training. Logits are computed once per run, in float32, and saved in
`predictions.npz`; every number is a pure function of logits and labels.
"""

import argparse
import sys
from functools import cache
from pathlib import Path
from typing import Any

from common.command_line import Parser, exit_status
from common.errors import UserError
from common.files import RESULTS_DIR, ROOT, write_json
from common.plotting import save_figure
from evaluation import figures
from evaluation.blocks import Published, calibrations, renew_blocks
from evaluation.check import check
from evaluation.finished_runs import FinishedRun, TestSet, find_runs, runs_by_name
from evaluation.metrics import (
    class_accuracy,
    coarse_of_fine,
    confident_mistakes,
    confused_pairs,
    confusion_matrix,
    softmax,
)
from evaluation.publish import publish, publish_calibration, publish_overfit
from evaluation.tables import by_recipe, comparison, ensemble_table, minutes, run_table
from utils import default_data_dir

NEAR_DUPLICATES = Path("data") / "near_duplicates.csv"  # below results/; written by python -m tools.explore
BEST = ""  # the default of --figures and --report: the published run of the best recipe
PAIRS = 6  # of confused classes in their figure


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    results_dir = options.results_dir.resolve()

    @cache
    def test_set(synthetic: bool) -> TestSet:
        return TestSet(options.data_dir, synthetic=synthetic, near_duplicates=results_dir / NEAR_DUPLICATES)

    def published() -> Published:
        return Published(results_dir, [run for run in find_runs(results_dir) if run.published], test_set(False))

    if options.check:
        problems, count = check(published(), ROOT), len(published().runs)
        print("\n".join(problems) or f"every published number holds: {count} runs")
        return 1 if problems else 0
    if options.compare:
        a, b = _chosen(find_runs(results_dir), options.compare, results_dir)
        if a.synthetic != b.synthetic:
            raise UserError(f"{a.label} and {b.label} were trained on different datasets: they cannot be compared")
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
            _update(published())
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="evaluate.py", description=__doc__)
    one_of = parser.add_mutually_exclusive_group()
    one_of.add_argument("runs", nargs="*", metavar="RUN", default=[], help="measure only these runs (default: all)")
    one_of.add_argument("--ensemble", nargs="+", metavar="RUN", default=[], help="measure these runs together")
    one_of.add_argument("--compare", nargs=2, metavar="RUN", default=[], help="the paired McNemar test of two runs")
    one_of.add_argument("--publish", metavar="NAME", nargs="+", default=[],
                        help="copy these finished runs to results/published/, then measure all runs")
    one_of.add_argument("--calibrate", metavar="NAME",
                        help="publish a run's validation logits, from which a temperature is fitted")
    one_of.add_argument("--figures", metavar="RUN", nargs="?", const=BEST,
                        help="draw the published runs, and the mistakes of this one (default: the best)")
    one_of.add_argument("--report", metavar="RUN", nargs="?", const=BEST, help="write results/report.html")
    one_of.add_argument("--check", action="store_true",
                        help="change nothing; exit 1 if a published number does not hold")
    parser.add_argument("--tta", choices=("flip",), help="measure the named runs with averaged predictions too")
    parser.add_data_dir()
    parser.add_results_dir(default=RESULTS_DIR)
    options = parser.parse_args(argv)
    options.data_dir = options.data_dir or default_data_dir()
    for name in (*options.publish, *filter(None, [options.calibrate])):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{name} is not a run name: give the name of a folder in {options.results_dir}")
    if options.tta and not options.runs:
        raise UserError("--tta needs the names of the runs to measure")
    return options


def _chosen(runs: list[FinishedRun], names: list[str], results_dir: Path) -> list[FinishedRun]:
    """The runs of these names, or all of them. Raises UserError for an unknown name, or if there are no runs."""
    if not runs:
        raise UserError(f"there is no finished run in {results_dir}: train one first, with python train_mlp.py")
    by_name = runs_by_name(runs)
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise UserError(f"no finished run in {results_dir} is called {', '.join(unknown)}; "
                        f"there are: {', '.join(sorted({run.label for run in runs}))}")
    return [by_name[name] for name in names] if names else runs


def _update(published: Published) -> None:
    """Write results.json and every block of README.md and docs/, and print what could not be written."""
    write_json(published.results_dir / "results.json", published.rows)
    problems = renew_blocks(published, ROOT)
    exception = ", except for these blocks" if problems else ""
    print("\n".join([*problems, f"README.md, docs/ and results/results.json are up to date{exception}"]))


# ---- Figures and report ---------------------------------------------------------------------------------------------


def _write_figures(published: Published, name: str) -> None:
    folder = ROOT / "docs" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for file, figure in draw(published, _subject(published, name)).items():
        save_figure(figure, folder / f"{file}.png")
        print(f"drawn: {folder / file}.png")


def _write_report(published: Published, name: str) -> None:
    from evaluation.report import write_report  # here, because it needs packages that the numbers do not

    subject, path = _subject(published, name), published.results_dir / "report.html"
    by_title = {figure.get_suptitle(): figure for figure in draw(published, subject).values()}
    write_report(published.runs, published.rows, published.test, subject, by_title, path)
    print(f"written: {path}")


def _subject(published: Published, name: str) -> FinishedRun:
    """The published run of this name, or the best one."""
    runs = _chosen(published.runs, [name] if name else [], published.results_dir)
    return runs[0] if name else published.ranked[0]


def draw(published: Published, run: FinishedRun) -> dict[str, Any]:
    """Every figure by file name: `run`'s predictions in detail, then all published runs.

    The reliability diagram shows the best calibrated recipe if `run` has no calibration.
    """
    test, recipes = published.test, by_recipe(published.runs)
    labels, names, classes = test.fine_labels, test.fine_names, len(test.fine_names)
    images, probabilities = test.images.numpy(), softmax(run.logits(test))
    predicted = probabilities.argmax(1)
    confusion = confusion_matrix(predicted, labels, classes)
    mistakes = confident_mistakes(probabilities, labels, figures.GALLERY_SIZE)

    calibrated = next((one for one in (run, *published.ranked) if len(calibrations(published, one)) > 1), run)
    variants = {"as trained" if temperature == 1 else f"temperature {temperature:.3f}": found
                for temperature, found in calibrations(published, calibrated).items()}
    curves = {recipe: [seed.curves() for seed in seeds] for recipe, seeds in recipes.items()}
    accuracy = {row["recipe"]: row["top1"]["mean"] for row in published.rows}
    parameters = {row["recipe"]: (row["parameters"] / 1e6, row["top1"]["mean"]) for row in published.rows}
    training = {row["recipe"]: (minutes(row), row["top1"]["mean"]) for row in published.rows}
    return {
        "confusion": figures.confusion_figure(
            confusion, coarse_of_fine(labels, test.coarse_labels, classes), test.coarse_names,
            f"{run.name}: confusion matrix on the test set"),
        "classes": figures.class_accuracy_figure(
            class_accuracy(predicted, labels, classes), names, f"{run.name}: test accuracy by class"),
        "confused": figures.confused_pairs_figure(
            images, probabilities, labels, confused_pairs(confusion, PAIRS), names,
            f"{run.name}: most frequent confusions"),
        "mistakes": figures.mistakes_figure(
            images, probabilities, labels, mistakes, names, f"{run.name}: most confident mistakes"),
        "reliability": figures.reliability_figure(variants, f"{calibrated.name}: reliability diagram"),
        "curves": figures.learning_curves_figure(
            curves, accuracy, "Published runs, trained on all 50,000 training images"),
        "accuracy-parameters": figures.accuracy_against(
            {"ours": parameters}, "parameters (millions)", "Test accuracy against network size"),
        "accuracy-minutes": figures.accuracy_against(
            {"ours": training}, "minutes of training (hardware: see the results table)",
            "Test accuracy against training time"),
    }


if __name__ == "__main__":
    sys.exit(exit_status(main))
