"""The command line of a training script, derived from its settings."""

import argparse
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.command_line import Parser, absolute_path, expanded_path, integers
from common.errors import UserError
from common.files import RESULTS_DIR, read_json
from common.run_files import CHECKPOINTS, WEIGHTS, find_run, places, run_settings
from common.text import flops_text
from training.events import require_tensorboard
from training.losses import LOSSES
from training.settings import Script, Settings, flag_of, show, words_for


@dataclass(frozen=True)
class Options:
    """A parsed command line: the settings of a run, and how to run it.

    given: the settings that were on the command line, by name.
    seeds: one run each.
    results_dir: the folder of all runs.
    loss: the only loss besides cross-entropy that the overfit check tries; None for all.
    """

    settings: Settings
    given: dict[str, Any]
    seeds: tuple[int, ...]
    name: str | None = None
    resume: str | None = None
    results_dir: Path = RESULTS_DIR
    quiet: bool = False
    overfit_batch: bool = False
    loss: str | None = None


def parse_command_line(script: Script, argv: list[str] | None = None) -> Options:
    """Parse the command line of `script`.

    Raises UserError for a flag that is unknown, malformed, out of range, without effect, or in conflict with another.
    """
    values = vars(_make_parser(script).parse_args(argv))
    names = {f.name for f in dataclasses.fields(script.settings_class)}
    given = {name: value for name, value in values.items() if name in names}
    control = {name: value for name, value in values.items() if name not in names}
    overfit = script.overfit if control.get("overfit_batch") else {}
    recipe = given.get("recipe", next(iter(script.recipes)))
    settings = script.recipe_settings(recipe, **{**overfit, **given})
    if "seed" in given and "seeds" in control:
        raise UserError("--seeds and --seed cannot be used together")
    seeds = control.pop("seeds", (settings.seed,))
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"--seeds must be different integers of at least 0, not {show(seeds)}")
    settings = dataclasses.replace(settings, **_absolute_paths(settings, control["results_dir"]))
    given |= {name: getattr(settings, name) for name in given}
    for seed in seeds:
        dataclasses.replace(settings, seed=seed)  # refuse a bad seed now, not after the runs before it
    if settings.tensorboard:
        require_tensorboard()
    options = Options(settings=settings, given=given, seeds=seeds, **control)
    _refuse_without_effect(options)
    if settings.init_from and not settings.train_on_all and saw_validation_images(Path(settings.init_from)):
        raise UserError(f"{settings.init_from} was trained on the validation images too: add --train-on-all")
    return options


def _absolute_paths(settings: Settings, results_dir: Path) -> dict[str, Any]:
    """The settings that name files, as a run started in another folder needs them.

    Raises UserError if the weights to start from are missing.
    """
    paths: dict[str, Any] = {}
    if settings.data_dir or (os.environ.get("CIFAR100_DIR") and not settings.synthetic):
        paths["data_dir"] = str(absolute_path(settings.data_folder))
    if settings.init_from:
        name = str(expanded_path(settings.init_from))
        files = (path for path in places(name, results_dir)
                 if path.suffix == ".safetensors" and path.name not in CHECKPOINTS and os.path.isfile(path))
        file = next(files, None) or find_run(name, results_dir) / WEIGHTS
        if not os.path.isfile(file):
            raise UserError(f"--init-from {settings.init_from}: {file} is missing; is that run finished?")
        paths["init_from"] = str(file)
    return paths


def saw_validation_images(weights: Path) -> bool:
    """Whether a weights file, or one that its training started from, is of a run that was trained on all images.

    The config.json next to it says so; without one, it is taken on trust.
    """
    seen = set()
    while weights not in seen:
        seen.add(weights)
        settings = run_settings(weights.parent)
        if settings.get("train_on_all"):
            return True
        weights = Path(str(settings.get("init_from") or weights))
    return False


