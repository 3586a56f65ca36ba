"""Muon against the singular value decomposition, parameter groups, and learning-rate schedules."""

import pytest
import torch
from torch import nn

from common.errors import UserError
from models import create_model
from train_mlp import MLPSettings
from training import loop
from training.optimizers import (
    Average,
    Muon,
    NorMuon,
    all_groups,
    make_optimizers,
    orthogonalize,
    rate_factor,
    replace_by_average,
    set_rates,
)
from training.settings import Settings


@pytest.mark.parametrize(("schedule", "middle", "end"), [("constant", 1, 1), ("linear", 0.5, 0), ("cosine", 0.5, 0)])
def test_the_rate_warms_up_and_then_follows_its_schedule(schedule: str, middle: float, end: float) -> None:
    rising = [rate_factor(schedule, 0.25, progress) for progress in (0, 0.0625, 0.125, 0.25)]
    assert rising == pytest.approx([0, 0.25, 0.5, 1])
    falling = [rate_factor(schedule, 0.2, progress) for progress in (0.2, 0.6, 1)]
    assert falling == pytest.approx([1, middle, end])
    assert rate_factor(schedule, 0.0, 0.0) == 1
    above = [rate_factor(schedule, 0.2, progress, floor=0.15) for progress in (0.1, 0.6, 1)]
    assert above == pytest.approx([0.5, middle, max(end, 0.15)])
    for warmup in (0.0, 0.3, 1.0):
        assert all(0 <= rate_factor(schedule, warmup, step / 100) <= 1 for step in range(101))


@pytest.mark.parametrize("shape", [(32, 32), (128, 32), (32, 128), (100, 3072), (7, 5), (1, 9), (16, 48), (16, 47)])
def test_orthogonalize_levels_singular_values(shape: tuple[int, int]) -> None:
    """It keeps the directions: compared to U V^T of the singular value decomposition in float64."""
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    singular_values = torch.logspace(-1, 0, len(vt), dtype=torch.float64)
    matrix = u @ torch.diag(singular_values) @ vt
    result = orthogonalize(matrix.float(), 5).double()
    assert result.shape == shape
    in_their_basis = u.T @ result @ vt.T
    leveled = in_their_basis.diag()
    torch.testing.assert_close(in_their_basis, torch.diag(leveled), atol=1e-4, rtol=0)
    assert leveled.min() > 0.5 and leveled.max() < 1.3


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(512, 192), (128, 256), (96, 864)])
def test_a_step_of_muon_is_nearly_orthogonal(shape: tuple[int, int], precision: str) -> None:
    """With Muon's default number of iterations and a random gradient of an MLP's proportions."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape)
    Muon([weight], lr=1.0, precision=precision).step()
    scale = max(1, shape[0] / shape[1]) ** 0.5
    singular_values = torch.linalg.svdvals(weight.detach()) / scale
    assert singular_values.min() > 0.45 and singular_values.max() < 1.3
    assert (weight.grad * weight.detach()).sum() < 0  # downhill


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_orthogonalize_does_not_depend_on_the_scale(factor: float) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(16, 24)
    expected = orthogonalize(matrix, 5)
    torch.testing.assert_close(orthogonalize(matrix * factor, 5), expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("optimizer", [Muon, NorMuon])
def test_a_zero_gradient_gives_a_zero_step(optimizer: type[Muon]) -> None:
    weight = nn.Parameter(torch.ones(4, 6))
    weight.grad = torch.zeros(4, 6)
    optimizer([weight], lr=0.1).step()
    assert torch.equal(weight, torch.ones(4, 6))


def test_the_floor_of_the_rate_is_that_of_the_settings() -> None:
    settings = MLPSettings(lr=0.1, lr_floor=0.2, precision="float32")
    made = make_optimizers(create_model("mlp", widths=(8, 6)), settings)
    set_rates(made, settings, 0.99)
    assert [group["lr"] for group in all_groups(made)] == pytest.approx([0.02, 0.02])


def test_an_average_follows_the_weights_of_all_optimizers_and_replaces_them() -> None:
    torch.manual_seed(0)
    model = create_model("mlp", widths=(8, 6))
    settings = MLPSettings(optimizer="muon", lr=0.02, average=0.3, precision="float32")
    made = make_optimizers(model, settings)
    assert isinstance(made[-1], Average)
    weights = list(model.parameters())
    expected: list[torch.Tensor] = []
    for step in range(1, 6):
        decay = min(0.3, step / (step + 9))  # 0.1, 0.18, 0.25, 0.3, 0.3
        loop.training_step(model, made, torch.rand(16, 3, 32, 32), torch.arange(16), loop.loss_of(settings))
        expected = [(decay * mean + (1 - decay) * weight).detach()
                    for mean, weight in zip(expected or weights, weights, strict=True)]
    assert not any(torch.equal(weight, mean) for weight, mean in zip(weights, expected, strict=True))
    replace_by_average(made)
    torch.testing.assert_close([weight.detach() for weight in weights], expected)


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest() -> None:
    model = create_model("mlp", widths=(8, 6))
    settings = MLPSettings(optimizer="muon", lr=0.02, other_lr=0.001, precision="float32")
    muon, adamw = make_optimizers(model, settings)
    assert isinstance(muon, Muon) and isinstance(adamw, torch.optim.AdamW)
    taken, left = ([id(p) for p in group["params"]] for group in (all_groups([muon])[0], all_groups([adamw])[0]))
    hidden = [id(layer.weight) for layer in model.layers if isinstance(layer, nn.Linear)]
    assert sorted(taken) == sorted(hidden)
    assert left == [id(model.head.weight)]
    every = [id(p) for group in all_groups([muon, adamw]) for p in group["params"]]
    assert sorted(every) == sorted(id(p) for p in model.parameters())
    assert {group["lr"] for group in muon.param_groups} == {0.02}
    assert {group["lr"] for group in adamw.param_groups} == {0.001}


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "muon"])
def test_weight_decay_acts_on_matrices_only(optimizer: str) -> None:
    model = create_model("mlp", widths=(8, 6))
    settings = MLPSettings(optimizer=optimizer, weight_decay=0.1, precision="float32")
    for group in all_groups(make_optimizers(model, settings)):
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "muon"])
def test_every_optimizer_lowers_the_loss_on_a_batch(optimizer: str) -> None:
    torch.manual_seed(0)
    model = create_model("mlp", widths=(32, 16))
    images, labels = torch.rand(16, 3, 32, 32), torch.arange(16)
    settings = MLPSettings(optimizer=optimizer, lr=0.02, other_lr=0.01, precision="float32")
    made, loss_function = make_optimizers(model, settings), loop.loss_of(settings)
    losses = [loop.training_step(model, made, images, labels, loss_function)[1].item() for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("optimizer", "needs"), [("muon", "hidden layers"), ("muon-sgd", "convolutions"),
                                                    ("normuon-sgd", "convolutions")])
def test_muon_without_anything_to_update_is_refused(optimizer: str, needs: str) -> None:
    model = nn.Sequential()
    model.head = nn.Linear(3072, 100)
    with pytest.raises(UserError, match=f"--optimizer {optimizer} needs {needs}"):
        make_optimizers(model, Settings(optimizer=optimizer))
