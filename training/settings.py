"""Settings of a training run. Each is declared once, as a dataclass field with its range and help.

The command line (`training.flags`), `config.json` and `--resume` are all derived from these fields.
"""

import dataclasses
import math
import operator
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

from torch import nn

from common.errors import UserError
from utils import NUM_IMAGES, Augmentation, default_data_dir

MAX_RATE = 1e30  # a learning rate
MIN_MIXUP = 1e-6  # below this alpha, no batch is mixed
CUTMIX_SHARE = 0.7  # of the training, from its start; then images are whole again (s20c in docs/experiments.md)
MAX_NUMBERS = 100  # in a setting that is a list
# Settings that change training images, turned off.
NO_AUGMENTATION: dict[str, Any] = dict(flip=False, crop=0, jitter=0.0, corrupt=0.0, mixup=0.0, cutmix=0.0)
_BOUNDS = (("low", "at least", operator.lt), ("above", "above", operator.le), ("high", "at most", operator.gt))


def setting(default: Any, help: str, *, low: float | None = None, above: float | None = None,
            high: float | None = None, choices: tuple[str, ...] | None = None, resumable: bool = False,
            machine: bool = False, one_batch: bool = True, needs: dict[str, tuple[Any, ...]] | None = None) -> Any:
    """A field of Settings. The bounds `low` and `high` are inclusive, `above` is exclusive.

    resumable: may change when a run is resumed, because it affects at most the last bits of the result.
    machine: describes the machine and is not part of a recipe.
    one_batch: has an effect on the single-batch overfit check.
    needs: the values of other settings with which this one has an effect.
    """
    limits = {"low": low, "above": above, "high": high, "choices": choices}
    roles = {"resumable": resumable, "machine": machine, "one_batch": one_batch, "needs": needs or {}}
    return field(default=default, metadata={"help": help, **limits, **roles})


