"""The folder of CIFAR-100, and the images that stand in for it."""
