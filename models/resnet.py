"""ResNet-18 for images of 32x32 pixels, which the field compares itself with."""

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Normalize, Resize


class ResNet(nn.Module):
    """A 3x3 convolution, residual blocks, global average pooling and one linear layer.

    stem: filters of that convolution; stages: all blocks, from [N, stem, H, W] to [N, features, H', W']; side: images
    are scaled to side x side pixels first.
    forward: float32 [N, 3, H, W] in [0, 1] -> logits [N, num_classes].
    """

    def __init__(self, stem: int, stages: nn.Module, features: int, side: int, num_classes: int) -> None:
        super().__init__()
        self.resize = Resize(side)
        self.normalize = Normalize()
        self.stem = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.stages = stages
        self.head = nn.Linear(features, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def fit_inputs(self, images: Tensor) -> None:
        """Fit the normalization to training images, float32 [N, 3, H, W] in [0, 1]."""
        self.normalize.fit(images)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(self.normalize(self.resize(images)))
        return self.head(self.stages(x).mean((2, 3)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2015, arXiv 1512.03385), each batch-normalized before ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if stride == 1 and inputs == outputs else nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


def resnet18(side: int = 32, num_classes: int = 100) -> ResNet:
    """ResNet-18 (He et al. 2015, arXiv 1512.03385) in its CIFAR form: a 3x3 stem and no pooling after it."""
    widths, blocks = (64, 64, 128, 256, 512), []
    for stage, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        blocks += [BasicBlock(inputs, outputs, 1 if stage == 0 else 2), BasicBlock(outputs, outputs, 1)]
    return ResNet(64, nn.Sequential(nn.BatchNorm2d(64), nn.ReLU(), *blocks), 512, side, num_classes)
