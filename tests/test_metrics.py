"""The reported numbers, against hand-worked and published ones."""

import math

import numpy as np
import pytest

from evaluation.metrics import (
    average,
    calibration,
    class_accuracy,
    coarse_of_fine,
    confident_mistakes,
    confused_pairs,
    confusion_matrix,
    fit_temperature,
    interval95,
    mcnemar,
    measure,
    softmax,
)


def test_measure_agrees_with_a_hand_worked_case() -> None:
    """Four classes: 0 and 1 in superclass 0, 2 and 3 in superclass 1."""
    probabilities = np.array([
        [0.30, 0.25, 0.40, 0.05],  # class 0: wrong, but its superclass has 0.55
        [0.10, 0.60, 0.20, 0.10],  # class 1: correct, and so is its superclass
        [0.15, 0.05, 0.50, 0.30],  # class 2: correct, and so is its superclass
        [0.70, 0.10, 0.15, 0.05],  # class 3: both wrong
    ])
    numbers = measure(np.log(probabilities), np.arange(4), np.array([0, 0, 1, 1]))
    assert numbers == pytest.approx({
        "top1": 50, "top5": 100, "superclass": 75,
        "cross_entropy": -np.log([0.30, 0.60, 0.50, 0.05]).mean(),
    })


def test_top5_counts_the_fifth_place_and_not_the_sixth() -> None:
    logits = np.tile(np.arange(10.0), (10, 1))  # class 9 first, class 5 fifth, class 4 sixth
    numbers = measure(logits, np.arange(10), np.zeros(10, dtype=np.int64))
    assert numbers["top1"] == 10
    assert numbers["top5"] == 50


def test_ties_do_not_raise_the_top5_accuracy() -> None:
    """A network with equal logits for all classes does not score 100%."""
    numbers = measure(np.zeros((100, 100)), np.arange(100), np.arange(100) // 5)
    assert numbers["top1"] == 1
    assert numbers["top5"] <= 5
    assert numbers["superclass"] == 5
    assert numbers["cross_entropy"] == pytest.approx(np.log(100))


def test_measure_accepts_half_precision_and_large_logits() -> None:
    logits = (60_000 * np.eye(4)).astype(np.float16)
    numbers = measure(logits, np.arange(4), np.array([0, 0, 1, 1]))
    assert numbers == {"top1": 100, "top5": 100, "superclass": 100, "cross_entropy": 0}


@pytest.mark.parametrize(("right", "n", "low", "high"), [  # Newcombe 1998, table I, the score method
    (81, 263, 25.53, 36.62), (15, 148, 6.24, 16.05), (0, 20, 0.0, 16.11), (1, 29, 0.61, 17.18)])
def test_interval95_agrees_with_published_intervals(right: int, n: int, low: float, high: float) -> None:
    assert interval95(100 * right / n, n) == pytest.approx((low, high), abs=0.006)


def test_probabilities_are_averaged_and_not_logits() -> None:
    one, other = np.array([[0.9, 0.1], [0.5, 0.5]]), np.array([[0.2, 0.8], [0.0001, 0.9999]])
    mean = average([np.log(one) + 3, np.log(other).astype(np.float32)])  # a constant added to logits does not matter
    np.testing.assert_allclose(np.exp(mean), [[0.55, 0.45], [0.25005, 0.74995]], rtol=1e-5)
    np.testing.assert_allclose(softmax(mean), np.exp(mean))


# ---- Errors ---------------------------------------------------------------------------------------------------------

LABELS = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2])
PREDICTED = np.array([0, 1, 1, 1, 1, 2, 0, 2, 2])


def test_confusion_rows_are_labels_and_columns_predictions() -> None:
    assert confusion_matrix(PREDICTED, LABELS, 4).tolist() == [[1, 2, 0, 0], [0, 2, 1, 0], [1, 0, 2, 0], [0, 0, 0, 0]]


def test_class_accuracy_is_the_correct_share_of_a_class() -> None:
    accuracy = class_accuracy(PREDICTED, LABELS, 4)
    np.testing.assert_allclose(accuracy[:3], [100 / 3, 200 / 3, 200 / 3])
    assert math.isnan(accuracy[3])  # it has no images


def test_confused_pairs_are_ordered_and_directed() -> None:
    confusion = confusion_matrix(PREDICTED, LABELS, 4)
    assert confused_pairs(confusion, 2) == [(0, 1, 2), (1, 2, 1)]
    assert confused_pairs(confusion, 100) == [(0, 1, 2), (1, 2, 1), (2, 0, 1)]  # only those that happened


