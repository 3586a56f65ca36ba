"""Search the settings of a recipe by many short trainings, measured on the validation split alone.

    python tune.py mlp                    # 20 trials of the MLP; the same command again adds 20 more to the search
    python tune.py cnn --trials 50 --timeout 120        # start no trial after two hours
    python tune.py mlp --trials 0         # only say again what the search has found, and draw it
    python tune.py mlp --synthetic --trials 3           # a search of its own, anywhere: no data set, no network

The first trial is the recipe as it is, then settings are drawn at random (Bergstra and Bengio 2012), then by TPE
(Bergstra et al. 2011), all with Optuna (Akiba et al. 2019, arXiv 1907.10902), which requirements-extra.txt installs.
From the middle of its epochs on, a trial below the median of the others is pruned (Golovin et al. 2017). Ctrl-C ends
the search with what there is; it goes on as if nothing had been, from results/tune/<mlp|cnn>[-synthetic]/journal.log.

A trial is a short training, and what keeps a network from memorising (crop, MixUp, jitter) pays only in long ones. On
5,000 pictures a standard error is 0.7 points, and the best of many trials is flattered by chance. What is found here is
worth a full run, and no more than that.
"""

import fcntl
import json
import math
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import train_cnn
import train_mlp
from engine import Interrupted, new_model, train
from hardware import choose_precision, prepare_device
from runs import BLUE, ORANGE, Unwritten, save_figure
from settings import RESULTS_DIR, Parser, Script, Settings, exit_status, flag_of
from utils import Split, UserError, derived_seed, load_cifar100


@dataclass(frozen=True)
class Range:
    """Where a setting is looked for, both ends included, in whole numbers if they are.

    log: evenly over its orders of magnitude.
    """

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Search:
    """What is searched: the first recipe of `script`, made short by the settings `short`.

    space: where each setting that is varied is looked for; the recipe's own value is in there.
    """

    script: Script
    short: dict[str, Any]
    space: dict[str, Range]

    def settings(self, **changes: Any) -> Settings:
        """What a trial of the recipe as it is trains with."""
        return self.script.recipe_settings(next(iter(self.script.recipes)), **{**self.short, **changes})


SEARCHES = {
    "mlp": Search(
        train_mlp.SCRIPT,
        dict(epochs=6),  # a tenth of the recipe: a minute on two CPU cores
        {
            "batch_size": Range(500, 4000, log=True),  # large ones, as Muon's own cost is paid per step
            "lr": Range(0.005, 0.2, log=True),  # Muon's; only 0.02 and 0.03 were ever tried
            "other_lr": Range(3e-4, 0.03, log=True),  # raised together with the batch, never by itself
            "momentum": Range(0.7, 0.98),  # never tuned; Jordan et al. have 0.95
            "warmup": Range(0.0, 0.3),  # halved on the way to the recipe, without a run of its own
            "label_smoothing": Range(0.0, 0.3),  # never tuned
            "crop": Range(0, 5),  # 2 to 4 were tried
            "mixup": Range(0.0, 1.0),  # 0.4 to 1.0 were tried; 1.0 was too much for 16 epochs
        },
    ),
    "cnn": Search(
        train_cnn.SCRIPT,
        dict(epochs=3, sides=(16, 20)),  # a sixth of what `fast` costs
        {
            "batch_size": Range(125, 500, log=True),  # smaller or larger ones were never tried
            "lr": Range(0.04, 0.4, log=True),  # Muon's: the angle of a step; 0.07 learnt less and 0.25 was too much
            "other_lr": Range(0.01, 0.1, log=True),  # of the head and the shifts; 0.05 was left untried
            "momentum": Range(0.3, 0.95),  # Muon's; 0.85 was as good with a smaller rate
            "warmup": Range(0.0, 0.3),  # never tuned
            "label_smoothing": Range(0.0, 0.3),  # 0.2 was the same in a long run
            "crop": Range(0, 5),  # 2 and 4 were tried
            "jitter": Range(0.0, 0.4),  # 0 and 0.2 were tried
        },
    ),
}

