"""The numbers of `metrics.csv` for TensorBoard (`--tensorboard`), as event files in the run's folder."""

from pathlib import Path
from typing import Any

from common.errors import UserError


def require_tensorboard() -> None:
    """Raise UserError unless the package `tensorboard` works here."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UserError("--tensorboard needs the package tensorboard: run pip install tensorboard, "
                        "or use --no-tensorboard") from error


class Events:
    """One event file of a training; a resumed training writes another one.

    The new file begins with all epochs so far, and tells TensorBoard to forget what older files have. So no epoch is
    missing or shown twice, wherever the training was interrupted.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here, because importing it takes a second

        self._writer = SummaryWriter(str(folder), purge_step=1)
        self._written = 0

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Add the rows of `metrics.csv` that are not in this file yet, each column as a scalar by epoch."""
        for row in rows[self._written:]:
            for name, value in row.items():
                if name != "epoch" and value is not None:
                    self._writer.add_scalar(name, value, row["epoch"])
        self._written = len(rows)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
