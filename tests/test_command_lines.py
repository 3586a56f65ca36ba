"""Random command lines for every command: each is carried out, or refused with one line and status 2.

Flags and their kinds are read from the commands' own parsers, and the limits of values from the fields of the settings,
so that a new flag or a new command needs no change here.
"""

import argparse
import dataclasses
import functools
import importlib
import io
import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import matplotlib.font_manager
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import train_cnn
import train_mlp
import utils
from common.command_line import Parser, exit_status, integers
from common.errors import UserError
from common.files import ROOT, write_json, write_text
from dataset import synthetic
from tools import explore, redraw, sanity_checks, tune
from training import flags, hardware, loop, overfit, run_folder
from training.hardware import require_memory
from training.settings import Script, Settings
from utils import Split

COMMANDS = sorted(str(path.relative_to(ROOT)) for folder in (ROOT, ROOT / "tools", ROOT / "benchmarks")
                  for path in folder.glob("*.py") if "exit_status(main)" in path.read_text(encoding="utf-8"))
TRAINING = {"train_mlp.py": train_mlp, "train_cnn.py": train_cnn}
FIELDS = {f.name: f for module in TRAINING.values() for f in dataclasses.fields(module.SCRIPT.settings_class)}

# A test that really trains adds these flags, and draws values from these instead of the whole range.
HERE = ("--synthetic", "--device", "cpu", "--threads", "1", "--quiet")
LIGHT = {"epochs": ("1", "2"), "batch_size": ("2", "7", "50", "50000"), "widths": ("1", "8", "4,4", "8,1,3", "8,2,6"),
         "inner": ("1", "4,4", "4,4,4", "8,1,3"), "sides": ("8", "9", "12,16", "16,8,17"), "threads": ("1",),
         "device": ("cpu",), "compile": ()}

# All recipes have these instead of their own values.
SMALL = {"train_mlp.py": dict(epochs=1, batch_size=50, widths=(8, 4)),
         "train_cnn.py": dict(epochs=1, batch_size=50, widths=(4, 4, 4), inner=(4, 4, 4), sides=(16,))}


# ---- Command lines --------------------------------------------------------------------------------------------------


def main_of(command: str) -> Callable[[list[str]], int]:
    return importlib.import_module(command.removesuffix(".py").replace("/", ".")).main


class Found(Exception):
    """Carries the parser that a command has made."""


