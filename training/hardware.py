"""The machine a training runs on: its device, its fastest arithmetic, its speed and its memory."""

import copy
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.devices import choose_device
from common.errors import UserError
from training.distributed import Processes
from training.settings import Settings
from utils import Split, to_float

TRIAL_IMAGES = (32, 256)  # the small batch suffices if one precision is far slower
DECISIVE_RATIO = 4.0  # of the times of two precisions: no larger batch is timed above it
BYTES_PER_PARAMETER = 12  # at least: float32 value, gradient and momentum


def prepare_device(settings: Settings) -> Settings:
    """Settings whose device and threads are those that this process now uses, instead of "auto" and 0.

    Raises UserError if this machine does not have the device.
    """
    device = choose_device(settings.device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    return replace(settings, device=device, threads=torch.get_num_threads())


def require_memory(build: Callable[[], nn.Module], device: str) -> None:
    """Raise UserError if this machine does not have the memory to train the network that `build` builds."""
    with torch.device("meta"):  # shapes only
        needed = BYTES_PER_PARAMETER * sum(parameter.numel() for parameter in build().parameters())
    available = _total_memory(device)
    if available is not None and needed > available:
        raise UserError(f"training this network takes more than {needed / 2**30:,.0f} GiB of memory, and this machine "
                        f"has {available / 2**30:,.0f}: try a smaller one, for example with smaller --widths")


def require_compiler(device: str) -> None:
    """Raise UserError if torch.compile does not work on this device."""
    size = 2 + time.time_ns() % 10**6  # none that an earlier process has compiled: PyTorch keeps the results
    try:
        torch.compile(torch.sin)(torch.ones(size, device=device, requires_grad=True)).sum().backward()
    except Exception as error:  # of many types, most with a page of text
        reason = next(iter(str(error).split("\n")), "")[:200] or type(error).__name__
        raise UserError(f"--compile does not work on this machine ({reason}): install a C++ compiler, "
                        "or use --no-compile") from error


def _total_memory(device: str) -> int | None:
    """Bytes of memory of the GPU or the machine; None if the system does not report them."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return None
    return pages * size if min(pages, size) > 0 else None  # -1: unknown


def choose_precision(model: nn.Module, split: Split, settings: Settings, processes: Processes) -> Settings:
    """Settings with a precision instead of "auto": bfloat16 on a GPU, and on a CPU whichever trains `model` faster.

    Both are timed, because processors with and without bfloat16 instructions differ by a factor of 50.
    """
    if settings.precision != "auto":
        return settings
    if settings.device != "cpu":
        return replace(settings, precision="bfloat16" if settings.device == "cuda" else "float32")
    fastest = _fastest_precision(model, split, settings.batch_size) if processes.is_first else ""
    return replace(settings, precision=processes.from_first(fastest))


def _fastest_precision(model: nn.Module, split: Split, batch_size: int) -> str:
    trial = copy.deepcopy(model).train()

    def step(precision: str, images: Tensor, labels: Tensor) -> None:
        trial.zero_grad()
        with autocast("cpu", precision):
            logits = trial(images.contiguous(memory_format=torch.channels_last))
        F.cross_entropy(logits.float(), labels).backward()

    for images in TRIAL_IMAGES:
        size = min(batch_size, images)
        batch = to_float(split.images[:size]), split.fine_labels[:size]
        seconds = {name: seconds_per_call(partial(step, name, *batch), budget=1.0) for name in ("float32", "bfloat16")}
        if max(seconds.values()) > DECISIVE_RATIO * min(seconds.values()):
            break
    return min(seconds, key=seconds.__getitem__)


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16")


def seconds_per_call(function: Callable[[], object], budget: float) -> float:
    """The median time of the calls that fit into `budget` seconds: at least one, after a warm-up call."""
    function()
    times: list[float] = []
    end = time.perf_counter() + budget
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


@cache
def machine_facts(device: str) -> dict[str, Any]:
    """The processor, its threads, and the speed of one 3x3 convolution, forward and backward, in GFLOP/s."""
    facts: dict[str, Any] = {"processor": _processor_name(device), "threads": torch.get_num_threads()}
    channels, side, batch = 128, 16, 8 if device == "cpu" else 1024
    convolution = nn.Conv2d(channels, channels, 3, padding=1, device=device).to(memory_format=torch.channels_last)
    images = torch.randn(batch, channels, side, side, device=device).to(memory_format=torch.channels_last)
    images.requires_grad_()
    flops = 3 * 2 * 9 * channels**2 * side**2 * batch

    def step(precision: str) -> None:
        with autocast(device, precision):
            convolution(images).sum().backward()
        synchronize(device)

    for precision in ("float32", "bfloat16"):
        if device == "mps" and precision == "bfloat16":
            continue
        seconds = seconds_per_call(partial(step, precision), budget=0.4)
        facts[f"conv3x3_{precision}_gflops"] = round(flops / seconds / 1e9, 1)
    return facts


def _processor_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    command = ["sysctl", "-n", "machdep.cpu.brand_string"] if sys.platform == "darwin" else ["lscpu"]
    try:
        environment = {**os.environ, "LC_ALL": "C"}
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, env=environment,
                                errors="replace").stdout
    except (OSError, subprocess.TimeoutExpired):
        output = ""
    lines = [line.removeprefix("Model name:").strip() for line in map(str.strip, output.splitlines())
             if sys.platform == "darwin" or line.startswith("Model name:")]
    return lines[0] if lines else platform.processor() or platform.machine()


def synchronize(device: torch.device | str) -> None:
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize()
    elif kind == "mps":
        torch.mps.synchronize()


def peak_memory(device: str) -> int | None:
    """Peak bytes of the GPU's memory, or of this process, dataset included; None if the system does not report it."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource  # POSIX only
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
