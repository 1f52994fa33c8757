"""Program: compares optimizers by training fresh agents with them, on gridworlds and Catch (A2C) and Brax robots (PPO).

    python evaluate.py                                                  # one Brax robot, about 5 minutes on 2 CPU cores
    python evaluate.py --tasks catch,big_dense_long --learning-rate 1e-3,3e-3,1e-2 --seeds 10
    python evaluate.py --preset paper --tasks ant                       # the paper's protocol: an accelerator, hours

All optimizers are tuned alike: where several learning rates are given, the one with the best return over the whole run on
two tuning seeds is taken, and fresh seeds are reported. The run's folder receives config.json, curves.csv (every reported
run), summary.json and curves.png.
"""

import csv
import functools
import json
import math
import pathlib
import warnings
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import scipy.stats
from jax.sharding import PartitionSpec
from tqdm import tqdm

import a2c
import brax_env
import cli
import gridworld
import optim4rl
import ppo

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# name -> (meta_params, alpha) -> optax.GradientTransformation; "untrained" is Optim4RL before meta-training: sign descent
OPTIMIZERS = {
    "optim4rl": optim4rl.optim4rl,
    "untrained": optim4rl.optim4rl,
    "adam": lambda meta_params, alpha: optax.adam(alpha),
    "rmsprop": lambda meta_params, alpha: optax.rmsprop(alpha),
}
TUNING_SEEDS = 2
WEIGHTS = str(pathlib.Path(__file__).parent / "weights" / "optim4rl.npz")

# The paper's test settings: steps, and PPO's knobs (appendix).
_PAPER_PPO = {
    "ant": (1e8, dict(num_envs=4096, batch_size=2048, rollout_length=5, num_epochs=4, entropy_cost=1e-2, reward_scale=10.0)),
    "humanoid": (1e8, dict(num_envs=2048, batch_size=1024, rollout_length=10, num_epochs=8, entropy_cost=1e-3, reward_scale=0.1)),
    "inverted_double_pendulum": (2e7, dict(num_envs=2048, batch_size=1024, rollout_length=5, num_epochs=4, entropy_cost=1e-2, reward_scale=10.0)),
    "walker2d": (5e7, dict(num_envs=2048, batch_size=512, rollout_length=20, num_epochs=8, entropy_cost=1e-3, reward_scale=5.0, discount=0.997)),
}
# Settings of our own in which a CPU learns the pendulums within a minute.
_CPU_PPO = dict(num_envs=64, batch_size=64, num_minibatches=8, rollout_length=10, num_epochs=4, entropy_cost=1e-3, value_hidden=(64,) * 3)


@dataclass(frozen=True)
class Config:
    tasks: tuple[str, ...] = field(default=("inverted_pendulum",), metadata={"help": "comma-separated task names"})
    optimizers: tuple[str, ...] = field(default=tuple(OPTIMIZERS), metadata={"help": "comma-separated optimizer names"})
    weights: str = field(default=WEIGHTS, metadata={"help": "weight file of optim4rl"})
    learning_rate: tuple[float, ...] = field(default=(), metadata={"help": "alpha; several: each optimizer's best; none: the task's grid"})
    seeds: int = field(default=3, metadata={"help": "reported runs of each optimizer"})
    steps: float | None = field(default=None, metadata={"help": "environment steps of a run; none: the task's own budget"})
    num_envs: int | None = field(default=None, metadata={"help": "environments of an A2C agent; none: the paper's, 512 (Catch 64)"})
    ppo: str = field(default="small", metadata={"help": "PPO's settings: paper, or small ones of our own"})
    seed: int = field(default=0, metadata={"help": "seed of everything"})
    devices: int | None = field(default=None, metadata={"help": "devices to use; none: all, on a CPU one per core"})
    out: str | None = field(default=None, metadata={"help": "folder of this run; none: a new one under runs/"})


PRESETS = {
    "quick": {},
    "paper": dict(tasks=tuple(_PAPER_PPO), learning_rate=(3e-5, 1e-4, 3e-4, 1e-3), seeds=10, ppo="paper"),
}


