"""Convolutional networks and their training: gradients, recipes, progressive resolution, resuming.

Runs use synthetic images and small versions of the recipes' networks.
"""

import copy
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import models
import train_cnn
from benchmarks.cost import time_in_passes
from common.command_line import exit_status
from dataset import synthetic
from models import WeightsError, create_model, default_arguments, list_models, load_model, save_model
from models.layers import Norm, Resize, set_side
from models.mirrornet import Group, MirrorConv, MirrorWhitening, normalized, side_by_side
from tests.helpers import (
    MACHINE,
    STEPS_PER_EPOCH,
    after_step,
    drawn_once,  # noqa: F401 (a fixture)
    error_line,
    metrics,
    read_json,
    same_weights,
    train_tiny,
)
from train_cnn import CNNSettings
from training import loop, run_folder
from training.optimizers import Muon, NorMuon, make_optimizers
from utils import load_cifar100, to_float

SMALL_ARGUMENTS = {"widths": (32, 40, 36), "inner": (8, 16, 24), "side": 24}
SMALL_MIRRORNET = ("--widths", "8,8,12", "--inner", "8,8,8", "--epochs", "3", "--sides", "16,18,20",
                   "--batch-size", "100")
SMALL = {  # flags that make each recipe small
    "fast": SMALL_MIRRORNET,
    "strong": SMALL_MIRRORNET,
    "best": SMALL_MIRRORNET,
    "original": ("--epochs", "2", "--batch-size", "50"),
}


@pytest.fixture(scope="module", autouse=True)
def few_images(drawn_once: None) -> Iterator[None]:  # noqa: F811
    """Train and validate on 1,000 images each: ten batches of 100."""
    draw = synthetic.make_synthetic
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "make_synthetic", lambda part: tuple(tensor[:1000] for tensor in draw(part)))
        yield


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "save_figure", lambda figure, path: None)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def run_cnn(results_dir: Path, *flags: str) -> int:
    """Run `train_cnn.py` with these flags in this process; returns its exit status."""
    return exit_status(lambda: train_cnn.main([*flags, "--results-dir", str(results_dir)]))


def train_small(results_dir: Path, *flags: str) -> int:
    return run_cnn(results_dir, "--synthetic", *MACHINE, *SMALL_MIRRORNET, *flags)


def small_model(name: str, **arguments: Any) -> nn.Module:
    """A network with random weights, and with those of SMALL_ARGUMENTS that it takes."""
    taken = default_arguments(name)
    return create_model(name, **{key: value for key, value in SMALL_ARGUMENTS.items() if key in taken}, **arguments)


# ---- Networks -------------------------------------------------------------------------------------------------------


def test_the_script_offers_every_model_but_the_mlp() -> None:
    choices = CNNSettings.__dataclass_fields__["model"].metadata["choices"]
    assert {*choices, "mlp"} == set(list_models())


@pytest.mark.parametrize("name", list_models())
def test_every_trained_parameter_has_a_gradient(name: str, images: Tensor) -> None:
    torch.manual_seed(0)
    model = small_model(name)
    model.fit_inputs(images)
    logits = model(images)
    assert logits.shape == (7, 100)
    F.cross_entropy(logits, torch.arange(7)).backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.isfinite(parameter.grad).all(), parameter_name
            assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", list_models())
