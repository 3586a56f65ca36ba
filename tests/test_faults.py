"""Crash safety: kills, signals, damaged checkpoints, full disks, and folders that are read-only or gone.

Processes are really killed, and disks are really full (to a process that may write no more). The test with twenty kills
takes minutes: `make test-slow`.
"""

import ctypes
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import pytest

import predict
import train_cnn
from common import files
from common.command_line import exit_status
from common.errors import UserError
from tests.helpers import (
    MACHINE,
    ROOT,
    STEPS_PER_EPOCH,
    TINY,
    after_step,
    contents,
    drawn_once,  # noqa: F401 (a fixture)
    edit_settings,
    error_line,
    metrics,
    read_json,
    resume,
    run_names,
    same_weights,
    train_tiny,
)
from tests.processes import TIMEOUT, finished, kill, linux_only, posix_only, started, wait_until
from training import run_folder
from training.checkpoint import read_checkpoint

CHECKPOINT, PREVIOUS = "checkpoint.safetensors", "checkpoint-previous.safetensors"
CNN = ("--synthetic", "--widths", "8,16,16", "--inner", "8,8,8", "--sides", "16,20,32", "--batch-size", "500",
       "--refresh-norms", "500", *MACHINE)  # 10 steps per epoch


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "save_figure", lambda figure, path: None)


# ---- Kills ----------------------------------------------------------------------------------------------------------


class Victim:
    """A training that is killed several times, at moments of several kinds, and resumed after each kill."""

    def __init__(self, results_dir: Path, epochs: int, chance: random.Random) -> None:
        self.results_dir, self.run, self.chance = results_dir, results_dir / "fast-s0", chance
        self.checkpoint = self.run / CHECKPOINT
        self.start = (*CNN, "--epochs", str(epochs))
        self.hits: list[str] = []  # per kill: "half written" if it left a partial file, else the kind of moment

    def flags(self) -> tuple[str, ...]:
        """Flags that start the training, or resume it."""
        started_before = (self.run / "config.json").exists()
        flags = ("--resume", "fast-s0", "--quiet") if started_before else self.start
        return (*flags, "--checkpoint-every", "0", "--results-dir", str(self.results_dir))

    def run_and_kill(self, moment: str) -> None:
        """Start or resume the training and kill it at a moment of this kind:

        start: within five seconds, at the latest after the first step; step: a few steps later; write: while a
        checkpoint is written; epoch: when an epoch, and possibly a resolution, has just ended.
        """
        with started("train_cnn.py", *self.flags()) as process:
            if moment == "start":
                end, before = time.monotonic() + self.chance.uniform(0, 5), mtime(self.checkpoint)
                wait_until(lambda: time.monotonic() > end or mtime(self.checkpoint) != before, process)
            elif not self.wait_for(moment, process):
                pytest.fail(f"it ended before it could be killed: {process.stderr.read()}")
            kill(process)
        partial = self.run.exists() and any(self.run.glob(".*.partial"))
        self.hits.append("half written" if partial else moment)

    def wait_for(self, moment: str, process: subprocess.Popen[str]) -> bool:
        """Wait for that moment; returns whether the process still runs."""

        def change_of(path: Path) -> bool:
            before = mtime(path)
            return wait_until(lambda: mtime(path) != before, process)

        steps = self.chance.randint(1, 5)
        running = all(change_of(self.checkpoint) for _ in range(steps))  # each step writes one
        if moment == "write":
            running = running and wait_until(lambda: any(self.run.glob(f".{CHECKPOINT}.*.partial")), process)
        elif moment == "epoch":
            running = running and change_of(self.run / "metrics.csv")
        else:
            time.sleep(self.chance.uniform(0, 0.1))
        return running and process.poll() is None


