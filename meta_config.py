"""What meta_train.py can be told: its flags with their defaults, the presets, and what it refuses."""

import math
from dataclasses import dataclass

import brax_env
import cli
import compare
import gridworld
import pipeline
import suite


@dataclass(frozen=True)
class Config:
    tasks: tuple[str, ...] = cli.flag(
        ("small_dense_short", "small_dense_long"), "comma-separated worlds and robots to learn from"
    )
    optimizer: str = cli.flag("optim4rl", f"learned optimizer: {', '.join(compare.LEARNED)}")
    num_units: int = cli.flag(64, "n: training units of each task")
    num_envs: int = cli.flag(1, "environments of a unit; a robot's are among PPO's settings")
    ppo: str = cli.flag("small", "PPO's settings, for robots: paper, or small ones of our own")
    meta_steps: int = cli.flag(400, "length of the run")
    reset_interval: tuple[int, ...] = cli.flag(
        (72,),
        "m: meta-steps in the life of a unit, for all tasks or one each; 0: no resets, which is training without pipeline",
    )
    inner_updates: int = cli.flag(4, "agent updates in a meta-step")
    estimator: str = cli.flag(
        "gradient", "of the meta-gradient: gradient, the paper's; pes or nres, unbiased over whole lives"
    )
    sigma: float = cli.flag(0.03, "standard deviation of the perturbations of the meta-parameters by pes and nres")
    meta_learning_rate: float = cli.flag(1e-3, "step size of Adam on the meta-parameters")
    meta_decay: float = cli.flag(
        1.0, "part of that step size at the end of the run, to which it falls linearly; 1: constant"
    )
    meta_grad_clip: float = cli.flag(1.0, "global norm to which the meta-gradient is clipped")
    task_grad_norm: float = cli.flag(0.5, "norm to which each task's meta-gradient is rescaled; 0: not rescaled")
    keep: float = cli.flag(
        1.0,
        "how far the weights go from the untrained ones, 0, to those learned, 1; less suits tasks unlike these better",
    )
    alpha: tuple[float, ...] = cli.flag(
        (), "learning rate of the learned optimizer, for all tasks or one each; none: each task's own"
    )
    reward_scale: tuple[float, ...] = cli.flag(
        (), "factor on rewards, for all tasks or one each; none: each task's own"
    )
    test_tasks: tuple[str, ...] = cli.flag(
        ("small_dense_short", "small_dense_long", "small_sparse_short"), "tasks of the final table; none: no table"
    )
    test_steps: float = cli.flag(3.2e5, "environment steps of a run in the final table")
    test_envs: int = cli.flag(64, "environments of an agent in the final table; a robot's are among PPO's settings")
    test_seeds: int = cli.flag(10, "runs of each optimizer in the final table")
    test_learning_rates: tuple[float, ...] = cli.flag(
        (), "step sizes among which every optimizer of the table is tuned; none: the task's grid"
    )
    seed: int = cli.flag(0, "seed of everything")
    devices: int | None = cli.flag(
        None, "devices to use; none: as many as share the units equally, on a CPU one per core"
    )
    checkpoint_every: float = cli.flag(120.0, "seconds between checkpoints")
    out: str | None = cli.flag(None, "folder of this run; none: a new one under runs/")
    coordinator: str | None = cli.flag(
        None, "HOST:PORT of process 0, in a run of several processes; auto: as SLURM or MPI tells"
    )
    num_processes: int | None = cli.flag(None, "processes of the run, all with the same --out; none: one, or auto")
    process_id: int | None = cli.flag(None, "which of them this is, 0 to N - 1; none: the only one, or auto")
    resume: str | None = cli.flag(None, "folder of an interrupted run to go on with, its config taken from there")


