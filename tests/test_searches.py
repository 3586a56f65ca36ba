"""The waterfall of a search, from a small table of experiments."""

from pathlib import Path

import pytest

from common.errors import UserError
from evaluation.searches import best_chain, read_searches, waterfall_figure
from tests.helpers import ROOT

TABLE = """# Experiments

| | change | why | predicted | held-out top-1 (training) |
|---|---|---|---|---:|
| other | not marked | | | 99.0 |

<!-- search: drawn by `python evaluate.py --figures` -->
| | change | why | predicted | held-out top-1 (training) | kept |
|---|---|---|---|---:|---|
| base | the start | | 62.0, noise 20 | 60.0 (61.5) | |
| wide | twice the filters | | + 0.5 | **62.5** (66.3): far ahead | yes |
| stop | half of them | | + 0.3 | 40.3 (39.1) after 2 epochs; stopped | |
| then | longer | | | then 54.7, as `wide` | |
| worse | `wide` with a `base` rate | | - 0.5 (short) | 61.0 | no |
| best | `stop` and `wide` together | | 0 against `wide` | 63 (70.0, mixed); one seed | yes |
"""


def search(folder: Path, text: str = TABLE) -> Path:
    path = folder / "experiments.md"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_marked_table_is_read(tmp_path: Path) -> None:
    found = read_searches(search(tmp_path))
    assert list(found) == ["search"]
    assert [(trial.name, trial.against, trial.accuracy, trial.predicted) for trial in found["search"]] == [
        ("base", None, 60.0, 62.0), ("wide", "base", 62.5, 60.5), ("worse", "wide", 61.0, 62.0),
        ("best", "wide", 63.0, 62.5)]
    assert [trial.name for trial in best_chain(found["search"])] == ["base", "wide", "best"]


def test_the_waterfall_has_a_bar_from_level_to_level(tmp_path: Path) -> None:
    (axes,) = waterfall_figure(read_searches(search(tmp_path))["search"], "a search").axes
    assert [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches] == [
        (60.0, 60.0), (60.0, 62.5), (62.5, 61.0), (62.5, 63.0)]
    texts = [text.get_text() for text in axes.texts]
    assert "61.0 (−1.5)" in texts and "worse: wide with a base rate" in texts


def test_a_new_row_is_drawn_without_further_work(tmp_path: Path) -> None:
    path = search(tmp_path, f"{TABLE}| last | `best` again | | + 0.1 | 64.0 | |\n")
    assert [trial.name for trial in best_chain(read_searches(path)["search"])] == ["base", "wide", "best", "last"]


@pytest.mark.parametrize(("old", "new", "message"), [
    ("| change | why | predicted | held-out top-1 (training) | kept |", "| what | why | predicted | held-out | kept |",
     "table search: no heading begins with 'change'"),
    ("| 61.0 | no |", "| 61.0 |", "table search: the row worse has 5 cells instead of 6"),
])
def test_a_broken_table_is_named(old: str, new: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_searches(search(tmp_path, TABLE.replace(old, new)))
    assert "experiments.md" in str(caught.value)


def test_a_document_without_marks_has_no_waterfall(tmp_path: Path) -> None:
    assert read_searches(search(tmp_path, "# Nothing\n")) == {}
    with pytest.raises(UserError, match=r"nowhere\.md is missing"):
        read_searches(tmp_path / "nowhere.md")


def test_the_log_of_this_project_can_be_drawn() -> None:
    for name, trials in read_searches(ROOT / "docs" / "experiments.md").items():
        assert trials and all(trial.against for trial in trials[1:]), name
        assert (ROOT / "docs" / "figures" / f"{name}.png").exists()
