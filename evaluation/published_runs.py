"""The source of tables, figures and sentences: published runs and the test set."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.run_files import PUBLISHED
from evaluation import corruptions
from evaluation.finished_runs import FinishedRun, TestSet
from evaluation.publish import fitted_temperature
from evaluation.tables import by_recipe, summarize


@dataclass(frozen=True)
class Published:
    """The published runs and the real test set.

    alone: this is one other run instead, for its figures and its report.
    """

    results_dir: Path
    runs: list[FinishedRun]
    test: TestSet
    alone: bool = False

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The content of an up-to-date `results.json`."""
        return summarize(self.runs, self.test)

    @cached_property
    def ranked(self) -> list[FinishedRun]:
        """One run per recipe, best recipe first: its first seed, since picking the best seed would be a choice made
        on the test set. Raises UserError if nothing is published.
        """
        if not self.runs:
            raise UserError(f"nothing is published in {self.results_dir / PUBLISHED}: name one of your runs, or "
                            "publish one with python evaluate.py --publish NAME")
        recipes = by_recipe(self.runs)
        return [recipes[row["recipe"]][0] for row in reversed(self.rows)]

    @property
    def with_weights(self) -> list[FinishedRun]:
        """The published runs that have weights, best recipe first; at most one per recipe has them."""
        recipes = by_recipe(self.runs)
        return [run for row in reversed(self.rows) for run in recipes[row["recipe"]] if run.weights.exists()]

    def calibrated_logits(self, run: FinishedRun) -> np.ndarray:
        """The logits of a run on the test set, float [N, C], divided by its recipe's temperature if it has one."""
        temperature = fitted_temperature(run, self.results_dir) if run.published else None
        return run.logits(self.test) / (temperature or 1.0)

    @property
    def corrupted(self) -> list[FinishedRun]:
        """Those that `--corruptions` has measured."""
        return [run for run in self.with_weights if (run.folder / corruptions.FILE).exists()]
