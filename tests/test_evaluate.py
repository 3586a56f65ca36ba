"""Evaluation: what is measured of a user's runs, what may be published, and whether a published number holds.

A published run is a synthetic one whose config.json was made to say otherwise, and the test set a synthetic one too.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import evaluate
from evaluation import blocks, publish
from evaluation import runs as finished_runs
from evaluation.metrics import measure, softmax
from evaluation.runs import FinishedRun, TestPictures, find_runs
from evaluation.tables import CITED, readme_table
from models import load_model, save_model
from readings import overfit_table
from settings import exit_status
from tests.helpers import (
    ROOT,
    drawn_once,  # noqa: F401 (a fixture)
    edit_settings,
    error_line,
    read_json,
    run_names,
    train_tiny,
)
from utils import load_cifar100, load_test_set

SYNTHETIC_PICTURES = 2000
START = "<!-- {}: written by `python evaluate.py`, checked by `python evaluate.py --check` -->"
END = "<!-- end of {} -->"
README = f"# Title\n\nabove\n\n{START.format('results')}\n{END.format('results')}\n\nbelow\n"


def evaluate_main(results_dir: Path, *flags: str) -> int:
    """The exit status of `evaluate.py` with these flags, in this process."""
    return exit_status(lambda: evaluate.main([*flags, "--results-dir", str(results_dir)]))


def test_test_pictures_are_in_the_order_of_their_hashes() -> None:
    test = TestPictures("", synthetic=True)
    assert test.hashes.dtype == np.uint64
    assert (test.hashes[:-1] < test.hashes[1:]).all()
    split = load_test_set("", use_synthetic=True)
    position = int((split.images == test.images[17]).all((1, 2, 3)).nonzero())
    assert test.fine_labels[17] == split.fine_labels[position]
    assert test.coarse_labels[17] == split.coarse_labels[position]


# ---------------------------------------------------------------------------------------------------------------------
# A user's own runs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds on all synthetic pictures, mlp-s0 and mlp-s1; tests work on copies."""
    results_dir = tmp_path_factory.mktemp("trained")
    assert train_tiny(results_dir, "--train-on-all", "--seeds", "0,1", "--lr", "0.01", "--batch-size", "200") == 0
    return results_dir


@pytest.fixture
def own(trained: Path, tmp_path: Path) -> Path:
    """A results folder with one synthetic run, mlp-s0."""
    shutil.copytree(trained / "mlp-s0", tmp_path / "results" / "mlp-s0")
    return tmp_path / "results"


def test_a_synthetic_run_is_measured_and_flagged(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate_main(own) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("mlp-s0"))
    assert row.endswith("SYNTHETIC")
    model, split = load_model(own / "mlp-s0" / "model.safetensors"), load_test_set("", use_synthetic=True)
    with torch.no_grad():
        accuracy = 100 * (model(split.images / 255).argmax(1) == split.fine_labels).float().mean().item()
    assert float(row.split()[1]) == pytest.approx(accuracy, abs=0.11)  # float16 may turn a picture or two
    assert accuracy > 3  # percent; guessing gives 1


def test_predictions_are_kept_with_the_pictures_names(own: Path) -> None:
    assert evaluate_main(own, "mlp-s0") == 0
    with np.load(own / "mlp-s0" / "predictions.npz") as file:
        logits, hashes = file["logits"], file["hash"]
    assert logits.shape == (SYNTHETIC_PICTURES, 100)
    assert logits.dtype == np.float16
    assert hashes.dtype == np.uint64
    assert (np.diff(hashes) > 0).all()
    test = TestPictures("", synthetic=True)
    assert np.array_equal(hashes, test.hashes)
    model = load_model(own / "mlp-s0" / "model.safetensors")
    np.testing.assert_allclose(logits, model(test.images / 255).detach().numpy(), atol=0.02)


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


