"""Measure finished runs on the test set, publish them, and derive every published table and figure from them.

    python evaluate.py                        # all runs with weights: print a table, and update results.json and the
                                              # tables and numbers in README.md and docs/
    python evaluate.py mlp-s0                 # only these runs; updates nothing
    python evaluate.py --wide                 # the table with cross-entropy, near-duplicates left out, parameters
    python evaluate.py fast-s0 --tta flip     # adds a line with predictions averaged over mirror images
    python evaluate.py --ensemble fast-s0 fast-s1 fast-s2    # adds a line for the mean of their probabilities
    python evaluate.py --compare fast-s0 mlp-s0    # is one better than the other, or is it chance?
    python evaluate.py --publish mlp-s0       # copy a finished run to results/published/, then measure all runs
    python evaluate.py --calibrate fast-s0    # publish the validation logits of a run trained on 45,000 images, and
                                              # write the temperature that they give into the published weights
    python evaluate.py --corruptions          # measure the published runs, or those named, on test images with noise,
                                              # blur, rotation ..., and on CIFAR-100-C if it is in the data folder
    python evaluate.py --figures              # draw the published runs, and the search, into docs/figures/
    python evaluate.py --report               # write results/report.html: every test image, guesses, figures
    python evaluate.py --check                # change nothing; exit 1 if a published number does not hold

Name a run as a shell completes it: its name, its folder, or a file in that. A published run is published/<name> if one
of your own runs has the same name. With one of your own runs, --figures and --report write into its folder.

The test set is opened for evaluation and nowhere in training. Logits are computed once per run, in float32, and saved
in `predictions.npz`; every number is a pure function of logits and labels.
"""

import argparse
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from common.command_line import Parser, exit_status, next_command, say
from common.devices import float32_device
from common.errors import UserError, warn
from common.files import RESULTS_DIR, ROOT, write_json
from common.plotting import save_figure
from common.run_files import find_run
from common.text import printable
from evaluation import corruptions
from evaluation.all_figures import draw
from evaluation.blocks import renew_blocks
from evaluation.check import check
from evaluation.finished_runs import FinishedRun, TestSet, find_runs, find_unfinished, named_run, not_finished
from evaluation.publish import label_weights, publish, publish_calibration, publish_overfit
from evaluation.published_runs import Published
from evaluation.tables import comparison, ensemble_table, run_table
from utils import default_data_dir

NEAR_DUPLICATES = Path("data") / "near_duplicates.csv"  # below results/; written by python -m tools.explore
BEST = ""  # the default of --figures and --report: the published run of the best recipe


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    results_dir = options.results_dir.resolve()
    own_names = [_own_name(name, results_dir) for name in (*options.publish, *filter(None, [options.calibrate]))]
    device = float32_device(options.device)

    @cache
    def test_set(synthetic: bool) -> TestSet:
        return TestSet(options.data_dir, synthetic=synthetic, near_duplicates=results_dir / NEAR_DUPLICATES,
                       device=device)

    def published() -> Published:
        return Published(results_dir, [run for run in find_runs(results_dir) if run.published], test_set(False))

    if options.check:
        problems, count = check(published(), ROOT), len(published().runs)
        print("\n".join(problems) or f"every published number holds: {count} runs")
        return 1 if problems else 0
    if options.compare:
        a, b = _chosen(options.compare, results_dir)
        if a.synthetic != b.synthetic:
            raise UserError(f"{a.label} and {b.label} were trained on different datasets: they cannot be compared")
        print(comparison(a, b, test_set(a.synthetic)))
    elif options.ensemble:
        print(ensemble_table(_chosen(options.ensemble, results_dir), test_set, wide=options.wide))
    elif options.calibrate:
        target = publish_calibration(own_names[0], results_dir, options.data_dir, device)
        print("\n".join([f"published: {target}", *label_weights(results_dir)]))
    elif options.corruptions is not None:
        _measure_corruptions(_with_weights(options.corruptions, results_dir), test_set, Path(options.data_dir))
        if not options.corruptions and results_dir == RESULTS_DIR:
            _update(published())
    elif options.figures is not None:
        _write_figures(*_subject(options.figures, published, test_set, results_dir))
    elif options.report is not None:
        _write_report(*_subject(options.report, published, test_set, results_dir), options.data_dir, results_dir)
    else:
        for name in own_names:
            is_overfit = (results_dir / name / "overfit.json").exists()
            target = publish_overfit(name, results_dir) if is_overfit else publish(name, results_dir, test_set(False))
            print(f"published: {target}")
        runs = _chosen(options.runs, results_dir)
        print(run_table(runs, test_set, strict=bool(options.runs), flip=options.tta == "flip", wide=options.wide))
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
    one_of.add_argument("--corruptions", metavar="RUN", nargs="*",
                        help="measure the published runs, or these, on corrupted test images and on CIFAR-100-C")
    one_of.add_argument("--figures", metavar="RUN", nargs="?", const=BEST,
                        help="draw the published runs into docs/figures/, with the mistakes of this one (default: the "
                             "best); one of your runs alone, into its folder")
    one_of.add_argument("--report", metavar="RUN", nargs="?", const=BEST,
                        help="write results/report.html; of one of your runs alone, report.html in its folder")
    one_of.add_argument("--check", action="store_true",
                        help="change nothing; exit 1 if a published number does not hold")
    parser.add_argument("--wide", action="store_true", help="print the table with all columns: over 100 characters")
    parser.add_argument("--tta", choices=("flip",), help="measure the named runs with averaged predictions too")
    parser.add_device("where networks compute logits that are not saved yet (default: auto)")
    parser.add_data_dir()
    parser.add_results_dir()
    options = parser.parse_args(argv)
    options.data_dir = options.data_dir or default_data_dir()
    if options.tta and not options.runs:
        raise UserError("--tta needs the names of the runs to measure")
    without_table = ("check", "compare", "calibrate", "corruptions", "figures", "report")
    chosen = next((name for name in without_table if getattr(options, name) != parser.get_default(name)), None)
    if options.wide and chosen:
        raise UserError(f"--wide has no effect with --{chosen}")
    return options


