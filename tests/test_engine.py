"""Trainings: optimizer and schedule, learning, repeatability, interruption and resumption, and a run's files.

All on synthetic pictures with a tiny network, in this process but for the tests of signals.
"""

import fcntl
import itertools
import os
import re
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import engine
import runs
import train_mlp
from hardware import choose_precision
from models import create_model, load_model
from overfit import LOSSES
from settings import exit_status, parse_command_line
from tests.helpers import (
    STEPS_PER_EPOCH,
    TINY,
    after_step,
    drawn_once,  # noqa: F401 (a fixture)
    edit_settings,
    error_line,
    metrics,
    read_json,
    resume,
    run_names,
    same_weights,
    train_tiny,
)
from tests.processes import lines_until_epoch, started
from train_mlp import MLPSettings
from utils import compute_logits, load_cifar100

MUON = ("--optimizer", "muon", "--lr", "0.02", "--dropout", "0.2")
ADAMW = ("--optimizer", "adamw", "--dropout", "0.2")
MUON_AS_PUBLISHED = ("--optimizer", "muon", "--lr", "0.02", "--mixup", "0.8", "--crop", "4", "--side", "16",
                     "--precision", "bfloat16", "--threads", "2")
SGD_MIXUP = ("--optimizer", "sgd", "--lr", "0.05", "--mixup", "0.2", "--cutout", "8")


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes as long as the training. The run of `finished`, which is made before this, has its figure."""
    monkeypatch.setattr(runs, "save_figure", lambda figure, path: None)


class Stop(Exception):
    """Ends a training after the step that a test is about."""


def interrupted_after(monkeypatch: pytest.MonkeyPatch, steps: int, train: Callable[[], int]) -> int:
    """The exit status of `train` when Ctrl-C comes during its `steps`-th step."""
    with monkeypatch.context() as patch:
        after_step(patch, steps, lambda: signal.raise_signal(signal.SIGINT))
        return train()


# ---------------------------------------------------------------------------------------------------------------------
# Cost, precision, MixUp
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(8,), (16, 8), (2048, 1024, 512)])
def test_forward_flops_are_two_a_weight_of_a_matrix(widths: tuple[int, ...]) -> None:
    sizes = (3 * 32 * 32, *widths, 100)
    expected = 2 * sum(inputs * outputs for inputs, outputs in itertools.pairwise(sizes))
    model = create_model("mlp", widths=widths, dropout=0.1)
    assert engine.forward_flops(model) == expected
    assert model.training


def test_choose_precision_measures_and_leaves_the_model_alone() -> None:
    model = create_model("mlp", widths=(16,))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    split, _ = load_cifar100("", use_synthetic=True)
    chosen = choose_precision(model, split, MLPSettings(device="cpu", batch_size=100))
    assert chosen.precision in ("float32", "bfloat16")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert choose_precision(model, split, MLPSettings(device="cpu", precision="bfloat16")).precision == "bfloat16"


def test_mixup_mixes_pictures_and_labels_alike() -> None:
    """Pictures that show their label's number: the mixed picture must show the mean of the mixed labels."""
    labels = torch.arange(50)
    images = labels.float().view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    torch.manual_seed(0)
    mixed, shares = engine.make_mixup(0.8, num_classes=100)(images, labels)
    assert shares.shape == (50, 100)
    torch.testing.assert_close(shares.sum(1), torch.ones(50))
    torch.testing.assert_close(mixed[:, 0, 0, 0], shares @ torch.arange(100.0))
    assert (shares.max(1).values < 1).all()


def test_no_mixup_changes_nothing() -> None:
    images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    same_images, same_labels = engine.make_mixup(0.0, num_classes=100)(images, labels)
    assert same_images is images and same_labels is labels


# ---------------------------------------------------------------------------------------------------------------------
# A training and its files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs, with one of four epochs in it, mlp-s0, that must stay as it is."""
    results_dir = tmp_path_factory.mktemp("finished")
    assert train_tiny(results_dir, "--epochs", "4", "--batch-size", "100", "--lr", "0.01", "--widths", "64,32") == 0
    return results_dir


