"""The machine a training runs on: its device, its fastest arithmetic, its speed and its memory."""

import copy
import ctypes
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from common.devices import choose_device
from common.errors import UserError
from training.distributed import Processes
from training.settings import Settings
from utils import Split, to_float

TRIAL_IMAGES = (16, 256)  # the small batch suffices if one precision is clearly faster
TRIAL_SECONDS = 0.25  # for each way to compute that is timed
BFLOAT16_WINS = 1.5  # times as fast on a small batch: its gain only grows with the batch
FAR_SLOWER = 4.0  # times as slow: nothing more needs to be timed
FIRST_CALL = 1.0  # seconds that may pass before the first result, since PyTorch prepares much in a first call
THREADS_IMAGES = 64  # of a step that is timed with one thread and with all
SHORT_STEP = 0.02  # seconds with one thread; a longer step is worth all cores
CLEARLY = 1.1  # times as fast: more than the noise
BYTES_PER_PARAMETER = 12  # at least: float32 value, gradient and momentum
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # in malloc.h of the GNU C library


def prepare_device(settings: Settings) -> Settings:
    """Settings whose device and threads are those that this process now uses, instead of "auto" and 0.

    Raises UserError if this machine does not have the device.
    """
    device = choose_device(settings.device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    return replace(settings, device=device, threads=torch.get_num_threads())


def keep_freed_memory(device: torch.device | str) -> None:
    """On a CPU, let this process keep the memory that it frees, where the GNU C library allocates it.

    Otherwise the library returns each map of dozens of megabytes to the system, which clears its pages when the next
    step asks for them. With the memory kept, the speedrun's steps of 1,024 images take 0.59 of their time, and ours of
    256 images no less than before (docs/experiments.md). This holds in the main thread until the process ends.
    """
    if torch.device(device).type == "cpu" and platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, -1)


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


def choose_precision(
    model: nn.Module, split: Split, settings: Settings, processes: Processes
) -> tuple[Settings, str]:
    """Settings with a precision instead of "auto", and the reason: the faster one on a CPU.

    On a GPU it is bfloat16 if that has instructions for it. On a CPU both are timed, because processors with and
    without bfloat16 instructions differ by a factor of 50. One thread does it: with several, a busy machine would take
    many times as long.
    """
    if settings.precision != "auto":
        return settings, ""
    if settings.device != "cpu":
        fast = settings.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return replace(settings, precision="bfloat16" if fast else "float32"), ""
    found = _faster_precision(model, split, settings.batch_size) if processes.is_first else ("", "")
    precision, reason = processes.from_first(found)
    return replace(settings, precision=precision), reason


def _faster_precision(model: nn.Module, split: Split, batch_size: int) -> tuple[str, str]:
    trial = copy.deepcopy(model).train()
    with _one_thread():
        for images in TRIAL_IMAGES:
            step = partial(_trial_step, trial, split, min(batch_size, images))
            float32 = seconds_per_call(partial(step, "float32"), TRIAL_SECONDS)
            bfloat16 = seconds_per_call(partial(step, "bfloat16"), TRIAL_SECONDS,
                                        enough=max(FIRST_CALL, FAR_SLOWER * float32))
            if float32 > BFLOAT16_WINS * bfloat16 or bfloat16 > FAR_SLOWER * float32:
                break
    ratio = float32 / bfloat16
    if 1 / CLEARLY < ratio < CLEARLY:
        return "float32", "bfloat16 is not clearly faster here"
    faster, slower = ("bfloat16", "float32") if ratio > 1 else ("float32", "bfloat16")
    return faster, f"{faster} is {max(ratio, 1 / ratio):.1f} times as fast as {slower} here"


def choose_threads(model: nn.Module, split: Split, settings: Settings, *, brief: bool = False) -> tuple[Settings, str]:
    """Settings with one thread instead of all where that is clearly faster and steps are short, and the reason.

    After each of the many operations in a step, the threads wait for the slowest one, which takes long on a busy
    machine. brief: the whole training is over so soon that the machine's load now decides, however long a step is.
    """
    count = settings.threads
    if settings.device != "cpu" or count == 1:
        return settings, ""
    images = min(settings.batch_size, THREADS_IMAGES)
    step = partial(_trial_step, copy.deepcopy(model).train(), split, images, settings.precision)
    with _one_thread():
        one = seconds_per_call(step, TRIAL_SECONDS, enough=FIRST_CALL if brief else 10 * SHORT_STEP)
    if not brief and one * settings.batch_size / images > SHORT_STEP:
        return settings, ""
    every = seconds_per_call(step, TRIAL_SECONDS, enough=max(FIRST_CALL, FAR_SLOWER * one))
    if every < CLEARLY * one:
        return settings, ""
    torch.set_num_threads(1)
    return replace(settings, threads=1), f"one thread is {every / one:.1f} times as fast as {count} now"


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _trial_step(model: nn.Module, split: Split, images: int, precision: str) -> None:
    """The computation of a training step on a CPU, without its update."""
    model.zero_grad()
    with autocast("cpu", precision):
        logits = model(to_float(split.images[:images]).contiguous(memory_format=torch.channels_last))
    F.cross_entropy(logits.float(), split.fine_labels[:images]).backward()


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16")


def seconds_per_call(function: Callable[[], object], budget: float, *, enough: float = math.inf) -> float:
    """The median time of the calls that fit into `budget` seconds: at least one, after a warm-up call.

    If the warm-up call takes more than `enough` seconds, its time is the result.
    """
    start = time.perf_counter()
    function()
    first = time.perf_counter() - start
    if first > enough:
        return first
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
        seconds = seconds_per_call(partial(step, precision), budget=0.15)
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
