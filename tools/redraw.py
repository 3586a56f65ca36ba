"""Draw loss.png and overfit.png again from the numbers that were saved with them, without training.

    python -m tools.redraw                             # everything in results/published/
    python -m tools.redraw mlp-s0 overfit_batch/mlp    # only these runs and overfit checks

Name a run or a check by its name below results/, or by its folder.
"""

import csv
import math
import sys
from pathlib import Path
from typing import Any

import train_cnn
import train_mlp
from common.command_line import Parser, exit_status
from common.errors import UserError
from common.files import read_json, require_file
from common.plotting import save_figure
from common.run_files import PUBLISHED, find_run, run_settings
from evaluation.finished_runs import FinishedRun
from training.overfit import Outcome, overfit_figure
from training.run_folder import learning_curves
from training.settings import AUGMENTING, Settings


def redraw_run(folder: Path) -> Path:
    """Draw the loss.png of a run from its metrics.csv; returns its path."""
    curves = FinishedRun(folder).curves()
    rows = [{name: None if math.isnan(value) else value for name, value in zip(curves, values, strict=True)}
            for values in zip(*curves.values(), strict=True)]
    settings = run_settings(folder)  # as they were saved: those of an older version may lack some
    figure = learning_curves(rows, folder.name, augmented=any(settings.get(name) for name in AUGMENTING),
                             synthetic=bool(settings.get("synthetic")))
    save_figure(figure, folder / "loss.png")
    return folder / "loss.png"


def redraw_check(folder: Path) -> Path:
    """Draw the overfit.png of a single-batch check from its overfit.json and curves.csv; returns its path."""
    saved = read_json(folder / "overfit.json")
    require_file(folder / "curves.csv")
    try:
        settings = Settings(**{name: saved["settings"][name]
                               for name in ("batch_size", "epochs", "lr", "optimizer", "synthetic")})
        with open(folder / "curves.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        outcomes = {name: Outcome(loss["title"], tuple(float(row[name]) for row in rows), loss["memorized"],
                                  loss["batch_size"]) for name, loss in saved["losses"].items()}
        figure = overfit_figure(outcomes, settings)
    except (AttributeError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{folder} has a damaged overfit.json or curves.csv: run --overfit-batch again") from error
    save_figure(figure, folder / "overfit.png")
    return folder / "overfit.png"


def drawn(name: str, results_dir: Path) -> Path:
    """Draw the figure of the run or check of this name; returns its path. Raises UserError if it is neither."""
    folder = find_run(name, results_dir)
    if (folder / "overfit.json").is_file():
        return redraw_check(folder)
    if (folder / "metrics.csv").is_file():
        return redraw_run(folder)
    raise UserError(f"{folder} has neither metrics.csv nor overfit.json: name a run, or a check such as "
                    "overfit_batch/mlp")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m tools.redraw", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a run or an overfit check (default: all published)")
    parser.add_results_dir()
    options = parser.parse_args(argv)
    published = options.results_dir / PUBLISHED
    saved = sorted([*published.glob("*/metrics.csv"), *published.glob("overfit_batch/*/overfit.json")])
    names = options.names or [str(path.parent) for path in saved]
    if not names:
        raise UserError(f"nothing is published in {published}: name one of your runs")
    for name in names:
        print(f"drawn: {drawn(name, options.results_dir)}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
