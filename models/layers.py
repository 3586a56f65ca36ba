"""Layers that several models share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class Norm(nn.BatchNorm2d):
    """Batch normalization (arXiv 1502.03167) with a trained shift and a scale that stays 1."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.weight.requires_grad_(False)


def set_side(model: nn.Module, side: int | None) -> None:
    """Make every `Resize` of the model scale to `side`; None changes nothing."""
    for module in model.modules():
        if isinstance(module, Resize) and side is not None:
            module.side = side
