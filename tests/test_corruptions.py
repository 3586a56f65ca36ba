"""How robust a run is: our corruptions, what is saved and printed about a run, and the files of CIFAR-100-C."""

import copy
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from common.command_line import exit_status
from common.plotting import save_figure
from evaluation import corruptions, figures
from evaluation.corruptions import CORRUPTIONS
from evaluation.finished_runs import FinishedRun, TestSet
from models import load_model, save_model
from tests.helpers import (
    drawn_once,  # noqa: F401 (a fixture)
    edit_settings,
    error_line,
    run_names,
    train_tiny,
)
from utils import compute_logits, corrupt, to_float

UNCHANGED = {"noise": 0, "blur": 0, "brightness": 1, "contrast": 1, "saturation": 1, "pixelation": 1, "rotation": 0}
COUNT = 200  # test images, two of every class


@pytest.fixture(scope="module")
def test_set(drawn_once: None) -> TestSet:  # noqa: F811
    """Two synthetic test images of every class."""
    test = copy.copy(TestSet("", synthetic=True))
    chosen = np.sort(np.argsort(test.fine_labels, kind="stable").reshape(100, -1)[:, :2].flatten())
    for name in ("hashes", "fine_labels", "coarse_labels", "distinct"):
        setattr(test, name, getattr(test, name)[chosen])
    test.images = test.images[torch.from_numpy(chosen)]
    return test


# ---- Our corruptions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corrupted_image_depends_on_the_image_alone(name: str, test_set: TestSet) -> None:
    images, corruption = test_set.images[:40], CORRUPTIONS[name]
    before, state, order = images.clone(), torch.get_rng_state(), torch.randperm(40)
    assert len(corruption.strengths) == corruptions.STRENGTHS
    for strength in corruption.strengths:
        once = corruption.apply(images, strength)
        assert once.dtype == torch.uint8 and once.shape == images.shape and not torch.equal(once, images)
        assert torch.equal(corruption.apply(images[order][:7], strength), once[order][:7])
    assert torch.equal(images, before)
    torch.set_rng_state(state)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_stronger_corruption_changes_images_more(name: str, test_set: TestSet) -> None:
    images = test_set.images[:100]
    changes = [(CORRUPTIONS[name].apply(images, strength).float() - images).abs().mean().item()
               for strength in CORRUPTIONS[name].strengths]
    assert all(weaker < stronger for weaker, stronger in pairwise(changes)), changes


@pytest.mark.parametrize(("name", "strength"), UNCHANGED.items())
def test_a_corruption_of_no_strength_changes_nothing(name: str, strength: float, test_set: TestSet) -> None:
    images = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(CORRUPTIONS[name].apply(images, strength), images)