class Task(NamedTuple):
    """A task as it is tested: who learns, how gradients are clipped, how long."""

    name: str
    learner: Any  # a2c.Learner or ppo.Learner
    clip: float | None  # gradients are clipped element-wise to [-clip, clip]; not on catch, as in the paper
    steps_per_update: int
    steps: float
    learning_rates: tuple  # among which every optimizer is tuned


@functools.cache
def make_task(name, num_envs=None, ppo_settings="small"):
    """The Task of that name. ValueError if there is none, or if a size makes no sense."""
    if name in gridworld.NAMES:
        config = a2c.Config(num_envs=num_envs if num_envs is not None else 64 if name == "catch" else 512)
        learner = a2c.make(gridworld.make(name), config)
        steps = 5e5 if name == "catch" else 3e6
        return Task(name, learner, None if name == "catch" else 1.0, config.num_envs * config.rollout_length, steps, (3e-3, 1e-2, 3e-2, 1e-1))
    if name not in brax_env.NAMES:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(gridworld.NAMES + brax_env.NAMES)}")
    steps, knobs = _PAPER_PPO.get(name, _PAPER_PPO["ant"]) if ppo_settings == "paper" else (5e5, _CPU_PPO)
    config = ppo.Config(**knobs)
    learner = ppo.make(brax_env.make(name), config)
    return Task(name, learner, 1.0, config.batch_size * config.num_minibatches * config.rollout_length, steps, (3e-4, 1e-3, 3e-3, 1e-2))


