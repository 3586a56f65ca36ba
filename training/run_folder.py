"""The folder that a training writes: settings, metrics, checkpoints, weights, result and learning curves.

`RunFolder` owns every path in it; each file is put in place whole or not at all.
"""

import dataclasses
import errno
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from torch import nn

from common.command_line import next_command
from common.devices import is_available
from common.errors import UserError, warn
from common.files import PARTIAL, ROOT, flush_to_disk, lock, read_json, replacing, write_csv, write_json
from common.plotting import BLUE, ORANGE, WIDTH, new_figure, only_warning, save_figure
from common.run_files import CHECKPOINTS, METRICS, RESERVED, WEIGHTS, find_run, is_published
from common.text import flops_text, short_path
from models import save_model
from training.checkpoint import Checkpoint, Optimizers, Progress, checkpoint_bytes, read_checkpoint
from training.distributed import Processes
from training.events import Events, require_tensorboard
from training.flags import Options, saw_validation_images
from training.hardware import prepare_device
from training.settings import Script, Settings, flag_of, machine_words, show

EXAMPLE = "docs/figures/drawing.png"  # an image that everybody has
PLOT_EVERY = 15.0  # seconds, since drawing a figure takes a good part of one


class Run:
    """A run as the training loop sees it. Here it keeps nothing; a `RunFolder` does."""

    def __init__(self, name: str, settings: Settings, *, resume_command: str = "", finished: bool = False) -> None:
        self.name, self.settings, self.resume_command, self.finished = name, settings, resume_command, finished

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def save_checkpoint(self, model: nn.Module, optimizers: Optimizers, progress: Progress) -> None: ...

    def load_checkpoint(self) -> Checkpoint | None:
        return None

    def log(self, rows: list[dict[str, Any]]) -> None: ...

    def finish(self, model: nn.Module, rows: list[dict[str, Any]], result: dict[str, Any]) -> None: ...

    def print_start(self, images: int, reasons: list[str]) -> None: ...

    def print_result(self) -> None: ...


class NullRun(Run):
    """A run without a folder: a training in memory, or any process of a training but the first."""


