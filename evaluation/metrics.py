"""Every number that is reported: pure functions of logits or probabilities and labels, in NumPy."""

import math
from dataclasses import dataclass

import numpy as np

TEMPERATURES = (0.01, 100.0)  # between which one is looked for


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities, float64 [N, C], of logits [N, C] of any precision."""
    logits = logits.astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities, float64 [N, C], of logits [N, C] of any precision."""
    return np.exp(log_softmax(logits))


def average(logits: list[np.ndarray]) -> np.ndarray:
    """The log of the mean of several networks' probabilities, each given as logits [N, C]: float64 [N, C]."""
    return np.logaddexp.reduce([log_softmax(one) for one in logits], axis=0) - math.log(len(logits))


def coarse_of_fine(fine_labels: np.ndarray, coarse_labels: np.ndarray, classes: int) -> np.ndarray:
    """The superclass of each class, int64 [classes], as the two kinds of labels, int64 [N], tell it."""
    superclasses = np.zeros(classes, dtype=np.int64)
    superclasses[fine_labels] = coarse_labels
    return superclasses


def measure(logits: np.ndarray, fine_labels: np.ndarray, coarse_labels: np.ndarray) -> dict[str, float]:
    """Accuracies in percent and the cross-entropy in nats, of logits [N, C] and labels, int64 [N].

    A superclass's probability is the sum of its classes'; which classes those are, the two kinds of labels tell.
    """
    log_probabilities = log_softmax(logits)
    membership = np.eye(coarse_labels.max() + 1)[coarse_of_fine(fine_labels, coarse_labels, logits.shape[1])]
    of_label = np.take_along_axis(log_probabilities, fine_labels[:, None], axis=1)
    best_five = np.argsort(-logits.astype(np.float64), axis=1, kind="stable")[:, :5]
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
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------


def confusion_matrix(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """How often each class, a row, was taken for each, a column: int64 [classes, classes] of int64 [N]."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def class_accuracy(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Percent right of each class's pictures, float64 [classes]; NaN for a class without any."""
    pictures = np.bincount(labels, minlength=classes)
    right = np.bincount(labels[predicted == labels], minlength=classes)
    return 100 * np.divide(right, pictures, out=np.full(classes, np.nan), where=pictures > 0)


def confused_pairs(confusion: np.ndarray, count: int) -> list[tuple[int, int, int]]:
    """The `count` most frequent confusions as (label, what it was taken for, times), fewer if there are no more."""
    wrong = confusion * (1 - np.eye(len(confusion), dtype=np.int64))
    most = np.argsort(-wrong, axis=None, kind="stable")[:count]
    pairs = zip(*np.unravel_index(most, wrong.shape), strict=True)
    return [(int(label), int(taken_for), int(wrong[label, taken_for])) for label, taken_for in pairs
            if wrong[label, taken_for]]


def confident_mistakes(probabilities: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Positions, int64 [at most count], of the wrong guesses that were surest of themselves, the surest first."""
    wrong = np.flatnonzero(probabilities.argmax(1) != labels)
    return wrong[np.argsort(-probabilities[wrong].max(1), kind="stable")][:count]


# ---------------------------------------------------------------------------------------------------------------------
# Confidence
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """How often guesses are right against how sure they are, by bins of confidence of equal width.

    confidence, accuracy: means in percent, float64 [bins], NaN where a bin is empty; count: pictures, int64 [bins];
    ece: the expected calibration error in percentage points (Guo et al. 2017, arXiv 1706.04599): the mean distance
    between the two, weighted by count.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray
    ece: float

    @property
    def overall(self) -> tuple[float, float]:
        """Mean confidence and accuracy over all pictures, in percent."""
        confidence, accuracy = (float(np.nansum(means * self.count) / self.count.sum())
                                for means in (self.confidence, self.accuracy))
        return confidence, accuracy


def calibration(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> Calibration:
    """Of probabilities [N, C] and labels, int64 [N]. A bin has its upper edge and not its lower one."""
    surest, right = probabilities.max(1), probabilities.argmax(1) == labels
    of_picture = np.clip(np.ceil(surest * bins).astype(np.int64) - 1, 0, bins - 1)
    count = np.bincount(of_picture, minlength=bins)
    confidence, accuracy = (100 * np.divide(np.bincount(of_picture, values, bins), count, where=count > 0,
                                            out=np.full(bins, np.nan)) for values in (surest, right))
    ece = float(np.nansum(np.abs(confidence - accuracy) * count) / len(labels))
    return Calibration(confidence, accuracy, count, ece)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """What to divide logits [N, C] by so that their cross-entropy with labels, int64 [N], is least (Guo et al. 2017).

    The cross-entropy is convex in the inverse temperature, so the zero of its slope is found by bisection.
    """
    logits = logits.astype(np.float64)
    of_label = np.take_along_axis(logits, labels[:, None].astype(np.int64), axis=1).mean()
    low, high = (math.log(temperature) for temperature in TEMPERATURES)
    for _ in range(40):
        middle = (low + high) / 2
        expected = (softmax(logits / math.exp(middle)) * logits).sum(1).mean()
        low, high = (low, middle) if expected < of_label else (middle, high)  # too flat, so colder; or too sure
    return math.exp((low + high) / 2)


# ---------------------------------------------------------------------------------------------------------------------
# Which of two is better
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class McNemar:
    """Pictures that only one of two networks gets right, and how likely so uneven a split is if neither is better."""

    only_a: int
    only_b: int
    p: float


def mcnemar(correct_a: np.ndarray, correct_b: np.ndarray) -> McNemar:
    """The paired test on two networks' bool [N] over the same pictures (McNemar 1947), exact and two-sided.

    If neither is better, each picture that only one gets right is a fair coin's toss.
    """
    only_a, only_b = int((correct_a & ~correct_b).sum()), int((correct_b & ~correct_a).sum())
    tosses, tail, ways = only_a + only_b, 0, 1
    for heads in range(min(only_a, only_b) + 1):
        tail += ways
        ways = ways * (tosses - heads) // (heads + 1)
    return McNemar(only_a, only_b, min(1.0, 2 * tail / 2**tosses))
