"""Draw loss.png and overfit.png again from the numbers that were saved with them, without training.

    python -m tools.redraw                             # everything in results/published/
    python -m tools.redraw mlp-s0 overfit_batch/mlp    # only these runs and overfit checks

Name a run or a check by its name below results/, or by its folder.
"""

import csv
import sys
from pathlib import Path

from common.command_line import Parser, exit_status
from common.errors import UserError
from common.files import read_json, require_file
from common.plotting import save_figure
from common.run_files import METRICS, PUBLISHED, find_run, run_settings
from training.overfit import Outcome, overfit_figure
from training.run_folder import learning_curves
from training.settings import NO_AUGMENTATION, Settings


def read_rows(path: Path) -> list[dict[str, float | None]]:
    """The rows of a CSV file of numbers; None for an empty cell. Raises UserError if it is damaged or has no rows."""
    require_file(path)
    try:
        with open(path, newline="") as file:
            rows = [{name: float(value) if value else None for name, value in row.items()}
                    for row in csv.DictReader(file)]
    except (OSError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({error}): restore it, or train again") from error
    if not rows:
        raise UserError(f"{path} has no rows: restore it, or train again")
    return rows


def redraw_run(folder: Path) -> Path:
    """Draw the loss.png of a run from its metrics.csv; returns its path."""
    rows, settings = read_rows(folder / "metrics.csv"), run_settings(folder)
    if missing := set(METRICS) - rows[0].keys():
        raise UserError(f"{folder / 'metrics.csv'} lacks {', '.join(sorted(missing))}: restore it, or train again")
    figure = learning_curves(rows, folder.name, augmented=any(settings.get(name) for name in NO_AUGMENTATION),
                             synthetic=bool(settings.get("synthetic")))  # older settings may lack some
    save_figure(figure, folder / "loss.png")
    return folder / "loss.png"


def redraw_check(folder: Path) -> Path:
    """Draw the overfit.png of a single-batch check from its overfit.json and curves.csv; returns its path."""
    saved, rows = read_json(folder / "overfit.json"), read_rows(folder / "curves.csv")
    try:
        settings = Settings(**{name: saved["settings"][name]
                               for name in ("batch_size", "epochs", "lr", "optimizer", "synthetic")})
        outcomes = {name: Outcome(loss["title"], tuple(float(row[name] or "nan") for row in rows), loss["memorized"],
                                  loss["batch_size"]) for name, loss in saved["losses"].items()}
        figure = overfit_figure(outcomes, settings)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'overfit.json'} is damaged: run --overfit-batch again") from error
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
