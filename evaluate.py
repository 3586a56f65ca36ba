"""Measure finished runs on the test set, publish them, and write the README's results table.

    python evaluate.py                   # every run with weights; prints a table, renews results.json and README.md
    python evaluate.py mlp-s0            # these runs only; nothing is renewed
    python evaluate.py --publish mlp-s0  # copy a finished run to results/published/ first
    python evaluate.py --check           # change nothing; exit 1 if a published number does not hold

The test set is opened here and nowhere in training. Logits are computed once a run, in float32, and kept as
`predictions.npz`; every number is a pure function of logits and labels.
"""

import hashlib
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models import WeightsError, load_model
from runs import PUBLISHED, read_json, replacing, write_json, write_text
from settings import RESULTS_DIR, ROOT, Parser, exit_status
from utils import UserError, compute_logits, default_data_dir, load_test_set, picture_hashes

RECORDED = ("config.json", "metrics.csv", "loss.png", "result.json")
MAX_WEIGHTS_BYTES = 25_000_000
MAY_DIFFER = ("seed", "threads", "data_dir", "checkpoint_every")  # among the runs of a recipe
CHECKED_PICTURES = 1000
CHECK_TOLERANCE = 0.03  # of a logit: float16 rounds logits of this size by up to 0.008, processors differ by far less
TABLE_START = "<!-- results: written by `python evaluate.py`, checked by `python evaluate.py --check` -->"
TABLE_END = "<!-- end of results -->"

CITED = (
    {"model": "guessing", "top1": "1.0", "source": "one class in a hundred"},
    {"model": "original author's CNN (their checkpoint)", "top1": "33.0",
     "source": "measured on the same pictures; 99.8 on the training set"},
    {"model": "a human annotator", "top1": "59.8", "source": "CIFAR-100N, Wei et al. 2022, arXiv 2110.12088"},
)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers: pure functions of logits and labels
# ---------------------------------------------------------------------------------------------------------------------


def measure(logits: np.ndarray, fine_labels: np.ndarray, coarse_labels: np.ndarray) -> dict[str, float]:
    """Accuracies in percent and the cross-entropy in nats, of logits [N, C] and labels, int64 [N].

    A superclass's probability is the sum of its classes'; which classes those are, the two kinds of labels tell.
    """
    logits = logits.astype(np.float64)
    log_probabilities = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    coarse_of_fine = np.zeros(logits.shape[1], dtype=np.int64)
    coarse_of_fine[fine_labels] = coarse_labels
    membership = np.eye(coarse_labels.max() + 1)[coarse_of_fine]
    of_label = np.take_along_axis(log_probabilities, fine_labels[:, None], axis=1)
    best_five = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    coarse_guess = (np.exp(log_probabilities) @ membership).argmax(1)
    return {
        "top1": 100 * float((logits.argmax(1) == fine_labels).mean()),
        "top5": 100 * float((best_five == fine_labels[:, None]).any(1).mean()),
        "superclass": 100 * float((coarse_guess == coarse_labels).mean()),
        "cross_entropy": -float(of_label.mean()),
    }


