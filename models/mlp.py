"""The multi-layer perceptron: the baseline that every later network has to beat."""

from collections.abc import Sequence

from torch import Tensor, nn

from models.layers import Normalize


class MLP(nn.Module):
    """Fully connected layers with LeakyReLU (Maas et al. 2013), on the pixels of a picture.

    side: the picture is first averaged down to side x side pixels; widths: units of each hidden layer; batch_norm:
    batch normalisation (arXiv 1502.03167) before each activation; dropout: share of activations zeroed after it
    (Srivastava et al. 2014).
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
            layers.append(nn.Linear(inputs, width, bias=not batch_norm))  # batch norm has a shift of its own
            if batch_norm:
                layers.append(nn.BatchNorm1d(width))
            layers.append(nn.LeakyReLU(negative_slope))
            if dropout:
                layers.append(nn.Dropout(dropout))
            inputs = width
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, num_classes)

    def fit_inputs(self, images: Tensor) -> None:
        """Fit what depends on the inputs' distribution alone, here the normalisation; see `Normalize.fit`."""
        self.normalize.fit(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(self.shrink(self.normalize(images)).flatten(1)))
