"""The flags of a training script: their effect, how misuse is refused, and the command that repeats a run."""

import dataclasses
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train_mlp
from common.command_line import Parser, exit_status
from common.errors import UserError
from common.files import RESULTS_DIR
from tests.helpers import (
    drawn_once,  # noqa: F401 (a fixture)
    edit_settings,
    error_line,
    resume,
    run_names,
    run_script,
    train_tiny,
)
from train_mlp import SCRIPT
from training.flags import Options, parse_command_line
from training.settings import Settings, flag_of
from utils import Augmentation

CUDA, MPS = torch.cuda.is_available(), torch.backends.mps.is_available()


def parse(*flags: str) -> Options:
    return parse_command_line(SCRIPT, list(flags))


def test_without_flags_the_default_recipe_applies() -> None:
    options = parse()
    for name, value in train_mlp.RECIPES["mlp"].items():
        assert getattr(options.settings, name) == value
    assert options.settings.recipe == "mlp"
    assert options.given == {}
    assert options.seeds == (0,)
    assert options.results_dir == RESULTS_DIR


@pytest.mark.parametrize(("flags", "name", "value"), [
    ("--epochs 7", "epochs", 7),
    ("--lr 3e-4", "lr", 3e-4),
    ("--weight-decay 0", "weight_decay", 0.0),
    ("--optimizer muon", "optimizer", "muon"),
    ("--schedule cosine", "schedule", "cosine"),
    ("--no-flip", "flip", False),
    ("--crop 0", "crop", 0),
    ("--jitter 0.2", "jitter", 0.2),
    ("--widths 64,32", "widths", (64, 32)),
    ("--widths 64", "widths", (64,)),
    ("--no-batch-norm", "batch_norm", False),
    ("--train-on-all", "train_on_all", True),
    ("--seed 3", "seed", 3),
    ("--checkpoint-every 0", "checkpoint_every", 0.0),
    ("--data-dir /somewhere", "data_folder", "/somewhere"),
    ("--epochs 3 --epochs 4", "epochs", 4),
])
def test_a_flag_changes_only_its_own_setting(flags: str, name: str, value: Any) -> None:
    settings = parse(*flags.split()).settings
    assert getattr(settings, name) == value
    field = "data_dir" if name == "data_folder" else name
    assert dataclasses.replace(settings, **{field: getattr(parse().settings, field)}) == parse().settings


def test_flags_set_the_augmentation() -> None:
    augmentation = parse("--no-flip", "--crop", "3", "--jitter", "0.5").settings.augmentation
    assert augmentation == Augmentation(flip=False, crop=3, jitter=0.5)


def test_the_data_folder_flag_overrides_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR100_DIR", "/from/environment")
    assert parse().settings.data_folder == "/from/environment"
    assert parse("--data-dir", "/from/flag").settings.data_folder == "/from/flag"
    monkeypatch.delenv("CIFAR100_DIR")
    assert Path(parse().settings.data_folder) == Path(train_mlp.__file__).parent / "data"


def test_a_new_run_keeps_the_data_folder_of_its_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be resumed from another folder, and from a shell without the variable."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CIFAR100_DIR", "my data")
    assert parse().settings.data_dir == str(tmp_path / "my data")
    assert parse("--synthetic").settings.data_dir == ""
    assert "data_dir" not in parse("--resume", "mlp-s0").given  # it changes nothing in a run that has its own
    monkeypatch.delenv("CIFAR100_DIR")
    assert parse().settings.data_dir == ""


def test_paths_are_absolute_and_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.safetensors").touch()
    for start in ("~/", "", f"{tmp_path}/"):
        options = parse(f"--results-dir={start}runs", "--data-dir", f"{start}d", "--init-from", f"{start}w.safetensors")
        assert options.results_dir == tmp_path / "runs"
        assert options.settings.data_dir == options.given["data_dir"] == str(tmp_path / "d")
        assert options.settings.init_from == str(tmp_path / "w.safetensors")


@pytest.mark.parametrize("flag", ["--results-dir", "--data-dir", "--init-from"])
def test_the_home_of_an_unknown_user_is_refused(flag: str) -> None:
    with pytest.raises(UserError, match="unknown user"):
        parse(flag, "~no-such-user/x")


def test_without_a_data_dir_every_command_has_none() -> None:
    """argparse converts a default that is text: it must not become the current folder."""
    parser = Parser()
    parser.add_data_dir()
    assert not parser.parse_args([]).data_dir


def test_flags_override_the_overfit_settings() -> None:
    settings = parse("--overfit-batch", "--lr", "0.5").settings
    assert settings.lr == 0.5
    assert settings.batch_size == train_mlp.OVERFIT["batch_size"]
    assert settings.epochs == train_mlp.OVERFIT["epochs"]


def test_seeds_are_a_list() -> None:
    assert parse("--seeds", "4,0,2").seeds == (4, 0, 2)
    assert parse("--seed", "4").seeds == (4,)