def _make_parser(script: Script) -> argparse.ArgumentParser:
    """A parser that returns only the flags that were given, so that defaults override nothing."""
    parser = Parser(prog=script.file, description=script.description, epilog=_recipes_text(script),
                    argument_default=argparse.SUPPRESS)
    defaults = script.recipe_settings(next(iter(script.recipes)))
    group = parser.add_argument_group("settings")
    for f in dataclasses.fields(defaults):
        value = getattr(defaults, f.name)
        default = f" (default: {show(value)})" if value not in ("", ()) else ""
        options: dict[str, Any] = {"help": f.metadata["help"] + default}
        choices = tuple(script.recipes) if f.name == "recipe" else f.metadata["choices"]
        if isinstance(value, bool):
            options |= {"action": argparse.BooleanOptionalAction}
        elif choices:
            options |= {"choices": choices, "metavar": "|".join(choices)}
        elif isinstance(value, tuple):
            options |= {"type": integers, "metavar": "N,N,..."}
        else:
            options |= {"type": type(value), "metavar": {int: "N", float: "X", str: "PATH"}[type(value)]}
        group.add_argument(flag_of(f.name), **options)
    parser.add_results_dir()
    parser.add_argument("--quiet", action="store_true", help="no progress, only one line per epoch")
    parser.add_argument("--loss", choices=LOSSES, metavar="|".join(LOSSES),
                        help="with --overfit-batch: try only this loss besides cross-entropy (default: all of them)")
    one_of = parser.add_argument_group("runs, at most one of these").add_mutually_exclusive_group()
    one_of.add_argument("--name", help="name of the run (default: <recipe>-s<seed>, then with -2, -3, ... appended)")
    one_of.add_argument("--seeds", type=integers, metavar="N,N,...", help="train one run per seed, one after the other")
    one_of.add_argument("--resume", metavar="NAME", help="resume this run from its last checkpoint")
    one_of.add_argument("--overfit-batch", action="store_true",
                        help="do not train a run: check that the network can memorize one batch")
    return parser


def _recipes_text(script: Script) -> str:
    """The accuracy and cost of each recipe, where results/results.json (written by `evaluate.py`) has them."""
    try:
        measured = {row["recipe"]: _cost_text(row) for row in read_json(RESULTS_DIR / "results.json")}
    except (UserError, TypeError, LookupError, ArithmeticError, ValueError):  # missing, or edited
        measured = {}
    return "\n".join(["recipes, trained on all 50,000 images:",
                      *(f"  {recipe:<10} {measured.get(recipe, 'not measured')}" for recipe in script.recipes)])


def _cost_text(row: dict[str, Any]) -> str:
    seconds, machine = sum(row["train_seconds"]) / len(row["train_seconds"]), row["machines"][0]
    return (f"{row['top1']['mean']:.1f}% on the test set for {flops_text(row['train_flops'])} FLOPs, "
            f"{seconds / 60:.1f} min on {machine['processor']}, {row['precision']}")


def _refuse_without_effect(options: Options) -> None:
    """Raise UserError if another flag or setting keeps a given flag from having any effect."""
    if options.resume and options.settings.init_from:
        raise UserError("--init-from has no effect with --resume, which takes the run's own weights: use one of them")
    if options.loss and not options.overfit_batch:
        raise UserError("--loss has no effect without --overfit-batch")
    if {"average", "refresh_norms"} & options.given.keys() and not (options.overfit_batch or options.resume) and (
            options.settings.average and not options.settings.refresh_norms):
        raise UserError("averaged weights need new statistics of batch norm: give --refresh-norms above 0, or "
                        "--average 0")
    for f in dataclasses.fields(options.settings):
        if not options.given.get(f.name):
            continue
        if options.overfit_batch and not f.metadata["one_batch"]:
            raise UserError(f"{flag_of(f.name)} has no effect with --overfit-batch, "
                            "which repeats one unchanged batch")
        for other, values in {} if options.resume else f.metadata["needs"].items():  # a resumed run has its own
            value = getattr(options.settings, other)
            if value not in values:
                raise UserError(f"{flag_of(f.name)} has no effect with {' '.join(words_for(other, value))}")
