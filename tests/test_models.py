"""The networks and their weights file: shapes, gradients, the round trip, and files that must be refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import train_mlp
from models import WeightsError, create_model, list_models, load_model, save_model
from utils import compute_logits

TINY_MLP = {"widths": (8, 6), "dropout": 0.25, "batch_norm": True}


@pytest.fixture
def pictures() -> Tensor:
    return torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def trained_model(pictures: Tensor) -> nn.Module:
    """A small MLP that has seen a few steps, so that no tensor of it has its first value."""
    torch.manual_seed(0)
    model = create_model("mlp", **TINY_MLP)
    model.fit_inputs(pictures)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(pictures), torch.arange(7)).backward()
        optimizer.step()
    return model.eval()


def test_side_averages_the_picture_down() -> None:
    """A picture and its 2x2 block means, blown up again, are the same to a network that looks at 16x16 pixels."""
    model, images = create_model("mlp", widths=(8,), side=16).eval(), torch.rand(5, 3, 32, 32)
    coarse = images.unflatten(2, (16, 2)).unflatten(4, (16, 2)).mean((3, 5))
    torch.testing.assert_close(model(images), model(coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)))


def test_every_listed_model_can_be_made_and_gives_logits_for_100_classes(pictures: Tensor) -> None:
    assert "mlp" in list_models()
    for name in list_models():
        assert create_model(name).eval()(pictures).shape == (7, 100)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_every_parameter_of_the_mlp_learns(pictures: Tensor, batch_norm: bool) -> None:
    torch.manual_seed(0)
    model = create_model("mlp", widths=(16, 8), batch_norm=batch_norm)
    F.cross_entropy(model(pictures), torch.arange(7)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_an_untrained_model_is_as_unsure_as_guessing(pictures: Tensor) -> None:
    torch.manual_seed(0)
    loss = F.cross_entropy(create_model("mlp").eval()(pictures), torch.arange(7))
    assert loss.item() == pytest.approx(4.605, abs=0.3)  # ln 100


def test_the_mlp_recipe_has_at_most_12_million_parameters() -> None:
    model = train_mlp.build_model(train_mlp.SCRIPT.recipe_settings("mlp"))
    assert sum(parameter.numel() for parameter in model.parameters()) <= 12_000_000


def test_widths_decide_the_layers() -> None:
    shapes = [tuple(parameter.shape) for parameter in create_model("mlp", widths=(8, 6)).parameters()
              if parameter.ndim == 2]
    assert shapes == [(8, 3072), (6, 8), (100, 6)]


def test_dropout_acts_in_training_only(pictures: Tensor) -> None:
    model = create_model("mlp", widths=(64, 64), dropout=0.5, batch_norm=False)
    assert not torch.equal(model(pictures), model(pictures))
    model.eval()
    assert torch.equal(model(pictures), model(pictures))


def test_normalisation_makes_the_sample_zero_mean_and_unit_variance(pictures: Tensor) -> None:
    model = create_model("mlp", widths=(8,))
    channels = torch.tensor([0.1, 0.2, 0.4]).view(1, 3, 1, 1)
    model.fit_inputs(pictures * channels)
    normalised = model.normalize(pictures * channels)
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalised.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "arguments"), [("resnet", {}), ("", {}), ("mlp", {"depth": 3})])
def test_an_unknown_model_or_argument_is_refused(name: str, arguments: dict[str, int]) -> None:
    with pytest.raises(WeightsError) as refusal:
        create_model(name, **arguments)
    assert "\n" not in str(refusal.value)


# ---------------------------------------------------------------------------------------------------------------------
# The weights file
# ---------------------------------------------------------------------------------------------------------------------


def test_a_loaded_model_gives_the_saved_ones_logits(trained_model: nn.Module, pictures: Tensor, tmp_path: Path) -> None:
    save_model(trained_model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    assert not loaded.training
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())
    torch.testing.assert_close(loaded(pictures), trained_model(pictures), atol=0.01, rtol=0.01)


def test_saving_changes_nothing_but_precision(trained_model: nn.Module, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in trained_model.state_dict().items()}
    save_model(trained_model, tmp_path / "model.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained_model.state_dict().items())
    for name, tensor in load_model(tmp_path / "model.safetensors").state_dict().items():
        expected = before[name].half().float() if before[name].is_floating_point() else before[name]
        assert torch.equal(tensor, expected), name


def test_a_weights_file_says_what_model_it_holds(trained_model: nn.Module, tmp_path: Path) -> None:
    save_model(trained_model, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["model"] == "mlp"
    arguments = json.loads(metadata["model_args"])
    assert arguments == {**arguments, **TINY_MLP, "widths": [8, 6]}
    assert arguments["negative_slope"] == 0.01  # the defaults too: they may change, the file must not
    tensors = load_file(tmp_path / "model.safetensors").values()
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float16}


def test_the_same_weights_make_the_same_file(trained_model: nn.Module, tmp_path: Path) -> None:
    """Byte for byte: a file's SHA-256 is how predictions.npz knows its weights."""
    contents = set()
    for _ in range(16):
        save_model(trained_model, tmp_path / "model.safetensors")
        contents.add((tmp_path / "model.safetensors").read_bytes())
    assert len(contents) == 1