@dataclass(kw_only=True)
class Settings:
    """Settings that both training scripts share; each adds its model's arguments in a subclass."""

    recipe: str = setting("", "named settings to start from; any other flag overrides one of them")

    # Length and optimizer.
    epochs: int = setting(10, "passes over the training set", low=1, high=50_000)
    batch_size: int = setting(500, "images per step", low=2, high=NUM_IMAGES["train"])
    optimizer: str = setting("adamw", "optimizer; muon updates the hidden weights only, and AdamW (SGD with muon-sgd "
                             "and normuon-sgd) the rest",
                             choices=("adam", "adamw", "sgd", "muon", "muon-sgd", "normuon-sgd"))
    lr: float = setting(1e-3, "peak learning rate", above=0, high=MAX_RATE)
    other_lr: float = setting(1e-3, "peak learning rate of the AdamW or SGD next to Muon", above=0,
                              high=MAX_RATE, needs={"optimizer": ("muon", "muon-sgd", "normuon-sgd")})
    momentum: float = setting(0.9, "momentum of SGD (plain) and of Muon (Nesterov)", low=0, high=0.999,
                              needs={"optimizer": ("sgd", "muon", "muon-sgd", "normuon-sgd")})
    weight_decay: float = setting(0.0, "weight decay of weight matrices and filters; with SGD next to it, Muon "
                                  "fixes the norms of its filters instead", low=0, high=1_000_000)
    warmup: float = setting(0.0, "fraction of all steps over which the learning rate rises from zero", low=0,
                            high=1)
    schedule: str = setting("linear", "how the learning rate falls after the warmup",
                            choices=("constant", "linear", "cosine"))
    lr_floor: float = setting(0.0, "fraction of its peak below which the learning rate does not fall", low=0, high=1,
                              needs={"schedule": ("linear", "cosine")})
    average: float = setting(0.0, "end with the running mean of the weights, with this decay per step, and with "
                             "--refresh-norms; 0 ends with the last weights", low=0, high=0.9999, one_batch=False)
    refresh_norms: int = setting(0, "recompute batch norm's statistics at the end from N training images; 0 keeps "
                                 "the running statistics", low=0, one_batch=False)
    label_smoothing: float = setting(0.0, "label smoothing", low=0, high=1, one_batch=False)

    # Augmentation of training images.
    flip: bool = setting(True, "flip training images at random", one_batch=False)
    alternate: bool = setting(False, "flip each image every other epoch instead of at random",
                              one_batch=False, needs={"flip": (True,)})
    crop: int = setting(0, "shift training images at random by up to N pixels, reflected at the edges",
                        low=0, high=31, one_batch=False)
    jitter: float = setting(0.0, "change brightness and contrast of training images by up to this fraction",
                            low=0, high=1, one_batch=False)
    corrupt: float = setting(0.0, "make this fraction of training images noisy, coarse or blurred", low=0, high=1,
                             one_batch=False)
    mixup: float = setting(0.0, "alpha of MixUp's Beta distribution; 0 turns MixUp off", low=0,
                           high=1_000_000, one_batch=False)
    cutmix: float = setting(0.0, "mix this fraction of batches by CutMix, in the first "
                            f"{100 * CUTMIX_SHARE:g}%% of the steps; not together with MixUp",
                            low=0, high=1, one_batch=False)

    # Data and seed.
    seed: int = setting(0, "seed of initial weights, image order, augmentation and dropout", low=0,
                        high=2**63 - 1)
    init_from: str = setting("", "start a new run from the weights of this finished run or weights file; if "
                             "they were trained on all images, add --train-on-all (not checked for a file without a "
                             "config.json next to it)",
                             resumable=True, one_batch=False)  # a checkpoint has its own weights
    train_on_all: bool = setting(False, "train on all 50,000 training images, including the validation set")
    synthetic: bool = setting(False, "use procedurally drawn images instead of CIFAR-100")

    # This machine. None of these is part of a recipe.
    precision: str = setting("auto", "arithmetic of the training steps; on a CPU, auto takes the faster one",
                             choices=("auto", "float32", "bfloat16"), machine=True, one_batch=False)
    compile: bool = setting(False, "torch.compile the network first: slow to start, for long runs on a GPU",
                            resumable=True, machine=True, one_batch=False)
    device: str = setting("auto", "where to train", choices=("auto", "cpu", "cuda", "mps"), resumable=True,
                          machine=True)
    threads: int = setting(0, "CPU threads; 0 takes all cores, or one thread where steps are short and one is "
                           "faster", low=0, high=1024, resumable=True, machine=True)
    data_dir: str = setting("", "folder of the dataset (default: $CIFAR100_DIR, else data/)", resumable=True,
                            machine=True)
    checkpoint_every: float = setting(2.0, "minutes between checkpoints", low=0, resumable=True, machine=True,
                                      one_batch=False)

    tensorboard: bool = setting(False, "also write metrics.csv for TensorBoard, into the run's folder", resumable=True,
                                machine=True, one_batch=False)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            _check(flag_of(f.name), getattr(self, f.name), f.metadata)
        if 0 < self.mixup < MIN_MIXUP:
            raise UserError(f"--mixup must be 0 or at least {MIN_MIXUP:g}, not {show(self.mixup)}")
        if self.mixup and self.cutmix:
            raise UserError("MixUp and CutMix cannot be used together: give --mixup 0 or --cutmix 0")

    @property
    def augmentation(self) -> Augmentation:
        return Augmentation(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Augmentation)})

    @property
    def augments(self) -> bool:
        """Whether training images are changed before they enter the network."""
        return any(getattr(self, name) for name in NO_AUGMENTATION)

    def fraction_done(self, epoch: int, step: int, steps: int) -> float:
        """How much of the training is over before a step of an epoch of `steps` steps, from 0 to 1."""
        return (epoch * steps + step) / (steps * self.epochs)

    def side_in(self, epoch: int) -> int | None:
        """The side, in pixels, to which images are scaled in this epoch; None if the network fixes it."""
        return None

    @property
    def dataset(self) -> str:
        """The training images, as messages call them."""
        return "SYNTHETIC images (not CIFAR-100)" if self.synthetic else "CIFAR-100 images"

    @property
    def data_folder(self) -> str:
        return self.data_dir or default_data_dir()

    @classmethod
    def from_config(cls, values: dict[str, Any]) -> Self:
        """The settings in a `config.json`, which has lists for tuples. Raises UserError if they do not fit.

        An older file may lack settings that do not affect the result: they get their defaults.
        """
        defaults = {f.name: f.default for f in dataclasses.fields(cls)}
        optional = {f.name: f.default for f in dataclasses.fields(cls) if f.metadata["resumable"]}
        restored: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value
                                    for name, value in {**optional, **values}.items()}
        misfits = set(restored) ^ set(defaults) or {
            name for name, value in restored.items()
            if not (type(value) is type(defaults[name]) or (type(value) is int and type(defaults[name]) is float))
            or (isinstance(value, tuple) and any(type(number) is not int for number in value))}
        if misfits:
            raise UserError("the run's config.json does not fit this version's settings: "
                            f"{', '.join(sorted(misfits))}")
        try:
            return cls(**restored)
        except UserError as error:
            raise UserError(f"the run's config.json has an invalid setting: {error}") from None


