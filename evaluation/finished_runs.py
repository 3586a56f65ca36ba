"""Finished runs, the test set, and the logits of a run on the test set."""

import csv
import hashlib
import re
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from common.command_line import next_command
from common.errors import UserError
from common.files import read_json, replacing, require_file
from common.run_files import METRICS, PUBLISHED, find_run, is_published, is_run
from common.text import printable
from evaluation.metrics import average, coarse_of_fine
from models import labeled, load_model
from utils import compute_logits, load_test_set

MAX_UNPACKED = 2**24  # bytes of arrays in one file: eight times the logits and hashes of 10,000 images
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # with others, Python may unpack more than it is asked for
MAX_NUMBER = 1e30  # above anything that is counted or timed
# The type that a key must have wherever it occurs in config.json or result.json; other keys may hold anything.
FIELD_TYPES: dict[str, type] = {
    **dict.fromkeys(("settings", "machine"), dict),
    **dict.fromkeys(("synthetic", "train_on_all"), bool),
    **dict.fromkeys(("recipe", "precision", "device", "command", "processor"), str),
    **dict.fromkeys(("seed", "threads", "parameters"), int),
    **dict.fromkeys(("train_seconds", "train_flops", "conv3x3_float32_gflops", "conv3x3_bfloat16_gflops"), float),
}


class TestSet:
    """The test set in the order of its images' hashes, the same for every distribution of the files.

    images: uint8 [N, 3, 32, 32], a tensor; hashes: uint64 [N], fine_labels and coarse_labels: int64 [N], arrays;
    coarse_of_fine: int64 [C], each class's superclass; places: int64 [N], each image's place in the official files;
    distinct: bool [N], False for each image whose hash is in the column `test_hash` of the CSV file `near_duplicates`;
    device: where networks compute their logits on these images.
    """

    __test__ = False  # keeps pytest from collecting it as a test

    def __init__(self, data_dir: str, *, synthetic: bool = False, near_duplicates: Path | None = None,
                 device: str = "cpu") -> None:
        self.device = device
        split = load_test_set(data_dir, use_synthetic=synthetic)
        order = torch.from_numpy(np.argsort(split.hashes, kind="stable"))
        self.places = order.numpy()
        self.hashes = split.hashes[self.places]
        self.images = split.images[order]
        self.fine_labels, self.coarse_labels = split.fine_labels[order].numpy(), split.coarse_labels[order].numpy()
        self.fine_names, self.coarse_names = split.fine_names, split.coarse_names
        self.coarse_of_fine = coarse_of_fine(self.fine_labels, self.coarse_labels, len(self.fine_names))
        listed = read_hashes(near_duplicates, "test_hash") if near_duplicates and not synthetic else ()
        self.distinct = ~np.isin(self.hashes, listed)

    def __len__(self) -> int:
        return len(self.hashes)


def read_hashes(path: Path, column: str) -> np.ndarray:
    """The hashes in a column of a list of near-duplicates, uint64 [N]; empty without a list.

    Raises UserError if the list is damaged.
    """
    if not path.exists():
        return np.array([], dtype=np.uint64)
    require_file(path)
    try:
        with open(path, newline="") as file:
            return np.array([int(row[column], 16) for row in csv.DictReader(file)], dtype=np.uint64)
    except (KeyError, TypeError, ValueError, OverflowError, csv.Error) as error:
        raise UserError(f"{path} needs a column {column} of 16 hexadecimal digits: write it again with "
                        "python -m tools.explore") from error


