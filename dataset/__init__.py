"""CIFAR-100's files: found, read and downloaded; and the images that stand in for them. Knows no training."""
