"""The riddle of 4.2935: the measure of spikes and crossings on made-up curves, and what is published of it."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import overfit_riddle as riddle
from benchmarks.overfit_riddle import Case, Curve, crossings, spikes
from common.errors import UserError
from common.files import ROOT

SAVED = ROOT / "results" / "published" / "benchmarks" / "overfit_riddle.npz"


def flat(level: float = 0.1, **peaks: float) -> np.ndarray:
    """A curve of 1001 epochs at `level`, with `e600=3.0` for a loss of 3.0 at epoch 600."""
    losses = np.full(1001, level, dtype=np.float32)
    for epoch, loss in peaks.items():
        losses[int(epoch[1:])] = loss
    return losses


def test_a_spike_has_an_epoch_a_level_and_a_height() -> None:
    [spike] = spikes(flat(0.5, e600=4.5, e601=8.5, e602=2.5))
    assert (spike.epoch, spike.level, spike.height) == (601, 0.5, 8.0)


def test_a_rise_below_the_minimum_height_is_no_spike() -> None:
    assert spikes(flat(0.1, e600=0.1 + 0.9 * riddle.MIN_HEIGHT)) == []
    assert len(spikes(flat(0.1, e600=0.1 + 1.1 * riddle.MIN_HEIGHT))) == 1


def test_peaks_close_together_are_one_spike() -> None:
    losses = flat(0.1, e600=2.0, e620=5.0, e635=3.0, e670=1.0)
    assert [(spike.epoch, round(spike.height, 4)) for spike in spikes(losses)] == [(620, 4.9), (670, 0.9)]


def test_a_noisy_descent_has_no_spikes() -> None:
    """The level before is higher than anything on the way down."""
    descent = 3000 * np.exp(-np.arange(1001) / 60) + 0.2 * np.sin(np.arange(1001)) ** 2
    assert spikes(descent) == []


def test_a_curve_that_is_not_finite_has_no_spikes() -> None:
    assert spikes(flat(0.1, e600=9.0, e700=np.nan)) == []
    assert crossings(flat(0.1, e600=9.0, e700=np.nan)) == 0
    assert spikes(np.ones(riddle.WINDOW)) == []


def test_crossings_count_both_directions() -> None:
    assert crossings(np.array([3000.0, 5.0, 4.0, 3.0])) == 1
    assert crossings(np.array([3000.0, 4.0, 9.0, 9.0, 4.0])) == 3
    assert crossings(np.array([9.0, 5.0])) == 0


def test_only_the_second_half_counts() -> None:
    curve = Curve(flat(0.1, e200=9.0, e700=4.0, e850=4.8), 64)
    assert [spike.epoch for spike in curve.late_spikes()] == [700, 850]
    assert curve.epochs_near() == 2


@pytest.fixture
def two_cases(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """A grid of two cases; training one is a made-up curve, and the second is interrupted once."""
    grid, trained = [Case(), Case(seed=1)], []

    def train_case(split: None, case: Case) -> Curve:
        trained.append(case)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return Curve(flat(case.seed + 0.25), 60 + case.seed)

    monkeypatch.setattr(riddle, "CASES", grid)
    monkeypatch.setattr(riddle, "train_case", train_case)
    monkeypatch.setattr(riddle, "load_cifar100", lambda folder: (None, None))
    return trained


def test_a_grid_continues_after_its_last_saved_case(two_cases: list[Case], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        riddle.main(["--folder", str(tmp_path / "new")])
    assert riddle.main(["--folder", str(tmp_path / "new")]) == 0
    assert [case.seed for case in two_cases] == [0, 1, 1]
    first, second = (tmp_path / "new" / "overfit_riddle.md").read_text().splitlines()[2:]
    assert first.startswith(f"| {Case().name} | 0.25 | 0.25 |") and second.endswith("| 61 |")
    assert "| [0, 1] | 512-256-128 | 0.25; 1.2 | 0; 0 |" in (tmp_path / "new/overfit_riddle_shapes.md").read_text()


def test_a_file_that_holds_no_curves_is_left_alone(two_cases: list[Case], tmp_path: Path) -> None:
    path = tmp_path / "overfit_riddle.npz"
    path.write_bytes(b"mine")
    with pytest.raises(UserError, match="does not hold curves"):
        riddle.main(["--folder", str(tmp_path)])
    assert path.read_bytes() == b"mine" and two_cases == []


def test_the_published_tables_follow_from_the_curves() -> None:
    curves = riddle.load_curves(SAVED)
    assert set(curves) == {case.name for case in riddle.CASES}
    for suffix, table in (("", riddle.full_table), ("_shapes", riddle.shapes_table), ("_odds", riddle.odds)):
        assert SAVED.with_name(f"overfit_riddle{suffix}.md").read_text(encoding="utf-8") == f"{table(curves)}\n"