def _own_name(name: str, results_dir: Path) -> str:
    """The name of a finished run, or an overfit check, in `results_dir`. Raises UserError for anything else."""
    folder = find_run(name, results_dir).resolve()
    if not folder.is_relative_to(results_dir) or folder == results_dir:
        raise UserError(f"{name} is not a run name: give the name of a folder in {results_dir}")
    if not (folder / "overfit.json").exists():
        named_run(name, results_dir)
    return str(folder.relative_to(results_dir))


def _chosen(names: list[str], results_dir: Path) -> list[FinishedRun]:
    """The runs of these names, or all finished ones. Raises UserError for an unknown name, or without any run."""
    if names:
        return [named_run(name, results_dir) for name in names]
    runs, unfinished = find_runs(results_dir), find_unfinished(results_dir)
    if not runs and unfinished:
        raise UserError(not_finished(unfinished[-1]))
    if not runs:
        raise UserError(f"{results_dir} has no runs: train one first, with "
                        f"{next_command(['python', 'train_mlp.py'], results_dir)}")
    if unfinished:
        warn(f"left out, since not finished: {', '.join(printable(folder.name) for folder in unfinished)}")
    return runs


def _with_weights(names: list[str], results_dir: Path) -> list[FinishedRun]:
    """The runs of these names, or the published ones that have weights. Raises UserError if there are none."""
    if names:
        return [named_run(name, results_dir, with_weights=True) for name in names]
    runs = [run for run in find_runs(results_dir) if run.published and run.weights.exists()]
    if not runs:
        raise UserError("no published run has weights: name one of your runs, as in --corruptions mlp-s0")
    return runs


def _measure_corruptions(runs: list[FinishedRun], test_set: Callable[[bool], TestSet], data_dir: Path) -> None:
    """Print each run's accuracy on corrupted test images and, if the data folder has it, on CIFAR-100-C."""
    official = None
    if not all(run.synthetic for run in runs):
        official = corruptions.find_official(data_dir, test_set(False))
    for run in runs:
        test = test_set(run.synthetic)
        say(f"{run.label}: {corruptions.clean_accuracy(run, test):.2f}% of {len(corruptions.sample(test)):,} test "
            "images without corruption; by strength (%):")
        for name, accuracy in corruptions.measured(run, test):
            strengths = corruptions.CORRUPTIONS[name].strengths
            _say_accuracy(name, [f"{strength:g}" for strength in strengths], accuracy)
        if official and not run.synthetic:
            say(f"{run.label} on {corruptions.OFFICIAL}, {len(test):,} images at each strength (%):")
            for name, accuracy in corruptions.measured_official(run, test, official):
                _say_accuracy(name, [str(number + 1) for number in range(len(accuracy))], accuracy)


def _say_accuracy(name: str, strengths: list[str], accuracy: np.ndarray) -> None:
    columns = [f"{strength:>5}: {value:5.2f}" for strength, value in zip(strengths, accuracy, strict=True)]
    say(f"  {name:<17}  {'  '.join(columns)}   mean: {accuracy.mean():5.2f}")


def _update(published: Published) -> None:
    """Write results.json, the temperatures of published weights, and the blocks and numbers of README.md and docs/.

    Print what could not be written.
    """
    write_json(published.results_dir / "results.json", published.rows)
    problems = [*label_weights(published.results_dir), *renew_blocks(published, ROOT)]
    exception = ", except for these" if problems else ""
    print("\n".join([*problems, f"README.md, docs/ and results/results.json are up to date{exception}"]))


# ---- Figures and report ---------------------------------------------------------------------------------------------


def _subject(name: str, published: Callable[[], Published], test_set: Callable[[bool], TestSet],
             results_dir: Path) -> tuple[Published, FinishedRun]:
    """The run of this name, or the best published one, after the runs to show with it: the published ones or itself."""
    if not name:
        return published(), published().ranked[0]
    run = named_run(name, results_dir)
    if run.published and not run.elsewhere:
        return published(), run
    return Published(run.folder, [run], test_set(run.synthetic), alone=True), run


def _write_figures(shown: Published, run: FinishedRun) -> None:
    folder = run.folder / "figures" if shown.alone else ROOT / "docs" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for file, figure in draw(shown, run).items():
        save_figure(figure, folder / f"{file}.png")
        print(f"drawn: {folder / file}.png")


def _write_report(shown: Published, run: FinishedRun, data_dir: str, results_dir: Path) -> None:
    from evaluation.report import cited_rows, training_copies, write_report  # it needs packages that numbers do not

    path = shown.results_dir / "report.html"
    copies = {} if run.synthetic else training_copies(results_dir / NEAR_DUPLICATES, shown.test, data_dir)
    cited = [] if run.synthetic else cited_rows(results_dir)
    write_report(shown, run, draw(shown, run), path, copies=copies, cited=cited)
    print(f"written: {path}")

if __name__ == "__main__":
    sys.exit(exit_status(main))