@dataclass(frozen=True)
class FinishedRun:
    """The folder of a finished run, read on demand. Raises UserError for a file that is missing or damaged."""

    folder: Path
    published: bool = False
    elsewhere: bool = False  # not in the results folder that is searched

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def label(self) -> str:
        """The unique name: a user's own run and a published run may have the same `name`."""
        if self.elsewhere:
            return printable(str(self.folder))
        return f"{PUBLISHED}/{self.name}" if self.published else self.name

    @cached_property
    def config(self) -> dict[str, Any]:
        return self._read("config.json", "settings", "command", "git_changes")

    @cached_property
    def result(self) -> dict[str, Any]:
        return self._read("result.json", "parameters", "train_seconds", "train_flops", "machine")

    def _read(self, file: str, *required: str) -> dict[str, Any]:
        path = self.folder / file
        content = read_json(path)
        missing = [key for key in required if not isinstance(content, dict) or key not in content]
        if missing:
            raise UserError(f"{path} lacks {', '.join(missing)}: was it written by another version?")
        record = Record(path, content)
        for key in {"settings", "machine"} & record.keys():
            record[key] = Record(path, record[key])
        return record

    @property
    def settings(self) -> dict[str, Any]:
        return self.config["settings"]

    @property
    def synthetic(self) -> bool:
        return self.settings["synthetic"]

    @property
    def recipe(self) -> str:
        if not re.fullmatch(r"\w[\w.-]*", self.settings["recipe"]):  # folders are named after it
            raise UserError(f"{self.folder / 'config.json'} has an impossible recipe: was it edited?")
        return self.settings["recipe"]

    @property
    def seed(self) -> int:
        return self.settings["seed"]

    @property
    def recipe_command(self) -> str:
        """The command of the run, without the seed."""
        return re.sub(r" --seed \d+$", "", self.config["command"])

    @property
    def weights(self) -> Path:
        return self.folder / "model.safetensors"

    def weights_digest(self) -> str:
        """The SHA-256 of the weights file as training wrote it, without a temperature and class names."""
        require_file(self.weights)
        return hashlib.sha256(labeled(self.weights)).hexdigest()

    def curves(self) -> dict[str, list[float]]:
        """The columns of `metrics.csv`, one value per epoch; NaN where there was no validation."""
        path = self.folder / "metrics.csv"
        require_file(path)
        try:
            with open(path, newline="") as file:
                rows = [{name: float(value or "nan") for name, value in row.items()} for row in csv.DictReader(file)]
            return {name: [row[name] for row in rows] for name in (*METRICS, *rows[0])}
        except (OSError, TypeError, ValueError, IndexError, KeyError, csv.Error) as error:
            raise UserError(f"{path} is missing or damaged ({error})") from error

    def logits(self, test: TestSet) -> np.ndarray:
        """The logits on `test`, float16 [N, 100]: read if they were saved for these weights, else computed and saved.

        A published run's logits are published themselves, so they are never recomputed; `check` compares them with
        the weights. Raises UserError if the saved ones are for other images or, in a published run, missing.
        """
        path = self.folder / "predictions.npz"
        if path.exists():
            logits, hashes, digest = read_predictions(path, len(test.fine_names))
            if self.published or digest == self.weights_digest():
                if not np.array_equal(hashes, test.hashes):
                    raise UserError(f"{path} has predictions for other images than this test set: delete it")
                return logits
        elif self.published:
            raise UserError(f"{path} is missing: publish this run again")
        logits = self._compute(test.images, test).astype(np.float16)
        with replacing(path) as partial, open(partial, "wb") as file:
            np.savez_compressed(file, logits=logits, hash=test.hashes, weights_sha256=np.array(self.weights_digest()))
        return logits

    def network(self, test: TestSet) -> nn.Module:
        """The trained network, where it computes. Raises UserError if its classes are not those of `test`."""
        model = load_model(self.weights, test.device)
        require_classes(model, len(test.fine_names), str(self.weights))
        return model

    def flip_averaged(self, test: TestSet) -> np.ndarray:
        """Log-probabilities, float64 [N, 100], averaged over each image and its mirror image. Needs the weights."""
        if not self.weights.exists():
            raise UserError(f"{self.folder} has no weights, which --tta needs: name another seed")
        return average([self.logits(test), self._compute(test.images.flip(3), test)])

    def _compute(self, images: Tensor, test: TestSet) -> np.ndarray:
        model = load_model(self.weights, test.device)
        return finite_logits(model, images, len(test.fine_names), str(self.weights)).numpy()


def finite_logits(model: nn.Module, images: Tensor, classes: int, name: str) -> Tensor:
    """`compute_logits`, float32 [N, classes].

    Raises UserError if the model, called `name`, has another number of classes, or logits beyond float16.
    """
    require_classes(model, classes, name)
    logits = compute_logits(model, images)
    if not logits.abs().max() < torch.finfo(torch.float16).max:
        raise UserError(f"{name} gives logits that are not finite: its weights are damaged, or its training failed")
    return logits


def require_classes(model: nn.Module, classes: int, name: str) -> None:
    """Raise UserError unless the model, called `name`, distinguishes this number of classes."""
    found = cast(dict[str, Any], model.model_args)["num_classes"]
    if found != classes:
        raise UserError(f"{name} has {found} classes instead of {classes}")


def read_predictions(path: Path, classes: int = 100) -> tuple[np.ndarray, np.ndarray, str]:
    """logits float16 [N, classes], hashes uint64 [N], and the SHA-256 of the weights they came from."""
    logits, hashes, digest = read_arrays(path, "logits", "hash", "weights_sha256")
    if hashes.ndim != 1 or not are_logits(logits, len(hashes), classes):
        raise UserError(f"{path} has no logits of {classes} classes: delete it and evaluate again")
    return logits, hashes, str(digest)


