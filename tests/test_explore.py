"""Exploring the data: copies are found, network inputs are the training's own, and all files are written."""

import csv
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import train_cnn
import train_mlp
from common.command_line import exit_status
from tests.helpers import MACHINE, drawn_once, error_line  # noqa: F401 (drawn_once is a fixture)
from tools import explore
from training import loop
from training.settings import NO_AUGMENTATION, Script, Settings
from utils import Split, image_hashes, load_cifar100, load_test_set, to_float

FIGURES = {"superclasses.png", "means.png", "extremes.png", "inputs.png", "inputs_mlp.png", "near_duplicates.png"}
LISTS = {"label_counts.csv", "baselines.csv", "near_duplicates.csv"}
STILL = dict(NO_AUGMENTATION, device="cpu")


@pytest.fixture(scope="module")
def split() -> Split:
    return load_cifar100("", use_synthetic=True)[0][torch.arange(600)]


def run(*flags: str) -> int:
    return exit_status(lambda: explore.main(list(flags)))


def blobs(images: int, seed: int) -> Tensor:
    """Smooth colored images, uint8 [N, 3, 32, 32], all different."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(images, 3, 9, 9, generator=generator)
    return (255 * F.interpolate(small, 32, mode="bilinear")).to(torch.uint8)


# ---- near-duplicates ----


@pytest.mark.parametrize("change", [
    pytest.param(lambda images: images, id="identical"),
    pytest.param(lambda images: images.flip(3), id="mirrored"),
    pytest.param(lambda images: images.roll((2, -1), (2, 3)), id="shifted"),
    pytest.param(lambda images: (images * 0.6 + 40).to(torch.uint8), id="paler"),
    pytest.param(lambda images: (images.flip(3).roll(1, 3) * 0.8).to(torch.uint8), id="mirrored, shifted and darker"),
])
def test_a_changed_copy_is_found(change):
    train = blobs(400, seed=0)
    copied = torch.arange(0, 400, 20)
    matches = explore.match(change(train[copied]), train)
    assert torch.equal(matches.train, copied)
    assert (matches.similarity >= explore.SIMILAR).all()
    assert sorted(matches.near_duplicates.tolist()) == list(range(len(copied)))


@pytest.mark.parametrize("images", [
    pytest.param(blobs(50, seed=1), id="others"),
    pytest.param(torch.full((1, 3, 32, 32), 200, dtype=torch.uint8), id="one color")])
def test_an_unrelated_image_is_not_found(images):
    assert not len(explore.match(images, blobs(400, seed=0)).near_duplicates)


def test_the_list_names_both_images_most_similar_first(split):
    images = torch.cat([blobs(3, seed=1), (split.images[[7]] * 0.6).to(torch.uint8), split.images[[5]]])
    labels = torch.zeros(5, dtype=torch.int64)
    test = Split(images, labels, labels, split.fine_names, split.coarse_names)
    rows = explore.near_duplicate_rows(explore.match(test.images, split.images), test, split)
    assert [row[0] for row in rows] == [f"{name:016x}" for name in image_hashes(images[[4, 3]])]
    assert [row[1] for row in rows] == [f"{name:016x}" for name in image_hashes(split.images[[5, 7]])]
    assert rows[0][2] == "1.0000"
    assert rows[0][3:] == [split.fine_names[0], split.fine_names[split.fine_labels[5]]]


# ---- numbers ----


def test_brightness_contrast_and_saturation_of_simple_images():
    black, white, red, halves = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    white[:], red[0], halves[:, :, 16:] = 255, 255, 255
    images = torch.stack([black, white, red, halves])
    assert explore.brightness(images).tolist() == pytest.approx([0, 100, 100 / 3, 50])
    assert explore.contrast(images).tolist() == pytest.approx([0, 0, 0, 50], abs=1e-4)
    assert explore.saturation(images).tolist() == pytest.approx([0, 0, 100, 0])


def test_extremes_are_the_smallest_and_largest_values():
    values = torch.randperm(100, generator=torch.Generator().manual_seed(0)).float()
    least, most = explore.extremes(values)
    assert values[least].tolist() == list(range(explore.EXTREMES))
    assert values[most].tolist() == [99 - i for i in range(explore.EXTREMES)]


def test_a_mean_image_is_that_of_its_class(split):
    of_class = split.images[split.fine_labels == 42]
    assert torch.allclose(explore.mean_images(split)[42], of_class.float().mean(0) / 255, atol=1e-5)


def test_baselines_on_images_of_one_color(split):
    colors = 255 * torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.uint8)
    labels = torch.tensor([0, 1, 1, 2, 3])
    plain = Split(colors[labels][:, :, None, None].expand(-1, -1, 32, 32), labels, labels,
                  split.fine_names[:4], split.coarse_names)
    assert list(explore.baselines(plain, plain).values()) == [40, 100, 100]
    others = dataclasses.replace(plain, fine_labels=(labels + 1) % 4)  # similar images have other classes
    assert list(explore.baselines(plain, others).values()) == [20, 0, 0]


def test_the_nearest_image_has_the_least_distance():
    some, others = blobs(20, seed=1).double(), blobs(700, seed=0).double()
    expected = [int((others - image).square().sum((1, 2, 3)).argmin()) for image in some]
    assert explore.nearest(some, others).tolist() == expected


# ---- network inputs ----


def network_inputs(script: Script, settings: Settings, split: Split, epochs: range = range(1)) -> list[Tensor]:
    return explore.network_inputs(script, settings, split, [0, 3, 599], epochs)


def test_without_augmentation_the_stored_images_enter(split):
    settings = train_cnn.SCRIPT.recipe_settings("fast", **STILL, sides=(32,))
    assert torch.equal(network_inputs(train_cnn.SCRIPT, settings, split)[0], to_float(split.images[[0, 3, 599]]))


def test_the_normalization_of_the_mlp_is_undone(split):
    settings = train_mlp.SCRIPT.recipe_settings("mlp", **STILL, side=16)
    expected = F.avg_pool2d(to_float(split.images[[0, 3, 599]]), 2)
    assert torch.allclose(network_inputs(train_mlp.SCRIPT, settings, split)[0], expected, atol=1e-5)


def test_inputs_follow_the_recipe_from_epoch_to_epoch(split):
    settings = train_cnn.SCRIPT.recipe_settings("fast", **{**STILL, "flip": True}, sides=(16, 32), epochs=4)
    inputs = network_inputs(train_cnn.SCRIPT, settings, split, range(4))
    assert [images.shape[2] for images in inputs] == [16, 16, 32, 32]
    assert torch.equal(inputs[2], inputs[3].flip(3))  # alternating flips


@pytest.mark.parametrize("mix", [("--mixup", "0.5"), ("--mixup", "0", "--cutmix", "0.5")], ids=["mixup", "cutmix"])
@pytest.mark.parametrize(("module", "side"), [
    pytest.param(train_cnn, ("--sides", "32"), id="cnn"), pytest.param(train_mlp, ("--side", "32"), id="mlp")])
def test_inputs_are_those_of_a_real_training(module, side, mix, tmp_path, monkeypatch):
    """At 32 pixels, where only the normalization comes between `training_step` and the first layer."""
    batches, used = [], []
    train = module.train

    def note_settings(model: Any, train_split: Any, val_split: Any, run: Any, **options: Any) -> Any:
        used.append(run.settings)
        return train(model, train_split, val_split, run, **options)

    def note_images(model: Any, optimizers: Any, images: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        batches.append(images.clone())
        return torch.zeros(len(images), 100), torch.zeros(())

    monkeypatch.setattr(module, "train", note_settings)
    monkeypatch.setattr(loop, "training_step", note_images)
    flags = ["--synthetic", "--epochs", "1", "--batch-size", "500", "--widths", "8,8,8", "--crop", "4",
             "--jitter", "0.2", *mix, "--seed", "3", "--average", "0", "--results-dir", str(tmp_path),
             *MACHINE, *side]
    assert exit_status(lambda: module.main(flags)) == 0
    trained_on = torch.cat(batches)
    for image in network_inputs(module.SCRIPT, used[0], load_cifar100("", use_synthetic=True)[0])[0]:
        distance = (trained_on - image).abs().amax((1, 2, 3))
        assert int((distance < 1e-5).sum()) == 1
        assert int((distance < 0.05).sum()) == 1  # so the tolerance does not matter


# ---- the command ----


@pytest.fixture(scope="module")
def explored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the command writes for the synthetic images."""
    results_dir = tmp_path_factory.mktemp("explored")
    assert run("--synthetic", "--results-dir", str(results_dir)) == 0
    return results_dir / "data-synthetic"


