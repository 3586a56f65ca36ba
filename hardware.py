"""The machine a training runs on: its device, the arithmetic that is fastest there, its speed and its memory."""

import copy
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from settings import Settings
from utils import Split, UserError, to_float

TRIAL_PICTURES = (32, 256)  # few are enough where one precision is 50 times slower; else it takes a real batch to see
CLEAR = 4.0  # times slower
BYTES_A_PARAMETER = 12  # at least: itself, its gradient and its momentum in float32


def prepare_device(settings: Settings) -> Settings:
    """Settings with "auto" replaced by the device and the number of threads that this process now uses.

    Raises UserError if the device that was asked for is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = settings.device
    if device == "auto":
        device = next(name for name, there in available.items() if there)
    if not available[device]:
        raise UserError(f"there is no {device} device here: start a run with --device cpu, or auto for what there is")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    return replace(settings, device=device, threads=torch.get_num_threads())


def require_memory(build: Callable[[], nn.Module], device: str) -> None:
    """Raises UserError if this machine has not the memory to train the network that `build` builds."""
    with torch.device("meta"):  # shapes only
        needed = BYTES_A_PARAMETER * sum(parameter.numel() for parameter in build().parameters())
    there = torch.cuda.mem_get_info()[1] if device == "cuda" \
        else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise UserError(f"training this network takes more than {needed / 2**30:,.0f} GiB of memory, and there are "
                        f"{there / 2**30:,.0f}: try a smaller one, say with smaller --widths")


def choose_precision(model: nn.Module, split: Split, settings: Settings) -> Settings:
    """Settings with "auto" replaced: bfloat16 on a GPU; on a CPU whichever makes this model's training steps faster.

    Processors differ by a factor of 50 in bfloat16 (with or without instructions for it), hence the measurement.
    """
    if settings.precision != "auto":
        return settings
    if settings.device != "cpu":
        return replace(settings, precision="bfloat16" if settings.device == "cuda" else "float32")
    trial = copy.deepcopy(model).train()

    def step(precision: str, images: Tensor, labels: Tensor) -> None:
        trial.zero_grad()
        with autocast("cpu", precision):
            logits = trial(images.contiguous(memory_format=torch.channels_last))
        F.cross_entropy(logits.float(), labels).backward()

    for pictures in TRIAL_PICTURES:
        some = min(settings.batch_size, pictures)
        batch = to_float(split.images[:some]), split.fine_labels[:some]
        seconds = {name: seconds_per_call(lambda name=name, batch=batch: step(name, *batch), budget=1.0)
                   for name in ("float32", "bfloat16")}
        if max(seconds.values()) > CLEAR * min(seconds.values()):
            break
    return replace(settings, precision=min(seconds, key=seconds.get))


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16")


def seconds_per_call(function: Callable[[], object], budget: float) -> float:
    """The median time of a call, over as many as fit into `budget` seconds; at least one, after one to warm up."""
    function()
    times, end = [], time.perf_counter() + budget
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


@cache
def machine_facts(device: str) -> dict[str, Any]:
    """The processor's name, and what one 3x3 convolution reaches on it, forward and backward, in GFLOP/s."""
    facts: dict[str, Any] = {"processor": _processor_name(device), "threads": torch.get_num_threads()}
    channels, side, batch = 128, 16, 8 if device == "cpu" else 1024
    convolution = nn.Conv2d(channels, channels, 3, padding=1, device=device).to(memory_format=torch.channels_last)
    images = torch.randn(batch, channels, side, side, device=device).to(memory_format=torch.channels_last)
    images.requires_grad_()
    flops = 3 * 2 * 9 * channels**2 * side**2 * batch

    def step(precision: str) -> None:
        with autocast(device, precision):
            convolution(images).sum().backward()
        wait_for(device)

    for precision in ("float32", "bfloat16"):
        if device == "mps" and precision == "bfloat16":
            continue
        seconds = seconds_per_call(lambda precision=precision: step(precision), budget=0.4)
        facts[f"conv3x3_{precision}_gflops"] = round(flops / seconds / 1e9, 1)
    return facts


def _processor_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    asked = ["sysctl", "-n", "machdep.cpu.brand_string"] if sys.platform == "darwin" else ["lscpu"]
    try:
        environment = {**os.environ, "LC_ALL": "C"}
        said = subprocess.run(asked, capture_output=True, text=True, timeout=10, env=environment).stdout
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    lines = [line.removeprefix("Model name:").strip() for line in map(str.strip, said.splitlines())
             if sys.platform == "darwin" or line.startswith("Model name:")]
    return lines[0] if lines else platform.processor() or platform.machine()


def wait_for(device: torch.device | str) -> None:
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize()
    elif kind == "mps":
        torch.mps.synchronize()


def peak_memory(device: str) -> int:
    """Bytes: of the GPU's memory, or else of this whole process, the data set included."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
