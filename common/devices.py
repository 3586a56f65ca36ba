"""The devices on which PyTorch can compute, by their names in `--device`."""

import torch

from common.errors import UserError

DEVICES = ("cuda", "mps", "cpu")  # the fastest first


def is_available(device: str) -> bool:
    """Whether this machine has a device of `--device`."""
    if device == "cuda":
        return torch.cuda.is_available()
    return torch.backends.mps.is_available() if device == "mps" else True


def choose_device(name: str) -> str:
    """The device of this name; for "auto", the fastest one. Raises UserError if this machine does not have it."""
    device = next(filter(is_available, DEVICES)) if name == "auto" else name
    if not is_available(device):
        raise UserError(f"this machine has no {device} device: use --device cpu or --device auto")
    return device


def float32_device(name: str) -> str:
    """`choose_device`, for commands whose float32 must agree with a CPU's: their process does without TF32."""
    torch.backends.cudnn.allow_tf32 = False
    return choose_device(name)