def test_all_figures_and_lists_are_written(explored):
    assert {path.name for path in explored.iterdir()} == FIGURES | LISTS
    for name in FIGURES:
        assert (explored / name).read_bytes().startswith(b"\x89PNG")
        assert (explored / name).stat().st_size < 400_000  # photographs have less noise and take less than 300 kB


def test_the_lists_can_be_read(explored):
    with open(explored / "label_counts.csv", newline="") as file:
        counts = list(csv.DictReader(file))
    assert len({row["class"] for row in counts}) == 100
    assert {(row["training"], row["validation"], row["test"]) for row in counts} == {("50", "10", "20")}
    with open(explored / "near_duplicates.csv", newline="") as file:
        pairs = list(csv.DictReader(file))
    test = {int(name) for name in image_hashes(load_test_set("", use_synthetic=True).images)}
    assert pairs
    assert all(int(row["test_hash"], 16) in test and len(row["test_hash"]) == 16 for row in pairs)


def test_figures_of_synthetic_images_say_so(split):
    settings = train_cnn.SCRIPT.recipe_settings("fast", **STILL, synthetic=True)
    for figure in (explore.means_figure(split, synthetic=True),
                   explore.inputs_figure(train_cnn.SCRIPT, settings, split, range(1))):
        assert "SYNTHETIC" in figure.get_suptitle()


def test_a_damaged_dataset_is_reported_in_one_line(tmp_path, capsys):
    (tmp_path / "cifar-100-binary").mkdir()
    (tmp_path / "cifar-100-binary" / "train.bin").write_bytes(b"abc")
    assert run("--data-dir", str(tmp_path), "--results-dir", str(tmp_path)) == 2
    assert "train.bin has 3 bytes" in error_line(capsys)