@functools.cache
def actions_of(command: str) -> list[argparse.Action]:
    """Everything that the parser of a command accepts."""

    def raise_parser(parser: Parser, *arguments: Any) -> None:
        raise Found(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_args", raise_parser)
        with pytest.raises(Found) as found:
            main_of(command)([])
    return found.value.args[0]._actions


NUMBERS = ("0", "1", "2", "3", "-1", "0.5", "1.5", "1e-300", "1e300", "1e400", "-1e400", "nan", "inf", "-inf", "-0.0",
           str(2**31), str(2**63), str(10**12), str(10**30), "9" * 5000, "1e", "0x10", "1_000", "٣", " 5 ", "ten",
           "1,2", "0,0", "1,,2", ",".join(["1"] * 300), "65536,65536,65536", "--", "None", "True")
NAMES = ("new", "new", "mlp-s0", "fast-s0", "published/mlp-s0", "overfit_batch/mlp", "half", "file", "file/below",
         "folder", "image.png", "folder/new.png", "results", "results/mlp-s0/model.safetensors", "a/b", "..",
         "../up", ".", ".hidden", "-x", "a b", "ü/名", "new\nline", "x" * 300, "nul\0nul", "\udcff", "\udcff.png",
         "*", "\x1b[2J", "results/mlp-s0/../../file")
foreign_text = st.binary(max_size=12).map(os.fsdecode).filter(lambda text: not text.startswith("/"))  # as argv has it
wild_values = st.one_of(st.sampled_from(("", *NUMBERS, *NAMES)), foreign_text)


def sane_values(action: argparse.Action, *, light: bool) -> st.SearchStrategy[str]:
    """Values of the right kind; for a setting, values within its limits, the limits, and values just outside."""
    if light and action.dest in LIGHT:
        return st.sampled_from(LIGHT[action.dest])
    if action.choices:
        return st.sampled_from(list(action.choices))
    if action.type not in (int, float, integers):
        return st.sampled_from(NAMES)
    limits = FIELDS[action.dest].metadata if action.dest in FIELDS else {}
    low, high = limits.get("low"), limits.get("high")
    if action.type is float:
        low = limits.get("above") if low is None else low
        values = [0.5, 5e-324, 1e-38, 1e300 if high is None else high, -1e300 if low is None else low]
        return st.sampled_from(["1e-3", *map(repr, map(float, values))])
    least, most = (-1 if low is None else low), (10**9 if high is None else high)
    values = [str(number) for number in {1, 2, 3, least, least + 1, most} if light <= (least <= number <= most)]
    if action.type is int:
        return st.sampled_from(values)
    return st.lists(st.sampled_from(values), min_size=1, max_size=4).map(",".join)


def uses(action: argparse.Action, values: st.SearchStrategy[str]) -> st.SearchStrategy[list[str]]:
    """Ways to write a flag, or positional arguments."""
    names = st.sampled_from(action.option_strings or [""])
    if action.nargs == 0:
        return names.map(lambda name: [name])
    least, most = {None: (1, 1), "?": (0, 1), "*": (0, 3), "+": (1, 3)}.get(action.nargs, (action.nargs, action.nargs))
    given = st.lists(values, min_size=least, max_size=most)
    if not action.option_strings:
        return given
    apart = st.tuples(names, given).map(lambda pair: [pair[0], *pair[1]])
    joined = st.tuples(names, values).map(lambda pair: ["=".join(pair)])
    return st.one_of(apart, apart, joined)


@st.composite
def command_lines(draw: st.DrawFn, command: str, light: bool = False) -> list[str]:
    """Arguments for a command: mostly what its parser accepts, often something that it does not."""
    actions = [action for action in actions_of(command) if not (light and LIGHT.get(action.dest) == ())]
    sane = st.sampled_from(actions).flatmap(lambda action: uses(action, sane_values(action, light=light)))
    wild = st.sampled_from(actions).flatmap(lambda action: uses(action, wild_values))
    junk = st.one_of(wild_values, st.sampled_from(actions).flatmap(lambda action: st.sampled_from(
        [*action.option_strings, "--no-such-flag", "-q", "--"]))).map(lambda word: [word])
    parts = sane if light else st.one_of(sane, sane, sane, sane, wild, junk)
    words = [word for part in draw(st.lists(parts, max_size=7)) for word in part]
    takes = {name for action in actions for name in action.option_strings}
    needed = [draw(uses(action, sane_values(action, light=light))) for action in actions
              if not action.option_strings and action.required]
    start = ["--synthetic"] if "--synthetic" in takes and draw(st.integers(0, 3)) else []
    return [*start, *itertools.chain(*needed[:draw(st.integers(0, 9))]), *words]


# ---- A small world to run them in -----------------------------------------------------------------------------------


class Accepted(Exception):
    """The command line is accepted: the work would begin here."""


def begin(*arguments: Any, **options: Any) -> None:
    raise Accepted


def check_model(script: Script, chosen: Settings, split: Split, num_outputs: int = 100) -> None:
    """Stands in for `new_model`: builds the network without memory for its weights."""
    require_memory(lambda: script.build_model(chosen, num_outputs), chosen.device)


def train_nothing(model: None, train_split: Split, val_split: Split | None, run: run_folder.RunFolder,
                  **options: Any) -> None:
    """Stands in for `train`: writes a result."""
    write_json(run.result_path, {"val_acc": 1.0, "train_seconds": 1.0, "train_flops": 1, "images_per_second": 1.0})


def save_no_figure(figure: Any, path: Path) -> None:
    write_text(path, "a figure\n")


@pytest.fixture(scope="module", autouse=True)
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a finished run of each script and files that no command may change; a hundred images per split."""
    matplotlib.font_manager.get_font_names()  # writes its cache now, before writes are watched
    home = tmp_path_factory.mktemp("world") / "home"
    (home / "folder").mkdir(parents=True)
    Image.new("RGB", (40, 30), "red").save(home / "image.png")
    (home / "file").write_text("precious\n")
    (home / "README.md").write_text("precious\n")
    facts = {"processor": "one", "threads": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "PER_CLASS", dict.fromkeys(synthetic.PER_CLASS, 1))
        patch.setattr(synthetic, "make_synthetic", functools.cache(synthetic.make_synthetic))
        patch.setattr(utils, "download", no_network)
        for file, module in TRAINING.items():
            for recipe, chosen in module.SCRIPT.recipes.items():
                patch.setitem(module.SCRIPT.recipes, recipe, {**chosen, **SMALL[file]})
            patch.setitem(module.SCRIPT.overfit, "epochs", 2)
        known_provenance = functools.cache(run_folder.provenance)
        for module in (run_folder, overfit):
            patch.setattr(module, "provenance", known_provenance)
        for module in (hardware, loop):
            patch.setattr(module, "machine_facts", lambda device: facts)
        patch.setattr(hardware, "seconds_per_call", lambda function, budget, enough=1.0: (function(), 1.0)[1])
        patch.setattr(sanity_checks, "TRAIN_IMAGES", 100)
        patch.setattr(run_folder, "learning_curves", lambda *arguments, **options: None)
        for module in (run_folder, overfit, explore, redraw, sanity_checks, tune):
            patch.setattr(module, "save_figure", save_no_figure)
            for figure in [name for name in vars(module) if name.endswith("_figure")]:
                if figure not in ("save_figure", "new_figure"):
                    patch.setattr(module, figure, lambda *arguments, **options: None)
        with chdir(home):
            for file in TRAINING:
                assert main_of(file)([*HERE, "--results-dir", "results"]) == 0
        for lock in (home / "results").glob("*/.lock"):
            lock.unlink()
        shutil.copytree(home / "results" / "mlp-s0", home / "results" / "half")
        (home / "results" / "half" / "result.json").unlink()
        yield home


def no_network(*arguments: Any) -> None:
    raise UserError("the network is down")


@pytest.fixture
def without_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands end where their work would begin."""
    outcome = overfit.Outcome("a loss", (2.0, 1.0), 1, 2)
    for module in (loop, overfit, tune):
        monkeypatch.setattr(module, "new_model", check_model)
    for module in (loop, tune):
        monkeypatch.setattr(module, "choose_precision", lambda model, split, chosen, processes: (chosen, ""))
    monkeypatch.setattr(loop, "choose_threads", lambda model, split, chosen, **options: (chosen, ""))
    for module in (train_mlp, train_cnn):
        monkeypatch.setattr(module, "train", train_nothing)
    monkeypatch.setattr(overfit, "memorize", lambda *arguments, **options: outcome)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    for name in ("tools.trial.train", "tools.tune.train", "tools.sanity_checks.make_subject", "torch.onnx.export",
                 "benchmarks.cost.measure", "benchmarks.cost.measured_alone", "benchmarks.loader.median_speeds",
                 "benchmarks.scaling.machine_facts", "benchmarks.overfit_riddle.train_case",
                 "benchmarks.time_to_accuracy.contestants"):
        monkeypatch.setattr(name, begin)


WRITTEN: list[str] | None = None  # paths that are opened for writing while a command line is tried


def note_writes(event: str, arguments: tuple[Any, ...]) -> None:
    if WRITTEN is None:
        return
    if event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        WRITTEN.append(os.fsdecode(arguments[0]))
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
        WRITTEN.extend(os.fsdecode(path) for path in arguments[:2] if isinstance(path, (str, bytes, Path)))


sys.addaudithook(note_writes)  # for good: Python cannot remove it


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "half" not in path.parts}


