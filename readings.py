"""The readings of "the loss" that the single-batch overfit check compares, and the table of what they came to."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Reading:
    """One reading of "the loss": what is minimised, and which class an output then means.

    loss: outputs [B, num_outputs] and labels, int64 [B] -> scalar; predict: outputs -> labels.
    """

    title: str
    colour: str
    num_outputs: int
    loss: Callable[[Tensor, Tensor], Tensor]
    predict: Callable[[Tensor], Tensor]


def _largest(outputs: Tensor) -> Tensor:
    return outputs.argmax(1)


READINGS = {
    "cross-entropy": Reading("cross-entropy", "#0072B2", 100, F.cross_entropy, _largest),
    "mse-onehot": Reading("MSE against the one-hot label", "#009E73", 100,
                          lambda outputs, labels: F.mse_loss(outputs, F.one_hot(labels, 100).float()), _largest),
    "mse-index": Reading("MSE of one output against the class index", "#D55E00", 1,
                         lambda outputs, labels: F.mse_loss(outputs[:, 0], labels.float()),
                         lambda outputs: outputs[:, 0].round().long()),
    "softmax-twice": Reading("cross-entropy of outputs already through a softmax", "#CC79A7", 100,
                             lambda outputs, labels: F.cross_entropy(outputs.softmax(1), labels), _largest),
}


def overfit_table(outcomes: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of what `overfit.json` says of each reading; a loss that is null there was not finite."""
    lines = ["| loss | first | last | lowest | pictures memorised | verdict |", "|---|---:|---:|---:|---:|---|"]
    for name, outcome in outcomes.items():
        values = (outcome[key] for key in ("first", "last", "lowest"))
        losses = " | ".join("not finite" if value is None else f"{value:.4g}" for value in values)
        lines.append(f"| {READINGS[name].title} | {losses} | {outcome['memorised']} of {outcome['batch_size']} "
                     f"| {'PASS' if outcome['passed'] else 'FAIL'} |")
    return "\n".join(lines)
