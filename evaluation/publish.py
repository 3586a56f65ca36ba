"""Copy finished runs to results/published/, and refuse those that a reader could not reproduce."""

import re
import shutil
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import read_json, replacing, write_json
from common.run_files import CALIBRATION, PUBLISHED
from evaluation.finished_runs import FinishedRun, TestSet, are_logits, find_runs, finite_logits, named_run, read_arrays
from evaluation.metrics import fit_temperature
from models import WeightsError, labeled, load_model
from utils import FINE_NAMES, load_cifar100

RECORDED = ("config.json", "metrics.csv", "loss.png", "result.json")
MAX_WEIGHTS_BYTES = 50_000_000  # of one file; GitHub warns above that
MAY_DIFFER = ("seed", "threads", "data_dir", "checkpoint_every", "tensorboard")  # between the runs of a recipe
# Between them and the run that calibrates them. It may come from another machine: its temperature serves every seed.
MAY_DIFFER_IN_CALIBRATION = ("train_on_all", "device", "precision")


def publish(name: str, results_dir: Path, test: TestSet) -> Path:
    """Copy a finished run of a recipe to results/published/, and return the new folder.

    Only one seed per recipe keeps its weights. Raises UserError for a run that must not be published.
    """
    run = _finished(name, results_dir)
    if not run.settings["train_on_all"]:
        raise UserError(f"{run.folder} was not trained on all images: train it with --train-on-all")
    _require_plain(run, "--train-on-all")
    target = results_dir / PUBLISHED / f"{run.recipe}-s{run.seed}"
    if target.exists():
        raise UserError(f"{target} is already published: to replace it, delete it first")
    siblings = _siblings(run, results_dir)
    require_alike([*siblings, run])
    run.logits(test)
    files = [*RECORDED, "predictions.npz"]
    if not any(sibling.weights.exists() for sibling in siblings) and run.weights.stat().st_size <= MAX_WEIGHTS_BYTES:
        files.append("model.safetensors")
    return _copy(run.folder, files, target)


def publish_calibration(name: str, results_dir: Path, data_dir: str, device: str = "cpu") -> Path:
    """Publish a finished run's curves and logits on the 5,000 validation images, replacing older ones.

    Returns the folder.
    The run must have been trained on the other 45,000 images: on images it was trained on, a network is overconfident.
    Raises UserError for a run that must not be published.
    """
    run = _finished(name, results_dir)
    if run.settings["train_on_all"]:
        raise UserError(f"{run.folder} was trained on the validation set too: train it without --train-on-all")
    _require_plain(run)
    require_alike([*_siblings(run, results_dir), run], except_for=MAY_DIFFER_IN_CALIBRATION)
    _, val = load_cifar100(data_dir)
    assert val is not None  # unless train_on_all
    logits = finite_logits(load_model(run.weights, device), val.images, len(val.fine_names), str(run.weights))
    path, fine_labels = run.folder / "val_predictions.npz", val.fine_labels.numpy().astype(np.uint8)
    with replacing(path) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, logits=logits.numpy().astype(np.float16), fine_labels=fine_labels)
    return _copy(run.folder, ["config.json", "metrics.csv", "loss.png", path.name],
                 results_dir / PUBLISHED / CALIBRATION / run.recipe)