PRESETS = {
    "quick": dict(
        estimator="nres",
        num_units=16,
        num_envs=64,
        meta_steps=500,
        reset_interval=(63,),  # times 4 updates: the life of an agent in the final table
        sigma=0.1,
        meta_learning_rate=1e-2,
        meta_decay=0.0,
        test_learning_rates=(1e-2, 2e-2, 3e-2, 5e-2, 1e-1),
    ),
    "gradient": {},  # the paper's estimator, and as much of its pipeline as 2 CPU cores train in 2 minutes
    "paper": dict(
        tasks=suite.PAPER_WORLDS,
        num_units=512,
        meta_steps=585,
        reset_interval=(288,),
        test_tasks=gridworld.NAMES,
        test_steps=5e6,
        test_envs=512,
    ),
    "gated_adam": dict(
        tasks=("small_dense_short", "small_dense_long", "big_dense_short", "big_dense_long"),
        optimizer="gated_adam",
        estimator="nres",
        num_units=16,
        num_envs=64,
        meta_steps=1250,
        reset_interval=(125,),
        sigma=0.4,
        meta_learning_rate=4e-3,
        keep=0.5,
        alpha=(0.03,),
    ),
    "pendulum": dict(
        tasks=("inverted_pendulum",),
        num_units=8,
        meta_steps=100,
        reset_interval=(12,),
        alpha=(3e-4,),
        meta_learning_rate=5e-3,
        test_tasks=("inverted_pendulum",),
        test_seeds=3,
    ),
}


def per_task(config, name):
    """One number per task, from a flag that gives one for all, or one each; each task's own where it gives none."""
    values = getattr(config, name)
    if not values and name in suite.MetaDefaults._fields:
        return [getattr(suite.meta_defaults(task, config.ppo, config.estimator), name) for task in config.tasks]
    if len(values) not in (1, len(config.tasks)):
        flag, given = name.replace("_", "-"), ",".join(map(str, values)) or "empty"
        raise cli.UsageError(f"--{flag} is {given}, for {len(config.tasks)} tasks; give one number, or one each")
    return list(values) * (len(config.tasks) // len(values))


def metric_scales(config):
    """What rewards in the metrics of each task are multiplied by: worlds scale their rewards, robots leave it to PPO's loss."""
    scales = per_task(config, "reward_scale")
    return [1.0 if task in brax_env.NAMES else scale for task, scale in zip(config.tasks, scales)]


def pipeline_configs(config):
    """pipeline.Config of each task."""
    rest = (config.inner_updates, config.estimator, config.sigma)
    return [pipeline.Config(config.num_units, interval, *rest) for interval in per_task(config, "reset_interval")]


def check(config):
    """Raises UsageError for what cannot be, before anything is written."""
    if config.optimizer not in compare.LEARNED:
        raise cli.UsageError(f"unknown optimizer {config.optimizer!r}; known: {', '.join(compare.LEARNED)}")
    if config.estimator not in pipeline.ESTIMATORS:
        raise cli.UsageError(f"unknown estimator {config.estimator!r}; known: {', '.join(pipeline.ESTIMATORS)}")
    if not config.tasks:
        raise cli.UsageError("--tasks is empty; name at least one")
    try:
        for name in config.tasks + config.test_tasks:
            suite.check(name, config.ppo)
    except ValueError as error:
        raise cli.UsageError(error) from None
    cli.check_positive(config, ("num_envs", "alpha", "reward_scale", "sigma", "meta_steps"))
    cli.check_positive(config, ("meta_learning_rate", "meta_grad_clip", "checkpoint_every"))
    cli.check_positive(config, ("test_envs", "test_steps", "test_seeds", "test_learning_rates"))
    for name in ("alpha", "reward_scale", "reset_interval"):
        per_task(config, name)
    for name in ("meta_decay", "keep"):
        if not 0 <= getattr(config, name) <= 1:
            raise cli.UsageError(f"--{name.replace('_', '-')} is {getattr(config, name)}; it must be between 0 and 1")
    if not 0 <= config.task_grad_norm < math.inf:
        raise cli.UsageError(f"--task-grad-norm is {config.task_grad_norm}; it must be positive, or 0")