class RunFolder(Run):
    """The folder of one training, locked as long as the `with` block that uses it lasts.

    processes: the number of processes that train it, from `script`.
    """

    def __init__(self, folder: Path, settings: Settings, script: Script, processes: int) -> None:
        self._lock = lock(folder / ".lock",
                          in_use=f"the run {folder} is in use by another process; wait for it or stop it")
        self.folder, self._script, self._processes = folder, script, processes
        self._events: Events | None = None
        self.checkpoint_path, self.previous_path = (folder / file for file in CHECKPOINTS)
        self.weights_path = folder / WEIGHTS
        self.result_path = folder / "result.json"
        self._last_plot = -PLOT_EVERY
        resume_command = _resume_command(script, processes, folder)
        super().__init__(folder.name, settings, resume_command=resume_command, finished=self.result_path.exists())
        if not self.finished:  # a training that was killed while writing leaves partial files behind
            for partial in folder.glob(f".*{PARTIAL}"):
                partial.unlink()

    def __exit__(self, *exception: object) -> None:
        if self._events:
            self._events.close()
        self._lock.release()

    @classmethod
    def create(
        cls, results_dir: Path, settings: Settings, name: str | None, script: Script, processes: int
    ) -> "RunFolder":
        """A new folder, never an existing one: `name`, or <recipe>-s<seed> with -2, -3, ... appended.

        It appears with its config in it or not at all. Raises UserError if `name` is taken or is not a valid name.
        """
        base = f"{settings.recipe}-s{settings.seed}"
        counted = itertools.chain([base], (f"{base}-{count}" for count in itertools.count(2)))
        names = counted if name is None else iter([_checked_name(name)])
        config = {"settings": dataclasses.asdict(settings), "command": script.command_for(settings, processes),
                  "processes": processes, **provenance()}
        results_dir.mkdir(parents=True, exist_ok=True)
        new = results_dir / f".new.{os.getpid()}.{time.time_ns()}"
        new.mkdir()
        try:
            write_json(new / "config.json", config)
            folder = next((results_dir / free for free in names if _rename(new, results_dir / free)), None)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        if folder is None:
            raise UserError(f"the run {results_dir / str(name)} exists: choose another --name, or resume it with "
                            f"--resume {name}")
        try:
            return cls(folder, settings, script, processes)
        except UserError as error:
            if isinstance(error.__cause__, OSError):  # it cannot be locked: leave no folder behind, attempt by attempt
                shutil.rmtree(folder, ignore_errors=True)
            raise

    @classmethod
    def resume(cls, results_dir: Path, name: str, given: dict[str, Any], script: Script, processes: int) -> "RunFolder":
        """The run `name` (see `find_run`) with its settings; flags in `given` must not contradict them.

        Raises UserError if they do, if it was started with another number of processes, if that run does not exist, if
        it is published, if another process has it, or if its config is damaged.
        """
        folder = find_run(name, results_dir)
        if not os.path.isdir(folder):
            raise UserError(f"cannot resume {folder}: it is not the folder of a run")
        if is_published(folder, results_dir):
            raise UserError(f"{folder} is published, and published runs do not change: start a new run")
        name = folder.name
        config = read_json(folder / "config.json")
        if not isinstance(config, dict) or not isinstance(config.get("settings"), dict):
            raise UserError(f"{folder / 'config.json'} has no settings; was it edited?")
        before = config.get("processes", 1)
        if type(before) is not int:
            raise UserError(f"{folder / 'config.json'} has no number of processes; was it edited?")
        if before != processes:
            raise UserError(f"the run {name} was started with {before} processes, not {processes}: "
                            f"resume it with {_resume_command(script, before, folder)}")
        settings = script.settings_class.from_config(config["settings"])
        may_differ = {f.name for f in dataclasses.fields(settings) if f.metadata["resumable"]}
        for setting_name, value in given.items():
            was = getattr(settings, setting_name)
            if setting_name not in may_differ and value not in (was, "auto"):
                finished, fits = (folder / WEIGHTS).exists(), hasattr(Settings, setting_name)
                seen = saw_validation_images(folder / WEIGHTS)
                words = ["--init-from", name if folder.parent == results_dir else str(folder)]
                words += ["--train-on-all"] if seen else []
                usable = finished and fits and not (seen and setting_name == "train_on_all")
                raise UserError(f"the run {name} was started with {flag_of(setting_name)} {show(was)}, not "
                                f"{show(value)}: resume it without that flag, or start a new run"
                                + (f" from its weights, with {shlex.join(words)}" if usable else ""))
        changes = {setting_name: value for setting_name, value in given.items() if setting_name in may_differ}
        run = cls(folder, settings, script, processes)
        run._move_here(changes)
        return run

    def _move_here(self, changes: dict[str, Any]) -> None:
        """Continue on this machine, with these `changes`; warns if that affects the bits of the result."""
        before = self.settings
        device = before.device if is_available(before.device) else "auto"
        started = self.checkpoint_path.exists() or self.previous_path.exists()
        init_from = "" if started else before.init_from  # a checkpoint holds the weights: those are not needed any more
        self.settings = prepare_device(
            dataclasses.replace(before, **{"device": device, "init_from": init_from, **changes}))
        if self.settings.tensorboard and not self.finished:
            require_tensorboard()
        moved = [f"{flag_of(name)} {show(new)} instead of {show(old)}" for name in ("device", "threads", "compile")
                 if (new := getattr(self.settings, name)) != (old := getattr(before, name))]
        if moved and not self.finished:
            warn(f"{self.name} continues with {', '.join(moved)}: its result will differ in the last bits")

    def save_checkpoint(self, model: nn.Module, optimizers: Optimizers, progress: Progress) -> None:
        """Write a checkpoint and keep the one before it."""
        content = checkpoint_bytes(model, optimizers, progress, dataclasses.asdict(self.settings))
        with replacing(self.checkpoint_path) as partial:
            partial.write_bytes(content)
            flush_to_disk(partial)  # before the old ones move
            if self.checkpoint_path.exists():
                os.replace(self.checkpoint_path, self.previous_path)

    def load_checkpoint(self) -> Checkpoint | None:
        """The last checkpoint (`training.checkpoint.read_checkpoint`), on the CPU, or None before the first one.

        A damaged file is replaced by the one before it, with a warning. Raises UserError if that is damaged too, or if
        the checkpoint belongs to other settings than those of `config.json`.
        """
        found = [path for path in (self.checkpoint_path, self.previous_path) if path.exists()]
        damages = []
        for path in found:
            try:
                tensors, rest = read_checkpoint(path)
            except ValueError as damage:
                damages.append(f"{path} is damaged ({damage})")
                continue
            self._require_same_settings(path, rest["settings"])
            if path == self.previous_path:
                if damages:
                    warn(f"{damages[0]}: resuming from the checkpoint before it")
                os.replace(path, self.checkpoint_path)  # so that the next one does not push out the only good one
            return tensors, rest
        if found:
            raise UserError(f"{' and '.join(damages)}: delete {'it' if len(found) == 1 else 'both'} to start this "
                            "run from the beginning")
        return None

    def _require_same_settings(self, path: Path, saved: dict[str, Any]) -> None:
        """Raise UserError if a checkpoint's settings are not this run's."""
        current = json.loads(json.dumps(dataclasses.asdict(self.settings)))  # tuples as lists, as `saved` has them
        for f in dataclasses.fields(self.settings):
            if current[f.name] != saved.get(f.name) and not f.metadata["resumable"]:
                raise UserError(f"{path} was saved with {flag_of(f.name)} {show(saved.get(f.name))}, but config.json "
                                f"now has {show(current[f.name])}: restore it")

    def log(self, rows: list[dict[str, Any]]) -> None:
        """Write all epochs so far to `metrics.csv`, and to TensorBoard's file if wanted, and draw them."""
        write_csv(self.folder / "metrics.csv", METRICS, ([row[name] for name in METRICS] for row in rows))
        if self.settings.tensorboard:
            self._events = self._events or Events(self.folder)
            self._events.write(rows)
        if time.monotonic() - self._last_plot >= PLOT_EVERY:
            self._plot(rows)

    def _plot(self, rows: list[dict[str, Any]]) -> None:
        """Draw `loss.png`; if that fails, once."""
        self._last_plot, settings = math.inf, self.settings
        with only_warning(self.folder / "loss.png"):
            save_figure(learning_curves(rows, self.name, augmented=settings.augments, synthetic=settings.synthetic),
                        self.folder / "loss.png")
            self._last_plot = time.monotonic()

    def finish(self, model: nn.Module, rows: list[dict[str, Any]], result: dict[str, Any]) -> None:
        """Put the last figure, the weights and, as the last thing, the result in place."""
        self.log(rows)
        if self._last_plot < math.inf:
            self._plot(rows)
        with replacing(self.weights_path) as partial:
            save_model(model, partial)
        self.previous_path.unlink(missing_ok=True)
        write_json(self.result_path, result)

    def print_start(self, images: int, reasons: list[str]) -> None:
        """Say what is trained on `images` images per epoch, how, for what `reasons`, and where it is kept."""
        settings = self.settings
        print(f"{self.name}: {settings.epochs} epoch{'s' * (settings.epochs != 1)} on {images:,} {settings.dataset}, "
              f"{machine_words(settings, reasons, self._processes)}, in {self.folder}", flush=True)

    def print_result(self) -> None:
        """Say what the finished run reached, and the next command. Raises UserError if result.json is damaged."""
        result = read_json(self.result_path)
        try:
            accuracy = "no validation accuracy, since it was trained on all images" if result["val_acc"] is None \
                else f"validation accuracy {result['val_acc']:.2f}%"
            cost = (f"{result['train_seconds']:.0f} s of training, {flops_text(result['train_flops'])} FLOPs, "
                    f"{result['images_per_second']:,.0f} images/s")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.result_path} is damaged; was it edited?") from error
        figure = self.folder / "loss.png"
        shown = min(short_path(figure), str(figure), key=len)
        curves = [f"learning curves: {shown}"] if figure.exists() else []
        print("\n".join([f"{self.name} is finished: {accuracy}; {cost}", *curves, self._next_step()]), flush=True)

    def _next_step(self) -> str:
        """The thing to do after this run, with its command."""
        settings, script = self.settings, self._script
        data_dir = [] if settings.synthetic or not settings.data_dir else ["--data-dir", settings.data_dir]
        recipe = settings.recipe
        whole = script.recipe_settings(recipe).epochs if recipe in script.recipes else 0
        if settings.train_on_all:
            aim, words = "measure it on the test set", ["python", "evaluate.py", self.name, *data_dir]
        elif settings.synthetic or settings.epochs < whole:
            real = dataclasses.replace(settings, epochs=max(whole, settings.epochs), synthetic=False)
            aim = "train on CIFAR-100" if settings.synthetic else f"train for all {whole} epochs"
            words = [*shlex.split(script.command_for(real, self._processes)), *data_dir]
        elif recipe in script.next_commands:
            aim, words = "try next", [*script.next_commands[recipe].split(), *data_dir]
        else:
            aim, words = "classify an image with it", ["python", "predict.py", EXAMPLE, "--model", self.name]
        return f"{aim}: {next_command(words, self.folder.parent)}"