def test_training_learns(finished: Path) -> None:
    rows = [{name: float(value) for name, value in row.items()} for row in metrics(finished / "mlp-s0")]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] < 4.7
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]
    assert rows[-1]["val_acc"] > 5  # percent; guessing gives 1


def test_metrics_are_means_over_all_pictures(tmp_path: Path) -> None:
    """Where nothing moves and nothing is augmented, they are those of the model that comes out."""
    still = ("--lr", "1e-12", "--no-flip", "--crop", "0", "--label-smoothing", "0", "--no-batch-norm")
    assert train_tiny(tmp_path, *still, "--epochs", "1", "--batch-size", "700") == 0
    (row,) = metrics(tmp_path / "mlp-s0")
    model = load_model(tmp_path / "mlp-s0" / "model.safetensors")
    for part, split in zip(("train", "val"), load_cifar100("", use_synthetic=True), strict=True):
        logits = compute_logits(model, split.images)
        accuracy = 100 * (logits.argmax(1) == split.fine_labels).float().mean().item()
        assert float(row[f"{part}_loss"]) == pytest.approx(F.cross_entropy(logits, split.fine_labels).item(), abs=1e-3)
        assert float(row[f"{part}_acc"]) == pytest.approx(accuracy, abs=0.3)  # float16 may turn a few pictures


