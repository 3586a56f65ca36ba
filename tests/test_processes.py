"""Trainings in several processes, as torchrun starts them: the same result, one writer, and what if one dies."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import train_mlp
from models import load_model
from parallel import ALONE, Processes, launched
from runs import Run
from settings import exit_status
from tests.helpers import error_line, metrics, read_json, run_names, same_weights
from tests.processes import TORCHRUN, finished, lines_until_epoch, started, weights, workers
from utils import UserError

MLP = ("train_mlp.py", "--synthetic", "--precision", "float32", "--device", "cpu", "--threads", "1", "--quiet")
CNN = ("train_cnn.py", *MLP[1:])
NO_NORM = ("--widths", "64,32", "--no-batch-norm", "--dropout", "0", "--optimizer", "sgd", "--lr", "0.05", "--mixup",
           "0.4", "--crop", "4", "--cutout", "8", "--jitter", "0.2", "--batch-size", "715", "--epochs", "3")  # 21 steps


def train(results_dir: Path, processes: int, *words: str) -> subprocess.CompletedProcess[str]:
    launcher = (*TORCHRUN, f"--nproc_per_node={processes}") if processes > 1 else ()
    return finished(*launcher, *words, "--results-dir", str(results_dir))


@pytest.fixture(scope="module")
def results_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The runs "one" and "two", the same training in as many processes, and what the second one said."""
    folder = tmp_path_factory.mktemp("results")
    for processes, name in ((1, "one"), (2, "two")):
        done = train(folder, processes, *MLP, *NO_NORM, "--name", name)
        assert done.returncode == 0, done.stderr
        (folder.parent / f"{name}.out").write_text(done.stdout)
    yield folder


def test_two_processes_take_the_steps_of_one(results_dir: Path) -> None:
    """With every augmentation, and batches of an odd number of pictures."""
    one, two = (weights(results_dir / name) for name in ("one", "two"))
    losses = [float(row["train_loss"]) for row in metrics(results_dir / "one")]
    assert losses[-1] < losses[0]  # it has moved
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)
    for row_of_one, row_of_two in zip(*(metrics(results_dir / name) for name in ("one", "two")), strict=True):
        for name, value in row_of_one.items():
            assert float(row_of_two[name]) == pytest.approx(float(value), abs=1e-4), name


def test_only_the_first_process_writes_and_speaks(results_dir: Path) -> None:
    assert run_names(results_dir) == ["one", "two"]
    assert {path.name for path in (results_dir / "two").iterdir()} == \
        {path.name for path in (results_dir / "one").iterdir()}
    said = [(results_dir.parent / f"{name}.out").read_text().splitlines() for name in ("one", "two")]
    assert len(said[0]) == len(said[1]) == 3 + 3  # epochs, a line before and two after them
    assert "2 processes" in said[1][0]


def test_a_run_says_how_many_processes_made_it(results_dir: Path) -> None:
    config = read_json(results_dir / "two" / "config.json")
    assert config["processes"] == read_json(results_dir / "two" / "result.json")["processes"] == 2
    assert config["command"].startswith("torchrun --nproc_per_node=2 train_mlp.py ")
    assert read_json(results_dir / "two" / "result.json")["machine"]["threads"] == 2
    assert read_json(results_dir / "one" / "config.json")["processes"] == 1


@pytest.mark.parametrize(("name", "processes", "advice"), [
    ("two", 1, "torchrun --nproc_per_node=2"), ("one", 2, "torchrun --nproc_per_node=1")])
def test_a_run_is_not_resumed_in_another_number_of_processes(
    name: str, processes: int, advice: str, results_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=advice):
        Run.resume(results_dir, name, train_mlp.MLPSettings, {}, processes)
    config = read_json(results_dir / "one" / "config.json")
    del config["processes"]  # as in runs made before there could be several
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="with 1 processes, not 2"):
        Run.resume(tmp_path, "old", train_mlp.MLPSettings, {}, 2)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_parts_of_a_batch_are_the_batch(count: int) -> None:
    batch = torch.arange(20)
    parts = [Processes(rank, count).part(batch) for rank in range(count)]
    assert torch.equal(torch.cat(parts), batch)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_alone_nothing_is_sent_and_nothing_changed() -> None:
    model, tensor = torch.nn.Linear(2, 2), torch.ones(3)
    assert launched() is ALONE
    assert ALONE.connect(model) is model
    assert ALONE.total(tensor) is tensor and ALONE.from_first(tensor) is tensor
    assert ALONE.largest(3, False) == [3, 0]


