"""`python -m tools.trial`: its split, its line of results, and what it refuses."""

import re
from pathlib import Path

import pytest

from common.command_line import exit_status
from tests.helpers import MACHINE, drawn_once, error_line  # noqa: F401 (a fixture)
from tools import trial

SMALL = ("--synthetic", "--model", "original_cnn", "--optimizer", "adamw", "--lr", "0.001",
         "--batch-size", "500", "--epochs", "1", "--refresh-norms", "0", *MACHINE)


def test_a_trial_prints_a_row_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_status(lambda: trial.main(list(SMALL))) == 0
    said = capsys.readouterr().out
    assert "4,800 to train on, 1,200 held out; seed 0" in said
    measured = [float(value) for value in re.findall(r"(\d+\.\d)%", said.splitlines()[-1])]
    assert len(measured) == 5 and all(0 <= value <= 100 for value in measured)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [
    ("--train-on-all",), ("--seeds", "0,1"), ("--name", "x"), ("--overfit-batch",), ("--results-dir", "x"),
])
def test_flags_that_a_trial_cannot_follow_are_refused(
    flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(lambda: trial.main(["--synthetic", *flags])) == 2
    assert "a trial has one seed" in error_line(capsys)
