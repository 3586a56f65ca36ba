"""What the tests of trainings share: a tiny MLP on synthetic pictures, and ways to read what a run left behind."""

import csv
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import engine
import train_mlp
from data import synthetic
from settings import exit_status

ROOT = Path(train_mlp.__file__).resolve().parent
MACHINE = ("--precision", "float32", "--device", "cpu", "--threads", "1", "--quiet")
TINY = ("--synthetic", "--widths", "32,16,16", "--dropout", "0", "--mixup", "0", "--optimizer", "adamw",
        "--lr", "0.002", "--batch-size", "500", "--epochs", "2", *MACHINE)  # two epochs of ten steps: half a second
STEPS_PER_EPOCH = 10

_make_synthetic_once = functools.cache(synthetic.make_synthetic)


@pytest.fixture(scope="module", autouse=True)
def drawn_once() -> Iterator[None]:
    """Draw the synthetic pictures once a process instead of once a training. A module that imports this has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "make_synthetic", _make_synthetic_once)
        yield


def run_script(results_dir: Path, *flags: str) -> int:
    """The exit status of `train_mlp.py` with these flags, in this process."""
    return exit_status(lambda: train_mlp.main([*flags, "--results-dir", str(results_dir)]))


def train_tiny(results_dir: Path, *flags: str) -> int:
    """The exit status of a training with TINY; `flags` override it."""
    return run_script(results_dir, *TINY, *flags)


def resume(results_dir: Path, name: str, *flags: str) -> int:
    return run_script(results_dir, "--resume", name, "--quiet", *flags)


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that stderr must hold: an error, and no traceback."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def same_weights(a: Path, b: Path) -> bool:
    """Whether two runs ended in the same float32 weights and the same optimizer states, bit for bit, and files."""
    ends = [torch.load(run / "checkpoint.pt", weights_only=True) for run in (a, b)]
    one, other = (leaves({"model": end["model"], "optimizers": end["optimizers"]}) for end in ends)
    equal = [torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(one, other, strict=True)]
    return all(equal) and (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def leaves(tree: Any) -> list[Any]:
    """What a nest of dictionaries and lists holds, keys included, in order."""
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in (key, *leaves(value))]
    if isinstance(tree, (list, tuple)):
        return [leaf for value in tree for leaf in leaves(value)]
    return [tree]


def metrics(run: Path, *, without: tuple[str, ...] = ("seconds",)) -> list[dict[str, str]]:
    """The rows of `metrics.csv` as text, by default without what differs from one day to the next."""
    with open(run / "metrics.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name not in without} for row in csv.DictReader(file)]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def edit_settings(run: Path, **changes: Any) -> None:
    """Make a run's config.json say something else."""
    config = read_json(run / "config.json")
    config["settings"] |= changes
    (run / "config.json").write_text(json.dumps(config))


def contents(folder: Path) -> dict[Path, bytes]:
    """What every file in a folder holds, by its path in there, but for locks."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != ".lock"}


def run_names(results_dir: Path) -> list[str]:
    return sorted(path.name for path in results_dir.iterdir()) if results_dir.exists() else []


def after_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Have `act` called at the end of the `number`-th training step from now."""
    step, count = engine.training_step, itertools.count(1)

    def acting_step(*arguments: Any) -> tuple[Tensor, Tensor]:
        outcome = step(*arguments)
        if next(count) == number:
            act()
        return outcome

    monkeypatch.setattr(engine, "training_step", acting_step)
