"""Shared by the tests of training runs: a tiny MLP on synthetic images, and ways to read a run's folder."""

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

import train_mlp
from common.command_line import exit_status
from common.files import ROOT  # noqa: F401 (imported from here by tests)
from dataset import synthetic
from training import loop
from training.checkpoint import read_checkpoint

MACHINE = ("--precision", "float32", "--device", "cpu", "--threads", "1", "--quiet")
TINY = ("--synthetic", "--widths", "32,16,16", "--dropout", "0", "--mixup", "0", "--optimizer", "adamw",
        "--lr", "0.002", "--batch-size", "500", "--epochs", "2", *MACHINE)  # two epochs of ten steps: half a second
STEPS_PER_EPOCH = 10

_make_synthetic_once = functools.cache(synthetic.make_synthetic)


@pytest.fixture(scope="module", autouse=True)
def drawn_once() -> Iterator[None]:
    """Draw the synthetic images once per process, not once per run, in every module that imports this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "make_synthetic", _make_synthetic_once)
        yield


def run_script(results_dir: Path, *flags: str) -> int:
    """Run `train_mlp.py` with these flags in this process; returns its exit status."""
    return exit_status(lambda: train_mlp.main([*flags, "--results-dir", str(results_dir)]))


def train_tiny(results_dir: Path, *flags: str) -> int:
    """Train with TINY, overridden by `flags`; returns the exit status."""
    return run_script(results_dir, *TINY, *flags)


def resume(results_dir: Path, name: str, *flags: str) -> int:
    return run_script(results_dir, "--resume", name, "--quiet", *flags)


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error on stderr, which must be a single line."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def same_weights(a: Path, b: Path) -> bool:
    """Whether two runs ended with equal float32 weights and optimizer states, bit for bit, and equal files."""
    one, other = (read_checkpoint(run / "checkpoint.safetensors")[0] for run in (a, b))
    return (
        one.keys() == other.keys()
        and all(tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items())
        and (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    )


def leaves(tree: Any) -> list[Any]:
    """The keys and values of nested dictionaries and lists, in order."""
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in (key, *leaves(value))]
    if isinstance(tree, (list, tuple)):
        return [leaf for value in tree for leaf in leaves(value)]
    return [tree]


def metrics(run: Path, *, without: tuple[str, ...] = ("seconds",)) -> list[dict[str, str]]:
    """The rows of `metrics.csv` as text; by default without the column that differs between equal runs."""
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if name not in without} for row in rows]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def edit_settings(run: Path, **changes: Any) -> None:
    """Change settings in a run's config.json."""
    config = read_json(run / "config.json")
    config["settings"] |= changes
    (run / "config.json").write_text(json.dumps(config))


def contents(folder: Path) -> dict[Path, bytes]:
    """The bytes of every file in a folder except locks, by path relative to it."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != ".lock"}


def run_names(results_dir: Path) -> list[str]:
    return sorted(path.name for path in results_dir.iterdir()) if results_dir.exists() else []


def after_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Call `act` at the end of the `number`-th training step from now."""
    step, count = loop.training_step, itertools.count(1)

    def acting_step(*arguments: Any) -> tuple[Tensor, Tensor]:
        outcome = step(*arguments)
        if next(count) == number:
            act()
        return outcome

    monkeypatch.setattr(loop, "training_step", acting_step)