class Runs(NamedTuple):
    """Learning curves of R runs in K points; a point is the mean over the updates since the one before."""

    steps: np.ndarray  # [K] environment steps so far
    returns: np.ndarray  # [R, K] mean return of the episodes that ended

    def area(self):
        """Mean return over the whole run: [R]."""
        return self.returns.mean(1)

    def final(self):
        """Mean return over the last fifth of the run: [R]."""
        return self.returns[:, -(-self.returns.shape[1] * 4 // 5) :].mean(1)


@functools.cache
def _compiled(task, rule, mesh, updates):
    """Jitted (init, advance) of many runs of one optimizer, sharded over the mesh; advance makes `updates` updates."""

    def make(meta_params, alpha):
        optimizer = rule(meta_params, alpha)
        return optimizer if task.clip is None else optax.chain(optax.clip(task.clip), optimizer)

    def each(f, xs):
        return jax.lax.map(f, xs, batch_size=None if _on_cpu(mesh) else len(xs[0]))

    def init(meta_params, alphas, keys):
        return each(lambda x: task.learner.init(x[1], make(meta_params, x[0])), (alphas, keys))

    def advance(meta_params, alphas, keys, agents, start):
        def live(x):
            alpha, key, agent = x
            optimizer, update_keys = make(meta_params, alpha), jax.random.split(jax.random.fold_in(key, start), updates)
            agent, metrics = jax.lax.scan(lambda a, k: task.learner.update(optimizer, a, k), agent, update_keys)
            return agent, (metrics["episode_return_sum"].sum(), metrics["episodes"].sum())

        return each(live, (alphas, keys, agents))

    one, many = PartitionSpec(), PartitionSpec("units")
    shard = lambda f, ins: jax.jit(jax.shard_map(f, mesh=mesh, in_specs=ins, out_specs=many, check_vma=False))
    return shard(init, (one, many, many)), shard(advance, (one, many, many, many, one))


def train(task, optimizer, meta_params, alphas, keys, mesh, steps=None, progress=lambda n: None):
    """Trains R fresh agents side by side.

    Args:
        task: Task.
        optimizer: a name in OPTIMIZERS.
        meta_params: the learned optimizer's, or None.
        alphas, keys: [R] learning rate and PRNG key of each run.
        mesh: jax.sharding.Mesh with the axis "units".
        steps: environment steps of each run; None: the task's own.
        progress: called with the fraction of the work done since the last call.
    Returns:
        Runs
    """
    num_updates = max(1, round((steps or task.steps) / task.steps_per_update))
    updates = max(1, num_updates // 50)
    points = round(num_updates / updates)
    init, advance = _compiled(task, OPTIMIZERS[optimizer], mesh, updates)
    # A CPU is fastest with one run a device, so all groups of runs share one compiled program; an accelerator takes all at once.
    size = mesh.devices.size if _on_cpu(mesh) else -(-len(alphas) // mesh.devices.size) * mesh.devices.size
    groups = np.arange(-(-len(alphas) // size) * size).reshape(-1, size) % len(alphas)  # the last group is filled up with repetitions
    curves = np.zeros((2, len(alphas), points))  # sums of returns, numbers of episodes
    for group in groups:
        run_alphas, run_keys = jnp.asarray(alphas, jnp.float32)[group], keys[group]
        agents = init(meta_params, run_alphas, run_keys)
        for point in range(points):
            agents, sums = advance(meta_params, run_alphas, run_keys, agents, point)
            curves[:, group, point] = jax.device_get(sums)
            progress(1 / points / len(groups))
    env_steps = (1 + np.arange(points)) * updates * task.steps_per_update
    return Runs(env_steps, _fill(*curves))


def _on_cpu(mesh):
    return mesh.devices.flat[0].platform == "cpu"


def _fill(return_sums, episodes):
    """Mean returns [R, K]; where no episode ended, the value before, and before the first one, the value after."""
    returns = np.where(episodes > 0, return_sums / np.maximum(episodes, 1), np.nan)
    for run, counts in zip(returns, episodes):
        known = np.flatnonzero(counts)
        if known.size:
            run[:] = run[known[np.maximum(np.searchsorted(known, np.arange(run.size), "right") - 1, 0)]]
    return returns


def tuned(task, optimizer, meta_params, rates, num_seeds, key, mesh, steps=None, progress=lambda n: None):
    """The best of some learning rates on TUNING_SEEDS seeds, and Runs with it on num_seeds fresh ones: (alpha, Runs)."""
    tuning_key, report_key = jax.random.split(key)
    share = len(rates) * TUNING_SEEDS if len(rates) > 1 else 0
    best = rates[0]
    if share:
        keys = jnp.tile(jax.random.split(tuning_key, TUNING_SEEDS), len(rates))
        part = share / (share + num_seeds)
        runs = train(task, optimizer, meta_params, np.repeat(rates, TUNING_SEEDS), keys, mesh, steps, lambda n: progress(part * n))
        scores = np.nan_to_num(runs.area(), nan=-np.inf).reshape(len(rates), TUNING_SEEDS).mean(1)
        best = rates[int(np.argmax(scores))]
    keys, rest = jax.random.split(report_key, num_seeds), num_seeds / (share + num_seeds)
    return best, train(task, optimizer, meta_params, np.full(num_seeds, best), keys, mesh, steps, lambda n: progress(rest * n))


def interval(values):
    """Interquartile mean of [R] values and its 95% bootstrap interval: (mean, low, high); without runs to resample, no interval."""
    values = np.asarray(values, float)
    mean = scipy.stats.trim_mean(values, 0.25)
    if len(values) < 2 or np.ptp(values) == 0 or not np.isfinite(values).all():
        return mean, mean, mean
    iqm = lambda x, axis: scipy.stats.trim_mean(x, 0.25, axis=axis)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few seeds make coarse intervals; the number of seeds is printed beside them
        low, high = scipy.stats.bootstrap((values,), iqm, rng=0, method="percentile").confidence_interval
    return mean, low, high


def summarize(task, optimizer, alpha, runs):
    """One row of the table as a dict."""
    row = {"task": task.name, "optimizer": optimizer, "alpha": alpha, "seeds": len(runs.returns), "steps": int(runs.steps[-1])}
    for name, values in (("final", runs.final()), ("area", runs.area())):
        row[name], row[f"{name}_low"], row[f"{name}_high"] = map(float, interval(values))
    return row


def table(rows):
    """The rows as text: interquartile means and 95% bootstrap intervals over seeds."""
    cell = lambda row, name: f"{row[name]:9.2f}  [{row[name + '_low']:.2f}, {row[name + '_high']:.2f}]"
    lines = [f"{'task':25} {'optimizer':10} {'alpha':>7}   {'return, last fifth':30} {'return, whole run':30}"]
    for before, row in zip([None, *rows], rows):
        if before and before["task"] != row["task"]:
            lines.append("")
        lines.append(f"{row['task']:25} {row['optimizer']:10} {row['alpha']:7.0e}   {cell(row, 'final'):30} {cell(row, 'area'):30}".rstrip())
    return "\n".join(lines)


def plot(path, curves):
    """curves: list of (task name, optimizer, Runs). One panel per task: the mean, shaded from the lowest to the highest run."""
    tasks = list(dict.fromkeys(task for task, _, _ in curves))
    figure, axes = plt.subplots(1, len(tasks), figsize=(1 + 4.5 * len(tasks), 3.6), squeeze=False, layout="constrained")
    colors = dict(zip(OPTIMIZERS, ("tab:red", "tab:gray", "tab:blue", "tab:green")))
    for task, optimizer, runs in curves:
        axis = axes[0, tasks.index(task)]
        axis.plot(runs.steps, runs.returns.mean(0), label=optimizer, color=colors[optimizer])
        axis.fill_between(runs.steps, runs.returns.min(0), runs.returns.max(0), alpha=0.2, color=colors[optimizer], linewidth=0)
        axis.set(title=task, xlabel="environment steps", ylabel="episode return")
    axes[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def check(config):
    """Raises UsageError for what cannot be; returns (tasks, meta_params of each optimizer)."""
    try:
        tasks = [make_task(name, config.num_envs, config.ppo) for name in config.tasks]
        meta_params = {"untrained": optim4rl.init_meta_params(jax.random.key(config.seed))}
        if "optim4rl" in config.optimizers:
            meta_params["optim4rl"], _ = optim4rl.load(config.weights)
    except FileNotFoundError:
        raise cli.UsageError(f"no weight file {config.weights}; python meta_train.py makes one") from None
    except ValueError as error:
        raise cli.UsageError(error) from None
    if config.ppo not in ("small", "paper"):
        raise cli.UsageError(f"--ppo is {config.ppo!r}; known: small, paper")
    for name in config.optimizers:
        if name not in OPTIMIZERS:
            raise cli.UsageError(f"unknown optimizer {name!r}; known: {', '.join(OPTIMIZERS)}")
    for name, value in (("--tasks", config.tasks), ("--optimizers", config.optimizers)):
        if not value:
            raise cli.UsageError(f"{name} is empty; name at least one")
    numbers = {"--seeds": config.seeds, "--steps": 1 if config.steps is None else config.steps, "--learning-rate": min(config.learning_rate, default=1)}
    for flag, value in numbers.items():
        if not (0 < value < math.inf):
            raise cli.UsageError(f"{flag} is {value}; it must be positive")
    return tasks, meta_params


def main(argv=None):
    config = cli.parse(Config, PRESETS, __doc__, argv)
    mesh = cli.use_devices(config.devices)
    tasks, meta_params = check(config)
    folder = cli.new_folder(config.out, "evaluate", config)
    print(f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}; {config.seeds} seeds; results in {folder}")
    rows, curves = [], []
    with open(folder / "curves.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "optimizer", "alpha", "run", "step", "episode_return"])
        for task in tasks:
            key = jax.random.fold_in(jax.random.key(config.seed), sum(map(ord, task.name)))  # the same seeds for every optimizer
            for optimizer in config.optimizers:
                rates = config.learning_rate or task.learning_rates
                with tqdm(total=100, desc=f"{task.name} {optimizer}", bar_format="{desc:36} {percentage:3.0f}% |{bar:30}| {elapsed} < {remaining}") as bar:
                    progress = lambda part: bar.update(100 * part)
                    alpha, runs = tuned(task, optimizer, meta_params.get(optimizer), rates, config.seeds, key, mesh, config.steps, progress)
                rows.append(summarize(task, optimizer, alpha, runs))
                curves.append((task.name, optimizer, runs))
                for i, returns in enumerate(runs.returns):
                    writer.writerows([task.name, optimizer, alpha, i, int(s), f"{r:.6g}"] for s, r in zip(runs.steps, returns))
                file.flush()
    (folder / "summary.json").write_text(json.dumps(rows, indent=1))
    plot(folder / "curves.png", curves)
    print(f"\n{table(rows)}\n\nInterquartile mean and 95% bootstrap interval over {config.seeds} seeds.")
    print(f"Curves: {folder}/curves.png")


if __name__ == "__main__":
    cli.run(main)