def interval95(percent: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of an accuracy measured on `n` pictures, in percent (Wilson 1927)."""
    z, p = 1.959964, percent / 100
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return 100 * (middle - half), 100 * (middle + half)


# ---------------------------------------------------------------------------------------------------------------------
# Runs and their predictions
# ---------------------------------------------------------------------------------------------------------------------


class TestPictures:
    """The test set in the order of its pictures' hashes, the same for every distribution of the files."""

    def __init__(self, data_dir: str, *, synthetic: bool = False) -> None:
        split = load_test_set(data_dir, use_synthetic=synthetic)
        hashes = picture_hashes(split.images)
        order = torch.from_numpy(np.argsort(hashes, kind="stable"))
        self.hashes = hashes[order.numpy()]
        self.images = split.images[order]
        self.fine_labels, self.coarse_labels = split.fine_labels[order].numpy(), split.coarse_labels[order].numpy()


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder, read. What is missing or damaged in it raises UserError."""

    folder: Path
    published: bool = False

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def config(self) -> dict[str, Any]:
        return self._read("config.json", "settings", "command", "git_changes")

    @cached_property
    def result(self) -> dict[str, Any]:
        return self._read("result.json", "parameters", "train_seconds", "train_flops", "machine")

    def _read(self, file: str, *needed: str) -> dict[str, Any]:
        content = read_json(self.folder / file)
        missing = [key for key in needed if not isinstance(content, dict) or key not in content]
        if missing:
            raise UserError(f"{self.folder / file} lacks {', '.join(missing)}: was it made by another version?")
        return content

    @property
    def synthetic(self) -> bool:
        return self.config["settings"]["synthetic"]

    @property
    def recipe(self) -> str:
        return self.config["settings"]["recipe"]

    @property
    def recipe_command(self) -> str:
        """The command that made it, without the seed."""
        return re.sub(r" --seed \d+$", "", self.config["command"])

    @property
    def weights(self) -> Path:
        return self.folder / "model.safetensors"

    def weights_digest(self) -> str:
        return hashlib.sha256(self.weights.read_bytes()).hexdigest()

    def logits(self, test: TestPictures) -> np.ndarray:
        """float16 [N, 100] in the order of `test`: kept ones if they are those of the weights, else computed and kept.

        Published predictions are what is published, so they are never computed anew; `check` compares them with the
        weights. Raises UserError if kept predictions are of other pictures or, in a published run, missing.
        """
        path = self.folder / "predictions.npz"
        if path.exists():
            logits, hashes, of_weights = _read_predictions(path)
            if self.published or of_weights == self.weights_digest():
                if not np.array_equal(hashes, test.hashes):
                    raise UserError(f"{path} has predictions for other pictures than this test set's: delete it")
                return logits
        elif self.published:
            raise UserError(f"{path} is missing: publish this run again")
        logits = compute_logits(load_model(self.weights), test.images).numpy().astype(np.float16)
        with replacing(path) as partial, open(partial, "wb") as file:
            np.savez_compressed(file, logits=logits, hash=test.hashes, weights_sha256=np.array(self.weights_digest()))
        return logits


def _read_predictions(path: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """logits float16 [N, 100], hashes uint64 [N], and the SHA-256 of the weights they came from."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["logits"], file["hash"], str(file["weights_sha256"])
    except Exception as error:  # numpy raises nearly anything for a damaged archive
        raise UserError(f"{path} is damaged ({type(error).__name__}): delete it and evaluate again") from error


def find_runs(results_dir: Path) -> list[FinishedRun]:
    """Every finished run that has weights or, where published, predictions: a user's own, then the published ones."""
    own, published = (sorted(path for path in folder.glob("*/result.json") if not path.parent.name.startswith("."))
                      for folder in (results_dir, results_dir / PUBLISHED))
    return [FinishedRun(path.parent) for path in own if (path.parent / "model.safetensors").exists()] \
        + [FinishedRun(path.parent, published=True) for path in published]


def publish(name: str, results_dir: Path, test: TestPictures) -> Path:
    """Copy a finished run of a recipe to where published ones are; returns where.

    Only one seed of a recipe keeps its weights. Raises UserError for a run that must not be published.
    """
    run = FinishedRun(results_dir / name)
    if not (run.folder / "result.json").exists():
        raise UserError(f"{run.folder} is no finished run; if there is such a run, go on with --resume {name} first")
    settings, recipe = run.config["settings"], run.recipe
    if run.synthetic:
        raise UserError(f"{run.folder} was trained on synthetic pictures: it cannot be published")
    if not settings["train_on_all"]:
        raise UserError(f"{run.folder} was not trained on all pictures: train it again with --train-on-all")
    if not re.fullmatch(r"python train_\w+\.py( --recipe \S+)? --train-on-all", run.recipe_command):
        raise UserError(f"{run.folder} is not the recipe {recipe} but `{run.recipe_command}`: it cannot be published")
    if run.config["git_changes"] is not False:
        raise UserError(f"{run.folder} was not trained from a clean commit: commit every change and train it again")
    target = results_dir / PUBLISHED / f"{recipe}-s{settings['seed']}"
    if target.exists():
        raise UserError(f"{target} is published already: remove it first if it is to be replaced")
    siblings = [other for other in find_runs(results_dir) if other.published and other.recipe == recipe]
    _require_alike([*siblings, run])
    run.logits(test)
    files = [*RECORDED, "predictions.npz"]
    if not any(sibling.weights.exists() for sibling in siblings) and run.weights.stat().st_size <= MAX_WEIGHTS_BYTES:
        files.append("model.safetensors")
    return _copy(run.folder, files, target)


def _require_alike(runs: list[FinishedRun]) -> None:
    """Raise UserError unless these runs of one recipe differ in nothing but their seeds."""
    first, *others = [run.config["settings"] for run in runs]
    for run, settings in zip(runs[1:], others, strict=True):
        differing = {name: (first.get(name), settings.get(name)) for name in first.keys() | settings.keys()
                     if name not in MAY_DIFFER and first.get(name) != settings.get(name)}
        if differing:
            words = "; ".join(f"{name}: {one} and {other}" for name, (one, other) in sorted(differing.items()))
            raise UserError(f"{run.folder} cannot stand beside {runs[0].folder}, their settings differ ({words})")


def publish_overfit(name: str, results_dir: Path) -> Path:
    """Copy an overfit check, say overfit_batch/mlp, to where published ones are, in place of an older one.

    Raises UserError if it was made with other flags than --overfit-batch, did not pass, or had uncommitted changes.
    """
    source = results_dir / name
    content = read_json(source / "overfit.json")
    if content.get("given") != {} or not content["readings"]["cross-entropy"]["passed"]:
        raise UserError(f"{source} is not the plain check, passed: run it again with --overfit-batch alone")
    if content["git_changes"] is not False:
        raise UserError(f"{source} was not made from a clean commit: commit every change and make it again")
    return _copy(source, ["overfit.json", "overfit.png", "curves.csv"], results_dir / PUBLISHED / name)


def _copy(source: Path, files: list[str], target: Path) -> Path:
    """Make the folder `target`, in place of an older one, of some files of `source`: whole or not at all."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for file in files:
            shutil.copyfile(source / file, partial / file)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def summarise(runs: list[FinishedRun], test: TestPictures) -> list[dict[str, Any]]:
    """One row a recipe, over its seeds: what `results.json` holds and the README's table is made from."""
    recipes: dict[str, list[FinishedRun]] = {}
    for run in runs:
        recipes.setdefault(run.recipe, []).append(run)
    rows = [_summary(recipe, seeds, test) for recipe, seeds in recipes.items()]
    return sorted(rows, key=lambda row: row["top1"]["mean"])


def _summary(recipe: str, runs: list[FinishedRun], test: TestPictures) -> dict[str, Any]:
    runs = sorted(runs, key=lambda run: run.config["settings"]["seed"])
    seeds = [run.config["settings"]["seed"] for run in runs]
    _require_alike(runs)
    measured = [measure(run.logits(test), test.fine_labels, test.coarse_labels) for run in runs]
    several = f"--seeds {','.join(map(str, seeds))}" if len(seeds) > 1 else f"--seed {seeds[0]}"
    row: dict[str, Any] = {"recipe": recipe, "seeds": seeds, "parameters": runs[0].result["parameters"]}
    for name in measured[0]:
        values = [numbers[name] for numbers in measured]
        row[name] = {"mean": round(float(np.mean(values)), 4),
                     "std": round(float(np.std(values, ddof=1)), 4) if len(values) > 1 else None,
                     "each": [round(value, 4) for value in values]}
    row["interval95"] = [round(bound, 2) for bound in interval95(row["top1"]["mean"], len(test.hashes))]
    row["train_seconds"] = [run.result["train_seconds"] for run in runs]
    row["train_flops"] = runs[0].result["train_flops"]
    row["precision"], row["device"] = (runs[0].config["settings"][key] for key in ("precision", "device"))
    row["machines"] = [run.result["machine"] for run in runs]
    row["command"] = f"{runs[0].recipe_command} {several}"
    return row


def readme_table(rows: list[dict[str, Any]]) -> str:
    """The README's table, Markdown, from the rows of `results.json`, with the cited ones among them."""
    lines = ["| model | parameters | test top-1 (%) | top-5 (%) | superclass (%) | training | hardware "
             "| command or source |", "|---|---:|---:|---:|---:|---:|---|---|"]
    ranked = [(float(cited["top1"]), f"| *{cited['model']}* | | *{cited['top1']}* | | | | | *{cited['source']}* |")
              for cited in CITED]
    ranked += [(row["top1"]["mean"], _readme_row(row)) for row in rows]
    return "\n".join([*lines, *(line for _, line in sorted(ranked))])


def _readme_row(row: dict[str, Any]) -> str:
    if row["top1"]["std"] is None:
        low, high = row["interval95"]
        top1 = f"**{row['top1']['mean']:.2f}** (one seed; 95% interval {low:.1f} to {high:.1f})"
    else:
        top1 = f"**{row['top1']['mean']:.2f}** ± {row['top1']['std']:.2f} ({len(row['seeds'])} seeds)"
    seconds = float(np.mean(row["train_seconds"]))
    time = f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"
    flops = f"{row['train_flops']:.1e}".replace("e+", "e")
    speed = float(np.mean([machine[f"conv3x3_{row['precision']}_gflops"] for machine in row["machines"]])) / 1000
    machines = sorted({machine["processor"] + (f", {machine['threads']} threads" if row["device"] == "cpu" else "")
                       for machine in row["machines"]})
    return (f"| {row['recipe']} | {row['parameters'] / 1e6:.2f} M | {top1} | {row['top5']['mean']:.2f} "
            f"| {row['superclass']['mean']:.2f} | {time}, {flops} FLOPs "
            f"| {' or '.join(machines)}, {row['precision']} at {speed:.2g} TFLOP/s | `{row['command']}` |")


def run_table(runs: Iterable[FinishedRun], test_set: Callable[[bool], TestPictures], *, strict: bool) -> str:
    """One line a run, for the screen; `test_set(synthetic)` gives the pictures to measure it on.

    An own run that cannot be measured has a line that says why; if `strict`, or if it is published, UserError comes.
    """
    lines = [f"{'run':<28} {'top-1 (95% interval)':>22} {'top-5':>7} {'superclass':>10} {'cross-entropy':>13} "
             f"{'parameters':>11} {'training':>10}  trained on"]
    for run in runs:
        name = f"{PUBLISHED}/{run.name}" if run.published else run.name
        try:
            lines.append(f"{name:<28} {_run_line(run, test_set(run.synthetic))}")
        except (UserError, WeightsError) as problem:
            if strict or run.published:
                raise
            lines.append(f"{name:<28} left out: {problem}")
    return "\n".join(lines)


def _run_line(run: FinishedRun, test: TestPictures) -> str:
    numbers = measure(run.logits(test), test.fine_labels, test.coarse_labels)
    low, high = interval95(numbers["top1"], len(test.hashes))
    top1 = f"{numbers['top1']:.2f} ({low:.2f}–{high:.2f})"
    whole = run.config["settings"]["train_on_all"]
    pictures = "SYNTHETIC" if run.synthetic else "all 50,000" if whole else "45,000"
    return (f"{top1:>22} {numbers['top5']:>7.2f} {numbers['superclass']:>10.2f} {numbers['cross_entropy']:>13.4f} "
            f"{run.result['parameters']:>11,} {run.result['train_seconds']:>8.0f} s  {pictures}")


def with_table(readme: str, table: str) -> str:
    """The README's text with what stands between the two markers replaced; UserError if one of them is missing."""
    start, end = readme.find(TABLE_START), readme.find(TABLE_END)
    if start < 0 or end < start:
        raise UserError(f"README.md has lost the markers around its results table: {TABLE_START} and {TABLE_END}")
    return f"{readme[:start]}{TABLE_START}\n{table}\n{readme[end:]}"


def check(runs: list[FinishedRun], test: TestPictures, results_dir: Path, readme: Path) -> list[str]:
    """What is published but does not hold, a line each: an empty list is a pass."""
    problems = [] if runs else [f"nothing is published in {results_dir / PUBLISHED}"]
    for part in (_check_tables, _check_weights):
        try:
            problems += part(runs, test, results_dir, readme)
        except (UserError, WeightsError) as problem:
            problems.append(str(problem))
    return problems


def _check_tables(runs: list[FinishedRun], test: TestPictures, results_dir: Path, readme: Path) -> list[str]:
    rows, problems, text = summarise(runs, test), [], readme.read_text(encoding="utf-8")
    if with_table(text, readme_table(rows)) != text:
        problems.append("README.md's table is not what the published predictions give: run python evaluate.py")
    if read_json(results_dir / "results.json") != json.loads(json.dumps(rows)):
        problems.append("results/results.json is not what the published predictions give: run python evaluate.py")
    return problems


def _check_weights(runs: list[FinishedRun], test: TestPictures, results_dir: Path, readme: Path) -> list[str]:
    problems = []
    some = np.linspace(0, len(test.hashes) - 1, CHECKED_PICTURES).astype(int)
    for run in (run for run in runs if run.weights.exists()):
        if _read_predictions(run.folder / "predictions.npz")[2] != run.weights_digest():
            problems.append(f"{run.folder}: the weights are not those that the predictions were made with")
        again = compute_logits(load_model(run.weights), test.images[torch.from_numpy(some)]).numpy()
        difference = float(np.abs(again - run.logits(test)[some].astype(np.float32)).max())
        if not difference <= CHECK_TOLERANCE:
            problems.append(f"{run.folder}: weights and predictions differ by {difference:.3f} in a logit")
    return problems


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="evaluate.py", description=__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="measure these runs only (default: all)")
    parser.add_argument("--publish", metavar="NAME", nargs="+", default=[],
                        help="copy these finished runs to results/published/ first")
    parser.add_argument("--check", action="store_true",
                        help="change nothing, exit 1 if a published number does not hold")
    parser.add_argument("--data-dir", default=default_data_dir(), metavar="FOLDER", help="folder of the data set")
    parser.add_argument("--results-dir", type=Path, default=RESULTS_DIR, metavar="FOLDER", help="folder of all runs")
    options = parser.parse_args(argv)
    if sum(map(bool, (options.runs, options.publish, options.check))) > 1:
        raise UserError("--check, --publish and naming runs are three different things: do one of them")
    results_dir, readme = options.results_dir.resolve(), ROOT / "README.md"

    @cache
    def test_set(synthetic: bool) -> TestPictures:
        return TestPictures(options.data_dir, synthetic=synthetic)

    if options.check:
        published = [run for run in find_runs(results_dir) if run.published]
        problems = check(published, test_set(False), results_dir, readme)
        print("\n".join(problems) or f"every published number holds: {len(published)} runs")
        return 1 if problems else 0
    for name in options.publish:
        is_overfit = (results_dir / name / "overfit.json").exists()
        target = publish_overfit(name, results_dir) if is_overfit else publish(name, results_dir, test_set(False))
        print(f"published: {target}")

    runs = _chosen(find_runs(results_dir), options.runs, results_dir)
    print(run_table(runs, test_set, strict=bool(options.runs)))
    published = [run for run in runs if run.published]
    if published and not options.runs and results_dir == RESULTS_DIR:
        rows = summarise(published, test_set(False))
        write_json(results_dir / "results.json", rows)
        write_text(readme, with_table(readme.read_text(encoding="utf-8"), readme_table(rows)))
        print("README.md and results/results.json are up to date")
    return 0


def _chosen(runs: list[FinishedRun], names: list[str], results_dir: Path) -> list[FinishedRun]:
    """The runs of these names, or all of them. Raises UserError for a name that is none, or if there are no runs."""
    if not runs:
        raise UserError(f"there is no finished run in {results_dir}: train one first, say with python train_mlp.py")
    by_name = {f"{PUBLISHED}/{run.name}" if run.published else run.name: run for run in runs}
    missing = [name for name in names if name not in by_name]
    if missing:
        raise UserError(f"no finished run in {results_dir} is called {', '.join(missing)}; "
                        f"there are: {', '.join(sorted(by_name))}")
    return [by_name[name] for name in names] if names else runs


if __name__ == "__main__":
    sys.exit(exit_status(main))
