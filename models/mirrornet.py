"""Our convolutional network, whose filters come in mirrored pairs."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .layers import Norm, Resize

WHITENING_SAMPLE = 1000  # images, each with hundreds of 2x2 patches
WHITENING_EPSILON = 0.03  # with less, the finest patterns, which are mostly noise, are amplified
LOGIT_SCALE = 1.25 / 9
KERNELS = ((3, (1, 1)), (3, (3, 1)), (2, (3, 3)))  # sizes, by group: of its first convolution, and of its residual pair
SMALL = 4  # rows of a map that is convolved without its padding, on CPUs


class MirrorNet(nn.Module):
    """Three groups of mirrored convolutions on whitened images, each at half the resolution; pooling; one layer.

    Most filters and most operations are in the last group. That shape, batch normalization without scales, identity
    initialization and the scaled sum of maximum and mean pooling are those of NAVIER-STOKED, 2026
    (github.com/AIDDA-Institute/CIFAR-100-speedrun); the whitening is from K. Jordan, 2024, arXiv 2404.00498.

    The channels of every map are two halves. The second half has the filters of the first, mirrored. If an image is
    mirrored, its maps are mirrored and the halves change places. The head pools over both halves, so the logits stay
    the same. This is exact with a side of 21, 29 or 37, where each map is padded equally on both sides. With others,
    such as 32, pooling drops the last column of odd maps, and the logits change a little.

    widths: filters of each group; inner: filters between the two convolutions of its residual pair. All must be even.
    side: images are scaled to side x side pixels first.
    forward: float32 [N, 3, H, W] in [0, 1] -> logits [N, num_classes].
    """

    def __init__(self, widths: Sequence[int] = (64, 256, 768), inner: Sequence[int] = (64, 192, 512), side: int = 32,
                 num_classes: int = 100) -> None:
        super().__init__()
        if not len(widths) == len(inner) == len(KERNELS):
            raise ValueError(f"widths and inner must each have {len(KERNELS)} numbers, one per group")
        if any(count % 2 for count in (*widths, *inner)):
            raise ValueError("widths and inner must be even: filters come in mirrored pairs")
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
        x = side_by_side(self.groups(F.silu(self.whiten(self.resize(images)))))
        return self.head(x.amax((2, 3)) + x.mean((2, 3))) * LOGIT_SCALE


class Group(nn.Module):
    """A convolution that halves height and width, by maximum pooling, and a residual pair of convolutions.

    float32 [N, inputs, H, W] -> [N, outputs, H // 2, W // 2]. Norm and SiLU follow each convolution.
    """

    def __init__(self, inputs: int, outputs: int, middle: int, first: int, pair: tuple[int, int]) -> None:
        super().__init__()
        self.first, self.norm = MirrorConv(inputs, outputs, first), Norm(outputs // 2)
        self.narrow, self.narrow_norm = MirrorConv(outputs, middle, pair[0], same=True), Norm(middle // 2)
        self.widen, self.widen_norm = MirrorConv(middle, outputs, pair[1], same=True), Norm(outputs // 2)

    def forward(self, x: Tensor) -> Tensor:
        size, odd = self.first.size, x.shape[2] % 2
        x = F.pad(x, 2 * ((size - 1) // 2, size // 2 - odd))  # without an odd row and column: pooling would drop them
        x = F.silu(normalized(F.max_pool2d(self.first(x), 2), self.norm))
        branch = F.silu(normalized(self.narrow(x), self.narrow_norm))
        return x + F.silu(normalized(self.widen(branch), self.widen_norm))


# ---- Mirrored layers ------------------------------------------------------------------------------------------------


def side_by_side(x: Tensor) -> Tensor:
    """Put the second half of the channels next to the first, pixel by pixel: [N, C, H, W] -> [N, C / 2, H, 2 W].

    In channels_last order nothing is copied.
    """
    return x.permute(0, 2, 3, 1).unflatten(3, (2, -1)).flatten(2, 3).permute(0, 3, 1, 2)


def normalized(x: Tensor, norm: nn.Module) -> Tensor:
    """Apply a norm of C / 2 channels, so that a filter and its mirror image share their statistics: [N, C, H, W]."""
    pixels = norm(side_by_side(x)).permute(0, 2, 3, 1)
    return pixels.unflatten(2, (-1, 2)).flatten(3).permute(0, 3, 1, 2)


class MirrorWhitening(nn.Conv2d):
    """Whitening of 2x2 patches with filters in mirrored pairs: float32 [N, 3, H, W] -> [N, 24, H - 1, W - 1].

    Six filters, their negatives, and the mirror images of these twelve. Mirroring a patch keeps the sum of its two
    columns and negates their difference. `fit` computes the principal directions of both, each scaled to equal
    variance. A filter is a direction of sums plus one of differences; its mirror image is the first minus the second.
    On images and their mirror images, the six and their mirror images have unit variance and no correlation. Filters
    are fitted once and not trained (arXiv 2404.00498); before `fit` they are random and not mirrored.

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
        filters = images.new_zeros(6, 6, 2)
        for sign in (1, -1):
            variances, directions = torch.linalg.eigh(torch.cov((left + sign * right).T).double() / 2)
            scaled = (directions / (variances + self.epsilon).sqrt()).T / 2
            filters += torch.stack([scaled, sign * scaled], 2).to(images.dtype)
        filters = filters.view(6, 3, 2, 2)
        halves = torch.cat([filters, -filters])
        self.weight.copy_(torch.cat([halves, halves.flip(3)]))


class MirrorConv(nn.Module):
    """A convolution whose filters come in mirrored pairs: [N, inputs, H, W] -> [N, outputs, H', W'].

    Call the halves of the input channels a and b. Filter i of the second half of the outputs is filter i of the first
    half, mirrored, with its weights for a and b exchanged (Cohen and Welling 2016, arXiv 1602.07576). So mirroring the
    input and exchanging its halves does the same to the output.

    It is computed from sums and differences (Bökman et al. 2025, arXiv 2502.05169). Let p = a + b and q = a - b, and
    take two columns, left and right of the center. Mirroring leaves p[center], p[left] + p[right] and
    q[right] - q[left] as they are: these are even. It negates q[center], q[left] + q[right] and p[right] - p[left]:
    these are odd. The sum of an output and its mirrored partner depends only on the even ones, their difference only on
    the odd ones. So `even` and `odd` together have half of the weights of an ordinary convolution, and take half of its
    operations. We omit factors of 1/2, since a norm follows.

    size: of the filters, 1, 2 or 3; same: keep height and width by padding, which needs an odd size.
    """

    def __init__(self, inputs: int, outputs: int, size: int, *, same: bool = False) -> None:
        super().__init__()
        self.size, self.padding = size, size // 2 if same else 0
        self.even, self.odd = (nn.Conv2d(size * inputs // 2, outputs // 2, (size, 1), bias=False,
                                         padding=(self.padding, 0)) for _ in range(2))
        middle = (size - 1) // 2
        for weight in (self.even.weight.detach(), self.odd.weight.detach()):
            # Before training, filter i passes on channel i, times a factor that a norm removes. nn.init.dirac_ would
            # loop over all filters that a hostile file claims.
            weight[:inputs // 2] = 0
            weight[:, :, middle, 0].diagonal()[:inputs // 2].fill_(1)

    @property
    def weight(self) -> Tensor:
        """The weights of the pairs of filters, [outputs / 2, size * inputs, size, 1]."""
        return torch.cat([self.even.weight, self.odd.weight], 1)

    def forward(self, x: Tensor) -> Tensor:
        # torch.compile fails on the functions written by hand.
        combine, join = (_combine, _join) if torch.compiler.is_compiling() else (_Combine.apply, _Join.apply)
        even, odd = combine(x.permute(0, 2, 3, 1), self.size, self.padding)
        return join(_convolve(even, self.even), _convolve(odd, self.odd)).permute(0, 3, 1, 2)


def _combine(x: Tensor, size: int, padding: int) -> tuple[Tensor, Tensor]:
    """The even and the odd combinations of the columns under a filter, from the halves of the channels.

    [N, H, W, 2 C] -> two of [N, H, W', size * C]: the center (unless `size` is 2), then sum and difference of the outer
    columns (unless it is 1). `padding` columns of zeros are added on each side first.
    """
    first, second = F.pad(x, (0, 0, padding, padding)).chunk(2, 3)
    p, q = first + second, first - second
    if size == 1:
        return p, q
    far = size - 1

    def columns(same: Tensor, other: Tensor) -> Tensor:
        center = [same[:, :, 1:-1]] if size == 3 else []
        return torch.cat([*center, same[:, :, :-far] + same[:, :, far:], other[:, :, far:] - other[:, :, :-far]], 3)

    return columns(p, q), columns(q, p)


def _join(even: Tensor, odd: Tensor) -> Tensor:
    """The halves of the channels, even + odd and even - odd: two of [N, H, W, C] -> [N, H, W, 2 C]."""
    return torch.cat([even + odd, even - odd], 3)


class _Combine(torch.autograd.Function):
    """`_combine`, with sums written directly into the result, and gradients added up in pairs.

    Autograd would make a new map for every term, and for every slice one that is filled with zeros.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, padding: int) -> tuple[Tensor, Tensor]:
        ctx.size, ctx.padding, far = size, padding, size - 1
        batch, height, width, channels = x.shape
        first, second = x.chunk(2, 3)
        empty = x.new_zeros if padding else x.new_empty
        p, q = empty(2, batch, height, width + 2 * padding, channels // 2)
        inner = slice(padding, width + padding)
        torch.add(first, second, out=p[:, :, inner])
        torch.sub(first, second, out=q[:, :, inner])
        if size == 1:
            return p, q
        combined = []
        for same, other in ((p, q), (q, p)):
            columns = x.new_empty(batch, height, same.shape[2] - far, size, channels // 2)
            if size == 3:
                columns[..., 0, :] = same[:, :, 1:-1]
            torch.add(same[:, :, :-far], same[:, :, far:], out=columns[..., -2, :])
            torch.sub(other[:, :, far:], other[:, :, :-far], out=columns[..., -1, :])
            combined.append(columns.flatten(3))
        return combined[0], combined[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, even: Tensor, odd: Tensor) -> tuple[Tensor, None, None]:
        size, padding, far = ctx.size, ctx.padding, ctx.size - 1
        if size == 1:
            return _sum_and_difference(even, odd), None, None
        even, odd = even.unflatten(3, (size, -1)), odd.unflatten(3, (size, -1))
        batch, height, width, _, channels = even.shape
        p, q = even.new_zeros(2, batch, height, width + far, channels)
        for grad, same, other in ((p, even, odd), (q, odd, even)):
            if size == 3:
                grad[:, :, 1:-1] = same[..., 0, :]
            grad[:, :, :-far] += same[..., -2, :] - other[..., -1, :]
            grad[:, :, far:] += same[..., -2, :] + other[..., -1, :]
        inner = slice(padding, width + far - padding)
        return _sum_and_difference(p[:, :, inner], q[:, :, inner]), None, None


class _Join(torch.autograd.Function):
    """`_join`, with sums written directly into the result. Autograd would also make a negated copy of the gradient."""

    @staticmethod
    def forward(ctx: Any, even: Tensor, odd: Tensor) -> Tensor:
        return _sum_and_difference(even, odd)

    @staticmethod
    def backward(ctx: Any, halves: Tensor) -> tuple[Tensor, Tensor]:
        first, second = halves.chunk(2, 3)
        return first + second, first - second


def _sum_and_difference(even: Tensor, odd: Tensor) -> Tensor:
    """even + odd and even - odd, written into one new map: two of [N, H, W, C] -> [N, H, W, 2 C]."""
    halves = even.new_empty(*even.shape[:3], 2, even.shape[3])
    torch.add(even, odd, out=halves[..., 0, :])
    torch.sub(even, odd, out=halves[..., 1, :])
    return halves.flatten(3)


def _convolve(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """A convolution along the height, without bias: [N, H, W, C] -> [N, H', W, D].

    Small maps are mostly edge: in a map of three rows, two of the nine products of a row of weights and a row of pixels
    multiply padding. So maps of up to SMALL rows are computed row by row, without it. On CPUs that is also faster.
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
