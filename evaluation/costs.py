"""The table of training costs that `benchmarks.time_to_accuracy` writes."""

from pathlib import Path
from typing import Any

from common.errors import UserError
from common.run_files import PUBLISHED

OURS = "--recipe "  # before the names of our recipes


def read_costs(results_dir: Path) -> str:
    """The published text with the table; "" without one."""
    path = results_dir / PUBLISHED / "benchmarks" / "time_to_accuracy.md"
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def measured_costs(text: str) -> list[dict[str, Any]]:
    """The rows of the table in a text, each with name, minutes, flops and accuracy.

    The accuracy of a recipe that was not published then is None. Raises UserError if the table is damaged.
    """
    headings, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
                          if line.startswith("|")] + [[], []]
    costs = []
    try:
        for row in filter(None, rows):
            cells = dict(zip(headings, row, strict=True))
            number, unit = cells["training time"].split()
            costs.append({"name": cells["recipe"], "minutes": float(number) * {"min": 1, "h": 60}[unit],
                          "flops": float(cells["training FLOPs"]),
                          "accuracy": float(cells["test accuracy (%)"]) if cells["test accuracy (%)"] else None})
    except (KeyError, ValueError) as error:
        raise UserError("the table of training costs is damaged: write it again with "
                        "python -m benchmarks.time_to_accuracy") from error
    return costs
