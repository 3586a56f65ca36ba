"""Our convolutional network, which takes an image and its mirror image for the same."""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Norm, Resize

WHITENING_SAMPLE = 1000  # images, each with hundreds of 2x2 patches
WHITENING_EPSILON = 0.03  # with less, the finest patterns, which are mostly noise, are amplified
LOGIT_SCALE = 1.25 / 9
KERNELS = ((3, (1, 1)), (3, (3, 1)), (2, (3, 3)))  # sizes, by group: of its first convolution, and of its residual pair
SMALL = 4  # pixels a side of a map that is convolved without its padding


class MirrorNet(nn.Module):
    """Three groups of mirrored convolutions on whitened images, each at half the resolution; pooling; one layer.

    Most filters and most operations are in the last group. That shape, batch normalization without scales, identity
    initialization and the scaled sum of maximum and mean pooling are those of NAVIER-STOKED, 2026
    (github.com/AIDDA-Institute/CIFAR-100-speedrun); the whitening is from K. Jordan, 2024, arXiv 2404.00498.

    The channels of every map are two halves. A mirrored image gives the mirrored maps with these halves exchanged, so
    the second half looks for what the first one does, the other way round, and the logits stay the same. That is exact
    wherever a map is padded equally on both sides, as with a side of 21, 29 or 37, and nearly so with other sides.

    widths: filters of each group; inner: filters between the two convolutions of its residual pair; all even. side:
    images are scaled to side x side pixels first.
    forward: float32 [N, 3, H, W] in [0, 1] -> logits [N, num_classes].
    """

    def __init__(self, widths: Sequence[int] = (64, 256, 768), inner: Sequence[int] = (64, 192, 512), side: int = 32,
                 num_classes: int = 100) -> None:
        super().__init__()
        if not len(widths) == len(inner) == len(KERNELS):
            raise ValueError(f"widths and inner must each have {len(KERNELS)} numbers, one per group")
        self.resize = Resize(side)
        self.whiten = MirrorWhitening(WHITENING_EPSILON)
        inputs = self.whiten.out_channels
        groups = []
        for width, middle, (first, pair) in zip(widths, inner, KERNELS, strict=True):
            groups.append(Group(inputs, width, middle, first, pair))
            inputs = width
        self.groups = nn.Sequential(*groups)
        self.head = nn.Linear(inputs // 2, num_classes, bias=False)

    def fit_inputs(self, images: Tensor) -> None:
        """Fit the whitening to training images, float32 [N, 3, H, W] in [0, 1]."""
        self.whiten.fit(images[:WHITENING_SAMPLE])

    def forward(self, images: Tensor) -> Tensor:
        x = beside(self.groups(F.silu(self.whiten(self.resize(images)))))
        return self.head(x.amax((2, 3)) + x.mean((2, 3))) * LOGIT_SCALE


class Group(nn.Module):
    """A convolution that halves height and width, by maximum pooling, and a residual pair of convolutions.

    float32 [N, inputs, H, W] -> [N, outputs, H // 2, W // 2]. Norm and SiLU follow each convolution.
    """

    def __init__(self, inputs: int, outputs: int, middle: int, first: int, pair: tuple[int, int]) -> None:
        super().__init__()
        self.first, self.norm = MirrorConv(inputs, outputs, first), MirrorNorm(outputs)
        self.narrow, self.narrow_norm = MirrorConv(outputs, middle, pair[0], same=True), MirrorNorm(middle)
        self.widen, self.widen_norm = MirrorConv(middle, outputs, pair[1], same=True), MirrorNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        size, odd = self.first.size, x.shape[2] % 2
        x = F.pad(x, 2 * ((size - 1) // 2, size // 2 - odd))  # without an odd row and column: pooling would drop them
        x = F.silu(self.norm(F.max_pool2d(self.first(x), 2)))
        branch = F.silu(self.narrow_norm(self.narrow(x)))
        return x + F.silu(self.widen_norm(self.widen(branch)))


# ---- Mirrored layers ------------------------------------------------------------------------------------------------


def beside(x: Tensor) -> Tensor:
    """Put the pixels of both halves of the channels beside each other: [N, C, H, W] -> [N, C / 2, H, 2 W].

    In channels_last order nothing is copied.
    """
    return x.permute(0, 2, 3, 1).unflatten(3, (2, -1)).flatten(2, 3).permute(0, 3, 1, 2)


class MirrorNorm(Norm):
    """Batch normalization in which a filter and its mirror image share their statistics: [N, C, H, W] -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        pixels = super().forward(beside(x)).permute(0, 2, 3, 1)
        return pixels.unflatten(2, (-1, 2)).flatten(3).permute(0, 3, 1, 2)


class MirrorWhitening(nn.Conv2d):
    """Projections of 2x2 patches, scaled to unit variance, that are uncorrelated: float32 [N, 3, H, W] -> [N, 24, ...].

    Six filters and their negatives, then the mirror images of these twelve. Mirroring leaves the sums of a patch's two
    columns and turns the sign of their differences, so both have principal directions of their own. A filter is the
    sum of one of each; its mirror image is their difference. The filters are fitted once and not trained (arXiv
    2404.00498); before `fit` they are random. Height and width shrink by one pixel.

    epsilon: added to each variance, so that directions of pure noise are not amplified.
    """

    def __init__(self, epsilon: float) -> None:
        super().__init__(3, 24, 2, bias=False)
        self.epsilon = epsilon
        self.weight.requires_grad_(False)

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Fit the filters to the patches of training images, float32 [N, 3, H, W] in [0, 1]."""
        left, right = F.unfold(images, 2).transpose(1, 2).reshape(-1, 6, 2).unbind(2)
        filters = torch.zeros(6, 6, 2, dtype=images.dtype)
        for sign in (1, -1):
            variances, directions = torch.linalg.eigh(torch.cov((left + sign * right).T).double() / 2)
            scaled = (directions / (variances + self.epsilon).sqrt()).T / 2
            filters += torch.stack([scaled, sign * scaled], 2).to(images.dtype)
        filters = filters.view(6, 3, 2, 2)
        halves = torch.cat([filters, -filters])
        self.weight.copy_(torch.cat([halves, halves.flip(3)]))


class MirrorConv(nn.Module):
    """A convolution with mirrored filters: [N, inputs, H, W] -> [N, outputs, H', W'].

    The filters of the second half of the outputs are those of the first half mirrored, with the halves of the inputs
    exchanged (group convolution: Cohen and Welling 2016, arXiv 1602.07576). So the sum of both halves of the outputs
    needs of the inputs only what mirroring leaves as it is, and their difference only what changes its sign: sums and
    differences of the halves, and of the outer columns under the filter. Each takes half of the weights of a common
    convolution, and both together half of its operations or fewer (Bökman et al. 2025, arXiv 2502.05169). Without
    their factors of 1/2: a norm follows.

    size: of the filters, 1, 2 or 3; same: keep height and width, by padding, which needs an odd size. Raises ValueError
    for an odd number of inputs or outputs.
    """

    def __init__(self, inputs: int, outputs: int, size: int, *, same: bool = False) -> None:
        super().__init__()
        if inputs % 2 or outputs % 2:
            raise ValueError("widths and inner must be even: filters come with their mirror images")
        self.size, self.padding = size, size // 2 if same else 0
        self.even, self.odd = (nn.Conv2d(size * inputs // 2, outputs // 2, (size, 1), bias=False,
                                         padding=(self.padding, 0)) for _ in range(2))
        middle = (size - 1) // 2
        for weight in (self.even.weight.detach(), self.odd.weight.detach()):
            weight[:inputs // 2] = 0  # before training, it passes on its inputs as they are
            weight[:, :, middle, 0].diagonal()[:inputs // 2].fill_(1)

    @property
    def weight(self) -> Tensor:
        """The weights of each filter of the first half, [outputs / 2, size * inputs, size, 1]."""
        return torch.cat([self.even.weight, self.odd.weight], 1)

    def forward(self, x: Tensor) -> Tensor:
        pixels = F.pad(x, 2 * (self.padding,) + (0, 0)).permute(0, 2, 3, 1)
        first, second = pixels.unflatten(3, (2, -1)).unbind(3)
        total, difference = first + second, first - second
        even = _convolve(self._columns(total, difference), self.even)
        odd = _convolve(self._columns(difference, total), self.odd)
        return torch.stack([even + odd, even - odd], 3).flatten(3).permute(0, 3, 1, 2)

    def _columns(self, same: Tensor, other: Tensor) -> Tensor:
        """What mirroring leaves of the columns under a filter, for `same`, which it leaves, and `other`, whose sign it
        changes; for exchanged arguments, what changes its sign. [N, H, W, C] -> [N, H, W + 1 - size, size * C].
        """
        if self.size == 1:
            return same
        far = self.size - 1
        outer = [same[:, :, :-far] + same[:, :, far:], other[:, :, far:] - other[:, :, :-far]]
        return torch.cat([*([same[:, :, 1:-1]] if self.size == 3 else []), *outer], 3)


def _convolve(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """A convolution along the height: [N, H, W, C] -> [N, H', W, D].

    Small maps are mostly edge: of the nine products of a row of weights and a row of pixels that a map of height 3
    takes, two multiply padding. So those of up to SMALL pixels are computed row by row, without the padding. On CPUs
    that is also faster.
    """
    height, padding = x.shape[1], layer.padding[0]
    if x.device.type != "cpu" or not padding or height > SMALL:
        return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    above, middle, below = layer.weight.to(x.dtype)[..., 0].unbind(2)  # three matrices [D, C]
    terms = [F.linear(x, middle)]
    if height > 1:
        terms += [F.pad(F.linear(x[:, :-1], above), (0, 0, 0, 0, 1, 0)),
                  F.pad(F.linear(x[:, 1:], below), (0, 0, 0, 0, 0, 1))]
    return functools.reduce(torch.add, terms)
