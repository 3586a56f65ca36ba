"""Optimizers and learning rates: Muon against the singular value decomposition, who gets which parameter, schedules."""

import pytest
import torch
from torch import nn

import engine
import optimizers
from models import create_model
from train_mlp import MLPSettings


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_rate_rises_from_zero_to_its_peak_during_warm_up(schedule: str) -> None:
    factors = [optimizers.rate_factor(schedule, 0.25, progress) for progress in (0, 0.0625, 0.125, 0.25)]
    assert factors == pytest.approx([0, 0.25, 0.5, 1])


@pytest.mark.parametrize(("schedule", "middle", "end"), [("constant", 1, 1), ("linear", 0.5, 0), ("cosine", 0.5, 0)])
def test_the_rate_falls_from_its_peak_as_the_schedule_says(schedule: str, middle: float, end: float) -> None:
    factors = [optimizers.rate_factor(schedule, 0.2, progress) for progress in (0.2, 0.6, 1)]
    assert factors == pytest.approx([1, middle, end])
    assert optimizers.rate_factor(schedule, 0.0, 0.0) == 1


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.3, 1.0])
def test_the_rate_is_never_negative_nor_above_its_peak(schedule: str, warmup: float) -> None:
    assert all(0 <= optimizers.rate_factor(schedule, warmup, step / 100) <= 1 for step in range(101))


@pytest.mark.parametrize("shape", [(32, 32), (128, 32), (32, 128), (100, 3072), (7, 5), (1, 9), (16, 48), (16, 47)])
def test_orthogonalise_keeps_the_directions_and_levels_the_strengths(shape: tuple[int, int]) -> None:
    """Against U V^T, the orthogonal matrix that the singular value decomposition gives in float64."""
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    strengths = torch.logspace(-1, 0, len(vt), dtype=torch.float64)
    matrix = u @ torch.diag(strengths) @ vt
    result = optimizers.orthogonalise(matrix.float(), 5).double()
    assert result.shape == shape
    seen = u.T @ result @ vt.T
    torch.testing.assert_close(seen, torch.diag(seen.diag()), atol=1e-4, rtol=0)
    assert seen.diag().min() > 0.5
    assert seen.diag().max() < 1.3


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(512, 192), (128, 256), (96, 864)])
def test_muons_own_step_is_nearly_orthogonal(shape: tuple[int, int], precision: str) -> None:
    """With the iterations that the optimizer takes by default, and a random gradient of an MLP's proportions."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape)
    optimizers.Muon([weight], lr=1.0, precision=precision).step()
    scale = max(1, shape[0] / shape[1]) ** 0.5
    strengths = torch.linalg.svdvals(weight.detach()) / scale
    assert strengths.min() > 0.45 and strengths.max() < 1.3
    assert (weight.grad * weight.detach()).sum() < 0  # downhill


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_orthogonalise_does_not_depend_on_the_scale(factor: float) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(16, 24)
    expected = optimizers.orthogonalise(matrix, 5)
    torch.testing.assert_close(optimizers.orthogonalise(matrix * factor, 5), expected, atol=0.05, rtol=0)


def test_orthogonalise_of_no_gradient_is_no_step() -> None:
    assert torch.equal(optimizers.orthogonalise(torch.zeros(4, 6), 5), torch.zeros(4, 6))


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest() -> None:
    model = create_model("mlp", widths=(8, 6))
    settings = MLPSettings(optimizer="muon", lr=0.02, other_lr=0.001, precision="float32")
    muon, adamw = optimizers.make_optimizers(model, settings)
    taken = {id(p) for group in muon.param_groups for p in group["params"]}
    left = [id(p) for group in adamw.param_groups for p in group["params"]]
    hidden = {id(layer.weight) for layer in model.layers if isinstance(layer, nn.Linear)}
    assert isinstance(muon, optimizers.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    assert taken == hidden
    assert id(model.head.weight) in left
    assert sorted([*taken, *left]) == sorted(id(p) for p in model.parameters())
    assert {group["lr"] for group in muon.param_groups} == {0.02}
    assert {group["lr"] for group in adamw.param_groups} == {0.001}


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "muon"])
def test_weight_decay_is_for_matrices_only(optimizer: str) -> None:
    model = create_model("mlp", widths=(8, 6))
    settings = MLPSettings(optimizer=optimizer, weight_decay=0.1, precision="float32")
    made = optimizers.make_optimizers(model, settings)
    for group in optimizers.all_groups(made):
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "muon"])
def test_every_optimizer_learns_a_batch(optimizer: str) -> None:
    torch.manual_seed(0)
    model = create_model("mlp", widths=(32, 16))
    images, labels = torch.rand(16, 3, 32, 32), torch.arange(16)
    settings = MLPSettings(optimizer=optimizer, lr=0.02, other_lr=0.01, precision="float32")
    made = optimizers.make_optimizers(model, settings)
    losses = [engine.training_step(model, made, images, labels, settings)[1].item() for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]