def test_noise_has_the_deviation_that_is_its_strength() -> None:
    gray = torch.arange(100, 150, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    noise = CORRUPTIONS["noise"].apply(gray, 0.05).float() - gray
    assert noise.std() / 255 == pytest.approx(0.05, rel=0.01) and abs(noise.mean()) < 0.1
    assert not torch.equal(noise[0], noise[1])


def test_sixteen_pixels_are_means_of_two_by_two(test_set: TestSet) -> None:
    images = test_set.images[:20]
    means = images.float().unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
    out = CORRUPTIONS["pixelation"].apply(images, 2)
    assert (out[..., ::2, ::2] - means).abs().max() <= 0.5
    assert torch.equal(out[..., ::2, ::2], out[..., 1::2, 1::2])


def test_blocks_at_the_edge_have_means_of_their_own_pixels() -> None:
    images = torch.arange(0, 64, 2, dtype=torch.uint8).expand(1, 3, 32, 32)
    row = CORRUPTIONS["pixelation"].apply(images, 5)[0, 0, 0].tolist()
    assert row == [middle for middle in range(4, 60, 10) for _ in range(5)] + [61, 61]


def test_noise_blur_and_pixelation_are_those_of_training(test_set: TestSet) -> None:
    images, generator = test_set.images[:30], torch.Generator().manual_seed(0)
    trained_on = (255 * corrupt(to_float(images), 1.0, torch.Generator().manual_seed(0))).round().to(torch.uint8)
    strengths = torch.rand(2, 10, 1, 1, 1, generator=generator)
    assert torch.equal(CORRUPTIONS["pixelation"].apply(images[10:20], 2), trained_on[10:20])
    for image, strength, expected in zip(images[20:], strengths[1].flatten(), trained_on[20:], strict=True):
        assert torch.equal(CORRUPTIONS["blur"].apply(image[None], strength.item())[0], expected)
    deviations = 0.1 * strengths[0].flatten()
    for image, deviation, expected in zip(images, deviations, trained_on[:10], strict=False):
        ours = CORRUPTIONS["noise"].apply(image[None], deviation.item())[0].float() - image
        assert ours.std() == pytest.approx((expected.float() - image).std().item(), rel=0.1)


def test_the_goals_are_among_the_strengths() -> None:
    assert set(corruptions.GOALS.values()) == {("noise", 0.05), ("pixelation", 2)}
    assert all(strength in CORRUPTIONS[name].strengths for name, strength in corruptions.GOALS.values())


# ---- A run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with a run, mlp-s0, that claims to be trained on CIFAR-100."""
    results_dir = tmp_path_factory.mktemp("trained")
    assert train_tiny(results_dir, "--train-on-all", "--lr", "0.01", "--batch-size", "200") == 0
    edit_settings(results_dir / "mlp-s0", synthetic=False)
    return results_dir


@pytest.fixture
def site(trained: Path, tmp_path: Path, test_set: TestSet, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a copy of the run in results/, and an empty data folder."""
    shutil.copytree(trained, tmp_path / "results")
    monkeypatch.setattr(evaluate, "TestSet", lambda *arguments, **options: test_set)
    (tmp_path / "data").mkdir()
    return tmp_path


def measure(site: Path, *names: str) -> int:
    return exit_status(lambda: evaluate.main(["--corruptions", *names, "--data-dir", str(site / "data"),
                                              "--results-dir", str(site / "results")]))


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, list[float]]:
    """The printed accuracies by corruption, with their mean."""
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    return {name: [float(cell) for cell in cells[1::2]] for name, *cells in lines}


def test_a_run_is_measured_at_every_strength(
    site: Path, test_set: TestSet, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure(site, "mlp-s0") == 0
    rows = printed(capsys)
    assert list(rows) == list(CORRUPTIONS)
    model = load_model(site / "results" / "mlp-s0" / "model.safetensors")
    for name, (*accuracies, mean) in rows.items():
        expected = [100 * np.mean(compute_logits(model, CORRUPTIONS[name].apply(test_set.images, strength)
                                                 ).argmax(1).numpy() == test_set.fine_labels)
                    for strength in CORRUPTIONS[name].strengths]
        assert accuracies == pytest.approx(expected, abs=0.51)  # another batch size may change a prediction
        assert mean == pytest.approx(np.mean(expected), abs=0.51)


def test_a_run_is_measured_once_for_its_weights(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = site / "results" / "mlp-s0"
    assert measure(site, "mlp-s0") == 0
    before, saved = printed(capsys), (run / "corruptions.npz").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(corruptions, "load_model", lambda *arguments: pytest.fail("it was measured again"))
        assert measure(site, "mlp-s0") == 0
    assert printed(capsys) == before
    model = load_model(run / "model.safetensors")
    model.head.weight.data.neg_()
    save_model(model, run / "model.safetensors")
    assert measure(site, "mlp-s0") == 0
    assert (run / "corruptions.npz").read_bytes() != saved and printed(capsys) != before


def test_a_run_without_weights_is_refused(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (site / "results" / "mlp-s0" / "model.safetensors").unlink()
    capsys.readouterr()
    for names, reason in ((["mlp-s0"], "the run mlp-s0 has no weights"), (["nope"], "nope"),
                          ([], "no published run has weights")):
        assert measure(site, *names) == 2
        assert reason in error_line(capsys)


def test_the_figure_has_a_line_for_every_run(tmp_path: Path) -> None:
    """Also for more runs than there are colors."""
    strengths = {name: (one.meaning, one.strengths) for name, one in CORRUPTIONS.items()}
    falling = np.linspace(70, 5, 40).reshape(8, 5)
    figure = figures.corruptions_figure({f"run-s{number}": (75.0, falling - number) for number in range(8)}, strengths,
                                        "Title")
    panels = [axes for axes in figure.axes if axes.lines]
    assert [axes.get_title() for axes in panels] == list(CORRUPTIONS)
    assert all(len(axes.lines) == 8 for axes in panels)
    assert len(figure.axes[-1].get_legend().get_texts()) == 8
    save_figure(figure, tmp_path / "corruptions.png")
    assert (tmp_path / "corruptions.png").stat().st_size < 300_000


# ---- CIFAR-100-C ----------------------------------------------------------------------------------------------------


@pytest.fixture
def only_official(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out our own corruptions."""
    monkeypatch.setattr(corruptions, "measured", lambda run, test: iter(()))


def write_official(site: Path, test: TestSet) -> Path:
    """Files in the form of CIFAR-100-C, in another order than ours: at strength 5, one corruption is all black."""
    folder, order = site / "data" / "CIFAR-100-C", np.random.default_rng(0).permutation(COUNT)
    folder.mkdir()
    images = test.images.numpy()[order].transpose(0, 2, 3, 1)
    np.save(folder / "labels.npy", np.tile(test.fine_labels[order], 5).astype(np.uint8))
    np.save(folder / "fog.npy", np.concatenate([images] * 4 + [np.zeros_like(images)]))
    np.save(folder / "gaussian_noise.npy", np.concatenate([images] * 5))
    (folder / "._fog.npy").write_bytes(b"as macOS writes it")
    return folder


def test_the_official_files_are_measured_in_their_order(
    site: Path, test_set: TestSet, only_official: None, capsys: pytest.CaptureFixture[str]
) -> None:
    write_official(site, test_set)
    assert measure(site, "mlp-s0") == 0
    rows = printed(capsys)
    assert list(rows) == ["fog", "gaussian_noise"]
    correct = FinishedRun(site / "results" / "mlp-s0").logits(test_set).argmax(1) == test_set.fine_labels
    clean = 100 * correct.mean()
    assert clean > 2
    assert rows["gaussian_noise"] == pytest.approx([clean] * 6, abs=0.51)
    assert rows["fog"] == pytest.approx([clean] * 4 + [1.0, (4 * clean + 1) / 5], abs=0.51)


def test_a_synthetic_run_is_not_measured_on_the_official_files(
    site: Path, test_set: TestSet, only_official: None, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_settings(site / "results" / "mlp-s0", synthetic=True)
    write_official(site, test_set)
    assert measure(site, "mlp-s0") == 0
    assert printed(capsys) == {}


IMAGES_SHAPE = (5 * COUNT, 32, 32, 3)


@pytest.mark.parametrize(("spoil", "reason"), [
    (lambda folder: (folder / "labels.npy").unlink(), "labels.npy is missing"),
    (lambda folder: np.save(folder / "labels.npy", np.zeros(COUNT, np.uint8)), "labels.npy has uint8 [200] instead"),
    (lambda folder: np.save(folder / "labels.npy", np.arange(5 * COUNT) % 10), "has other labels than the test set"),
    (lambda folder: np.save(folder / "labels.npy", np.arange(5 * COUNT) % 100 + 0.5), "has other labels than the test"),
    (lambda folder: np.save(folder / "labels.npy", np.array([{}] * 5 * COUNT)), "labels.npy cannot be read as an .npy"),
    (lambda folder: np.save(folder / "fog.npy", np.zeros(IMAGES_SHAPE, np.float32)), "fog.npy has float32 [1000, "),
    (lambda folder: np.save(folder / "fog.npy", np.zeros((COUNT, 32, 32, 3), np.uint8)), "instead of uint8 [1000, 32"),
    (lambda folder: np.save(folder / "fog.npy", np.zeros((5 * COUNT, 3, 32, 32), np.uint8)), "instead of uint8 [1000"),
    (lambda folder: (folder / "fog.npy").write_bytes((folder / "fog.npy").read_bytes()[:9999]), "fog.npy cannot be"),
    (lambda folder: (folder / "fog.npy").write_bytes(b"PK\3\4 as in .npz"), "fog.npy cannot be read as an .npy"),
    (lambda folder: (folder / "fog.npy").write_text("<html>"), "fog.npy cannot be read as an .npy file"),
    (lambda folder: (folder / "fog.npy").unlink() or (folder / "fog.npy").mkdir(), "fog.npy is not a file"),
    (lambda folder: [path.unlink() for path in folder.glob("*o*.npy")], "has no images: it needs files such as"),
])
def test_other_files_are_one_error_line(
    spoil: Callable[[Path], object], reason: str, site: Path, test_set: TestSet, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(write_official(site, test_set))
    capsys.readouterr()
    assert measure(site, "mlp-s0") == 2
    assert reason in error_line(capsys)
    assert "corruptions.npz" not in run_names(site / "results" / "mlp-s0")