def test_a_missing_run_is_named_with_those_there_are(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate_main(own, "nope") == 2
    line = error_line(capsys)
    assert "nope" in line and "mlp-s0" in line


def test_nothing_to_evaluate_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate_main(tmp_path) == 2
    assert "train_mlp.py" in error_line(capsys)


@pytest.mark.parametrize("flags", [
    ("--check", "mlp-s0"), ("--check", "--publish", "mlp-s0"), ("--nonsense",), ("--tta", "flip"),
    ("--tta", "flip", "--compare", "mlp-s0", "mlp-s0"), ("--compare", "mlp-s0"), ("--figures", "--report"),
    ("--ensemble", "mlp-s0"), ("--ensemble", "mlp-s0", "mlp-s0"), ("--calibrate", "mlp-s0", "--publish", "mlp-s0")])
def test_misuse_is_one_error_line(flags: tuple[str, ...], own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate_main(own, *flags) == 2
    error_line(capsys)


def rows_of(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The table on the screen: what stands behind each name."""
    heading, *lines = [line for line in capsys.readouterr().out.splitlines() if line]
    start = heading.index("top-1") - 1
    return {line[:start].strip(): line[start:].strip() for line in lines}


def test_averaging_over_mirror_images_has_a_line_of_its_own(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate_main(own, "mlp-s0") == 0
    plain = rows_of(capsys)
    assert evaluate_main(own, "mlp-s0", "--tta", "flip") == 0
    rows = rows_of(capsys)
    assert list(rows) == ["mlp-s0", "mlp-s0 + flip averaging"]
    assert rows["mlp-s0"] == plain["mlp-s0"]
    model, test = load_model(own / "mlp-s0" / "model.safetensors"), TestPictures("", synthetic=True)
    with torch.no_grad():
        mean = sum(model(images / 255).softmax(1) for images in (test.images, test.images.flip(3)))
    accuracy = 100 * (mean.argmax(1).numpy() == test.fine_labels).mean()
    assert float(rows["mlp-s0 + flip averaging"].split()[0]) == pytest.approx(accuracy, abs=0.11)


def test_an_ensemble_averages_probabilities_in_a_line_of_its_own(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate_main(trained, "--ensemble", "mlp-s0", "mlp-s1") == 0
    rows = rows_of(capsys)
    assert list(rows) == ["mlp-s0", "mlp-s1", "ensemble of mlp-s0, mlp-s1"]
    test = TestPictures("", synthetic=True)
    logits = [FinishedRun(trained / name).logits(test) for name in ("mlp-s0", "mlp-s1")]
    mean = sum(torch.from_numpy(one).double().softmax(1) for one in logits).numpy()
    together = rows["ensemble of mlp-s0, mlp-s1"].split()
    assert together[0] == f"{100 * (mean.argmax(1) == test.fine_labels).mean():.2f}"
    assert float(together[0]) > max(float(rows[name].split()[0]) for name in ("mlp-s0", "mlp-s1"))
    parameters = read_json(trained / "mlp-s0" / "result.json")["parameters"]
    assert f"{2 * parameters:,}" in together


def test_two_runs_are_compared_on_the_same_pictures(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate_main(trained, "--compare", "mlp-s0", "mlp-s1") == 0
    words = capsys.readouterr().out
    test = TestPictures("", synthetic=True)
    a, b = (FinishedRun(trained / name).logits(test).argmax(1) == test.fine_labels for name in ("mlp-s0", "mlp-s1"))
    assert f"mlp-s0 {100 * a.mean():.2f}%, mlp-s1 {100 * b.mean():.2f}%" in words
    assert f"Only mlp-s0 is right on {(a & ~b).sum()} of them, only mlp-s1 on {(b & ~a).sum()}" in words
    assert evaluate_main(trained, "--compare", "mlp-s0", "mlp-s0") == 0
    words = capsys.readouterr().out
    assert "p = 1 " in words and "chance may explain the difference" in words


# ---------------------------------------------------------------------------------------------------------------------
# Publishing
# ---------------------------------------------------------------------------------------------------------------------


def edit_config(run: Path, **changes: Any) -> None:
    """Make what config.json says beside the settings something else."""
    config = read_json(run / "config.json")
    (run / "config.json").write_text(json.dumps({**config, **changes}))


def claim_to_be_the_recipe(run: Path) -> None:
    edit_settings(run, synthetic=False)
    edit_config(run, command="python train_mlp.py --train-on-all --seed 0", git_changes=False)


@dataclass(frozen=True)
class Place:
    """A stand-in for the repository: its README and its results folder."""

    readme: Path
    results: Path

    def main(self, *flags: str) -> int:
        return evaluate_main(self.results, *flags)

    @property
    def published(self) -> Path:
        return self.results / "published"


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Two runs that claim to be of CIFAR-100, mlp-s0 and another-name (seed 1), and a test set that fits them."""
    place = Place(tmp_path / "README.md", tmp_path / "results")
    place.readme.write_text(README)
    for source, name in (("mlp-s0", "mlp-s0"), ("mlp-s1", "another-name")):
        shutil.copytree(trained / source, place.results / name)
        claim_to_be_the_recipe(place.results / name)
    monkeypatch.setattr(finished_runs, "load_test_set",
                        lambda data_dir, *, use_synthetic=False: load_test_set(data_dir, use_synthetic=True))
    monkeypatch.setattr(evaluate, "ROOT", tmp_path)
    monkeypatch.setattr(evaluate, "RESULTS_DIR", place.results)
    return place


@pytest.fixture
def published(place: Place, capsys: pytest.CaptureFixture[str]) -> Place:
    """`place` with both runs published, and README.md and results.json written."""
    assert place.main("--publish", "mlp-s0", "another-name") == 0
    capsys.readouterr()
    return place


def test_only_one_seed_of_a_recipe_keeps_its_weights(published: Place) -> None:
    assert run_names(published.published) == ["mlp-s0", "mlp-s1"]
    recorded = {"config.json", "metrics.csv", "loss.png", "result.json", "predictions.npz"}
    assert set(run_names(published.published / "mlp-s0")) == recorded | {"model.safetensors"}
    assert set(run_names(published.published / "mlp-s1")) == recorded


def test_weights_too_large_to_keep_are_left_out(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "MAX_WEIGHTS_BYTES", 1000)
    assert place.main("--publish", "mlp-s0") == 0
    assert "model.safetensors" not in run_names(place.published / "mlp-s0")
    assert place.main("--check") == 0


def test_results_have_mean_and_spread_over_the_seeds(published: Place) -> None:
    (row,) = read_json(published.results / "results.json")
    assert row["recipe"] == "mlp"
    assert row["seeds"] == [0, 1]
    test = TestPictures("", synthetic=True)
    each = [measure(FinishedRun(published.published / name, published=True).logits(test),
                             test.fine_labels, test.coarse_labels) for name in ("mlp-s0", "mlp-s1")]
    for name in ("top1", "top5", "superclass", "cross_entropy"):
        values = [numbers[name] for numbers in each]
        assert row[name]["each"] == pytest.approx(values, abs=1e-4)
        assert row[name]["mean"] == pytest.approx(sum(values) / 2, abs=1e-4)
        assert row[name]["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5, abs=1e-4)  # of a sample of two
    assert row["top1"]["std"] > 0
    assert row["interval95"][0] < row["top1"]["mean"] < row["interval95"][1]
    assert row["command"].startswith("python train_mlp.py")
    assert row["command"].endswith("--seeds 0,1")


def test_the_readme_gets_the_table_and_keeps_the_rest(published: Place) -> None:
    text = published.readme.read_text()
    assert text.startswith("# Title\n\nabove\n\n") and text.endswith("\n\nbelow\n")
    row = next(line for line in text.splitlines() if line.startswith("| mlp |"))
    top1 = read_json(published.results / "results.json")[0]["top1"]
    assert f"**{top1['mean']:.2f}** ± {top1['std']:.2f} (2 seeds)" in row
    assert published.main() == 0
    assert published.readme.read_text() == text


def test_evaluating_one_run_renews_nothing(published: Place) -> None:
    published.readme.write_text(README)
    (published.results / "results.json").unlink()
    assert published.main("mlp-s0") == 0
    assert published.readme.read_text() == README
    assert not (published.results / "results.json").exists()


def test_a_comparison_says_which_of_two_runs_of_a_name_it_means(
    published: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """The own mlp-s0 comes before the published one; mlp-s1 is published only, from another-name."""
    assert published.main("--compare", "mlp-s0", "mlp-s1") == 0
    words = capsys.readouterr().out
    assert words.startswith("mlp-s0 ") and "only published/mlp-s1 on" in words
    assert published.main("--compare", "published/mlp-s0", "mlp-s1") == 0
    assert capsys.readouterr().out.startswith("published/mlp-s0 ")


def test_a_published_run_is_not_replaced(published: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert published.main("--publish", "mlp-s0") == 2
    assert "published already" in error_line(capsys)


@pytest.mark.parametrize("changes", [{"precision": "bfloat16"}, {"lr": 0.02}])  # lr: the recipe has changed since
def test_seeds_trained_with_different_settings_are_not_published_together(
    changes: dict[str, Any], place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_settings(place.results / "another-name", **changes)
    assert place.main("--publish", "mlp-s0", "another-name") == 2
    assert str(*changes.values()) in error_line(capsys)
    assert run_names(place.published) == ["mlp-s0"]
    assert place.readme.read_text() == README


def test_another_recipes_weights_do_not_count_as_a_siblings(place: Place) -> None:
    other = place.published / "mlp-strong-s0"
    other.mkdir(parents=True)
    (other / "model.safetensors").write_bytes(b"weights")
    assert place.main("--publish", "mlp-s0") == 0
    assert "model.safetensors" in run_names(place.published / "mlp-s0")


def unfinish(run: Path) -> None:
    (run / "result.json").unlink()


@pytest.mark.parametrize(("spoil", "reason"), [
    (lambda run: edit_settings(run, synthetic=True), "synthetic"),
    (unfinish, "no finished run"),
    (lambda run: edit_settings(run, train_on_all=False), "--train-on-all"),
    (shutil.rmtree, "no finished run"),
    (lambda run: edit_config(run, git_changes=True), "clean commit"),
    (lambda run: edit_config(run, command="python train_mlp.py --train-on-all --lr 0.02 --seed 0"), "--lr 0.02"),
    (lambda run: (run / "config.json").write_text("{}"), "config.json"),
])
def test_what_must_not_be_published_is_refused(
    spoil: Callable[[Path], None], reason: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(place.results / "mlp-s0")
    assert place.main("--publish", "mlp-s0") == 2
    assert reason in error_line(capsys)
    assert run_names(place.published) == []


def test_only_the_plain_overfit_check_is_published(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    check = place.results / "overfit_batch" / "mlp"
    check.mkdir(parents=True)
    for file in ("overfit.png", "curves.csv"):
        (check / file).write_bytes(b"content")
    for given, passed, git_changes, status, reason in (
        ({"synthetic": True}, True, False, 2, "plain"), ({"loss": "mse-index"}, True, False, 2, "plain"),
        ({}, False, False, 2, "passed"), ({}, True, True, 2, "commit"), ({}, True, False, 0, ""),
    ):
        content = {"given": given, "readings": {"cross-entropy": {"passed": passed}}, "git_changes": git_changes}
        (check / "overfit.json").write_text(json.dumps(content))
        assert place.main("--publish", "overfit_batch/mlp") == status
        if reason:
            assert reason in error_line(capsys)
    assert (place.published / "overfit_batch" / "mlp" / "overfit.png").read_bytes() == b"content"


def test_publishing_that_fails_half_way_publishes_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def copy_until_the_disk_is_full(source: Path, target: Path) -> None:
        if source.name == "model.safetensors":
            raise OSError(28, "No space left on device", str(target))
        copy(source, target)

    copy = shutil.copyfile
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", copy_until_the_disk_is_full)
        assert place.main("--publish", "mlp-s0") == 2
    error_line(capsys)
    assert [run.name for run in find_runs(place.results) if run.published] == []


# ---------------------------------------------------------------------------------------------------------------------
# Near-duplicates and calibration
# ---------------------------------------------------------------------------------------------------------------------


def list_near_duplicates(place: Place, hashes: np.ndarray) -> None:
    """Write what explore.py writes, of these test pictures."""
    (place.results / "data").mkdir()
    lines = [f"{one:016x},{1:016x},0.9,apple,apple\n" for one in hashes]
    text = ["test_hash,train_hash,similarity,test_class,train_class\n", *lines, *lines[:1]]  # one is listed twice
    (place.results / "data" / "near_duplicates.csv").write_text("".join(text))


def test_accuracy_is_told_without_near_duplicates_too(published: Place, capsys: pytest.CaptureFixture[str]) -> None:
    test = TestPictures("", synthetic=True)
    right = FinishedRun(published.published / "mlp-s0", published=True).logits(test).argmax(1) == test.fine_labels
    list_near_duplicates(published, test.hashes[right][:20])
    without = (right.sum() - 20) / (len(right) - 20) * 100
    assert published.main("--check") == 1  # results.json does not have it yet
    assert published.main() == 0
    (row,) = read_json(published.results / "results.json")
    assert row["top1_without_duplicates"]["each"][0] == pytest.approx(without, abs=1e-4)
    assert row["top1"]["each"][0] == pytest.approx(100 * right.mean(), abs=1e-4)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("published/mlp-s0"))
    assert f" {without:.2f} " in line
    assert published.main("--check") == 0


@pytest.mark.parametrize("name", ["no hash", "1" + 16 * "0", "-1"])  # 65 bits, and none
def test_a_damaged_list_of_near_duplicates_is_refused(
    name: str, published: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    list_near_duplicates(published, np.array([], dtype=np.uint64))
    (published.results / "data" / "near_duplicates.csv").write_text(f"test_hash\n{name}\n")
    assert published.main() == 2
    assert "near_duplicates.csv" in error_line(capsys)


@pytest.fixture
def held_out(trained: Path, published: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """`published` and a run named `held-out` of the same recipe that claims to be on 45,000 pictures."""
    shutil.copytree(trained / "mlp-s0", published.results / "held-out")
    claim_to_be_the_recipe(published.results / "held-out")
    edit_config(published.results / "held-out", command="python train_mlp.py --seed 0")
    edit_settings(published.results / "held-out", train_on_all=False)
    monkeypatch.setattr(publish, "load_cifar100", lambda data_dir: load_cifar100(data_dir, use_synthetic=True))
    return published


def test_calibration_keeps_the_held_out_pictures_logits(held_out: Place) -> None:
    assert held_out.main("--calibrate", "held-out") == 0
    folder = held_out.published / "calibration" / "mlp"
    assert run_names(folder) == ["config.json", "val_predictions.npz"]
    _, val = load_cifar100("", use_synthetic=True)
    with np.load(folder / "val_predictions.npz") as file:
        assert file["logits"].dtype == np.float16 and file["fine_labels"].dtype == np.uint8
        assert np.array_equal(file["fine_labels"], val.fine_labels.numpy())
        model = load_model(held_out.results / "held-out" / "model.safetensors")
        np.testing.assert_allclose(file["logits"], model(val.images / 255).detach().numpy(), atol=0.02)
    assert [run.name for run in find_runs(held_out.results) if run.published] == ["mlp-s0", "mlp-s1"]
    assert held_out.main("--check") == 0
    assert held_out.main("--calibrate", "held-out") == 0  # in place of the older one


def test_a_calibration_of_other_settings_is_refused(documented: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """As after a recipe was changed, trained and published again."""
    edit_settings(documented.published / "calibration" / "mlp", lr=0.02)
    assert documented.main("--check") == 1
    assert "lr: 0.01 and 0.02" in capsys.readouterr().out
    assert documented.main("--figures", "mlp-s0") == 2
    assert "lr: 0.01 and 0.02" in error_line(capsys)


@pytest.mark.parametrize(("spoil", "reason"), [
    (lambda run: edit_settings(run, train_on_all=True), "without --train-on-all"),
    (lambda run: edit_settings(run, synthetic=True), "synthetic"),
    (lambda run: edit_settings(run, lr=0.02), "lr: "),
    (lambda run: edit_config(run, command="python train_mlp.py --lr 0.02 --seed 0"), "--lr 0.02"),
    (lambda run: edit_config(run, git_changes=True), "clean commit"),
    (unfinish, "no finished run"),
])
def test_what_must_not_calibrate_is_refused(
    spoil: Callable[[Path], None], reason: str, held_out: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(held_out.results / "held-out")
    assert held_out.main("--calibrate", "held-out") == 2
    assert reason in error_line(capsys)
    assert "calibration" not in run_names(held_out.published)


# ---------------------------------------------------------------------------------------------------------------------
# Figures, report and blocks
# ---------------------------------------------------------------------------------------------------------------------


def test_figures_are_drawn_beside_the_documents(held_out: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert held_out.main("--calibrate", "held-out") == 0
    assert held_out.main("--figures", "mlp-s1") == 0
    folder = held_out.results.parent / "docs" / "figures"
    assert run_names(folder) == sorted(f"{name}.png" for name in (
        "confusion", "classes", "confused", "mistakes", "reliability", "curves", "accuracy-parameters",
        "accuracy-minutes"))
    assert all(1000 < path.stat().st_size < 300_000 for path in folder.iterdir())
    assert held_out.main("--figures", "held-out") == 2  # documents show published runs only
    assert "held-out" in error_line(capsys)


def test_the_report_is_of_the_published_runs(published: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jinja2")
    monkeypatch.setattr(evaluate, "draw", lambda published, run: {})  # which takes seconds
    assert published.main("--report", "mlp-s1") == 0
    text = (published.results / "report.html").read_text()
    assert "mlp-s0" in text and "mlp-s1" in text


@pytest.fixture
def documented(held_out: Place, capsys: pytest.CaptureFixture[str]) -> Place:
    """Two recipes are published, one of them calibrated, and a document has every block that there is."""
    shutil.copytree(held_out.published / "mlp-s0", held_out.published / "other-s0")
    edit_settings(held_out.published / "other-s0", recipe="other")
    folder = held_out.published / "overfit_batch" / "mlp"
    shutil.copytree(ROOT / "results" / "published" / "overfit_batch" / "mlp", folder)
    (held_out.published / "benchmarks").mkdir()
    for file in ("time_to_accuracy.md", "overfit_riddle.md", "cost.md", "scaling.md"):
        (held_out.published / "benchmarks" / file).write_text(f"| {file} | 7 |\n")
    list_near_duplicates(held_out, TestPictures("", synthetic=True).hashes[:10])
    assert held_out.main("--calibrate", "held-out") == 0
    document = held_out.readme.parent / "docs" / "all.md"
    document.parent.mkdir()
    document.write_text("\n".join(f"above\n\n{START.format(name)}\n{END.format(name)}\n" for name in blocks.BLOCKS))
    assert held_out.main() == 0
    capsys.readouterr()
    return held_out


def test_every_block_is_written_and_holds(documented: Place) -> None:
    text = (documented.readme.parent / "docs" / "all.md").read_text()
    for expected in ("| mlp | ", "| MSE against the one-hot label | 0.01486 |", "knows these classes best",
                     "% are at least of the right superclass", "10 are near-duplicates", "| mean confidence (%) |",
                     "---:|\n| mlp-s0 | ", "exact McNemar test", "| overfit_riddle.md | 7 |",
                     "$ python predict.py docs/figures/drawing.png"):
        assert expected in text
    assert text.count("above") == len(blocks.BLOCKS)
    assert documented.main("--check") == 0


def block(place: Place, name: str) -> str:
    """What stands in a block of `documented`'s document."""
    text = (place.readme.parent / "docs" / "all.md").read_text()
    return next(text[begins:ends].strip() for found, begins, ends in blocks.find_blocks(text, "all.md")
                if found == name)


def test_blocks_hold_what_the_logits_say(documented: Place) -> None:
    test = TestPictures("", synthetic=True)
    one, other = (FinishedRun(documented.published / name, published=True).logits(test)
                  for name in ("mlp-s0", "mlp-s1"))
    together = (softmax(one) + softmax(other)).argmax(1)
    alone = [100 * (logits.argmax(1) == test.fine_labels).mean() for logits in (one, other)]
    (row,) = block(documented, "squeeze").splitlines()[2:]  # the other recipe has one seed
    assert row == f"| mlp | 2 | {np.mean(alone):.2f} | {100 * (together == test.fine_labels).mean():.2f} |"

    sure = 100 * softmax(one).max(1).mean()
    assert block(documented, "calibration").splitlines()[2].startswith(f"| mlp-s0 | {alone[0]:.2f} | {sure:.2f} | ")

    superclass = dict(zip(test.fine_labels.tolist(), test.coarse_labels.tolist(), strict=True))
    wrong = [(guess, label) for guess, label in zip(one.argmax(1).tolist(), test.fine_labels.tolist(), strict=True)
             if guess != label]
    related = 100 * np.mean([superclass[guess] == superclass[label] for guess, label in wrong])
    assert f"Of its wrong guesses {related:.0f}% are" in block(documented, "classes")


def test_each_block_edited_by_hand_fails_the_check(documented: Place, capsys: pytest.CaptureFixture[str]) -> None:
    document = documented.readme.parent / "docs" / "all.md"
    whole = document.read_text()

    def change_a_digit(name: str, text: str) -> str:
        digit = next(at for at, character in enumerate(text) if character.isdigit())
        return f"{text[:digit]}{(int(text[digit]) + 1) % 10}{text[digit + 1:]}"

    document.write_text(blocks.with_blocks(whole, "all.md", change_a_digit))
    assert documented.main("--check") == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(blocks.BLOCKS)
    assert all("all.md" in line and f"block {name} " in line for line, name in zip(lines, blocks.BLOCKS, strict=True))
    assert documented.main() == 0
    assert document.read_text() == whole


def test_a_block_without_its_data_is_left_as_it_was_and_named(
    documented: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    document = documented.readme.parent / "docs" / "all.md"
    document.write_text(f"{document.read_text()}{START.format('no-such')}\n{END.format('no-such')}\n")
    shutil.rmtree(documented.published / "calibration")
    before = document.read_text()
    for flags, status in ((("--check",), 1), ((), 0)):
        assert documented.main(*flags) == status
        output = capsys.readouterr().out
        assert "block calibration: " in output and "block no-such: " in output
    assert document.read_text() == before


def lose_the_drawing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "ROOT", place.results)


def damage_the_weights(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in place.published.glob("*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(("spoil", "reason"), [
    (lose_the_drawing, "drawing.png does not exist"), (damage_the_weights, "cannot be read as a weights file")])
def test_a_drawing_that_cannot_be_classified_is_named_with_its_block(
    spoil: Callable[[Place, pytest.MonkeyPatch], None], reason: str, documented: Place,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(documented, monkeypatch)
    assert documented.main("--check") == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "block prediction: " in line]
    assert reason in line


# ---------------------------------------------------------------------------------------------------------------------
# The check of what is published
# ---------------------------------------------------------------------------------------------------------------------


def scale_weights(run: Path, factor: float) -> None:
    """Make a run's head say everything louder, which changes its logits and not its guesses."""
    model = load_model(run / "model.safetensors")
    model.head.weight.data.mul_(factor)
    save_model(model, run / "model.safetensors")


def claim_the_weights(run: Path) -> None:
    """Make kept predictions say that they come from the weights beside them."""
    digest = hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()
    with np.load(run / "predictions.npz") as file:
        kept = dict(file)
    np.savez_compressed(run / "predictions.npz", **{**kept, "weights_sha256": np.array(digest)})


def edit_predictions(run: Path) -> None:
    """Take the classes for one another, with the hashes and the weights' digest as they were."""
    with np.load(run / "predictions.npz") as file:
        kept = dict(file)
    np.savez_compressed(run / "predictions.npz", **{**kept, "logits": kept["logits"][:, ::-1]})


def edit_readme(place: Place) -> None:
    place.readme.write_text(place.readme.read_text().replace("(2 seeds)", "(3 seeds)"))


def edit_results(place: Place) -> None:
    rows = read_json(place.results / "results.json")
    rows[0]["top1"]["mean"] += 0.01
    (place.results / "results.json").write_text(json.dumps(rows))


def replace_weights(place: Place) -> None:
    scale_weights(place.published / "mlp-s0", 1.5)


def replace_weights_and_their_digest(place: Place) -> None:
    replace_weights(place)
    claim_the_weights(place.published / "mlp-s0")


def replace_predictions_with_weights(place: Place) -> None:
    edit_predictions(place.published / "mlp-s0")


def replace_predictions_without_weights(place: Place) -> None:
    edit_predictions(place.published / "mlp-s1")


def remove_a_run(place: Place) -> None:
    shutil.rmtree(place.published / "mlp-s1")


def remove_predictions(place: Place) -> None:
    (place.published / "mlp-s1" / "predictions.npz").unlink()


def test_what_was_just_published_holds(published: Place, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in published.results.parent.rglob("*") if path.is_file()}
    assert published.main("--check") == 0
    assert "holds" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in published.results.parent.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("tamper", "named"), [
    (edit_readme, ["README.md"]),
    (edit_results, ["results.json"]),
    (replace_weights, ["mlp-s0"]),
    (replace_weights_and_their_digest, ["mlp-s0"]),
    (replace_predictions_with_weights, ["results.json", "README.md", "mlp-s0"]),
    (replace_predictions_without_weights, ["results.json", "README.md"]),
    (remove_a_run, ["results.json", "README.md"]),
    (remove_predictions, ["mlp-s1"]),
])
def test_what_was_tampered_with_fails_the_check_with_a_line_each(
    tamper: Callable[[Place], None], named: list[str], published: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    tamper(published)
    assert published.main("--check") == 1
    captured = capsys.readouterr()
    lines = (captured.out + captured.err).splitlines()
    assert len(lines) >= len(named)
    assert [name for name in named if not any(name in line for line in lines)] == []


def test_one_problem_does_not_hide_another(published: Place, capsys: pytest.CaptureFixture[str]) -> None:
    replace_weights(published)
    edit_readme(published)
    assert published.main("--check") == 1
    output = capsys.readouterr().out
    assert "mlp-s0" in output and "README.md" in output


def test_publishing_nothing_does_not_pass_the_check(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    (place.results / "results.json").write_text("[]")
    place.readme.write_text(f"{README}\n{START.format('classes')}\n{END.format('classes')}\n")
    assert place.main("--check") == 1
    assert "nothing is published" in capsys.readouterr().out


@pytest.mark.parametrize("readme", [
    "no markers", START.format("results"), END.format("results"), f"{END.format('results')}\n{START.format('results')}",
    f"{START.format('results')}\n{END.format('overfit')}", f"{README}\n{START.format('classes')}"])
def test_a_readme_without_its_markers_is_refused(
    readme: str, published: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    published.readme.write_text(readme)
    assert published.main("--check") == 1
    assert "marker" in capsys.readouterr().out
    assert published.main() == 2
    assert "marker" in error_line(capsys)
    assert published.readme.read_text() == readme


def test_with_blocks_replaces_a_blocks_text_and_nothing_else() -> None:
    once = blocks.with_blocks(README, "README.md", lambda name, old: "| a |")
    assert once == README.replace("-->\n<!--", "-->\n| a |\n<!--")
    assert blocks.with_blocks(once, "README.md", lambda name, old: "| b |") == once.replace("| a |", "| b |")
    assert blocks.with_blocks(once, "README.md", lambda name, old: old) == once


def test_the_table_ranks_our_rows_among_the_cited_ones(published: Place) -> None:
    (row,) = read_json(published.results / "results.json")
    rows = [{**row, "recipe": name, "top1": {**row["top1"], "mean": mean}}
            for name, mean in (("weak", 0.5), ("strong", 50.0), ("stronger", 75.0))]
    lines = readme_table(rows).splitlines()
    models = [line.split("|")[1].strip(" *") for line in lines[2:]]
    cited = [entry["model"] for entry in sorted(CITED, key=lambda entry: float(entry["top1"]))]
    assert [model for model in models if model in cited] == cited
    assert models[0] == "weak" and models[-1] == "stronger"
    assert cited[0] == models[1] and models.index("strong") < models.index("a human annotator")
    assert len({line.count("|") for line in lines}) == 1


def test_the_committed_blocks_are_made_from_the_committed_results() -> None:
    """As far as they can be made without the data set."""
    made = {"results": readme_table(read_json(ROOT / "results" / "results.json")),
            "overfit": overfit_table(read_json(ROOT / "results/published/overfit_batch/mlp/overfit.json")["readings"])}
    found = []
    for path in blocks.documents(ROOT):
        text = path.read_text()
        assert blocks.with_blocks(text, path.name, lambda name, old: made.get(name, old)) == text
        found += [name for name, *_ in blocks.find_blocks(text, path.name)]
    assert found.count("results") == 1 and found.count("overfit") == 2
    assert set(found) == set(blocks.BLOCKS)