def are_logits(array: np.ndarray, images: int, classes: int) -> bool:
    """Whether an array is fit for a file of predictions: finite, float16 [images, classes]."""
    return array.dtype == np.float16 and array.shape == (images, classes) and bool(np.isfinite(array).all())


def read_arrays(path: Path, *names: str) -> list[np.ndarray]:
    """Arrays of an .npz file. Raises UserError if it is damaged, or would unpack to more than MAX_UNPACKED bytes."""
    require_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > MAX_UNPACKED \
                or any(entry.compress_type not in METHODS for entry in entries):
            raise ValueError
        with np.load(path, allow_pickle=False) as file:
            return [file[name] for name in names]
    except Exception as error:  # numpy raises nearly anything for a damaged archive
        raise UserError(f"{path} is damaged ({type(error).__name__}): delete it and create it again") from error


class Record(dict):
    """A JSON object of a run that may have been edited: its keys are checked as soon as they matter.

    Raises UserError when created, if a key of FIELD_TYPES has a value of another type; and when read, if the key is
    missing.
    """

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.path = path
        for key in self.keys() & FIELD_TYPES.keys():
            if not _has_type(FIELD_TYPES[key], self[key]):
                raise UserError(f"{path} has an impossible {key}: was it edited?")

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self.path} lacks {key}: was it written by another version?")


def _has_type(expected: type, value: Any) -> bool:
    """Whether a JSON value has this type; a number must also be of plausible size, and text printable."""
    if expected in (int, float):
        return type(value) in (int, expected) and 0 <= value < MAX_NUMBER
    return type(value) is expected and (not isinstance(value, str) or value.isprintable())


def find_runs(results_dir: Path) -> list[FinishedRun]:
    """All finished runs: the user's own that have weights, then the published ones."""
    own, published = (
        sorted(path.parent for path in folder.glob("*/result.json") if not path.parent.name.startswith("."))
        for folder in (results_dir, results_dir / PUBLISHED)
    )
    return [FinishedRun(folder) for folder in own if (folder / "model.safetensors").exists()] \
        + [FinishedRun(folder, published=True) for folder in published]


def runs_by_name(runs: list[FinishedRun]) -> dict[str, FinishedRun]:
    """Runs by their labels, and by their names; for a shared name, the user's own run."""
    return {run.name: run for run in runs if run.published} | {run.label: run for run in runs}


def named_run(name: str, results_dir: Path, *, with_weights: bool = False) -> FinishedRun:
    """The finished run `name`, as a shell completes it: a name, published/NAME, a folder, or a file in that.

    A user's own run goes before a published one of the same name. Raises UserError that says what is there instead:
    nothing, a run that is not finished, or `with_weights`, a run without them.
    """
    found = find_run(name, results_dir)
    if not is_run(found, results_dir):
        runs = [run for run in find_runs(results_dir) if run.weights.exists() or not with_weights]
        raise UserError(f"no run in {results_dir} is called {name}; there are: {_labels(runs)}")
    if not (found / "result.json").exists():
        raise UserError(not_finished(found))
    own = results_dir.resolve()
    run = FinishedRun(found, published=is_published(found, results_dir),
                      elsewhere=found.parent.resolve() not in (own, own / PUBLISHED))
    if with_weights and not run.weights.exists():
        runs = [other for other in find_runs(results_dir) if other.weights.exists()]
        raise UserError(f"the run {run.label} has no weights; there are: {_labels(runs)}")
    return run


def not_finished(folder: Path) -> str:
    """A message about a run that is not finished, with the command that resumes it."""
    command = re.match(r"(python|torchrun --nproc_per_node=\d+) train_\w+\.py", FinishedRun(folder).config["command"])
    if not command:
        return f"the run {folder} is not finished: resume it, or train it again"
    resume = next_command([*command.group().split(), "--resume", folder.name], folder.parent)
    return f"the run {folder} is not finished: unless it is still being trained, resume it with: {resume}"


def find_unfinished(results_dir: Path) -> list[Path]:
    """The folders of a user's runs that are not finished."""
    return sorted(path.parent for path in results_dir.glob("*/config.json")
                  if path.parent.name[0] != "." and not (path.parent / "result.json").exists())


def _labels(runs: list[FinishedRun]) -> str:
    return ", ".join(sorted({run.label for run in runs})) or "none"
