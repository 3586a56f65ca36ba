"""Training runs: cost and precision, learning, repeatability, stopping and resuming, and a run's files.

All use synthetic images and a tiny network. All but two stay in this process.
"""

import faulthandler
import itertools
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_mlp
from common.command_line import exit_status
from common.errors import UserError
from common.files import replacing, write_text
from common.run_files import METRICS
from models import create_model, load_model
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
    run_script,
    same_weights,
    train_tiny,
)
from tests.processes import finished as finished_process
from tests.processes import posix_only, read_until_epoch, started
from train_mlp import SCRIPT, MLPSettings
from training import hardware, loop, run_folder
from training.distributed import ALONE
from training.flags import parse_command_line
from training.hardware import choose_precision
from training.run_folder import RunFolder, learning_curves
from utils import compute_logits, load_cifar100

MUON = ("--optimizer", "muon", "--lr", "0.02", "--dropout", "0.2")
ADAMW = ("--optimizer", "adamw", "--dropout", "0.2")
MUON_AS_PUBLISHED = ("--optimizer", "muon", "--lr", "0.02", "--mixup", "0.8", "--crop", "4", "--side", "16",
                     "--precision", "bfloat16", "--threads", "2")
SGD_MIXUP = ("--optimizer", "sgd", "--lr", "0.05", "--mixup", "0.2", "--jitter", "0.2", "--alternate")
SGD_CUTMIX = ("--optimizer", "sgd", "--lr", "0.05", "--cutmix", "0.5", "--epochs", "4")
REFRESHED = (*ADAMW, "--average", "0.9", "--refresh-norms", "500")


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip drawing, which takes as long as the training. The run of `finished` is older and has its figure."""
    monkeypatch.setattr(run_folder, "save_figure", lambda figure, path: None)


class Stop(Exception):
    """Ends a run after the step that a test is about."""


def interrupted_after(monkeypatch: pytest.MonkeyPatch, steps: int, train: Callable[[], int]) -> int:
    """The exit status of `train` when Ctrl-C arrives during its `steps`-th step."""
    with monkeypatch.context() as patch:
        after_step(patch, steps, lambda: signal.raise_signal(signal.SIGINT))
        return train()


# ---- Cost, precision, MixUp -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(8,), (16, 8), (2048, 1024, 512)])
def test_forward_flops_are_two_per_weight_of_a_matrix(widths: tuple[int, ...]) -> None:
    sizes = (3 * 32 * 32, *widths, 100)
    model = create_model("mlp", widths=widths, dropout=0.1)
    assert loop.forward_flops(model) == 2 * sum(inputs * outputs for inputs, outputs in itertools.pairwise(sizes))
    assert model.training


def test_choosing_a_precision_leaves_the_model_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "TRIAL_SECONDS", 0.01)
    model = create_model("mlp", widths=(16,))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    split, _ = load_cifar100("", use_synthetic=True)
    chosen, reason = choose_precision(model, split, MLPSettings(device="cpu", batch_size=100), ALONE)
    assert chosen.precision in ("float32", "bfloat16")
    assert reason.startswith((f"{chosen.precision} is ", "bfloat16 is not clearly faster"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    given = MLPSettings(device="cpu", precision="bfloat16")
    assert choose_precision(model, split, given, ALONE) == (given, "")


def test_mixup_mixes_images_and_labels_alike() -> None:
    """Each image shows its label's number, so a mixed image must show the mean of the mixed labels."""
    labels = torch.arange(50)
    images = labels.float().view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    torch.manual_seed(0)
    mixed, shares = loop.make_mix(MLPSettings(mixup=0.8), num_classes=100)(images, labels, 0.9)
    assert shares.shape == (50, 100)
    torch.testing.assert_close(shares.sum(1), torch.ones(50))
    torch.testing.assert_close(mixed[:, 0, 0, 0], shares @ torch.arange(100.0))
    assert (shares.max(1).values < 1).all()
    unmixed, same_labels = loop.make_mix(MLPSettings(), num_classes=100)(images, labels, 0.0)
    assert unmixed is images and same_labels is labels