def _resume_command(script: Script, processes: int, folder: Path) -> str:
    return next_command([*script.launcher(processes).split(), "--resume", folder.name], folder.parent)


def create_run(script: Script, options: Options, settings: Settings, processes: Processes) -> Run:
    """A new run, the same in all processes; the first process alone has its folder."""
    run = None
    if processes.is_first:
        run = RunFolder.create(options.results_dir, settings, options.name, script, processes.count)
    return _shared(run, script, processes)


def resume_run(script: Script, options: Options, processes: Processes) -> Run:
    """The run that `--resume` names, the same in all processes; the first process alone has its folder."""
    run = None
    if processes.is_first:
        run = RunFolder.resume(options.results_dir, str(options.resume), options.given, script, processes.count)
    return _shared(run, script, processes)


def _shared(run: RunFolder | None, script: Script, processes: Processes) -> Run:
    """The first process's run, and in the others a NullRun with its name and settings."""
    facts: Any = (run.name, dataclasses.asdict(run.settings), run.resume_command, run.finished) if run else None
    name, settings, resume_command, finished = processes.from_first(facts)
    return run or NullRun(name, script.settings_class(**settings), resume_command=resume_command, finished=finished)


def _rename(new: Path, folder: Path) -> bool:
    """Rename the folder `new` to `folder` unless that exists; returns whether."""
    try:
        if not folder.exists():
            os.rename(new, folder)
            return True
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):  # created meanwhile
            raise
    return False


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) or name in RESERVED:
        raise UserError(f"{name!r} is not a run name: use letters, digits, '.', '_' and '-', "
                        f"and none of {', '.join(RESERVED)}")
    return name