def test_an_image_does_not_affect_the_logits_of_others(name: str, images: Tensor) -> None:
    model = small_model(name).eval()
    model.fit_inputs(images)
    torch.testing.assert_close(model(images)[2:3], model(images[2:3]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", list_models())
def test_every_network_can_be_trained_and_kept(name: str, images: Tensor, tmp_path: Path) -> None:
    """It has a `head` for the optimizer, and its weights file holds all that its logits depend on."""
    model = small_model(name, num_classes=7)
    model.fit_inputs(images)
    (optimizer,) = make_optimizers(model, CNNSettings(optimizer="adamw", lr=1e-3))
    targets = torch.arange(7)
    losses = [float(loop.training_step(model, [optimizer], images, targets, F.cross_entropy)[1]) for _ in range(8)]
    assert losses[-1] < losses[0]
    save_model(model, tmp_path / "model.safetensors")
    torch.testing.assert_close(load_model(tmp_path / "model.safetensors")(images), model.eval()(images),
                               atol=0.05, rtol=0.05)


@pytest.mark.parametrize("model", ["mirrornet", "original_cnn", "resnet18"])
def test_a_network_gets_the_settings_that_it_has_arguments_for(model: str) -> None:
    plain, changed = CNNSettings(model=model), CNNSettings(model=model, widths=(8, 9), inner=(2, 3), sides=(16, 20))
    arguments = train_cnn.network_arguments(changed)
    assert arguments.keys() == default_arguments(model).keys()
    assert train_cnn.network_arguments(plain) == default_arguments(model)
    expected = {"widths": (8, 9), "inner": (2, 3), "side": 20, "num_classes": 100}
    assert arguments == {name: expected[name] for name in arguments}


def test_a_network_gets_no_setting_of_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if it has an argument of that name."""
    monkeypatch.setitem(models._MODELS, "mirrornet", lambda momentum=0.1, lr=3, widths=(5,), inner=(1,): None)
    arguments = train_cnn.network_arguments(CNNSettings(momentum=0.9, lr=1.0, widths=(6,)))
    assert arguments == {"momentum": 0.1, "lr": 3, "widths": (6,), "inner": (1,)}


@pytest.mark.parametrize(("name", "parameters"), [("resnet18", 11_220_132), ("original_cnn", 913_924)])
def test_reference_networks_have_their_known_size(name: str, parameters: int) -> None:
    assert sum(p.numel() for p in create_model(name).parameters()) == parameters


@pytest.mark.parametrize("lengths", [{"widths": (8,)}, {"inner": (2, 2)}, {"widths": (8, 8), "inner": (2, 2)},
                                     {"widths": (8, 8, 8, 8), "inner": (2, 2, 2, 2)}])
def test_impossible_arguments_are_refused_in_one_line(lengths: dict[str, Any]) -> None:
    with pytest.raises(WeightsError) as refusal:
        create_model("mirrornet", **lengths)
    assert "\n" not in str(refusal.value) and "widths and inner must each have 3 numbers" in str(refusal.value)


@pytest.mark.parametrize("odd", [{"widths": (8, 9, 8), "inner": (8, 8, 8)}, {"widths": (8, 8, 8), "inner": (8, 8, 9)}])
def test_an_odd_number_of_mirrored_filters_is_refused(odd: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match="widths and inner must be even"):
        create_model("mirrornet", **odd)


def test_a_negative_number_of_filters_is_refused_in_one_line() -> None:
    """PyTorch raises a RuntimeError for it."""
    with pytest.raises(WeightsError, match="cannot be created"):
        create_model("mirrornet", widths=(8, 8, -2), inner=(8, 8, 8))


def mirrored(maps: Tensor) -> Tensor:
    """The maps of the mirror image: each mirrored, and the halves of their channels exchanged."""
    return maps.flip(3).roll(maps.shape[1] // 2, 1)


def ordinary_filters(layer: MirrorConv) -> Tensor:
    """The filters of an ordinary convolution that computes the same, [outputs, inputs, size, size]."""
    even, odd = (part.weight.squeeze(3).unflatten(1, (layer.size, -1)).unbind(1) for part in (layer.even, layer.odd))

    def columns(same: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> Tensor:
        if layer.size == 1:
            return same[0][..., None]
        *center, outer, _ = same
        return torch.stack([outer - other[-1], *center, outer + other[-1]], 3)

    total, difference = columns(even, odd), columns(odd, even)
    first = torch.cat([total + difference, total - difference], 1)
    return torch.cat([first, mirrored(first)])


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("size", "same"), [(1, False), (2, False), (3, False), (1, True), (3, True)])
def test_a_mirrored_convolution_is_one_with_mirrored_filters(size: int, same: bool, side: int) -> None:
    torch.manual_seed(0)
    height = max(side, size)
    layer, maps = MirrorConv(6, 4, size, same=same), torch.randn(3, 6, height, height + 1).requires_grad_()
    expected = F.conv2d(maps, ordinary_filters(layer), padding=size // 2 if same else 0)
    torch.testing.assert_close(layer(maps), expected)
    gradients = [torch.autograd.grad(out.square().sum(), (maps, *layer.parameters()))
                 for out in (layer(maps), expected)]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer(mirrored(maps)), mirrored(expected))


@pytest.mark.parametrize(("size", "same"), [(1, False), (2, False), (3, False), (3, True)])
def test_a_mirrored_convolution_compiles_as_one_graph(size: int, same: bool) -> None:
    torch.manual_seed(0)
    layer, maps = MirrorConv(6, 4, size, same=same), torch.randn(3, 6, 5, 5)
    maps = maps.contiguous(memory_format=torch.channels_last).requires_grad_()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    gradients = [torch.autograd.grad(convolve(maps).square().sum(), (maps, *layer.parameters()))
                 for convolve in (layer, compiled)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5])
def test_small_maps_are_convolved_without_their_padding(side: int) -> None:
    layer = MirrorConv(6, 4, 3, same=True)
    with FlopCounterMode(display=False) as counter:
        layer(torch.zeros(3, 6, side, side))
    rows = 3 * side - 2 if side <= 4 else 3 * side  # products of a row of weights and a row of pixels
    assert counter.get_total_flops() == 2 * 3 * 2 * (9 * 2) * rows * side


@pytest.mark.parametrize("side", [6, 7])
@pytest.mark.parametrize("kernel", [2, 3])
def test_a_group_computes_no_row_that_pooling_drops(kernel: int, side: int) -> None:
    torch.manual_seed(0)
    group, maps = Group(4, 6, 2, kernel, (1, 1)), torch.randn(2, 4, side, side)
    computed = []
    group.first.register_forward_hook(lambda layer, args, out: computed.append(out.shape[2]))
    group.norm.register_forward_pre_hook(lambda norm, args: computed.append(args[0]))
    group(maps)
    padded = F.pad(maps, ((kernel - 1) // 2, kernel // 2) * 2)
    pooled = F.max_pool2d(F.conv2d(padded, ordinary_filters(group.first)), 2)
    torch.testing.assert_close(computed[1], side_by_side(pooled))
    assert computed[0] == 6


def test_a_new_group_passes_on_its_inputs() -> None:
    """Each of its convolutions doubles them; in training, norms remove the factor."""
    group, maps = Group(4, 6, 4, 3, (3, 3)).eval(), torch.rand(2, 4, 8, 8)
    passed = F.silu(2 * F.max_pool2d(maps, 2))
    torch.testing.assert_close(group(maps)[:, [0, 1, 3, 4]], passed + F.silu(2 * F.silu(2 * passed)),
                               atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", [21, 29])
def test_a_mirrored_image_gives_mirrored_maps(side: int, images: Tensor) -> None:
    torch.manual_seed(0)
    model = create_model("mirrornet", **{**SMALL_ARGUMENTS, "side": side}).eval()
    model.fit_inputs(images)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    maps: list[Tensor] = []
    for layer in (model.whiten, *model.groups, model.head):
        layer.register_forward_hook(lambda layer, args, out: maps.append(out))
    for batch in (images, images.flip(3)):
        model(batch)
    for plain, other in zip(maps[:4], maps[5:9], strict=True):
        assert (other - mirrored(plain)).norm() < 1e-4 * plain.norm()
    assert (maps[9] - maps[4]).norm() < 1e-4 * maps[4].norm()


def test_mirrored_pairs_keep_sharing_their_norms_in_several_processes(images: Tensor) -> None:
    """On GPUs, every batch norm is replaced by one that knows only its own kind."""
    model = create_model("mirrornet", **SMALL_ARGUMENTS).eval()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    torch.testing.assert_close(converted(images), model(images))


def test_both_halves_share_the_statistics_of_a_norm() -> None:
    torch.manual_seed(0)
    maps = torch.randn(4, 6, 3, 5) * torch.arange(1, 7)[:, None, None]
    first, second = normalized(maps, Norm(3)).detach().chunk(2, 1)
    together = torch.cat([first, second], 3)
    torch.testing.assert_close(together.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(together.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)
    assert second[:, 0].std() > 3 * first[:, 0].std()


def test_whitening_decorrelates_patches() -> None:
    torch.manual_seed(0)
    images = F.avg_pool2d(torch.rand(200, 3, 34, 34), 3, stride=1)  # neighbors alike, as in natural images
    images = torch.cat([images, images.flip(3)])
    whiten, weaker = MirrorWhitening(epsilon=1e-6), MirrorWhitening(epsilon=0.1)
    for layer in (whiten, weaker):
        layer.fit(images)
    first, negative, second, _ = whiten(images).chunk(4, 1)
    covariance = torch.cov(torch.cat([first, second], 1).transpose(0, 1).flatten(1))
    torch.testing.assert_close(covariance, torch.eye(12), atol=0.01, rtol=0)
    assert weaker(images).var((0, 2, 3)).max() < 0.5
    assert torch.equal(negative, -first)
    torch.testing.assert_close(whiten(images.flip(3)), mirrored(whiten(images)))


def test_resizing_keeps_the_mean_and_can_be_changed(images: Tensor) -> None:
    model = nn.Sequential(Resize(16))
    assert model(images).shape == (7, 3, 16, 16)
    torch.testing.assert_close(model(images).mean((2, 3)), images.mean((2, 3)), atol=0.02, rtol=0)
    set_side(model, 8)
    assert model(images).shape == (7, 3, 8, 8)
    set_side(model, None)
    assert model(images).shape == (7, 3, 8, 8)
    set_side(model, 32)
    assert model(images) is images


def test_sides_that_a_network_cannot_take_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_small(tmp_path, "--sides", "8,32") == 2
    assert "the network cannot take images of 8 pixels" in error_line(capsys)
    assert list(tmp_path.iterdir()) == []


# ---- Optimizer and cost ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("optimizer", "kind"), [("muon-sgd", Muon), ("normuon-sgd", NorMuon)])
def test_filters_go_to_muon_and_the_rest_to_sgd(optimizer: str, kind: type[Muon]) -> None:
    model = small_model("mirrornet")
    muon, sgd = make_optimizers(model, CNNSettings(optimizer=optimizer, lr=0.2, other_lr=0.01, precision="float32"))
    taken = [p for group in muon.param_groups for p in group["params"]]
    left = [p for group in sgd.param_groups for p in group["params"]]
    assert type(muon) is kind and type(sgd) is torch.optim.SGD
    assert {p.ndim for p in taken} == {4} and {p.ndim for p in left} == {1, 2}
    assert sorted(map(id, [*taken, *left])) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_normuon_moves_all_filters_at_similar_rates() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(32, 16, 3, 3))
    plain, even = Muon([weight], lr=1.0), NorMuon([weight], lr=1.0)
    steps = []
    for optimizer in (plain, even):
        weight.data.zero_()
        weight.grad = torch.randn_like(weight) * torch.logspace(-3, 0, 32)[:, None, None, None]
        optimizer.step()
        steps.append(weight.detach().flatten(1).clone())
    spreads = [step.norm(dim=1).max() / step.norm(dim=1).min() for step in steps]
    assert spreads[0] > 1.5 and spreads[1] < 1.01
    assert even.state[weight]["row_squares"].shape == (32,)
    before = even.state[weight]["row_squares"].clone()
    weight.grad = torch.randn_like(weight)
    even.step()
    assert not torch.equal(even.state[weight]["row_squares"], before)


def test_fixed_norm_rotates_the_filters_by_the_rate() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(5 * torch.randn(32, 16, 3, 3))
    optimizer = Muon([weight], lr=0.1, fixed_norm=True, iterations=5)
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    assert weight.norm().item() == pytest.approx(32**0.5, rel=0.05)
    cosine = F.cosine_similarity(before.flatten(), weight.detach().flatten(), dim=0)
    assert math.acos(cosine) == pytest.approx(0.1, rel=0.3)


def test_the_cost_of_an_epoch_depends_on_its_resolution() -> None:
    settings = CNNSettings(epochs=4, sides=(24, 32), widths=(8, 12, 16), inner=(4, 6, 10))
    model = train_cnn.build_model(settings)
    per_epoch = loop.epoch_flops(model, 100, settings)
    forward = {}
    for side in (24, 32):
        half, quarter, eighth = (side // shrunk - 1 for shrunk in (2, 4, 8))  # sides of the maps after each pooling
        rows = 3 * eighth - 2  # products of a row of weights and a row of pixels that is no padding
        groups = [(2 * half) ** 2 * 24 * 8 * 9 + 2 * half**2 * 8 * 4,
                  (2 * quarter) ** 2 * 8 * 12 * 9 + quarter**2 * 12 * 6 * (9 + 1),
                  (2 * eighth) ** 2 * 12 * 16 * 4 + 2 * rows * eighth * 16 * 10 * 3]
        forward[side] = 2 * ((side - 1) ** 2 * 24 * 12 + sum(groups) // 2 + 8 * 100)  # mirrored filters take half
    assert per_epoch == [300 * forward[side] for side in (24, 24, 32, 32)]
    assert model.resize.side == 32


# ---- Runs -----------------------------------------------------------------------------------------------------------


def test_refreshed_norms_match_the_current_weights() -> None:
    """With them, the network computes the same in evaluation as in training mode, on the same images."""
    torch.manual_seed(0)
    split, _ = load_cifar100("", use_synthetic=True)
    split = split[torch.arange(400)]
    model = small_model("mirrornet")
    images, norm = to_float(split.images), model.groups[2].widen_norm
    model.fit_inputs(images)
    loop.refresh_norms(model, split, 0, seed=0)
    assert torch.equal(norm.running_mean, torch.zeros(18))
    with torch.no_grad():
        model.train()(0.1 * images)  # other statistics, of which nothing may remain
    loop.refresh_norms(model, split, 400, seed=0)
    with torch.no_grad():
        expected, refreshed = model.train()(images), model.eval()(images)
    torch.testing.assert_close(refreshed, expected, atol=0.02, rtol=0.02)
    assert norm.momentum == nn.BatchNorm2d(1).momentum


@pytest.mark.parametrize("recipe", train_cnn.RECIPES)
def test_every_recipe_trains_end_to_end(recipe: str, tmp_path: Path) -> None:
    assert run_cnn(tmp_path, "--synthetic", *MACHINE, "--recipe", recipe, *SMALL[recipe]) == 0
    run = tmp_path / f"{recipe}-s0"
    model_name = train_cnn.RECIPES[recipe].get("model", "mirrornet")
    assert read_json(run / "config.json")["settings"]["model"] == model_name
    first, *_, last = (float(row["train_loss"]) for row in metrics(run))
    assert last < first
    model = load_model(run / "model.safetensors")
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 100)


@pytest.mark.parametrize(("recipe", "budget"), [("fast", 1.9e14), ("strong", 5.6e14), ("best", 1.3e15)])
def test_recipes_keep_within_their_flop_budgets(recipe: str, budget: float) -> None:
    settings = train_cnn.SCRIPT.recipe_settings(recipe)
    flops = sum(loop.epoch_flops(train_cnn.build_model(settings), 50_000, settings))
    assert 0.9 * budget < flops <= budget


@pytest.mark.parametrize(("flags", "side"), [((), 20), (("--epochs", "2"), 18), (("--epochs", "1"), 16)])
def test_saved_weights_keep_the_last_training_resolution(
    flags: tuple[str, ...], side: int, tmp_path: Path
) -> None:
    assert train_small(tmp_path, *flags) == 0
    assert load_model(tmp_path / "fast-s0" / "model.safetensors").resize.side == side


def test_training_ends_by_refreshing_norms(tmp_path: Path) -> None:
    for count in ("0", "500"):
        assert train_small(tmp_path, "--epochs", "1", "--average", "0", "--refresh-norms", count) == 0
    names = ("fast-s0", "fast-s0-2")
    running, refreshed = (load_model(tmp_path / name / "model.safetensors") for name in names)
    assert torch.equal(running.head.weight, refreshed.head.weight)
    one, other = (model.groups[0].norm.running_mean for model in (running, refreshed))
    assert not torch.equal(one, other)


def test_training_ends_with_the_average_of_the_weights_and_its_norms(tmp_path: Path) -> None:
    assert train_small(tmp_path, "--average", "0") == 0
    assert train_small(tmp_path, "--average", "0.5") == 0
    last, averaged = (metrics(tmp_path / name) for name in ("fast-s0", "fast-s0-2"))
    assert [row["train_loss"] for row in last] == [row["train_loss"] for row in averaged]
    assert last[:-1] == averaged[:-1] and last[-1]["val_loss"] != averaged[-1]["val_loss"]
    assert not same_weights(tmp_path / "fast-s0", tmp_path / "fast-s0-2")
    saved = load_model(tmp_path / "fast-s0-2" / "model.safetensors")  # its norms fit its weights
    again = copy.deepcopy(saved)
    loop.refresh_norms(again, load_cifar100("", use_synthetic=True)[0], 5000, seed=0)
    for one, other in zip(saved.buffers(), again.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=0.01, atol=0.01)  # weights are saved in float16
    norms_of_last = load_model(tmp_path / "fast-s0" / "model.safetensors").buffers()
    assert any(not torch.allclose(one, other, rtol=0.03, atol=0.03)
               for one, other in zip(saved.buffers(), norms_of_last, strict=True))


@pytest.mark.parametrize("optimizer", ["muon-sgd", "normuon-sgd"])
def test_muon_for_filters_is_refused_for_the_mlp(optimizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                                 ) -> None:
    assert train_tiny(tmp_path, "--optimizer", optimizer) == 2
    assert "needs convolutions" in error_line(capsys)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A run's folder, and the side of the images in each of its steps."""
    results_dir, sides = tmp_path_factory.mktemp("uninterrupted"), []

    def recording_step(model: nn.Module, *arguments: object) -> tuple[Tensor, Tensor]:
        sides.append(model.resize.side)
        return step(model, *arguments)

    step = loop.training_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "training_step", recording_step)
        assert train_small(results_dir) == 0
    return results_dir / "fast-s0", sides


def test_training_goes_through_the_resolutions_in_order(uninterrupted: tuple[Path, list[int]]) -> None:
    assert uninterrupted[1] == [side for side in (16, 18, 20) for _ in range(STEPS_PER_EPOCH)]


@pytest.mark.parametrize("stops", [(4,), (STEPS_PER_EPOCH,), (STEPS_PER_EPOCH + 3,), (2 * STEPS_PER_EPOCH + 7,),
                                   (3 * STEPS_PER_EPOCH,), (5, STEPS_PER_EPOCH, STEPS_PER_EPOCH)])
def test_a_run_resumed_at_any_resolution_equals_a_whole_one(
    stops: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    uninterrupted: tuple[Path, list[int]],
) -> None:
    for attempt, steps in enumerate(stops):
        with monkeypatch.context() as patch:
            after_step(patch, steps, lambda: signal.raise_signal(signal.SIGINT))
            status = run_cnn(tmp_path, "--resume", "fast-s0", "--quiet") if attempt else train_small(tmp_path)
        assert status == 130
    assert run_cnn(tmp_path, "--resume", "fast-s0", "--quiet") == 0
    assert same_weights(tmp_path / "fast-s0", uninterrupted[0])
    assert metrics(tmp_path / "fast-s0") == metrics(uninterrupted[0])


@pytest.mark.parametrize(("recipe", "flags"), [
    ("fast", ("--widths", "64,128,256", "--inner", "32,64,128", "--sides", "20")),
    ("original", ()),
])
def test_a_small_batch_is_memorized(recipe: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    common = ("--overfit-batch", "--recipe", recipe, "--synthetic", "--loss", "cross-entropy", "--batch-size", "16",
              "--epochs", "60", "--device", "cpu", "--threads", "1", "--quiet")
    assert run_cnn(tmp_path, *common, *flags) == 0
    assert (tmp_path / "overfit_batch" / recipe / "overfit.json").exists()


@pytest.mark.parametrize(("flags", "named"), [
    (("--sides", "4"), "--sides"),
    (("--widths", "8,8"), "widths and inner must each have 3 numbers, one per group"),
    (("--widths", "8,8,8", "--inner", "8"), "widths and inner must each have 3 numbers, one per group"),
    (("--widths", "8,8,9"), "widths and inner must be even"),
    (("--model", "original_cnn", "--widths", "8"), "--widths has no effect with --model original_cnn"),
    (("--model", "resnet18", "--inner", "2"), "--inner has no effect with --model resnet18"),
    (("--recipe", "nonsense"), "--recipe"),
])
def test_misuse_is_one_error_line(
    flags: tuple[str, ...], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cnn(tmp_path, "--synthetic", *MACHINE, *flags) == 2
    assert named in error_line(capsys)


def test_products_take_a_part_of_the_passes() -> None:
    model, settings = small_model("mirrornet"), CNNSettings(device="cpu", precision="float32")
    products, everything = time_in_passes(model, torch.rand(8, 3, 32, 32), torch.arange(8), 32, settings)
    assert 0 < products < everything
