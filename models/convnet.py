"""Our own network, designed to reach a high accuracy with few operations."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Norm, Resize, Whitening

WHITENING_SAMPLE = 5000  # images, each with hundreds of 2x2 patches
WHITENING_EPSILON = 5e-4
HEAD_SCALE = 1 / 9  # of the logits, since the head's weights start with unit variance (arXiv 2404.00498)
BRANCH_SCALE = 0.3  # initial scale of a block's branch
GATE_SCALE = 1.37  # about 1 / sigmoid(1): a new gate passes its input unchanged


class ConvNet(nn.Module):
    """Pre-activation residual blocks on whitened images, then average and maximum pooling, then one linear layer.

    Whitening, batch normalization without scales, GELU, max-pooling after a convolution, and a head with unit-variance
    weights are from K. Jordan, "94% on CIFAR-10 in 3.29 seconds", 2024, arXiv 2404.00498.

    widths: filters of each stage, the first block of which halves the image; blocks: residual blocks of each stage;
    side: images are scaled to side x side pixels first.
    forward: float32 [N, 3, H, W] in [0, 1] -> logits [N, num_classes].
    """

    def __init__(self, widths: Sequence[int] = (64, 192, 384), blocks: Sequence[int] = (1, 1, 2), side: int = 32,
                 num_classes: int = 100) -> None:
        super().__init__()
        if len(widths) != len(blocks):
            raise ValueError(f"there are {len(widths)} widths and {len(blocks)} numbers of blocks")
        self.resize = Resize(side)
        self.whiten = Whitening(WHITENING_EPSILON)
        layers: list[nn.Module] = []
        inputs = self.whiten.out_channels
        for width, count in zip(widths, blocks, strict=True):
            for block in range(count):
                layers.append(Block(inputs, width, halves=block == 0))
                inputs = width
        self.blocks = nn.Sequential(*layers)
        self.norm = Norm(inputs)
        self.head = nn.Linear(2 * inputs, num_classes, bias=False)
        nn.init.normal_(self.head.weight)

    def fit_inputs(self, images: Tensor) -> None:
        """Fit the whitening to training images, float32 [N, 3, H, W] in [0, 1]."""
        self.whiten.fit(images[:WHITENING_SAMPLE])

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(self.whiten(self.resize(images)))
        x = F.gelu(self.norm(x))
        return self.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)) * HEAD_SCALE


class Block(nn.Module):
    """Norm, GELU and a 3x3 convolution, twice, around a shortcut (He et al. 2016, arXiv 1603.05027).

    The branch ends in a gate and a trained scale, BRANCH_SCALE at the start. With `halves`, height and width are
    halved: by maximum pooling after the first convolution, and by averaging in the shortcut.
    """

    def __init__(self, inputs: int, outputs: int, halves: bool) -> None:
        super().__init__()
        self.halves = halves
        self.norm1 = Norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm2 = Norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.gate = Gate(outputs)
        self.scale = nn.Parameter(torch.tensor([BRANCH_SCALE]))
        self.project = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.gelu(self.norm1(x))
        branch, shortcut = self.conv1(activated), x if self.project is None else activated
        if self.halves:
            branch, shortcut = F.max_pool2d(branch, 2), F.avg_pool2d(shortcut, 2)
        branch = self.gate(self.conv2(F.gelu(self.norm2(branch))))
        if self.project is not None:
            shortcut = self.project(shortcut)
        return shortcut + self.scale * branch


class Gate(nn.Module):
    """Squeeze and excitation (Hu et al. 2017, arXiv 1709.01507): scale each channel by a function of all means."""

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, max(1, channels // reduction))
        self.excite = nn.Linear(self.squeeze.out_features, channels)
        nn.init.zeros_(self.excite.weight)
        nn.init.ones_(self.excite.bias)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return x * (GATE_SCALE * gate)[:, :, None, None]