def mtime(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def check_kills(results_dir: Path, moments: list[str], epochs: int, seed: int) -> list[str]:
    """Kill a training at all of these moments; it must end like an undisturbed one. Returns `Victim.hits`."""
    victim = Victim(results_dir, epochs, random.Random(seed))
    for moment in moments:
        victim.run_and_kill(moment)
        rows = metrics(victim.run) if (victim.run / "metrics.csv").exists() else []
        assert [row["epoch"] for row in rows] == [str(number + 1) for number in range(len(rows))]
    whole = results_dir / "whole"
    undisturbed = (*victim.start, "--name", "whole", "--results-dir", str(results_dir))
    for flags in (victim.flags(), undisturbed):
        assert exit_status(lambda flags=flags: train_cnn.main([*flags])) == 0
    assert same_weights(victim.run, whole)
    assert metrics(victim.run) == metrics(whole)
    results = [read_json(run / "result.json") for run in (victim.run, whole)]
    for name in ("train_loss", "train_acc", "val_loss", "val_acc", "epochs", "train_flops"):
        assert results[0][name] == results[1][name]
    left, right = (contents(run).keys() - {Path("loss.png")} for run in (victim.run, whole))
    assert left == right  # no partial file is left
    return victim.hits


@posix_only
def test_a_training_killed_while_writing_loses_nothing(tmp_path: Path) -> None:
    check_kills(tmp_path, ["write"], epochs=1, seed=0)


@posix_only
@pytest.mark.slow
def test_a_training_killed_twenty_times_loses_nothing(tmp_path: Path) -> None:
    hits = check_kills(tmp_path, ["start", "write", "step", "epoch", "write"] * 4, epochs=12, seed=1)
    assert len(hits) == 20
    assert "half written" in hits


SLOW_STEPS = """
import signal, sys, time, train_mlp
from common.command_line import exit_status
from training import loop
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts with & ignore it
step = loop.training_step
def slow_step(*arguments):
    outcome = step(*arguments)
    print("step", flush=True)
    time.sleep(30)
    return outcome
loop.training_step = slow_step
sys.exit(exit_status(lambda: train_mlp.main(sys.argv[1:])))
"""


@posix_only
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_second_signal_ends_a_training_at_once(number: signal.Signals, tmp_path: Path) -> None:
    with started("-c", SLOW_STEPS, *TINY, "--results-dir", str(tmp_path)) as process:
        assert any(line == "step\n" for line in process.stdout)
        process.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):  # the first one waits for the end of the step
            process.wait(0.5)
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert process.returncode in (128 + number, -number)  # for a shell both are 128 + number
    assert "Traceback" not in errors
    assert not (tmp_path / "mlp-s0" / CHECKPOINT).exists()


# ---- Damaged checkpoints --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with two runs of the same training: "mlp-s0", stopped after three steps with a checkpoint after
    each, and "whole".
    """
    results_dir = tmp_path_factory.mktemp("stopped") / "results"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "save_figure", lambda figure, path: None)
        assert train_tiny(results_dir, "--name", "whole") == 0
        after_step(patch, 3, lambda: signal.raise_signal(signal.SIGINT))
        assert train_tiny(results_dir, "--checkpoint-every", "0") == 128 + signal.SIGINT
    return results_dir


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """The stopped run, in a results folder of the test's own."""
    return shutil.copytree(stopped_once, tmp_path / "results") / "mlp-s0"


def steps(path: Path) -> int:
    return read_checkpoint(path)[1]["progress"]["step"]


def resumes_to_the_same_end(run: Path) -> bool:
    """Whether the run, resumed, ends like the undisturbed one."""
    whole = run.parent / "whole"
    return resume(run.parent, run.name) == 0 and same_weights(run, whole) and metrics(run) == metrics(whole)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def flip_a_bit(path: Path, bit: int | None = None) -> None:
    """Flip this bit of the file, by default one in the middle, in the weights."""
    content = bytearray(path.read_bytes())
    byte, shift = divmod(4 * len(content) if bit is None else bit, 8)
    content[byte] ^= 1 << shift
    path.write_bytes(content)


def test_the_previous_checkpoint_is_kept_until_the_end(stopped: Path) -> None:
    assert (steps(stopped / CHECKPOINT), steps(stopped / PREVIOUS)) == (3, 2)
    assert resumes_to_the_same_end(stopped)
    assert not (stopped / PREVIOUS).exists()


