"""Trainings in several processes, as torchrun starts them: same result, one writer, and a clean end if one dies."""

import io
import json
import os
import re
import signal
import subprocess
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

import train_mlp
from common.command_line import exit_status, launched
from common.errors import UserError
from models import load_model
from tests.helpers import error_line, metrics, read_json, run_names, run_script, same_weights
from tests.processes import TORCHRUN, finished, linux_only, posix_only, read_until_epoch, started, workers
from training.checkpoint import read_checkpoint
from training.distributed import ALONE, Processes
from training.run_folder import RunFolder

pytestmark = posix_only
FLAGS = ("--synthetic", "--precision", "float32", "--device", "cpu", "--threads", "1", "--quiet")
MLP, CNN = ("train_mlp.py", *FLAGS), ("train_cnn.py", *FLAGS)
NO_NORM = ("--widths", "64,32", "--no-batch-norm", "--dropout", "0", "--optimizer", "sgd", "--lr", "0.05",
           "--alternate", "--crop", "4", "--jitter", "0.2", "--corrupt", "0.3", "--mixup", "0.4",
           "--batch-size", "715", "--epochs", "3")  # 21 steps


def train(results_dir: Path, processes: int, *words: str) -> subprocess.CompletedProcess[str]:
    launcher = (*TORCHRUN, f"--nproc_per_node={processes}") if processes > 1 else ()
    return finished(*launcher, *words, "--results-dir", str(results_dir))


