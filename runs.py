"""The folder that a training writes: settings, metrics, checkpoint, weights, result and learning curves.

`Run` owns every path and every write of it; each file is put in place whole or not at all.
"""

import csv
import dataclasses
import errno
import fcntl
import io
import itertools
import json
import os
import pickletools
import platform
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models import save_model
from settings import ROOT, Settings, flag_of, show
from utils import UserError

PUBLISHED = "published"  # the folder, below results/, of the runs that are committed
RESERVED = (PUBLISHED, "data", "data-synthetic", "overfit_batch", "sanity_checks", "tune")  # folders beside the runs
METRICS = ("epoch", "train_loss", "train_acc", "val_loss", "val_acc", "lr", "seconds")
BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito's palette, told apart by colour-blind readers too
PARTIAL = ".partial"  # ends the name of a file that is being written
WRITTEN = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2",  # all that a checkpoint's pickle names
           *(f"torch {kind}Storage" for kind in ("Float", "Double", "Long", "BFloat16", "Half"))}
MAX_JSON_BYTES = 2**24  # far more than any file of ours has
PLOT_EVERY = 15.0  # seconds: drawing a figure takes a good part of one


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to that replaces `path` when the block ends: whole or, if anything fails, not at all.

    Raises UserError if it cannot be written, with `path` as it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        try:
            yield partial
            _flush(partial)
            os.replace(partial, path)
            _flush(path.parent)  # a new name is kept by its folder
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error}): is the disk full, or the folder read-only "
                        "or gone? Nothing that was there is lost") from error


def _flush(path: Path) -> None:
    """Have a file or folder on the disk, so that it is there after a power cut too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot, and say so
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises UserError if it is missing or damaged."""
    if not path.is_file():  # of a pipe or a device reading may never end
        raise UserError(f"{path} is {'no file' if path.exists() else 'missing'}")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UserError(f"{path} has more than {MAX_JSON_BYTES:,} bytes; was it edited?")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}); was it edited?") from None


