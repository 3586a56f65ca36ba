"""Sanity checks: a sound network passes all of them, and each planted classic bug fails the one meant for it."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_mlp
from common.command_line import exit_status
from tests.helpers import drawn_once, error_line  # noqa: F401 (a fixture)
from tools import sanity_checks
from tools.sanity_checks import CHECKS, NETWORKS, Network, Outcome, Subject
from training import loop
from utils import Augmentation, Split, augment, compute_logits, generator_for, load_cifar100, to_float

TINY = Network(train_mlp.SCRIPT, "mlp",
               dict(epochs=4, batch_size=250, widths=(256, 128), optimizer="adamw", lr=5e-3, flip=False,
                    crop=0, mixup=0.0, precision="float32"),
               smaller=dict(widths=(16, 16)))
TINY_CNN = replace(
    NETWORKS["cnn"], changes=NETWORKS["cnn"].changes | dict(
        epochs=4, batch_size=125, sides=(12,), widths=(16, 64, 256), inner=(16, 32, 128), label_smoothing=0.25, crop=0,
        precision="float32"),
    smaller=dict(widths=(4, 8, 16), inner=(4, 4, 8)))
BOTH = pytest.mark.parametrize(
    "subject", ["tiny", pytest.param("tiny-cnn", marks=pytest.mark.slow)], indirect=True)
BOTH_UNTRAINED = pytest.mark.parametrize("subject", ["tiny", "tiny-cnn"], indirect=True)


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    """Small networks that can be checked by name, on a machine that is not measured each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS, "tiny", TINY)
        patch.setitem(NETWORKS, "tiny-cnn", TINY_CNN)
        patch.setattr(loop, "machine_facts", lambda device: {})
        yield


def run(results_dir: Path, *flags: str) -> int:
    """The exit status of `python -m tools.sanity_checks` with these flags, in this process."""
    return exit_status(lambda: sanity_checks.main([*flags, "--synthetic", "--results-dir", str(results_dir)]))


@pytest.fixture
def subject(drawn_once: None, request: pytest.FixtureRequest) -> Subject:  # noqa: F811
    """The tiny MLP, and in a test marked BOTH or BOTH_UNTRAINED the tiny CNN too, before any training."""
    name = getattr(request, "param", "tiny")
    return sanity_checks.make_subject(name, 0, True, *load_cifar100("", use_synthetic=True))


def check(name: str, subject: Subject) -> Outcome:
    return sanity_checks.run_check(CHECKS[name], subject)


def with_networks(subject: Subject, change: Callable[[nn.Module], None]) -> Subject:
    """The same subject, with `change` applied to every network that it builds."""

    def build_model(settings: Any, num_outputs: int) -> nn.Module:
        model = subject.network.script.build_model(settings, num_outputs)
        change(model)
        return model

    script = replace(subject.network.script, build_model=build_model)
    return replace(subject, network=replace(subject.network, script=script))


def plant_missing_zero_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", lambda self, set_to_none=True: None)


# ---- A sound network ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", pytest.param("tiny-cnn", marks=pytest.mark.slow)])
def test_a_sound_network_passes_every_check(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--model", name) == 0
    verdicts = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("PASS", "FAIL"))]
    assert [line[6:33].rstrip() for line in verdicts] == list(CHECKS)
    assert all(line.startswith("PASS") for line in verdicts), verdicts
    assert (tmp_path / "sanity_checks" / name / "film_strip.png").read_bytes().startswith(b"\x89PNG")


def test_before_training_a_network_is_sure_of_nothing(subject: Subject) -> None:
    assert subject.trained.moments[0].softmax(1).max() < 0.2


def test_the_film_strip_shows_predictions_and_verdicts(subject: Subject) -> None:
    labels = subject.val_split.fine_labels[:sanity_checks.WATCHED]
    unsure, sure = torch.zeros(len(labels), 100), 20.0 * F.one_hot((labels + (labels == 0)) % 100, 100)
    subject.__dict__["trained"] = sanity_checks.Trained(nn.Identity(), [], [unsure, sure])
    figure = sanity_checks.film_strip(subject)
    assert "SYNTHETIC" in figure.get_suptitle()
    cells = [text.get_text() for text in figure.axes[0].texts]
    assert len(cells) == 2 * sanity_checks.SHOWN
    assert [("✓" in cell, cell.endswith("100%")) for cell in cells[1::2]] == [(False, True), *[(True, True)] * 7]
    assert all(cell.endswith("1%") for cell in cells[::2])


