"""Every flag of every script, in all combinations: a command line is done, or refused with one line and status 2.

Flags and their kinds are read from the scripts' own parsers, and the limits of values from the settings' own fields, so
that a new flag or a new script is tried without a word here.
"""

import argparse
import dataclasses
import functools
import importlib
import io
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import engine
import explore
import overfit
import runs
import sanity_checks
import train_cnn
import train_mlp
import tune
import utils
from data import synthetic
from hardware import require_memory
from runs import provenance
from settings import ROOT, Parser, Script, Settings, exit_status
from utils import Split, UserError

SCRIPTS = sorted(str(path.relative_to(ROOT)) for folder in (ROOT, ROOT / "benchmarks") for path in folder.glob("*.py")
                 if "exit_status(main)" in path.read_text())
TRAINING = {"train_mlp.py": train_mlp.SCRIPT, "train_cnn.py": train_cnn.SCRIPT}
FIELDS = {f.name: f for script in TRAINING.values() for f in dataclasses.fields(script.settings_class)}

# Lines that a test of trainings adds, since the flags as such are tried with the work replaced.
HERE = ("--synthetic", "--device", "cpu", "--threads", "1", "--quiet")
LIGHT = {"epochs": ("1", "2"), "batch_size": ("2", "7", "50", "50000"), "widths": ("1", "8", "4,4", "4,4,4", "8,1,3"),
         "blocks": ("1", "1,1", "1,1,1", "1,2,1"), "depth": ("10", "12"), "width": ("1", "2"),
         "sides": ("8", "9", "12,16", "16,8,17"), "threads": ("1",), "device": ("cpu",), "compile": ()}

SMALL = {"train_mlp.py": dict(epochs=1, batch_size=50, widths=(8, 4)),
         "train_cnn.py": dict(epochs=1, batch_size=50, widths=(4, 4, 4), blocks=(1, 1, 1), depth=10, width=1,
                              sides=(16,))}  # in place of the recipes' own


# ---------------------------------------------------------------------------------------------------------------------
# Command lines
# ---------------------------------------------------------------------------------------------------------------------


def main_of(script: str) -> Callable[[list[str]], int]:
    return importlib.import_module(script.removesuffix(".py").replace("/", ".")).main


class Found(Exception):
    """The parser that a script has made."""


