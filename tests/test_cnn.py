"""The convolutional networks and their training: shapes, gradients, every recipe, resolutions over time, resumption.

Trainings are on synthetic pictures, with the recipes' networks made small.
"""

import math
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import engine
import runs
import train_cnn
from models import WeightsError, create_model, list_models, load_model
from models.convnet import Whitening
from models.layers import Resize, set_side
from optimizers import Muon, make_optimizers
from settings import exit_status
from tests.helpers import (
    MACHINE,
    after_step,
    drawn_once,  # noqa: F401 (a fixture)
    error_line,
    metrics,
    read_json,
    same_weights,
    train_tiny,
)
from train_cnn import CNNSettings
from utils import load_cifar100, to_float

SMALL_MODELS = {
    "convnet": {"widths": (32, 40, 36), "blocks": (1, 2, 1), "side": 24},
    "original_cnn": {},
    "resnet18": {"side": 16},
    "wide_resnet": {"depth": 10, "width": 1},
}
SMALL = {  # of each recipe
    "original": ("--epochs", "2", "--batch-size", "250"),
    "best": ("--depth", "10", "--width", "1", "--epochs", "2", "--sides", "16,20"),
}
SMALL_CONVNET = ("--widths", "8,8,12", "--blocks", "1,2,1", "--epochs", "3", "--sides", "16,18,20",
                 "--batch-size", "500")
STEPS_PER_EPOCH = 10


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "save_figure", lambda figure, path: None)


@pytest.fixture
def pictures() -> Tensor:
    return torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def run_cnn(results_dir: Path, *flags: str) -> int:
    """The exit status of `train_cnn.py` with these flags, in this process."""
    return exit_status(lambda: train_cnn.main([*flags, "--results-dir", str(results_dir)]))


def train_small(results_dir: Path, *flags: str) -> int:
    return run_cnn(results_dir, "--synthetic", *MACHINE, *SMALL_CONVNET, *flags)


# ---------------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------------


def test_every_network_of_the_script_is_a_known_model() -> None:
    choices = CNNSettings.__dataclass_fields__["model"].metadata["choices"]
    assert set(choices) == set(SMALL_MODELS)
    assert set(choices) <= set(list_models())


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_a_network_gives_logits_and_all_that_is_to_learn_has_a_gradient(name: str, pictures: Tensor) -> None:
    torch.manual_seed(0)
    model = create_model(name, **SMALL_MODELS[name])
    model.fit_inputs(pictures)
    for module in model.modules():  # a gate starts with zeros, behind which nothing has a gradient yet
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
    logits = model(pictures)
    assert logits.shape == (7, 100)
    F.cross_entropy(logits, torch.arange(7)).backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.isfinite(parameter.grad).all(), parameter_name
            assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_a_network_looks_at_each_picture_alone(name: str, pictures: Tensor) -> None:
    model = create_model(name, **SMALL_MODELS[name]).eval()
    model.fit_inputs(pictures)
    torch.testing.assert_close(model(pictures)[2:3], model(pictures[2:3]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "parameters"), [  # as their papers' CIFAR forms have them, with 100 classes
    ("resnet18", 11_220_132), ("wide_resnet", 36_536_884), ("original_cnn", 913_924)])
def test_the_reference_networks_have_their_known_size(name: str, parameters: int) -> None:
    assert sum(p.numel() for p in create_model(name).parameters()) == parameters


@pytest.mark.parametrize(("name", "arguments"), [
    ("wide_resnet", {"depth": 27}), ("wide_resnet", {"depth": 4}), ("convnet", {"widths": (8,), "blocks": (2, 2)})])
def test_impossible_arguments_are_refused_in_one_line(name: str, arguments: dict) -> None:
    with pytest.raises(WeightsError) as refusal:
        create_model(name, **arguments)
    assert "\n" not in str(refusal.value)


def test_whitening_makes_patches_uncorrelated_with_unit_variance() -> None:
    torch.manual_seed(0)
    images = F.avg_pool2d(torch.rand(200, 3, 34, 34), 3, stride=1)  # neighbours alike, as in natural pictures
    whiten = Whitening()
    whiten.fit(images)
    responses = whiten(images)[:, :12].transpose(0, 1).flatten(1)
    covariance = torch.cov(responses)
    torch.testing.assert_close(covariance, torch.diag(covariance.diag()), atol=0.05, rtol=0)
    assert covariance.diag().min() > 0.6 and covariance.diag().max() < 1.05
    assert torch.equal(whiten(images)[:, 12:], -whiten(images)[:, :12])


