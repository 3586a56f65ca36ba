"""Residual networks for pictures of 32 x 32 pixels: the field's points of reference."""

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Normalize, Resize


class ResNet(nn.Module):
    """What the residual networks here share: a 3x3 stem, stages of blocks that halve the picture between them, global
    average pooling, one linear layer.

    forward: float32 [N, 3, H, W] in [0, 1] -> logits [N, num_classes]; H x W is resized to side x side first.
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
        """Fit what depends on the inputs' distribution alone, here the normalisation; see `Normalize.fit`."""
        self.normalize.fit(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(self.normalize(self.resize(images)))).mean((2, 3)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2015, arXiv 1512.03385), each batch-normalised before ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if stride == 1 and inputs == outputs else nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


class PreactivationBlock(nn.Module):
    """Two 3x3 convolutions, each after batch normalisation and ReLU (He et al. 2016, arXiv 1603.05027)."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.activate = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Dropout(dropout), nn.Conv2d(outputs, outputs, 3, padding=1, bias=False))
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activate(x)
        return self.branch(activated) + (x if self.shortcut is None else self.shortcut(activated))


def resnet18(side: int = 32, num_classes: int = 100) -> ResNet:
    """ResNet-18 (He et al. 2015, arXiv 1512.03385) in its CIFAR form: a 3x3 stem and no pooling after it."""
    widths, blocks = (64, 64, 128, 256, 512), []
    for stage, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        blocks += [BasicBlock(inputs, outputs, 1 if stage == 0 else 2), BasicBlock(outputs, outputs, 1)]
    return ResNet(64, nn.Sequential(nn.BatchNorm2d(64), nn.ReLU(), *blocks), 512, side, num_classes)


def wide_resnet(
    depth: int = 28, width: int = 10, dropout: float = 0.0, side: int = 32, num_classes: int = 100
) -> ResNet:
    """WRN-depth-width (Zagoruyko and Komodakis 2016, arXiv 1605.07146). Raises ValueError unless depth is 6n + 4."""
    if depth < 10 or depth % 6 != 4:
        raise ValueError(f"the depth of a wide ResNet is 10, 16, 22, 28, ..., not {depth}")
    inputs, blocks = 16, []
    for stage, outputs in enumerate((16 * width, 32 * width, 64 * width)):
        for block in range((depth - 4) // 6):
            blocks.append(PreactivationBlock(inputs, outputs, 2 if stage and not block else 1, dropout))
            inputs = outputs
    return ResNet(16, nn.Sequential(*blocks, nn.BatchNorm2d(inputs), nn.ReLU()), inputs, side, num_classes)