def provenance() -> dict[str, Any]:
    """Everything needed to reproduce a number, except the settings."""

    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "--no-optional-locks", "-C", str(ROOT), *words], capture_output=True,
                                  text=True, timeout=10, env=environment, errors="surrogateescape")
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    own = top is not None and Path(top).resolve() == ROOT  # not a repository that this folder happens to lie in
    status = git("status", "--porcelain", "--untracked-files=normal") if own else None  # whatever git's config says
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git_commit": git("rev-parse", "HEAD") if own else None,
        "git_changes": None if status is None else bool(status),
        "versions": {"python": platform.python_version(),
                     **{package: version(package) for package in ("torch", "torchvision", "numpy")}},
        "platform": f"{platform.system()} {platform.machine()}",
    }


def learning_curves(
    rows: list[dict[str, Any]], name: str, *, augmented: bool = False, synthetic: bool = False
) -> Any:
    """Loss and accuracy over the epochs, training and validation, as a matplotlib Figure.

    Training values are means over an epoch, during which the weights change. augmented: its images were.
    """
    figure = new_figure(WIDTH, 3.6, f"{name} – CIFAR-100" if not synthetic else name, synthetic=synthetic)
    epochs = [row["epoch"] for row in rows]
    labels = {"loss": "cross-entropy (nats)", "acc": "top-1 accuracy (%)"}
    for axes, (metric, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        for part, meaning, color, style in (("train", f"training{', augmented' * augmented}", BLUE, "-"),
                                            ("val", "validation", ORANGE, "--")):
            values = [row[f"{part}_{metric}"] for row in rows]
            if values[-1] is not None:
                axes.plot(epochs, values, style, color=color, marker="." if len(rows) < 40 else "", label=meaning)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.03, 1), borderaxespad=0)  # above the lines
    return figure