def test_cutmix_pastes_and_shares_labels_alike_in_some_of_the_first_batches() -> None:
    """Each image shows its label's number, so an image's mean must be the mean of its labels."""
    labels = torch.arange(50)
    images = labels.float().view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    mix = loop.make_mix(MLPSettings(cutmix=0.5), num_classes=100)
    torch.manual_seed(0)
    results = [mix(images, labels, step / 400) for step in range(400)]
    mixed = [pair for pair in results if pair[1] is not labels]
    for pasted, shares in mixed:
        assert set(pasted.unique().tolist()) <= set(range(50))  # pixels are copied, not averaged
        torch.testing.assert_close(pasted.mean((1, 2, 3)), shares @ torch.arange(100.0))
    assert 110 < len(mixed) < 170  # half of 280
    assert any(targets is not labels for _, targets in results[260:280])  # until 70% are over
    assert all(targets is labels and pictures is images for pictures, targets in results[280:])


@pytest.mark.parametrize("epochs", [1, 4])
def test_training_mixes_the_first_70_percent_of_its_steps(
    epochs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed: list[bool] = []

    def note(*arguments: Any) -> tuple[Tensor, Tensor]:
        mixed.append(arguments[3].ndim == 2)
        return training_step(*arguments)

    training_step = loop.training_step
    monkeypatch.setattr(loop, "training_step", note)
    assert train_tiny(tmp_path, "--epochs", str(epochs), "--cutmix", "1") == 0
    first = math.ceil(0.7 * epochs * STEPS_PER_EPOCH)
    assert len(mixed) == epochs * STEPS_PER_EPOCH
    assert all(mixed[:first]) and not any(mixed[first:])


# ---- A run and its files --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with one finished run of four epochs, mlp-s0. Tests must not change it."""
    results_dir = tmp_path_factory.mktemp("finished")
    flags = ("--epochs", "4", "--batch-size", "100", "--lr", "0.01", "--widths", "64,32")
    assert train_tiny(results_dir, *flags) == 0
    return results_dir


def test_training_learns(finished: Path) -> None:
    rows = [{name: float(value) for name, value in row.items()} for row in metrics(finished / "mlp-s0")]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] < 4.7
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]
    assert rows[-1]["val_acc"] > 5  # percent; random guessing gives 1


def test_metrics_are_means_over_all_images(tmp_path: Path) -> None:
    """With a tiny learning rate and no augmentation, they are those of the model that the run saves."""
    still = ("--lr", "1e-12", "--no-flip", "--crop", "0", "--label-smoothing", "0", "--no-batch-norm")
    assert train_tiny(tmp_path, *still, "--epochs", "1", "--batch-size", "700") == 0
    (row,) = metrics(tmp_path / "mlp-s0")
    model = load_model(tmp_path / "mlp-s0" / "model.safetensors")
    for part, split in zip(("train", "val"), load_cifar100("", use_synthetic=True), strict=True):
        logits = compute_logits(model, split.images)
        loss = F.cross_entropy(logits, split.fine_labels).item()
        accuracy = 100 * (logits.argmax(1) == split.fine_labels).float().mean().item()
        assert float(row[f"{part}_loss"]) == pytest.approx(loss, abs=1e-3)
        assert float(row[f"{part}_acc"]) == pytest.approx(accuracy, abs=0.3)  # float16 may turn a few images


def test_a_run_has_the_files_that_the_readme_names(finished: Path) -> None:
    run = finished / "mlp-s0"
    assert {path.name for path in run.iterdir()} - {".lock"} == {
        "config.json", "metrics.csv", "loss.png", "checkpoint.safetensors", "model.safetensors", "result.json"}
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    header = (run / "metrics.csv").read_text().splitlines()[0]
    assert header == "epoch,train_loss,train_acc,val_loss,val_acc,lr,seconds"
    assert [row["epoch"] for row in metrics(run)] == ["1", "2", "3", "4"]