@pytest.fixture(scope="module")
def results_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training in one process, "one", and in two, "two", and what each printed, in one.out and two.out."""
    folder = tmp_path_factory.mktemp("results")
    output = io.StringIO()
    with redirect_stdout(output):
        assert run_script(folder, *FLAGS, *NO_NORM, "--name", "one") == 0
    done = train(folder, 2, *MLP, *NO_NORM, "--name", "two")
    assert done.returncode == 0, done.stderr
    for name, printed in (("one", output.getvalue()), ("two", done.stdout)):
        (folder.parent / f"{name}.out").write_text(printed)
    return folder


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    """The float32 weights in the last checkpoint."""
    tensors, _ = read_checkpoint(run / "checkpoint.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}


def test_two_processes_take_the_same_steps_as_one(results_dir: Path) -> None:
    """With every augmentation (CutMix is drawn where MixUp is), and batches of an odd number of images."""
    one, two = (final_weights(results_dir / name) for name in ("one", "two"))
    losses = [float(row["train_loss"]) for row in metrics(results_dir / "one")]
    assert losses[-1] < losses[0]  # it has moved
    assert one.keys() == two.keys() and one
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)
    for row_of_one, row_of_two in zip(*(metrics(results_dir / name) for name in ("one", "two")), strict=True):
        for name, value in row_of_one.items():
            assert float(row_of_two[name]) == pytest.approx(float(value), abs=1e-4), name


def test_only_the_first_process_writes_and_prints(results_dir: Path) -> None:
    assert run_names(results_dir) == ["one", "two"]
    assert len({frozenset(path.name for path in (results_dir / name).iterdir()) for name in ("one", "two")}) == 1
    one, two = ((results_dir.parent / f"{name}.out").read_text().splitlines() for name in ("one", "two"))
    assert len(one) == len(two) == 3 + 4  # epochs, a line before and three after them
    assert "2 processes" in two[0]


def test_a_run_records_its_number_of_processes(results_dir: Path) -> None:
    config, result = (read_json(results_dir / "two" / f"{name}.json") for name in ("config", "result"))
    assert config["processes"] == result["processes"] == result["machine"]["threads"] == 2
    assert config["command"].startswith("torchrun --nproc_per_node=2 train_mlp.py ")
    assert read_json(results_dir / "one" / "config.json")["processes"] == 1


@pytest.mark.parametrize(("name", "processes", "advice"), [
    ("two", 1, "torchrun --nproc_per_node=2 train_mlp.py --resume two"),
    ("one", 2, "with 1 processes, not 2: resume it with python train_mlp.py --resume one")])
def test_a_run_is_resumed_in_its_number_of_processes(
    name: str, processes: int, advice: str, results_dir: Path
) -> None:
    with pytest.raises(UserError, match=advice):
        RunFolder.resume(results_dir, name, {}, train_mlp.SCRIPT, processes)


def test_a_run_without_that_number_had_one_process(results_dir: Path, tmp_path: Path) -> None:
    """As in runs from before there could be several."""
    config = read_json(results_dir / "one" / "config.json")
    del config["processes"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="with 1 processes, not 2"):
        RunFolder.resume(tmp_path, "old", {}, train_mlp.SCRIPT, 2)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_parts_of_a_batch_make_up_the_batch(count: int) -> None:
    batch = torch.arange(20)
    parts = [Processes(rank, count).part(batch) for rank in range(count)]
    assert torch.equal(torch.cat(parts), batch)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_single_process_exchanges_nothing() -> None:
    model, tensor = torch.nn.Linear(2, 2), torch.ones(3)
    assert Processes(*launched()) == ALONE
    assert ALONE.average_gradients(model) is model
    assert ALONE.sum(tensor) is tensor and ALONE.from_first(tensor) is tensor
    assert ALONE.max(3, False) == [3, 0]


def test_the_overfit_check_refuses_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    arguments = ["--overfit-batch", "--synthetic", "--results-dir", str(tmp_path)]
    assert exit_status(lambda: train_mlp.main(arguments)) == 2
    assert "single process" in error_line(capsys)


# ---- Slow ones ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_several_seeds_in_several_processes(tmp_path: Path) -> None:
    done = train(tmp_path, 2, *MLP, *NO_NORM, "--seeds", "0,1")
    assert done.returncode == 0, done.stderr
    assert run_names(tmp_path) == ["mlp-s0", "mlp-s1"]


def error_messages(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The errors of two processes, without those that only say that the other one has ended: either may be first."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert all(line.startswith(("error: ", "error in process 1 of 2: ")) for line in lines)
    errors = [line.partition(": ")[2] for line in lines]
    return [error for error in errors if not error.startswith("another process of this training has ended")]


@pytest.mark.slow
def test_divergence_is_the_same_error_in_each_process(tmp_path: Path) -> None:
    done = train(tmp_path, 2, *MLP, *NO_NORM, "--lr", "1e30")
    errors = error_messages(done)
    assert done.returncode != 0
    assert errors and set(errors) == {errors[0]} and "is not finite" in errors[0]
    assert not (tmp_path / "mlp-s0" / "result.json").exists()


@pytest.mark.slow
def test_a_batch_too_small_to_divide_is_refused(tmp_path: Path) -> None:
    done = train(tmp_path, 2, *MLP, "--batch-size", "4")
    assert done.returncode != 0
    assert set(error_messages(done)) == {"--batch-size must be above 4 with 2 processes, not 4"}
    assert run_names(tmp_path) == []


DROPOUT = ("--widths", "128,64,64", "--dropout", "0.2", "--mixup", "0.4", "--batch-size", "200", "--epochs", "6")


@linux_only
@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_a_training_whose_processes_die_loses_nothing(processes: int, tmp_path: Path) -> None:
    """A worker is killed, then the first process, then all are asked to stop; the run is resumed each time."""
    launcher = (*TORCHRUN, f"--nproc_per_node={processes}")
    where = ("--results-dir", str(tmp_path))
    start = (*launcher, *MLP, *DROPOUT, "--name", "cut", *where)
    resume = (*launcher, "train_mlp.py", "--resume", "cut", "--quiet", *where)
    advice = f"resume with: torchrun --nproc_per_node={processes} train_mlp.py --resume cut"
    for epoch, victim in enumerate(("last worker", "first process", "launcher"), start=1):
        with started(*(start if epoch == 1 else resume), "--checkpoint-every", "0") as process:
            read_until_epoch(process, epoch)
            if victim == "launcher":
                process.send_signal(signal.SIGTERM)
            else:
                os.kill(workers(process)[-1 if victim == "last worker" else 0], signal.SIGKILL)
            output, errors = process.communicate(timeout=60)
        assert process.returncode != 0
        if victim == "launcher":
            assert f"checkpoint saved; {advice}" in output
        else:
            lines = [line for line in errors.splitlines() if re.match(r"error( in process \d of \d)?: ", line)]
            assert lines
            assert all("another process of this training has ended" in line and advice in line for line in lines)
            assert "[rank" not in errors  # no traceback of a worker
        assert run_names(tmp_path) == ["cut"] and not (tmp_path / "cut" / "result.json").exists()
    assert finished(*resume).returncode == 0
    assert train(tmp_path, processes, *MLP, *DROPOUT, "--name", "whole").returncode == 0
    assert same_weights(tmp_path / "cut", tmp_path / "whole")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_with_batch_norm_train_as_well(tmp_path: Path) -> None:
    short = ("--widths", "8,16,32", "--inner", "8,16,16", "--sides", "16", "--batch-size", "250", "--epochs", "8")
    accuracies = {}
    for processes in (1, 2):
        done = train(tmp_path, processes, *CNN, *short, "--name", f"in{processes}")
        assert done.returncode == 0, done.stderr
        accuracies[processes] = read_json(tmp_path / f"in{processes}" / "result.json")["val_acc"]
        load_model(tmp_path / f"in{processes}" / "model.safetensors")
    assert min(accuracies.values()) > 19  # percent; guessing gives 1, and four seeds in one process 22 to 24
    assert abs(accuracies[1] - accuracies[2]) < 4  # of 1,000 images; a standard error is about one percent
