"""Names shared by training, which writes runs, and evaluation, which reads them."""

import os
from pathlib import Path

PUBLISHED = "published"  # the folder below results/ of runs that are committed
RESERVED = (PUBLISHED, "data", "data-synthetic", "overfit_batch", "sanity_checks", "tune")  # other folders there
METRICS = ("epoch", "train_loss", "train_acc", "val_loss", "val_acc", "lr", "seconds")


def find_run(name: str, results_dir: Path) -> Path:
    """The folder of a run given as a shell completes it: by its name, its folder, or a file in that.

    `name` in `results_dir` if there is none.
    """
    given = [Path(os.path.normpath(results_dir / name)), Path(os.path.abspath(os.path.expanduser(name)))]
    for path in given:
        folder = path.parent if os.path.isfile(path) else path  # unlike Path's, False for a name that no file can have
        if os.path.isfile(folder / "config.json"):
            return folder
    return next(filter(os.path.isdir, given), results_dir / name)