def test_every_flipped_bit_in_a_checkpoint_is_noticed(stopped: Path) -> None:
    """In the length of the header, in the header, in the tensors."""
    path, chance = stopped / CHECKPOINT, random.Random(0)
    intact = path.read_bytes()
    header = 8 * (8 + int.from_bytes(intact[:8], "little"))
    bits = [*range(64), *(chance.randrange(64, header) for _ in range(150)),
            *(chance.randrange(header, 8 * len(intact)) for _ in range(30)), 8 * len(intact) - 1]
    for bit in bits:
        flip_a_bit(path, bit)
        with pytest.raises(ValueError):
            read_checkpoint(path)
        flip_a_bit(path, bit)
    assert path.read_bytes() == intact
    read_checkpoint(path)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda path: path.write_bytes(b""),
                                    lambda path: path.write_text("x" * 5000)])
def test_a_damaged_checkpoint_falls_back_to_the_previous(
    damage: object, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(stopped / CHECKPOINT)
    assert resumes_to_the_same_end(stopped)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and f"{CHECKPOINT} is damaged" in line


def test_the_only_good_checkpoint_is_not_replaced_too_soon(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second power cut, during the first checkpoint after a damaged one."""
    truncate(stopped / CHECKPOINT)
    with monkeypatch.context() as patch:
        after_step(patch, 1, lambda: signal.raise_signal(signal.SIGINT))
        assert resume(stopped.parent, stopped.name) == 128 + signal.SIGINT
    truncate(stopped / CHECKPOINT)
    assert resumes_to_the_same_end(stopped)


def test_a_kill_between_the_two_renames_loses_nothing(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (stopped / CHECKPOINT).rename(stopped / PREVIOUS)
    assert resumes_to_the_same_end(stopped)
    assert capsys.readouterr().err == ""


def test_two_damaged_checkpoints_are_an_error(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truncate(stopped / CHECKPOINT)
    flip_a_bit(stopped / PREVIOUS)
    before = contents(stopped)
    assert resume(stopped.parent, stopped.name) == 2
    line = error_line(capsys)
    assert CHECKPOINT in line and PREVIOUS in line and "delete both" in line
    assert contents(stopped) == before


# ---- Full disks, missing memory, missing folders --------------------------------------------------------------------


@contextmanager
def disk_full_above(size: int) -> Iterator[None]:
    """Let no file grow above `size` bytes: at this limit of the system a write fails as on a full disk."""
    import resource  # POSIX only

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@posix_only
def test_a_full_disk_leaves_the_last_checkpoint_in_place(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, size = contents(stopped), (stopped / CHECKPOINT).stat().st_size
    with disk_full_above(size // 2):
        assert resume(stopped.parent, stopped.name, "--checkpoint-every", "0") == 2
    line = error_line(capsys)
    assert CHECKPOINT in line and "full" in line
    assert contents(stopped) == before
    assert resumes_to_the_same_end(stopped)


@posix_only
@pytest.mark.parametrize("size", [0, 100])
def test_no_run_is_started_on_a_full_disk(size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with disk_full_above(size):
        assert train_tiny(tmp_path) == 2
    error_line(capsys)
    assert run_names(tmp_path) == []


@pytest.mark.parametrize("file", [CHECKPOINT, "metrics.csv", "model.safetensors", "result.json"])
def test_a_run_can_be_finished_after_any_failed_write(
    file: str, stopped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flush = files.flush_to_disk

    def full(path: Path) -> None:
        if file in path.name:
            raise OSError(28, os.strerror(28))
        flush(path)

    with monkeypatch.context() as patch:
        for module in (files, run_folder):
            patch.setattr(module, "flush_to_disk", full)
        assert resume(stopped.parent, stopped.name) == 2
    assert file in error_line(capsys)
    assert resumes_to_the_same_end(stopped)


def test_a_network_too_large_for_the_memory_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_tiny(tmp_path, "--widths", ",".join(["65536"] * 9)) == 2
    assert "GiB of memory" in error_line(capsys)
    assert run_names(tmp_path) == []


@pytest.mark.parametrize("gone", ["mlp-s0", "."])  # the run's folder, and that of all runs
def test_a_results_folder_that_vanishes_is_an_error(
    gone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results_dir = tmp_path / "results"
    with monkeypatch.context() as patch:
        after_step(patch, STEPS_PER_EPOCH + 2, lambda: shutil.rmtree(results_dir / gone))
        assert train_tiny(results_dir) == 2
    assert "gone" in error_line(capsys)


def drop_the_privilege_of_root() -> None:
    """Root may write to read-only folders: take that privilege from the process about to be started."""
    PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1
    if os.geteuid() == 0:
        assert ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0) == 0


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    folder.chmod(0o555)
    try:
        yield
    finally:
        folder.chmod(0o755)


@linux_only
def test_a_read_only_results_folder_is_an_error(tmp_path: Path) -> None:
    with read_only(tmp_path):
        done = finished("train_mlp.py", *TINY, "--results-dir", str(tmp_path), preexec_fn=drop_the_privilege_of_root)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "read-only" in line
    assert run_names(tmp_path) == []


@linux_only
@pytest.mark.slow
def test_a_read_only_run_keeps_its_checkpoint(stopped: Path) -> None:
    before = contents(stopped)
    with read_only(stopped):
        done = finished("train_mlp.py", "--resume", stopped.name, "--quiet", "--results-dir", str(stopped.parent),
                        preexec_fn=drop_the_privilege_of_root)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert contents(stopped) == before
    assert resumes_to_the_same_end(stopped)


# ---- Optional safeties: locks, flushed folders, figures, a compiler -------------------------------------------------


def failing(number: int) -> Callable[..., None]:
    """A system call that fails with this errno."""

    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@posix_only
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(
    number: int, stopped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fcntl.flock", failing(number))
    assert resumes_to_the_same_end(stopped)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {stopped} is on a file system without locks") and os.strerror(number) in line
    assert train_tiny(stopped.parent, "--name", "new", "--epochs", "1") == 0


@posix_only
def test_a_failing_lock_is_named_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fcntl.flock", failing(errno.EIO))
    for _ in range(2):
        assert train_tiny(tmp_path) == 2
        line = error_line(capsys)
        assert "cannot lock" in line and os.strerror(errno.EIO) in line and "full" not in line
        assert run_names(tmp_path) == []


@posix_only
@pytest.mark.parametrize(("call", "number"), [
    ("fsync", errno.EINVAL), ("fsync", errno.EOPNOTSUPP), ("open", errno.EACCES)])
def test_a_folder_that_cannot_be_flushed_is_no_error(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(os, call)

    def not_for_folders(target: Any, *arguments: Any, **options: Any) -> Any:
        return failing(number)() if os.path.isdir(target) else real(target, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, not_for_folders)
        files.write_text(tmp_path / "a.txt", "text")
    assert (tmp_path / "a.txt").read_text() == "text"


@pytest.mark.parametrize(("number", "hint"), [
    (errno.ENOSPC, "full?"), (errno.EDQUOT, "full?"), (errno.EROFS, "read-only?"), (errno.EIO, "")])
def test_an_error_of_the_system_is_named_as_it_is(
    number: int, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(UserError) as refused:
        files.write_text(tmp_path / "a.txt", "text")
    text = str(refused.value)
    assert os.strerror(number) in text and hint in text and ("?" in text) == bool(hint)
    assert run_names(tmp_path) == []


@pytest.mark.parametrize("broken", ["learning_curves", "save_figure"])
def test_a_figure_never_ends_a_training(
    broken: str, stopped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ImportError("no backend\nof this name")

    monkeypatch.setattr(run_folder, broken, fail)
    monkeypatch.setattr(run_folder, "PLOT_EVERY", 0.0)
    assert resumes_to_the_same_end(stopped)
    warning = f"warning: {stopped / 'loss.png'} could not be drawn (no backend of this name)\n"
    assert capsys.readouterr().err == warning


DRAW = """
import os, sys
from pathlib import Path
names, here = ("MPLBACKEND", "MATPLOTLIBRC"), os.getcwd()
before = [os.environ.get(name) for name in names]
from common.plotting import new_figure, save_figure
figure = new_figure(4, 3, "title")
figure.subplots().plot([1, 3, 2])
save_figure(figure, Path(sys.argv[1]))
assert [os.environ.get(name) for name in names] == before and os.getcwd() == here
"""


def test_nothing_outside_reaches_the_figures(tmp_path: Path) -> None:
    """MPLBACKEND as in a notebook, matplotlibrc files in the current folder and elsewhere, no folder for a cache."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nlines.linewidth: 9\nbackend: none\nnonsense\n"
                                           "toolbar: toolmanager\n")
    for folder, content in (("empty", None), ("not text", b"\xff\xfe"), ("talking", b"toolbar: toolmanager\n")):
        (tmp_path / folder).mkdir()
        if content:
            (tmp_path / folder / "matplotlibrc").write_bytes(content)
    environments = {"plain": {}, "notebook": {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
                    "misspelled": {"MPLBACKEND": "ag"}, "without a cache": {"MPLCONFIGDIR": os.devnull},
                    "not text": {}, "talking": {}, "not text elsewhere": {"MATPLOTLIBRC": str(tmp_path / "not text")}}
    folders = {"plain": "empty", "not text": "not text", "talking": "talking", "not text elsewhere": "empty"}
    processes = [subprocess.Popen([sys.executable, "-c", DRAW, tmp_path / f"{name}.png"], stderr=subprocess.PIPE,
                                  cwd=tmp_path / folders.get(name, "."),
                                  env={**os.environ, "PYTHONPATH": str(ROOT), **environment})
                 for name, environment in environments.items()]
    assert [process.communicate(timeout=60)[1] for process in processes] == [b""] * 7
    assert len({(tmp_path / f"{name}.png").read_bytes() for name in environments}) == 1


def without_compiler(*arguments: object, **options: object) -> None:
    raise RuntimeError("InvalidCxxCompiler: none found\n" + "a page of text\n" * 50)


def test_compile_is_tried_before_a_run_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.compile", without_compiler)
    assert train_tiny(tmp_path, "--compile") == 2
    line = error_line(capsys)
    assert "InvalidCxxCompiler" in line and "--no-compile" in line and len(line) < 300
    assert run_names(tmp_path) == []


def test_a_compiled_run_is_resumed_without_a_compiler(
    stopped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_settings(stopped, compile=True)
    monkeypatch.setattr("torch.compile", without_compiler)
    assert resume(stopped.parent, stopped.name) == 2
    assert "--no-compile" in error_line(capsys)
    assert resume(stopped.parent, stopped.name, "--no-compile") == 0
    assert "last bits" in capsys.readouterr().err
    assert same_weights(stopped, stopped.parent / "whole")


@pytest.mark.slow
def test_a_missing_compiler_is_noticed_despite_a_cache(tmp_path: Path) -> None:
    """The second process finds what the first one has compiled."""
    flags = (*TINY, "--epochs", "1", "--compile", "--results-dir", str(tmp_path / "results"))
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = [subprocess.run([sys.executable, "train_mlp.py", *flags], cwd=ROOT, capture_output=True, text=True,
                           env={**os.environ, **cache, **compiler}, timeout=300) for compiler in ({}, {"CXX": "/none"})]
    if done[0].returncode:
        pytest.skip("needs a compiler")
    assert done[1].returncode == 2
    assert [line for line in done[1].stderr.splitlines() if line.startswith("error: --compile does not work")]
    assert run_names(tmp_path / "results") == ["mlp-s0"]


# ---- Another device -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_run_moves_to_a_machine_without_its_device(
    device: str, stopped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    edit_settings(stopped, device=device)
    assert resume(stopped.parent, stopped.name, "--device", device) == 2  # not if it is asked for
    assert f"no {device} device" in error_line(capsys)
    assert resumes_to_the_same_end(stopped)
    assert capsys.readouterr().err == f"warning: {stopped.name} continues with --device cpu instead of {device}: " \
        "its result will differ in the last bits\n"
    assert resume(stopped.parent, stopped.name) == 0
    assert capsys.readouterr().err == ""  # a finished run does not move


def test_threads_may_change_with_a_warning(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume(stopped.parent, stopped.name, "--threads", "2") == 0
    assert "--threads 2 instead of 1" in capsys.readouterr().err
    assert read_json(stopped / "result.json")["machine"]["threads"] == 2


# ---- Closed streams, lost terminals, other packages, other systems --------------------------------------------------


@linux_only
@pytest.mark.parametrize("hangs_up", [True, pytest.param(False, marks=pytest.mark.slow)])  # False: as with nohup
def test_a_lost_terminal_loses_no_training(hangs_up: bool, tmp_path: Path) -> None:
    """The terminal hangs up, as when ssh is lost: writing to it fails from then on."""
    flags = [word for word in TINY if word != "--quiet"]
    words = [sys.executable, "train_mlp.py", *flags, "--epochs", "2000" if hangs_up else "40",
             "--results-dir", str(tmp_path)]

    def with_a_terminal() -> None:
        import fcntl
        import termios

        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL if hangs_up else signal.SIG_IGN)

    ours, theirs = os.openpty()
    process = subprocess.Popen(words, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=with_a_terminal)
    os.close(theirs)
    assert wait_until((tmp_path / "mlp-s0" / "metrics.csv").exists, process)
    os.close(ours)
    assert process.wait(TIMEOUT) == (128 + signal.SIGHUP if hangs_up else 0)
    assert (tmp_path / "mlp-s0" / CHECKPOINT).exists()
    assert (tmp_path / "mlp-s0" / "result.json").exists() != hangs_up


def test_our_packages_win_over_others(tmp_path: Path) -> None:
    """Packages of the same names are earlier on the path, in the current folder, and installed."""
    for name in ("data", "dataset", "models", "common", "training", "utils", "evaluation", "tools"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong package')")
    script = str(ROOT / "train_mlp.py")
    ways = [(tmp_path, [script], {}), (tmp_path, [script], {"PYTHONPATH": str(tmp_path)}),
            (tmp_path, [script], {"PYTHONSAFEPATH": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}),
            (ROOT, ["-m", "tools.explore"], {"PYTHONPATH": str(tmp_path)})]
    processes = [subprocess.Popen([sys.executable, *words, "--help"], cwd=folder, env={**os.environ, **environment},
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                 for folder, words, environment in ways]
    for process in processes:
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "") and output.startswith("usage: ")


@linux_only
def test_output_to_a_full_disk_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with suppress(OSError), open("/dev/full", "w") as full, redirect_stdout(full):
        status = train_tiny(tmp_path)
    assert status == 2
    assert "full" in error_line(capsys)


@linux_only
def test_errors_to_a_full_disk_keep_the_exit_status(tmp_path: Path) -> None:
    def stop() -> int:
        raise KeyboardInterrupt

    for command, status in ((lambda: resume(tmp_path, "nothing"), 2), (lambda: exit_status(stop), 128 + signal.SIGINT),
                            (lambda: exit_status(lambda: predict.main(["nothing.png"])), 1)):
        with suppress(OSError), open("/dev/full", "w", buffering=1) as full, redirect_stderr(full):
            found = command()
        assert found == status


@linux_only
def test_help_to_a_full_disk_and_a_closed_pipe(tmp_path: Path) -> None:
    """Two processes at once, since starting them takes longest."""
    flags = (*TINY, "--results-dir", str(tmp_path))
    with open("/dev/full", "w") as full, started("train_mlp.py", "--help", stdout=full) as helped, \
            started("train_mlp.py", *flags) as headed:
        headed.stdout.close()  # as `| head` does
        errors = [process.stderr.read() for process in (helped, headed)]
        statuses = [process.wait() for process in (helped, headed)]
    assert statuses == [2, 128 + signal.SIGPIPE]
    (line,) = errors[0].splitlines()
    assert line.startswith("error: ") and "full" in line
    assert errors[1] == ""


@posix_only
@pytest.mark.slow
def test_closed_streams_do_not_stop_a_training(tmp_path: Path) -> None:
    noisy = [word for word in TINY if word != "--quiet"]
    done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "train_mlp.py", *noisy,
                           "--results-dir", str(tmp_path)], cwd=ROOT, timeout=60)
    assert done.returncode == 0
    assert (tmp_path / "mlp-s0" / "result.json").exists()
