"""Check that the documents, `results.json`, the predictions and the weights that are published agree."""

import json
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from common.files import read_json
from common.run_files import PUBLISHED
from evaluation.blocks import check_blocks
from evaluation.corruptions import FILE, MEASURE, STRENGTHS, differing
from evaluation.finished_runs import read_predictions
from evaluation.publish import labeled_weights
from evaluation.published_runs import Published
from models import WeightsError, load_model
from utils import compute_logits

CHECKED_IMAGES = 1000
CORRUPTED_IMAGES = 20  # at each strength of each corruption
MAX_DIFFERING = 0.04  # share of a corruption's predictions; other processors and versions round differently
CHECK_TOLERANCE = 0.03  # of a logit: float16 rounds them by up to 0.008, processors differ by far less


def check(published: Published, root: Path) -> list[str]:
    """A line for each published number that does not hold; an empty list is a pass."""
    problems = [] if published.runs else [f"nothing is published in {published.results_dir / PUBLISHED}"]
    for part in (_check_results, _check_weights, _check_labels, _check_corruptions,
                 lambda published: check_blocks(published, root)):
        try:
            problems += part(published)
        except (UserError, WeightsError) as problem:
            problems.append(str(problem))
    return problems


def _check_results(published: Published) -> list[str]:
    if read_json(published.results_dir / "results.json") != json.loads(json.dumps(published.rows)):
        return ["results/results.json does not match the published predictions: run python evaluate.py"]
    return []


def _check_weights(published: Published) -> list[str]:
    problems, test = [], published.test
    sample = np.linspace(0, len(test) - 1, CHECKED_IMAGES).astype(int)
    for run in (run for run in published.runs if run.weights.exists()):
        if read_predictions(run.folder / "predictions.npz")[2] != run.weights_digest():
            problems.append(f"{run.folder}: its predictions were made with other weights")
        logits = compute_logits(load_model(run.weights, test.device), test.images[torch.from_numpy(sample)]).numpy()
        difference = float(np.abs(logits - run.logits(test)[sample].astype(np.float32)).max())
        if not difference <= CHECK_TOLERANCE:
            problems.append(f"{run.folder}: weights and predictions differ by {difference:.3f} in a logit")
    return problems


def _check_labels(published: Published) -> list[str]:
    return [f"{run.folder}: its weights have another temperature or other class names: run python evaluate.py"
            for run in published.runs if run.weights.exists()
            and run.weights.read_bytes() != labeled_weights(run, published.results_dir)]


def _check_corruptions(published: Published) -> list[str]:
    """Repeat a sample of the predictions on corrupted images, where a run has any."""
    problems = []
    for run in published.corrupted:
        for name, count in differing(run, published.test, CORRUPTED_IMAGES).items():
            total = CORRUPTED_IMAGES * STRENGTHS
            if count > MAX_DIFFERING * total:
                problems.append(f"{run.folder / FILE}: {count} of {total} predictions differ now for {name}: delete "
                                f"the file and {MEASURE}")
    return problems
