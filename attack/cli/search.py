"""Hyper-parameter search on a simulated checkpoint, with Ray Tune.

The attacker makes a checkpoint of its own, whose truth it knows nothing about either:
the gradient loss decides. Trials are stopped early by ASHA; settings are proposed by
Optuna's TPE where it is installed, otherwise at random. BOHB, which the published search
used, rests on the packages HpBandSter and ConfigSpace, and HpBandSter is abandoned: it
is not offered.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attack.settings import InversionConfig, settings_of_flags
from core.errors import InputError
from core.plugins import import_plugin

if TYPE_CHECKING:
    from attack.cli.request import AttackRun, Search
    from attack.reconstruction import Reconstruction

logger = logging.getLogger(__name__)

# Reports one step of a trial: iteration and gradient loss.
Report = Callable[[int, float], None]
# Runs one setting and reports as it goes. It must be picklable: a function of a module, or
# a functools.partial of one; it runs in another process.
Trial = Callable[[dict[str, Any], Report], None]

_LOSS, _ITERATION = "loss", "iteration"


@dataclass(frozen=True)
class Range:
    """The values a hyper-parameter may take.

    Attributes:
        low: Smallest value.
        high: Largest value.
        scale: "linear", "log" or "integer".
    """

    low: float
    high: float
    scale: str = "linear"

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.scale == "log" and self.low <= 0):
            raise InputError(f"a {self.scale} range from {self.low} to {self.high} is empty")


# By flag of main_run.py, as published.
PUBLISHED_SPACE: dict[str, Range] = {
    "epochs": Range(5000, 20000, "integer"),
    "lr": Range(0.1, 1.0),
    "TV": Range(1e-6, 1.0, "log"),
    "BN": Range(1e-6, 0.1, "log"),
    "input_norm": Range(-1e-6, 0.0),
    "grads_weight": Range(0.01, 1.0),
}


@dataclass(frozen=True)
class SearchResult:
    """What the search found.

    Attributes:
        config: The best setting: the constants and the values found.
        loss: Smallest gradient loss that the setting reached.
        trials: Per trial: config, loss (None if it failed), iterations, error.
    """

    config: dict[str, Any]
    loss: float
    trials: list[dict[str, Any]]


def published_space(*names: str) -> dict[str, Range]:
    """The published ranges of the named hyper-parameters (`--lr-tune` gives "lr").

    Raises:
        InputError: None is named, or one that has no range.
    """
    if not names:
        raise InputError(
            "--superparameters-search: nothing to search; add one of "
            + ", ".join(f"--{name.replace('_', '-')}-tune" for name in PUBLISHED_SPACE)
        )
    unknown = [name for name in names if name not in PUBLISHED_SPACE]
    if unknown:
        raise InputError(f"--superparameters-search: {unknown[0]} has no range to search in")
    return {name: PUBLISHED_SPACE[name] for name in names}


def search(
    trial: Trial,
    space: Mapping[str, Range],
    *,
    constants: Mapping[str, Any] | None = None,
    num_samples: int = 16,
    max_concurrent: int = 8,
    cpus_per_trial: float = 1,
    gpus_per_trial: float = 0.5,
    min_t: int = 2000,
    max_t: int = 3000,
    seed: int = 0,
    verbose: int = 3,
    storage: str | Path | None = None,
    ray_options: Mapping[str, Any] | None = None,
) -> SearchResult:
    """Search the setting of smallest gradient loss.

    Args:
        trial: Runs one setting; `report(iteration, loss)` may end it early, by an
            exception that it must let pass.
        space: What to search, by name.
        constants: Further entries of every trial's setting.
        num_samples: Number of settings that are tried.
        max_concurrent: Trials at a time.
        cpus_per_trial: Cores reserved for a trial.
        gpus_per_trial: Share of a GPU reserved for a trial; not asked for without a GPU.
        min_t: Iterations before which no trial is stopped.
        max_t: Iterations after which every trial is stopped.
        seed: Seed of the proposed settings.
        verbose: Ray Tune's verbosity, 0 to 3.
        storage: Folder for Ray's own files; a temporary one if None.
        ray_options: For `ray.init` where Ray isn't running; it is then shut down again.

    Returns:
        The best setting and all trials.

    Raises:
        InputError: Ray isn't installed, contradictory limits, or every trial failed.

    Source:
        Li et al., A System for Massively Parallel Hyperparameter Tuning (ASHA), 2020,
        https://arxiv.org/abs/1810.05934.
    """
    _check_limits(space, num_samples, max_concurrent, min_t, max_t)
    ray = _import_ray()
    started = not ray.is_initialized()
    if started:
        ray.init(**{**_ray_defaults(), **(ray_options or {})})
    try:
        resources = {"cpu": cpus_per_trial}
        if ray.cluster_resources().get("GPU", 0) > 0:
            resources["gpu"] = gpus_per_trial
        with tempfile.TemporaryDirectory() as temporary:
            tuner = ray.tune.Tuner(
                ray.tune.with_resources(_reporting(trial), resources),
                param_space={**(constants or {}), **_ray_space(space)},
                tune_config=ray.tune.TuneConfig(
                    metric=_LOSS,
                    mode="min",
                    num_samples=num_samples,
                    max_concurrent_trials=max_concurrent,
                    scheduler=_scheduler(min_t, max_t),
                    search_alg=_proposals(seed),
                ),
                run_config=ray.tune.RunConfig(
                    storage_path=str(Path(storage or temporary).resolve()), verbose=verbose
                ),
            )
            return _result(tuner.fit())
    finally:
        if started:
            ray.shutdown()


def _check_limits(
    space: Mapping[str, Range], num_samples: int, max_concurrent: int, min_t: int, max_t: int
) -> None:
    if not space:
        raise InputError("--superparameters-search: the search space is empty")
    if num_samples < 1 or max_concurrent < 1:
        raise InputError("--num-samples and --max-concurrent must be at least 1")
    if not 1 <= min_t <= max_t:
        raise InputError(f"--min-t {min_t} must be at least 1 and at most --max-t {max_t}")


def _import_ray() -> Any:
    try:
        import ray
        import ray.tune
    except ImportError:
        raise InputError(
            "--superparameters-search needs Ray Tune: pip install 'gradinvbench[search]'"
        ) from None
    return ray


def _ray_defaults() -> dict[str, Any]:
    # Trials run in processes of their own, which must find what this one can import.
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {
        "include_dashboard": False,
        "log_to_driver": False,
        "runtime_env": {"env_vars": {"PYTHONPATH": path}},
    }


def _reporting(trial: Trial) -> Callable[[dict[str, Any]], None]:
    """The trial as Ray wants it: a function of the setting that reports dictionaries."""

    def run(config: dict[str, Any]) -> None:
        from ray import tune

        best = math.inf

        def report(iteration: int, loss: float) -> None:
            nonlocal best
            best = min(best, loss) if math.isfinite(loss) else best
            # ASHA compares what was reached so far, not where a noisy curve stands; and a
            # diverged trial must rank last, which NaN does not.
            tune.report({_LOSS: min(best, 1e30), _ITERATION: iteration})

        trial(config, report)

    return run


def _scheduler(min_t: int, max_t: int) -> Any:
    from ray.tune.schedulers import ASHAScheduler

    return ASHAScheduler(time_attr=_ITERATION, grace_period=min_t, max_t=max_t, reduction_factor=2)


def _proposals(seed: int) -> Any:
    try:
        from ray.tune.search.optuna import OptunaSearch

        return OptunaSearch(seed=seed)
    except (ImportError, AssertionError):
        # Ray asserts that Optuna is there.
        from ray.tune.search.basic_variant import BasicVariantGenerator

        logger.info("Optuna is not installed: settings are drawn at random")
        return BasicVariantGenerator(random_state=seed)


def _ray_space(space: Mapping[str, Range]) -> dict[str, Any]:
    from ray import tune

    return {name: _ray_range(tune, values) for name, values in space.items()}


def _ray_range(tune: Any, values: Range) -> Any:
    if values.scale == "integer":
        return tune.randint(int(values.low), int(values.high) + 1)
    if values.scale == "log":
        return tune.loguniform(values.low, values.high)
    return tune.uniform(values.low, values.high)


def _result(grid: Any) -> SearchResult:
    trials: list[dict[str, Any]] = [
        {
            "config": dict(result.config),
            "loss": (result.metrics or {}).get(_LOSS),
            "iterations": (result.metrics or {}).get(_ITERATION),
            "error": None if result.error is None else str(result.error).strip().splitlines()[-1],
        }
        for result in grid
    ]
    reached = [entry for entry in trials if entry["loss"] is not None and entry["error"] is None]
    if not reached:
        raise InputError(f"--superparameters-search: every trial failed ({trials[0]['error']})")
    best = min(reached, key=lambda entry: entry["loss"])
    return SearchResult(config=best["config"], loss=best["loss"], trials=trials)


# -- Of stage 3 -------------------------------------------------------------------


def with_best_settings(run: AttackRun, options: Search) -> AttackRun:
    """The run with the hyper-parameters that are best on the simulated checkpoint.

    Args:
        run: What the user asked for.
        options: What to search, and for how long.
    """
    result = search(
        functools.partial(search_trial, run, options),
        published_space(*options.names),
        num_samples=options.num_samples,
        max_concurrent=options.max_concurrent,
        gpus_per_trial=options.gpus_per_trial,
        min_t=options.min_t,
        max_t=options.max_t,
        seed=run.seed,
        verbose=options.verbose,
    )
    found = {name: result.config[name] for name in options.names}
    print(f"best setting (gradient loss {result.loss:.4g}): {found}")
    return _with_flags(run, found)


def _with_flags(run: AttackRun, found: Mapping[str, Any]) -> AttackRun:
    """The run with some flags as if they had been given."""
    settings = {**run.settings, **settings_of_flags(found, InversionConfig())}
    return dataclasses.replace(run, settings=settings, arguments={**run.arguments, **found})


def search_trial(run: AttackRun, options: Search, config: dict[str, Any], report: Report) -> None:
    """One trial: the attack on the simulated checkpoint with some flags changed."""
    import torch

    from attack.attacks.optimisation import make_attack
    from attack.cli.request import open_checkpoint
    from attack.cli.run_labels import labels_for

    import_plugin(run.plugin)
    if "iterations" in run.settings:
        config = {"epochs": options.iterations, **config}
    trial = _with_flags(run, config)
    target, truth = open_checkpoint(run, options.checkpoint, "--simulation-checkpoint")
    cuda = torch.cuda.is_available() and not options.cpu
    attack = make_attack(trial.attack, trial.settings, trial.knowledge)
    reconstruct: Callable[..., Reconstruction] = attack.reconstruct
    reconstruct(
        target,
        labels=labels_for(trial, attack, target, truth),
        device=torch.device("cuda" if cuda else "cpu"),
        seed=run.seed,
        print_every=run.showing.print_every,
        report=report,
    )
