"""The first minutes of a training as its user sees them: news, choices, progress, the next command, and trackers."""

import dataclasses
import inspect
import io
import json
import platform
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch

import predict
import train_cnn
import train_mlp
from common.command_line import exit_status
from common.files import ROOT
from common.run_files import METRICS
from models import create_model
from tests.helpers import (
    TINY,
    after_step,
    drawn_once,  # noqa: F401 (a fixture)
    error_line,
    metrics,
    read_json,
    resume,
    run_names,
    run_script,
    train_tiny,
)
from training import hardware, loop, overfit, run_folder
from training.checkpoint import Progress
from training.distributed import ALONE
from training.flags import parse_command_line
from training.hardware import choose_precision, choose_threads, prepare_device, seconds_per_call
from training.losses import LOSSES
from training.run_folder import RunFolder
from training.settings import Script, Settings
from utils import load_cifar100

TALKING = [word for word in TINY if word != "--quiet"]


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "save_figure", lambda figure, path: None)


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Terminal(io.StringIO):
    """A terminal in the place of stderr, where progress bars go."""

    def isatty(self) -> bool:
        return True


# ---- The start ------------------------------------------------------------------------------------------------------


def test_a_training_says_what_it_does_before_it_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            said.append(capsys.readouterr().out)
            return function(*arguments, **options)
        return call

    monkeypatch.setattr(train_mlp, "load_cifar100", noted(load_cifar100))
    monkeypatch.setattr(loop, "new_model", noted(loop.new_model))
    monkeypatch.setattr(hardware, "TRIAL_SECONDS", 0.01)
    assert run_script(tmp_path, *TALKING, "--epochs", "1", "--precision", "auto") == 0
    assert said == ["loading SYNTHETIC images (not CIFAR-100)\n",
                    "building the network, and timing float32 against bfloat16\n"]
    start = capsys.readouterr().out.splitlines()[0]
    assert re.search(r" (float32|bfloat16) on cpu with 1 thread \((\1 is \d\.\d times as fast as \w+|bfloat16 is not "
                     r"clearly faster) here\), in ", start)


def test_quiet_leaves_only_start_epochs_and_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_tiny(tmp_path) == 0
    output, errors = capsys.readouterr()
    assert [line.split()[0] for line in output.splitlines()] == ["mlp-s0:", "epoch", "epoch", "mlp-s0", "train"]
    assert errors == ""


def timed_as(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[str, int], float]) -> list[tuple[str, int, int]]:
    """Let steps take `seconds(precision, threads)`; returns a list of what is timed: precision, threads, images."""
    timed: list[tuple[str, int, int]] = []

    def per_call(step: Any, budget: float, enough: float = 1.0) -> float:
        images, precision = step.args[-2:]  # of _trial_step
        timed.append((precision, torch.get_num_threads(), images))
        return seconds(precision, torch.get_num_threads())

    monkeypatch.setattr(hardware, "seconds_per_call", per_call)
    return timed