RANDOM_FIRST = 10  # trials, the recipe's included, before TPE has something to go by
FINISHED_FIRST = 4  # trials, before a median means something
TOP = 0.25  # the share of finished trials that importance tells from the rest
ENOUGH = 8  # finished trials before importance is worked out at all; it is still rough at 20


# ---------------------------------------------------------------------------------------------------------------------
# A trial
# ---------------------------------------------------------------------------------------------------------------------


def trial_settings(base: Settings, params: dict[str, Any]) -> Settings:
    """`base` with what Optuna proposes, rounded to the three digits that a command line is read with."""
    return replace(base, **{name: type(value)(float(f"{value:.3g}")) for name, value in params.items()})


def propose(trial: Any, space: dict[str, Range]) -> dict[str, Any]:
    """A value for every setting of `space`, by the search's sampler."""
    return {name: (trial.suggest_int if isinstance(values.low, int) else trial.suggest_float)(
        name, values.low, values.high, log=values.log) for name, values in space.items()}


def run_trial(trial: Any, search: Search, base: Settings, train_split: Split, val_split: Split) -> float:
    """Validation accuracy in percent after the last epoch. Every trial has the same seed, so they are paired.

    Raises optuna.TrialPruned if the trial falls behind or its loss is no longer finite, and Interrupted.
    """
    import optuna

    def judge(row: dict[str, Any], settings: Settings) -> None:
        trial.report(row["val_acc"], row["epoch"])
        if row["epoch"] < settings.epochs and trial.should_prune():
            raise optuna.TrialPruned

    settings = trial_settings(base, propose(trial, search.space))
    model = new_model(search.script, settings, train_split, len(train_split.fine_names))
    run = Unwritten(f"trial {trial.number}", settings)  # its command makes it again
    try:
        return train(model, train_split, val_split, run, quiet=True, after_epoch=judge)["val_acc"]
    except UserError as error:
        trial.set_user_attr("diverged", str(error))
        raise optuna.TrialPruned from error  # TPE learns from what was pruned, not from what failed


def outcome(trial: Any) -> str:
    return "finished" if trial.state.name == "COMPLETE" else "diverged" if "diverged" in trial.user_attrs else "pruned"


def trial_line(trial: Any, base: Settings) -> str:
    reached = outcome(trial)
    if trial.last_step is not None:
        reached += f" at {trial.intermediate_values[trial.last_step]:.2f}% after epoch {trial.last_step}"
    settings = trial_settings(base, trial.params)
    chosen = ", ".join(f"{name} {getattr(settings, name):g}" for name in trial.params)
    return f"trial {trial.number}: {reached}, {trial.duration.total_seconds():.0f} s; {chosen}"


# ---------------------------------------------------------------------------------------------------------------------
# The search
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from this search. Raises UserError if one has it."""
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"the search in {folder} is in use by another process; wait for it or stop it") from None
        yield


def open_study(folder: Path, search: Search, base: Settings) -> Any:
    """The Optuna study in `folder`, a new one if there is none.

    Raises UserError if Optuna is missing, if the journal is damaged, or if the study was begun with other settings.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalStorage
    except ImportError:
        raise UserError("a search needs Optuna, which is not installed: "
                        "pip install -r requirements-extra.txt") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pruner = optuna.pruners.MedianPruner(FINISHED_FIRST, n_warmup_steps=(base.epochs + 1) // 2)
    journal = folder / "journal.log"
    try:
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(journal))), study_name="tune", direction="maximize",
            load_if_exists=True, pruner=pruner)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{journal} is damaged ({error}): delete it to begin the search anew") from error
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):  # of a process that was killed
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    fixed = {f.name: getattr(base, f.name) for f in fields(base) if not f.metadata["machine"]}
    fixed |= {f"the range of {name}": f"{r.low:g} to {r.high:g}" for name, r in search.space.items()}
    fixed = json.loads(json.dumps(fixed))  # as the journal gives it back
    if not usable(study):
        study.set_user_attr("fixed", fixed)
    begun_with = study.user_attrs["fixed"]
    for name in fixed | begun_with:
        if fixed.get(name) != begun_with.get(name):
            raise UserError(f"the search in {folder} was begun with {name} {begun_with.get(name)}, not "
                            f"{fixed.get(name)}: go on with that, or begin another one in another --results-dir")
    return study


