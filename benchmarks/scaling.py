"""Speed and memory of a training by number of processes, batch size and width, on this machine.

    python -m benchmarks.scaling

Each measurement runs train_cnn.py for three epochs on the 5,000 procedurally drawn images, on the CPU. The faster of
the last two epochs counts. Takes about six minutes on two CPU cores.
"""

import csv
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common.command_line import Parser, exit_status
from common.errors import UserError
from common.files import ROOT, read_json
from training.hardware import machine_facts

IMAGES, EPOCHS = 5_000, 3
CORES = os.cpu_count() or 1
BATCHES = (64, 128, 256, 512, 1024)
INNER = {"32,128,384": "32,96,256", "64,256,768": "64,192,512", "128,512,1536": "128,384,1024"}  # by widths
SIDES = (16, 32)


def measure(processes: int, threads: int, *flags: str) -> tuple[float, float]:
    """Images per second, and peak memory per process in GiB, of a training with these flags.

    The memory is NaN on a system that does not report it.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    launcher = torchrun if processes > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, *launcher, "train_cnn.py", "--synthetic", "--device", "cpu", "--quiet", "--epochs",
                 str(EPOCHS), "--threads", str(threads), "--name", "run", "--results-dir", folder, *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"train_cnn.py {' '.join(flags)} failed: {done.stderr}")
        with open(Path(folder) / "run" / "metrics.csv", newline="") as file:
            seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
        memory = read_json(Path(folder) / "run" / "result.json")["peak_memory_bytes"] or math.nan
    return IMAGES / min(seconds[1:]), memory / 2**30


def table(heading: str, rows: dict[str, tuple[float, float]]) -> str:
    """A Markdown table of speed, its ratio to the first row's, and memory."""
    (first, _), *_ = rows.values()
    return "\n".join([f"| {heading} | images/s | ratio | peak memory per process (GiB) |", "|---|---:|---:|---:|",
                      *(f"| {name} | {speed:,.0f} | {speed / first:.2f} | {memory:.2f} |"
                        for name, (speed, memory) in rows.items())])


def main(argv: list[str] | None = None) -> int:
    Parser(prog="python -m benchmarks.scaling", description=__doc__).parse_args(argv)
    facts = machine_facts("cpu")
    precision = max(("float32", "bfloat16"), key=lambda name: facts[f"conv3x3_{name}_gflops"])
    print(f"{facts['processor']}, {CORES} cores, {precision} "
          f"({facts[f'conv3x3_{precision}_gflops']:.0f} GFLOP/s in one 3x3 convolution)", flush=True)
    plain = ("--precision", precision)
    rows = {f"{processes} x {threads}, {side} x {side} pixels":
            measure(processes, threads, *plain, "--sides", str(side))
            for side in SIDES for processes, threads in ((1, 1), (1, CORES), (CORES, 1))}
    for side in SIDES:
        of_side = {name: row for name, row in rows.items() if f" {side} x" in name}
        print("\n" + table("processes x threads", of_side), flush=True)
    small = (*plain, "--sides", "16")
    by_batch = {str(size): measure(1, CORES, *small, "--batch-size", str(size)) for size in BATCHES}
    print("\n" + table("--batch-size, 16 x 16 pixels", by_batch), flush=True)
    by_widths = {widths: measure(1, CORES, *small, "--widths", widths, "--inner", inner)
                 for widths, inner in INNER.items()}
    print("\n" + table("--widths, 16 x 16 pixels", by_widths), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
