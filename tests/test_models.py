"""The networks and the round trip through their weights file. Unusable weights files are in tests/test_hostile.py."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import train_mlp
from models import WeightsError, create_model, labeled, list_models, load_model, save_model
from utils import compute_logits

TINY_MLP = {"widths": (8, 6), "dropout": 0.25, "batch_norm": True}


@pytest.fixture
def images() -> Tensor:
    return torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def trained_model(images: Tensor) -> nn.Module:
    """A small MLP after a few steps, so that no tensor has its initial value."""
    torch.manual_seed(0)
    model = create_model("mlp", **TINY_MLP)
    model.fit_inputs(images)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(images), torch.arange(7)).backward()
        optimizer.step()
    return model.eval()


def test_side_averages_the_image_down() -> None:
    """A network with side 16 gives the same logits for an image and for its enlarged 2x2 block means."""
    model, images = create_model("mlp", widths=(8,), side=16).eval(), torch.rand(5, 3, 32, 32)
    coarse = images.unflatten(2, (16, 2)).unflatten(4, (16, 2)).mean((3, 5))
    torch.testing.assert_close(model(images), model(coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)))


def test_every_listed_model_gives_100_logits(images: Tensor) -> None:
    assert "mlp" in list_models()
    for name in list_models():
        assert create_model(name).eval()(images).shape == (7, 100)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_every_parameter_of_the_mlp_has_a_gradient(images: Tensor, batch_norm: bool) -> None:
    torch.manual_seed(0)
    model = create_model("mlp", widths=(16, 8), batch_norm=batch_norm)
    F.cross_entropy(model(images), torch.arange(7)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_an_untrained_model_has_the_loss_of_chance(images: Tensor) -> None:
    torch.manual_seed(0)
    loss = F.cross_entropy(create_model("mlp").eval()(images), torch.arange(7))
    assert loss.item() == pytest.approx(4.605, abs=0.3)  # ln 100


def test_the_mlp_recipe_has_at_most_12_million_parameters() -> None:
    model = train_mlp.build_model(train_mlp.SCRIPT.recipe_settings("mlp"))
    assert sum(parameter.numel() for parameter in model.parameters()) <= 12_000_000


def test_widths_decide_the_layers() -> None:
    shapes = [tuple(parameter.shape) for parameter in create_model("mlp", widths=(8, 6)).parameters()
              if parameter.ndim == 2]
    assert shapes == [(8, 3072), (6, 8), (100, 6)]


def test_dropout_acts_in_training_only(images: Tensor) -> None:
    model = create_model("mlp", widths=(64, 64), dropout=0.5, batch_norm=False)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_normalization_gives_zero_mean_and_unit_variance(images: Tensor) -> None:
    model = create_model("mlp", widths=(8,))
    channels = torch.tensor([0.1, 0.2, 0.4]).view(1, 3, 1, 1)
    model.fit_inputs(images * channels)
    normalized = model.normalize(images * channels)
    torch.testing.assert_close(normalized.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalized.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "arguments"), [("resnet", {}), ("", {}), ("mlp", {"depth": 3})])
def test_an_unknown_model_or_argument_is_refused(name: str, arguments: dict[str, int]) -> None:
    with pytest.raises(WeightsError) as refusal:
        create_model(name, **arguments)
    assert "\n" not in str(refusal.value)


# ---- The weights file -----------------------------------------------------------------------------------------------


def test_a_loaded_model_has_the_saved_weights_in_float16(
    trained_model: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in trained_model.state_dict().items()}
    save_model(trained_model, tmp_path / "model.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained_model.state_dict().items())
    loaded = load_model(tmp_path / "model.safetensors")
    assert not loaded.training
    for name, tensor in loaded.state_dict().items():
        expected = before[name].half().float() if before[name].is_floating_point() else before[name]
        assert torch.equal(tensor, expected), name
    torch.testing.assert_close(loaded(images), trained_model(images), atol=0.01, rtol=0.01)


def test_a_weights_file_names_its_model_and_arguments(trained_model: nn.Module, tmp_path: Path) -> None:
    save_model(trained_model, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["model"] == "mlp"
    arguments = json.loads(metadata["model_args"])
    assert arguments == {**arguments, **TINY_MLP, "widths": [8, 6]}
    assert arguments["negative_slope"] == 0.01  # defaults are written too, since they may change
    tensors = load_file(tmp_path / "model.safetensors").values()
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float16}


def test_equal_weights_make_equal_files(trained_model: nn.Module, tmp_path: Path) -> None:
    """Byte for byte: predictions.npz refers to its weights by the file's SHA-256."""
    contents = set()
    for _ in range(16):
        save_model(trained_model, tmp_path / "model.safetensors")
        contents.add((tmp_path / "model.safetensors").read_bytes())
    assert len(contents) == 1


def test_labels_change_no_weight_and_can_be_taken_off(trained_model: nn.Module, tmp_path: Path) -> None:
    path, names = tmp_path / "model.safetensors", [f"class_{label}" for label in range(100)]
    save_model(trained_model, path)
    before, plain = path.read_bytes(), load_model(path)
    assert labeled(path) == before and (plain.temperature, plain.classes) == (1.0, ())
    path.write_bytes(labeled(path, temperature=0.75, classes=names))
    found = load_model(path)
    assert (found.temperature, found.classes) == (0.75, tuple(names))
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in plain.state_dict().items())
    assert labeled(path) == before


def test_the_weights_file_holds_the_normalization(trained_model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    trained_model.fit_inputs(images * torch.tensor([0.2, 0.5, 1.0]).view(1, 3, 1, 1))
    save_model(trained_model, tmp_path / "model.safetensors")
    normalize = load_model(tmp_path / "model.safetensors").normalize
    torch.testing.assert_close(normalize(images), trained_model.normalize(images), atol=0.01, rtol=0.01)


def test_a_loaded_model_can_be_trained_further(trained_model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    save_model(trained_model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors").train()
    F.cross_entropy(loaded(images), torch.arange(7)).backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_compute_logits_restores_the_mode_of_the_model(trained_model: nn.Module) -> None:
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    in_parts = compute_logits(trained_model.train(), images, batch_size=2)
    assert trained_model.training
    torch.testing.assert_close(in_parts, compute_logits(trained_model.eval(), images))
    assert not trained_model.training
