"""Searching settings: the printed command is right, an interrupted search resumes, bad trials do not end it."""

import os
import re
import shlex
import signal
import sys
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import train_mlp
from common.command_line import exit_status
from common.files import lock
from tests.helpers import (
    MACHINE,
    after_step,
    drawn_once,  # noqa: F401 (a fixture)
    error_line,
    read_json,
    run_script,
)
from tools import tune
from tools.tune import Range, Search
from training import loop
from training.flags import parse_command_line

needs_optuna = pytest.mark.skipif(find_spec("optuna") is None, reason="Optuna is optional, and not installed")
STEPS_PER_TRIAL = 10
TINY = Search(
    train_mlp.SCRIPT,
    dict(epochs=1, widths=(32, 16, 16), optimizer="adamw", lr=0.002, batch_size=500, mixup=0.0, precision="float32",
         device="cpu", threads=1),
    {"lr": Range(1e-4, 0.01, log=True), "crop": Range(0, 4), "label_smoothing": Range(0.0, 0.2)})


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search whose trials take ten steps."""
    monkeypatch.setitem(tune.SEARCHES, "mlp", TINY)


def search(results_dir: Path, *flags: str) -> int:
    """The exit status of a search on synthetic images."""
    return exit_status(lambda: tune.main(["mlp", "--synthetic", "--results-dir", str(results_dir), *flags]))


def trials(results_dir: Path) -> list[Any]:
    """All trials of the search, whatever their outcome."""
    study = tune.open_study(results_dir / "tune" / "mlp-synthetic", TINY, TINY.settings(synthetic=True))
    return study.get_trials()


def states(results_dir: Path) -> list[str]:
    return [trial.state.name for trial in trials(results_dir)]


@needs_optuna
def test_the_printed_command_repeats_the_best_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert search(tmp_path, "--trials", "3") == 0
    said = capsys.readouterr().out
    best = max(trials(tmp_path), key=lambda trial: trial.value)
    assert f"best: trial {best.number} with {best.value:.2f}% on validation images" in said
    argv = shlex.split(re.search("^ +python train_mlp.py (.*)$", said, re.MULTILINE)[1])
    command = parse_command_line(train_mlp.SCRIPT, argv).settings
    wanted = tune.trial_settings(TINY.settings(synthetic=True), best.params)
    machine = {f.name: getattr(wanted, f.name) for f in fields(wanted) if f.metadata["machine"]}
    assert replace(command, **machine) == wanted
    assert run_script(tmp_path, *argv, *MACHINE, "--name", "again") == 0
    assert read_json(tmp_path / "again" / "result.json")["val_acc"] == best.value


@needs_optuna
def test_the_first_trial_is_the_recipe_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert search(tmp_path, "--trials", "2") == 0
    recipe, other = trials(tmp_path)
    assert recipe.params == {"lr": 0.002, "crop": 4, "label_smoothing": 0.1}
    assert other.params != recipe.params
    said = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("trial ") for line in said) == 2
    assert not any(line.startswith("epoch ") for line in said)
    assert any(line.endswith(f"the recipe itself: {recipe.value:.2f}%") for line in said)


@needs_optuna
def test_figures_and_importance_follow_enough_trials(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "MIN_FOR_IMPORTANCE", 3)
    folder = tmp_path / "tune" / "mlp-synthetic"
    assert search(tmp_path, "--trials", "2") == 0
    assert {path.name for path in folder.iterdir()} == {".lock", "journal.log", "history.png"}
    assert search(tmp_path, "--trials", "1") == 0
    assert {path.name for path in folder.iterdir()} == {".lock", "journal.log", "history.png", "importance.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))
    table = re.findall(r"^ +(\w+) +(\d+)%$", capsys.readouterr().out, re.MULTILINE)
    assert {name for name, _ in table} == TINY.space.keys()
    assert sum(int(share) for _, share in table) == pytest.approx(100, abs=2)


@needs_optuna
def test_a_resumed_search_equals_an_uninterrupted_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "RANDOM_FIRST", 2)  # so that later trials depend on earlier ones
    assert search(tmp_path / "whole", "--trials", "3") == 0
    after_step(monkeypatch, STEPS_PER_TRIAL + 5, lambda: os.kill(os.getpid(), signal.SIGINT))
    capsys.readouterr()
    assert search(tmp_path / "parts", "--trials", "3") == 130
    said = capsys.readouterr()
    assert "best: trial 0" in said.out
    assert not said.err
    assert states(tmp_path / "parts") == ["COMPLETE", "FAIL"]
    assert search(tmp_path / "parts", "--trials", "2") == 0
    whole, parts = ([(trial.params, trial.value) for trial in trials(tmp_path / name) if trial.value is not None]
                    for name in ("whole", "parts"))
    assert len(whole) == 3
    assert parts == whole


@needs_optuna
def test_trials_0_only_prints_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert search(tmp_path, "--trials", "0") == 0
    assert capsys.readouterr().out == "no trial has finished yet\n"
    assert search(tmp_path, "--trials", "1") == 0
    found = capsys.readouterr().out.partition("\n1 finished")[2]
    assert search(tmp_path, "--trials", "0") == 0
    assert found
    assert capsys.readouterr().out.partition("1 finished")[2] == found


@needs_optuna
@pytest.mark.parametrize(("flags", "words"), [
    (("--epochs", "2"), "started with epochs 1, not 2"), (("--seed", "1"), "started with seed 0, not 1")])
def test_a_search_is_not_resumed_with_other_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], words: str
) -> None:
    assert search(tmp_path, "--trials", "1") == 0
    assert search(tmp_path, "--trials", "1", *flags) == 2
    assert words in error_line(capsys)
    assert states(tmp_path) == ["COMPLETE"]


@needs_optuna
def test_a_synthetic_search_is_separate_from_the_real_one(tmp_path: Path) -> None:
    real = tmp_path / "tune" / "mlp"
    real.mkdir(parents=True)
    study = tune.open_study(real, TINY, TINY.settings())
    study.tell(study.ask(), 70.0)
    assert search(tmp_path, "--trials", "1") == 0
    assert [trial.value for trial in tune.open_study(real, TINY, TINY.settings()).get_trials()] == [70.0]
    assert states(tmp_path) == ["COMPLETE"]


@needs_optuna
def test_a_diverging_trial_does_not_end_the_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, seen = loop.training_step, []

    def nan_step(*arguments: Any) -> tuple[Tensor, Tensor]:
        logits, loss = step(*arguments)
        seen.append(loss)
        return logits, loss * float("nan") if len(seen) == STEPS_PER_TRIAL + 1 else loss

    monkeypatch.setattr(loop, "training_step", nan_step)
    assert search(tmp_path, "--trials", "3") == 0
    said = capsys.readouterr().out
    assert "trial 1: diverged" in said
    assert "2 finished, 0 pruned, 1 diverged" in said
    assert "is not finite" in trials(tmp_path)[1].user_attrs["diverged"]


@needs_optuna
def test_a_trial_that_falls_behind_is_pruned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "MIN_FOR_PRUNING", 1)
    hopeless = replace(TINY, space={"lr": Range(1e-9, 0.002, log=True)})
    monkeypatch.setitem(tune.SEARCHES, "mlp", hopeless)
    assert search(tmp_path, "--trials", "3", "--epochs", "3") == 0
    said = capsys.readouterr().out
    assert re.search(r"^trial 0: finished at \S+% after epoch 3,", said, re.MULTILINE)
    assert re.search(r"^trial [12]: pruned at \S+% after epoch 2,", said, re.MULTILINE)
    assert "best: trial 0" in said


@needs_optuna
def test_a_killed_search_leaves_no_running_trial(tmp_path: Path) -> None:
    base = TINY.settings(synthetic=True)
    tune.open_study(tmp_path, TINY, base).ask()
    assert [trial.state.name for trial in tune.open_study(tmp_path, TINY, base).get_trials()] == ["FAIL"]


@needs_optuna
def test_a_damaged_journal_is_reported_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tune" / "mlp-synthetic").mkdir(parents=True)
    (tmp_path / "tune" / "mlp-synthetic" / "journal.log").write_text("what\nis\nthis\n")
    assert search(tmp_path) == 2
    assert "journal.log is damaged" in error_line(capsys)


def test_two_searches_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "tune" / "mlp-synthetic"
    folder.mkdir(parents=True)
    held = lock(folder / ".lock", "in use")
    try:
        assert search(tmp_path) == 2
    finally:
        held.release()
    assert "in use by another process" in error_line(capsys)


def test_without_optuna_the_error_names_the_install_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert search(tmp_path) == 2
    assert "pip install" in error_line(capsys)


@pytest.mark.parametrize("flags", [("--trials", "-1"), ("--timeout", "0"), ("--epochs", "0"), ("--recipe", "mlp")])
def test_a_wrong_flag_is_reported_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    assert search(tmp_path, *flags) == 2
    assert flags[0] in error_line(capsys)


SPACES = dict(tune.SEARCHES)  # as they are without the fixture


@pytest.mark.parametrize("name", SPACES)
def test_every_range_holds_the_recipe_and_valid_values(name: str) -> None:
    base = SPACES[name].settings()
    for setting, values in SPACES[name].space.items():
        assert values.low <= getattr(base, setting) <= values.high
        assert type(getattr(base, setting)) is type(values.low) is type(values.high)
        for end in (values.low, values.high):
            assert getattr(tune.trial_settings(base, {setting: end}), setting) == end