def usable(study: Any) -> list[Any]:
    """The trials that came to an end by themselves, in order: finished, pruned or diverged."""
    from optuna.trial import TrialState

    return study.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED])


def finished(study: Any) -> list[Any]:
    return [trial for trial in usable(study) if outcome(trial) == "finished"]


def run_trials(study: Any, search: Search, base: Settings, trials: int, minutes: float) -> None:
    """Add so many trials to the study, a line each; none is started after `minutes`. Raises Interrupted.

    The sampler's seed is derived from how many trials there are already, so that a search which was interrupted and
    continued tries the same settings as one that was not.
    """
    from optuna.samplers import TPESampler

    end = time.monotonic() + 60 * minutes
    train_split, val_split = load_cifar100(base.data_folder, use_synthetic=base.synthetic)
    base = prepare_device(base)
    model = new_model(search.script, base, train_split, len(train_split.fine_names))
    base = choose_precision(model, train_split, base)
    print(f"{trials} trials of {base.epochs} epochs on {len(train_split):,} {base.pictures}, {base.precision} on "
          f"{base.device} with {base.threads} threads; accuracies are of {len(val_split):,} held-out pictures",
          flush=True)
    for _ in range(trials):
        if time.monotonic() > end:
            break
        done = len(usable(study))
        if not done:
            study.enqueue_trial({name: getattr(base, name) for name in search.space})
        seed = derived_seed("tune", base.seed, done) % 2**32
        study.sampler = TPESampler(n_startup_trials=RANDOM_FIRST, seed=seed)
        study.optimize(lambda trial: run_trial(trial, search, base, train_split, val_split), n_trials=1)
        print(trial_line(usable(study)[-1], base), flush=True)


def importances(study: Any) -> dict[str, float]:
    """How much each setting has to do with being among the best, as shares of 1, the largest first; {} if too early.

    By PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255), which unlike Optuna's others needs no scikit-learn.
    """
    if len(finished(study)) < ENOUGH:
        return {}
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(target_quantile=TOP))


