"""Copying finished runs to where the committed ones are, and refusing those that a reader could not make again."""

import re
import shutil
from pathlib import Path

import numpy as np

from evaluation.runs import FinishedRun, TestPictures, are_logits, find_runs, finite_logits, read_arrays
from models import load_model
from runs import PUBLISHED, read_json, replacing
from utils import FINE_NAMES, UserError, load_cifar100

RECORDED = ("config.json", "metrics.csv", "loss.png", "result.json")
MAX_WEIGHTS_BYTES = 25_000_000
MAY_DIFFER = ("seed", "threads", "data_dir", "checkpoint_every")  # among the runs of a recipe
CALIBRATION = "calibration"  # the folder, below the published runs, of held-out pictures' logits


def publish(name: str, results_dir: Path, test: TestPictures) -> Path:
    """Copy a finished run of a recipe to where published ones are; returns where.

    Only one seed of a recipe keeps its weights. Raises UserError for a run that must not be published.
    """
    run = _finished(name, results_dir)
    if not run.settings["train_on_all"]:
        raise UserError(f"{run.folder} was not trained on all pictures: train it again with --train-on-all")
    _require_plain(run, "--train-on-all")
    target = results_dir / PUBLISHED / f"{run.recipe}-s{run.seed}"
    if target.exists():
        raise UserError(f"{target} is published already: remove it first if it is to be replaced")
    siblings = _siblings(run, results_dir)
    require_alike([*siblings, run])
    run.logits(test)
    files = [*RECORDED, "predictions.npz"]
    if not any(sibling.weights.exists() for sibling in siblings) and run.weights.stat().st_size <= MAX_WEIGHTS_BYTES:
        files.append("model.safetensors")
    return _copy(run.folder, files, target)


def publish_calibration(name: str, results_dir: Path, data_dir: str) -> Path:
    """Publish a finished run's logits of the 5,000 held-out pictures, in place of older ones; returns where.

    The run is one of a recipe on the other 45,000: only there is a network as unsure as it will be of test pictures.
    Raises UserError for a run that must not be published.
    """
    run = _finished(name, results_dir)
    if run.settings["train_on_all"]:
        raise UserError(f"{run.folder} was trained on the held-out pictures too: train it without --train-on-all")
    _require_plain(run)
    require_alike([*_siblings(run, results_dir), run], besides=("train_on_all",))
    _, val = load_cifar100(data_dir)
    logits = finite_logits(load_model(run.weights), val.images, len(val.fine_names), str(run.weights))
    path, fine_labels = run.folder / "val_predictions.npz", val.fine_labels.numpy().astype(np.uint8)
    with replacing(path) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, logits=logits.numpy().astype(np.float16), fine_labels=fine_labels)
    return _copy(run.folder, ["config.json", path.name], results_dir / PUBLISHED / CALIBRATION / run.recipe)


def read_calibration(run: FinishedRun, results_dir: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """The held-out pictures' logits, float16 [5000, 100], and labels, int64 [5000], from which a temperature for `run`
    is fitted; None if its recipe is not calibrated. Raises UserError if it was calibrated with other settings.
    """
    folder = results_dir / PUBLISHED / CALIBRATION / run.recipe
    path = folder / "val_predictions.npz"
    if not path.exists():
        return None
    require_alike([run, FinishedRun(folder)], besides=("train_on_all",))
    logits, labels = read_arrays(path, "logits", "fine_labels")
    if labels.dtype != np.uint8 or labels.ndim != 1 or not len(labels) or labels.max() >= len(FINE_NAMES) \
            or not are_logits(logits, len(labels), len(FINE_NAMES)):
        raise UserError(f"{path} holds no logits and labels of {len(FINE_NAMES)} classes: "
                        "make it again with --calibrate")
    return logits, labels.astype(np.int64)


def publish_overfit(name: str, results_dir: Path) -> Path:
    """Copy an overfit check, say overfit_batch/mlp, to where published ones are, in place of an older one.

    Raises UserError if it was made with other flags than --overfit-batch, did not pass, or had uncommitted changes.
    """
    source = results_dir / name
    content = read_json(source / "overfit.json")
    try:
        plain = content["given"] == {} and content["readings"]["cross-entropy"]["passed"] is True
        clean = content["git_changes"] is False
    except (KeyError, TypeError):
        plain = clean = False
    if not plain:
        raise UserError(f"{source} is not the plain check, passed: run it again with --overfit-batch alone")
    if not clean:
        raise UserError(f"{source} was not made from a clean commit: commit every change and make it again")
    return _copy(source, ["overfit.json", "overfit.png", "curves.csv"], results_dir / PUBLISHED / name)


def require_alike(runs: list[FinishedRun], besides: tuple[str, ...] = ()) -> None:
    """Raise UserError unless these runs of one recipe differ in nothing but their seeds, and settings in `besides`."""
    first, *others = [run.settings for run in runs]
    for run, settings in zip(runs[1:], others, strict=True):
        differing = {name: (first.get(name), settings.get(name)) for name in first.keys() | settings.keys()
                     if name not in (*MAY_DIFFER, *besides) and first.get(name) != settings.get(name)}
        if differing:
            words = "; ".join(f"{name}: {one} and {other}" for name, (one, other) in sorted(differing.items()))
            raise UserError(f"{run.folder} cannot stand beside {runs[0].folder}, their settings differ ({words})")


def _finished(name: str, results_dir: Path) -> FinishedRun:
    run = FinishedRun(results_dir / name)
    if not (run.folder / "result.json").exists():
        raise UserError(f"{run.folder} is no finished run; if there is such a run, go on with --resume {name} first")
    if run.synthetic:
        raise UserError(f"{run.folder} was trained on synthetic pictures: it cannot be published")
    return run


def _require_plain(run: FinishedRun, *flags: str) -> None:
    """Raise UserError unless the run is its recipe with these flags alone, from a clean commit."""
    plain = r"python train_\w+\.py( --recipe \S+)?" + "".join(f" {flag}" for flag in flags)
    if not re.fullmatch(plain, run.recipe_command):
        raise UserError(f"{run.folder} is not the recipe {run.recipe} but `{run.recipe_command}`: it cannot be "
                        "published")
    if run.config["git_changes"] is not False:
        raise UserError(f"{run.folder} was not trained from a clean commit: commit every change and train it again")


def _siblings(run: FinishedRun, results_dir: Path) -> list[FinishedRun]:
    """The published runs of the same recipe."""
    return [other for other in find_runs(results_dir) if other.published and other.recipe == run.recipe]


def _copy(source: Path, files: list[str], target: Path) -> Path:
    """Make the folder `target`, in place of an older one, of some files of `source`: whole or not at all."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for file in files:
            shutil.copyfile(source / file, partial / file)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