class Run:
    """The folder of one training, locked as long as the `with` block that uses it lasts."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.name, self.settings = folder, folder.name, settings
        self.checkpoint_path = folder / "checkpoint.pt"
        self.previous_path = folder / "checkpoint-previous.pt"
        self.weights_path = folder / "model.safetensors"
        self.result_path = folder / "result.json"
        self._last_plot = -PLOT_EVERY
        self._lock = open(folder / ".lock", "w")  # noqa: SIM115 (held until __exit__)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise UserError(f"the run {folder} is in use by another process; wait for it or stop it") from None
        if not self.finished:  # a training that was killed while writing leaves what it had written
            for partial in folder.glob(f".*{PARTIAL}"):
                partial.unlink()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.close()

    @classmethod
    def create(
        cls, results_dir: Path, settings: Settings, name: str | None, command: str, processes: int = 1
    ) -> "Run":
        """A new folder, never one that is there already: `name`, or <recipe>-s<seed> with -2, -3, ... appended.

        It appears with its config in it or not at all. Raises UserError if `name` is taken or cannot name a folder.
        """
        base = f"{settings.recipe}-s{settings.seed}"
        counted = itertools.chain([base], (f"{base}-{count}" for count in itertools.count(2)))
        names = counted if name is None else [_checked_name(name)]
        config = {"settings": dataclasses.asdict(settings), "command": command, "processes": processes, **provenance()}
        results_dir.mkdir(parents=True, exist_ok=True)
        new = results_dir / f".new.{os.getpid()}.{time.time_ns()}"
        new.mkdir()
        try:
            write_json(new / "config.json", config)
            folder = next((results_dir / free for free in names if _renamed(new, results_dir / free)), None)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        if folder is None:
            raise UserError(f"the run {results_dir / str(name)} exists: choose another --name, or go on with "
                            f"--resume {name}")
        return cls(folder, settings)

    @classmethod
    def resume(
        cls, results_dir: Path, name: str, settings_class: type[Settings], given: dict[str, Any], processes: int = 1
    ) -> "Run":
        """The run `name` with the settings it was started with; those in `given` must not contradict them.

        Raises UserError if they do, if it was started with another number of processes, if there is no such run, if
        another process has it, or if its config is damaged.
        """
        folder = results_dir / _checked_name(name)
        if not folder.is_dir():
            raise UserError(f"there is no run {folder} to resume")
        config = read_json(folder / "config.json")
        if not isinstance(config, dict) or not isinstance(config.get("settings"), dict):
            raise UserError(f"{folder / 'config.json'} holds no settings; was it edited?")
        before = config.get("processes", 1)
        if before != processes:
            raise UserError(f"the run {name} was started with {before} processes, not {processes}: "
                            f"resume it with torchrun --nproc_per_node={before}")
        settings = settings_class.from_config(config["settings"])
        may_differ = {f.name for f in dataclasses.fields(settings) if f.metadata["resumable"]}
        for setting_name, value in given.items():
            was = getattr(settings, setting_name)
            if setting_name in may_differ:
                settings = dataclasses.replace(settings, **{setting_name: value})
            elif value != was and value != "auto" and (setting_name, value) != ("threads", 0):
                raise UserError(f"the run {name} was started with {flag_of(setting_name)} {show(was)}, "
                                f"not {show(value)}: resume it without that flag, or start a new run")
        return cls(folder, settings)

    @property
    def finished(self) -> bool:
        return self.result_path.exists()

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write what `load_checkpoint` is to give back, with the settings that it belongs to; keep the one before."""
        content = io.BytesIO()  # torch.save itself reports a full disk in many ways, some of which end the process
        torch.save({**state, "settings": dataclasses.asdict(self.settings)}, content)
        with replacing(self.checkpoint_path) as partial:
            partial.write_bytes(content.getbuffer())
            _flush(partial)  # before the old ones move
            if self.checkpoint_path.exists():
                os.replace(self.checkpoint_path, self.previous_path)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """What `save_checkpoint` was given last, on the CPU, or None before the first one.

        A damaged file is passed over, with a warning, for the one before. Raises UserError if that is damaged too, or
        if the state belongs to other settings than those of `config.json`.
        """
        found = [path for path in (self.checkpoint_path, self.previous_path) if path.exists()]
        state, damages = None, []
        for path in found:
            try:
                state = _read_checkpoint(path)
                break
            except _Damaged as damage:
                damages.append(f"{path} is damaged ({damage})")
        if state is None:
            if found:
                raise UserError(f"{' and '.join(damages)}: delete {'it' if len(found) == 1 else 'both'} to start this "
                                "run from the beginning")
            return None
        of_checkpoint = state.pop("settings")
        for f in dataclasses.fields(self.settings):
            now, then = getattr(self.settings, f.name), of_checkpoint.get(f.name)
            if now != then and not f.metadata["resumable"]:
                raise UserError(f"{path} was made with {flag_of(f.name)} {show(then)}, and config.json "
                                f"now says {show(now)}: put that back")
        if path == self.previous_path:
            if damages:
                print(f"warning: {damages[0]}: going on from the checkpoint before it", file=sys.stderr)
            os.replace(path, self.checkpoint_path)  # so that the next one does not push out the only good one
        return state

    def log(self, rows: list[dict[str, Any]]) -> None:
        """Write all epochs so far to `metrics.csv` and draw them."""
        text = io.StringIO()
        writer = csv.DictWriter(text, METRICS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.folder / "metrics.csv", text.getvalue())
        if time.monotonic() - self._last_plot >= PLOT_EVERY:
            self.plot(rows)

    def plot(self, rows: list[dict[str, Any]]) -> None:
        save_figure(learning_curves(rows, self.name, synthetic=self.settings.synthetic), self.folder / "loss.png")
        self._last_plot = time.monotonic()

    def finish(self, model: nn.Module, rows: list[dict[str, Any]], result: dict[str, Any]) -> None:
        """Put the last figure, the weights and, as the last thing, the result in place."""
        self.log(rows)
        self.plot(rows)
        with replacing(self.weights_path) as partial:
            save_model(model, partial)
        self.previous_path.unlink(missing_ok=True)
        write_json(self.result_path, result)


