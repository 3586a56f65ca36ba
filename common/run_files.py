"""Names shared by training, which writes runs, and evaluation, which reads them."""

import os
from pathlib import Path
from typing import Any

from common.files import read_json

PUBLISHED = "published"  # the folder below results/ of runs that are committed
CALIBRATION = "calibration"  # folder, below the published runs, of runs on 45,000 images
RESERVED = (PUBLISHED, "data", "data-synthetic", "overfit_batch", "sanity_checks", "tune")  # other folders there
WEIGHTS = "model.safetensors"
CHECKPOINTS = ("checkpoint.safetensors", "checkpoint-previous.safetensors")
METRICS = ("epoch", "train_loss", "train_acc", "val_loss", "val_acc", "lr", "seconds")


def places(name: str, results_dir: Path) -> tuple[Path, Path]:
    """The paths that a name may stand for: in `results_dir` first, then in the current folder."""
    return Path(os.path.normpath(results_dir / name)), Path(os.path.abspath(os.path.expanduser(name)))


def find_run(name: str, results_dir: Path) -> Path:
    """The folder of a run given as a shell completes it: by its name, its folder, or a file in that.

    A user's own run goes before a published one of the same name. Without such a run, the folder of that name, or
    `name` in `results_dir`.
    """
    own = places(name, results_dir)
    for path in (*own, results_dir / PUBLISHED / name):
        folder = path.parent if os.path.isfile(path) else path  # unlike Path's, False for a name that no file can have
        if is_run(folder, results_dir):
            return folder
    return next(filter(os.path.isdir, own), results_dir / name)


def is_run(folder: Path, results_dir: Path) -> bool:
    """Whether a folder holds a run, finished or not."""
    started = os.path.isfile(folder / "config.json") and not is_published(folder, results_dir)  # not a calibration
    return started or os.path.isfile(folder / "result.json")


def is_published(folder: Path, results_dir: Path) -> bool:
    """Whether a folder is one of the published runs, or of their calibrations, of this or another results folder."""
    parent = folder.parent.resolve()
    parent = parent.parent if parent.name == CALIBRATION else parent
    return parent.name == PUBLISHED and parent != results_dir.resolve()


def run_settings(folder: Path) -> dict[str, Any]:
    """The settings in a run's config.json; {} without that file, or if another program wrote it.

    Raises UserError if it is damaged.
    """
    path = folder / "config.json"
    config = read_json(path) if os.path.isfile(path) else {}
    settings = config.get("settings") if isinstance(config, dict) and "command" in config else None
    return settings if isinstance(settings, dict) else {}