def test_resizing_keeps_the_mean_and_can_be_changed(pictures: Tensor) -> None:
    model = nn.Sequential(Resize(16))
    assert model(pictures).shape == (7, 3, 16, 16)
    torch.testing.assert_close(model(pictures).mean((2, 3)), pictures.mean((2, 3)), atol=0.02, rtol=0)
    set_side(model, 8)
    assert model(pictures).shape == (7, 3, 8, 8)
    set_side(model, None)
    assert model(pictures).shape == (7, 3, 8, 8)
    set_side(model, 32)
    assert model(pictures) is pictures


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer and cost
# ---------------------------------------------------------------------------------------------------------------------


def test_muon_takes_the_filters_and_sgd_the_rest() -> None:
    model = create_model("convnet", **SMALL_MODELS["convnet"])
    muon, sgd = make_optimizers(model, CNNSettings(optimizer="muon-sgd", lr=0.2, other_lr=0.01, precision="float32"))
    taken = [p for group in muon.param_groups for p in group["params"]]
    left = [p for group in sgd.param_groups for p in group["params"]]
    assert isinstance(muon, Muon) and isinstance(sgd, torch.optim.SGD)
    assert {p.ndim for p in taken} == {4} and {p.ndim for p in left} == {1, 2}
    assert sorted(map(id, [*taken, *left])) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    rates = {id(p): group["lr"] for group in sgd.param_groups for p in group["params"]}
    assert rates[id(model.head.weight)] == pytest.approx(0.04)
    assert rates[id(model.norm.bias)] == pytest.approx(0.08)


def test_fixed_norm_keeps_the_filters_norm_and_turns_them_by_the_rate() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(5 * torch.randn(32, 16, 3, 3))
    optimizer = Muon([weight], lr=0.1, fixed_norm=True, iterations=5)
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    assert weight.norm().item() == pytest.approx(32**0.5, rel=0.05)
    cosine = F.cosine_similarity(before.flatten(), weight.detach().flatten(), dim=0)
    assert math.acos(cosine) == pytest.approx(0.1, rel=0.3)


def test_the_cost_of_a_training_sums_over_its_resolutions() -> None:
    settings = CNNSettings(epochs=4, sides=(16, 24), widths=(8,), blocks=(1,))
    model = train_cnn.build_model(settings)
    per_epoch = engine.epoch_flops(model, 100, settings)
    forward = {}
    for side in (16, 24):
        pixels, halved = (side - 1) ** 2, ((side - 1) // 2) ** 2
        gate, head = 2 * 8 * 1, 2 * 8 * 100
        forward[side] = 2 * (pixels * (24 * 12 + 8 * 24 * 9) + halved * (8 * 8 * 9 + 24 * 8) + gate + head)
    assert per_epoch == [300 * forward[side] for side in (16, 16, 24, 24)]
    assert model.resize.side == 24


# ---------------------------------------------------------------------------------------------------------------------
# Trainings
# ---------------------------------------------------------------------------------------------------------------------


def test_refreshed_norms_are_those_of_the_weights_as_they_are() -> None:
    """After new statistics the network gives in evaluation mode what it gives in training mode on the same pictures."""
    torch.manual_seed(0)
    split, _ = load_cifar100("", use_synthetic=True)
    split = split[torch.arange(400)]
    model = create_model("convnet", **SMALL_MODELS["convnet"])
    images = to_float(split.images)
    model.fit_inputs(images)
    engine.refresh_norms(model, split, 0, seed=0)
    assert torch.equal(model.norm.running_mean, torch.zeros(36))
    with torch.no_grad():
        model.train()(0.1 * images)  # statistics of something else, which must not be left in the new ones
    engine.refresh_norms(model, split, 400, seed=0)
    with torch.no_grad():
        expected, seen = model.train()(images), model.eval()(images)
    torch.testing.assert_close(seen, expected, atol=0.02, rtol=0.02)
    assert model.norm.momentum == nn.BatchNorm2d(1).momentum


@pytest.mark.parametrize("recipe", [
    pytest.param(recipe, marks=pytest.mark.slow) if recipe == "original" else recipe for recipe in train_cnn.RECIPES])
def test_every_recipe_trains_end_to_end(recipe: str, tmp_path: Path) -> None:
    assert run_cnn(tmp_path, "--synthetic", *MACHINE, "--recipe", recipe, *SMALL.get(recipe, SMALL_CONVNET)) == 0
    run = tmp_path / f"{recipe}-s0"
    settings = read_json(run / "config.json")["settings"]
    assert settings["model"] == {**train_cnn.SCRIPT.recipes[recipe]}.get("model", "convnet")
    first, *_, last = (float(row["train_loss"]) for row in metrics(run))
    assert last < first
    model = load_model(run / "model.safetensors")
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 100)