def test_config_records_how_the_run_was_made(finished: Path) -> None:
    config = read_json(finished / "mlp-s0" / "config.json")
    assert config.keys() >= {"settings", "command", "started", "git_commit", "git_changes", "versions", "platform"}
    assert config["settings"]["synthetic"] is True
    assert config["settings"]["device"] == "cpu"  # the device used, not "auto"
    assert config["settings"]["threads"] == 1
    assert "--synthetic" in config["command"]
    again = parse_command_line(SCRIPT, shlex.split(config["command"])[2:]).settings
    assert (again.widths, again.lr, again.epochs, again.seed) == ((64, 32), 0.01, 4, 0)


def test_result_summarizes_the_run(finished: Path) -> None:
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


def test_resuming_a_finished_run_only_prints_its_result(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "mlp-s0" / "metrics.csv").stat().st_mtime_ns
    same = ("--epochs", "4", "--seed", "0", "--synthetic", "--device", "auto", "--checkpoint-every", "9")
    for flags in ((), same):
        assert resume(finished, "mlp-s0", *flags) == 0
        first, second, third = capsys.readouterr().out.splitlines()
        result = read_json(finished / "mlp-s0" / "result.json")
        assert first.startswith("mlp-s0 is finished") and f"validation accuracy {result['val_acc']:.2f}%" in first
        assert Path(second.removeprefix("learning curves: ")).samefile(finished / "mlp-s0" / "loss.png")
        assert third.startswith("train on CIFAR-100: python train_mlp.py ")
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


def test_a_run_locks_its_folder_while_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    after_step(monkeypatch, 2, lambda: seen.append(resume(tmp_path, "mlp-s0")))
    assert train_tiny(tmp_path, "--epochs", "1") == 0
    assert seen == [2]
    assert "in use" in error_line(capsys)
    assert resume(tmp_path, "mlp-s0") == 0


def test_a_new_run_never_overwrites_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = MLPSettings(recipe="mlp")
    for name, expected in ((None, "mlp-s0"), (None, "mlp-s0-2"), (None, "mlp-s0-3"), ("mine", "mine")):
        with RunFolder.create(tmp_path, settings, name, SCRIPT, processes=1) as run:
            assert run.folder == tmp_path / expected
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


def test_a_run_on_all_images_has_no_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_tiny(tmp_path, "--train-on-all") == 0
    assert "6,000 SYNTHETIC" in capsys.readouterr().out
    assert {(row["val_loss"], row["val_acc"]) for row in metrics(tmp_path / "mlp-s0")} == {("", "")}
    result = read_json(tmp_path / "mlp-s0" / "result.json")
    assert result["val_loss"] is result["val_acc"] is None


def test_the_plot_of_a_synthetic_run_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles = []
    monkeypatch.setattr(run_folder, "save_figure", lambda figure, path: titles.append(figure.get_suptitle()))
    assert train_tiny(tmp_path, "--epochs", "1") == 0
    assert titles
    assert all("SYNTHETIC" in title and "mlp-s0" in title for title in titles)
    row = dict.fromkeys(METRICS, 1.0)
    assert "SYNTHETIC" not in learning_curves([row], "mlp-s0", synthetic=False).get_suptitle()


def test_learning_curves_show_training_and_validation() -> None:
    rows = [{**dict.fromkeys(METRICS, float(epoch)), "epoch": epoch} for epoch in (1, 2, 3)]
    loss, accuracy = learning_curves(rows, "x").axes
    for axes in (loss, accuracy):
        assert len(axes.lines) == len(axes.get_legend().get_texts()) == 2
        assert axes.get_xlabel() == "epoch"
    assert "cross-entropy" in loss.get_ylabel()
    assert "%" in accuracy.get_ylabel()
    all_images = [{**row, "val_loss": None, "val_acc": None} for row in rows]
    assert [len(axes.lines) for axes in learning_curves(all_images, "x").axes] == [1, 1]


def test_a_failing_write_leaves_only_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(Stop), replacing(path) as partial:
        partial.write_text("half of the n")
        raise Stop
    assert path.read_text() == "old"
    assert run_names(tmp_path) == ["file.txt"]
    write_text(path, "new")
    assert path.read_text() == "new"
    assert run_names(tmp_path) == ["file.txt"]