@functools.cache
def actions_of(script: str) -> list[argparse.Action]:
    """All that the parser of a script takes."""

    def tell(parser: Parser, *arguments: Any) -> None:
        raise Found(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_args", tell)
        with pytest.raises(Found) as found:
            main_of(script)([])
    return found.value.args[0]._actions


NUMBERS = ("0", "1", "2", "3", "-1", "0.5", "1.5", "1e-300", "1e300", "1e400", "-1e400", "nan", "inf", "-inf", "-0.0",
           str(2**31), str(2**63), str(10**12), str(10**30), "9" * 5000, "1e", "0x10", "1_000", "٣", " 5 ", "ten",
           "1,2", "0,0", "1,,2", ",".join(["1"] * 300), "65536,65536,65536", "--", "None", "True")
NAMES = ("new", "new", "mlp-s0", "fast-s0", "published/mlp-s0", "overfit_batch/mlp", "half", "file", "file/below",
         "folder", "picture.png", "folder/new.png", "results", "results/mlp-s0/model.safetensors", "a/b", "..",
         "../up", ".", ".hidden", "-x", "a b", "ü/名", "new\nline", "x" * 300, "nul\0nul", "\udcff", "\udcff.png",
         "*", "\x1b[2J", "results/mlp-s0/../../file")
foreign_text = st.binary(max_size=12).map(os.fsdecode).filter(lambda text: not text.startswith("/"))  # as argv has it
wild_values = st.one_of(st.sampled_from(("", *NUMBERS, *NAMES)), foreign_text)


def sane_values(action: argparse.Action, *, light: bool) -> st.SearchStrategy[str]:
    """Values of the right kind; of a setting those within its limits, the limits themselves and just outside."""
    if light and action.dest in LIGHT:
        return st.sampled_from(LIGHT[action.dest])
    if action.choices:
        return st.sampled_from(list(action.choices))
    if action.type in (None, Path, str):
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
    """Ways to give a flag, or positional words."""
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
def command_lines(draw: st.DrawFn, script: str, light: bool = False) -> list[str]:
    """Words for a script. Mostly what its parser takes, often something that it does not."""
    actions = [action for action in actions_of(script) if not (light and LIGHT.get(action.dest) == ())]
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


# ---------------------------------------------------------------------------------------------------------------------
# Where they are tried
# ---------------------------------------------------------------------------------------------------------------------


class Accepted(Exception):
    """All is well with the command line, and here the work would begin."""


def begin(*arguments: Any, **options: Any) -> None:
    raise Accepted


def on_paper(script: Script, chosen: Settings, split: Split, num_outputs: int) -> None:
    """The place of `new_model`: the network is built without memory for its weights."""
    require_memory(lambda: script.build_model(chosen, num_outputs), chosen.device)


def save_nothing(figure: Any, path: Path) -> None:
    runs.write_text(path, "a figure\n")


@pytest.fixture(scope="module", autouse=True)
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with a finished run of each script and things that must not be harmed; a hundred pictures a split."""
    home = tmp_path_factory.mktemp("world") / "home"
    (home / "folder").mkdir(parents=True)
    Image.new("RGB", (40, 30), "red").save(home / "picture.png")
    (home / "file").write_text("precious\n")
    (home / "README.md").write_text("precious\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "PER_CLASS", dict.fromkeys(synthetic.PER_CLASS, 1))
        patch.setattr(synthetic, "make_synthetic", functools.cache(synthetic.make_synthetic))
        patch.setattr(utils, "_download", no_network)
        for file, script in TRAINING.items():
            for recipe, chosen in script.recipes.items():
                patch.setitem(script.recipes, recipe, {**chosen, **SMALL[file]})
            patch.setitem(script.overfit, "epochs", 2)
        patch.setattr(runs, "provenance", functools.cache(provenance))
        patch.setattr(overfit, "provenance", runs.provenance)
        patch.setattr(runs, "save_figure", save_nothing)
        patch.setattr(sanity_checks, "TRAIN_PICTURES", 100)
        patch.setattr(runs, "learning_curves", lambda *arguments, **options: None)
        for module in (overfit, explore, sanity_checks, tune):
            patch.setattr(module, "save_figure", save_nothing)
            for figure in [name for name in vars(module) if name.endswith("_figure") and name != "save_figure"]:
                patch.setattr(module, figure, lambda *arguments: None)
        patch.setattr("hardware.machine_facts", functools.cache(lambda device: {"processor": "one", "threads": 1}))
        patch.setattr(engine, "machine_facts", lambda device: {"processor": "one", "threads": 1})
        patch.setattr("hardware.seconds_per_call", lambda function, budget: (function(), 1.0)[1])
        with chdir(home):
            for script in TRAINING:
                assert main_of(script)([*HERE, "--results-dir", "results"]) == 0
        for name in ("mlp-s0", "fast-s0"):
            (home / "results" / name / ".lock").unlink()
        shutil.copytree(home / "results" / "mlp-s0", home / "results" / "half")
        (home / "results" / "half" / "result.json").unlink()
        yield home


def no_network(folder: Path) -> None:
    raise UserError("there is no network here")


@pytest.fixture
def without_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a script would begin to work, it is at its end."""
    result = {"val_acc": 1.0, "train_seconds": 1.0, "train_flops": 1, "images_per_second": 1.0}
    outcome = overfit.Outcome((2.0, 1.0), 1, 2)
    for module in (engine, overfit, tune):
        monkeypatch.setattr(module, "new_model", on_paper)
    for module in (engine, tune):
        monkeypatch.setattr(module, "choose_precision", lambda model, split, chosen: chosen)
    monkeypatch.setattr(engine, "train", lambda *arguments, **options: result)
    monkeypatch.setattr(overfit, "memorise", lambda *arguments, **options: outcome)
    monkeypatch.setattr(tune, "train", begin)
    monkeypatch.setattr(sanity_checks, "make_subject", begin)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(torch.onnx, "export", begin)
    monkeypatch.setattr("benchmarks.cost.measure", begin)
    monkeypatch.setattr("benchmarks.cost.measured_alone", begin)
    monkeypatch.setattr("benchmarks.loader.median_speeds", begin)
    monkeypatch.setattr("benchmarks.scaling.machine_facts", begin)
    monkeypatch.setattr("benchmarks.overfit_riddle.row", begin)
    monkeypatch.setattr("benchmarks.time_to_accuracy.contestants", begin)


WRITTEN: list[str] | None = None  # while a command line is tried, the paths that are opened to be written


def note(event: str, arguments: tuple[Any, ...]) -> None:
    if WRITTEN is None:
        return
    if event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        WRITTEN.append(os.fsdecode(arguments[0]))
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
        WRITTEN.extend(os.fsdecode(path) for path in arguments[:2] if isinstance(path, (str, bytes, Path)))


sys.addaudithook(note)  # for good, since Python has no way to take it back


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "half" not in path.parts}