def test_what_makes_no_sense_in_several_processes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    arguments = ["--overfit-batch", "--synthetic", "--results-dir", str(tmp_path)]
    assert exit_status(lambda: train_mlp.main(arguments)) == 2
    assert "one process" in error_line(capsys)


@pytest.mark.slow
def test_several_seeds_in_several_processes_are_several_runs(tmp_path: Path) -> None:
    done = train(tmp_path, 2, *MLP, *NO_NORM, "--seeds", "0,1")
    assert done.returncode == 0, done.stderr
    assert run_names(tmp_path) == ["mlp-s0", "mlp-s1"]


@pytest.mark.slow
def test_if_it_diverges_in_several_processes_each_says_the_same(tmp_path: Path) -> None:
    done = train(tmp_path, 2, *MLP, *NO_NORM, "--lr", "1e30")
    errors = [line.partition(": ")[2] for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode != 0
    assert errors and set(errors) == {errors[0]} and "stopped being finite" in errors[0]
    assert not (tmp_path / "mlp-s0" / "result.json").exists()


@pytest.mark.slow
def test_a_batch_too_small_to_be_shared_is_refused(tmp_path: Path) -> None:
    done = train(tmp_path, 2, *MLP, "--batch-size", "4")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode != 0
    assert "error: --batch-size must be above 4 with 2 processes, not 4" in errors
    assert all(line.startswith(("error: ", "error in process 1 of 2: ")) for line in errors)
    assert run_names(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------------------
# Longer ones
# ---------------------------------------------------------------------------------------------------------------------

DROPOUT = ("--widths", "128,64,64", "--dropout", "0.2", "--mixup", "0.4", "--batch-size", "200", "--epochs", "6")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_a_training_of_which_processes_die_ends_as_if_nothing_had_been(processes: int, tmp_path: Path) -> None:
    """A worker is killed, then the first process, then all are asked to stop; each time the run is resumed."""
    launcher = (*TORCHRUN, f"--nproc_per_node={processes}")
    where = ("--results-dir", str(tmp_path))
    go_on = (*launcher, "train_mlp.py", "--resume", "cut", "--quiet", *where)
    victims = ("last worker", "first process", "launcher")
    for epoch, victim in enumerate(victims, start=1):
        start = (*launcher, *MLP, *DROPOUT, "--name", "cut", *where)
        with started(*(start if epoch == 1 else go_on), "--checkpoint-every", "0") as process:
            lines_until_epoch(process, epoch)
            if victim == "launcher":
                process.send_signal(signal.SIGTERM)
            else:
                os.kill(workers(process)[-1 if victim == "last worker" else 0], signal.SIGKILL)
            output, errors = process.communicate(timeout=60)
        assert process.returncode != 0
        again = f"torchrun --nproc_per_node={processes} train_mlp.py --resume cut"
        if victim == "launcher":
            assert f"the state is saved; go on with: {again}" in output
        else:
            said = [line for line in errors.splitlines() if re.match(r"error( in process \d of \d)?: ", line)]
            assert said and all("another process of this training has ended" in line and again in line for line in said)
            assert '[rank' not in errors  # no traceback of a worker's
        assert run_names(tmp_path) == ["cut"] and not (tmp_path / "cut" / "result.json").exists()
    assert finished(*go_on).returncode == 0
    assert train(tmp_path, processes, *MLP, *DROPOUT, "--name", "whole").returncode == 0
    assert same_weights(tmp_path / "cut", tmp_path / "whole")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


@pytest.mark.slow
def test_with_batch_norm_two_processes_learn_as_much_as_one(tmp_path: Path) -> None:
    short = ("--widths", "8,16,32", "--sides", "16", "--batch-size", "250", "--epochs", "5")
    accuracies = {}
    for processes in (1, 2):
        done = train(tmp_path, processes, *CNN, *short, "--name", f"in{processes}")
        assert done.returncode == 0, done.stderr
        accuracies[processes] = read_json(tmp_path / f"in{processes}" / "result.json")["val_acc"]
        load_model(tmp_path / f"in{processes}" / "model.safetensors")
    assert min(accuracies.values()) > 15  # percent; guessing gives 1
    assert abs(accuracies[1] - accuracies[2]) < 6  # of 1,000 pictures; a standard error is a good point