# ---- Repeatability, stopping and resuming ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], Path]:
    """A function that returns the folder of an uninterrupted run with given flags, trained once for each."""
    results_dir, runs = tmp_path_factory.mktemp("uninterrupted"), {}

    def run(flags: tuple[str, ...]) -> Path:
        if flags not in runs:
            runs[flags] = results_dir / f"run{len(runs)}"
            assert train_tiny(results_dir, *flags, "--name", runs[flags].name) == 0
        return runs[flags]

    return run


def test_equal_seeds_give_equal_weights(tmp_path: Path, uninterrupted: Callable[[tuple[str, ...]], Path]) -> None:
    one = uninterrupted(ADAMW)
    for seed, equal in (("0", True), ("1", False)):
        assert train_tiny(tmp_path, *ADAMW, "--seed", seed) == 0
        again = tmp_path / f"mlp-s{seed}"
        assert same_weights(one, again) == (metrics(one) == metrics(again)) == equal


@pytest.mark.parametrize(("flags", "stops"), [
    (ADAMW, (4,)),  # in the middle of the first epoch
    (ADAMW, (STEPS_PER_EPOCH + 3,)),  # in the middle of the second
    (ADAMW, (STEPS_PER_EPOCH,)),  # between the two
    (ADAMW, (1, 5, STEPS_PER_EPOCH)),  # three times; each counts its steps from the last stop
    (MUON, (4,)),
    (MUON, (STEPS_PER_EPOCH + 3,)),
    (SGD_MIXUP, (STEPS_PER_EPOCH + 3,)),
    (SGD_CUTMIX, (STEPS_PER_EPOCH + 3,)),
    (REFRESHED, (2 * STEPS_PER_EPOCH,)),  # right after the last step
    (MUON_AS_PUBLISHED, (STEPS_PER_EPOCH + 3,)),
])
def test_a_resumed_run_equals_an_uninterrupted_one(
    flags: tuple[str, ...], stops: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    uninterrupted: Callable[[tuple[str, ...]], Path],
) -> None:
    for attempt, steps in enumerate(stops):
        status = interrupted_after(monkeypatch, steps, lambda attempt=attempt: (
            resume(tmp_path, "mlp-s0") if attempt else train_tiny(tmp_path, *flags)))
        assert status == 130
        assert not (tmp_path / "mlp-s0" / "result.json").exists()
    assert resume(tmp_path, "mlp-s0") == 0
    assert same_weights(tmp_path / "mlp-s0", uninterrupted(flags))
    assert metrics(tmp_path / "mlp-s0") == metrics(uninterrupted(flags))
    assert read_json(tmp_path / "mlp-s0" / "result.json")["resumed"] is True


def test_a_signal_after_the_last_step_starts_no_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def validate_and_stop(*arguments: Any) -> dict[str, float | None]:
        row = validate(*arguments)
        signal.raise_signal(signal.SIGINT)
        return row

    validate = loop.validate
    monkeypatch.setattr(loop, "validate", validate_and_stop)
    assert train_tiny(tmp_path, "--epochs", "1", "--seeds", "0,1") == 130
    assert run_names(tmp_path) == ["mlp-s0"]
    assert (tmp_path / "mlp-s0" / "result.json").exists()
    assert "finished" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("minutes", ["0", "60"])  # a checkpoint after every step, and none before the crash
def test_a_crashed_and_resumed_run_equals_a_whole_one(
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


def test_the_command_after_a_signal_resumes_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert interrupted_after(monkeypatch, 3, lambda: train_tiny(tmp_path, "--epochs", "1")) == 130
    start, command = capsys.readouterr().out.splitlines()[-1].split("; resume with: ")
    assert start == "SIGINT: checkpoint saved"
    words = shlex.split(command)
    assert words[:4] == ["python", "train_mlp.py", "--resume", "mlp-s0"]
    assert exit_status(lambda: train_mlp.main([*words[2:], "--quiet"])) == 0
    assert (tmp_path / "mlp-s0" / "result.json").exists()


def test_the_command_of_a_signal_works_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert interrupted_after(monkeypatch, 3, lambda: train_tiny(Path("some runs"), "--epochs", "1", "--train-on-all")) \
        == 130
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    words = shlex.split(capsys.readouterr().out.splitlines()[-1].split("; resume with: ")[1])
    assert words[:2] == ["python", train_mlp.__file__]
    assert exit_status(lambda: train_mlp.main([*words[2:], "--quiet"])) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1].split("test set: ")[1])
    assert Path(words[1]).exists() and Path(words[-1]) == tmp_path / "some runs"