def test_help_lists_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train_mlp.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    flags = [flag_of(field.name) for field in dataclasses.fields(train_mlp.MLPSettings)]
    flags += ["--name", "--seeds", "--resume", "--results-dir", "--quiet", "--overfit-batch", "--loss"]
    assert [flag for flag in flags if f"{flag} " not in text and f"{flag}\n" not in text] == []


# ---- Refusals -------------------------------------------------------------------------------------------------------

MISUSES = [
    # out of range
    "--epochs 0", "--epochs -1", "--batch-size 1", "--batch-size 0", "--batch-size -5", "--lr 0", "--lr -0.1",
    "--lr nan", "--lr inf", "--lr -inf", "--lr 1e400", "--other-lr 0", "--other-lr nan", "--weight-decay -0.01",
    "--weight-decay inf", "--warmup -0.1", "--warmup 1.1", "--warmup nan", "--label-smoothing -0.1",
    "--label-smoothing 1.5", "--label-smoothing nan", "--crop -1", "--crop 32", "--jitter -0.1",
    "--jitter 1.1", "--corrupt 1.1", "--mixup -1", "--mixup 1e-9", "--cutmix -0.1", "--cutmix 1.1", "--cutmix nan",
    "--average -0.1", "--average 1", "--lr-floor 1.1", "--refresh-norms -1", "--seed -1", "--threads -1",
    "--threads 100000", "--checkpoint-every -1", "--checkpoint-every nan",
    "--checkpoint-every inf", "--widths 0", "--widths 32,0,16", "--widths=-32", "--widths 65537", "--dropout 1",
    "--dropout -0.5", "--dropout nan", "--seeds=-1", "--seeds 0,-1", "--seeds 1,1",
    # of the wrong type
    "--epochs ten", "--epochs 1.5", "--epochs nan", "--batch-size 1e3", "--lr fast", "--widths abc", "--widths 32,,16",
    "--widths 32;16", "--widths 1.5", "--seed 1.5", "--seed x", "--seeds 0;1", "--seeds 0,x", "--threads many",
    "--crop 1.5", "--dropout half", "--widths ''", "--epochs ''", "--lr ''",
    # not among the choices
    "--optimizer lion", "--schedule step", "--precision float16", "--precision float64", "--device tpu",
    "--recipe nope", "--overfit-batch --loss hinge", "--optimizer ''",
    # unknown or incomplete
    "--nonsense", "--epoch 3", "--learning-rate 0.1", "stray", "--epochs", "--lr --epochs 3", "--quiet=yes",
    "--flip yes", "--no-epochs",
    # in conflict with another flag, or without effect
    "--seeds 1,2 --seed 3", "--seeds 1,2 --seed 0", "--seeds 3 --seed 3", "--seeds 0,1 --resume mlp-s0",
    "--seeds 0,1 --name x", "--seeds 0,1 --overfit-batch", "--resume mlp-s0 --name x",
    "--resume mlp-s0 --overfit-batch", "--name x --overfit-batch", "--loss mse-index", "--other-lr 0.1",
    "--momentum 0.5", "--alternate --no-flip", "--mixup 0.8 --cutmix 0.5", "--overfit-batch --cutmix 0.5",
    "--average 0.9", "--schedule constant --lr-floor 0.1", "--init-from missing", "--init-from ../x", "--init-from .",
    # not usable as a folder name
    "--name ../x", "--name /tmp/x", "--name x/y", "--name ''", "--name .hidden", "--name -x", "--name=-x",
    "--name 'a b'", "--name published", "--name overfit_batch", "--name ..", f"--name {'x' * 200}",
    "--resume missing", "--resume ../x", "--resume ''", "--resume .",
    # a device that this machine does not have
    pytest.param("--device cuda", marks=pytest.mark.skipif(CUDA, reason="there is a GPU")),
    pytest.param("--device mps", marks=pytest.mark.skipif(MPS, reason="there is a GPU")),
]