def attempt(script: str, argv: list[str], world: Path, folder: Path) -> int | None:
    """Try a command line in a new copy of the world in `folder`; the exit status, or None if work would have begun.

    Fails if anything but a status, and the one line that 2 comes with, is what the user sees, if anything was written
    elsewhere, or if a file that was there is another now.
    """
    global WRITTEN
    home = folder / "one" / "two" / "home"  # deep enough for "..": what is written there is seen, and does no harm
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(world, home)
    before = contents(home)
    output, errors = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    status: Any = None
    with pytest.MonkeyPatch.context() as patch, chdir(home):
        for module in [module for name, module in sys.modules.items() if hasattr(module, "RESULTS_DIR")]:
            patch.setattr(module, "RESULTS_DIR", home / "results")
        patch.setattr("evaluate.ROOT", home)
        patch.setenv("CIFAR100_DIR", str(home / "data"))
        WRITTEN = []
        try:
            with redirect_stdout(output), redirect_stderr(errors):
                status = exit_status(lambda: main_of(script)(argv))
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
    return status


def try_all(script: str, examples: int, world: Path, folder: Path, *, light: bool = False) -> list[int | None]:
    """Try so many command lines, the same ones every time; returns what became of them."""
    outcomes = []

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))
    @given(command_lines(script, light=light))
    def holds(argv: list[str]) -> None:
        outcomes.append(attempt(script, [*argv, *HERE] if light else argv, world, folder))

    holds()
    return outcomes


# ---------------------------------------------------------------------------------------------------------------------
# The tests
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_work")
@pytest.mark.parametrize("script", SCRIPTS)
def test_no_command_line_brings_a_traceback(script: str, small_world: Path, tmp_path: Path) -> None:
    outcomes = try_all(script, 60, small_world, tmp_path / "try")
    assert 2 in outcomes


@pytest.mark.parametrize("script", TRAINING)
def test_settings_in_all_combinations_are_trained_with_or_refused(
    script: str, small_world: Path, tmp_path: Path
) -> None:
    outcomes = try_all(script, 60, small_world, tmp_path / "try", light=True)
    assert {0, 2} <= set(outcomes)


@pytest.mark.slow
@pytest.mark.usefixtures("without_work")
@pytest.mark.parametrize("script", SCRIPTS)
def test_no_command_line_of_many_brings_a_traceback(script: str, small_world: Path, tmp_path: Path) -> None:
    try_all(script, 150, small_world, tmp_path / "try")


@pytest.mark.slow
@pytest.mark.parametrize("script", TRAINING)
def test_settings_in_many_combinations_are_trained_with_or_refused(
    script: str, small_world: Path, tmp_path: Path
) -> None:
    try_all(script, 120, small_world, tmp_path / "try", light=True)