def attempt(command: str, argv: list[str], world: Path, folder: Path) -> tuple[int | None, str]:
    """Try a command line in a new copy of the world in `folder`; returns the exit status and what is on stderr.

    The status is None if work would have begun. Fails if the user sees anything else than a status, and the one line
    that comes with 2; if anything was written elsewhere; or if a file of the world has changed.
    """
    global WRITTEN
    home = folder / "one" / "two" / "home"  # deep enough for "..": what is written there is seen and does no harm
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(world, home)
    before = contents(home)
    output, errors = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    status: Any = None
    with pytest.MonkeyPatch.context() as patch, chdir(home):
        for module in [module for module in sys.modules.values() if hasattr(module, "RESULTS_DIR")]:
            patch.setattr(module, "RESULTS_DIR", home / "results")
        patch.setattr("evaluate.ROOT", home)
        patch.setenv("CIFAR100_DIR", str(home / "data"))
        WRITTEN = []
        try:
            with redirect_stdout(output), redirect_stderr(errors):
                status = exit_status(lambda: main_of(command)(argv))
        except Accepted:
            pass
        except SystemExit as stop:
            assert stop.code == 0
            assert {"-h", "--help"} & set(argv)
            status = 0
        finally:
            written, WRITTEN = WRITTEN, None
        elsewhere = [path for path in written if not os.path.realpath(path.replace("\0", "")).startswith(str(folder))]
    lines = errors.getvalue().splitlines()
    assert status in (None, 0, 1, 2)
    if status == 2:
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
    assert not any("Traceback" in line for line in lines), lines
    assert [path for path in elsewhere if path != os.devnull] == []
    assert [path for path, content in before.items() if not path.exists() or path.read_bytes() != content] == []
    return status, errors.getvalue()


def try_many(command: str, examples: int, world: Path, folder: Path, *, light: bool = False) -> list[int | None]:
    """Try this number of command lines, the same ones every time; returns their statuses."""
    statuses = []

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))
    @given(command_lines(command, light=light))
    def holds(argv: list[str]) -> None:
        statuses.append(attempt(command, [*argv, *HERE] if light else argv, world, folder)[0])

    holds()
    return statuses


# ---- The tests ------------------------------------------------------------------------------------------------------

few_or_many = pytest.mark.parametrize("examples", [40, pytest.param(150, marks=pytest.mark.slow)])


