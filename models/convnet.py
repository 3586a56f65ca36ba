"""Our own network: made to learn as much as it can from each operation."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Resize

WHITENING_SAMPLE = 5000  # pictures; their 2x2 patches are plenty
WHITENING_EPSILON = 5e-4  # added to each variance, so that directions of pure noise are not blown up
HEAD_SCALE = 1 / 9  # of the logits, whose weights start with unit variance (arXiv 2404.00498)
BRANCH_SCALE = 0.3  # of a block's branch at the start
GATE_SCALE = 1.37  # a gate that starts at sigmoid(1) lets everything pass as it is


class ConvNet(nn.Module):
    """Pre-activation residual blocks on whitened pictures; average and maximum pooling side by side; one linear layer.

    From K. Jordan, "94% on CIFAR-10 in 3.29 seconds", 2024, arXiv 2404.00498: whitening, batch normalisation without
    scales, GELU, max-pooling behind a convolution, a head with unit-variance weights.

    widths: filters of each stage, which halves the picture; blocks: residual blocks of each stage; side: pictures are
    scaled to side x side pixels.
    forward: float32 [N, 3, H, W] in [0, 1] -> logits [N, num_classes].
    """

    def __init__(self, widths: Sequence[int] = (64, 192, 384), blocks: Sequence[int] = (1, 1, 2), side: int = 32,
                 num_classes: int = 100) -> None:
        super().__init__()
        if len(widths) != len(blocks):
            raise ValueError(f"there are {len(widths)} widths and {len(blocks)} numbers of blocks")
        self.resize = Resize(side)
        self.whiten = Whitening()
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
        """Fit what depends on the inputs' distribution alone, here the whitening; see `Whitening.fit`."""
        self.whiten.fit(images[:WHITENING_SAMPLE])

    def forward(self, images: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.blocks(self.whiten(self.resize(images)))))
        return self.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)) * HEAD_SCALE


class Whitening(nn.Conv2d):
    """2x2 patches along the principal directions of natural ones, each scaled to unit variance, and their negatives.

    float32 [N, 3, H, W] -> [N, 24, H - 1, W - 1]. The filters are fitted once and not trained (arXiv 2404.00498). Until
    `fit` they are random.
    """

    def __init__(self) -> None:
        super().__init__(3, 24, 2, bias=False)
        self.weight.requires_grad_(False)

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Fit to the patches of a sample of training pictures, float32 [N, 3, H, W] in [0, 1]."""
        patches = F.unfold(images, 2).transpose(1, 2).flatten(0, 1)
        variances, directions = torch.linalg.eigh(torch.cov(patches.T).double())
        filters = (directions / (variances + WHITENING_EPSILON).sqrt()).T.to(images.dtype)
        self.weight.copy_(torch.cat([filters, -filters]).view_as(self.weight))


class Block(nn.Module):
    """Norm, GELU and a 3x3 convolution, twice, around a shortcut (He et al. 2016, arXiv 1603.05027).

    The branch passes a gate and is scaled by a number that learns, from BRANCH_SCALE on. With `halves` the picture is
    halved: by maximum pooling behind the first convolution and by averaging in the shortcut.
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
        return (shortcut if self.project is None else self.project(shortcut)) + self.scale * branch


class Norm(nn.BatchNorm2d):
    """Batch normalisation (arXiv 1502.03167) with a shift that learns and a scale that stays 1."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.weight.requires_grad_(False)


class Gate(nn.Module):
    """Squeeze and excitation (Hu et al. 2017, arXiv 1709.01507): channels scaled by what all their means say."""

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, max(1, channels // reduction))
        self.excite = nn.Linear(self.squeeze.out_features, channels)
        nn.init.zeros_(self.excite.weight)
        nn.init.ones_(self.excite.bias)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return x * (GATE_SCALE * gate)[:, :, None, None]
