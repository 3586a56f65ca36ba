"""What a training is told, and the command line that says it.

A flag is written once, as a field of a dataclass: the command line, `config.json` and `--resume` are made from that.
"""

import argparse
import dataclasses
import io
import json
import math
import operator
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from models import WeightsError
from parallel import launched, leave
from utils import PICTURES, Augmentation, UserError, default_data_dir

ROOT = Path(__file__).resolve().parent
RESULTS_DIR = ROOT / "results"


LARGEST_RATE = 1e30  # times all that it is multiplied by, still a float32
LEAST_ALPHA = 1e-6  # of MixUp: below, no batch is mixed, and in the end float32 takes it for 0
MOST_NUMBERS = 100  # of a setting that takes several
_BOUNDS = (("low", "at least", operator.lt), ("above", "above", operator.le), ("high", "at most", operator.gt))


def setting(default: Any, help: str, *, low: float | None = None, above: float | None = None,
            high: float | None = None, choices: tuple[str, ...] | None = None, resumable: bool = False,
            machine: bool = False, one_batch: bool = True, needs: dict[str, tuple[Any, ...]] | None = None) -> Any:
    """A field of Settings, with all that the command line says of it. `low` and `high` are included, `above` is not.

    resumable: may differ when a run is resumed, since it does not change what the run computes; machine: is about the
    machine and no part of a recipe; one_batch: means something to the single-batch overfit check; needs: other
    settings, and those of their values with which this one means something.
    """
    limits = {"low": low, "above": above, "high": high, "choices": choices}
    roles = {"resumable": resumable, "machine": machine, "one_batch": one_batch, "needs": needs or {}}
    return field(default=default, metadata={"help": help, **limits, **roles})


