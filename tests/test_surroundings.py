"""The surroundings of a run: environment, other packages, file systems, paths as people type them, other machines."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch

import train_mlp
import utils
from common import command_line, errors
from common.command_line import next_command
from common.devices import is_available
from common.errors import UserError
from common.files import ROOT, lock
from common.run_files import find_run
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
    same_weights,
    train_tiny,
)
from tests.processes import finished, posix_only
from training import overfit, run_folder
from utils import BINARY_FOLDER, NUM_IMAGES, default_data_dir, load_cifar100, load_test_set


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, drawn_once: None) -> Path:  # noqa: F811
    """A results folder with one finished run, mlp-s0; tests that change it copy it."""
    results = tmp_path_factory.mktemp("results")
    assert train_tiny(results) == 0
    return results


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A results folder whose run mlp-s0 was stopped after 12 steps."""
    with monkeypatch.context() as patch:
        after_step(patch, 12, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train_tiny(tmp_path / "runs") == 128 + signal.SIGTERM
    return tmp_path / "runs"


# ---- Figures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense", "tkagg"])
def test_no_matplotlib_setting_reaches_a_figure(backend: str, tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nsavefig.format: pdf\nfont.size: 40\n")
    script = ("from pathlib import Path; from common.plotting import new_figure, save_figure; import os, sys\n"
              "figure = new_figure(2, 2, 'title'); figure.subplots().plot([1, 2])\n"
              "save_figure(figure, Path(sys.argv[1])); print(os.environ['MPLBACKEND'])")
    pictures = []
    for number, variables in enumerate(({"MPLBACKEND": "agg"},
                                        {"MPLBACKEND": backend, "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")})):
        path = tmp_path / f"{number}.png"
        done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT, capture_output=True, text=True,
                              env={**os.environ, **variables}, timeout=60)
        assert (done.returncode, done.stdout) == (0, variables["MPLBACKEND"] + "\n"), done.stderr
        pictures.append(path.read_bytes())
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("problem", [ValueError("no such font"), OSError("gone"), UserError("the disk is full")])
def test_a_figure_that_fails_is_one_warning(
    problem: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise problem

    monkeypatch.setattr(run_folder, "save_figure", fail)
    monkeypatch.setattr(overfit, "save_figure", fail)
    monkeypatch.setattr(run_folder, "PLOT_EVERY", 0.0)
    assert train_tiny(tmp_path) == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ") and "loss.png" in warning and str(problem) in warning
    assert (tmp_path / "mlp-s0" / "model.safetensors").exists()
    assert run_script(tmp_path, "--overfit-batch", "--synthetic", "--epochs", "3", "--device", "cpu", "--quiet") == 1
    (warning,) = capsys.readouterr().err.splitlines()
    assert "overfit.png" in warning and (tmp_path / "overfit_batch" / "mlp" / "overfit.json").exists()


# ---- Other packages and Python's switches ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["data", "models", "common", "training", "utils", "evaluation"])
def test_a_package_of_the_same_name_changes_nothing(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the wrong package')\n")
    done = subprocess.run([sys.executable, str(ROOT / "train_mlp.py"), "--help"], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)}, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_pythons_own_switches_do_not_matter(tmp_path: Path) -> None:
    done = finished("-O", "-W", "ignore", "-X", "utf8=0", "train_mlp.py", *TINY, "--epochs", "1",
                    "--results-dir", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")


# ---- The dataset's folder -------------------------------------------------------------------------------------------


@pytest.fixture
def binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with the binary version, its files a hundred times shorter and accepted as official."""
    monkeypatch.setitem(utils.NUM_IMAGES, "train", 5000)
    monkeypatch.setitem(utils.NUM_IMAGES, "test", 100)
    monkeypatch.setattr(utils, "_download", lambda folder: pytest.fail("it started a download"))
    folder = tmp_path / "data" / BINARY_FOLDER
    folder.mkdir(parents=True)
    for part, count in NUM_IMAGES.items():
        fine = torch.arange(count) % 100
        records = torch.zeros(count, utils.RECORD_BYTES, dtype=torch.uint8)
        records[:, 0], records[:, 1] = torch.tensor(utils.COARSE_OF_FINE)[fine], fine
        records[:, 2:] = torch.randint(256, (count, 3072), generator=torch.Generator().manual_seed(count))
        records.numpy().tofile(folder / f"{part}.bin")
        split = utils.Split(records[:, 2:].reshape(-1, 3, 32, 32), fine, torch.tensor(utils.COARSE_OF_FINE)[fine])
        monkeypatch.setitem(utils.CONTENT_DIGESTS, part, utils.content_digest(split))
    monkeypatch.setattr(utils, "VAL_PER_CLASS", 5)
    return tmp_path / "data"


def test_a_folder_close_to_the_right_one_is_taken(binary: Path) -> None:
    whole = load_cifar100(binary, train_on_all=True)[0]
    inner = binary / BINARY_FOLDER
    assert torch.equal(load_cifar100(inner, train_on_all=True)[0].images, whole.images)
    (binary / "twice").mkdir()
    shutil.copytree(inner, binary / "twice" / BINARY_FOLDER / BINARY_FOLDER)
    assert torch.equal(load_cifar100(binary / "twice", train_on_all=True)[0].images, whole.images)
    renamed = inner.rename(binary / "images")
    assert len(load_test_set(renamed)) == 100


def test_a_missing_part_is_named(binary: Path) -> None:
    (binary / BINARY_FOLDER / "test.bin").unlink()
    assert len(load_cifar100(binary, train_on_all=True)[0]) == 5000
    for folder in (binary, binary / BINARY_FOLDER):
        with pytest.raises(UserError, match=r"cifar-100-binary has no test\.bin"):
            load_test_set(folder)


@pytest.mark.parametrize("wrong", ["dta", "data/deeper", "data/cifar-100-binray"])
def test_a_mistyped_data_folder_is_not_created(wrong: str, binary: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*--data-dir"):
        load_cifar100(binary.parent / wrong)
    assert not (binary.parent / wrong).exists()


def test_the_variable_for_the_data_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CIFAR100_DIR", "~/images")
    assert default_data_dir() == str(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CIFAR100_DIR", "images")
    assert default_data_dir() == str(tmp_path / "images")


# ---- Locks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_a_warning(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    assert train_tiny(tmp_path) == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert "without locks" in warning and os.strerror(number) in warning
    assert run_names(tmp_path) == ["mlp-s0"]


def test_a_lock_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.raises(UserError, match=r"cannot write .*\.lock \(Permission denied\)"):
        lock(tmp_path / ".lock", in_use="in use")


# ---- torch.compile, devices and threads -----------------------------------------------------------------------------


def test_a_missing_compiler_is_one_line_and_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(function: Any) -> Any:
        raise RuntimeError("no working C++ compiler found\nand a page of text")

    monkeypatch.setattr(torch, "compile", broken)
    assert train_tiny(tmp_path, "--compile") == 2
    line = error_line(capsys)
    assert "--compile" in line and "no working C++ compiler found" in line and "a page" not in line
    assert run_names(tmp_path) == []


def test_a_run_moves_to_the_device_of_this_machine(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = stopped / "mlp-s0" / "config.json"
    for was, now in (('"device": "cpu"', '"device": "cuda"'), ('"compile": false', '"compile": true')):
        text = path.read_text()
        assert was in text
        path.write_text(text.replace(was, now))
    capsys.readouterr()
    assert not torch.cuda.is_available()
    assert resume(stopped, "mlp-s0", "--no-compile") == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert "started on cuda" in warning and "continues on cpu" in warning


def test_threads_may_change_with_a_warning(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    try:
        assert resume(stopped, "mlp-s0", "--threads", "2") == 0
    finally:
        torch.set_num_threads(1)
    assert "with 1 threads and continues on cpu with 2" in capsys.readouterr().err


def test_a_new_run_on_a_missing_device_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not is_available("cuda")
    assert train_tiny(tmp_path, "--device", "cuda") == 2
    assert "no cuda device" in error_line(capsys) and run_names(tmp_path) == []


# ---- Provenance -----------------------------------------------------------------------------------------------------


def git(folder: Path, *words: str) -> str:
    settings = ("-c", "user.name=x", "-c", "user.email=x@x", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *settings, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository in the place of this one, with one commit."""
    folder = tmp_path / "outer" / "inner"
    folder.mkdir(parents=True)
    git(folder, "init", "-q")
    (folder / "train.py").write_text("pass\n")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    monkeypatch.setattr(run_folder, "ROOT", folder.resolve())
    return folder


def test_provenance_is_of_this_repository(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_folder.provenance()
    assert found["git_commit"] == git(repository, "rev-parse", "HEAD").strip() and found["git_changes"] is False
    monkeypatch.setenv("GIT_DIR", str(repository.parent / "nowhere"))  # as inside a hook of another repository
    assert run_folder.provenance()["git_commit"] == found["git_commit"]


def test_untracked_source_is_a_change(repository: Path) -> None:
    (repository / "new.py").write_text("pass\n")
    assert run_folder.provenance()["git_changes"] is True


def test_an_outer_repository_is_not_recorded(repository: Path) -> None:
    git(repository.parent, "init", "-q")
    shutil.rmtree(repository / ".git")
    git(repository.parent, "add", ".")
    git(repository.parent, "commit", "-qm", "outer")
    found = run_folder.provenance()
    assert (found["git_commit"], found["git_changes"]) == (None, None)


def test_without_git_nothing_is_recorded(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(repository))
    assert run_folder.provenance()["git_commit"] is None


# ---- Paths as people type them --------------------------------------------------------------------------------------


def test_a_tilde_is_the_home_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert command_line.exit_status(lambda: train_mlp.main([*TINY, "--results-dir=~/runs", "--data-dir=~/d"])) == 0
    assert (tmp_path / "home" / "runs" / "mlp-s0" / "result.json").exists() and not (tmp_path / "~").exists()
    settings = read_json(tmp_path / "home" / "runs" / "mlp-s0" / "config.json")["settings"]
    assert settings["data_dir"] == str(tmp_path / "home" / "d")


@pytest.mark.parametrize("flag", ["--results-dir", "--data-dir", "--init-from"])
def test_an_unknown_home_is_one_line(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TINY, "--results-dir", str(tmp_path), f"{flag}=~nobody-here/x"]
    assert command_line.exit_status(lambda: train_mlp.main(words)) in ((0, 2) if flag == "--data-dir" else (2,))
    assert "Traceback" not in capsys.readouterr().err


def test_a_relative_data_folder_is_stored_as_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert train_tiny(tmp_path / "runs", "--data-dir", "rel") == 0
    assert read_json(tmp_path / "runs" / "mlp-s0" / "config.json")["settings"]["data_dir"] == str(tmp_path / "rel")


def test_the_printed_command_works_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert next_command("python train_mlp.py --resume x", ROOT / "results") == "python train_mlp.py --resume x"
    monkeypatch.chdir(tmp_path)
    printed = next_command("python train_mlp.py --resume x", tmp_path / "my runs")
    assert printed == f"python {ROOT / 'train_mlp.py'} --resume x --results-dir '{tmp_path / 'my runs'}'"


@pytest.mark.parametrize("name", ["mlp-s0", "mlp-s0/", "{}/mlp-s0", "{}/mlp-s0/", "{}/mlp-s0/result.json",
                                  "{}/mlp-s0/checkpoint.safetensors"])
def test_a_run_is_named_as_a_shell_completes_it(name: str, tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_run(name.format(tiny_run), tiny_run) == tiny_run / "mlp-s0"
    assert resume(tiny_run, name.format(tiny_run)) == 0
    assert "mlp-s0 is finished" in capsys.readouterr().out


def test_a_run_elsewhere_is_resumed_where_it_is(stopped: Path, tmp_path: Path) -> None:
    assert resume(tmp_path / "another", str(stopped / "mlp-s0")) == 0
    assert (stopped / "mlp-s0" / "result.json").exists() and not (tmp_path / "another").exists()


# ---- Signals --------------------------------------------------------------------------------------------------------


@posix_only
@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGTERM", "SIGINT"])
def test_every_stop_signal_saves_a_checkpoint(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    number = getattr(signal, name)
    before = signal.signal(number, signal.default_int_handler)  # these tests may themselves run under nohup
    try:
        with monkeypatch.context() as patch:
            after_step(patch, 7, lambda: os.kill(os.getpid(), number))
            assert train_tiny(tmp_path) == 128 + number
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert f"{name}: checkpoint saved" in capsys.readouterr().out
    assert (tmp_path / "mlp-s0" / "checkpoint.safetensors").exists()


@posix_only
def test_a_hangup_that_nohup_ignores_stays_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with monkeypatch.context() as patch:
            after_step(patch, 7, lambda: os.kill(os.getpid(), signal.SIGHUP))
            assert train_tiny(tmp_path) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_interrupted_command_with_a_closed_pipe_ends_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> int:
        raise errors.Interrupted(signal.SIGINT)

    def closed(*words: Any, **options: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    monkeypatch.setattr(os, "dup2", lambda *descriptors: None)
    assert command_line.exit_status(interrupted) == command_line.CLOSED_PIPE


# ---- Starting from weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp-s0", "{}/mlp-s0", "{}/mlp-s0/model.safetensors"])
def test_a_new_run_starts_from_the_weights_of_another(name: str, tiny_run: Path, tmp_path: Path) -> None:
    results = shutil.copytree(tiny_run, tmp_path / "runs")
    name = name.format(results)
    assert train_tiny(results, "--init-from", name, "--lr", "1e-9", "--epochs", "1", "--name", "next") == 0
    assert float(metrics(results / "next")[0]["val_acc"]) > float(metrics(results / "mlp-s0")[0]["val_acc"])
    weights = read_json(results / "next" / "config.json")["settings"]["init_from"]
    assert weights == str(results / "mlp-s0" / "model.safetensors")


def test_a_run_from_weights_resumes_without_them(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = shutil.copytree(tiny_run, tmp_path / "runs")
    assert train_tiny(results, "--init-from", "mlp-s0", "--name", "whole") == 0
    with monkeypatch.context() as patch:
        after_step(patch, 12, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train_tiny(results, "--init-from", "mlp-s0", "--name", "stopped") == 128 + signal.SIGTERM
    shutil.rmtree(results / "mlp-s0")
    assert resume(results, "stopped") == 0
    assert same_weights(results / "whole", results / "stopped")


@pytest.mark.parametrize(("flags", "problem"), [
    (("--init-from", "missing"), "there is no file"),
    (("--init-from", "mlp-s0", "--widths", "16,16,16"), "do not fit this network"),
    (("--init-from", "mlp-s0", "--overfit-batch"), "--init-from has no effect with --overfit-batch")])
def test_weights_that_cannot_be_used_are_one_line(
    flags: tuple[str, ...], problem: str, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = shutil.copytree(tiny_run, tmp_path / "runs")
    words = TINY if "--overfit-batch" not in flags else ("--synthetic",)
    assert run_script(results, *words, *flags) == 2
    assert problem in error_line(capsys)


def test_training_on_is_advised_where_it_is_refused(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume(tiny_run, "mlp-s0", "--epochs", "3") == 2
    assert "--init-from mlp-s0" in error_line(capsys)