def test_the_next_command_names_the_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = parse_command_line(SCRIPT, ["--data-dir", "my data"]).settings
    with RunFolder.create(tmp_path, settings, None, SCRIPT, processes=1) as run:
        run.finish(create_model("mlp", widths=(8,)), [dict.fromkeys(METRICS, 1.0)],
                   {"val_acc": 1.0, "train_seconds": 1.0, "train_flops": 1, "images_per_second": 1.0})
        run.print_result()
    words = shlex.split(capsys.readouterr().out.splitlines()[-1].split("try next: ")[1])
    assert words[words.index("--data-dir") + 1] == str(tmp_path / "my data")
    assert read_json(tmp_path / "mlp-s0" / "config.json")["settings"]["data_dir"] == str(tmp_path / "my data")


@pytest.mark.parametrize("form", ["mlp-s0", "mlp-s0/", "{runs}/mlp-s0", "{runs}/mlp-s0/", "{runs}/mlp-s0/config.json",
                                  "mlp-s0/model.safetensors", "here/mlp-s0", "here/mlp-s0/loss.png", "~/mlp-s0/"])
def test_a_run_is_named_as_a_shell_completes_it(
    form: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").symlink_to(finished)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(finished))
    results_dir = tmp_path / "none" if form.startswith(("{", "here", "~")) else finished
    assert resume(results_dir, form.format(runs=finished)) == 0
    assert capsys.readouterr().out.startswith("mlp-s0 is finished")
    assert run_names(tmp_path) == ["here"]


@pytest.mark.parametrize("name", ["published/mlp-s0", "mlp-s0", "{runs}/published/mlp-s0/config.json",
                                  "published/calibration/mlp"])
def test_a_published_run_is_not_resumed(
    name: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("mlp-s0", "calibration/mlp"):
        shutil.copytree(finished / "mlp-s0", tmp_path / "published" / folder, ignore=shutil.ignore_patterns(".lock"))
    (tmp_path / "published" / "calibration" / "mlp" / "result.json").unlink()
    assert resume(tmp_path, name.format(runs=tmp_path)) == 2
    assert "published runs do not change" in error_line(capsys)
    assert list(tmp_path.rglob(".lock")) == []


def test_a_results_folder_may_be_called_published(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "mlp-s0", tmp_path / "published" / "mlp-s0")
    assert resume(tmp_path / "published", "mlp-s0") == 0


def test_a_run_is_named_from_within_its_folder(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished / "mlp-s0")
    for name in (".", "config.json"):
        assert resume(tmp_path, name) == 0
    monkeypatch.chdir(finished)
    capsys.readouterr()
    assert resume(tmp_path, ".") == 2
    assert "config.json is missing" in error_line(capsys)


# ---- Starting from weights ------------------------------------------------------------------------------------------

SAME_NETWORK = ("--widths", "64,32", "--epochs", "1")


@pytest.fixture
def beside_finished(finished: Path, tmp_path: Path) -> Path:
    """A results folder of the test's own, with the finished run in it, which is also published."""
    (tmp_path / "results" / "published").mkdir(parents=True)
    for name in ("mlp-s0", "published/shown"):
        (tmp_path / "results" / name).symlink_to(finished / "mlp-s0")
    return tmp_path / "results"


def head(run: Path) -> Tensor:
    return load_model(run / "model.safetensors").state_dict()["head.weight"]


@pytest.mark.parametrize("form", ["mlp-s0", "{runs}/mlp-s0/", "{runs}/mlp-s0/model.safetensors", "mlp-s0/config.json",
                                  "mlp-s0/checkpoint.safetensors", "{runs}/mlp-s0/checkpoint.safetensors",
                                  "shown", "published/shown", "published/shown/metrics.csv"])
def test_a_new_run_starts_from_the_weights_of_another(form: str, finished: Path, beside_finished: Path) -> None:
    flags = ("--init-from", form.format(runs=finished), *SAME_NETWORK, "--lr", "1e-30", "--name", "new")
    assert train_tiny(beside_finished, *flags) == 0
    assert torch.equal(head(beside_finished / "new"), head(finished / "mlp-s0"))
    source = Path(read_json(beside_finished / "new" / "config.json")["settings"]["init_from"])
    assert source.is_absolute() and source.name == "model.safetensors"


def test_the_refusal_of_a_finished_run_helps(beside_finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume(beside_finished, "mlp-s0", "--epochs", "1") == 2
    advice = error_line(capsys).rpartition(", with ")[2].split()
    assert advice == ["--init-from", "mlp-s0"]
    assert train_tiny(beside_finished, *advice, *SAME_NETWORK) == 0
    assert run_names(beside_finished) == ["mlp-s0", "mlp-s0-2", "published"]
    capsys.readouterr()
    assert resume(beside_finished, "mlp-s0", "--widths", "8") == 2
    assert "--init-from" not in error_line(capsys)  # they would not fit


def test_the_refusal_of_a_run_elsewhere_helps(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished / "mlp-s0", tmp_path / "other runs" / "mlp-s0")
    edit_settings(run, train_on_all=True)
    assert resume(tmp_path / "results", str(run), "--epochs", "1") == 2
    advice = shlex.split(error_line(capsys).rpartition(", with ")[2])
    options = parse_command_line(SCRIPT, [*TINY, *advice, "--results-dir", str(tmp_path / "results")])
    assert options.settings.init_from == str(run / "model.safetensors") and options.settings.train_on_all
    assert resume(tmp_path / "results", str(run), "--no-train-on-all") == 2
    assert "--init-from" not in error_line(capsys)  # nothing could be validated


def test_weights_that_saw_the_validation_images_are_refused(finished: Path, tmp_path: Path) -> None:
    """A validation accuracy of such weights would be one on training images."""
    for name in ("all", "then", "last", "fair"):
        shutil.copytree(finished / "mlp-s0", tmp_path / name)
    edit_settings(tmp_path / "all", train_on_all=True)
    edit_settings(tmp_path / "then", init_from=str(tmp_path / "all" / "model.safetensors"))
    edit_settings(tmp_path / "last", init_from=str(tmp_path / "then" / "model.safetensors"))
    edit_settings(tmp_path / "fair", init_from=str(tmp_path / "fair" / "model.safetensors"))  # edited to go in a circle

    def start(source: str, *flags: str) -> str:
        flags = (*flags, "--results-dir", str(tmp_path), "--init-from", source)
        return parse_command_line(SCRIPT, [*TINY, *flags]).settings.init_from

    for name in ("all", "all/model.safetensors", "then", "last"):
        with pytest.raises(UserError, match="was trained on the validation images too: add --train-on-all"):
            start(name)
        assert start(name, "--train-on-all")
    assert start("fair")
    shutil.copy(tmp_path / "all" / "model.safetensors", tmp_path / "own.safetensors")  # nothing tells where it is from
    assert start("own.safetensors")


@pytest.mark.parametrize(("flags", "named"), [
    (("--init-from", "mlp-s0", "--widths", "8"), "do not fit this network"),
    (("--init-from", "unfinished"), "is that run finished?"),
    (("--init-from", "mlp-s0", "--resume", "mlp-s0"), "use one of them"),
    (("--init-from", "mlp-s0", "--overfit-batch", "--batch-size", "64"), "no effect with --overfit-batch"),
])
def test_weights_that_cannot_be_used_start_no_run(
    flags: tuple[str, ...], named: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(finished)
    (tmp_path / "unfinished").mkdir()
    overfit = [word for word in TINY if word not in ("--dropout", "0", "--mixup")]
    start = (lambda: run_script(tmp_path, *overfit[:3], *flags)) if "--overfit-batch" in flags \
        else (lambda: train_tiny(tmp_path, *flags))
    assert start() == 2
    assert named in error_line(capsys)
    assert run_names(tmp_path) == ["unfinished"]


def test_a_resumed_run_does_not_need_its_first_weights(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "first.safetensors"
    weights.write_bytes((finished / "mlp-s0" / "model.safetensors").read_bytes())
    flags = ("--init-from", str(weights), *SAME_NETWORK)
    assert train_tiny(tmp_path, *flags, "--name", "whole") == 0
    assert interrupted_after(monkeypatch, 3, lambda: train_tiny(tmp_path, *flags, "--name", "cut")) == 130

    def crash() -> None:
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        after_step(patch, 2, crash)
        train_tiny(tmp_path, *flags, "--name", "crashed")  # before its first checkpoint
    weights.rename(tmp_path / "moved")
    assert resume(tmp_path, "cut") == 0
    assert same_weights(tmp_path / "cut", tmp_path / "whole")
    capsys.readouterr()
    assert resume(tmp_path, "crashed") == 2
    assert str(weights) in error_line(capsys)
    (tmp_path / "moved").rename(weights)
    assert resume(tmp_path, "crashed") == 0
    assert same_weights(tmp_path / "crashed", tmp_path / "whole")


# ---- Signals and provenance -----------------------------------------------------------------------------------------


@posix_only
@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGTERM"])
def test_every_request_to_stop_saves_a_checkpoint(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)

    def request() -> None:
        signal.raise_signal(number)
        if name != "SIGTERM":
            signal.raise_signal(number)  # a lost terminal sends several

    with monkeypatch.context() as patch:
        after_step(patch, 3, request)
        assert train_tiny(tmp_path, "--epochs", "1") == 128 + number
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{name}: checkpoint saved; resume with: ")
    assert signal.getsignal(number) == before
    assert resume(tmp_path, "mlp-s0") == 0


@posix_only
@pytest.mark.parametrize("notice", ["SIGHUP", "SIGUSR1"])
def test_a_notice_before_a_request_to_stop_does_not_kill(
    notice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = getattr(signal, notice)
    before = signal.signal(signal.SIGTERM, lambda *arguments: pytest.fail("killed"))
    try:
        after_step(monkeypatch, 3, lambda: [signal.raise_signal(number) for number in (first, signal.SIGTERM)])
        assert train_tiny(tmp_path, "--epochs", "1") == 128 + first
    finally:
        signal.signal(signal.SIGTERM, before)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt), loop.StopRequest():  # the second demand acts at once
            for number in (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGINT):
                signal.raise_signal(number)
    finally:
        signal.signal(signal.SIGINT, before)


@posix_only
def test_an_ignored_hangup_stays_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__)  # a handler that is not Python's
    try:
        after_step(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGHUP))
        assert train_tiny(tmp_path, "--epochs", "1") == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
        faulthandler.unregister(signal.SIGUSR1)


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@example.org", *words],
                   check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_provenance_is_of_this_repository_or_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def facts() -> tuple[bool, bool | None]:
        found = run_folder.provenance()
        return found["git_commit"] is not None, found["git_changes"]

    outer = tmp_path.resolve() / "outer"
    ours = outer / "ours"
    ours.mkdir(parents=True)
    monkeypatch.setattr(run_folder, "ROOT", ours)
    for folder, file in ((outer, "notes"), (ours, ".gitignore")):
        assert facts() == (False, None)  # the second time, unpacked inside another repository
        (folder / file).write_text("results\n")
        git(folder, "init")
        git(folder, "add", file)
        git(folder, "commit", "-m", "x")
    git(ours, "config", "status.showUntrackedFiles", "no")
    monkeypatch.setenv("GIT_DIR", str(outer / ".git"))  # as in a hook
    assert facts() == (True, False)
    (ours / "results").touch()
    assert facts() == (True, False)  # ignored
    (ours / "new.py").touch()
    assert facts() == (True, True)  # untracked source
    monkeypatch.setenv("PATH", str(tmp_path))
    assert facts() == (False, None)  # no git


def test_a_checkpoint_of_another_network_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert interrupted_after(monkeypatch, 3, lambda: train_tiny(tmp_path, "--epochs", "1")) == 130
    edit_settings(tmp_path / "mlp-s0", widths=[8, 8, 8])
    capsys.readouterr()
    assert resume(tmp_path, "mlp-s0") == 2
    assert "--widths" in error_line(capsys)


@posix_only
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_a_process_with_a_checkpoint(number: signal.Signals, tmp_path: Path) -> None:
    flags = (*TINY, "--epochs", "8", "--batch-size", "1000", "--dropout", "0.2")
    with started("train_mlp.py", *flags, "--results-dir", str(tmp_path)) as process:
        read_until_epoch(process, 1)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"{number.name}: checkpoint saved; resume with: python train_mlp.py --resume mlp-s0" in output
    assert "Traceback" not in output + errors
    assert resume(tmp_path, "mlp-s0") == 0
    assert train_tiny(tmp_path, *flags, "--name", "uninterrupted") == 0
    assert same_weights(tmp_path / "mlp-s0", tmp_path / "uninterrupted")
    assert metrics(tmp_path / "mlp-s0") == metrics(tmp_path / "uninterrupted")


WITHOUT_POSIX = """
import os, signal, sys
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None  # importing it raises ImportError
for module, name in ((os, "sysconf"), (signal, "SIGPIPE")):
    if hasattr(module, name):
        delattr(module, name)
import evaluate, predict, tools.explore, tools.sanity_checks, tools.tune, train_cnn, train_mlp
from common.command_line import exit_status
sys.exit(exit_status(lambda: train_mlp.main(sys.argv[1:])))
"""


def test_training_needs_no_posix_module(tmp_path: Path) -> None:
    done = finished_process("-c", WITHOUT_POSIX, *TINY, "--epochs", "1", "--results-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "mlp-s0" / "result.json")["peak_memory_bytes"] is None


# ---- Losses that are not finite -------------------------------------------------------------------------------------


def spoil_step(monkeypatch: pytest.MonkeyPatch, number: int, weight: float, loss_factor: float) -> None:
    """Have the `number`-th training step from now set a weight to `weight` and multiply its loss."""

    def spoiled_step(model: nn.Module, *arguments: Any) -> tuple[Tensor, Tensor]:
        logits, loss = step(model, *arguments)
        if next(count) == number:
            model.head.weight.data[0, 0] = weight
            loss = loss * loss_factor
        return logits, loss

    step, count = loop.training_step, itertools.count(1)
    monkeypatch.setattr(loop, "training_step", spoiled_step)


def test_a_diverging_run_ends_in_one_error_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_tiny(tmp_path, "--optimizer", "sgd", "--lr", "1e30") == 2
    assert "--lr" in error_line(capsys)
    assert not (tmp_path / "mlp-s0" / "result.json").exists()
    assert not (tmp_path / "mlp-s0" / "model.safetensors").exists()


def test_divergence_keeps_the_checkpoint_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    uninterrupted: Callable[[tuple[str, ...]], Path],
) -> None:
    with monkeypatch.context() as patch:
        spoil_step(patch, STEPS_PER_EPOCH + 4, weight=torch.nan, loss_factor=torch.nan)
        assert train_tiny(tmp_path, *ADAMW, "--checkpoint-every", "0") == 2
    assert "epoch 2, step 4" in error_line(capsys)
    assert resume(tmp_path, "mlp-s0") == 0  # the checkpoint is from before
    assert same_weights(tmp_path / "mlp-s0", uninterrupted(ADAMW))


def test_infinite_weights_never_become_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last step can spoil the weights after its loss was computed."""
    spoil_step(monkeypatch, STEPS_PER_EPOCH, weight=torch.inf, loss_factor=1.0)
    assert train_tiny(tmp_path, "--epochs", "1") == 2
    assert "weights" in error_line(capsys)
    assert not (tmp_path / "mlp-s0" / "result.json").exists()
