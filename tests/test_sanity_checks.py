"""The sanity checks: a sound network passes all of them, and each classic bug, planted, fails the one meant for it."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import engine
import sanity_checks
import train_mlp
from sanity_checks import CHECKS, NETWORKS, Network, Outcome, Subject
from settings import exit_status
from tests.helpers import drawn_once, error_line  # noqa: F401 (a fixture)
from utils import Augmentation, Split, augment, compute_logits, derived_seed, generator_for, load_cifar100, to_float

TINY = Network(train_mlp.SCRIPT, "mlp",
               dict(epochs=4, batch_size=250, widths=(256, 128), optimizer="adamw", lr=5e-3, flip=False,
                    crop=0, mixup=0.0, precision="float32"),
               smaller=dict(widths=(16, 16)))
TINY_CONVNET = replace(
    NETWORKS["convnet"], changes=NETWORKS["convnet"].changes | dict(
        epochs=4, batch_size=125, sides=(12,), widths=(16, 64), blocks=(1, 1), crop=0, precision="float32"),
    smaller=dict(widths=(2, 4)))
BOTH = pytest.mark.parametrize("subject", ["tiny", "tiny-convnet"], indirect=True)


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    """Small networks to be checked by name, on a machine that is not measured each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS, "tiny", TINY)
        patch.setitem(NETWORKS, "tiny-convnet", TINY_CONVNET)
        patch.setattr(engine, "machine_facts", lambda device: {})
        yield


def run(results_dir: Path, *flags: str) -> int:
    """The exit status of `sanity_checks.py` with these flags, in this process."""
    return exit_status(lambda: sanity_checks.main([*flags, "--synthetic", "--results-dir", str(results_dir)]))


@pytest.fixture
def subject(drawn_once: None, request: pytest.FixtureRequest) -> Subject:  # noqa: F811
    """The tiny MLP, or in a test marked BOTH the tiny convnet as well. Nothing is trained yet."""
    name = getattr(request, "param", "tiny")
    return sanity_checks.make_subject(name, 0, True, *load_cifar100("", use_synthetic=True))


def check(name: str, subject: Subject) -> Outcome:
    return sanity_checks.run_check(CHECKS[name], subject)


def with_networks(subject: Subject, change: Callable[[nn.Module], None]) -> Subject:
    """The same subject, whose networks `change` is called with when they are built."""

    def build_model(settings: Any, num_outputs: int) -> nn.Module:
        model = subject.network.script.build_model(settings, num_outputs)
        change(model)
        return model

    script = replace(subject.network.script, build_model=build_model)
    return replace(subject, network=replace(subject.network, script=script))


def with_train_labels(subject: Subject, labels: Tensor) -> Subject:
    return replace(subject, train_split=replace(subject.train_split, fine_labels=labels))


# ---------------------------------------------------------------------------------------------------------------------
# A sound network
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", pytest.param("tiny-convnet", marks=pytest.mark.slow)])
def test_a_sound_network_passes_every_check_and_leaves_a_film_strip(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--model", name) == 0
    verdicts = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("PASS", "FAIL"))]
    assert [line[6:33].rstrip() for line in verdicts] == list(CHECKS)
    assert all(line.startswith("PASS") for line in verdicts), verdicts
    assert (tmp_path / "sanity_checks" / name / "film_strip.png").read_bytes().startswith(b"\x89PNG")


def test_the_film_strip_says_what_it_shows(subject: Subject) -> None:
    labels = subject.val_split.fine_labels[:sanity_checks.WATCHED]
    unsure, sure = torch.zeros(len(labels), 100), 20.0 * F.one_hot((labels + (labels == 0)) % 100, 100)
    subject.__dict__["trained"] = sanity_checks.Trained(nn.Identity(), [], [unsure, sure])
    figure = sanity_checks.film_strip(subject)
    assert "SYNTHETIC" in figure.get_suptitle()
    cells = [text.get_text() for text in figure.axes[0].texts]
    assert len(cells) == 2 * sanity_checks.SHOWN
    assert [("✓" in cell, cell.endswith("100%")) for cell in cells[1::2]] == [(False, True), *[(True, True)] * 7]
    assert all(cell.endswith("1%") for cell in cells[::2])


