"""Finished runs, the test pictures, and the logits that the ones give the others."""

import csv
import hashlib
import re
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.metrics import average
from models import load_model
from runs import METRICS, PUBLISHED, read_json, replacing
from utils import UserError, compute_logits, load_test_set

MAX_UNPACKED = 2**24  # bytes of arrays in a file: eight times what 10,000 pictures' logits and names take
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # of others Python unpacks more than it is asked for
MAX_NUMBER = 1e30  # of anything that is counted or timed
# What a run's files may say under these names.
KINDS: dict[str, type] = {
    **dict.fromkeys(("settings", "machine"), dict), **dict.fromkeys(("synthetic", "train_on_all"), bool),
    **dict.fromkeys(("recipe", "precision", "device", "command", "processor"), str),
    **dict.fromkeys(("seed", "threads", "parameters"), int),
    **dict.fromkeys(("train_seconds", "train_flops", "conv3x3_float32_gflops", "conv3x3_bfloat16_gflops"), float)}


class TestPictures:
    """The test set in the order of its pictures' hashes, the same for every distribution of the files.

    images: uint8 [N, 3, 32, 32], a tensor; hashes: uint64 [N], fine_labels and coarse_labels: int64 [N], arrays;
    distinct: bool [N], which are not in the list of near-duplicates, a CSV file with their hashes as `test_hash`.
    """

    __test__ = False  # it is no test, whatever pytest makes of its name

    def __init__(self, data_dir: str, *, synthetic: bool = False, near_duplicates: Path | None = None) -> None:
        split = load_test_set(data_dir, use_synthetic=synthetic)
        order = torch.from_numpy(np.argsort(split.hashes, kind="stable"))
        self.hashes = split.hashes[order.numpy()]
        self.images = split.images[order]
        self.fine_labels, self.coarse_labels = split.fine_labels[order].numpy(), split.coarse_labels[order].numpy()
        self.fine_names, self.coarse_names = split.fine_names, split.coarse_names
        listed = _read_hashes(near_duplicates) if near_duplicates and not synthetic else ()
        self.distinct = ~np.isin(self.hashes, listed)


