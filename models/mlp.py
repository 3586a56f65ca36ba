"""The multi-layer perceptron, the baseline that every other network has to beat."""

from collections.abc import Sequence

from torch import Tensor, nn

from .layers import Normalize


class MLP(nn.Module):
    """Fully connected layers with LeakyReLU (Maas et al. 2013), on the pixels of an image.

    widths: units of each hidden layer; side: images are first averaged down to side x side pixels; dropout: fraction
    of activations zeroed after each layer (Srivastava et al. 2014); batch_norm: batch normalization before each
    activation (arXiv 1502.03167); negative_slope: of LeakyReLU.
    forward: float32 [N, 3, 32, 32] in [0, 1] -> logits [N, num_classes].
    """

    def __init__(
        self,
        widths: Sequence[int] = (512, 256, 128),
        side: int = 32,
        dropout: float = 0.0,
        batch_norm: bool = True,
        negative_slope: float = 0.01,
        num_classes: int = 100,
    ) -> None:
        super().__init__()
        self.normalize = Normalize()
        self.shrink = nn.AdaptiveAvgPool2d(side)
        layers: list[nn.Module] = []
        inputs = 3 * side**2
        for width in widths:
            layers.append(nn.Linear(inputs, width, bias=not batch_norm))  # batch norm adds its own
            if batch_norm:
                layers.append(nn.BatchNorm1d(width))
            layers.append(nn.LeakyReLU(negative_slope))
            if dropout:
                layers.append(nn.Dropout(dropout))
            inputs = width
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, num_classes)

    def fit_inputs(self, images: Tensor) -> None:
        """Fit the normalization to training images, float32 [N, 3, 32, 32] in [0, 1]."""
        self.normalize.fit(images)

    def forward(self, images: Tensor) -> Tensor:
        pixels = self.shrink(self.normalize(images)).flatten(1)
        return self.head(self.layers(pixels))
