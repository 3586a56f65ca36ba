"""Evaluation: the numbers against hand-worked ones, what may be published, and whether a published number holds.

A published run is a synthetic one whose config.json was made to say otherwise, and the test set a synthetic one too.
"""

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
from models import load_model, save_model
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
from utils import UserError, load_test_set

SYNTHETIC_PICTURES = 2000
README = f"# Title\n\nabove\n\n{evaluate.TABLE_START}\n{evaluate.TABLE_END}\n\nbelow\n"


def evaluate_main(results_dir: Path, *flags: str) -> int:
    """The exit status of `evaluate.py` with these flags, in this process."""
    return exit_status(lambda: evaluate.main([*flags, "--results-dir", str(results_dir)]))


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


def test_measure_agrees_with_a_hand_worked_case() -> None:
    """Four classes, 0 and 1 of superclass 0, 2 and 3 of superclass 1."""
    probabilities = np.array([
        [0.30, 0.25, 0.40, 0.05],  # class 0: the class is missed, but 0.55 is on its superclass
        [0.10, 0.60, 0.20, 0.10],  # class 1: right, and so is its superclass
        [0.15, 0.05, 0.50, 0.30],  # class 2: right, and so is its superclass
        [0.70, 0.10, 0.15, 0.05],  # class 3: both wrong
    ])
    numbers = evaluate.measure(np.log(probabilities), np.arange(4), np.array([0, 0, 1, 1]))
    assert numbers == pytest.approx({
        "top1": 50, "top5": 100, "superclass": 75,
        "cross_entropy": -np.log([0.30, 0.60, 0.50, 0.05]).mean(),
    })


def test_top5_counts_the_fifth_place_and_not_the_sixth() -> None:
    logits = np.tile(np.arange(10.0), (10, 1))  # class 9 first, class 5 fifth, class 4 sixth
    numbers = evaluate.measure(logits, np.arange(10), np.zeros(10, dtype=np.int64))
    assert numbers["top1"] == 10
    assert numbers["top5"] == 50


def test_a_tie_makes_no_more_than_five_guesses() -> None:
    """A network that answers the same to everything does not get 100% for it."""
    numbers = evaluate.measure(np.zeros((100, 100)), np.arange(100), np.arange(100) // 5)
    assert numbers["top1"] == 1
    assert numbers["top5"] <= 5
    assert numbers["superclass"] == 5
    assert numbers["cross_entropy"] == pytest.approx(np.log(100))


def test_measure_takes_half_precision_and_large_logits() -> None:
    logits = (60_000 * np.eye(4)).astype(np.float16)
    numbers = evaluate.measure(logits, np.arange(4), np.array([0, 0, 1, 1]))
    assert numbers == {"top1": 100, "top5": 100, "superclass": 100, "cross_entropy": 0}


@pytest.mark.parametrize(("right", "n", "low", "high"), [  # Newcombe 1998, table I, the score method
    (81, 263, 25.53, 36.62), (15, 148, 6.24, 16.05), (0, 20, 0.0, 16.11), (1, 29, 0.61, 17.18)])
def test_interval95_agrees_with_published_intervals(right: int, n: int, low: float, high: float) -> None:
    assert evaluate.interval95(100 * right / n, n) == pytest.approx((low, high), abs=0.006)


def test_test_pictures_are_in_the_order_of_their_hashes() -> None:
    test = evaluate.TestPictures("", synthetic=True)
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
    test = evaluate.TestPictures("", synthetic=True)
    assert np.array_equal(hashes, test.hashes)
    model = load_model(own / "mlp-s0" / "model.safetensors")
    np.testing.assert_allclose(logits, model(test.images / 255).detach().numpy(), atol=0.02)


def test_predictions_are_computed_once_for_the_same_weights(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert evaluate_main(own) == 0
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "compute_logits", lambda *arguments: pytest.fail("they were computed again"))
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


@pytest.mark.parametrize("flags", [("--check", "mlp-s0"), ("--check", "--publish", "mlp-s0"), ("--nonsense",)])
def test_misuse_is_one_error_line(flags: tuple[str, ...], own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate_main(own, *flags) == 2
    error_line(capsys)


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
    monkeypatch.setattr(evaluate, "load_test_set",
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
    monkeypatch.setattr(evaluate, "MAX_WEIGHTS_BYTES", 1000)
    assert place.main("--publish", "mlp-s0") == 0
    assert "model.safetensors" not in run_names(place.published / "mlp-s0")
    assert place.main("--check") == 0


def test_results_have_mean_and_spread_over_the_seeds(published: Place) -> None:
    (row,) = read_json(published.results / "results.json")
    assert row["recipe"] == "mlp"
    assert row["seeds"] == [0, 1]
    test = evaluate.TestPictures("", synthetic=True)
    each = [evaluate.measure(evaluate.FinishedRun(published.published / name, published=True).logits(test),
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
    assert [run.name for run in evaluate.find_runs(place.results) if run.published] == []


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
    digest = evaluate.hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()
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
    assert place.main("--check") == 1
    assert "nothing is published" in capsys.readouterr().out


@pytest.mark.parametrize("readme", ["no markers", evaluate.TABLE_START, evaluate.TABLE_END,
                                    f"{evaluate.TABLE_END}\n{evaluate.TABLE_START}"])
def test_a_readme_without_its_markers_is_refused(readme: str) -> None:
    with pytest.raises(UserError, match="markers"):
        evaluate.with_table(readme, "table")


def test_with_table_replaces_the_table_and_nothing_else() -> None:
    once = evaluate.with_table(README, "| a |")
    assert "| a |" in once
    assert evaluate.with_table(once, "| b |") == once.replace("| a |", "| b |")
    assert evaluate.with_table(once, "| a |") == once


def test_the_table_ranks_our_rows_among_the_cited_ones(published: Place) -> None:
    (row,) = read_json(published.results / "results.json")
    rows = [{**row, "recipe": name, "top1": {**row["top1"], "mean": mean}}
            for name, mean in (("weak", 0.5), ("strong", 50.0), ("stronger", 75.0))]
    lines = evaluate.readme_table(rows).splitlines()
    models = [line.split("|")[1].strip(" *") for line in lines[2:]]
    cited = [entry["model"] for entry in sorted(evaluate.CITED, key=lambda entry: float(entry["top1"]))]
    assert [model for model in models if model in cited] == cited
    assert models[0] == "weak" and models[-1] == "stronger"
    assert cited[0] == models[1] and models.index("strong") < models.index("a human annotator")
    assert len({line.count("|") for line in lines}) == 1


def test_the_committed_table_is_made_from_the_committed_results() -> None:
    results, readme = ROOT / "results" / "results.json", ROOT / "README.md"
    if not results.exists():
        pytest.skip("nothing is published yet")
    assert readme.read_text() == evaluate.with_table(readme.read_text(), evaluate.readme_table(read_json(results)))
