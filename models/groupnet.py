"""Our convolutional network, after NAVIER-STOKED, designed to reach a high accuracy with few operations."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Conv3x3, Norm, Resize, Whitening

WHITENING_SAMPLE = 1000  # images, each with hundreds of 2x2 patches
WHITENING_EPSILON = 0.03  # with less, the finest patterns, which are mostly noise, are amplified
LOGIT_SCALE = 1.25 / 9
KERNELS = ((3, (1, 1)), (3, (3, 1)), (2, (3, 3)))  # sizes, by group: of its first convolution, and of its residual pair


class GroupNet(nn.Module):
    """Three groups of convolutions on whitened images, each at half the resolution; max and mean pooling; one layer.

    Most filters and most operations are in the last group. That shape, batch normalization without scales, identity
    initialization and the scaled sum of both poolings are those of NAVIER-STOKED, 2026
    (github.com/AIDDA-Institute/CIFAR-100-speedrun); the whitening is from K. Jordan, 2024, arXiv 2404.00498.

    widths: filters of each group; inner: filters between the two convolutions of its residual pair; side: images are
    scaled to side x side pixels first.
    forward: float32 [N, 3, H, W] in [0, 1] -> logits [N, num_classes].
    """

    def __init__(self, widths: Sequence[int] = (64, 256, 768), inner: Sequence[int] = (64, 192, 512), side: int = 32,
                 num_classes: int = 100) -> None:
        super().__init__()
        if not len(widths) == len(inner) == len(KERNELS):
            raise ValueError(f"widths and inner must each have {len(KERNELS)} numbers, one per group")
        self.resize = Resize(side)
        self.whiten = Whitening(WHITENING_EPSILON)
        inputs = self.whiten.out_channels
        groups = []
        for width, middle, (first, pair) in zip(widths, inner, KERNELS, strict=True):
            groups.append(Group(inputs, width, middle, first, pair))
            inputs = width
        self.groups = nn.Sequential(*groups)
        self.head = nn.Linear(inputs, num_classes, bias=False)

    def fit_inputs(self, images: Tensor) -> None:
        """Fit the whitening to training images, float32 [N, 3, H, W] in [0, 1]."""
        self.whiten.fit(images[:WHITENING_SAMPLE])

    def forward(self, images: Tensor) -> Tensor:
        x = self.groups(F.silu(self.whiten(self.resize(images))))
        return self.head(x.amax((2, 3)) + x.mean((2, 3))) * LOGIT_SCALE


class Group(nn.Module):
    """A convolution that halves height and width, by maximum pooling, and a residual pair of convolutions.

    float32 [N, inputs, H, W] -> [N, outputs, H // 2, W // 2]. Norm and SiLU follow each convolution.
    """

    def __init__(self, inputs: int, outputs: int, middle: int, first: int, pair: tuple[int, int]) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(inputs, outputs, first, bias=False), Norm(outputs)
        self.narrow, self.narrow_norm = _convolution(outputs, middle, pair[0]), Norm(middle)
        self.widen, self.widen_norm = _convolution(middle, outputs, pair[1]), Norm(outputs)
        for layer in (self.first, self.narrow, self.widen):  # each passes on its inputs as they are, before training
            center = layer.kernel_size[0] // 2  # nn.init.dirac_ would loop over all filters that a hostile file claims
            layer.weight.detach()[:layer.in_channels].zero_()[:, :, center, center].diagonal().fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        size, odd = self.first.kernel_size[0], x.shape[2] % 2
        x = F.pad(x, 2 * ((size - 1) // 2, size // 2 - odd))  # without an odd row and column: pooling would drop them
        x = F.silu(self.norm(F.max_pool2d(self.first(x), 2)))
        branch = F.silu(self.narrow_norm(self.narrow(x)))
        return x + F.silu(self.widen_norm(self.widen(branch)))


def _convolution(inputs: int, outputs: int, size: int) -> nn.Conv2d:
    return Conv3x3(inputs, outputs) if size == 3 else nn.Conv2d(inputs, outputs, size, bias=False)
