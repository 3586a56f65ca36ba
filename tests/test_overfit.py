"""The single-batch overfit check: it passes a network that can memorize, and fails if the loss is wrong."""

import csv
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import (
    drawn_once,  # noqa: F401 (a fixture)
    error_line,
    read_json,
    run_script,
)
from train_mlp import MLPSettings
from training import overfit
from training.losses import LOSSES
from training.overfit import Outcome

SMALL = ("--overfit-batch", "--synthetic", "--widths", "64,32", "--batch-size", "64", "--optimizer", "adam",
         "--lr", "1e-3", "--epochs", "120", "--device", "cpu", "--threads", "1", "--quiet")
LOWEST_OF_SOFTMAX_TWICE = math.log(1 + 99 / math.e)  # 3.62: the first softmax's outputs are between 0 and 1


def check(results_dir: Path, *flags: str) -> int:
    """Run a small check, overridden by `flags`; returns its exit status."""
    return run_script(results_dir, *SMALL, *flags)


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a check that tried all four losses and passed."""
    results_dir = tmp_path_factory.mktemp("passed")
    assert check(results_dir) == 0
    return results_dir / "overfit_batch" / "mlp"


@pytest.fixture
def no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overfit, "save_figure", lambda figure, path: None)


def curves(folder: Path) -> dict[str, list[float]]:
    with open(folder / "curves.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def test_the_check_memorizes_its_batch_and_records_it(passed: Path) -> None:
    assert {path.name for path in passed.iterdir()} == {"overfit.png", "overfit.json", "curves.csv"}
    assert (passed / "overfit.png").read_bytes().startswith(b"\x89PNG")
    numbers = read_json(passed / "overfit.json")
    assert numbers["settings"]["synthetic"] is True
    assert numbers["settings"]["widths"] == [64, 32]
    assert numbers["losses"].keys() == LOSSES.keys()
    cross_entropy = numbers["losses"]["cross-entropy"]
    assert cross_entropy["passed"] is True
    assert cross_entropy["memorized"] == cross_entropy["batch_size"] == 64
    assert cross_entropy["first"] == pytest.approx(math.log(100), abs=0.3)
    assert cross_entropy["last"] < 0.05


def test_the_curves_have_every_step_and_the_final_loss(passed: Path) -> None:
    assert curves(passed)["step"] == list(range(121))
    for name, summary in read_json(passed / "overfit.json")["losses"].items():
        assert summary["title"] == LOSSES[name].title
        curve = curves(passed)[name]
        assert (curve[0], curve[-1], min(curve)) == pytest.approx(
            (summary["first"], summary["last"], summary["lowest"]), rel=1e-4)


def test_the_four_losses_differ(passed: Path) -> None:
    last = [summary["last"] for summary in read_json(passed / "overfit.json")["losses"].values()]
    assert len({round(value, 6) for value in last}) == 4
    labels = torch.tensor([3, 50])
    outputs = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    values = {name: loss.function(outputs[:, :loss.num_outputs], labels).item() for name, loss in LOSSES.items()}
    assert values == pytest.approx({
        "cross-entropy": -outputs.log_softmax(1)[[0, 1], labels].mean().item(),
        "mse-onehot": ((outputs - torch.eye(100)[labels]) ** 2).mean().item(),
        "mse-index": ((outputs[:, 0] - labels) ** 2).mean().item(),
        "softmax-twice": -outputs.softmax(1).log_softmax(1)[[0, 1], labels].mean().item(),
    }, rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_decodes_its_own_best_outputs(name: str) -> None:
    labels = torch.tensor([0, 7, 99])
    best = labels[:, None].float() if name == "mse-index" else 1e4 * F.one_hot(labels, 100).float()
    assert torch.equal(LOSSES[name].predict(best), labels)
    assert not torch.equal(LOSSES[name].predict(best.flip(0)), labels)


def test_a_second_softmax_keeps_the_loss_above_3_62(passed: Path) -> None:
    labels = torch.tensor([3, 50])
    certain = 1e4 * F.one_hot(labels, 100).float()
    assert LOSSES["softmax-twice"].function(certain, labels).item() == pytest.approx(LOWEST_OF_SOFTMAX_TWICE, abs=1e-4)
    assert round(LOWEST_OF_SOFTMAX_TWICE, 2) == 3.62
    assert min(curves(passed)["softmax-twice"]) >= LOWEST_OF_SOFTMAX_TWICE - 1e-4
    assert min(curves(passed)["cross-entropy"]) < 0.05


@pytest.mark.usefixtures("no_figure")
def test_too_few_steps_fail_the_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path, "--epochs", "2") == 1
    assert "FAIL" in capsys.readouterr().out
    numbers = read_json(tmp_path / "overfit_batch" / "mlp" / "overfit.json")
    assert numbers["losses"]["cross-entropy"]["passed"] is False


@pytest.mark.usefixtures("no_figure")
def test_a_chosen_loss_is_compared_with_cross_entropy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path, "--loss", "mse-index") == 0  # only cross-entropy decides
    losses = read_json(tmp_path / "overfit_batch" / "mlp" / "overfit.json")["losses"]
    assert {name: loss["passed"] for name, loss in losses.items()} == {"cross-entropy": True, "mse-index": False}
    table = capsys.readouterr().out
    assert table.count("PASS") == table.count("FAIL") == 1
    assert check(tmp_path, "--loss", "cross-entropy", "--epochs", "2") == 1
    losses = read_json(tmp_path / "overfit_batch" / "mlp" / "overfit.json")["losses"]
    assert list(losses) == ["cross-entropy"]


def with_shifted_labels(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels.roll(1))


def with_the_wrong_sign(outputs: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(outputs, labels)


def with_one_label_for_all(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels[:1].expand(len(labels)))


@pytest.mark.usefixtures("no_figure")
@pytest.mark.parametrize("bug", [
    pytest.param(LOSSES["softmax-twice"].function, id="softmax twice"),
    with_shifted_labels, with_the_wrong_sign, with_one_label_for_all])
def test_a_bug_in_the_loss_fails_the_check(
    bug: Callable[[Tensor, Tensor], Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOSSES, "cross-entropy", dataclasses.replace(LOSSES["cross-entropy"], function=bug))
    assert check(tmp_path, "--loss", "cross-entropy") == 1


@pytest.mark.usefixtures("no_figure")
def test_the_same_seed_gives_the_same_curves(tmp_path: Path) -> None:
    for name in ("one", "same"):
        check(tmp_path / name, "--epochs", "5", "--seed", "3")
    check(tmp_path / "other", "--epochs", "5", "--seed", "4")
    one, same, other = (curves(tmp_path / name / "overfit_batch" / "mlp") for name in ("one", "same", "other"))
    assert one == same
    assert all(one[name] != other[name] for name in LOSSES)


@pytest.mark.usefixtures("no_figure")
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_the_check_takes_any_optimizer(optimizer: str, tmp_path: Path) -> None:
    assert check(tmp_path, "--epochs", "2", "--optimizer", optimizer) == 1


def test_a_diverging_check_fails_without_a_crash(tmp_path: Path) -> None:
    assert check(tmp_path, "--epochs", "20", "--optimizer", "sgd", "--lr", "1e30") == 1
    losses = read_json(tmp_path / "overfit_batch" / "mlp" / "overfit.json")["losses"]
    assert losses["cross-entropy"]["passed"] is False
    assert losses["cross-entropy"]["last"] is None


@pytest.mark.parametrize("flags", ["--name x", "--resume x", "--seeds 0,1", "--loss hinge", "--label-smoothing 0.1",
                                   "--crop 2", "--flip", "--mixup 0.2", "--precision bfloat16", "--compile"])
def test_flags_without_effect_on_the_check_are_refused(
    flags: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(tmp_path, *flags.split()) == 2
    assert flags.split()[0] in error_line(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", ["overfit_figure", "save_figure"])
def test_a_figure_that_fails_does_not_lose_the_check(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no\nfont")

    monkeypatch.setattr(overfit, broken, fail)
    assert check(tmp_path, "--loss", "cross-entropy") == 0
    output, errors = capsys.readouterr()
    assert "PASS" in output
    folder = tmp_path / "overfit_batch" / "mlp"
    assert errors == f"warning: {folder / 'overfit.png'} could not be drawn (no font)\n"
    assert read_json(folder / "overfit.json")["losses"]["cross-entropy"]["passed"] is True


@pytest.mark.parametrize("synthetic", [True, False])
def test_the_figure_is_labeled(synthetic: bool) -> None:
    settings = MLPSettings(synthetic=synthetic, batch_size=64)
    outcomes = {"cross-entropy": Outcome("cross-entropy", (4.6, 1.0, math.nan, 0.1), 64, 64),
                "mse-index": Outcome("MSE", (9.0, 0.0), 3, 64)}
    figure = overfit.overfit_figure(outcomes, settings)
    assert ("SYNTHETIC" in figure.get_suptitle()) == synthetic
    axes = figure.axes[0]
    assert axes.get_xlabel() and axes.get_ylabel()
    texts = [text.get_text() for text in axes.texts]
    assert any("64 of 64" in text for text in texts) and any("3 of 64" in text for text in texts)
