"""How the speed of a training and its memory change with processes, batch size and width, on this machine.

    python benchmarks/scaling.py

Real trainings of three epochs on the 5,000 procedurally drawn pictures, on the CPU: the command itself, in processes of
its own. Of each the fastest epoch but the first counts. About six minutes on two CPU cores.
"""

import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is there, the project's is not

from hardware import machine_facts
from runs import read_json
from settings import ROOT, Parser, exit_status
from utils import UserError

PICTURES, EPOCHS = 5_000, 3
CORES = os.cpu_count() or 1
BATCHES = (50, 125, 250, 500, 1000)
WIDTHS = ("32,96,192", "64,192,384", "128,384,768")  # half and twice the recipe's
SIDES = (16, 32)


def measure(processes: int, threads: int, *flags: str) -> tuple[float, float]:
    """images/s, and GiB of peak memory of a process, of a training with these flags."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, *launcher, "train_cnn.py", "--synthetic", "--device", "cpu", "--quiet", "--epochs",
                 str(EPOCHS), "--threads", str(threads), "--name", "run", "--results-dir", folder, *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"train_cnn.py {' '.join(flags)} failed: {done.stderr}")
        with open(Path(folder) / "run" / "metrics.csv", newline="") as file:
            seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
        memory = read_json(Path(folder) / "run" / "result.json")["peak_memory_bytes"]
    return PICTURES / min(seconds[1:]), memory / 2**30


def table(heading: str, rows: dict[str, tuple[float, float]]) -> str:
    """A Markdown table of speeds, the ratio to the first row's, and memory."""
    (first, _), *_ = rows.values()
    return "\n".join([f"| {heading} | images/s | ratio | peak memory of a process (GiB) |", "|---|---:|---:|---:|",
                      *(f"| {name} | {speed:,.0f} | {speed / first:.2f} | {memory:.2f} |"
                        for name, (speed, memory) in rows.items())])


def main(argv: list[str] | None = None) -> int:
    Parser(prog="benchmarks/scaling.py", description=__doc__).parse_args(argv)
    facts = machine_facts("cpu")
    precision = max(("float32", "bfloat16"), key=lambda name: facts[f"conv3x3_{name}_gflops"])
    print(f"{facts['processor']}, {CORES} cores, {precision} "
          f"({facts[f'conv3x3_{precision}_gflops']:.0f} GFLOP/s in one 3x3 convolution)", flush=True)
    plain = ("--precision", precision)
    rows = {f"{processes} x {threads}, {side} x {side} pixels":
            measure(processes, threads, *plain, "--sides", str(side))
            for side in SIDES for processes, threads in ((1, 1), (1, CORES), (CORES, 1))}
    for side in SIDES:
        print("\n" + table("processes x threads", {name: row for name, row in rows.items() if f" {side} x" in name}),
              flush=True)
    for flag, values in (("--batch-size", BATCHES), ("--widths", WIDTHS)):
        print("\n" + table(f"{flag}, 16 x 16 pixels", {
            str(value): measure(1, CORES, *plain, "--sides", "16", flag, str(value)) for value in values}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