@pytest.mark.parametrize(("bfloat16", "chosen", "reason", "sizes"), [
    (0.5, "bfloat16", "bfloat16 is 2.0 times as fast as float32 here", {16}),
    (0.8, "bfloat16", "bfloat16 is 1.2 times as fast as float32 here", {16, 256}),
    (3.0, "float32", "float32 is 3.0 times as fast as bfloat16 here", {16, 256}),
    (0.95, "float32", "bfloat16 is not clearly faster here", {16, 256}),
    (50.0, "float32", "float32 is 50.0 times as fast as bfloat16 here", {16}),
])
@pytest.mark.usefixtures("two_threads")
def test_the_faster_precision_is_chosen_with_its_reason(
    bfloat16: float, chosen: str, reason: str, sizes: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = timed_as(monkeypatch, lambda precision, threads: bfloat16 if precision == "bfloat16" else 1.0)
    split, _ = load_cifar100("", use_synthetic=True)
    settings = prepare_device(train_mlp.MLPSettings(device="cpu"))
    found = choose_precision(create_model("mlp", widths=(8,)), split, settings, ALONE)
    assert found == (dataclasses.replace(settings, precision=chosen), reason)
    assert {(threads, images) for _, threads, images in timed} == {(1, size) for size in sizes}
    assert torch.get_num_threads() == 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only for the GNU C library")
def test_a_training_keeps_freed_memory_for_its_next_step(tmp_path: Path) -> None:
    """In a process of its own: only the memory of its main thread, which trains, is kept."""
    count_faults = """if True:
        import resource, sys, torch, train_mlp
        train_mlp.main(sys.argv[1:])
        for _ in range(6):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(2**24)  # 64 MB, or 16,384 pages
            print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    done = subprocess.run([sys.executable, "-c", count_faults, *TINY, "--results-dir", tmp_path], cwd=ROOT,
                          capture_output=True, text=True, timeout=100)
    assert min(map(int, done.stdout.split()[-6:])) < 100, done.stderr


@pytest.mark.parametrize(("one", "every", "batch_size", "brief", "chosen"), [
    (0.004, 0.040, 64, False, 1),  # short steps, and a busy machine
    (0.004, 0.003, 64, False, 2),
    (0.004, 0.0039, 64, False, 2),  # within the noise
    (0.004, 0.040, 2000, False, 2),  # 64 images in 4 ms: a step takes long
    (0.150, 1.500, 64, False, 2),  # long steps take all cores, whatever the load is now
    (0.150, 1.500, 64, True, 1),
])
@pytest.mark.usefixtures("two_threads")
def test_one_thread_is_taken_for_short_steps_if_faster(
    one: float, every: float, batch_size: int, brief: bool, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed_as(monkeypatch, lambda precision, threads: one if threads == 1 else every)
    split, _ = load_cifar100("", use_synthetic=True)
    settings = prepare_device(train_mlp.MLPSettings(device="cpu", precision="float32", batch_size=batch_size))
    found, reason = choose_threads(create_model("mlp", widths=(8,)), split, settings, brief=brief)
    assert found == dataclasses.replace(settings, threads=chosen)
    assert torch.get_num_threads() == chosen
    assert reason == ("one thread is 10.0 times as fast as 2 now" if chosen == 1 else "")


@pytest.mark.usefixtures("two_threads")
def test_a_chosen_thread_gives_the_same_bits_as_a_given_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whitening of the CNN depends on the threads, so the network must be built with the chosen number."""
    timed_as(monkeypatch, lambda precision, threads: 0.001 * threads)
    split, _ = load_cifar100("", use_synthetic=True)
    settings = train_cnn.CNNSettings(device="cpu", precision="float32", batch_size=8, widths=(8, 8, 8),
                                     inner=(8, 8, 8))
    built = []
    for threads in (0, 1):
        torch.set_num_threads(2)
        model, chosen, _ = loop.prepare(train_cnn.SCRIPT, dataclasses.replace(settings, threads=threads), split,
                                        quiet=True)
        assert chosen.threads == torch.get_num_threads() == 1
        built.append(model.state_dict())
    assert all(torch.equal(tensor, built[1][name]) for name, tensor in built[0].items())


@pytest.mark.usefixtures("two_threads")
def test_switching_threads_back_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    model, images = create_model("mlp", widths=(256, 256)), torch.rand(500, 3, 32, 32)
    outputs = []
    for threads in (2, 1, 2):
        torch.set_num_threads(threads)
        outputs.append(model(images))
    assert torch.equal(outputs[0], outputs[2])


def test_the_chosen_threads_are_recorded_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_thread(model: Any, split: Any, settings: Settings, **options: Any) -> tuple[Settings, str]:
        asked.append(settings.seed)
        return dataclasses.replace(settings, threads=1), "a reason"

    asked: list[int] = []
    monkeypatch.setattr(loop, "choose_threads", one_thread)
    automatic = ("--threads", "0", "--epochs", "1")
    assert train_tiny(tmp_path, *automatic, "--seeds", "3,4") == 0
    assert asked == [3]  # the second run shares the choice
    for seed in (3, 4):
        assert read_json(tmp_path / f"mlp-s{seed}" / "config.json")["settings"]["threads"] == 1
    assert resume(tmp_path, "mlp-s3") == 0
    assert asked == [3]


def test_a_first_call_that_says_enough_is_the_only_one() -> None:
    calls = []
    seconds_per_call(lambda: calls.append(1), budget=0.01, enough=0.0)
    assert len(calls) == 1
    seconds_per_call(lambda: calls.append(1), budget=0.0, enough=9.0)
    assert len(calls) == 3


# ---- Progress -------------------------------------------------------------------------------------------------------


def test_the_bar_shows_epoch_share_speed_and_loss() -> None:
    with redirect_stderr(Terminal()) as screen:
        bar = loop.progress_bar(1e12, 0.42e12, disable=False)
        loop.show_progress(bar, Progress(epoch=2, images=2200, loss=2200 * 2.314, seconds=2.0), Settings(epochs=9))
        bar.close()
    last = screen.getvalue().strip().split("\r")[-1]
    assert re.fullmatch(r"epoch 3/9 \|.+\| 42% of the training, 1,100 images/s, loss 2\.31, ETA \S+", last)


def test_the_overfit_bar_shows_its_loss_and_stays() -> None:
    settings = Settings(epochs=3, optimizer="adam", batch_size=2)
    images, labels = torch.rand(2, 3, 32, 32), torch.tensor([1, 2])
    with redirect_stderr(Terminal()) as screen:
        overfit.memorize(create_model("mlp", widths=(8,)), images, labels, LOSSES["cross-entropy"], settings)
    *_, last = screen.getvalue().split("\r")
    assert re.fullmatch(r"cross-entropy \|.+\| 3/3 steps, loss \d\.\d+, ETA 00:00\s*\n", last)


def test_outside_a_terminal_there_is_no_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script(tmp_path, *TALKING, "--epochs", "1") == 0
    assert capsys.readouterr().err == ""


# ---- The end --------------------------------------------------------------------------------------------------------


def last_lines(script: Script, results_dir: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> list[str]:
    """The output of `print_result` for a run with these flags that somehow got finished."""
    settings = parse_command_line(script, list(flags)).settings
    with RunFolder.create(results_dir, settings, None, script, processes=1) as run:
        run.finish(create_model("mlp", widths=(8,)), [dict.fromkeys(METRICS, 1.0)],
                   {"val_acc": 1.0, "train_seconds": 1.0, "train_flops": 1, "images_per_second": 1.0})
        run.print_result()
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(("script", "flags", "step"), [
    (train_mlp.SCRIPT, "", "try next: python train_cnn.py"),
    (train_mlp.SCRIPT, "--epochs 5", "train for all 60 epochs: python train_mlp.py --seed 0"),
    (train_mlp.SCRIPT, "--epochs 5 --synthetic", "train on CIFAR-100: python train_mlp.py --seed 0"),
    (train_cnn.SCRIPT, "--epochs 1 --model resnet18 --seed 3",
     "train for all 13 epochs: python train_cnn.py --model resnet18 --seed 3"),
    (train_mlp.SCRIPT, "--train-on-all --epochs 5", "measure it on the test set: python evaluate.py mlp-s0"),
    (train_cnn.SCRIPT, "", "try next: python train_cnn.py --recipe strong"),
    (train_cnn.SCRIPT, "--recipe strong --epochs 1",
     f"train for all {train_cnn.RECIPES['strong']['epochs']} epochs: python train_cnn.py --recipe strong --seed 0"),
    (train_cnn.SCRIPT, "--recipe original", "try next: python train_cnn.py"),
    (train_cnn.SCRIPT, "--recipe strong", "try next: python train_cnn.py --recipe best"),
    (train_cnn.SCRIPT, "--recipe best",
     "classify an image with it: python predict.py docs/figures/drawing.png --model best-s0"),
])
def test_a_finished_run_names_the_next_step(
    script: Script, flags: str, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    lines = last_lines(script, tmp_path, capsys, *flags.split())
    assert len(lines) <= 3
    assert lines[-1] == f"{step} --results-dir {tmp_path}"


def test_the_next_step_of_a_run_works_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = last_lines(train_cnn.SCRIPT, tmp_path / "runs", capsys, "--recipe", "best")[-1]
    words = shlex.split(line.partition(": ")[2])
    assert words[:2] == ["python", predict.__file__]
    assert exit_status(lambda: predict.main(words[2:])) == 0
    assert "drawing.png" in capsys.readouterr().out


# ---- TensorBoard and other trackers ---------------------------------------------------------------------------------


def scalars(run: Path) -> dict[str, dict[int, float]]:
    """The values that TensorBoard shows of a run, by name and step. Fails if a step comes twice."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run)).Reload()
    shown = {}
    for name in reader.Tags()["scalars"]:
        events = reader.Scalars(name)
        shown[name] = {event.step: event.value for event in events}
        assert len(shown[name]) == len(events)
    return shown


def numbers_of(run: Path) -> dict[str, dict[int, float]]:
    rows = metrics(run, without=())
    return {name: {int(row["epoch"]): pytest.approx(float(row[name]), rel=1e-5) for row in rows}
            for name in METRICS if name != "epoch" and rows[0][name]}


def test_tensorboard_shows_the_numbers_of_metrics_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")

    class Crash(Exception):
        pass

    def crash() -> None:
        raise Crash

    def fails_in_step(number: int, train: Callable[[], int]) -> None:
        with monkeypatch.context() as patch, pytest.raises(Crash):
            after_step(patch, number, crash)
            train()

    run = tmp_path / "mlp-s0"
    flags = ("--epochs", "4", "--checkpoint-every", "60")
    fails_in_step(25, lambda: train_tiny(tmp_path, *flags, "--tensorboard"))  # two epochs, and no checkpoint
    assert scalars(run) == numbers_of(run)
    assert set(scalars(run)["val_acc"]) == {1, 2}
    fails_in_step(15, lambda: resume(tmp_path, "mlp-s0"))  # from the beginning; the setting is kept
    assert scalars(run) == numbers_of(run)
    assert resume(tmp_path, "mlp-s0") == 0
    assert scalars(run) == numbers_of(run)
    assert set(scalars(run)) == {*METRICS} - {"epoch"}


def test_tensorboard_may_be_added_to_a_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    with monkeypatch.context() as patch:
        after_step(patch, 15, lambda: loop.signal.raise_signal(loop.signal.SIGINT))
        assert train_tiny(tmp_path, "--train-on-all") == 130
    assert resume(tmp_path, "mlp-s0", "--tensorboard") == 0
    assert scalars(tmp_path / "mlp-s0") == numbers_of(tmp_path / "mlp-s0")
    assert set(scalars(tmp_path / "mlp-s0")["lr"]) == {1, 2}
    assert "val_acc" not in scalars(tmp_path / "mlp-s0")


def test_without_its_package_tensorboard_starts_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it raises ImportError
    assert train_tiny(tmp_path, "--tensorboard") == 2
    assert "pip install tensorboard" in error_line(capsys)
    assert run_names(tmp_path) == []


def test_a_run_older_than_a_machine_setting_is_resumed(tmp_path: Path) -> None:
    assert train_tiny(tmp_path, "--epochs", "1") == 0
    path = tmp_path / "mlp-s0" / "config.json"
    config = read_json(path)
    del config["settings"]["tensorboard"]
    path.write_text(json.dumps(config))
    assert resume(tmp_path, "mlp-s0") == 0


def test_the_hook_for_other_trackers_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines in CONTRIBUTING.md, put where it says, with a package that only notes what it gets."""
    document = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    hook = re.search(r"```python\n(import wandb\n.*?)```", document, re.DOTALL)[1]

    class Tracker:
        def __enter__(self) -> "Tracker":
            return self

        def __exit__(self, *exception: object) -> None:
            noted.append("closed")

        def log(self, row: dict[str, Any]) -> None:
            noted.append((row["epoch"], row["val_acc"]))

    def init(project: str, name: str, config: dict[str, Any]) -> Tracker:
        noted.append((name, config["epochs"]))
        return Tracker()

    noted: list[Any] = []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    (line,) = re.findall(r"\n( +)(train\(model, .*)\n", inspect.getsource(train_mlp))
    indented = "".join(line[0] + words for words in hook.splitlines(keepends=True))
    edited = inspect.getsource(train_mlp).replace(f"{line[0]}{line[1]}\n", indented)
    script = types.ModuleType("edited")
    exec(compile(edited, "edited", "exec"), script.__dict__)
    assert script.main([*TINY, "--results-dir", str(tmp_path)]) == 0
    accuracies = [(int(row["epoch"]), pytest.approx(float(row["val_acc"]))) for row in metrics(tmp_path / "mlp-s0")]
    assert noted == [("mlp-s0", 2), *accuracies, "closed"]

