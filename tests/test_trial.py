"""`python -m tools.trial`: its split, its line of results, and what it refuses."""

import re
from pathlib import Path
from typing import Any

import pytest

from common.command_line import exit_status
from common.files import RESULTS_DIR
from tests.helpers import MACHINE, drawn_once, error_line  # noqa: F401 (a fixture)
from tools import trial
from training.loop import train
from utils import Split

SMALL = ("--synthetic", "--model", "original_cnn", "--optimizer", "adamw", "--lr", "0.001",
         "--batch-size", "500", "--epochs", "1", "--average", "0", *MACHINE)


def test_a_trial_measures_images_that_it_did_not_train_on_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[Any] = []

    def watched(model: Any, train_split: Split, held_out: Split, run: Any, **options: Any) -> Any:
        result = train(model, train_split, held_out, run, **options)
        trained.extend([train_split.hashes, held_out.hashes, result])
        return result

    monkeypatch.setattr(trial, "train", watched)
    monkeypatch.chdir(tmp_path)
    before = sorted(RESULTS_DIR.rglob("*"))
    assert exit_status(lambda: trial.main(list(SMALL))) == 0
    assert sorted(RESULTS_DIR.rglob("*")) == before and not list(tmp_path.iterdir())

    seen, held_out, result = trained
    assert len(seen) == 4800 and len(held_out) == 1200
    assert not set(seen) & set(held_out)
    said = capsys.readouterr().out
    assert "4,800 to train on, 1,200 held out; seed 0" in said
    measured = re.findall(r"(\d+\.\d)%", said.splitlines()[-1])
    assert measured[:2] == [f"{result['val_acc']:.1f}", f"{result['train_acc']:.1f}"] and len(measured) == 5


@pytest.mark.parametrize("flags", [
    ("--train-on-all",), ("--init-from", "w.safetensors"), ("--seeds", "0,1"), ("--name", "x"), ("--overfit-batch",),
    ("--results-dir", "x"),
])
def test_flags_that_a_trial_cannot_follow_are_refused(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("w.safetensors").touch()
    assert exit_status(lambda: trial.main(["--synthetic", *flags])) == 2
    assert "a trial has one seed" in error_line(capsys)
