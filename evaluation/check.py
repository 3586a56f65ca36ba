"""Does what is published hold: do documents, `results.json`, predictions and weights say the same?"""

import json
from pathlib import Path

import numpy as np
import torch

from evaluation.blocks import Published, check_blocks
from evaluation.runs import read_predictions
from models import WeightsError, load_model
from runs import PUBLISHED, read_json
from utils import UserError, compute_logits

CHECKED_PICTURES = 1000
CHECK_TOLERANCE = 0.03  # of a logit: float16 rounds logits of this size by up to 0.008, processors differ by far less


def check(published: Published, root: Path) -> list[str]:
    """What is published but does not hold, a line each: an empty list is a pass."""
    problems = [] if published.runs else [f"nothing is published in {published.results_dir / PUBLISHED}"]
    for part in (_check_results, _check_weights, lambda published: check_blocks(published, root)):
        try:
            problems += part(published)
        except (UserError, WeightsError) as problem:
            problems.append(str(problem))
    return problems


def _check_results(published: Published) -> list[str]:
    if read_json(published.results_dir / "results.json") != json.loads(json.dumps(published.rows)):
        return ["results/results.json is not what the published predictions give: run python evaluate.py"]
    return []


def _check_weights(published: Published) -> list[str]:
    problems, test = [], published.test
    some = np.linspace(0, len(test.hashes) - 1, CHECKED_PICTURES).astype(int)
    for run in (run for run in published.runs if run.weights.exists()):
        if read_predictions(run.folder / "predictions.npz")[2] != run.weights_digest():
            problems.append(f"{run.folder}: the weights are not those that the predictions were made with")
        again = compute_logits(load_model(run.weights), test.images[torch.from_numpy(some)]).numpy()
        difference = float(np.abs(again - run.logits(test)[some].astype(np.float32)).max())
        if not difference <= CHECK_TOLERANCE:
            problems.append(f"{run.folder}: weights and predictions differ by {difference:.3f} in a logit")
    return problems
