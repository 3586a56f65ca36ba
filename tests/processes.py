"""What the tests with real processes share: trainings that run beside the test, and are killed by it."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tests.helpers import ROOT

PATIENCE = 120.0  # seconds: far more than anything here takes, on a machine that is busy
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")


@contextlib.contextmanager
def started(*words: str, **options: object) -> Iterator[subprocess.Popen[str]]:
    """Python with these words on its command line, in the project's folder; killed at the end of the block."""
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.communicate()


def finished(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    """The same, waited for."""
    with started(*words, **options) as process:
        output, errors = process.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess(words, process.returncode, output, errors)


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> bool:
    """Whether it has happened before the process ended."""
    end = time.monotonic() + PATIENCE
    while process.poll() is None:
        if happened():
            return True
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.0005)
    return False


def lines_until_epoch(process: subprocess.Popen[str], epoch: int) -> None:
    """Read a training's output up to the line of this epoch."""
    for line in process.stdout:
        if line.startswith("epoch") and int(line.split()[1].split("/")[0]) >= epoch:
            return
    raise AssertionError(f"the training ended before epoch {epoch}: {process.stderr.read()}")


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The processes that torchrun has started, by rank."""
    ranks = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment = (folder / "environ").read_bytes()
            parent = re.search(r"PPid:\s*(\d+)", (folder / "status").read_text()).group(1)
            found = re.search(rb"(?:^|\0)RANK=(\d+)\0", environment)
            if found and int(parent) == process.pid:
                ranks[int(found.group(1))] = int(folder.name)
    return [ranks[rank] for rank in sorted(ranks)]


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(PATIENCE)


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The weights in float32 that a run ended with."""
    return torch.load(run / "checkpoint.pt", weights_only=True)["model"]
