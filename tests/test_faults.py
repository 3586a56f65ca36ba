"""What a training survives: being killed, damaged checkpoints, a full disk, a folder that is read-only or gone.

Processes are really killed and disks really full (to a process that may not write so much). Those of twenty kills take
minutes: `python -m pytest -m slow`.
"""

import ctypes
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import runs
from tests.helpers import (
    ROOT,
    STEPS_PER_EPOCH,
    TINY,
    after_step,
    contents,
    drawn_once,  # noqa: F401 (a fixture)
    error_line,
    metrics,
    read_json,
    resume,
    run_names,
    same_weights,
    train_tiny,
)
from tests.processes import finished, kill, started, wait_until

CNN = ("--synthetic", "--widths", "8,16,16", "--sides", "16,20,32", "--batch-size", "500",
       "--precision", "float32", "--device", "cpu", "--threads", "1", "--quiet")  # 10 steps an epoch


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "save_figure", lambda figure, path: None)


# ---------------------------------------------------------------------------------------------------------------------
# Killed
# ---------------------------------------------------------------------------------------------------------------------


class Victim:
    """A training that is killed at moments of several kinds and resumed each time."""

    def __init__(self, results_dir: Path, epochs: int, chance: random.Random) -> None:
        self.results_dir, self.run, self.chance = results_dir, results_dir / "fast-s0", chance
        self.flags = (*CNN, "--epochs", str(epochs))
        self.hits: list[str] = []  # what was hit: files half written, else the kind of moment

    def live(self, moment: str | None) -> None:
        """Start or go on, until that moment or the end. The moments are

        start: within its first five seconds, at the latest after the first step; step: after a few more steps;
        write: while a checkpoint is written; epoch: when an epoch, and with it maybe a resolution, has just ended.
        """
        flags = ("--resume", "fast-s0", "--quiet") if (self.run / "config.json").exists() else self.flags
        with started("train_cnn.py", *flags, "--checkpoint-every", "0", "--results-dir",
                     str(self.results_dir)) as process:
            if moment is None:
                assert process.wait() == 0
                return
            if moment == "start":
                end, before = time.monotonic() + self.chance.uniform(0, 5), mtime(self.run / "checkpoint.pt")
                wait_until(lambda: time.monotonic() > end or mtime(self.run / "checkpoint.pt") != before, process)
            elif not self.wait_for(moment, process):
                pytest.fail(f"it ended before it could be killed: {process.stderr.read()}")
            kill(process)
        partial = [path.name for path in self.run.glob(".*.partial")] if self.run.exists() else []
        self.hits.append("half written" if partial else moment)

    def wait_for(self, moment: str, process: subprocess.Popen[str]) -> bool:
        checkpoint, table = self.run / "checkpoint.pt", self.run / "metrics.csv"

        def step() -> bool:
            """Whether a further step has been taken, each of which writes a checkpoint."""
            before = mtime(checkpoint)
            return wait_until(lambda: mtime(checkpoint) != before, process)

        going = all(step() for _ in range(self.chance.randint(1, 5)))
        if moment == "write":
            going = going and wait_until(lambda: any(self.run.glob(".checkpoint.pt.*.partial")), process)
        elif moment == "epoch":
            before = mtime(table)
            going = going and wait_until(lambda: mtime(table) != before, process)
        else:
            time.sleep(self.chance.uniform(0, 0.1))
        return going and process.poll() is None