def read_calibration(run: FinishedRun, results_dir: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Validation logits, float16 [5000, 100], and labels, int64 [5000], to fit a temperature for `run`.

    None if its recipe is not calibrated. Raises UserError if it was calibrated with other settings.
    """
    folder = results_dir / PUBLISHED / CALIBRATION / run.recipe
    path = folder / "val_predictions.npz"
    if not path.exists():
        return None
    require_alike([run, FinishedRun(folder)], except_for=MAY_DIFFER_IN_CALIBRATION)
    logits, labels = read_arrays(path, "logits", "fine_labels")
    if labels.dtype != np.uint8 or labels.ndim != 1 or not len(labels) or labels.max() >= len(FINE_NAMES) \
            or not are_logits(logits, len(labels), len(FINE_NAMES)):
        raise UserError(f"{path} has no logits and labels of {len(FINE_NAMES)} classes: "
                        "create it again with --calibrate")
    return logits, labels.astype(np.int64)


def fitted_temperature(run: FinishedRun, results_dir: Path) -> float | None:
    """The temperature, to six decimals, that calibrates `run`'s recipe; None if the recipe is not calibrated."""
    held_out = read_calibration(run, results_dir)
    return None if held_out is None else round(fit_temperature(*held_out), 6)


def labeled_weights(run: FinishedRun, results_dir: Path) -> bytes:
    """The weights file of a published run as it should be: with its recipe's temperature and the names of the classes.

    Raises UserError or WeightsError if that cannot be determined.
    """
    return labeled(run.weights, temperature=fitted_temperature(run, results_dir), classes=FINE_NAMES)


def label_weights(results_dir: Path) -> list[str]:
    """Give each published weights file its temperature and class names; returns a line for each that has to wait."""
    problems = []
    for run in (run for run in find_runs(results_dir) if run.published and run.weights.exists()):
        try:
            content = labeled_weights(run, results_dir)
            if content != run.weights.read_bytes():
                with replacing(run.weights) as partial:
                    partial.write_bytes(content)
        except (UserError, WeightsError) as problem:
            problems.append(f"{run.weights} is unchanged: {problem}")
    return problems


def publish_overfit(name: str, results_dir: Path) -> Path:
    """Copy an overfit check such as overfit_batch/mlp to results/published/, replacing an older one.

    Raises UserError unless it was run with --overfit-batch alone, passed, and had no uncommitted changes.
    """
    source = results_dir / name
    content = read_json(source / "overfit.json")
    try:
        plain, clean = content["given"] == {}, content["git_changes"] is False
        passed = content["losses"]["cross-entropy"]["passed"] is True
    except (KeyError, TypeError):
        plain = passed = clean = False
    if not plain or not passed:
        raise UserError(f"{source} is not a plain check that passed: run it again with --overfit-batch alone")
    if not clean:
        raise UserError(f"{source} was not made from a clean commit: commit all changes and run it again")
    return _copy(source, ["overfit.json", "overfit.png", "curves.csv"], results_dir / PUBLISHED / name)


def require_alike(runs: list[FinishedRun], except_for: tuple[str, ...] = ()) -> None:
    """Raise UserError unless these runs of one recipe differ only in their seeds, machines and `except_for`."""
    first, allowed = runs[0].settings, (*MAY_DIFFER, *except_for)
    for run in runs[1:]:
        settings = run.settings
        differing = [f"{name}: {first.get(name)} and {settings.get(name)}"
                     for name in sorted((first.keys() | settings.keys()) - set(allowed))
                     if first.get(name) != settings.get(name)]
        if differing:
            raise UserError(f"{run.folder} and {runs[0].folder} have different settings ({'; '.join(differing)}): "
                            "a recipe's published runs must share them")


def _finished(name: str, results_dir: Path) -> FinishedRun:
    run = named_run(name, results_dir)
    if run.synthetic:
        raise UserError(f"{run.folder} was trained on synthetic images: it cannot be published")
    return run


def _require_plain(run: FinishedRun, *flags: str) -> None:
    """Raise UserError unless the run is its recipe with these flags alone, from a clean commit."""
    plain = r"python train_\w+\.py( --recipe \S+)?" + "".join(f" {flag}" for flag in flags)
    if not re.fullmatch(plain, run.recipe_command):
        raise UserError(f"{run.folder} was trained by `{run.recipe_command}`, not by the plain recipe {run.recipe}: "
                        "it cannot be published")
    if run.config["git_changes"] is not False:
        raise UserError(f"{run.folder} was not trained from a clean commit: commit all changes and train it again")


def _siblings(run: FinishedRun, results_dir: Path) -> list[FinishedRun]:
    """The published runs of the same recipe."""
    return [other for other in find_runs(results_dir) if other.published and other.recipe == run.recipe]


def _copy(source: Path, files: list[str], target: Path) -> Path:
    """Copy `files` from `source` to the folder `target`, replacing an older one: all of them or none.

    The folder of the dataset, which is this machine's, is left out of their settings.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for file in files:
            shutil.copyfile(source / file, partial / file)
            if file in ("config.json", "overfit.json"):
                content = read_json(source / file)
                write_json(partial / file, content | {"settings": {**content.get("settings", {}), "data_dir": ""}})
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