def summary(study: Any, search: Search, base: Settings, shares: dict[str, float]) -> str:
    """What the search has found, in words; it has at least one finished trial."""
    best, done = study.best_trial, finished(study)
    kinds = Counter(map(outcome, usable(study)))
    recipe = [trial.value for trial in done if trial_settings(base, trial.params) == base]
    compared = f"; the recipe as it is: {recipe[0]:.2f}%" if recipe else ""
    command = search.script.command_for(trial_settings(base, best.params))
    if base.data_dir:
        command += " " + shlex.join(["--data-dir", base.data_dir])
    lines = [
        ", ".join(f"{kinds[kind]} {kind}" for kind in ("finished", "pruned", "diverged")),
        f"best: trial {best.number} with {best.value:.2f}% on held-out pictures{compared}",
        f"    {command}",
        f"that is as short as a trial; without {' and '.join(map(flag_of, search.short))} it is as long as the recipe",
    ]
    if shares:
        lines += [f"importance for being among the best {TOP:.0%} of {len(done)} finished trials:",
                  *(f"    {name:<16} {100 * share:3.0f}%" for name, share in shares.items())]
    else:
        lines += [f"importance is worked out from {ENOUGH} finished trials on"]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def history_figure(study: Any, title: str):
    """Each trial's accuracy and the best so far, as a matplotlib Figure. A trial that diverged has none."""
    from matplotlib.figure import Figure  # here, because importing matplotlib takes a good second

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    done = finished(study)
    pruned = [trial for trial in usable(study) if outcome(trial) == "pruned"]
    numbers, values = [trial.number for trial in done], [trial.value for trial in done]
    best = [max(values[:count + 1]) for count in range(len(values))]
    last = usable(study)[-1].number
    axes.step([*numbers, last], [*best, best[-1]], where="post", color=BLUE, lw=1.3, label="best so far")
    axes.plot(numbers, values, "o", color=BLUE, ms=5, label="finished")
    if pruned:
        axes.plot([trial.number for trial in pruned], [trial.value for trial in pruned], "x", color=ORANGE, ms=6,
                  label="pruned, as far as it came")
    axes.set(xlabel="trial (0: the recipe as it is)", ylabel="validation top-1 accuracy (%)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    figure.suptitle(f"Search history, {title}")
    return figure


def importance_figure(shares: dict[str, float], title: str):
    """The shares of `importances` as bars, as a matplotlib Figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    names = list(shares)[::-1]
    bars = axes.barh(names, [100 * shares[name] for name in names], color=BLUE)
    axes.bar_label(bars, fmt="%.0f%%", padding=3)
    axes.set(xlabel=f"importance for being among the best {TOP:.0%} (% of all)", ylabel="setting")
    axes.margins(x=0.08)
    axes.grid(alpha=0.3, axis="x")
    figure.suptitle(f"What counts, {title}")
    return figure


def report(study: Any, search: Search, base: Settings, folder: Path) -> None:
    """Print what the search has found and draw it, as far as there are trials enough."""
    done = finished(study)
    if not done:
        print("no trial has finished yet")
        return
    shares = importances(study)
    pictures = "SYNTHETIC PICTURES, not CIFAR-100" if base.synthetic else "CIFAR-100"
    title = f"{pictures}: recipe {base.recipe} (epochs: {base.epochs}, finished trials: {len(done)})"
    save_figure(history_figure(study, title), folder / "history.png")
    if shares:
        save_figure(importance_figure(shares, title), folder / "importance.png")
    print(summary(study, search, base, shares))
    print(f"journal and figures are in {folder}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="tune.py", description=__doc__)
    parser.add_argument("script", choices=tuple(SEARCHES), metavar="|".join(SEARCHES), help="what to search")
    parser.add_argument("--trials", type=int, default=20, metavar="N", help="trials to add (default: 20)")
    parser.add_argument("--timeout", type=float, default=math.inf, metavar="MINUTES",
                        help="start no trial after so long (default: no limit)")
    epochs = " and ".join(f"{search.short['epochs']} for {name}" for name, search in SEARCHES.items())
    parser.add_argument("--epochs", type=int, metavar="N", help=f"epochs of a trial (default: {epochs})")
    parser.add_argument("--seed", type=int, default=0, metavar="N",
                        help="decides what is tried, and the trials' own randomness (default: 0)")
    parser.add_argument("--synthetic", action="store_true", help="use procedurally drawn pictures")
    parser.add_argument("--data-dir", default="", metavar="FOLDER",
                        help="folder of the data set (default: $CIFAR100_DIR, else data/)")
    parser.add_argument("--results-dir", type=Path, default=RESULTS_DIR, metavar="FOLDER",
                        help="the search is kept in tune/ there (default: results/)")
    options = parser.parse_args(argv)
    if options.trials < 0 or not options.timeout > 0:
        raise UserError("--trials must be at least 0, and --timeout above 0")
    search = SEARCHES[options.script]
    folder = options.results_dir / "tune" / (options.script + ("-synthetic" if options.synthetic else ""))
    given = {"epochs": options.epochs} if options.epochs is not None else {}
    base = search.settings(seed=options.seed, synthetic=options.synthetic, data_dir=options.data_dir, **given)
    folder.mkdir(parents=True, exist_ok=True)
    status = 0
    with locked(folder):
        study = open_study(folder, search, base)
        try:
            if options.trials:
                run_trials(study, search, base, options.trials, options.timeout)
        except (Interrupted, KeyboardInterrupt) as stop:
            status = getattr(stop, "status", 130)
            print("\nstopped; the same command goes on with the search", flush=True)
        report(study, search, base, folder)
    return status


if __name__ == "__main__":
    sys.exit(exit_status(main))
