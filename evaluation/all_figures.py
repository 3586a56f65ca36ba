"""Every figure of finished runs, by file name, each with its caption."""

from pathlib import Path
from typing import Any

import numpy as np

from common.files import ROOT
from evaluation import corruptions, figures, insights
from evaluation.blocks import calibrations
from evaluation.costs import OURS, measured_costs, read_costs
from evaluation.finished_runs import FinishedRun
from evaluation.metrics import (
    calibration,
    class_accuracy,
    confident_mistakes,
    confused_pairs,
    confusion_matrix,
    softmax,
)
from evaluation.published_runs import Published
from evaluation.searches import read_searches, waterfall_figure
from evaluation.tables import by_recipe

PAIRS = 6  # of confused classes in their figure


def draw(shown: Published, run: FinishedRun) -> dict[str, Any]:
    """Every figure by file name: `run` in detail, then all published runs and the searches if it is one of them.

    The reliability diagram shows the best calibrated recipe if `run` has no calibration.
    """
    test = shown.test
    labels, names, classes = test.fine_labels, test.fine_names, len(test.fine_names)
    images, probabilities = test.images.numpy(), softmax(shown.calibrated_logits(run))
    predicted = probabilities.argmax(1)
    confusion = confusion_matrix(predicted, labels, classes)
    fit = figures.fit_to_show(test.coarse_labels, test.coarse_names)
    mistakes = confident_mistakes(probabilities, labels, len(labels))
    confused = confused_pairs(confusion_matrix(predicted[fit], labels[fit], classes), PAIRS, once=True)
    name = f"{run.name} on SYNTHETIC IMAGES, not CIFAR-100" if run.synthetic else run.name

    calibrated, found = run, {1.0: calibration(softmax(run.logits(test)), labels)}
    if not shown.alone:
        calibrated = next((one for one in (run, *shown.ranked) if len(calibrations(shown, one)) > 1), run)
        found = calibrations(shown, calibrated)
    calibrated_name = name if calibrated is run else calibrated.name
    variants = {"as trained" if temperature == 1 else f"temperature {temperature:.3f}": one
                for temperature, one in found.items()}
    drawn = {
        "confusion": figures.confusion_figure(
            confusion, test.coarse_of_fine, test.coarse_names,
            f"{name}: confusion matrix on the test set"),
        "classes": figures.class_accuracy_figure(
            class_accuracy(predicted, labels, classes), names, f"{name}: test accuracy by class"),
        "confused": figures.confused_pairs_figure(
            images, probabilities, labels, fit, confused, names, f"{name}: most frequent confusions"),
        "mistakes": figures.mistakes_figure(
            images, probabilities, labels, mistakes[fit[mistakes]], names, f"{name}: most confident mistakes"),
        "reliability": figures.reliability_figure(variants, f"{calibrated_name}: reliability diagram"),
    }
    drawn |= draw_insights(shown, run, probabilities, name)
    if not shown.alone:
        drawn |= draw_recipes(shown) | draw_searches(ROOT / "docs" / "experiments.md")
    for file, figure in drawn.items():
        figure.caption = figures.CAPTIONS.get(file, "")
    return drawn


def draw_insights(shown: Published, run: FinishedRun, probabilities: np.ndarray, name: str) -> dict[str, Any]:
    """A look inside `run`, called `name`, by file name. All these figures need weights, which not every run has.

    The filters are those of the best run of each kind of network.
    """
    test = shown.test
    kinds: dict[Any, tuple[str, Any]] = {}
    for one in [run] if shown.alone else shown.ranked:
        kind = one.settings.get("model", "mlp")
        if one.weights.exists() and kind not in kinds:
            kinds[kind] = one.name, one.network(test)
    title = f"{name}: its first layers" if shown.alone else "The first layers of each kind of network"
    drawn = {"filters": insights.filters_figure(dict(kinds.values()), title)} if kinds else {}
    if not run.weights.exists():
        return drawn
    model, labels = run.network(test), test.fine_labels
    points = insights.class_map(insights.class_features(model, test.images, labels))
    drawn["class-map"] = insights.map_figure(points, test.coarse_of_fine, test.fine_names, test.coarse_names,
                                             f"{name}: which classes look alike to the network")
    if insights.is_convolutional(model):
        chosen = insights.confident_examples(probabilities, labels, test.coarse_of_fine, test.coarse_names)
        drawn["grad-cam"] = insights.looks_figure(model, test.images, probabilities, labels, chosen, test.fine_names,
                                                  f"{name}: what decided its prediction")
    return drawn


def draw_searches(path: Path) -> dict[str, Any]:
    """The marked tables of a log of experiments as waterfalls, by file name."""
    return {table: waterfall_figure(trials, "What each change gave, from top to bottom")
            for table, trials in read_searches(path).items() if trials}


def draw_recipes(published: Published) -> dict[str, Any]:
    """The figures of all published runs, by file name."""
    curves = {recipe: [seed.curves() for seed in seeds] for recipe, seeds in by_recipe(published.runs).items()}
    accuracy = {row["recipe"]: row["top1"]["mean"] for row in published.rows}
    costs = read_costs(published.results_dir)
    drawn = {
        "accuracy-flops": figures.accuracy_flops_figure(published.rows, costs),
        "curves": figures.learning_curves_figure(
            curves, accuracy, "Published runs, trained on all 50,000 training images"),
    }
    drawn["curves"].finding = " ".join(
        f"{recipe} ends at {np.mean([seed['train_acc'][-1] for seed in seeds]):.1f}% in training and at "
        f"{accuracy[recipe]:.1f}% on test images." for recipe, seeds in curves.items())
    if measured := measured_costs(costs):
        drawn["accuracy-time"] = figures.accuracy_time_figure(published.rows, costs)
        drawn["accuracy-time"].finding = ", ".join(
            f"{cost['name'].removeprefix(OURS)} {cost['accuracy']:.1f}% in {cost['minutes']:,.0f} minutes"
            for cost in measured if cost["accuracy"]) + "."
    robust = {run.name: (corruptions.clean_accuracy(run, published.test), corruptions.accuracy(run, published.test))
              for run in published.corrupted}
    if robust:
        drawn["corruptions"] = figures.corruptions_figure(
            robust, {name: (one.meaning, one.strengths) for name, one in corruptions.CORRUPTIONS.items()},
            "Test accuracy on corrupted images")
    return drawn
