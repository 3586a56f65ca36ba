"""Names shared by training, which writes runs, and evaluation, which reads them."""

import os
from pathlib import Path

PUBLISHED = "published"  # the folder below results/ of runs that are committed
RESERVED = (PUBLISHED, "data", "data-synthetic", "overfit_batch", "sanity_checks", "tune")  # other folders there
METRICS = ("epoch", "train_loss", "train_acc", "val_loss", "val_acc", "lr", "seconds")


def find_run(name: str, results_dir: Path) -> Path:
    """The folder of a run given as a shell completes it: by its name, its folder, or a file in that."""
    for path in (results_dir / name, Path(os.path.expanduser(name)).absolute()):
        if os.path.isdir(path):  # unlike Path.is_dir, False for a name that no folder can have
            return path
        if os.path.isfile(path):
            return path.parent
    return results_dir / name