class _Damaged(Exception):
    """A checkpoint that cannot be read, and why."""


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """What a file of `save_checkpoint` holds. Raises _Damaged if it is none, or has changed since it was written."""
    try:
        if not path.is_file():
            raise ValueError("it is no file")
        with open(path, "rb") as file:
            if file.read(4) != b"PK\3\4":  # something before the archive, which torch.load would read instead
                raise ValueError("it was not written here")
        with zipfile.ZipFile(path) as records:  # torch.load does not look at checksums
            if any(record.compress_type != zipfile.ZIP_STORED for record in records.infolist()):
                raise ValueError("it was not written here")  # and may be far larger than it looks
            if records.testzip():
                raise ValueError("its checksums do not fit")
            (pickled,) = (name for name in records.namelist() if name.endswith("/data.pkl"))
            if not _names_in(records.read(pickled)) <= WRITTEN:
                raise ValueError("it was not written here")  # and may call what takes all memory, as bytearray
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state["settings"], dict):
            raise ValueError("it has no settings")
        if any(tensor.nbytes > tensor.untyped_storage().nbytes() for tensor in _tensors_in(state)):
            raise ValueError("it was not written here")  # and would be far larger once it is copied
        return state
    except PermissionError:
        raise
    except Exception as error:  # torch.load and zipfile raise nearly anything for a damaged file
        reason = str(error) if type(error) is ValueError else type(error).__name__
        raise _Damaged(reason) from error


def _tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """All tensors of a nest of dictionaries, lists and tuples."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (dict, list, tuple)):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors_in(branch)


def _names_in(pickled: bytes) -> set[str]:
    """The classes and functions that a pickle names, found without loading it."""
    return {argument for opcode, argument, _ in pickletools.genops(pickled) if opcode.name == "GLOBAL"}


class Unwritten:
    """What `engine.train` asks of a `Run`, for a training of which nothing is kept, or not by this process."""

    checkpoint_path = Path("the checkpoint")
    finished = False

    def __init__(self, name: str, settings: Settings) -> None:
        self.name, self.settings = name, settings

    def load_checkpoint(self) -> None:
        return None

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        pass

    def log(self, rows: list[dict[str, Any]]) -> None:
        pass

    def finish(self, model: nn.Module, rows: list[dict[str, Any]], result: dict[str, Any]) -> None:
        pass


def _renamed(new: Path, folder: Path) -> bool:
    """Give the folder `new` this name, unless it is taken; returns whether."""
    try:
        if not folder.exists():
            os.rename(new, folder)
            return True
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):  # taken since
            raise
    return False


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) or name in RESERVED:
        raise UserError(f"{name!r} cannot name a run: use letters, digits, '.', '_' and '-', "
                        f"and none of {', '.join(RESERVED)}")
    return name


def provenance() -> dict[str, Any]:
    """What has to be known beside the settings to make a number again."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain", "--untracked-files=no")
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git_commit": git("rev-parse", "HEAD"),
        "git_changes": None if status is None else bool(status),
        "versions": {"python": platform.python_version(),
                     **{package: version(package) for package in ("torch", "torchvision", "numpy")}},
        "platform": f"{platform.system()} {platform.machine()}",
    }


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def learning_curves(rows: list[dict[str, Any]], name: str, *, synthetic: bool = False):
    """Loss and accuracy over the epochs, training and validation, as a matplotlib Figure."""
    from matplotlib.figure import Figure  # here, because importing matplotlib takes a good second

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    labels = {"loss": "cross-entropy (nats)", "acc": "top-1 accuracy (%)"}
    for axes, (metric, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        for part, meaning, colour, style in (("train", "training, augmented, running mean", BLUE, "-"),
                                           ("val", "validation", ORANGE, "--")):
            values = [row[f"{part}_{metric}"] for row in rows]
            if values[-1] is not None:
                axes.plot(epochs, values, style, color=colour, marker="." if len(rows) < 40 else "", label=meaning)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.suptitle(f"{name} – SYNTHETIC PICTURES, not CIFAR-100" if synthetic else f"{name} – CIFAR-100")
    return figure


def save_figure(figure: Any, path: Path) -> None:
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=110, metadata={"Software": None})