def test_a_run_has_the_files_that_the_readme_names(finished: Path) -> None:
    names = {path.name for path in (finished / "mlp-s0").iterdir()}
    assert (finished / "mlp-s0" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert names - {".lock"} == {"config.json", "metrics.csv", "loss.png", "checkpoint.pt", "model.safetensors",
                                 "result.json"}


def test_metrics_have_a_row_an_epoch(finished: Path) -> None:
    header = (finished / "mlp-s0" / "metrics.csv").read_text().splitlines()[0]
    assert header == "epoch,train_loss,train_acc,val_loss,val_acc,lr,seconds"
    assert [row["epoch"] for row in metrics(finished / "mlp-s0")] == ["1", "2", "3", "4"]


def test_config_says_how_the_run_was_made(finished: Path) -> None:
    config = read_json(finished / "mlp-s0" / "config.json")
    assert config.keys() >= {"settings", "command", "started", "git_commit", "git_changes", "versions", "platform"}
    assert config["settings"]["synthetic"] is True
    assert config["settings"]["device"] == "cpu"  # what was used, not what was asked for
    assert config["settings"]["threads"] == 1
    assert "--synthetic" in config["command"]
    again = parse_command_line(train_mlp.SCRIPT, LOSSES, shlex.split(config["command"])[2:]).settings
    assert (again.widths, again.lr, again.epochs, again.seed) == ((64, 32), 0.01, 4, 0)


def test_result_sums_the_run_up(finished: Path) -> None:
    result = read_json(finished / "mlp-s0" / "result.json")
    assert result.keys() >= {"train_loss", "train_acc", "val_loss", "val_acc", "epochs", "train_seconds",
                             "images_per_second", "train_flops", "parameters", "peak_memory_bytes", "resumed",
                             "machine"}
    assert float(metrics(finished / "mlp-s0")[-1]["val_acc"]) == pytest.approx(result["val_acc"])
    assert result["resumed"] is False
    assert set(result["machine"]) == {"processor", "threads", "conv3x3_float32_gflops", "conv3x3_bfloat16_gflops"}
    assert all(result["machine"].values())
    model = load_model(finished / "mlp-s0" / "model.safetensors")
    assert result["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    matrix_weights = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    assert result["train_flops"] == 3 * 2 * matrix_weights * 5000 * 4
    seconds = [float(row["seconds"]) for row in metrics(finished / "mlp-s0", without=())]
    assert result["train_seconds"] == pytest.approx(sum(seconds), abs=0.01)


def test_a_finished_run_is_not_trained_further(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "mlp-s0" / "metrics.csv").stat().st_mtime_ns
    assert resume(finished, "mlp-s0") == 0
    assert "finished already" in capsys.readouterr().out
    assert (finished / "mlp-s0" / "metrics.csv").stat().st_mtime_ns == before


@pytest.mark.parametrize(("flags", "differences"), [
    (("--epochs", "9"), ("--epochs", "4", "9")),
    (("--lr", "0.010000001"), ("--lr", "0.01", "0.010000001")),
    (("--seed", "1"), ("--seed", "0", "1")),
    (("--widths", "64,33"), ("--widths", "64,32", "64,33")),
    (("--train-on-all",), ("--train-on-all",)),
])
def test_a_run_is_not_resumed_with_other_settings(
    flags: tuple[str, ...], differences: tuple[str, ...], finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resume(finished, "mlp-s0", *flags) == 2
    line = error_line(capsys)
    assert [text for text in differences if not re.search(rf"(?<![\d.]){text}(?![\d.]*\d)", line)] == []


def test_the_same_settings_may_be_repeated_when_resuming(finished: Path) -> None:
    same = ("--epochs", "4", "--seed", "0", "--synthetic", "--device", "auto")
    assert resume(finished, "mlp-s0", *same, "--checkpoint-every", "9") == 0


def test_a_run_in_use_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(finished / "mlp-s0" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert resume(finished, "mlp-s0") == 2
        assert "in use" in error_line(capsys)
    assert resume(finished, "mlp-s0") == 0


def test_a_run_holds_its_folder_while_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    after_step(monkeypatch, 2, lambda: seen.append(resume(tmp_path, "mlp-s0")))
    assert train_tiny(tmp_path, "--epochs", "1") == 0
    assert seen == [2]
    assert "in use" in error_line(capsys)


def test_a_new_run_never_overwrites_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = MLPSettings(recipe="mlp")
    for expected in ("mlp-s0", "mlp-s0-2", "mlp-s0-3"):
        with runs.Run.create(tmp_path, settings, None, "command") as run:
            assert run.folder == tmp_path / expected
    with runs.Run.create(tmp_path, settings, "mine", "command"):
        pass
    before = (tmp_path / "mine" / "config.json").read_text()
    assert train_tiny(tmp_path, "--name", "mine") == 2
    assert "mine" in error_line(capsys)
    assert (tmp_path / "mine" / "config.json").read_text() == before
    assert run_names(tmp_path) == ["mine", "mlp-s0", "mlp-s0-2", "mlp-s0-3"]


def test_several_seeds_are_several_runs(tmp_path: Path) -> None:
    assert train_tiny(tmp_path, "--seeds", "0,1", "--epochs", "1") == 0
    assert run_names(tmp_path) == ["mlp-s0", "mlp-s1"]
    assert [read_json(tmp_path / f"mlp-s{seed}" / "config.json")["settings"]["seed"] for seed in (0, 1)] == [0, 1]
    assert not same_weights(tmp_path / "mlp-s0", tmp_path / "mlp-s1")
    assert train_tiny(tmp_path, "--seed", "1", "--epochs", "1", "--name", "alone") == 0
    assert same_weights(tmp_path / "mlp-s1", tmp_path / "alone")


def test_training_on_all_pictures_leaves_nothing_to_validate_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_tiny(tmp_path, "--train-on-all") == 0
    assert "6,000 SYNTHETIC" in capsys.readouterr().out
    assert {(row["val_loss"], row["val_acc"]) for row in metrics(tmp_path / "mlp-s0")} == {("", "")}
    result = read_json(tmp_path / "mlp-s0" / "result.json")
    assert result["val_loss"] is result["val_acc"] is None


def test_pictures_that_are_not_cifar100_are_named_in_the_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles = []
    monkeypatch.setattr(runs, "save_figure", lambda figure, path: titles.append(figure.get_suptitle()))
    assert train_tiny(tmp_path, "--epochs", "1") == 0
    assert titles
    assert all("SYNTHETIC" in title and "mlp-s0" in title for title in titles)
    row = dict.fromkeys(runs.METRICS, 1.0)
    assert "SYNTHETIC" not in runs.learning_curves([row], "mlp-s0", synthetic=False).get_suptitle()


def test_learning_curves_show_training_and_validation_with_axes_named() -> None:
    rows = [{**dict.fromkeys(runs.METRICS, float(epoch)), "epoch": epoch} for epoch in (1, 2, 3)]
    loss, accuracy = runs.learning_curves(rows, "x").axes
    for axes in (loss, accuracy):
        assert len(axes.lines) == len(axes.get_legend().get_texts()) == 2
        assert axes.get_xlabel() == "epoch"
    assert "cross-entropy" in loss.get_ylabel()
    assert "%" in accuracy.get_ylabel()
    all_pictures = [{**row, "val_loss": None, "val_acc": None} for row in rows]
    assert [len(axes.lines) for axes in runs.learning_curves(all_pictures, "x").axes] == [1, 1]


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(Stop), runs.replacing(path) as partial:
        partial.write_text("half of the n")
        raise Stop
    assert path.read_text() == "old"
    assert run_names(tmp_path) == ["file.txt"]
    runs.write_text(path, "new")
    assert path.read_text() == "new"
    assert run_names(tmp_path) == ["file.txt"]


# ---------------------------------------------------------------------------------------------------------------------
# The same again
# ---------------------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("one", "0"), ("same", "0"), ("other", "1")):
        assert train_tiny(tmp_path, *ADAMW, "--name", name, "--seed", seed) == 0
    assert same_weights(tmp_path / "one", tmp_path / "same")
    assert metrics(tmp_path / "one") == metrics(tmp_path / "same")
    assert not same_weights(tmp_path / "one", tmp_path / "other")
    assert metrics(tmp_path / "one") != metrics(tmp_path / "other")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[tuple[str, ...]], Path]]:
    """The folder of a run with the given flags that nothing came between; trained once for each."""
    results_dir, known = tmp_path_factory.mktemp("uninterrupted"), {}

    def run(flags: tuple[str, ...]) -> Path:
        if flags not in known:
            known[flags] = results_dir / f"run{len(known)}"
            assert train_tiny(results_dir, *flags, "--name", known[flags].name) == 0
        return known[flags]

    yield run


@pytest.mark.parametrize(("flags", "stops"), [
    (ADAMW, (4,)),  # in the middle of the first epoch
    (ADAMW, (STEPS_PER_EPOCH + 3,)),  # in the middle of the second
    (ADAMW, (STEPS_PER_EPOCH,)),  # between the two
    (ADAMW, (1, 5, STEPS_PER_EPOCH)),  # three times, steps counted from the one before
    (MUON, (4,)),
    (MUON, (STEPS_PER_EPOCH + 3,)),
    (SGD_MIXUP, (STEPS_PER_EPOCH + 3,)),
    (MUON_AS_PUBLISHED, (STEPS_PER_EPOCH + 3,)),
])
def test_an_interrupted_and_resumed_run_equals_the_uninterrupted_one(
    flags: tuple[str, ...], stops: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    uninterrupted: Callable[[tuple[str, ...]], Path],
) -> None:
    def start() -> int:
        return train_tiny(tmp_path, *flags)

    def go_on() -> int:
        return resume(tmp_path, "mlp-s0")

    for attempt, steps in enumerate(stops):
        assert interrupted_after(monkeypatch, steps, go_on if attempt else start) == 130
        assert not (tmp_path / "mlp-s0" / "result.json").exists()
    assert go_on() == 0
    assert same_weights(tmp_path / "mlp-s0", uninterrupted(flags))
    assert metrics(tmp_path / "mlp-s0") == metrics(uninterrupted(flags))
    assert read_json(tmp_path / "mlp-s0" / "result.json")["resumed"] is True


def test_a_signal_after_the_last_step_ends_the_run_whole_and_starts_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end_epoch_and_stop(*arguments: Any) -> None:
        end_epoch(*arguments)
        os.kill(os.getpid(), signal.SIGINT)

    end_epoch = engine._end_epoch
    monkeypatch.setattr(engine, "_end_epoch", end_epoch_and_stop)
    assert train_tiny(tmp_path, "--epochs", "1", "--seeds", "0,1") == 130
    assert run_names(tmp_path) == ["mlp-s0"]
    assert (tmp_path / "mlp-s0" / "result.json").exists()
    assert "finished" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("minutes", ["0", "60"])  # a checkpoint after every step, and none before the crash
def test_a_crashed_and_resumed_run_equals_the_uninterrupted_one(
    minutes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Callable[[tuple[str, ...]], Path]
) -> None:
    def crash() -> None:
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        after_step(patch, STEPS_PER_EPOCH + 5, crash)
        train_tiny(tmp_path, *ADAMW, "--checkpoint-every", minutes)
    assert resume(tmp_path, "mlp-s0") == 0
    assert same_weights(tmp_path / "mlp-s0", uninterrupted(ADAMW))
    assert metrics(tmp_path / "mlp-s0") == metrics(uninterrupted(ADAMW))


def test_the_command_that_an_interrupted_run_names_goes_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert interrupted_after(monkeypatch, 3, lambda: train_tiny(tmp_path, "--epochs", "1")) == 130
    output = capsys.readouterr().out
    words = shlex.split(re.search(r"python train_mlp\.py .*--resume.*", output).group())
    assert exit_status(lambda: train_mlp.main([*words[2:], "--quiet"])) == 0
    assert (tmp_path / "mlp-s0" / "result.json").exists()


def test_a_checkpoint_of_another_network_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert interrupted_after(monkeypatch, 3, lambda: train_tiny(tmp_path, "--epochs", "1")) == 130
    edit_settings(tmp_path / "mlp-s0", widths=[8, 8, 8])
    capsys.readouterr()
    assert resume(tmp_path, "mlp-s0") == 2
    error_line(capsys)


def test_signals_end_a_real_process_with_its_state_saved(tmp_path: Path) -> None:
    settings = ("--epochs", "8", "--batch-size", "1000", "--dropout", "0.2")
    start, go_on = (*TINY, *settings), ("--resume", "mlp-s0", "--quiet")
    for flags, epoch, number, status in ((start, 1, signal.SIGINT, 130), (go_on, 2, signal.SIGTERM, 143)):
        with started("train_mlp.py", *flags, "--results-dir", str(tmp_path)) as process:
            lines_until_epoch(process, epoch)
            process.send_signal(number)
            output, errors = process.communicate(timeout=60)
        assert process.returncode == status
        assert "train_mlp.py" in output and "--resume mlp-s0" in output
        assert "Traceback" not in output + errors
    assert resume(tmp_path, "mlp-s0") == 0
    assert train_tiny(tmp_path, *settings, "--name", "uninterrupted") == 0
    assert same_weights(tmp_path / "mlp-s0", tmp_path / "uninterrupted")
    assert metrics(tmp_path / "mlp-s0") == metrics(tmp_path / "uninterrupted")


# ---------------------------------------------------------------------------------------------------------------------
# Losses that are not finite
# ---------------------------------------------------------------------------------------------------------------------


def test_a_diverging_run_ends_in_one_error_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_tiny(tmp_path, "--optimizer", "sgd", "--lr", "1e30") == 2
    assert "--lr" in error_line(capsys)
    assert not (tmp_path / "mlp-s0" / "result.json").exists()
    assert not (tmp_path / "mlp-s0" / "model.safetensors").exists()


def test_the_checkpoint_before_a_loss_that_is_not_finite_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    uninterrupted: Callable[[tuple[str, ...]], Path],
) -> None:
    def diverging_step(model: nn.Module, *arguments: Any) -> tuple[Tensor, Tensor]:
        logits, loss = step(model, *arguments)
        if next(count) == STEPS_PER_EPOCH + 4:
            model.head.weight.data.fill_(torch.nan)
            loss = loss * torch.nan
        return logits, loss

    step, count = engine.training_step, itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "training_step", diverging_step)
        assert train_tiny(tmp_path, *ADAMW, "--checkpoint-every", "0") == 2
    assert "epoch 2, step 4" in error_line(capsys)
    assert resume(tmp_path, "mlp-s0") == 0  # the trouble was not in the checkpoint
    assert same_weights(tmp_path / "mlp-s0", uninterrupted(ADAMW))


def test_weights_that_are_not_finite_never_become_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last step can spoil the weights after its loss was computed."""

    def last_step(model: nn.Module, *arguments: Any) -> tuple[Tensor, Tensor]:
        outcome = step(model, *arguments)
        if next(count) == STEPS_PER_EPOCH:
            model.head.weight.data[0, 0] = torch.inf
        return outcome

    step, count = engine.training_step, itertools.count(1)
    monkeypatch.setattr(engine, "training_step", last_step)
    assert train_tiny(tmp_path, "--epochs", "1") == 2
    assert "weights" in error_line(capsys)
    assert not (tmp_path / "mlp-s0" / "result.json").exists()