@pytest.mark.usefixtures("without_work")
@pytest.mark.parametrize("command", COMMANDS)
@few_or_many
def test_no_command_line_gives_a_traceback(command: str, examples: int, small_world: Path, tmp_path: Path) -> None:
    assert 2 in try_many(command, examples, small_world, tmp_path / "try")


@pytest.mark.parametrize("command", TRAINING)
@few_or_many
def test_any_settings_train_or_are_refused(command: str, examples: int, small_world: Path, tmp_path: Path) -> None:
    assert {0, 2} <= set(try_many(command, examples, small_world, tmp_path / "try", light=True))


@pytest.mark.usefixtures("without_work")
@pytest.mark.parametrize(("command", "argv", "message"), [
    ("train_mlp.py", ("--epochs", str(10**12)), "--epochs must be at most 50000"),  # was a list of that length
    ("train_mlp.py", ("--batch-size", "9" * 400), "--batch-size must be at most 50000"),  # was a division that gave 0
    ("train_mlp.py", ("--seed", str(10**30)), "--seed must be at most"),
    ("train_mlp.py", ("--seeds", f"0,{10**30}"), "--seed must be at most"),  # before anything is trained
    ("train_mlp.py", ("--seed", "9" * 5000), "--seed"),
    ("train_mlp.py", ("--lr", "1e39"), "--lr must be at most 1e+30"),  # infinite in float32
    ("train_mlp.py", ("--weight-decay", "1e39"), "--weight-decay must be at most"),
    ("train_mlp.py", ("--mixup", "1e-300"), "--mixup must be 0 or at least"),  # 0 in float32
    ("train_mlp.py", ("--lr=--",), "--lr"),  # an empty list to argparse
    ("train_mlp.py", ("--results-dir", ""), "give one"),  # was the current folder
    ("train_mlp.py", ("--results-dir", "a\0b"), "give one"),
    ("train_mlp.py", ("--synthetic", "--results-dir", "file"), "file"),
    ("train_mlp.py", ("--synthetic", "--results-dir", "file/below"), "file"),
    ("train_mlp.py", ("--seeds", "0,1", "--name", "new"), "not allowed with argument"),
    ("train_mlp.py", ("--optimizer", "adamw", "--other-lr", "0.1"), "--other-lr has no effect with --optimizer adamw"),
    ("train_mlp.py", ("--alternate", "--no-flip"), "--alternate has no effect with --no-flip"),
    ("train_cnn.py", ("--model", "resnet18", "--widths", "8,8"), "--widths has no effect with --model resnet18"),
    ("train_cnn.py", ("--model", "original_cnn", "--sides", "16"), "--sides has no effect with --model original_cnn"),
    ("train_cnn.py", ("--synthetic", "--widths", "8,8"), "widths and inner must each have 3 numbers"),
    ("tools/explore.py", ("--data-dir=",), "--data-dir"),
    ("evaluate.py", ("--publish", "../overfit_batch/mlp"), "not a run name"),  # replaced its own source
    ("tools/sanity_checks.py", ("--seed", "-1"), "--seed must be at least 0"),  # before the dataset is looked for
    ("benchmarks/loader.py", ("--batch-size", str(10**9)), "--batch-size must be 1 to 50000"),
    ("benchmarks/time_to_accuracy.py", ("--figure", "README.md"), "--figure"),  # was replaced
    ("benchmarks/time_to_accuracy.py", ("--figure", "/dev/null"), "--figure"),
    ("benchmarks/time_to_accuracy.py", ("--figure", "missing/a.png"), "--figure"),  # after minutes
    ("benchmarks/overfit_riddle.py", ("--figure", "README.md"), "--figure"),
])
def test_a_former_traceback_or_silent_mistake_is_refused(
    command: str, argv: tuple[str, ...], message: str, small_world: Path, tmp_path: Path
) -> None:
    status, errors = attempt(command, list(argv), small_world, tmp_path / "try")
    assert status == 2
    assert message in errors


@pytest.mark.parametrize("content", ["[]", "{}", "null", "7", "[1]", "[{}]", '[{"recipe": []}]', '[{"recipe": "mlp"}]',
                                     '[{"recipe": "mlp", "train_seconds": [], "machines": []}]', "[", "\udcff"])
def test_help_survives_damaged_results(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_bytes(os.fsencode(content))
    monkeypatch.setattr(flags, "RESULTS_DIR", tmp_path)
    with pytest.raises(SystemExit):
        train_mlp.main(["--help"])
    assert "not measured" in capsys.readouterr().out


def test_a_folder_name_may_be_bytes_that_are_not_text(small_world: Path, tmp_path: Path) -> None:
    assert attempt("train_mlp.py", [*HERE, "--results-dir", "\udcff"], small_world, tmp_path / "try") == (0, "")