def test_two_classes_confused_both_ways_are_one_pair() -> None:
    confusion = np.array([[9, 5, 2, 1], [3, 9, 0, 0], [2, 0, 9, 0], [4, 0, 0, 9]])
    assert confused_pairs(confusion, 9, once=True) == [(0, 1, 5), (3, 0, 4), (2, 0, 2)]


def test_confident_mistakes_are_sorted_by_confidence() -> None:
    probabilities = np.array([[0.99, 0.01], [0.2, 0.8], [0.9, 0.1], [0.45, 0.55]])
    assert confident_mistakes(probabilities, np.array([0, 0, 1, 0]), 5).tolist() == [2, 1, 3]
    assert confident_mistakes(probabilities, np.array([0, 0, 1, 0]), 1).tolist() == [2]


def test_superclasses_follow_from_the_labels() -> None:
    assert coarse_of_fine(np.array([3, 0, 1, 2, 0]), np.array([0, 1, 0, 1, 1]), 4).tolist() == [1, 0, 1, 0]


# ---- Confidence -----------------------------------------------------------------------------------------------------


def test_the_calibration_error_agrees_with_a_hand_worked_case() -> None:
    """Two bins: confidence 0.65 with accuracy 1 up to 0.75, confidence 0.9 with accuracy 0.5 above."""
    confidence = np.array([0.6, 0.7, 0.8, 0.8, 1.0, 1.0])
    found = calibration(np.stack([confidence, 1 - confidence], axis=1), np.array([0, 0, 0, 1, 1, 0]), bins=4)
    assert found.count.tolist() == [0, 0, 2, 4]
    np.testing.assert_allclose(found.confidence, [np.nan, np.nan, 65, 90])
    np.testing.assert_allclose(found.accuracy, [np.nan, np.nan, 100, 50])
    assert found.ece == pytest.approx((2 * 35 + 4 * 40) / 6)
    assert found.overall == pytest.approx((np.mean(100 * confidence), 100 * 4 / 6))


def test_a_bin_contains_its_upper_edge() -> None:
    found = calibration(np.array([[0.5, 0.5], [0.5, 0.5]]), np.array([0, 1]), bins=2)
    assert found.count.tolist() == [2, 0]
    assert found.ece == 0


def draw_labels(probabilities: np.ndarray) -> np.ndarray:
    """Labels drawn with these probabilities."""
    draws = np.random.default_rng(1).random((len(probabilities), 1))
    return (draws > probabilities.cumsum(1)).sum(1)


@pytest.mark.parametrize("planted", [0.5, 1.0, 3.0])
def test_a_planted_temperature_is_recovered(planted: float) -> None:
    logits = np.random.default_rng(0).normal(size=(20_000, 10)) * 2
    labels = draw_labels(softmax(logits))
    found = fit_temperature((planted * logits).astype(np.float32), labels.astype(np.uint8))
    assert found == pytest.approx(planted, rel=0.03)
    before, after = (calibration(softmax(planted * logits / t), labels).ece for t in (1.0, found))
    assert after < 1 and (before > 5 or planted == 1)


def test_no_other_temperature_has_a_smaller_cross_entropy() -> None:
    generator = np.random.default_rng(2)
    logits, labels = generator.normal(size=(500, 5)), generator.integers(0, 5, 500)
    logits[np.arange(500), labels] += 1

    def cross_entropy(temperature: float) -> float:
        return measure(logits / temperature, labels, np.zeros(500, dtype=np.int64))["cross_entropy"]

    found = fit_temperature(logits, labels)
    assert cross_entropy(found) < min(cross_entropy(0.99 * found), cross_entropy(1.01 * found))


# ---- Comparing two networks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("only_a", "only_b", "p"), [
    (0, 0, 1.0), (1, 0, 1.0), (5, 5, 1.0),
    (0, 5, 2 / 32),  # five tosses, all tails
    (1, 9, 22 / 1024),  # ten tosses, at most one head
    (9, 1, 22 / 1024),
])
def test_mcnemar_tosses_a_coin_per_differing_image(only_a: int, only_b: int, p: float) -> None:
    both = [True] * 7 + [False] * 3  # these do not count
    outcome = mcnemar(np.array([True] * only_a + [False] * only_b + both),
                      np.array([False] * only_a + [True] * only_b + both))
    assert (outcome.only_a, outcome.only_b) == (only_a, only_b)
    assert outcome.p == pytest.approx(p)


def test_mcnemar_of_thousands_of_images_does_not_overflow() -> None:
    correct = np.repeat([True, False], [950, 1050])
    normal = math.erfc((100 - 1) / math.sqrt(2 * 2000))  # the normal approximation, corrected for continuity
    assert mcnemar(correct, ~correct).p == pytest.approx(normal, rel=0.01)
    assert 0 <= mcnemar(np.ones(4000, dtype=bool), np.zeros(4000, dtype=bool)).p < 1e-300