@dataclass(kw_only=True)
class Settings:
    """What a training of either script is told; a script's own dataclass adds its model's arguments.

    The command line, `config.json` and `--resume` are all made from these fields.
    """

    recipe: str = setting("", "the named settings to start from; every other flag overrides one of them")

    epochs: int = setting(10, "passes over the training pictures", low=1, high=1_000_000)
    batch_size: int = setting(500, "pictures a step", low=2, high=PICTURES["train"])
    optimizer: str = setting("adamw", "the optimizer; muon is for hidden weights, with AdamW or SGD for the rest",
                             choices=("adam", "adamw", "sgd", "muon", "muon-sgd"))
    lr: float = setting(1e-3, "peak learning rate", above=0, high=LARGEST_RATE)
    other_lr: float = setting(1e-3, "peak learning rate of what Muon leaves to AdamW or SGD", above=0,
                              high=LARGEST_RATE, needs={"optimizer": ("muon", "muon-sgd")})
    momentum: float = setting(0.9, "momentum of SGD (plain) and of Muon (Nesterov's)", low=0, high=0.999,
                              needs={"optimizer": ("sgd", "muon", "muon-sgd")})
    weight_decay: float = setting(0.0, "weight decay, on weight matrices and filters only; muon-sgd fixes the norms of "
                                       "filters instead", low=0, high=1_000_000)
    warmup: float = setting(0.0, "share of all steps over which the learning rate rises from zero", low=0, high=1)
    schedule: str = setting("linear", "how the learning rate falls to zero after that",
                            choices=("constant", "linear", "cosine"))
    label_smoothing: float = setting(0.0, "label smoothing", low=0, high=1, one_batch=False)

    flip: bool = setting(True, "flip training pictures at random", one_batch=False)
    alternate: bool = setting(False, "flip each picture in every second epoch instead", one_batch=False,
                              needs={"flip": (True,)})
    crop: int = setting(0, "shift training pictures at random by up to so many pixels, reflected at the edges",
                        low=0, high=31, one_batch=False)
    cutout: int = setting(0, "side of the square cut out of training pictures, in pixels", low=0, high=32,
                          one_batch=False)
    jitter: float = setting(0.0, "change brightness and contrast of training pictures by up to this share", low=0,
                            high=1, one_batch=False)
    mixup: float = setting(0.0, "MixUp: alpha of the Beta distribution of a batch's mixing share; 0 for none", low=0,
                           high=1_000_000, one_batch=False)

    refresh_norms: int = setting(0, "training pictures on which batch norms' statistics are taken anew at the end; 0 "
                                 "leaves their running means", low=0, one_batch=False)

    seed: int = setting(0, "decides initial weights, order, augmentation and dropout", low=0, high=2**63 - 1)
    train_on_all: bool = setting(False, "train on all 50,000 training pictures, the held-out 5,000 included")
    synthetic: bool = setting(False, "use procedurally drawn pictures: no data set, no network, no meaning")
    precision: str = setting("auto", "arithmetic of the training steps; auto times both on a CPU",
                             choices=("auto", "float32", "bfloat16"), machine=True, one_batch=False)
    compile: bool = setting(False, "torch.compile the network first: slow to start, for long trainings on a GPU",
                            machine=True, one_batch=False)
    device: str = setting("auto", "where to train", choices=("auto", "cpu", "cuda", "mps"), machine=True)
    threads: int = setting(0, "CPU threads; 0 leaves it to PyTorch", low=0, high=1024, machine=True)
    data_dir: str = setting("", "folder of the data set (default: $CIFAR100_DIR, else data/)", resumable=True,
                            machine=True)
    checkpoint_every: float = setting(2.0, "minutes between checkpoints", low=0, resumable=True, machine=True,
                                      one_batch=False)

    def __post_init__(self) -> None:
        for name, value, limits in ((f.name, getattr(self, f.name), f.metadata) for f in dataclasses.fields(self)):
            flag, numbers = flag_of(name), value if isinstance(value, tuple) else (value,)
            if len(numbers) > MOST_NUMBERS:
                raise UserError(f"{flag} takes at most {MOST_NUMBERS} numbers, not {len(numbers):,}")
            if any(isinstance(n, float) and not math.isfinite(n) for n in numbers):
                raise UserError(f"{flag} must be a finite number, not {show(value)}")
            for bound, words, breaks in _BOUNDS:
                limit = limits[bound]
                if limit is not None and any(breaks(n, limit) for n in numbers):
                    raise UserError(f"{flag} must be {words} {show(limit)}, not {show(value)}")
            if limits["choices"] and value not in limits["choices"]:
                raise UserError(f"{flag} must be one of {', '.join(limits['choices'])}, not {value}")
        if 0 < self.mixup < LEAST_ALPHA:
            raise UserError(f"--mixup must be 0 or at least {LEAST_ALPHA:g}, not {show(self.mixup)}")

    @property
    def augmentation(self) -> Augmentation:
        return Augmentation(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Augmentation)})

    def side_in(self, epoch: int) -> int | None:
        """Pixels a side that pictures are scaled to in this epoch; None if the network alone decides."""
        return None

    @property
    def pictures(self) -> str:
        """What it is trained on, in words."""
        return "SYNTHETIC pictures (which say nothing about CIFAR-100)" if self.synthetic else "CIFAR-100 pictures"

    @property
    def data_folder(self) -> str:
        return self.data_dir or default_data_dir()

    @classmethod
    def from_config(cls, values: dict[str, Any]) -> "Settings":
        """From `config.json`, where tuples have become lists; UserError if they are not this class's settings."""
        defaults = {f.name: f.default for f in dataclasses.fields(cls)}
        restored = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        odd = set(restored) ^ set(defaults) or {
            name for name, value in restored.items()
            if not (type(value) is type(defaults[name]) or (type(value) is int and type(defaults[name]) is float))
            or (isinstance(value, tuple) and any(type(number) is not int for number in value))}
        if odd:
            raise UserError(f"the run's config.json does not fit this version's settings: {', '.join(sorted(odd))}")
        return cls(**restored)


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def show(value: Any) -> str:
    """A setting's value as one writes it on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)


def words_for(name: str, value: Any) -> list[str]:
    """What gives a setting this value on the command line."""
    return [flag_of(name if value else "no_" + name)] if isinstance(value, bool) else [flag_of(name), show(value)]


@dataclass(frozen=True)
class Script:
    """What a training script declares of itself.

    file: its name; description: its docstring; recipes: named settings, the first of them the default; overfit: the
    settings that `--overfit-batch` replaces; build_model(settings, num_outputs): its network with random weights.
    """

    file: str
    description: str
    settings_class: type[Settings]
    recipes: dict[str, dict[str, Any]]
    overfit: dict[str, Any]
    build_model: Callable[[Any, int], nn.Module]

    def recipe_settings(self, recipe: str, /, **changes: Any) -> Settings:
        return self.settings_class(**{"recipe": recipe, **self.recipes[recipe], **changes})

    def started(self, processes: int) -> str:
        """What starts it in so many processes."""
        return f"python {self.file}" if processes == 1 else f"torchrun --nproc_per_node={processes} {self.file}"

    def command_for(self, settings: Settings, processes: int = 1) -> str:
        """The shortest command line that trains with `settings`, without the machine's and with the seed named."""
        start = self.recipe_settings(settings.recipe)
        words = [] if settings.recipe == next(iter(self.recipes)) else ["--recipe", settings.recipe]
        for f in dataclasses.fields(settings):
            value = getattr(settings, f.name)
            if f.metadata["machine"] or f.name in ("seed", "recipe") or value == getattr(start, f.name):
                continue
            words += words_for(f.name, value)
        return shlex.join([*self.started(processes).split(), *words, "--seed", str(settings.seed)])


