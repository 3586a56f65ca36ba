"""Trainings in processes of their own, which a test can watch, signal and kill."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT

TIMEOUT = 120.0  # seconds: far more than anything here takes, even on a busy machine
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")
posix_only = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and limits")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc, /dev/full or capabilities")


@contextlib.contextmanager
def started(*words: str, **options: object) -> Iterator[subprocess.Popen[str]]:
    """Python with these words on its command line, in the project's folder; killed at the end of the block."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.communicate()


def finished(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    """The same process when it has ended."""
    with started(*words, **options) as process:
        output, errors = process.communicate(timeout=TIMEOUT)
    return subprocess.CompletedProcess(words, process.returncode, output, errors)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> bool:
    """Wait for `condition` while the process runs; returns whether it came true before the process ended."""
    end = time.monotonic() + TIMEOUT
    while process.poll() is None:
        if condition():
            return True
        assert time.monotonic() < end, "timed out"
        time.sleep(0.0005)
    return False


def read_until_epoch(process: subprocess.Popen[str], epoch: int) -> None:
    """Read a training's output up to the line of this epoch."""
    for line in process.stdout:
        if line.startswith("epoch") and int(line.split()[1].split("/")[0]) >= epoch:
            return
    raise AssertionError(f"the training ended before epoch {epoch}: {process.stderr.read()}")


def workers(process: subprocess.Popen[str]) -> list[int]:
    """Ids of the processes that a torchrun has started, by rank."""
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
    process.wait(TIMEOUT)
