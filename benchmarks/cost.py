"""Cost of each recipe on this machine: peak memory, training images per second, and where the time goes.

    python -m benchmarks.cost                    # all recipes, each in its own process
    python -m benchmarks.cost --recipe strong    # one recipe, in this process, as one line of JSON
    python -m benchmarks.cost --synthetic        # anywhere; needs a little less memory, as the dataset is smaller

Each recipe trains on 5,000 images for two epochs at each of its resolutions, and the second epoch is timed. It uses
the ordinary training loop, writes the ordinary files, and holds the whole dataset in memory. The memory is the GPU's on
a GPU, otherwise that of the whole process. What products (convolutions and matrix products) take of the forward and
backward passes comes from torch.profiler, for one batch at each resolution. Exits with 1 if a recipe needs more than
4 GiB on a CPU. Takes about three minutes on two CPU cores.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.profiler import profile

import train_cnn
import train_mlp
from common.command_line import Parser, exit_status
from common.errors import UserError
from common.text import machine_text
from models.layers import set_side
from training.distributed import ALONE
from training.hardware import autocast, choose_precision, machine_facts, prepare_device
from training.loop import loss_of, new_model, train
from training.run_folder import RunFolder
from training.settings import Script, Settings
from utils import default_data_dir, load_cifar100, to_float

SCRIPTS = {recipe: script for script in (train_mlp.SCRIPT, train_cnn.SCRIPT) for recipe in script.recipes}
EPOCHS_PER_SIDE = 2
IMAGES, VALIDATION_IMAGES = 5_000, 1_000  # one batch of validation images
MAX_CPU_MEMORY = 4 * 2**30  # bytes
PRODUCTS = ("conv", "addmm", "bmm", "::mm", "linear")  # in the names of convolutions and matrix products


def measure(script: Script, recipe: str, data_dir: str, *, synthetic: bool) -> dict[str, Any]:
    """The cost of a recipe, as one row of the table."""
    settings = prepare_device(script.recipe_settings(recipe, synthetic=synthetic))
    course = [settings.side_in(epoch) for epoch in range(settings.epochs)]
    sides = list(dict.fromkeys(course))
    train_split, val_split = load_cifar100(data_dir, use_synthetic=synthetic)
    short = replace(settings, epochs=EPOCHS_PER_SIDE * len(sides), checkpoint_every=0.1, refresh_norms=0)
    model = new_model(script, short, train_split)
    short, _ = choose_precision(model, train_split, short, ALONE)
    some = torch.arange(min(IMAGES, len(train_split)))
    seconds: dict[int | None, float] = {}
    in_optimizer: dict[int | None, float] = {}
    clock = 0.0

    def start(*_: Any) -> None:
        nonlocal clock
        clock -= time.perf_counter()

    def stop(*_: Any) -> None:
        nonlocal clock
        clock += time.perf_counter()

    def note(row: dict[str, Any], _: Any) -> None:  # a side's second epoch replaces its first
        nonlocal clock
        side = short.side_in(row["epoch"] - 1)
        seconds[side], in_optimizer[side], clock = row["seconds"], clock, 0.0

    hooks = register_optimizer_step_pre_hook(start), register_optimizer_step_post_hook(stop)
    with (tempfile.TemporaryDirectory() as folder,
          RunFolder.create(Path(folder), short, None, script, processes=1) as run):
        result = train(model, train_split[some], val_split[some[:VALIDATION_IMAGES]], run, quiet=True,
                       after_epoch=note)
    for hook in hooks:
        hook.remove()
    batch = train_split[some[:short.batch_size]]
    images, labels = to_float(batch.images).to(short.device), batch.fine_labels.to(short.device)
    passes = {side: time_in_passes(model, images, labels, side, short) for side in sides}
    products, everything = (sum(passes[side][part] for side in course) for part in (0, 1))
    return {"recipe": recipe, "parameters": result["parameters"], "batch_size": short.batch_size,
            "precision": short.precision, "device": short.device, "peak_memory_bytes": result["peak_memory_bytes"],
            "images_per_second": {str(side or "any"): len(some) / seconds[side] for side in sides},
            "mean_images_per_second": len(some) * len(course) / sum(seconds[side] for side in course),
            "optimizer_share": sum(in_optimizer[side] for side in course) / sum(seconds[side] for side in course),
            "product_share": products / everything}


def time_in_passes(model: nn.Module, images: Tensor, labels: Tensor, side: int | None, settings: Settings
                   ) -> tuple[float, float]:
    """The time that products take in a forward and backward pass, and the time of all operations, in microseconds."""
    set_side(model.train(), side)
    images = images.contiguous(memory_format=torch.channels_last)

    def forward_and_backward() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(images.device, settings.precision):
            logits = model(images)
        loss_of(settings)(logits.float(), labels).backward()

    forward_and_backward()  # warms up
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it prints when it starts and stops
    with profile() as profiler:
        forward_and_backward()
    clock = "self_cpu_time_total" if images.device.type == "cpu" else "self_device_time_total"
    times = [(event.key, getattr(event, clock)) for event in profiler.key_averages()
             if event.device_type == DeviceType.CPU]  # operators; a GPU's kernels are listed once more
    return sum(time for key, time in times if any(part in key for part in PRODUCTS)), sum(time for _, time in times)


def table(rows: list[dict[str, Any]]) -> str:
    """The costs as a Markdown table."""
    lines = ["| recipe | parameters | batch | images/s, by side | images/s | optimizer (% of time) "
             "| products (% of the passes) | peak GiB |", "|---|---:|---:|---|---:|---:|---:|---:|"]
    for row in rows:
        speeds = row["images_per_second"]
        by_side = ", ".join(f"{speed:,.0f} at {side}" for side, speed in speeds.items() if side != "any")
        memory = (row["peak_memory_bytes"] or math.nan) / 2**30  # NaN on a system that does not report it
        lines.append(f"| {row['recipe']} | {row['parameters'] / 1e6:.2f} M | {row['batch_size']} | {by_side} "
                     f"| {row['mean_images_per_second']:,.0f} | {100 * row['optimizer_share']:.0f} "
                     f"| {100 * row['product_share']:.0f} | {memory:.2f} |")
    return "\n".join(lines)


def measured_alone(recipe: str, data_dir: str, *, synthetic: bool) -> dict[str, Any]:
    """The row of a recipe, measured in its own process, so that no other recipe adds to its memory."""
    words = [sys.executable, "-m", "benchmarks.cost", "--recipe", recipe, "--data-dir", data_dir,
             *["--synthetic"] * synthetic]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"the recipe {recipe} could not be measured; its error is above")
    return json.loads(done.stdout)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.cost", description=__doc__)
    parser.add_argument("--recipe", choices=tuple(SCRIPTS), metavar="|".join(SCRIPTS),
                        help="measure only this recipe, in this process")
    parser.add_data_dir()
    parser.add_synthetic()
    options = parser.parse_args(argv)
    source = {"data_dir": options.data_dir or default_data_dir(), "synthetic": options.synthetic}
    if options.recipe:
        print(json.dumps(measure(SCRIPTS[options.recipe], options.recipe, **source)))
        return 0
    rows = [measured_alone(recipe, **source) for recipe in SCRIPTS]
    device = rows[0]["device"]
    print(f"{machine_text(machine_facts(device), rows[0]['precision'])}\n\n{table(rows)}")
    too_large = [row["recipe"] for row in rows if device == "cpu" and (row["peak_memory_bytes"] or 0) > MAX_CPU_MEMORY]
    if too_large:
        print(f"more than {MAX_CPU_MEMORY / 2**30:g} GiB: {', '.join(too_large)}", file=sys.stderr)
    return int(bool(too_large))


if __name__ == "__main__":
    sys.exit(exit_status(main))
