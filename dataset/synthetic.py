"""A synthetic stand-in for CIFAR-100: 32x32 images that are computed, so that no dataset and no network is needed.

A class is a shape, a texture and a color: 5 shapes x 4 textures = 20 superclasses, each in 5 colors = 100 classes.
Position, size, phase, background and noise are random, so a network has to learn the classes. The images serve to try
and to test the scripts; results on them do not carry over to CIFAR-100.
"""

import torch
from torch import Tensor

SHAPES = ("disc", "square", "ring", "cross", "triangle")
TEXTURES = ("plain", "striped", "barred", "checkered")
COLORS = {"red": (0.9, 0.2, 0.2), "green": (0.2, 0.8, 0.3), "blue": (0.25, 0.35, 0.95),
          "yellow": (0.9, 0.85, 0.2), "violet": (0.7, 0.25, 0.85)}

COARSE_NAMES = tuple(f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES)
FINE_NAMES = tuple(f"{color} {coarse}" for coarse in COARSE_NAMES for color in COLORS)
COARSE_OF_FINE = tuple(fine // len(COLORS) for fine in range(len(FINE_NAMES)))

PER_CLASS = {"train": 50, "val": 10, "test": 20}


def make_synthetic(split: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw the images of a split ("train", "val" or "test"): a function of split and seed; splits share no image.

    Returns images, uint8 [N, 3, 32, 32], and fine labels, int64 [N], with N = 100 * PER_CLASS[split].
    """
    generator = torch.Generator().manual_seed(1000 * seed + list(PER_CLASS).index(split))
    labels = torch.arange(len(FINE_NAMES)).repeat(PER_CLASS[split])
    n = len(labels)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, generator=generator)

    axis = torch.arange(32) - 15.5
    x, y = axis.view(1, 1, 32) - uniform(-5, 5), axis.view(1, 32, 1) - uniform(-5, 5)
    size, phase = uniform(7, 10), uniform(0, 6)
    distance, reach = (x**2 + y**2).sqrt(), torch.maximum(x.abs(), y.abs())
    shapes = torch.stack([
        distance < size,
        reach < 0.85 * size,
        (distance < size) & (distance > 0.55 * size),
        (reach < size) & (torch.minimum(x.abs(), y.abs()) < 0.3 * size),
        (y < 0.8 * size) & (y > 1.8 * x.abs() - size),
    ])
    across, down = torch.sin(x + phase) > 0, torch.sin(y + phase) > 0
    textures = torch.stack([torch.ones(n, 32, 32, dtype=torch.bool), across.expand(n, 32, 32),
                            down.expand(n, 32, 32), across ^ down])

    color = labels % len(COLORS)
    coarse = labels // len(COLORS)
    each = torch.arange(n)
    shape = shapes[coarse // len(TEXTURES), each][:, None]
    texture = textures[coarse % len(TEXTURES), each][:, None]
    ink = torch.tensor(list(COLORS.values()))[color].view(n, 3, 1, 1)
    background = 0.5 + 0.15 * torch.randn(n, 3, 1, 1, generator=generator)
    images = torch.where(shape, torch.where(texture, ink, 0.35 * ink), background)
    images = images + 0.06 * torch.randn(n, 3, 32, 32, generator=generator)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), labels
