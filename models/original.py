"""The network of the unfinished project that this one grew from."""

from torch import Tensor, nn


class OriginalCNN(nn.Module):
    """Three unpadded 5x5 convolutions and four fully connected layers, as its author left it but for the last ReLU.

    Each convolution is followed by ReLU and then batch normalization, each fully connected layer but the last by ReLU.
    The author had a ReLU after the logits too, which would cut off the negative ones. Images are not normalized.
    forward: float32 [N, 3, 32, 32] in [0, 1] -> logits [N, num_classes].
    """

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 12), (12, 24), (24, 32)):
            layers += [nn.Conv2d(inputs, outputs, 5), nn.ReLU(), nn.BatchNorm2d(outputs)]
        layers += [nn.MaxPool2d(3), nn.Flatten()]
        for inputs, outputs in ((1152, 576), (576, 288), (288, 144)):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(144, num_classes)

    def fit_inputs(self, images: Tensor) -> None:
        """Nothing to fit: this network takes images as they are."""

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(images))