# ---------------------------------------------------------------------------------------------------------------------
# The classic bugs
# ---------------------------------------------------------------------------------------------------------------------


def test_shuffled_labels_fail_the_input_independent_baseline(subject: Subject) -> None:
    labels = subject.train_split.fine_labels
    shuffled = labels[torch.randperm(len(labels), generator=generator_for("shuffled"))]
    bugged = with_train_labels(subject, shuffled)
    assert not check("input-independent baseline", bugged).passed
    assert not check("train/val gap", bugged).passed
    assert check("overfit one batch", bugged).passed  # any labels can be learnt by heart


def test_a_label_in_the_pictures_fails_the_input_independent_baseline(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = engine.batches

    def leaking(*arguments: Any, **options: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in right(*arguments, **options):
            images[torch.arange(len(labels)), 0, labels // 10 * 3, labels % 10 * 3] = 1.0  # a dot for each class
            yield images, labels

    assert subject.trained  # without the leak, so that it is the zeroed pictures that fail
    monkeypatch.setattr(engine, "batches", leaking)
    assert not check("input-independent baseline", subject).passed


def test_labels_shuffled_anew_in_each_batch_cannot_be_overfitted(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = engine.batches

    def shuffled(*arguments: Any, **options: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in right(*arguments, **options):
            yield images, labels[torch.randperm(len(labels))]

    monkeypatch.setattr(engine, "batches", shuffled)
    assert not check("overfit one batch", subject).passed


@BOTH
def test_a_softmax_in_the_network_fails_the_overfit_check(subject: Subject) -> None:
    def add_softmax(model: nn.Module) -> None:
        model.head = nn.Sequential(model.head, nn.Softmax(1))

    bugged = with_networks(subject, add_softmax)
    assert not check("overfit one batch", bugged).passed
    assert check("loss at initialisation", bugged).passed  # which is why this bug is a classic


@BOTH
def test_a_softmax_before_the_loss_fails_the_overfit_check(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
        return F.cross_entropy(logits.softmax(1), targets, **options)

    monkeypatch.setattr(engine, "F", SimpleNamespace(cross_entropy=twice))
    assert not check("overfit one batch", subject).passed


def test_view_where_permute_was_meant_fails_the_gradient_check(subject: Subject) -> None:
    def with_channels_first(reorder: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], None]:
        """The network sees pictures that `reorder` made [3, N, 32, 32] of; then they are put back."""
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


def test_a_network_that_ignores_the_pictures_fails_the_gradient_check(subject: Subject) -> None:
    class Blind(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.zeros_like(images)

    bugged = with_networks(subject, lambda model: setattr(model, "shrink", nn.Sequential(Blind(), model.shrink)))
    assert not check("gradient of one example", bugged).passed


@BOTH
def test_a_missing_zero_grad_fails_the_check_of_forgotten_gradients(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_zero_grad(loss: Tensor, optimizers: list[torch.optim.Optimizer]) -> None:
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    monkeypatch.setattr(engine, "descend", without_zero_grad)
    assert not check("gradients are forgotten", subject).passed


@BOTH
def test_validation_pictures_that_are_trained_on_fail_the_train_val_gap(subject: Subject) -> None:
    known = subject.train_split[torch.arange(0, len(subject.train_split), 5)]
    bugged = replace(subject, val_split=known)
    assert not check("train/val gap", bugged).passed
    assert check("predictions over time", bugged).passed  # they look the better for it


def test_augmented_validation_pictures_fail_the_validation_by_hand(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def augmented(model: nn.Module, images: Tensor) -> Tensor:
        fill, generator = torch.zeros(3, dtype=torch.uint8), torch.Generator().manual_seed(derived_seed("bug"))
        return compute_logits(model, augment(images, Augmentation(flip=True, crop=4), generator, fill))

    monkeypatch.setattr(engine, "compute_logits", augmented)
    assert not check("validation by hand", subject).passed


@BOTH
def test_batch_norm_in_training_mode_at_validation_fails_the_validation_by_hand(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    @torch.inference_mode()
    def without_eval(model: nn.Module, images: Tensor) -> Tensor:
        return torch.cat([model(to_float(batch)) for batch in images.split(1000)])

    monkeypatch.setattr(engine, "compute_logits", without_eval)
    assert not check("validation by hand", subject).passed


@BOTH
def test_batch_norm_in_evaluation_mode_at_training_fails_the_check_of_its_modes(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = engine.training_step

    def without_train(model: nn.Module, *arguments: Any) -> tuple[Tensor, Tensor]:
        return right(model.eval(), *arguments)

    monkeypatch.setattr(engine, "training_step", without_train)
    assert not check("batch norm's two modes", subject).passed


# ---------------------------------------------------------------------------------------------------------------------
# What else the checks are for
# ---------------------------------------------------------------------------------------------------------------------


def test_a_head_that_starts_too_large_fails_the_loss_at_initialisation(subject: Subject) -> None:
    def enlarge(model: nn.Module) -> None:
        model.head.weight.data.mul_(10)

    assert not check("loss at initialisation", with_networks(subject, enlarge)).passed


@pytest.mark.parametrize("subject", ["tiny-convnet"], indirect=True)
def test_biases_that_start_at_random_fail_the_loss_at_initialisation(subject: Subject) -> None:
    """Of a head with unit variance too, whose first loss in training mode may be nearly anything."""
    def add_biases(model: nn.Module) -> None:
        model.head.bias = nn.Parameter(9 * torch.randn(100))

    assert check("loss at initialisation", subject).passed
    assert not check("loss at initialisation", with_networks(subject, add_biases)).passed


def test_unseeded_randomness_fails_the_same_seed(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    right = engine.batches

    def noisy(split: Split, *arguments: Any, **options: Any) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator()
        generator.seed()
        for images, labels in right(split, *arguments, **options):
            yield images + 0.01 * torch.randn(images.shape, generator=generator), labels

    monkeypatch.setattr(engine, "batches", noisy)
    assert not check("same seed, same loss", subject).passed


def test_a_network_that_ignores_its_widths_fails_the_check_of_capacity(subject: Subject) -> None:
    script = subject.network.script
    narrow = replace(subject.settings, widths=(16, 16))
    fixed = replace(script, build_model=lambda settings, outputs: script.build_model(narrow, outputs))
    bugged = replace(subject, network=replace(subject.network, script=fixed))
    assert not check("more capacity, lower loss", bugged).passed


def test_steps_that_go_nowhere_fail_the_predictions_over_time(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "descend", lambda loss, optimizers: loss.backward())
    assert not check("predictions over time", subject).passed


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def test_one_failure_is_an_exit_status_of_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "descend", lambda loss, optimizers: loss.mul(torch.nan).backward())
    monkeypatch.setattr(sanity_checks, "CHECKS", {name: CHECKS[name] for name in (
        "loss at initialisation", "gradients are forgotten")})
    monkeypatch.setattr(sanity_checks, "film_strip", lambda subject: None)
    monkeypatch.setattr(sanity_checks, "save_figure", lambda figure, path: None)
    assert run(tmp_path, "--model", "tiny") == 1
    out = capsys.readouterr().out
    assert "PASS  loss at initialisation" in out
    assert "FAIL  gradients are forgotten" in out
    assert "1 of 2 passed" in out


def test_a_training_that_diverges_fails_without_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = engine.training_step

    def diverging(*arguments: Any) -> tuple[Tensor, Tensor]:
        logits, loss = right(*arguments)
        return logits, loss * torch.inf

    monkeypatch.setattr(engine, "training_step", diverging)
    monkeypatch.setattr(sanity_checks, "CHECKS", {name: CHECKS[name] for name in ("predictions over time",)})
    assert run(tmp_path, "--model", "tiny") == 1
    assert "stopped being finite" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("flags", ["--model lenet", "--seed x", "--epochs 3"])
def test_what_a_user_gets_wrong_is_one_line(flags: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, *flags.split()) == 2
    assert flags.split()[0] in error_line(capsys)
    assert not list(tmp_path.iterdir())
