"""Layers that several models share."""

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL = 4  # pixels a side of a map that is convolved without its padding


class Normalize(nn.Module):
    """Subtract each channel's mean and divide by its standard deviation: float32 [N, 3, H, W] -> the same shape.

    Both are buffers, so the weights file holds them. Before `fit` they are 0 and 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Compute both from training images, float32 [N, 3, H, W] in [0, 1]."""
        std, mean = torch.std_mean(images, dim=(0, 2, 3), keepdim=True)
        self.mean.copy_(mean)
        self.std.copy_(std)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class Resize(nn.Module):
    """Scale images to side x side pixels, bilinearly and antialiased: float32 [N, 3, H, W] -> [N, 3, side, side].

    `side` may be changed at any time, as training does for progressive resolution.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, images: Tensor) -> Tensor:
        size = (self.side, self.side)
        if images.shape[2:] == size:
            return images
        return F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)


class Whitening(nn.Conv2d):
    """Projections of 2x2 patches on their principal directions, scaled to unit variance, and the negatives of these.

    float32 [N, 3, H, W] -> [N, 24, H - 1, W - 1]. The filters are fitted once and not trained (arXiv 2404.00498);
    before `fit` they are random.

    epsilon: added to each variance, so that directions of pure noise are not amplified.
    """

    def __init__(self, epsilon: float) -> None:
        super().__init__(3, 24, 2, bias=False)
        self.epsilon = epsilon
        self.weight.requires_grad_(False)

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Fit the filters to the patches of training images, float32 [N, 3, H, W] in [0, 1]."""
        patches = F.unfold(images, 2).transpose(1, 2).flatten(0, 1)
        variances, directions = torch.linalg.eigh(torch.cov(patches.T).double())
        filters = (directions / (variances + self.epsilon).sqrt()).T.to(images.dtype)
        self.weight.copy_(torch.cat([filters, -filters]).view_as(self.weight))


class Norm(nn.BatchNorm2d):
    """Batch normalization (arXiv 1502.03167) with a trained shift and a scale that stays 1."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.weight.requires_grad_(False)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution without bias that keeps height and width: [N, C, H, W] -> [N, D, H, W].

    Small maps are mostly edge: of the 81 products of a weight and a pixel that a 3x3 map takes, 32 multiply padding. So
    maps of up to SMALL pixels a side are computed tap by tap, without the padding. On CPUs that is also faster.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if x.device.type != "cpu" or max(height, width) > SMALL:
            return super().forward(x)
        x = x.permute(0, 2, 3, 1)
        taps = self.weight.to(x.dtype).permute(2, 3, 1, 0).flatten(0, 1).unbind()  # nine matrices [C, D]
        products = []
        for tap, (down, right) in zip(taps, itertools.product((-1, 0, 1), repeat=2), strict=True):
            inside = x[:, _overlap(down, height), _overlap(right, width)]
            edges = max(0, -right), max(0, right), max(0, -down), max(0, down)
            products.append(F.pad(inside @ tap, (0, 0, *edges)))
        return functools.reduce(torch.add, products).permute(0, 3, 1, 2)


def _overlap(shift: int, size: int) -> slice:
    """The positions of `size` that lie inside it after a step of -1, 0 or 1."""
    return slice(max(0, shift), size + min(0, shift))


def set_side(model: nn.Module, side: int | None) -> None:
    """Make every `Resize` of the model scale to `side`; None changes nothing."""
    for module in model.modules():
        if isinstance(module, Resize) and side is not None:
            module.side = side