def test_normalisation_travels_with_the_weights(trained_model: nn.Module, pictures: Tensor, tmp_path: Path) -> None:
    trained_model.fit_inputs(pictures * torch.tensor([0.2, 0.5, 1.0]).view(1, 3, 1, 1))
    save_model(trained_model, tmp_path / "model.safetensors")
    normalize = load_model(tmp_path / "model.safetensors").normalize
    torch.testing.assert_close(normalize(pictures), trained_model.normalize(pictures), atol=0.01, rtol=0.01)


def test_a_loaded_model_can_be_trained_further(trained_model: nn.Module, pictures: Tensor, tmp_path: Path) -> None:
    save_model(trained_model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors").train()
    F.cross_entropy(loaded(pictures), torch.arange(7)).backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_compute_logits_leaves_the_model_in_its_mode(trained_model: nn.Module) -> None:
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    in_parts = compute_logits(trained_model.train(), images, batch_size=2)
    assert trained_model.training
    torch.testing.assert_close(in_parts, compute_logits(trained_model.eval(), images))
    assert not trained_model.training


def remove(path: Path) -> None:
    path.unlink()


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit_of_the_header_length(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[6] ^= 1
    path.write_bytes(content)


def flip_a_bit_of_the_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8] ^= 1  # the brace that opens the JSON
    path.write_bytes(content)


def fill_with_random_bytes(path: Path) -> None:
    path.write_bytes(torch.randint(0, 256, (5000,), dtype=torch.uint8).numpy().tobytes())


def rewrite(path: Path, metadata: dict[str, str] | None, **tensors: Tensor) -> None:
    """Write the file again with other metadata and, maybe, other tensors."""
    save_file({**load_file(path), **tensors}, path, metadata)


def drop_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors["head.weight"]
    save_file(tensors, path, GOOD)


GOOD = {"model": "mlp", "model_args": json.dumps(TINY_MLP)}
DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": remove,
    "a folder": make_a_folder,
    "truncated": truncate,
    "empty": empty,
    "bit flipped in the header's length": flip_a_bit_of_the_header_length,
    "bit flipped in the header": flip_a_bit_of_the_header,
    "random bytes": fill_with_random_bytes,
    "no metadata": lambda path: rewrite(path, None),
    "no arguments": lambda path: rewrite(path, {"model": "mlp"}),
    "arguments are no JSON": lambda path: rewrite(path, {**GOOD, "model_args": "{"}),
    "arguments are a list": lambda path: rewrite(path, {**GOOD, "model_args": "[8, 6]"}),
    "unknown argument": lambda path: rewrite(path, {**GOOD, "model_args": '{"depth": 3}'}),
    "widths are text": lambda path: rewrite(path, {**GOOD, "model_args": '{"widths": "ab"}'}),
    "widths below zero": lambda path: rewrite(path, {**GOOD, "model_args": '{"widths": [-8, 6]}'}),
    "unknown model": lambda path: rewrite(path, {**GOOD, "model": "resnet"}),
    "other widths": lambda path: rewrite(path, {**GOOD, "model_args": '{"widths": [8, 7]}'}),
    "wrong shape": lambda path: rewrite(path, GOOD, **{"head.weight": torch.zeros(100, 5)}),
    "tensor too many": lambda path: rewrite(path, GOOD, extra=torch.zeros(3)),
    "tensor missing": drop_a_tensor,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_file_that_cannot_be_used_is_refused_in_one_line(
    trained_model: nn.Module, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    path = tmp_path / "model.safetensors"
    save_model(trained_model, path)
    damage(path)
    with pytest.raises(WeightsError) as refusal:
        load_model(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)
