"""What each recipe needs of this machine: its peak memory, and how many pictures it trains on in a second.

    python benchmarks/cost.py                    # the recipes meant for this machine, each in a process of its own
    python benchmarks/cost.py --recipe strong    # one of them, in this process, as a line of JSON
    python benchmarks/cost.py --synthetic        # anywhere; a little less memory, the data set being smaller

A recipe is trained on 5,000 pictures, two epochs at each of its resolutions, by the training's own loop with all that
it writes, beside the whole data set in memory as usual; of each resolution the second epoch is timed. On a GPU the
memory is the GPU's, else that of the whole process. Exits 1 if a recipe for the CPU needs more than 4 GiB. About three
minutes on two CPU cores.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is there, the project's is not

import train_cnn
import train_mlp
from engine import new_model, train
from hardware import choose_precision, machine_facts, prepare_device
from runs import Run
from settings import Parser, Script, exit_status
from utils import UserError, default_data_dir, load_cifar100

RECIPES = {"cpu": {"mlp": train_mlp.SCRIPT, "fast": train_cnn.SCRIPT, "strong": train_cnn.SCRIPT,
                   "original": train_cnn.SCRIPT},
           "cuda": {"sprint": train_cnn.SCRIPT, "best": train_cnn.SCRIPT}}  # what is meant for which device
EPOCHS_A_SIDE = 2
PICTURES, VALIDATION_PICTURES = 5_000, 1_000  # so many are validated at once
LIMIT = 4 * 2**30  # bytes of memory, for a recipe that is meant for a CPU


def measure(script: Script, recipe: str, data_dir: str, *, synthetic: bool) -> dict[str, Any]:
    """What the recipe needs, as one row of the table."""
    settings = prepare_device(script.recipe_settings(recipe, synthetic=synthetic))
    sides = list(dict.fromkeys(settings.side_in(epoch) for epoch in range(settings.epochs)))
    train_split, val_split = load_cifar100(data_dir, use_synthetic=synthetic)
    short = replace(settings, epochs=EPOCHS_A_SIDE * len(sides), checkpoint_every=0.1, refresh_norms=0)
    model = new_model(script, short, train_split, len(train_split.fine_names))
    short = choose_precision(model, train_split, short)
    some = torch.arange(min(PICTURES, len(train_split)))
    seconds: dict[int | None, float] = {}

    def note(row: dict[str, Any], _: Any) -> None:
        seconds[short.side_in(row["epoch"] - 1)] = row["seconds"]

    with tempfile.TemporaryDirectory() as folder, Run.create(Path(folder), short, None, "") as run:
        result = train(model, train_split[some], val_split[some[:VALIDATION_PICTURES]], run, quiet=True,
                       after_epoch=note)
    return {"recipe": recipe, "parameters": result["parameters"], "batch_size": short.batch_size,
            "precision": short.precision, "device": short.device, "peak_memory_bytes": result["peak_memory_bytes"],
            "images_per_second": {str(side or "any"): len(some) / seconds[side] for side in sides}}


def table(rows: list[dict[str, Any]]) -> str:
    """The costs as a Markdown table; a recipe spends as many epochs at one resolution as at another."""
    lines = ["| recipe | parameters | batch | images/s, by side | images/s | peak memory (GiB) |",
             "|---|---:|---:|---|---:|---:|"]
    for row in rows:
        speeds = row["images_per_second"]
        mean = len(speeds) / sum(1 / speed for speed in speeds.values())
        by_side = ", ".join(f"{speed:,.0f} at {side}" for side, speed in speeds.items() if side != "any")
        lines.append(f"| {row['recipe']} | {row['parameters'] / 1e6:.2f} M | {row['batch_size']} | {by_side} "
                     f"| {mean:,.0f} | {row['peak_memory_bytes'] / 2**30:.2f} |")
    return "\n".join(lines)


def measured_alone(recipe: str, data_dir: str, *, synthetic: bool) -> dict[str, Any]:
    """The row of a recipe, measured in a process of its own, whose memory is nobody else's."""
    words = [sys.executable, __file__, "--recipe", recipe, "--data-dir", data_dir, *["--synthetic"] * synthetic]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"the recipe {recipe} could not be measured; its error is above")
    return json.loads(done.stdout)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="benchmarks/cost.py", description=__doc__)
    scripts = {recipe: script for recipes in RECIPES.values() for recipe, script in recipes.items()}
    parser.add_argument("--recipe", choices=tuple(scripts), metavar="|".join(scripts), help="measure this one here")
    parser.add_argument("--synthetic", action="store_true", help="on procedurally drawn pictures")
    parser.add_argument("--data-dir", default=default_data_dir(), metavar="FOLDER", help="folder of the data set")
    options = parser.parse_args(argv)
    where = {"data_dir": options.data_dir, "synthetic": options.synthetic}
    if options.recipe:
        print(json.dumps(measure(scripts[options.recipe], options.recipe, **where)))
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [measured_alone(recipe, **where) for recipe in RECIPES[device]]
    facts, precision = machine_facts(device), rows[0]["precision"]
    print(f"{facts['processor']}, {facts['threads']} threads, {precision} "
          f"({facts[f'conv3x3_{precision}_gflops']:.0f} GFLOP/s in one 3x3 convolution)\n\n{table(rows)}")
    too_large = [row["recipe"] for row in rows if device == "cpu" and row["peak_memory_bytes"] > LIMIT]
    if too_large:
        print(f"more than {LIMIT / 2**30:g} GiB: {', '.join(too_large)}", file=sys.stderr)
    return int(bool(too_large))


if __name__ == "__main__":
    sys.exit(exit_status(main))