@dataclass(frozen=True)
class Command:
    """A parsed command line: the settings, and what it says about runs rather than about training."""

    script: Script
    settings: Settings
    given: dict[str, Any]  # the settings that were named on the command line
    seeds: tuple[int, ...]
    name: str | None
    resume: str | None
    results_dir: Path
    quiet: bool
    overfit_batch: bool
    loss: str | None

    def next_command(self, command: str) -> str:
        """`command` with the folder of the runs named, if that is not the usual one."""
        where = [] if self.results_dir.resolve() == RESULTS_DIR else ["--results-dir", str(self.results_dir)]
        return shlex.join([*command.split(), *where])


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line, and whose help keeps a docstring's lines as they are."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As ever; also raises UserError for a word that is empty, as a variable that is not set leaves it, or that no
        path can hold: a folder called "" would be the current one.
        """
        for word in sys.argv[1:] if args is None else args:
            flag, equals, value = word.partition("=") if word.startswith("--") else ("", "=", word)
            if equals and (not value or "\0" in value or (flag and value == "--")):
                self.error(f"{flag or 'an argument'} is {value!r}, which is nothing: give a value")
        if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may hold bytes that are no text
            sys.stdout.reconfigure(errors="backslashreplace")
        return super().parse_args(args, namespace)

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file, flush=True)  # argparse's own keeps a full disk to itself

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message if len(message) < 400 else message[:400] + ' ...'} (see --help)")


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 0,1,2") from None


def parse_command_line(script: Script, losses: tuple[str, ...], argv: list[str] | None = None) -> Command:
    """Read the command line of `script`; `losses` are the readings that its overfit check knows.

    Raises UserError for a flag that is unknown, malformed, out of range or contradicts another.
    """
    given = vars(_make_parser(script, losses).parse_args(argv))
    control = {name: given.pop(name, default) for name, default in (
        ("name", None), ("seeds", None), ("resume", None), ("results_dir", RESULTS_DIR), ("quiet", False),
        ("overfit_batch", False), ("loss", None))}
    _refuse_contradictions(script, {**given, **control})
    recipe = given.get("recipe", next(iter(script.recipes)))
    settings = script.recipe_settings(recipe, **{**(script.overfit if control["overfit_batch"] else {}), **given})
    seeds = control.pop("seeds") or (settings.seed,)
    for seed in seeds:
        dataclasses.replace(settings, seed=seed)  # complains of it now, not after the runs of the others
    if control["resume"] is None:  # a run that is resumed has its own settings
        _refuse_idle(settings, given)
    return Command(script=script, settings=settings, seeds=seeds, given=given, **control)


def _make_parser(script: Script, losses: tuple[str, ...]) -> argparse.ArgumentParser:
    """A parser that reports only the flags that were given: a default is not an opinion."""
    parser = Parser(prog=script.file, description=script.description, epilog=_recipes_in_words(script),
                    argument_default=argparse.SUPPRESS)
    defaults = script.recipe_settings(next(iter(script.recipes)))
    group = parser.add_argument_group("settings")
    for f in dataclasses.fields(defaults):
        value = getattr(defaults, f.name)
        options: dict[str, Any] = {"help": f.metadata["help"] + (f" (default: {show(value)})" if value != "" else "")}
        choices = tuple(script.recipes) if f.name == "recipe" else f.metadata["choices"]
        if isinstance(value, bool):
            options |= {"action": argparse.BooleanOptionalAction}
        elif choices:
            options |= {"choices": choices, "metavar": "|".join(choices)}
        elif isinstance(value, tuple):
            options |= {"type": _integers, "metavar": "N,N,..."}
        else:
            options |= {"type": type(value), "metavar": {int: "N", float: "X", str: "FOLDER"}[type(value)]}
        group.add_argument(flag_of(f.name), **options)
    group = parser.add_argument_group("runs")
    group.add_argument("--name", help="name of the run (default: <recipe>-s<seed>, then with -2, -3, ... appended)")
    group.add_argument("--seeds", type=_integers, metavar="N,N,...", help="train one run a seed, one after the other")
    group.add_argument("--resume", metavar="NAME", help="go on with this run where its last checkpoint stands")
    group.add_argument("--results-dir", type=Path, metavar="FOLDER", help="folder of all runs (default: results/)")
    group.add_argument("--quiet", action="store_true", help="no progress bar, only one line an epoch")
    group = parser.add_argument_group("the single-batch overfit check")
    group.add_argument("--overfit-batch", action="store_true", help="train on one batch until it is memorised")
    group.add_argument("--loss", choices=losses, metavar="|".join(losses),
                       help="beside plain cross-entropy try only this loss (default: all of them)")
    return parser


def _recipes_in_words(script: Script) -> str:
    """What each recipe reaches and costs, as far as results/results.json, which `evaluate.py` writes, knows it."""
    try:
        rows = json.loads((RESULTS_DIR / "results.json").read_text())
        measured = {row["recipe"]: _cost_in_words(row) for row in rows}
    except (OSError, ValueError, TypeError, LookupError, ArithmeticError):  # it is not there, or was edited
        measured = {}
    return "\n".join(["recipes, trained on all 50,000 pictures:",
                      *(f"  {recipe:<10} {measured.get(recipe, 'not measured')}" for recipe in script.recipes)])


def _cost_in_words(row: dict[str, Any]) -> str:
    seconds, machine = sum(row["train_seconds"]) / len(row["train_seconds"]), row["machines"][0]
    flops = f"{row['train_flops']:.1e}".replace("e+", "e")
    return (f"{row['top1']['mean']:.1f}% on the test set for {flops} FLOPs, "
            f"{seconds / 60:.1f} min on {machine['processor']}, {row['precision']}")


def _refuse_contradictions(script: Script, values: dict[str, Any]) -> None:
    pairs = (("seeds", "seed"), ("seeds", "resume"), ("seeds", "name"), ("seeds", "overfit_batch"), ("resume", "name"),
             ("resume", "overfit_batch"), ("name", "overfit_batch"))
    for a, b in pairs:
        if all(values.get(flag) is not None and values[flag] is not False for flag in (a, b)):
            raise UserError(f"{flag_of(a)} and {flag_of(b)} contradict each other: give one of them")
    for f in dataclasses.fields(script.settings_class):
        if values["overfit_batch"] and values.get(f.name) and not f.metadata["one_batch"]:
            raise UserError(f"{flag_of(f.name)} means nothing with --overfit-batch, which trains on one batch as it is")
    if values["loss"] and not values["overfit_batch"]:
        raise UserError("--loss belongs to --overfit-batch: give both or neither")
    seeds = values["seeds"]
    if seeds and (len(set(seeds)) < len(seeds) or min(seeds) < 0):
        raise UserError(f"--seeds must be different whole numbers, none below 0, not {show(seeds)}")


def _refuse_idle(settings: Settings, given: dict[str, Any]) -> None:
    """Raise UserError if a flag that was given asks for something that the other settings leave unused."""
    for f in dataclasses.fields(settings):
        for other, values in f.metadata["needs"].items():
            value = getattr(settings, other)
            if given.get(f.name) and value not in values:
                raise UserError(f"{flag_of(f.name)} means nothing with {' '.join(words_for(other, value))}: "
                                "change one of them")


def exit_status(main: Callable[[], int]) -> int:
    """Run a script's `main`; what a user can put right becomes one line on stderr and the exit status 2.

    Returns the exit status, or ends the process with it if that is one of several (`parallel.leave`).
    """
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by the shell, as with >&-
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115 (as long as the process lasts)
    return leave(_explained(main))


def _explained(main: Callable[[], int]) -> int:
    try:
        status = main()
        print(end="", flush=True)  # now, while a full disk or a closed pipe can be told of
        return status
    except (UserError, WeightsError) as error:
        message = str(error)
    except BrokenPipeError:  # whoever read the output has enough of it, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes what is left when it ends
        return 128 + signal.SIGPIPE
    except OSError as error:
        advice = "" if isinstance(error, FileNotFoundError) else "; is the disk full or the folder read-only?"
        message = f"{error.filename or 'a file'}: {error.strerror or error}{advice}"
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        message = "the device ran out of memory: try a smaller --batch-size"
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    processes = launched()
    who = "error" if processes.is_first else f"error in process {processes.rank} of {processes.count}"
    print(f"{who}: " + " ".join(message.split()), file=sys.stderr)
    return 2