@pytest.mark.parametrize("flags", MISUSES)
def test_misuse_is_one_error_line_and_creates_nothing(
    flags: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results_dir = tmp_path / "results"
    assert train_tiny(results_dir, *shlex.split(flags)) == 2
    error_line(capsys)
    assert run_names(results_dir) == []


@pytest.mark.parametrize(("flags", "named"), [
    ("--epochs 0", "--epochs must be at least 1, not 0"),
    ("--lr nan", "--lr must be a finite number"),
    ("--widths abc", "--widths: 'abc' is not a comma-separated list of integers"),
    ("--batch-size 1", "at least 2"),
    ("--dropout 1", "at most 0.99"),
    ("--optimizer lion", "adamw"),
    ("--seeds 1,2 --seed 3", "--seeds and --seed cannot be used together"),
    ("--seeds 1,1", "--seeds must be different integers"),
    ("--seeds 0,1 --name x", "--name: not allowed with argument --seeds"),
    ("--overfit-batch --resume x", "--resume: not allowed with argument --overfit-batch"),
    ("--other-lr 0.1", "--other-lr has no effect with --optimizer adamw"),
    ("--alternate --no-flip", "--alternate has no effect with --no-flip"),
    ("--mixup 0.8 --cutmix 0.5", "cannot be used together: give --mixup 0 or --cutmix 0"),
    ("--average 0.9", "give --refresh-norms above 0, or --average 0"),
    ("--loss mse-index", "--loss has no effect without --overfit-batch"),
    ("--overfit-batch --crop 2", "--crop has no effect with --overfit-batch"),
    ("--nonsense", "unrecognized arguments: --nonsense (see --help)"),
    ("--resume missing", "cannot resume"),
    ("--name ../x", "'../x' is not a run name"),
])
def test_a_refusal_names_the_mistake(
    flags: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_tiny(tmp_path, *flags.split()) == 2
    assert named in error_line(capsys)


def test_a_file_in_place_of_a_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    assert run_script(tmp_path / "results", "--data-dir", str(file), "--quiet") == 2
    assert str(file) in error_line(capsys)
    assert run_names(tmp_path / "results") == []
    assert train_tiny(file) == 2
    assert str(file) in error_line(capsys)


def out_of_memory() -> int:
    torch.empty(10**16)  # 40 petabytes; fails at once, on the CPU with a RuntimeError
    return 0


def write_to_a_full_disk() -> int:
    raise OSError(28, "No space left on device", "model.safetensors")


@pytest.mark.parametrize("trouble", [out_of_memory, write_to_a_full_disk])
def test_lack_of_memory_or_disk_is_one_error_line(
    trouble: Callable[[], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(trouble) == 2
    error_line(capsys)


# ---- Settings in config.json and in commands ------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [
    "",
    "--seed 7",
    "--epochs 3 --batch-size 100 --optimizer muon --lr 0.02 --other-lr 1e-4 --weight-decay 0.1 --warmup 0.05",
    "--schedule cosine --label-smoothing 0.25 --no-flip --crop 4 --jitter 0.3 --train-on-all --synthetic",
    "--widths 64,32,16,8 --dropout 0.3 --no-batch-norm",
    "--lr 0.0012345678 --weight-decay 0.333333333333 --dropout 0.1234567891",
    "--lr 1e-12",
])
def test_the_command_of_a_run_parses_back_to_its_settings(flags: str) -> None:
    settings = parse(*flags.split()).settings
    words = shlex.split(SCRIPT.command_for(settings))
    assert words[:2] == ["python", "train_mlp.py"]
    assert parse(*words[2:]).settings == settings


def test_the_command_of_a_run_omits_the_machine_and_defaults() -> None:
    flags = "--device=cpu --threads=2 --precision=bfloat16 --data-dir=/d --checkpoint-every=9 --epochs=3"
    assert SCRIPT.command_for(parse(*flags.split()).settings) == "python train_mlp.py --epochs 3 --seed 0"


def test_settings_survive_config_json() -> None:
    settings = parse("--widths", "64,32", "--lr", "0.0012345678", "--no-flip").settings
    assert type(settings).from_config(json.loads(json.dumps(dataclasses.asdict(settings)))) == settings


@pytest.mark.parametrize("make", [lambda values: Settings(**values), Settings.from_config])
def test_settings_created_in_python_are_checked(make: Callable[[dict[str, Any]], Settings]) -> None:
    with pytest.raises(UserError, match="--epochs"):
        make({**dataclasses.asdict(Settings()), "epochs": 0})


def drop_a_setting(config: Path) -> None:
    values = json.loads(config.read_text())
    del values["settings"]["lr"]
    config.write_text(json.dumps(values))


CONFIG_DAMAGES: dict[str, Callable[[Path], object]] = {
    "setting missing": drop_a_setting,
    "unknown setting": lambda config: edit_settings(config.parent, color="blue"),
    "out of range": lambda config: edit_settings(config.parent, epochs=0),
    "wrong type": lambda config: edit_settings(config.parent, epochs="ten"),
    "no settings": lambda config: config.write_text("{}"),
    "no number of processes": lambda config: config.write_text(json.dumps(
        {**json.loads(config.read_text()), "processes": "it's 2"})),
    "a list": lambda config: config.write_text("[]"),
    "truncated": lambda config: config.write_text(config.read_text()[:100]),
    "file missing": Path.unlink,
}


@pytest.mark.parametrize("damage", CONFIG_DAMAGES.values(), ids=CONFIG_DAMAGES.keys())
def test_a_run_with_a_damaged_config_is_not_resumed(
    damage: Callable[[Path], object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "x" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps({"settings": dataclasses.asdict(parse("--synthetic").settings)}))
    damage(config)
    assert resume(tmp_path, "x") == 2
    assert "config.json" in error_line(capsys)