@pytest.mark.usefixtures("without_work")
@pytest.mark.parametrize(("script", "argv", "named"), [
    ("train_mlp.py", ("--epochs", str(10**12)), "--epochs must be at most 1000000"),  # was a list of so many
    ("train_mlp.py", ("--batch-size", "9" * 400), "--batch-size must be at most 50000"),  # was a division that gave 0
    ("train_mlp.py", ("--seed", str(10**30)), "--seed must be at most"),
    ("train_mlp.py", ("--seeds", f"0,{10**30}"), "--seed must be at most"),  # before anything is trained
    ("train_mlp.py", ("--seed", "9" * 5000), "--seed"),
    ("train_mlp.py", ("--lr", "1e39"), "--lr must be at most 1e+30"),  # no float32
    ("train_mlp.py", ("--weight-decay", "1e39"), "--weight-decay must be at most"),
    ("train_mlp.py", ("--mixup", "1e-300"), "--mixup must be 0 or at least"),  # a float32 of 0
    ("train_mlp.py", ("--lr=--",), "--lr"),  # to argparse an empty list
    ("train_mlp.py", ("--results-dir", ""), "give a value"),  # was the current folder
    ("train_mlp.py", ("--results-dir", "a\0b"), "give a value"),
    ("train_mlp.py", ("--synthetic", "--results-dir", "file"), "file"),
    ("train_mlp.py", ("--synthetic", "--results-dir", "file/below"), "file"),
    ("train_mlp.py", ("--optimizer", "adamw", "--other-lr", "0.1"), "--other-lr means nothing with --optimizer adamw"),
    ("train_mlp.py", ("--alternate", "--no-flip"), "--alternate means nothing with --no-flip"),
    ("train_cnn.py", ("--model", "convnet", "--depth", "16"), "--depth means nothing with --model convnet"),
    ("train_cnn.py", ("--model", "resnet18", "--widths", "8,8"), "--widths means nothing with --model resnet18"),
    ("train_cnn.py", ("--model", "original_cnn", "--sides", "16"), "--sides means nothing with --model original_cnn"),
    ("train_cnn.py", ("--widths", "8,8"), "--widths and --blocks"),
    ("train_cnn.py", ("--model", "wide_resnet", "--depth", "27"), "--depth must be 6n + 4"),
    ("explore.py", ("--data-dir=",), "--data-dir"),
    ("evaluate.py", ("--publish", "../overfit_batch/mlp"), "no name of a run"),  # replaced its own source
    ("sanity_checks.py", ("--seed", "-1"), "--seed must be at least 0"),  # before the data set is looked for
    ("benchmarks/loader.py", ("--batch-size", str(10**9)), "--batch-size must be 1 to 50000"),
    ("benchmarks/time_to_accuracy.py", ("--figure", "README.md"), "--figure"),  # was replaced
    ("benchmarks/time_to_accuracy.py", ("--figure", "/dev/null"), "--figure"),
    ("benchmarks/time_to_accuracy.py", ("--figure", "missing/a.png"), "--figure"),  # after minutes
])
def test_what_was_once_a_traceback_or_went_unnoticed_is_refused(
    script: str, argv: tuple[str, ...], named: str, small_world: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert attempt(script, list(argv), small_world, tmp_path / "try") == 2
    with chdir(tmp_path / "try" / "one" / "two" / "home"):
        exit_status(lambda: main_of(script)([*argv]))
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", "{}", "null", "7", "[1]", "[{}]", '[{"recipe": []}]', '[{"recipe": "mlp"}]',
                                     '[{"recipe": "mlp", "train_seconds": [], "machines": []}]', "[", "\udcff"])
def test_damaged_results_do_not_keep_a_training_from_its_flags(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_bytes(os.fsencode(content))
    monkeypatch.setattr("settings.RESULTS_DIR", tmp_path)
    with pytest.raises(SystemExit):
        train_mlp.main(["--help"])
    assert "not measured" in capsys.readouterr().out


def test_a_folder_whose_name_is_no_text_is_written_to(small_world: Path, tmp_path: Path) -> None:
    assert attempt("train_mlp.py", [*HERE, "--results-dir", "\udcff"], small_world, tmp_path / "try") == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
def test_help_on_a_full_disk_is_one_error_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "train_mlp.py", "--help"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE,
                              text=True)
    assert done.returncode != 0
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