# ---- The classic bugs -----------------------------------------------------------------------------------------------


def test_shuffled_labels_fail_the_baseline(subject: Subject) -> None:
    labels = subject.train_split.fine_labels
    shuffled = labels[torch.randperm(len(labels), generator=generator_for("shuffled"))]
    bugged = replace(subject, train_split=replace(subject.train_split, fine_labels=shuffled))
    assert not check("input-independent baseline", bugged).passed
    assert not check("train/val gap", bugged).passed
    assert check("overfit one batch", bugged).passed  # any labels can be memorized


def test_labels_that_leak_into_images_fail_the_baseline(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = loop.batches

    def leaking(*arguments: Any, **options: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in right(*arguments, **options):
            images[torch.arange(len(labels)), 0, labels // 10 * 3, labels % 10 * 3] = 1.0  # one dot per class
            yield images, labels

    assert subject.trained  # without the leak, so that only the single image has it
    monkeypatch.setattr(loop, "batches", leaking)
    assert not check("input-independent baseline", subject).passed


def test_labels_reshuffled_in_each_batch_fail_the_overfit_check(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = loop.batches

    def shuffled(*arguments: Any, **options: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in right(*arguments, **options):
            yield images, labels[torch.randperm(len(labels))]

    monkeypatch.setattr(loop, "batches", shuffled)
    assert not check("overfit one batch", subject).passed


@BOTH
def test_a_softmax_in_the_network_fails_the_overfit_check(subject: Subject) -> None:
    def add_softmax(model: nn.Module) -> None:
        model.head = nn.Sequential(model.head, nn.Softmax(1))

    bugged = with_networks(subject, add_softmax)
    assert not check("overfit one batch", bugged).passed
    assert check("loss at initialization", bugged).passed  # which is why this bug is a classic


@BOTH
def test_a_softmax_before_the_loss_fails_the_overfit_check(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
        return F.cross_entropy(logits.softmax(1), targets, **options)

    monkeypatch.setattr(loop, "F", SimpleNamespace(cross_entropy=twice))
    assert not check("overfit one batch", subject).passed


def test_view_instead_of_permute_fails_the_gradient_check(subject: Subject) -> None:
    def with_channels_first(reorder: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], None]:
        """Let `reorder` turn images into [3, N, 32, 32], then permute them back."""
        return lambda model: setattr(
            model, "shrink", nn.Sequential(Reordered(reorder), model.shrink))

    class Reordered(nn.Module):
        def __init__(self, reorder: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.reorder = reorder

        def forward(self, images: Tensor) -> Tensor:
            return self.reorder(images).permute(1, 0, 2, 3)

    meant = with_networks(subject, with_channels_first(lambda images: images.permute(1, 0, 2, 3)))
    bugged = with_networks(subject, with_channels_first(lambda images: images.reshape(3, -1, 32, 32)))
    assert check("gradient of one example", meant).passed
    assert not check("gradient of one example", bugged).passed


def test_ignored_images_fail_the_gradient_check(subject: Subject) -> None:
    class Blind(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.zeros_like(images)

    bugged = with_networks(subject, lambda model: setattr(model, "shrink", nn.Sequential(Blind(), model.shrink)))
    assert not check("gradient of one example", bugged).passed


@BOTH
def test_a_missing_zero_grad_fails_the_check_of_gradients(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check("gradients are reset", subject).passed
    plant_missing_zero_grad(monkeypatch)
    assert not check("gradients are reset", subject).passed


@BOTH
def test_training_on_validation_images_fails_the_train_val_gap(subject: Subject) -> None:
    seen = subject.train_split[torch.arange(0, len(subject.train_split), 5)]
    bugged = replace(subject, val_split=seen)
    assert not check("train/val gap", bugged).passed
    assert check("predictions over time", bugged).passed  # which looks even better


def test_augmented_validation_images_fail_validation_by_hand(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def augmented(model: nn.Module, images: Tensor) -> Tensor:
        return compute_logits(model, augment(images, Augmentation(flip=True, crop=4), generator_for("bug")))

    monkeypatch.setattr(loop, "compute_logits", augmented)
    assert not check("validation by hand", subject).passed


@BOTH
def test_a_missing_eval_call_fails_validation_by_hand(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    @torch.inference_mode()
    def without_eval(model: nn.Module, images: Tensor) -> Tensor:
        return torch.cat([model(to_float(batch)) for batch in images.split(1000)])

    monkeypatch.setattr(loop, "compute_logits", without_eval)
    assert not check("validation by hand", subject).passed


@BOTH
def test_a_missing_train_call_fails_the_check_of_modes(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = loop.training_step

    def without_train(model: nn.Module, *arguments: Any) -> tuple[Tensor, Tensor]:
        return right(model.eval(), *arguments)

    monkeypatch.setattr(loop, "training_step", without_train)
    assert not check("batch norm's two modes", subject).passed


# ---- Other bugs -----------------------------------------------------------------------------------------------------


@BOTH_UNTRAINED
def test_a_head_that_starts_too_large_fails_the_first_loss(subject: Subject) -> None:
    def enlarge(model: nn.Module) -> None:
        model.head.weight.data.mul_(10)

    assert not check("loss at initialization", with_networks(subject, enlarge)).passed


@BOTH_UNTRAINED
def test_random_initial_biases_fail_the_first_loss(subject: Subject) -> None:
    def add_biases(model: nn.Module) -> None:
        model.head.bias = nn.Parameter(9 * torch.randn(100))

    assert check("loss at initialization", subject).passed
    assert not check("loss at initialization", with_networks(subject, add_biases)).passed


def test_unseeded_randomness_fails_same_seed_same_loss(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    right = loop.batches

    def noisy(split: Split, *arguments: Any, **options: Any) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator()
        generator.seed()
        for images, labels in right(split, *arguments, **options):
            yield images + 0.01 * torch.randn(images.shape, generator=generator), labels

    monkeypatch.setattr(loop, "batches", noisy)
    assert not check("same seed, same loss", subject).passed


def test_ignored_widths_fail_the_check_of_capacity(subject: Subject) -> None:
    script = subject.network.script
    narrow = replace(subject.settings, widths=(16, 16))
    fixed = replace(script, build_model=lambda settings, outputs: script.build_model(narrow, outputs))
    bugged = replace(subject, network=replace(subject.network, script=fixed))
    assert not check("more capacity, lower loss", bugged).passed


def test_a_missing_optimizer_step_fails_predictions_over_time(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    assert not check("predictions over time", subject).passed


# ---- The command line -----------------------------------------------------------------------------------------------


def test_one_failed_check_gives_exit_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant_missing_zero_grad(monkeypatch)
    monkeypatch.setattr(sanity_checks, "CHECKS", {name: CHECKS[name] for name in (
        "loss at initialization", "gradients are reset")})
    monkeypatch.setattr(sanity_checks, "film_strip", lambda subject: None)
    monkeypatch.setattr(sanity_checks, "save_figure", lambda figure, path: None)
    assert run(tmp_path, "--model", "tiny") == 1
    out = capsys.readouterr().out
    assert "PASS  loss at initialization" in out
    assert "FAIL  gradients are reset" in out
    assert "1 of 2 passed" in out


def test_a_diverging_training_fails_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = loop.training_step

    def diverging(*arguments: Any) -> tuple[Tensor, Tensor]:
        logits, loss = right(*arguments)
        return logits, loss * torch.inf

    monkeypatch.setattr(loop, "training_step", diverging)
    monkeypatch.setattr(sanity_checks, "CHECKS", {name: CHECKS[name] for name in ("predictions over time",)})
    assert run(tmp_path, "--model", "tiny") == 1
    assert "is not finite" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("flags", ["--model lenet", "--seed x", "--epochs 3"])
def test_a_wrong_flag_is_reported_in_one_line(flags: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, *flags.split()) == 2
    assert flags.split()[0] in error_line(capsys)
    assert not list(tmp_path.iterdir())
