"""Measuring a user's runs, publishing them, and checking that every published number holds.

The published runs here are synthetic ones whose config.json claims otherwise, with a synthetic test set to match.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import evaluate
import train_mlp
from common import devices
from common.command_line import exit_status
from common.plotting import save_figure
from common.text import machines_text, overfit_table
from evaluation import all_figures, blocks, corruptions, figures, finished_runs, insights, publish, report
from evaluation.finished_runs import FinishedRun, TestSet, find_runs, named_run
from evaluation.metrics import fit_temperature, measure, softmax
from evaluation.published_runs import Published
from evaluation.tables import CITED, full_table, headline, short_table
from models import labeled, load_model, save_model
from tests.helpers import (
    ROOT,
    after_step,
    contents,
    drawn_once,  # noqa: F401 (a fixture)
    edit_settings,
    error_line,
    metrics,
    read_json,
    run_names,
    train_tiny,
)
from utils import FINE_NAMES, load_cifar100, load_test_set

SYNTHETIC_IMAGES = 2000
START = "<!-- {}: written by `python evaluate.py`, checked by `python evaluate.py --check` -->"
END = "<!-- end of {} -->"
README = f"# Title\n\nabove\n\n{START.format('results')}\n{END.format('results')}\n\nbelow\n"


def evaluate_main(results_dir: Path, *flags: str) -> int:
    """Run `evaluate.py` with these flags in this process; returns its exit status."""
    return exit_status(lambda: evaluate.main([*flags, "--results-dir", str(results_dir)]))


@pytest.fixture(autouse=True)
def any_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes at random places, because their map takes a second and is tested in tests/test_insights.py."""
    monkeypatch.setattr(insights, "class_map", lambda features: np.random.default_rng(0).random((len(features), 2)))


@pytest.fixture(scope="module")
def test_set(drawn_once: None) -> TestSet:  # noqa: F811
    return TestSet("", synthetic=True)


def test_the_test_set_is_in_the_order_of_its_hashes(test_set: TestSet) -> None:
    assert test_set.hashes.dtype == np.uint64
    assert (test_set.hashes[:-1] < test_set.hashes[1:]).all()
    split = load_test_set("", use_synthetic=True)
    position = int((split.images == test_set.images[17]).all((1, 2, 3)).nonzero())
    assert test_set.fine_labels[17] == split.fine_labels[position]
    assert test_set.coarse_labels[17] == split.coarse_labels[position]


# ---- A user's own runs ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds on all synthetic images, mlp-s0 and mlp-s1, measured; tests that write work on copies."""
    results_dir = tmp_path_factory.mktemp("trained")
    assert train_tiny(results_dir, "--train-on-all", "--seeds", "0,1", "--lr", "0.01", "--batch-size", "200") == 0
    assert evaluate_main(results_dir) == 0
    return results_dir


@pytest.fixture
def own(trained: Path, tmp_path: Path) -> Path:
    """A results folder with one synthetic run, mlp-s0, that is not measured yet."""
    shutil.copytree(trained / "mlp-s0", tmp_path / "results" / "mlp-s0")
    (tmp_path / "results" / "mlp-s0" / "predictions.npz").unlink()
    return tmp_path / "results"


def test_a_synthetic_run_is_measured_and_flagged(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate_main(own) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("mlp-s0"))
    assert row.endswith("SYNTHETIC")
    model, split = load_model(own / "mlp-s0" / "model.safetensors"), load_test_set("", use_synthetic=True)
    with torch.no_grad():
        accuracy = 100 * (model(split.images / 255).argmax(1) == split.fine_labels).float().mean().item()
    assert float(row.split()[1]) == pytest.approx(accuracy, abs=0.11)  # float16 may change a prediction or two
    assert accuracy > 3  # percent; guessing gives 1


def test_predictions_are_saved_with_the_hashes_of_images(own: Path, test_set: TestSet) -> None:
    assert evaluate_main(own, "mlp-s0") == 0
    with np.load(own / "mlp-s0" / "predictions.npz") as file:
        logits, hashes = file["logits"], file["hash"]
    assert logits.shape == (SYNTHETIC_IMAGES, 100)
    assert logits.dtype == np.float16
    assert hashes.dtype == np.uint64
    assert np.array_equal(hashes, test_set.hashes)
    model = load_model(own / "mlp-s0" / "model.safetensors")
    np.testing.assert_allclose(logits, model(test_set.images / 255).detach().numpy(), atol=0.02)


