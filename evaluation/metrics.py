"""Every reported number, as a pure NumPy function of logits or probabilities and labels."""

import math
from dataclasses import dataclass

import numpy as np

TEMPERATURES = (0.01, 100.0)  # search range of `fit_temperature`


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities, float64 [N, C], from logits [N, C] of any precision."""
    logits = logits.astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities, float64 [N, C], from logits [N, C] of any precision."""
    return np.exp(log_softmax(logits))


def average(logits: list[np.ndarray]) -> np.ndarray:
    """The log of the mean probabilities of several networks, float64 [N, C], from their logits [N, C]."""
    return np.logaddexp.reduce([log_softmax(one) for one in logits], axis=0) - math.log(len(logits))


def coarse_of_fine(fine_labels: np.ndarray, coarse_labels: np.ndarray, classes: int) -> np.ndarray:
    """The superclass of each class, int64 [classes], read off the fine and coarse labels, both int64 [N]."""
    superclasses = np.zeros(classes, dtype=np.int64)
    superclasses[fine_labels] = coarse_labels
    return superclasses


def measure(logits: np.ndarray, fine_labels: np.ndarray, coarse_labels: np.ndarray) -> dict[str, float]:
    """Accuracies in percent and the cross-entropy in nats, from logits [N, C] and labels, int64 [N].

    The probability of a superclass is the sum over its classes, which the two kinds of labels define.
    """
    log_probabilities = log_softmax(logits)
    superclasses = coarse_of_fine(fine_labels, coarse_labels, logits.shape[1])
    membership = np.eye(coarse_labels.max() + 1)[superclasses]  # [C, superclasses], one 1 per row
    coarse_predicted = (np.exp(log_probabilities) @ membership).argmax(1)
    top_five = np.argsort(-logits.astype(np.float64), axis=1, kind="stable")[:, :5]
    of_label = np.take_along_axis(log_probabilities, fine_labels[:, None], axis=1)
    return {
        "top1": 100 * float((logits.argmax(1) == fine_labels).mean()),
        "top5": 100 * float((top_five == fine_labels[:, None]).any(1).mean()),
        "superclass": 100 * float((coarse_predicted == coarse_labels).mean()),
        "cross_entropy": -float(of_label.mean()),
    }


def interval95(percent: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval for an accuracy in percent, measured on `n` images (Wilson 1927)."""
    z, p = 1.959964, percent / 100
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return 100 * (middle - half), 100 * (middle + half)


# ---- Errors ---------------------------------------------------------------------------------------------------------


def confusion_matrix(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """How often each class (row) was predicted as each class (column), int64 [classes, classes]."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def class_accuracy(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Accuracy in percent on the images of each class, float64 [classes]; NaN for a class without images."""
    images = np.bincount(labels, minlength=classes)
    correct = np.bincount(labels[predicted == labels], minlength=classes)
    return 100 * np.divide(correct, images, out=np.full(classes, np.nan), where=images > 0)


def confused_pairs(confusion: np.ndarray, count: int, *, once: bool = False) -> list[tuple[int, int, int]]:
    """The `count` most frequent confusions, or all if there are fewer, as (label, prediction, times).

    once: give two classes that are confused both ways once, in the more frequent direction.
    """
    errors = confusion * (1 - np.eye(len(confusion), dtype=np.int64))
    if once:
        errors = np.where((errors > errors.T) | ((errors == errors.T) & np.tri(len(errors), dtype=bool)), errors, 0)
    order = np.argsort(-errors, axis=None, kind="stable")[:count]
    pairs = zip(*np.unravel_index(order, errors.shape), strict=True)
    return [(int(label), int(predicted), int(errors[label, predicted]))
            for label, predicted in pairs if errors[label, predicted]]


def confident_mistakes(probabilities: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Positions, int64 [at most count], of the most confident wrong predictions, most confident first."""
    wrong = np.flatnonzero(probabilities.argmax(1) != labels)
    return wrong[np.argsort(-probabilities[wrong].max(1), kind="stable")][:count]


# ---- Confidence -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """Accuracy against confidence, in bins of confidence of equal width.

    confidence, accuracy: means in percent, float64 [bins], NaN where a bin is empty; count: images, int64 [bins];
    ece: the expected calibration error in percentage points (Guo et al. 2017, arXiv 1706.04599), the mean gap between
    confidence and accuracy, weighted by count.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray
    ece: float

    @property
    def overall(self) -> tuple[float, float]:
        """Mean confidence and accuracy over all images, in percent."""
        confidence, accuracy = (float(np.nansum(means * self.count) / self.count.sum())
                                for means in (self.confidence, self.accuracy))
        return confidence, accuracy


def calibration(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> Calibration:
    """The calibration of probabilities [N, C] against labels, int64 [N]. A bin contains its upper edge only."""
    top, correct = probabilities.max(1), probabilities.argmax(1) == labels
    bin_of_image = np.clip(np.ceil(top * bins).astype(np.int64) - 1, 0, bins - 1)
    count = np.bincount(bin_of_image, minlength=bins)

    def bin_means(values: np.ndarray) -> np.ndarray:
        sums = np.bincount(bin_of_image, values, bins)
        return 100 * np.divide(sums, count, where=count > 0, out=np.full(bins, np.nan))

    confidence, accuracy = bin_means(top), bin_means(correct)
    ece = float(np.nansum(np.abs(confidence - accuracy) * count) / len(labels))
    return Calibration(confidence, accuracy, count, ece)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The divisor of logits [N, C] that minimizes their cross-entropy with labels, int64 [N] (Guo et al. 2017).

    The cross-entropy is convex in the inverse temperature, so bisection finds the zero of its slope.
    """
    logits = logits.astype(np.float64)
    of_label = np.take_along_axis(logits, labels[:, None].astype(np.int64), axis=1).mean()
    low, high = (math.log(temperature) for temperature in TEMPERATURES)
    for _ in range(40):
        middle = (low + high) / 2
        expected = (softmax(logits / math.exp(middle)) * logits).sum(1).mean()
        low, high = (low, middle) if expected < of_label else (middle, high)  # underconfident: lower; else raise
    return math.exp((low + high) / 2)


# ---- Comparing two networks -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class McNemar:
    """Images that only one of two networks classifies correctly, and the p-value of that split."""

    only_a: int
    only_b: int
    p: float


def mcnemar(correct_a: np.ndarray, correct_b: np.ndarray) -> McNemar:
    """The exact two-sided paired test (McNemar 1947) on two networks' correctness, bool [N], over the same images.

    Under the null hypothesis, each image that only one network gets right is a fair coin toss.
    """
    only_a, only_b = int((correct_a & ~correct_b).sum()), int((correct_b & ~correct_a).sum())
    tosses, tail, ways = only_a + only_b, 0, 1
    for heads in range(min(only_a, only_b) + 1):
        tail += ways
        ways = ways * (tosses - heads) // (heads + 1)
    return McNemar(only_a, only_b, min(1.0, 2 * tail / 2**tosses))