@pytest.mark.parametrize(("recipe", "budget"), [("fast", 1.9e14), ("strong", 7.6e14)])
def test_the_recipes_for_a_cpu_keep_to_their_budgets(recipe: str, budget: float) -> None:
    settings = train_cnn.SCRIPT.recipe_settings(recipe)
    assert 0.9 * budget < sum(engine.epoch_flops(train_cnn.build_model(settings), 50_000, settings)) <= budget


@pytest.mark.parametrize("recipe", train_cnn.RECIPES)
def test_every_recipe_names_a_network_that_can_be_built(recipe: str) -> None:
    model = train_cnn.build_model(train_cnn.SCRIPT.recipe_settings(recipe))
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 100)


@pytest.mark.parametrize(("flags", "side"), [((), 20), (("--epochs", "2"), 18), (("--epochs", "1"), 16)])
def test_the_network_is_used_at_the_last_resolution_it_was_trained_at(
    flags: tuple[str, ...], side: int, tmp_path: Path
) -> None:
    assert train_small(tmp_path, *flags) == 0
    assert load_model(tmp_path / "fast-s0" / "model.safetensors").resize.side == side


def test_a_training_ends_by_taking_statistics_anew(tmp_path: Path) -> None:
    assert train_small(tmp_path, "--refresh-norms", "0") == 0
    assert train_small(tmp_path, "--refresh-norms", "500") == 0
    running, anew = (load_model(tmp_path / name / "model.safetensors") for name in ("fast-s0", "fast-s0-2"))
    assert torch.equal(running.head.weight, anew.head.weight)
    assert not torch.equal(running.norm.running_mean, anew.norm.running_mean)


def test_muon_for_filters_is_refused_where_there_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_tiny(tmp_path, "--optimizer", "muon-sgd") == 2
    assert "no filters" in error_line(capsys)


def test_training_goes_through_the_resolutions_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def noting_step(model: nn.Module, *arguments: object) -> tuple[Tensor, Tensor]:
        seen.append(model.resize.side)
        return step(model, *arguments)

    step = engine.training_step
    monkeypatch.setattr(engine, "training_step", noting_step)
    assert train_small(tmp_path) == 0
    assert seen == [side for side in (16, 18, 20) for _ in range(STEPS_PER_EPOCH)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results_dir = tmp_path_factory.mktemp("uninterrupted")
    assert train_small(results_dir) == 0
    return results_dir / "fast-s0"


@pytest.mark.parametrize("stops", [(4,), (STEPS_PER_EPOCH,), (STEPS_PER_EPOCH + 3,), (2 * STEPS_PER_EPOCH + 7,),
                                   (5, STEPS_PER_EPOCH, STEPS_PER_EPOCH)])
def test_a_run_stopped_at_any_resolution_and_resumed_equals_the_uninterrupted_one(
    stops: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Path
) -> None:
    for attempt, steps in enumerate(stops):
        with monkeypatch.context() as patch:
            after_step(patch, steps, lambda: signal.raise_signal(signal.SIGINT))
            status = run_cnn(tmp_path, "--resume", "fast-s0", "--quiet") if attempt else train_small(tmp_path)
        assert status == 130
    assert run_cnn(tmp_path, "--resume", "fast-s0", "--quiet") == 0
    assert same_weights(tmp_path / "fast-s0", uninterrupted)
    assert metrics(tmp_path / "fast-s0") == metrics(uninterrupted)


@pytest.mark.parametrize("recipe", ["fast", "original"])
def test_a_small_batch_is_memorised(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--overfit-batch", "--recipe", recipe, "--synthetic", "--loss", "cross-entropy", "--batch-size", "16",
             "--epochs", "60", "--device", "cpu", "--threads", "1", "--quiet")
    assert run_cnn(tmp_path, *flags, *(("--widths", "24,24,24", "--sides", "20") if recipe == "fast" else ())) == 0
    assert (tmp_path / "overfit_batch" / recipe / "overfit.json").exists()


@pytest.mark.parametrize("flags", [("--sides", "4"), ("--depth", "27", "--model", "wide_resnet"),
                                   ("--widths", "8,8", "--blocks", "2"),
                                   ("--widths", "8,8,8,8,8", "--blocks", "1,1,1,1,1", "--sides", "16,32"),
                                   ("--recipe", "nonsense")])
def test_misuse_is_one_error_line(flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cnn(tmp_path, "--synthetic", *MACHINE, *flags) == 2
    error_line(capsys)
