"""The losses that the single-batch overfit check compares."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from common.plotting import BLUE, GREEN, ORANGE, PINK


@dataclass(frozen=True)
class Loss:
    """One way to define "the loss".

    function: outputs, float32 [B, num_outputs], and labels, int64 [B] -> the scalar to minimize.
    predict: outputs -> the predicted classes, int64 [B].
    """

    title: str
    color: str
    num_outputs: int
    function: Callable[[Tensor, Tensor], Tensor]
    predict: Callable[[Tensor], Tensor]


def _most_likely(outputs: Tensor) -> Tensor:
    return outputs.argmax(1)


LOSSES = {
    "cross-entropy": Loss("cross-entropy", BLUE, 100, F.cross_entropy, _most_likely),
    "mse-onehot": Loss("MSE against the one-hot label", GREEN, 100,
                       lambda outputs, labels: F.mse_loss(outputs, F.one_hot(labels, 100).float()), _most_likely),
    "mse-index": Loss("MSE of one output against the class index", ORANGE, 1,
                      lambda outputs, labels: F.mse_loss(outputs[:, 0], labels.float()),
                      lambda outputs: outputs[:, 0].round().long()),
    "softmax-twice": Loss("cross-entropy, softmax applied twice", PINK, 100,
                          lambda outputs, labels: F.cross_entropy(outputs.softmax(1), labels), _most_likely),
}