def test_predictions_are_computed_once_for_the_same_weights(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert evaluate_main(own) == 0
    with monkeypatch.context() as patch:
        patch.setattr(finished_runs, "compute_logits", lambda *arguments: pytest.fail("they were computed again"))
        assert evaluate_main(own) == 0
    before = (own / "mlp-s0" / "predictions.npz").read_bytes()
    scale_weights(own / "mlp-s0", 2.0)
    assert evaluate_main(own) == 0
    assert (own / "mlp-s0" / "predictions.npz").read_bytes() != before


def test_damaged_predictions_are_refused(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate_main(own) == 0
    path = own / "mlp-s0" / "predictions.npz"
    path.write_bytes(path.read_bytes()[:1000])
    assert evaluate_main(own, "mlp-s0") == 2
    assert "predictions.npz" in error_line(capsys)
    assert evaluate_main(own) == 0  # one bad run does not keep the others from being measured
    assert "predictions.npz" in capsys.readouterr().out


def test_an_unknown_run_is_answered_with_the_known_ones(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate_main(trained, "nope") == 2
    line = error_line(capsys)
    assert "nope" in line and "mlp-s0" in line


def test_nothing_to_evaluate_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate_main(tmp_path) == 2
    line = error_line(capsys)
    assert line.endswith(f"train_mlp.py --results-dir {tmp_path}")  # so that the next evaluation finds the run


def stop_a_run(results_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run, half-s0, that was interrupted in its second epoch."""
    with monkeypatch.context() as patch:
        after_step(patch, 15, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert train_tiny(results_dir, "--name", "half-s0") == 130
    return results_dir / "half-s0"


def test_a_run_that_is_not_finished_is_resumed_by_the_command_in_the_message(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stop_a_run(own, monkeypatch)
    capsys.readouterr()
    for flags in (("half-s0",), (str(folder),), (f"{folder}/config.json",), ("--figures", "half-s0"),
                  ("--report", "half-s0"), ("--compare", "mlp-s0", "half-s0"), ("--ensemble", "mlp-s0", "half-s0"),
                  ("--publish", "half-s0"), ("--calibrate", "half-s0")):
        assert evaluate_main(own, *flags) == 2
        line = error_line(capsys)
        assert "half-s0 is not finished" in line
    assert evaluate_main(own) == 0
    captured = capsys.readouterr()
    assert captured.err == "warning: left out, since not finished: half-s0\n" and "mlp-s0 " in captured.out
    shutil.rmtree(own / "mlp-s0")
    assert evaluate_main(own) == 2  # no finished run at all
    assert error_line(capsys) == line
    python, script, *words = shlex.split(line.split(" resume it with: ")[1])
    assert python == "python" and script.endswith("train_mlp.py")
    assert exit_status(lambda: train_mlp.main([*words, "--quiet"])) == 0
    capsys.readouterr()
    assert evaluate_main(own, "half-s0") == 0


def test_the_command_to_resume_starts_as_many_processes(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unfinish(own / "mlp-s0")
    for command, expected in (("torchrun --nproc_per_node=2 train_cnn.py --seed 0",
                               "resume it with: torchrun --nproc_per_node=2 "), ("rm -rf /", "or train it again")):
        edit_config(own / "mlp-s0", command=command)
        assert evaluate_main(own, "mlp-s0") == 2
        line = error_line(capsys)
        assert expected in line and "rm -rf" not in line


@pytest.mark.parametrize("name", ["mlp-s0", "mlp-s0/", "results/mlp-s0", "results/mlp-s0/", "./results/mlp-s0",
                                  "results/mlp-s0/model.safetensors", "results/mlp-s0/loss.png", "mlp-s0/result.json",
                                  "../here/results/mlp-s0", "{own}/mlp-s0"])
def test_a_run_is_named_as_a_shell_completes_it(
    own: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "results").symlink_to(own)
    monkeypatch.chdir(tmp_path / "here")
    assert evaluate_main(own, name.format(own=own)) == 0
    assert list(printed_rows(capsys)) == ["mlp-s0"]


@pytest.mark.parametrize("name", ["fast-s0", "published/fast-s0", "results/published/fast-s0",
                                  "results/published/fast-s0/result.json", str(ROOT / "results/published/fast-s0/")])
def test_a_published_run_is_named_as_a_shell_completes_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    run = named_run(name, ROOT / "results")
    assert run.published and not run.elsewhere and run.label == "published/fast-s0"


def test_a_run_in_another_results_folder_is_called_by_its_path(
    trained: Path, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate_main(own, "--compare", "mlp-s0", str(trained / "mlp-s1")) == 0
    assert f"only {trained}/mlp-s1 on" in capsys.readouterr().out


def test_the_advice_for_an_unfinished_run_has_its_name_quoted(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(own / "mlp-s0", tmp_path / "o dd" / "it's x")
    unfinish(run)
    assert evaluate_main(own, str(run)) == 2
    words = shlex.split(error_line(capsys).partition("resume it with: ")[2])
    assert words[-4:] == ["--resume", run.name, "--results-dir", str(run.parent)]


def test_an_own_run_that_is_not_finished_hides_a_published_one(
    published: "Site", capsys: pytest.CaptureFixture[str]
) -> None:
    unfinish(published.results / "mlp-s0")
    assert published.main("mlp-s0") == 2
    assert "is not finished" in error_line(capsys)
    assert published.main("published/mlp-s0") == 0


@pytest.mark.parametrize("name", ["nope", "", "x" * 300, "~nobody/x", ".", "..", "published", "README.md", "a/../b"])
def test_what_is_not_a_run_is_one_error_line(own: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in ((name,), ("--figures", name), ("--publish", name), ("--calibrate", name)):
        assert evaluate_main(own, *flags) == 2
        error_line(capsys)


def test_logits_are_computed_on_the_device_and_kept(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    monkeypatch.setattr(finished_runs, "load_model", lambda path, device: loaded.append(device) or load_model(path))
    monkeypatch.setattr(devices, "is_available", lambda name: True)
    for flags in (("--device", "mps"), (), ("--device", "cpu")):
        assert evaluate_main(own, "mlp-s0", *flags) == 0
    assert loaded == ["mps"]  # then they are read, whatever the device
    (own / "mlp-s0" / "predictions.npz").unlink()
    assert evaluate_main(own, "mlp-s0") == 0
    assert loaded == ["mps", "cuda"]


def test_a_device_that_is_missing_is_an_error(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices, "is_available", lambda name: name == "cpu")
    for name in ("cuda", "mps"):
        assert evaluate_main(own, "mlp-s0", "--device", name) == 2
        assert f"has no {name} device: use --device cpu" in error_line(capsys)
    assert evaluate_main(own, "mlp-s0", "--device", "auto") == 0


@pytest.mark.parametrize("flags", [
    ("--check", "mlp-s0"), ("--check", "--publish", "mlp-s0"), ("--nonsense",), ("--tta", "flip"),
    ("--tta", "flip", "--compare", "mlp-s0", "mlp-s0"), ("--compare", "mlp-s0"), ("--figures", "--report"),
    ("--wide", "--check"), ("--wide", "--figures"), ("--wide", "--compare", "mlp-s0", "mlp-s1"),
    ("--wide", "--corruptions"), ("--check", "--corruptions"),
    ("--ensemble", "mlp-s0"), ("--ensemble", "mlp-s0", "mlp-s0"), ("--calibrate", "mlp-s0", "--publish", "mlp-s0")])
def test_misuse_is_one_error_line(flags: tuple[str, ...], trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate_main(trained, *flags) == 2
    error_line(capsys)


def printed_rows(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The printed table: the rest of each line by its name."""
    heading, *lines = [line for line in capsys.readouterr().out.splitlines() if line]
    start = heading.index("top-1") - 1
    return {line[:start].strip(): line[start:].strip() for line in lines}


def test_flip_averaging_adds_a_line(trained: Path, test_set: TestSet, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate_main(trained, "mlp-s0") == 0
    plain = printed_rows(capsys)
    assert evaluate_main(trained, "mlp-s0", "--tta", "flip") == 0
    rows = printed_rows(capsys)
    assert list(rows) == ["mlp-s0", "+ flip averaging"]
    assert rows["mlp-s0"] == plain["mlp-s0"]
    model = load_model(trained / "mlp-s0" / "model.safetensors")
    with torch.no_grad():
        mean = sum(model(images / 255).softmax(1) for images in (test_set.images, test_set.images.flip(3)))
    accuracy = 100 * (mean.argmax(1).numpy() == test_set.fine_labels).mean()
    assert float(rows["+ flip averaging"].split()[0]) == pytest.approx(accuracy, abs=0.11)


def test_an_ensemble_averages_probabilities(
    trained: Path, test_set: TestSet, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate_main(trained, "--ensemble", "mlp-s0", "mlp-s1", "--wide") == 0
    rows = printed_rows(capsys)
    assert list(rows) == ["mlp-s0", "mlp-s1", "ensemble of these 2"]
    logits = [FinishedRun(trained / name).logits(test_set) for name in ("mlp-s0", "mlp-s1")]
    mean = sum(torch.from_numpy(one).double().softmax(1) for one in logits).numpy()
    together = rows["ensemble of these 2"].split()
    assert together[0] == f"{100 * (mean.argmax(1) == test_set.fine_labels).mean():.2f}"
    assert float(together[0]) > max(float(rows[name].split()[0]) for name in ("mlp-s0", "mlp-s1"))
    parameters = read_json(trained / "mlp-s0" / "result.json")["parameters"]
    assert f"{2 * parameters:,}" in together


def long_names(trained: Path, results_dir: Path) -> list[str]:
    """Three runs, two with names of 90 characters, one trained on 45,000 images; their folders."""
    names = [f"{'a-name-that-goes-on' * 4}-and-on-{number}-s0" for number in (1, 2)] + ["mlp-s0"]
    for name in names:
        shutil.copytree(trained / "mlp-s0", results_dir / name)
        edit_settings(results_dir / name, synthetic=False, train_on_all=name == "mlp-s0")
    return names


@pytest.mark.parametrize("flags", [(), ("--tta", "flip"), ("--ensemble",)])
def test_the_table_has_at_most_100_columns_unless_wide(
    flags: tuple[str, ...], trained: Path, test_set: TestSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "TestSet", lambda *arguments, **options: test_set)
    names = long_names(trained, tmp_path)
    names = () if not flags else (*flags, *names) if flags == ("--ensemble",) else (*names, *flags)
    assert evaluate_main(tmp_path, *names) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "run" and max(map(len, lines)) <= 100
    assert {3: "mlp-s0", 4: "mlp-s0"}.get(len(lines) - 1, "a-name") in " ".join(lines)
    shortened = [line.split()[0] for line in lines if "..." in line]
    assert len(shortened) == len(set(shortened)) == 2 and all(len(name) == 32 for name in shortened)
    assert evaluate_main(tmp_path, *names, "--wide") == 0
    wide = capsys.readouterr().out.splitlines()
    assert all(heading in wide[0] for heading in ("cross-entropy", "deduplicated", "parameters"))
    assert [line.split()[:4] for line in wide[1:]] == [line.split()[:4] for line in lines[1:]]


def test_two_runs_are_compared_on_the_same_images(
    trained: Path, test_set: TestSet, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate_main(trained, "--compare", "mlp-s0", "mlp-s1") == 0
    text = capsys.readouterr().out
    a, b = (FinishedRun(trained / name).logits(test_set).argmax(1) == test_set.fine_labels
            for name in ("mlp-s0", "mlp-s1"))
    assert f"mlp-s0 {100 * a.mean():.2f}%, mlp-s1 {100 * b.mean():.2f}%" in text
    assert f"Only mlp-s0 is correct on {(a & ~b).sum()} of them, only mlp-s1 on {(b & ~a).sum()}" in text
    assert evaluate_main(trained, "--compare", "mlp-s0", "mlp-s0") == 0
    text = capsys.readouterr().out
    assert "p = 1 " in text and "chance may explain the difference" in text


# ---- Publishing -----------------------------------------------------------------------------------------------------


def edit_config(run: Path, **changes: Any) -> None:
    """Change what config.json has besides the settings."""
    config = read_json(run / "config.json")
    (run / "config.json").write_text(json.dumps({**config, **changes}))


def claim_to_be_the_recipe(run: Path, command: str = "python train_mlp.py --train-on-all --seed 0") -> None:
    edit_settings(run, synthetic=False)
    edit_config(run, command=command, git_changes=False)


@dataclass(frozen=True)
class Site:
    """A stand-in for the repository: README.md, docs/ and results/."""

    root: Path

    def main(self, *flags: str) -> int:
        return evaluate_main(self.results, *flags)

    @property
    def readme(self) -> Path:
        return self.root / "README.md"

    @property
    def document(self) -> Path:
        return self.root / "docs" / "all.md"

    @property
    def results(self) -> Path:
        return self.root / "results"

    @property
    def published(self) -> Path:
        return self.results / "published"


@contextmanager
def as_repository(root: Path) -> Iterator[Site]:
    """Have evaluate.py take `root` for the repository, and synthetic images for the real ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "ROOT", root)
        patch.setattr(evaluate, "RESULTS_DIR", root / "results")
        patch.setattr(finished_runs, "load_test_set",
                      lambda data_dir, *, use_synthetic=False: load_test_set(data_dir, use_synthetic=True))
        patch.setattr(corruptions, "PER_CLASS", 2)
        patch.setattr(publish, "load_cifar100", lambda data_dir: load_cifar100(data_dir, use_synthetic=True))
        yield Site(root)


# Three states of a site. Each is made once per module, and tests work on copies.


@pytest.fixture(scope="module")
def site_template(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("site")
    (root / "README.md").write_text(README)
    for source, name in (("mlp-s0", "mlp-s0"), ("mlp-s1", "another-name"), ("mlp-s0", "held-out")):
        shutil.copytree(trained / source, root / "results" / name)
        claim_to_be_the_recipe(root / "results" / name)
    claim_to_be_the_recipe(root / "results" / "held-out", "python train_mlp.py --seed 0")
    edit_settings(root / "results" / "held-out", train_on_all=False)
    return root


@pytest.fixture(scope="module")
def published_template(site_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    shutil.copytree(site_template, root, dirs_exist_ok=True)
    with as_repository(root) as site:
        assert site.main("--publish", "mlp-s0", "another-name") == 0
    return root


@pytest.fixture(scope="module")
def documented_template(
    published_template: Path, test_set: TestSet, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("documented")
    shutil.copytree(published_template, root, dirs_exist_ok=True)
    with as_repository(root) as site:
        assert site.main("--corruptions", "published/mlp-s0", "--data-dir", str(root)) == 0
        shutil.copytree(site.published / "mlp-s0", site.published / "other-s0")
        edit_settings(site.published / "other-s0", recipe="other")
        (site.published / "overfit_batch" / "mlp").mkdir(parents=True)
        outcome = {"title": "MSE against the one-hot label", "first": 1.5, "last": 0.01486, "lowest": 0.01486,
                   "memorized": 64, "batch_size": 64, "passed": True}
        (site.published / "overfit_batch" / "mlp" / "overfit.json").write_text(json.dumps({"losses": {"mse": outcome}}))
        (site.published / "benchmarks").mkdir()
        for file in ("time_to_accuracy.md", "time_to_accuracy_bfloat16.md", "overfit_riddle.md",
                     "overfit_riddle_shapes.md", "overfit_riddle_odds.md", "cost.md", "scaling.md", "loader.md"):
            (site.published / "benchmarks" / file).write_text(f"| {file} | 7 |\n")
        list_near_duplicates(site, test_set.hashes[:10])
        assert site.main("--calibrate", "held-out") == 0
        site.document.parent.mkdir()
        (site.document.parent / "experiments.md").write_text(
            "<!-- search: drawn by `python evaluate.py --figures` -->\n| | change | predicted | held-out top-1 |\n"
            "|---|---|---|---|\n| base | the start | 50 | 51.5 |\n| more | again | + 1 | 51 |\n")
        site.document.write_text("\n".join(f"above\n\n{START.format(name)}\n{END.format(name)}\n"
                                           for name in blocks.BLOCKS))
        assert site.main() == 0
    return root


@pytest.fixture
def site(site_template: Path, tmp_path: Path) -> Iterator[Site]:
    """Two runs that claim to be CIFAR-100's, mlp-s0 and another-name (seed 1), and held-out on 45,000 images."""
    with as_repository(shutil.copytree(site_template, tmp_path / "site")) as copy:
        yield copy


@pytest.fixture
def published(published_template: Path, tmp_path: Path) -> Iterator[Site]:
    """`site` with both runs published, and README.md and results.json up to date."""
    with as_repository(shutil.copytree(published_template, tmp_path / "site")) as copy:
        yield copy


@pytest.fixture
def documented(documented_template: Path, tmp_path: Path) -> Iterator[Site]:
    """`published` with a second recipe, the first one calibrated, and a document with every block."""
    with as_repository(shutil.copytree(documented_template, tmp_path / "site")) as copy:
        yield copy


def test_only_one_seed_per_recipe_keeps_its_weights(published: Site) -> None:
    assert run_names(published.published) == ["mlp-s0", "mlp-s1"]
    recorded = {"config.json", "metrics.csv", "loss.png", "result.json", "predictions.npz"}
    assert set(run_names(published.published / "mlp-s0")) == recorded | {"model.safetensors"}
    assert set(run_names(published.published / "mlp-s1")) == recorded


def test_weights_that_are_too_large_are_not_published(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "MAX_WEIGHTS_BYTES", 1000)
    assert site.main("--publish", "mlp-s0") == 0
    assert "model.safetensors" not in run_names(site.published / "mlp-s0")
    assert site.main("--check") == 0


def test_weights_of_another_recipe_do_not_count(site: Site) -> None:
    other = site.published / "mlp-strong-s0"
    other.mkdir(parents=True)
    (other / "model.safetensors").write_bytes(b"weights")
    assert site.main("--publish", "mlp-s0") == 0
    assert "model.safetensors" in run_names(site.published / "mlp-s0")


def test_results_have_mean_and_spread_over_the_seeds(published: Site, test_set: TestSet) -> None:
    (row,) = read_json(published.results / "results.json")
    assert row["recipe"] == "mlp"
    assert row["seeds"] == [0, 1]
    each = [measure(FinishedRun(published.published / name, published=True).logits(test_set),
                    test_set.fine_labels, test_set.coarse_labels) for name in ("mlp-s0", "mlp-s1")]
    for name in ("top1", "top5", "superclass", "cross_entropy"):
        values = [numbers[name] for numbers in each]
        assert row[name]["each"] == pytest.approx(values, abs=1e-4)
        assert row[name]["mean"] == pytest.approx(sum(values) / 2, abs=1e-4)
        assert row[name]["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5, abs=1e-4)  # of two samples
    assert row["top1"]["std"] > 0
    assert row["interval95"][0] < row["top1"]["mean"] < row["interval95"][1]
    assert row["command"].startswith("python train_mlp.py")
    assert row["command"].endswith("--seeds 0,1")


def test_the_readme_gets_the_table_and_keeps_the_rest(published: Site) -> None:
    text = published.readme.read_text()
    assert text.startswith("# Title\n\nabove\n\n") and text.endswith("\n\nbelow\n")
    top1 = read_json(published.results / "results.json")[0]["top1"]
    assert f"| mlp | **{top1['mean']:.2f} ± {top1['std']:.2f}** | 2 | " in text
    assert published.main() == 0
    assert published.readme.read_text() == text


def test_evaluating_one_run_updates_nothing(published: Site) -> None:
    published.readme.write_text(README)
    (published.results / "results.json").unlink()
    assert published.main("mlp-s0") == 0
    assert published.readme.read_text() == README
    assert not (published.results / "results.json").exists()


def test_of_two_runs_of_a_name_the_users_own_is_meant(published: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert published.main("--compare", "mlp-s0", "mlp-s1") == 0  # mlp-s1 is another-name, published
    text = capsys.readouterr().out
    assert text.startswith("mlp-s0 ") and "only published/mlp-s1 on" in text
    assert published.main("--compare", "published/mlp-s0", "mlp-s1") == 0
    assert capsys.readouterr().out.startswith("published/mlp-s0 ")


def test_a_published_run_is_not_replaced(published: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert published.main("--publish", "mlp-s0") == 2
    assert "already published" in error_line(capsys)


@pytest.mark.parametrize("changes", [{"precision": "bfloat16"}, {"lr": 0.02}])  # lr: the recipe has changed since
def test_seeds_with_different_settings_are_not_published(
    changes: dict[str, Any], site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_settings(site.results / "another-name", **changes)
    assert site.main("--publish", "mlp-s0", "another-name") == 2
    assert str(*changes.values()) in error_line(capsys)
    assert run_names(site.published) == ["mlp-s0"]
    assert site.readme.read_text() == README


def unfinish(run: Path) -> None:
    (run / "result.json").unlink()


@pytest.mark.parametrize(("flag", "name", "spoil", "reason"), [
    ("--publish", "mlp-s0", lambda run: edit_settings(run, synthetic=True), "synthetic"),
    ("--publish", "mlp-s0", unfinish, "is not finished"),
    ("--publish", "mlp-s0", lambda run: edit_settings(run, train_on_all=False), "--train-on-all"),
    ("--publish", "mlp-s0", shutil.rmtree, "no run in"),
    ("--publish", "mlp-s0", lambda run: edit_config(run, git_changes=True), "clean commit"),
    ("--publish", "mlp-s0",
     lambda run: edit_config(run, command="python train_mlp.py --train-on-all --lr 0.02 --seed 0"), "--lr 0.02"),
    ("--publish", "mlp-s0", lambda run: (run / "config.json").write_text("{}"), "config.json"),
    ("--calibrate", "held-out", lambda run: edit_settings(run, train_on_all=True), "without --train-on-all"),
    ("--calibrate", "held-out", lambda run: edit_settings(run, synthetic=True), "synthetic"),
    ("--calibrate", "held-out", lambda run: edit_config(run, command="python train_mlp.py --lr 0.02 --seed 0"),
     "--lr 0.02"),
    ("--calibrate", "held-out", lambda run: edit_config(run, git_changes=True), "clean commit"),
    ("--calibrate", "held-out", unfinish, "is not finished"),
])
def test_a_run_that_must_not_be_published_is_refused(
    flag: str, name: str, spoil: Callable[[Path], None], reason: str, site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(site.results / name)
    assert site.main(flag, name) == 2
    assert reason in error_line(capsys)
    assert run_names(site.published) == []


def test_only_a_plain_overfit_check_is_published(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    check = site.results / "overfit_batch" / "mlp"
    check.mkdir(parents=True)
    for file in ("overfit.png", "curves.csv"):
        (check / file).write_bytes(b"content")
    for given, passed, git_changes, status, reason in (
        ({"synthetic": True}, True, False, 2, "plain"), ({"loss": "mse-index"}, True, False, 2, "plain"),
        ({}, False, False, 2, "passed"), ({}, True, True, 2, "commit"), ({}, True, False, 0, ""),
    ):
        content = {"given": given, "losses": {"cross-entropy": {"passed": passed}}, "git_changes": git_changes}
        (check / "overfit.json").write_text(json.dumps(content))
        assert site.main("--publish", "overfit_batch/mlp") == status
        if reason:
            assert reason in error_line(capsys)
    assert (site.published / "overfit_batch" / "mlp" / "overfit.png").read_bytes() == b"content"


def test_what_is_published_names_no_folder_of_this_machine(site: Site) -> None:
    for name in ("mlp-s0", "held-out"):
        edit_settings(site.results / name, data_dir="/mnt/images")
    check = site.results / "overfit_batch" / "mlp"
    check.mkdir(parents=True)
    for file in ("overfit.png", "curves.csv"):
        (check / file).write_bytes(b"content")
    passed = {"given": {}, "losses": {"cross-entropy": {"passed": True}}, "git_changes": False}
    (check / "overfit.json").write_text(json.dumps(passed | {"settings": {"data_dir": "/mnt/images", "lr": 1.0}}))
    assert site.main("--publish", "mlp-s0") == site.main("--publish", "overfit_batch/mlp") == 0
    assert site.main("--calibrate", "held-out") == 0
    found = [*site.published.rglob("config.json"), *site.published.rglob("overfit.json")]
    assert len(found) == 3 and not any("/mnt" in path.read_text() for path in found)
    config = read_json(site.results / "mlp-s0" / "config.json")
    assert config["settings"]["data_dir"] == "/mnt/images"  # the user's own run still has it
    config["settings"]["data_dir"] = ""
    assert read_json(site.published / "mlp-s0" / "config.json") == config
    committed = [*(ROOT / "results" / "published").rglob("*.json")]
    assert committed and [path for path in committed if read_json(path).get("settings", {}).get("data_dir")] == []


def test_publishing_that_fails_halfway_publishes_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def copy_until_the_disk_is_full(source: Path, target: Path) -> None:
        if source.name == "model.safetensors":
            raise OSError(28, "No space left on device", str(target))
        copy(source, target)

    copy = shutil.copyfile
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", copy_until_the_disk_is_full)
        assert site.main("--publish", "mlp-s0") == 2
    error_line(capsys)
    assert [run.name for run in find_runs(site.results) if run.published] == []


# ---- Near-duplicates and calibration --------------------------------------------------------------------------------


def list_near_duplicates(site: Site, hashes: np.ndarray) -> None:
    """Write the list that tools.explore writes, with these test images."""
    (site.results / "data").mkdir()
    lines = [f"{one:016x},{1:016x},0.9,apple,apple\n" for one in hashes]
    text = ["test_hash,train_hash,similarity,test_class,train_class\n", *lines, *lines[:1]]  # one is listed twice
    (site.results / "data" / "near_duplicates.csv").write_text("".join(text))


def test_accuracy_without_near_duplicates_is_reported(
    published: Site, test_set: TestSet, capsys: pytest.CaptureFixture[str]
) -> None:
    logits = FinishedRun(published.published / "mlp-s0", published=True).logits(test_set)
    correct = logits.argmax(1) == test_set.fine_labels
    list_near_duplicates(published, test_set.hashes[correct][:20])
    without = (correct.sum() - 20) / (len(correct) - 20) * 100
    assert published.main("--check") == 1  # results.json does not have it yet
    assert published.main("--wide") == 0
    (row,) = read_json(published.results / "results.json")
    assert row["top1_without_duplicates"]["each"][0] == pytest.approx(without, abs=1e-4)
    assert row["top1"]["each"][0] == pytest.approx(100 * correct.mean(), abs=1e-4)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("published/mlp-s0 "))
    assert f" {without:.2f} " in line
    assert published.main("--check") == 0


@pytest.mark.parametrize("name", ["no hash", "1" + 16 * "0", "-1"])  # the second has 65 bits
def test_a_damaged_list_of_near_duplicates_is_refused(
    name: str, published: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    list_near_duplicates(published, np.array([], dtype=np.uint64))
    (published.results / "data" / "near_duplicates.csv").write_text(f"test_hash\n{name}\n")
    assert published.main() == 2
    assert "near_duplicates.csv" in error_line(capsys)


def test_calibration_keeps_the_validation_logits(published: Site) -> None:
    assert published.main("--calibrate", "held-out") == 0
    folder = published.published / "calibration" / "mlp"
    assert run_names(folder) == ["config.json", "loss.png", "metrics.csv", "val_predictions.npz"]
    _, val = load_cifar100("", use_synthetic=True)
    with np.load(folder / "val_predictions.npz") as file:
        assert file["logits"].dtype == np.float16 and file["fine_labels"].dtype == np.uint8
        assert np.array_equal(file["fine_labels"], val.fine_labels.numpy())
        model = load_model(published.results / "held-out" / "model.safetensors")
        np.testing.assert_allclose(file["logits"], model(val.images / 255).detach().numpy(), atol=0.02)
    assert [run.name for run in find_runs(published.results) if run.published] == ["mlp-s0", "mlp-s1"]
    assert published.main("--check") == 0
    assert published.main("--calibrate", "held-out") == 0  # replaces the older one


def test_a_calibration_may_come_from_another_machine(published: Site) -> None:
    edit_settings(published.results / "held-out", precision="bfloat16", device="cuda")
    assert published.main("--calibrate", "held-out") == 0
    assert published.main() == published.main("--check") == 0
    assert load_model(published.published / "mlp-s0" / "model.safetensors").temperature != 1.0


def test_published_weights_carry_the_temperature_and_the_classes(documented: Site) -> None:
    path = documented.published / "mlp-s0" / "model.safetensors"
    with np.load(documented.published / "calibration" / "mlp" / "val_predictions.npz") as file:
        expected = fit_temperature(file["logits"], file["fine_labels"])
    model, trained_model = load_model(path), load_model(documented.results / "mlp-s0" / "model.safetensors")
    assert model.temperature == pytest.approx(expected, abs=1e-6) and model.classes == FINE_NAMES
    assert (trained_model.temperature, trained_model.classes) == (1.0, ())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in trained_model.state_dict().items())
    assert f"| 0.1 | {expected:.3f} | [`results/published/mlp-s0/" in block(documented, "weights")
    assert load_model(documented.published / "other-s0" / "model.safetensors").temperature == 1.0  # not calibrated
    assert "| – | [`results/published/other-s0/" in block(documented, "weights")
    shutil.copy(documented.results / "mlp-s0" / "model.safetensors", path)
    assert documented.main("--check") == 1
    assert documented.main() == 0
    assert load_model(path).temperature == model.temperature and documented.main("--check") == 0


def test_a_temperature_of_another_calibration_fails_the_check(
    documented: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    path = documented.published / "mlp-s0" / "model.safetensors"
    for changes in ({"temperature": 2.0, "classes": FINE_NAMES}, {"temperature": load_model(path).temperature}):
        path.write_bytes(labeled(path, **changes))
        assert documented.main("--check") == 1
        assert "mlp-s0: its weights have another temperature or other class names" in capsys.readouterr().out


def test_weights_keep_their_temperature_if_the_recipe_changed(
    documented: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (documented.published / "mlp-s0" / "model.safetensors").read_bytes()
    edit_settings(documented.published / "calibration" / "mlp", lr=0.02)
    assert documented.main() == 0
    assert "model.safetensors is unchanged: " in capsys.readouterr().out
    assert (documented.published / "mlp-s0" / "model.safetensors").read_bytes() == before


def test_a_calibration_with_other_settings_is_refused(
    documented: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both when it is published and after the recipe was changed, trained and published again."""
    edit_settings(documented.results / "held-out", lr=0.02)
    assert documented.main("--calibrate", "held-out") == 2
    assert "lr: 0.01 and 0.02" in error_line(capsys)
    edit_settings(documented.published / "calibration" / "mlp", lr=0.02)
    assert documented.main("--check") == 1
    assert "lr: 0.01 and 0.02" in capsys.readouterr().out
    assert documented.main("--figures", "published/mlp-s0") == 2
    assert "lr: 0.01 and 0.02" in error_line(capsys)


# ---- Tables, figures, report and blocks -----------------------------------------------------------------------------


def make_row(recipe: str, accuracy: float, **changes: Any) -> dict[str, Any]:
    """A row of results.json: one seed, 90 seconds on two CPU cores."""
    machine = {"processor": "A CPU", "threads": 2, "conv3x3_float32_gflops": 123.4}
    number = {"mean": accuracy, "std": None}
    return {"recipe": recipe, "seeds": [0], "top1": number, "top5": number, "superclass": number,
            "interval95": [accuracy - 1, accuracy + 1], "parameters": 900_000, "train_seconds": [90.0],
            "train_flops": 2e14, "precision": "float32", "device": "cpu", "machines": [machine],
            "command": f"python train_cnn.py --recipe {recipe} --train-on-all --seed 0", **changes}


DEFAULT = make_row("default", 70.4, seeds=[0, 1], train_seconds=[460.0, 480.0],
                   top1={"mean": 70.4, "std": 0.7}, command="python train_cnn.py --train-on-all --seeds 0,1")


def test_the_headline_has_the_best_and_the_default_recipe() -> None:
    best, worse = make_row("best", 73.7, train_seconds=[1500.0]), make_row("worse", 30.0)
    on_two_cores = "**73.70% on the test set after 25 minutes of training on 2 CPU cores** (`best`, one seed)"
    assert headline([worse, DEFAULT, best]) == \
        f"{on_two_cores}; 70.40% after 8 minutes (`default`, mean of 2 seeds)."
    assert headline([best, worse]) == f"{on_two_cores}."
    assert headline([DEFAULT, worse]) == ("**70.40% on the test set after 8 minutes of training on 2 CPU cores** "
                                          "(`default`, mean of 2 seeds).")
    on_a_gpu = make_row("best", 80, device="cuda", train_seconds=[30.0], machines=[{"processor": "A GPU"}])
    assert headline([DEFAULT, on_a_gpu]) == (
        "**80.00% on the test set after 30 seconds of training on A GPU** (`best`, one seed); "
        "70.40% after 8 minutes on 2 CPU cores (`default`, mean of 2 seeds).")


def test_the_short_table_is_narrow_and_best_first() -> None:
    heading, _, *lines = short_table([make_row("worse", 30.0), DEFAULT, make_row("best", 73.7)]).splitlines()
    assert heading == "| model | test accuracy (%) | seeds | minutes | command |"
    assert lines == [
        "| best | **73.70** | 1 | 1.5 | `python train_cnn.py --recipe best --train-on-all --seed 0` |",
        "| default | **70.40 ± 0.70** | 2 | 7.8 | `python train_cnn.py --train-on-all --seeds 0,1` |",
        "| worse | **30.00** | 1 | 1.5 | `python train_cnn.py --recipe worse --train-on-all --seed 0` |",
        "| *guessing* | *1.0* | | | |"]
    published = short_table(read_json(ROOT / "results" / "results.json"))
    assert max(map(len, published.splitlines())) < 110


def test_the_full_table_ranks_rows_among_the_cited_ones() -> None:
    text = full_table([make_row("weak", 0.5), make_row("middle", 50.0), make_row("strong", 75.0)])
    models = [line.split("|")[1].strip(" *") for line in text.splitlines()[2:]]
    guessing, human = (entry["model"] for entry in CITED)
    assert models == ["strong", human, "middle", guessing, "weak"]
    assert "| 0.90 M | **50.00** (one seed; 95% interval 49.0 to 51.0) | 50.00 | 50.00 | 1.5 min, 2.0e14 FLOPs " in text
    assert "| A CPU, 2 threads, float32 (123 GFLOP/s in one 3x3 convolution) | " in text
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_machines_that_differ_only_in_speed_share_one_text() -> None:
    machines = [{"processor": name, "threads": 2, "conv3x3_float32_gflops": speed}
                for name, speed in (("A CPU", 99.6), ("B CPU", 7.0), ("A CPU", 123.4), ("A CPU", 110.0))]
    assert machines_text(machines, "float32") == (
        "A CPU, 2 threads, float32 (100 to 123 GFLOP/s in one 3x3 convolution) or "
        "B CPU, 2 threads, float32 (7 GFLOP/s in one 3x3 convolution)")


def test_figures_show_published_runs(documented: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert documented.main("--figures", "mlp-s1") == 0
    folder = documented.root / "docs" / "figures"
    assert run_names(folder) == sorted(f"{name}.png" for name in (
        "confusion", "classes", "confused", "mistakes", "reliability", "curves", "accuracy-flops",
        "filters", "search", "search-longer", "corruptions"))
    assert all(1000 < path.stat().st_size < 300_000 for path in folder.iterdir())
    assert {path.stem for path in folder.iterdir()} <= figures.CAPTIONS.keys()


def test_figures_that_need_weights_are_of_the_run_that_is_named(documented: Site) -> None:
    """The published mlp-s1 has none; its recipe's first seed, whose filters are shown, has."""
    shown = Published(documented.results, [run for run in find_runs(documented.results) if run.published],
                      TestSet("", synthetic=True))
    for name, expected in (("mlp-s0", {"filters", "class-map"}), ("mlp-s1", {"filters"})):
        run = named_run(f"published/{name}", documented.results)
        drawn = all_figures.draw_insights(shown, run, np.full((SYNTHETIC_IMAGES, 100), 0.01), name)
        assert drawn.keys() == expected
        assert [axes.get_title(loc="left") for axes in drawn["filters"].axes][1].startswith("mlp-s0, layer 1, trained")


def test_an_own_run_has_figures_and_a_report_in_its_folder(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A synthetic run too, and both say so."""
    pytest.importorskip("jinja2")
    titles = []
    monkeypatch.setattr(evaluate, "save_figure",
                        lambda figure, path: titles.append(figure.get_suptitle()) or save_figure(figure, path))
    before = set(run_names(ROOT / "docs" / "figures"))
    assert evaluate_main(own, "--figures", "mlp-s0") == 0
    assert run_names(own / "mlp-s0" / "figures") == [
        "class-map.png", "classes.png", "confused.png", "confusion.png", "filters.png", "mistakes.png",
        "reliability.png"]
    assert len(titles) == 7 and all("SYNTHETIC IMAGES, not CIFAR-100" in title for title in titles)
    assert set(run_names(ROOT / "docs" / "figures")) == before
    assert evaluate_main(own, "--report", f"{own}/mlp-s0/loss.png") == 0
    text = (own / "mlp-s0" / "report.html").read_text()
    assert "SYNTHETIC IMAGES, not CIFAR-100: " in text and "The last checkpoint of this run." in text
    assert text.count("<figure>") == 7 and f"written: {own}/mlp-s0/report.html" in capsys.readouterr().out
    assert evaluate_main(own, "mlp-s0") == 0  # it is still a run


def test_a_run_on_45000_images_has_figures(documented: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, path: path.write_text(figure.get_suptitle()))
    assert documented.main("--figures", "held-out") == 0
    folder = documented.results / "held-out" / "figures"
    assert (folder / "confusion.png").read_text() == "held-out: confusion matrix on the test set"
    assert not (documented.root / "docs" / "figures").exists()


def test_the_report_is_about_the_published_runs(published: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jinja2")
    monkeypatch.setattr(evaluate, "draw", lambda shown, run: {})  # because it takes seconds
    assert published.main("--report", "mlp-s1") == 0
    text = (published.results / "report.html").read_text()
    assert "mlp-s0" in text and "mlp-s1" in text


def test_every_block_is_written_and_holds(documented: Site) -> None:
    text = documented.document.read_text()
    for expected in ("** (`mlp`, mean of 2 seeds)", "| mlp | **", "| mlp | 0.0", "| *a human annotator",
                     "| MSE against the one-hot label | 1.5 | 0.01486 |", "Best classes of `mlp-s0` (accuracy",
                     "10 of the 2,000 test images are near-duplicates", "| mean confidence (%) |", "---:|\n| mlp-s0 | ",
                     "exact McNemar test", "| overfit_riddle.md | 7 |", "$ python predict.py docs/figures/drawing.png"):
        assert expected in text
    assert text.count("above") == len(blocks.BLOCKS)
    assert documented.main("--check") == 0


def block(site: Site, name: str) -> str:
    """The text of a block in `documented`'s document."""
    text = site.document.read_text()
    return next(text[begins:ends].strip() for found, begins, ends in blocks.find_blocks(text, "all.md")
                if found == name)


def test_blocks_follow_from_the_logits(documented: Site, test_set: TestSet) -> None:
    labels = test_set.fine_labels
    one, other = (FinishedRun(documented.published / name, published=True).logits(test_set)
                  for name in ("mlp-s0", "mlp-s1"))
    together = (softmax(one) + softmax(other)).argmax(1)
    alone = [100 * (logits.argmax(1) == labels).mean() for logits in (one, other)]
    (row,) = block(documented, "squeeze").splitlines()[2:]  # the other recipe has one seed
    assert row == f"| mlp | 2 | {np.mean(alone):.2f} | {100 * (together == labels).mean():.2f} |"

    confidence = 100 * softmax(one).max(1).mean()
    row = block(documented, "calibration").splitlines()[2]
    assert row.startswith(f"| mlp-s0 | {alone[0]:.2f} | {confidence:.2f} | ")

    superclass = dict(zip(labels.tolist(), test_set.coarse_labels.tolist(), strict=True))
    errors = [(predicted, label) for predicted, label in zip(one.argmax(1).tolist(), labels.tolist(), strict=True)
              if predicted != label]
    related = 100 * np.mean([superclass[predicted] == superclass[label] for predicted, label in errors])
    assert f"The superclass is right in {related:.0f}% of its errors" in block(documented, "classes")


def test_each_block_edited_by_hand_fails_the_check(documented: Site, capsys: pytest.CaptureFixture[str]) -> None:
    whole = documented.document.read_text()

    def change_a_digit(name: str, text: str) -> str:
        digit = next(at for at, character in enumerate(text) if character.isdigit())
        return f"{text[:digit]}{(int(text[digit]) + 1) % 10}{text[digit + 1:]}"

    documented.document.write_text(blocks.with_blocks(whole, "all.md", change_a_digit))
    assert documented.main("--check") == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(blocks.BLOCKS)
    assert all("all.md" in line and f"block {name} " in line for line, name in zip(lines, blocks.BLOCKS, strict=True))
    assert documented.main() == 0
    assert documented.document.read_text() == whole


QUOTES = ["top1 of mlp", "spread of mlp", "top5 of mlp", "superclass of mlp", "training of mlp", "unchanged of mlp",
          "noise of mlp", "noise 0.05 of mlp", "minutes of mlp over theirs (7 epochs)",
          "flops of mlp over theirs (7 epochs)"]
COSTS = """
| recipe | training FLOPs | training time | test accuracy (%) |
|---|---|---|---|
| --recipe mlp | 4e13 | 3.0 min | |
| theirs (7 epochs) | 1e14 | 2.0 h | 70.7 |
"""


def test_quoted_numbers_are_renewed_and_checked(documented: Site, capsys: pytest.CaptureFixture[str]) -> None:
    (documented.published / "benchmarks" / "time_to_accuracy.md").write_text(COSTS)
    with open(documented.document, "a") as file:
        file.writelines(f"It is 0.000<!-- {key} -->%,\n" for key in QUOTES)
        file.write("or 0<!-- top1 of\nmlp -->, and 7<!-- a remark --> or 7<!-- noise 3 of mlp -->.\n")
    assert documented.main("--check") == 1
    assert capsys.readouterr().out.count("the number '") == len(QUOTES) + 1
    assert documented.main() == 0
    text = documented.document.read_text()
    found = {key: number for number, key in re.findall(r"(\S+)<!-- ([^<]+) -->%", text)}
    row = next(row for row in read_json(documented.results / "results.json") if row["recipe"] == "mlp")
    curves = [metrics(documented.published / name)[-1] for name in ("mlp-s0", "mlp-s1")]
    run, test = FinishedRun(documented.published / "mlp-s0", published=True), TestSet("", synthetic=True)
    numbers = {name: row[name]["mean"] for name in ("top1", "top5", "superclass")}
    numbers |= {"spread": row["top1"]["std"], "unchanged": corruptions.clean_accuracy(run, test)}
    for name, number in numbers.items():
        assert found[f"{name} of mlp"] == f"{number:.3f}"
    assert found["training of mlp"] == f"{np.mean([float(one['train_acc']) for one in curves]):.3f}"
    assert found["minutes of mlp over theirs (7 epochs)"] == "0.025"
    assert found["flops of mlp over theirs (7 epochs)"] == "0.400"
    assert 0 < float(found["noise 0.05 of mlp"]) != float(found["noise of mlp"])
    assert f"or {row['top1']['mean']:.0f}<!-- top1 of\nmlp -->" in text
    capsys.readouterr()
    assert documented.main("--check") == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "called 'a remark'" in lines[0] and "strengths of noise are" in lines[1]


def test_pages_and_figures_show_calibrated_probabilities(documented: Site) -> None:
    test = TestSet("", synthetic=True)
    runs = [run for run in find_runs(documented.results) if run.published]
    shown = Published(documented.results, runs, test)
    for name in ("mlp-s0", "other-s0"):  # only mlp is calibrated
        run = named_run(f"published/{name}", documented.results)
        temperature = publish.fitted_temperature(run, documented.results)
        assert (temperature is None) == (name == "other-s0") and temperature != 1
        np.testing.assert_array_equal(shown.calibrated_logits(run), run.logits(test) / (temperature or 1))
    assert len(shown.corrupted) == 2
    for run in shown.corrupted:
        name, (unchanged, *each) = report._corrupted(run, test)
        assert (name, unchanged) == (run.name, corruptions.clean_accuracy(run, test))
        right = corruptions.read_predicted(run, test) == test.fine_labels[corruptions.sample(test), None, None]
        assert each == pytest.approx(100 * right.mean((0, 2)))
    finding = all_figures.draw_recipes(shown)["curves"].finding
    ends = [run.curves()["train_acc"][-1] for run in runs if run.recipe == "mlp"]
    assert f"mlp ends at {np.mean(ends):.1f}% in training" in finding


def test_a_block_without_its_data_is_named_and_kept(documented: Site, capsys: pytest.CaptureFixture[str]) -> None:
    with open(documented.document, "a") as file:
        file.write(f"{START.format('no-such')}\n{END.format('no-such')}\n")
    shutil.rmtree(documented.published / "calibration")
    before = block(documented, "calibration")
    for flags, status in ((("--check",), 1), ((), 0)):
        assert documented.main(*flags) == status
        output = capsys.readouterr().out
        assert "block calibration: " in output and "block no-such: " in output
    assert block(documented, "calibration") == before != ""


def lose_the_drawing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "ROOT", site.results)


def damage_the_weights(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in site.published.glob("*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(("spoil", "reason"), [
    (lose_the_drawing, "drawing.png is missing"), (damage_the_weights, "cannot be read as a weights file")])
def test_a_drawing_that_cannot_be_classified_is_named(
    spoil: Callable[[Site, pytest.MonkeyPatch], None], reason: str, documented: Site,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(documented, monkeypatch)
    assert documented.main("--check") == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "block prediction: " in line]
    assert reason in line


def test_with_blocks_changes_only_the_text_of_blocks() -> None:
    once = blocks.with_blocks(README, "README.md", lambda name, old: "| a |")
    assert once == README.replace("-->\n<!--", "-->\n| a |\n<!--")
    assert blocks.with_blocks(once, "README.md", lambda name, old: "| b |") == once.replace("| a |", "| b |")
    assert blocks.with_blocks(once, "README.md", lambda name, old: old) == once


def test_the_committed_blocks_follow_from_committed_files() -> None:
    """As far as they can be made without the dataset."""
    rows = read_json(ROOT / "results" / "results.json")
    losses = read_json(ROOT / "results/published/overfit_batch/mlp/overfit.json")["losses"]
    made = {"headline": headline(rows), "results": short_table(rows), "details": full_table(rows),
            "overfit": overfit_table(losses)}
    found = []
    for path in blocks.documents(ROOT):
        text = path.read_text()
        assert blocks.with_blocks(text, path.name, lambda name, old: made.get(name, old)) == text
        found += [name for name, *_ in blocks.find_blocks(text, path.name)]
    assert set(found) == set(blocks.BLOCKS)


# ---- The check of what is published ---------------------------------------------------------------------------------


def scale_weights(run: Path, factor: float) -> None:
    """Scale a run's head, which changes its logits and not its predictions."""
    model = load_model(run / "model.safetensors")
    model.head.weight.data.mul_(factor)
    save_model(model, run / "model.safetensors")


def edit_predictions(run: Path, **changes: np.ndarray) -> None:
    with np.load(run / "predictions.npz") as file:
        saved = dict(file)
    np.savez_compressed(run / "predictions.npz", **{**saved, **changes})


def edit_readme(site: Site) -> None:
    site.readme.write_text(site.readme.read_text().replace("** | 2 |", "** | 3 |"))


def edit_results(site: Site) -> None:
    rows = read_json(site.results / "results.json")
    rows[0]["top1"]["mean"] += 0.01
    (site.results / "results.json").write_text(json.dumps(rows))


def replace_weights(site: Site) -> None:
    scale_weights(site.published / "mlp-s0", 1.5)


def replace_weights_and_their_digest(site: Site) -> None:
    replace_weights(site)
    digest = hashlib.sha256((site.published / "mlp-s0" / "model.safetensors").read_bytes()).hexdigest()
    edit_predictions(site.published / "mlp-s0", weights_sha256=np.array(digest))


def swap_classes(run: Path) -> None:
    """Reverse the order of the classes in the predictions; the hashes and the digest stay."""
    with np.load(run / "predictions.npz") as file:
        logits = file["logits"]
    edit_predictions(run, logits=logits[:, ::-1])


def replace_predictions_with_weights(site: Site) -> None:
    swap_classes(site.published / "mlp-s0")


def replace_predictions_without_weights(site: Site) -> None:
    swap_classes(site.published / "mlp-s1")


def remove_a_run(site: Site) -> None:
    shutil.rmtree(site.published / "mlp-s1")


def remove_predictions(site: Site) -> None:
    (site.published / "mlp-s1" / "predictions.npz").unlink()


def replace_weights_and_edit_readme(site: Site) -> None:
    replace_weights(site)
    edit_readme(site)


def edit_corruptions(run: Path, **changes: np.ndarray) -> None:
    with np.load(run / "corruptions.npz") as file:
        saved = dict(file)
    np.savez_compressed(run / "corruptions.npz", **{**saved, **changes})


def test_the_block_of_corruptions_follows_from_the_predictions(documented: Site, test_set: TestSet) -> None:
    """Those of both recipes, on two images of each class; mlp-s1 has no weights."""
    run = FinishedRun(documented.published / "mlp-s0", published=True)
    chosen = corruptions.sample(test_set)
    assert np.bincount(test_set.fine_labels[chosen]).tolist() == [2] * 100
    with np.load(run.folder / "corruptions.npz") as file:
        correct = file["predicted"] == test_set.fine_labels[chosen, None, None]
        noise, pixels = (file["cells"].ravel().tolist().index(cell) for cell in ("noise 0.05", "pixelation 2"))
    clean = (run.logits(test_set)[chosen].argmax(1) == test_set.fine_labels[chosen]).mean()
    goals = correct.reshape(200, -1).mean(0)[[noise, pixels]]
    numbers = [100 * number for number in (clean, *correct.mean((0, 2)), *goals)]
    text = block(documented, "corruptions")
    assert "on 200 test images" in text and "noise 0.01, 0.02, 0.05, 0.1, 0.2 (standard deviation)" in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["run", "mlp-s0", "other-s0"]
    assert rows[1][1:] == [f"{number:.1f}" for number in numbers]


def test_measuring_corruptions_renews_the_documents(documented: Site, capsys: pytest.CaptureFixture[str]) -> None:
    whole = documented.document.read_text()
    (documented.published / "other-s0" / "corruptions.npz").unlink()
    assert documented.main("--check") == 1 and documented.main() == 0
    assert "Not measured yet: other-s0." in block(documented, "corruptions") and documented.main("--check") == 0
    (documented.published / "mlp-s0" / "corruptions.npz").unlink()
    capsys.readouterr()
    assert documented.main("--check") == 1
    assert "block corruptions: no published run is measured on corrupted images: run " in capsys.readouterr().out
    assert documented.main("--corruptions", "--data-dir", str(documented.root)) == 0
    assert "up to date" in capsys.readouterr().out
    assert documented.document.read_text() == whole and documented.main("--check") == 0


@pytest.mark.parametrize(("changes", "reason"), [
    ({"predicted": np.zeros((200, 8, 5), np.uint8)}, "predictions differ now for noise: delete the file"),
    ({"predicted": np.zeros((100, 8, 5), np.uint8)}, "was made with other images or corruptions"),
    ({"cells": np.full((8, 5), "noise 0.3")}, "was made with other images or corruptions"),
    ({"weights_sha256": np.array("0" * 64)}, "was made with other weights"),
])
def test_corrupted_predictions_that_do_not_hold_fail_the_check(
    changes: dict[str, np.ndarray], reason: str, documented: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_corruptions(documented.published / "mlp-s0", **changes)
    assert documented.main("--check") == 1
    lines = capsys.readouterr().out.splitlines()
    assert any("mlp-s0/corruptions.npz" in line and reason in line for line in lines), lines


def test_a_fresh_publication_passes_the_check(published: Site, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(published.root)
    assert published.main("--check") == 0
    assert "holds" in capsys.readouterr().out
    assert contents(published.root) == before


@pytest.mark.parametrize(("tamper", "named"), [
    (edit_readme, ["README.md"]),
    (edit_results, ["results.json"]),
    (replace_weights, ["mlp-s0: its predictions were made with other weights"]),
    (replace_weights_and_their_digest, ["mlp-s0: weights and predictions differ"]),
    (replace_predictions_with_weights, ["results.json", "README.md", "mlp-s0"]),
    (replace_predictions_without_weights, ["results.json", "README.md"]),
    (replace_weights_and_edit_readme, ["README.md", "mlp-s0"]),  # one problem does not hide another
    (remove_a_run, ["results.json", "README.md"]),
    (remove_predictions, ["mlp-s1"]),
])
def test_each_thing_tampered_with_fails_the_check(
    tamper: Callable[[Site], None], named: list[str], published: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    tamper(published)
    assert published.main("--check") == 1
    captured = capsys.readouterr()
    lines = (captured.out + captured.err).splitlines()
    assert len(lines) >= len(named)
    assert [name for name in named if not any(name in line for line in lines)] == []


def test_an_empty_publication_fails_the_check(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    (site.results / "results.json").write_text("[]")
    site.readme.write_text("\n".join([README, *(f"{START.format(name)}\n{END.format(name)}"
                                                for name in ("headline", "classes"))]))
    assert site.main("--check") == 1
    assert "nothing is published" in capsys.readouterr().out


@pytest.mark.parametrize("readme", [
    "no markers", START.format("results"), END.format("results"), f"{END.format('results')}\n{START.format('results')}",
    f"{START.format('results')}\n{END.format('overfit')}", f"{README}\n{START.format('classes')}"])
def test_a_readme_without_its_markers_is_refused(
    readme: str, published: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    published.readme.write_text(readme)
    assert published.main("--check") == 1
    assert "marker" in capsys.readouterr().out
    assert published.main() == 2
    assert "marker" in error_line(capsys)
    assert published.readme.read_text() == readme