def _read_hashes(path: Path) -> np.ndarray:
    """The pictures that a list of near-duplicates names, uint64 [N]; none if there is no list."""
    if not path.exists():
        return np.array([], dtype=np.uint64)
    require_file(path)
    try:
        with open(path, newline="") as file:
            return np.array([int(row["test_hash"], 16) for row in csv.DictReader(file)], dtype=np.uint64)
    except (KeyError, TypeError, ValueError, OverflowError, csv.Error) as error:
        raise UserError(f"{path} has no column test_hash of 16 hexadecimal digits: make it again with "
                        "python explore.py") from error


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder, read. What is missing or damaged in it raises UserError."""

    folder: Path
    published: bool = False

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def label(self) -> str:
        """What names it and no other run: a user's own one may have a published one's name."""
        return f"{PUBLISHED}/{self.name}" if self.published else self.name

    @cached_property
    def config(self) -> dict[str, Any]:
        return self._read("config.json", "settings", "command", "git_changes")

    @cached_property
    def result(self) -> dict[str, Any]:
        return self._read("result.json", "parameters", "train_seconds", "train_flops", "machine")

    def _read(self, file: str, *needed: str) -> dict[str, Any]:
        content = read_json(self.folder / file)
        missing = [key for key in needed if not isinstance(content, dict) or key not in content]
        if missing:
            raise UserError(f"{self.folder / file} lacks {', '.join(missing)}: was it made by another version?")
        record = Record(self.folder / file, content)
        for key in {"settings", "machine"} & record.keys():
            record[key] = Record(record.path, record[key])
        return record

    @property
    def settings(self) -> dict[str, Any]:
        return self.config["settings"]

    @property
    def synthetic(self) -> bool:
        return self.settings["synthetic"]

    @property
    def recipe(self) -> str:
        if not re.fullmatch(r"\w[\w.-]*", self.settings["recipe"]):  # it names folders
            raise UserError(f"{self.folder / 'config.json'} has an impossible recipe: was it edited?")
        return self.settings["recipe"]

    @property
    def seed(self) -> int:
        return self.settings["seed"]

    @property
    def recipe_command(self) -> str:
        """The command that made it, without the seed."""
        return re.sub(r" --seed \d+$", "", self.config["command"])

    @property
    def weights(self) -> Path:
        return self.folder / "model.safetensors"

    def weights_digest(self) -> str:
        require_file(self.weights)
        return hashlib.sha256(self.weights.read_bytes()).hexdigest()

    def curves(self) -> dict[str, list[float]]:
        """The columns of `metrics.csv`, one value an epoch; NaN where there was no validation."""
        path = self.folder / "metrics.csv"
        require_file(path)
        try:
            with open(path, newline="") as file:
                rows = [{name: float(value or "nan") for name, value in row.items()} for row in csv.DictReader(file)]
            return {name: [row[name] for row in rows] for name in (*METRICS, *rows[0])}
        except (OSError, TypeError, ValueError, IndexError, KeyError, csv.Error) as error:
            raise UserError(f"{path} is missing or damaged ({error})") from error

    def logits(self, test: TestPictures) -> np.ndarray:
        """float16 [N, 100] in the order of `test`: kept ones if they are those of the weights, else computed and kept.

        Published predictions are what is published, so they are never computed anew; `check` compares them with the
        weights. Raises UserError if kept predictions are of other pictures or, in a published run, missing.
        """
        path = self.folder / "predictions.npz"
        if path.exists():
            logits, hashes, of_weights = read_predictions(path, len(test.fine_names))
            if self.published or of_weights == self.weights_digest():
                if not np.array_equal(hashes, test.hashes):
                    raise UserError(f"{path} has predictions for other pictures than this test set's: delete it")
                return logits
        elif self.published:
            raise UserError(f"{path} is missing: publish this run again")
        logits = self._compute(test.images, test).astype(np.float16)
        with replacing(path) as partial, open(partial, "wb") as file:
            np.savez_compressed(file, logits=logits, hash=test.hashes, weights_sha256=np.array(self.weights_digest()))
        return logits

    def flip_averaged(self, test: TestPictures) -> np.ndarray:
        """Log-probabilities, float64 [N, 100], averaged over each picture and its mirror image. Needs the weights."""
        if not self.weights.exists():
            raise UserError(f"{self.folder} keeps no weights to look at mirror images with: name another seed")
        return average([self.logits(test), self._compute(test.images.flip(3), test)])

    def _compute(self, images: Tensor, test: TestPictures) -> np.ndarray:
        return finite_logits(load_model(self.weights), images, len(test.fine_names), str(self.weights)).numpy()


def finite_logits(model: nn.Module, images: Tensor, classes: int, name: str) -> Tensor:
    """`compute_logits`, float32 [N, classes]. Raises UserError if the model, called `name`, has not so many classes or
    says something that float16 cannot hold.
    """
    if model.model_args["num_classes"] != classes:
        raise UserError(f"{name} does not tell {classes} classes apart but {model.model_args['num_classes']}")
    logits = compute_logits(model, images)
    if not logits.abs().max() < torch.finfo(torch.float16).max:
        raise UserError(f"{name} gives logits that are not finite: its weights are damaged, or its training failed")
    return logits


def read_predictions(path: Path, classes: int = 100) -> tuple[np.ndarray, np.ndarray, str]:
    """logits float16 [N, classes], hashes uint64 [N], and the SHA-256 of the weights they came from."""
    logits, hashes, of_weights = read_arrays(path, "logits", "hash", "weights_sha256")
    if hashes.ndim != 1 or not are_logits(logits, len(hashes), classes):
        raise UserError(f"{path} holds no logits of {classes} classes: delete it and evaluate again")
    return logits, hashes, str(of_weights)


def are_logits(array: np.ndarray, pictures: int, classes: int) -> bool:
    """Whether an array is what the files of predictions hold: finite, float16 [pictures, classes]."""
    return array.dtype == np.float16 and array.shape == (pictures, classes) and bool(np.isfinite(array).all())


def read_arrays(path: Path, *names: str) -> list[np.ndarray]:
    """Arrays of an .npz file. Raises UserError if it is damaged, or would unpack to more than MAX_UNPACKED bytes."""
    require_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
        if sum(record.file_size for record in records) > MAX_UNPACKED \
                or any(record.compress_type not in METHODS for record in records):
            raise ValueError
        with np.load(path, allow_pickle=False) as file:
            return [file[name] for name in names]
    except Exception as error:  # numpy raises nearly anything for a damaged archive
        raise UserError(f"{path} is damaged ({type(error).__name__}): delete it and make it again") from error


def require_file(path: Path) -> None:
    """Raise UserError unless it is an ordinary file: of a pipe or a device reading may never end."""
    if not path.is_file():
        raise UserError(f"{path} is {'no file' if path.exists() else 'missing'}")


class Record(dict):
    """An object in a JSON file. Raises UserError for a value that is not as KINDS say, and for a key that it lacks."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.path = path
        for key in self.keys() & KINDS.keys():
            if not _is_a(KINDS[key], self[key]):
                raise UserError(f"{path} has an impossible {key}: was it edited?")

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self.path} lacks {key}: was it made by another version?")


def _is_a(kind: type, value: Any) -> bool:
    """Whether a value from a JSON file is of this kind, printable if it is text and of a usual size if a number."""
    if kind in (int, float):
        return type(value) in (int, kind) and 0 <= value < MAX_NUMBER
    return type(value) is kind and (kind is not str or value.isprintable())


def find_runs(results_dir: Path) -> list[FinishedRun]:
    """Every finished run that has weights or, where published, predictions: a user's own, then the published ones."""
    own, published = (sorted(path for path in folder.glob("*/result.json") if not path.parent.name.startswith("."))
                      for folder in (results_dir, results_dir / PUBLISHED))
    return [FinishedRun(path.parent) for path in own if (path.parent / "model.safetensors").exists()] \
        + [FinishedRun(path.parent, published=True) for path in published]


def runs_by_name(runs: list[FinishedRun]) -> dict[str, FinishedRun]:
    """Runs by what they may be called: their labels, and a published one its name if no own run has it."""
    return {run.name: run for run in runs if run.published} | {run.label: run for run in runs}