def mtime(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def check_kills(results_dir: Path, moments: list[str], epochs: int, seed: int) -> list[str]:
    """Kill a training at all of these moments; it must end as one that nothing happened to. Returns what was hit."""
    victim = Victim(results_dir, epochs, random.Random(seed))
    for moment in moments:
        victim.live(moment)
        rows = metrics(victim.run) if (victim.run / "metrics.csv").exists() else []
        assert [row["epoch"] for row in rows] == [str(number + 1) for number in range(len(rows))]
    victim.live(None)
    whole = results_dir / "whole"
    assert finished("train_cnn.py", *victim.flags, "--name", "whole", "--results-dir", str(results_dir)).returncode == 0
    assert same_weights(victim.run, whole)
    assert metrics(victim.run) == metrics(whole)
    ends = [read_json(run / "result.json") for run in (victim.run, whole)]
    same = ("train_loss", "train_acc", "val_loss", "val_acc", "epochs", "train_flops")
    assert [ends[0][name] for name in same] == [ends[1][name] for name in same]
    assert set(contents(victim.run)) == set(contents(whole))  # nothing half written is left
    return victim.hits


def test_a_training_killed_while_it_writes_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    check_kills(tmp_path, ["write"], epochs=1, seed=0)


@pytest.mark.slow
def test_a_training_killed_at_twenty_moments_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    moments = ["start", "write", "step", "epoch", "write"] * 4
    hits = check_kills(tmp_path, moments, epochs=12, seed=1)
    assert len(hits) == 20
    assert "half written" in hits


# ---------------------------------------------------------------------------------------------------------------------
# Stopped
# ---------------------------------------------------------------------------------------------------------------------


SLOW_STEPS = """
import signal, sys, time, engine, train_mlp
from settings import exit_status
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts with & ignore it
step = engine.training_step
def slow_step(*arguments):
    outcome = step(*arguments)
    print("a step", flush=True)
    time.sleep(30)
    return outcome
engine.training_step = slow_step
sys.exit(exit_status(lambda: train_mlp.main(sys.argv[1:])))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_second_signal_ends_it_at_once(number: signal.Signals, tmp_path: Path) -> None:
    with started("-c", SLOW_STEPS, *TINY, "--results-dir", str(tmp_path)) as process:
        assert any(line == "a step\n" for line in process.stdout)
        process.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):  # it waits for the end of the step
            process.wait(0.5)
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert process.returncode in (128 + number, -number)  # for a shell both are 128 + number
    assert "Traceback" not in errors
    assert not (tmp_path / "mlp-s0" / "checkpoint.pt").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Damaged
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A run that was stopped after its third step with a checkpoint after each, and the weights it should end with."""
    with monkeypatch.context() as patch:
        after_step(patch, 3, lambda: signal.raise_signal(signal.SIGINT))
        assert train_tiny(tmp_path, "--checkpoint-every", "0") == 130
    assert train_tiny(tmp_path, "--name", "whole") == 0
    capsys.readouterr()
    return tmp_path / "mlp-s0"


def steps(path: Path) -> int:
    return torch.load(path, weights_only=True)["progress"]["step"]


def ends_as_the_whole(run: Path) -> bool:
    assert resume(run.parent, run.name) == 0
    return same_weights(run, run.parent / "whole") and metrics(run) == metrics(run.parent / "whole")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def flip_a_bit_at_the_end(path: Path) -> None:
    """Where the archive says where its directory is."""
    content = bytearray(path.read_bytes())
    content[-45] ^= 1
    path.write_bytes(content)


def flip_a_bit(path: Path) -> None:
    """In the middle of the file, where the weights are."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_the_previous_checkpoint_is_kept_until_the_run_is_finished(stopped: Path) -> None:
    assert (steps(stopped / "checkpoint.pt"), steps(stopped / "checkpoint-previous.pt")) == (3, 2)
    assert ends_as_the_whole(stopped)
    assert not (stopped / "checkpoint-previous.pt").exists()


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, flip_a_bit_at_the_end, lambda path: path.write_bytes(b""),
                                    lambda path: path.write_text("x" * 5000)])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    damage: object, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(stopped / "checkpoint.pt")
    assert ends_as_the_whole(stopped)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and "checkpoint.pt is damaged" in line


def test_the_next_checkpoint_does_not_push_out_the_only_good_one(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power goes again during the first checkpoint after a damaged one was passed over."""
    truncate(stopped / "checkpoint.pt")
    with monkeypatch.context() as patch:
        after_step(patch, 1, lambda: signal.raise_signal(signal.SIGINT))
        assert resume(stopped.parent, stopped.name) == 130
    truncate(stopped / "checkpoint.pt")
    assert ends_as_the_whole(stopped)


def test_a_training_killed_between_the_two_renamings_goes_on(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (stopped / "checkpoint.pt").rename(stopped / "checkpoint-previous.pt")
    assert ends_as_the_whole(stopped)
    assert capsys.readouterr().err == ""


def test_if_both_checkpoints_are_damaged_nothing_is_trained(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truncate(stopped / "checkpoint.pt")
    flip_a_bit(stopped / "checkpoint-previous.pt")
    before = contents(stopped)
    assert resume(stopped.parent, stopped.name) == 2
    line = error_line(capsys)
    assert "checkpoint.pt" in line and "checkpoint-previous.pt" in line and "delete both" in line
    assert contents(stopped) == before


# ---------------------------------------------------------------------------------------------------------------------
# No room, no right, no folder
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def disk_full_above(size: int) -> Iterator[None]:
    """No file may grow above `size` bytes: the system's limit, at which a write fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_nothing_but_the_steps_since_the_last_checkpoint(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, size = contents(stopped), (stopped / "checkpoint.pt").stat().st_size
    with disk_full_above(size // 2):
        assert resume(stopped.parent, stopped.name, "--checkpoint-every", "0") == 2
    line = error_line(capsys)
    assert "checkpoint.pt" in line and "full" in line
    assert contents(stopped) == before
    assert ends_as_the_whole(stopped)


@pytest.mark.parametrize("size", [0, 100])
def test_no_run_is_begun_on_a_full_disk(size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with disk_full_above(size):
        assert train_tiny(tmp_path) == 2
    error_line(capsys)
    assert run_names(tmp_path) == []


@pytest.mark.parametrize("file", ["checkpoint.pt", "metrics.csv", "model.safetensors", "result.json"])
def test_whatever_cannot_be_written_the_run_can_be_finished_later(
    file: str, stopped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flush = runs._flush

    def full(path: Path) -> None:
        if file in path.name:
            raise OSError(28, os.strerror(28))
        flush(path)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "_flush", full)
        assert resume(stopped.parent, stopped.name) == 2
    assert file in error_line(capsys)
    assert ends_as_the_whole(stopped)


def test_a_network_too_large_for_the_machine_is_not_even_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_tiny(tmp_path, "--widths", ",".join(["65536"] * 9)) == 2
    assert "GiB of memory" in error_line(capsys)
    assert run_names(tmp_path) == []


def test_words_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "train_mlp.py", *TINY, "--results-dir", str(tmp_path)], cwd=ROOT,
                              stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "full" in line


def test_a_reader_who_has_enough_ends_it_without_a_word(tmp_path: Path) -> None:
    with started("train_mlp.py", *TINY, "--results-dir", str(tmp_path)) as process:
        process.stdout.close()  # as `| head` does
        errors = process.stderr.read()
        process.wait()
    assert process.returncode == 128 + signal.SIGPIPE
    assert errors == ""


@pytest.mark.slow
def test_closed_streams_are_no_matter(tmp_path: Path) -> None:
    noisy = [word for word in TINY if word != "--quiet"]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, "train_mlp.py", *noisy,
                           "--results-dir", str(tmp_path)], cwd=ROOT, timeout=60)
    assert done.returncode == 0
    assert (tmp_path / "mlp-s0" / "result.json").exists()


def without_the_right_to_write_anywhere() -> None:
    """Root may write what is read-only: let the process that is started next not have that privilege."""
    PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1
    if os.geteuid() == 0:
        assert ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0) == 0


def test_a_read_only_results_folder_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        done = finished("train_mlp.py", *TINY, "--results-dir", str(tmp_path),
                        preexec_fn=without_the_right_to_write_anywhere)
    finally:
        tmp_path.chmod(0o755)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "read-only" in line
    assert run_names(tmp_path) == []


@pytest.mark.slow
def test_a_read_only_run_keeps_its_checkpoint(stopped: Path) -> None:
    before = contents(stopped)
    stopped.chmod(0o555)
    try:
        done = finished("train_mlp.py", "--resume", stopped.name, "--quiet", "--results-dir", str(stopped.parent),
                        preexec_fn=without_the_right_to_write_anywhere)
    finally:
        stopped.chmod(0o755)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert contents(stopped) == before
    assert ends_as_the_whole(stopped)


@pytest.mark.parametrize("gone", ["mlp-s0", "."])  # the run's folder, and that of all runs
def test_a_results_folder_that_vanishes_is_one_line(
    gone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results_dir = tmp_path / "results"
    with monkeypatch.context() as patch:
        after_step(patch, STEPS_PER_EPOCH + 2, lambda: shutil.rmtree(results_dir / gone))
        assert train_tiny(results_dir) == 2
    assert "gone" in error_line(capsys)
