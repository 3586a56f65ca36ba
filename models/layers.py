"""Layers that several models share."""

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """Subtract each channel's mean and divide by its standard deviation: float32 [N, 3, H, W] -> the same shape.

    Both are buffers, so they travel with the weights. Until `fit` they are 0 and 1.
    """

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Take both from a sample of the training pictures, float32 [N, 3, H, W] in [0, 1]."""
        std, mean = torch.std_mean(images, dim=(0, 2, 3), keepdim=True)
        self.mean.copy_(mean)
        self.std.copy_(std)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std