def _check(flag: str, value: Any, limits: Any) -> None:
    """Raise UserError unless `value` is within the limits of its `setting`."""
    numbers = value if isinstance(value, tuple) else (value,)
    if len(numbers) > MAX_NUMBERS:
        raise UserError(f"{flag} takes at most {MAX_NUMBERS} numbers, not {len(numbers):,}")
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
        raise UserError(f"{flag} must be a finite number, not {show(value)}")
    for bound, words, breaks in _BOUNDS:
        limit = limits[bound]
        if limit is not None and any(breaks(number, limit) for number in numbers):
            raise UserError(f"{flag} must be {words} {show(limit)}, not {show(value)}")
    if limits["choices"] and value not in limits["choices"]:
        raise UserError(f"{flag} must be one of {', '.join(limits['choices'])}, not {value}")


# ---- Settings as flags ----------------------------------------------------------------------------------------------


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def show(value: Any) -> str:
    """A setting's value as you type it on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "(default)"
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)


def words_for(name: str, value: Any) -> list[str]:
    """The command-line words that give a setting this value."""
    return [flag_of(name if value else "no_" + name)] if isinstance(value, bool) else [flag_of(name), show(value)]


def machine_words(settings: Settings, reasons: list[str], processes: int = 1) -> str:
    """Arithmetic, device and threads as messages call them, with the `reasons` for what was chosen."""
    each = f"{processes} processes, each " if processes > 1 else ""
    why = f" ({'; '.join(reasons)})" if reasons else ""
    return (f"{settings.precision} on {settings.device} with {each}{settings.threads} "
            f"thread{'s' * (settings.threads != 1)}{why}")


@dataclass(frozen=True)
class Script:
    """A training script's declarations, for the shared modules, tools and benchmarks.

    file: its name; description: its docstring; recipes: named settings, the default first; overfit: the
    settings that `--overfit-batch` replaces; build_model(settings, num_outputs): its network with random weights;
    next_commands: by recipe, the command to try after it.
    """

    file: str
    description: str
    settings_class: type[Settings]
    recipes: dict[str, dict[str, Any]]
    overfit: dict[str, Any]
    build_model: Callable[[Any, int], nn.Module]
    next_commands: dict[str, str] = field(default_factory=dict)

    def recipe_settings(self, recipe: str, /, **changes: Any) -> Settings:
        return self.settings_class(**{"recipe": recipe, **self.recipes[recipe], **changes})

    def launcher(self, processes: int) -> str:
        """The command that starts the script in this number of processes."""
        return f"python {self.file}" if processes == 1 else f"torchrun --nproc_per_node={processes} {self.file}"

    def command_for(self, settings: Settings, processes: int = 1) -> str:
        """The shortest command that trains with `settings`; it names the seed and omits the machine's settings."""
        start = self.recipe_settings(settings.recipe)
        words = [] if settings.recipe == next(iter(self.recipes)) else ["--recipe", settings.recipe]
        for f in dataclasses.fields(settings):
            value = getattr(settings, f.name)
            if f.metadata["machine"] or f.name in ("seed", "recipe") or value == getattr(start, f.name):
                continue
            words += words_for(f.name, value)
        return shlex.join([*self.launcher(processes).split(), *words, "--seed", str(settings.seed)])
