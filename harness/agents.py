"""Fresh agents: trained side by side with any optimizer, tuned like every other, kept on disk so that no run is made twice.

Many runs of one optimizer on a task of tasks.py share one compiled program, in which learning rate, seed and meta-parameters
are arguments. A new optimizer is added here: one line in LEARNED.

| file in a run's folder | holds | shape |
|---|---|---|
| runs/TASK-OPTIMIZER-PHASE-ALPHA-RUN.npz | curves: sums of episode returns, numbers of episodes, 1 while the agent is finite | [3, K] |
| | deterministic: returns of episodes without noise (a robot's reported runs) | [128] |
| policies/TASK-OPTIMIZER-RUN.npz | policy/layer_0/kernel ..., obs_stats/mean ...: what tasks.play needs | [in, out], [D] |
"""

import functools
import itertools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

import optim4rl
import ppo
from harness import runs, statistics, tasks, weights
from learned_optimizers import gated_adam, l2lgd2, linear_optim, star, velo

# Learned optimizers, each a LearnedOptimizer: init(key), make(learning_rate, meta_params)
LEARNED = {
    "optim4rl": optim4rl.OPTIM4RL,
    "linear_optim": linear_optim.LINEAR_OPTIM,
    "l2lgd2": l2lgd2.L2LGD2,
    "star": star.STAR,
    "gated_adam": gated_adam.GATED_ADAM,
    "velo": velo.VELO,
}
HAND_DESIGNED = ("sign_descent", "adam", "rmsprop")  # at optax's defaults, with a constant step
# Adam and RMSProp with every setting that helps them: {name: (kind, memory, bias correction, falling step)}. The step falls
# linearly to 0 over the run.
VARIANTS = {
    f"{kind}_{memory}{'_corrected' * corrected}{'_falling' * falls}": (kind, memory, corrected, falls)
    for kind, memory, corrected, falls in itertools.product(
        ("adam", "rmsprop"), (0.9, 0.99, 0.999), (False, True), (False, True)
    )
    if kind == "rmsprop" or corrected  # Adam corrects always
}
UNTRAINED = {f"untrained_{name}": name for name in LEARNED}  # a learned optimizer before meta-training
NAMES = (*LEARNED, *HAND_DESIGNED, *UNTRAINED, *VARIANTS)
RECURRENT = ("optim4rl", "linear_optim", "l2lgd2")  # networks that see the gradient itself
INPUTS = ("normalised", "raw")
TUNING_SEEDS = 2
POINTS = 50  # of a learning curve
POLICY_KIND = "ppo-policy"


class Optimizer(NamedTuple):
    """What agents are trained with."""

    name: str  # one of NAMES
    meta_params: Any = None  # of a learned optimizer
    inputs: str = "raw"  # one of INPUTS


@functools.cache
def make_rule(name, inputs="raw", num_steps=1):
    """(learning_rate, meta_params) -> optax transformation, for a name in NAMES; num_steps: optimizer steps of the whole run."""
    if name in HAND_DESIGNED or name in VARIANTS:
        return lambda learning_rate, meta_params: _hand_designed(name, learning_rate, num_steps)
    name = UNTRAINED.get(name, name)
    make = LEARNED[name].make
    if name == "velo":  # it plans its steps for the whole run
        make = functools.partial(make, num_steps=num_steps)
    if inputs == "raw" or name not in RECURRENT:
        return make
    return lambda learning_rate, meta_params: normalised(make(learning_rate, meta_params))


def _hand_designed(name, learning_rate, num_steps):
    if name in HAND_DESIGNED:
        return {"sign_descent": optax.sign_sgd, "adam": optax.adam, "rmsprop": optax.rmsprop}[name](learning_rate)
    kind, memory, corrected, falls = VARIANTS[name]
    step = optax.linear_schedule(learning_rate, 0.0, num_steps) if falls else learning_rate
    if kind == "adam":
        return optax.adam(step, b2=memory)
    return optax.rmsprop(step, decay=memory, bias_correction=corrected)


def normalised(optimizer):
    """The optimizer behind g / RMS(g), the root mean square of about the last 100 updates: its networks see 1e-4 as well as 1."""
    rms = optax.scale_by_rms(decay=0.99, eps=1e-10, bias_correction=True)
    return optax.chain(rms, optax.clip(10.0), optimizer)


def init_meta_params(name, key, inputs="raw"):
    """The meta-parameters of a learned optimizer before meta-training. With normalised inputs Optim4RL begins as RMSProp."""
    if name == "optim4rl" and inputs == "normalised":
        return optim4rl.init_like_rmsprop()
    return LEARNED[name].init(key)


def untrained(name, key, inputs="raw"):
    """The Optimizer untrained_NAME of a learned optimizer."""
    return Optimizer(f"untrained_{name}", init_meta_params(name, key, inputs), inputs)


def learning_rates(optimizer, grid):
    """The learning rates among which an Optimizer is tuned where others have this grid."""
    if optimizer.name.endswith("velo"):
        return [1.0]  # it has none
    # With raw inputs these two begin as SGD, whose steps are as small as gradients are (1e-3 to 1e-1 here), where the
    # others' steps are about alpha: with the same alphas no agent of theirs would learn.
    is_sgd = UNTRAINED.get(optimizer.name, optimizer.name) in ("linear_optim", "l2lgd2") and optimizer.inputs == "raw"
    return [100.0 * alpha if is_sgd else alpha for alpha in grid]


def task_key(seed, task):
    """The key of a task by name, from which tuning and reporting seeds are drawn: the same for all optimizers."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(task.encode()))


class Runs(NamedTuple):
    """Learning curves of R runs in K points; a point is the mean over the updates since the one before."""

    steps: np.ndarray  # [K] environment steps so far
    returns: np.ndarray  # [R, K] mean return of the episodes that ended; NaN from where an agent was not finite

    def area(self):
        """Mean return over the whole run, the area under the curve: [R]."""
        return self.returns.mean(1)

    def final(self):
        """Mean return over the last fifth of the run, at least one point: [R]."""
        return self.returns[:, -max(1, self.returns.shape[1] // 5) :].mean(1)


class Tuned(NamedTuple):
    alpha: float
    runs: Runs  # with fresh seeds
    tuning_area: float  # mean area with that alpha on the tuning seeds; NaN where there was nothing to tune


class Store(NamedTuple):
    """Where finished runs are kept: a pair of functions, by default of a store that keeps nothing."""

    load: Callable = lambda run, alpha: None  # (number of the run, alpha) -> curves [3, K], or None: not run yet
    # Called when a run is finished; the agent comes without its environments and its optimizer's state.
    save: Callable = lambda run, alpha, curves, agent: None


@functools.cache
def _compiled(task, rule, mesh, updates):
    """Jitted (init, advance) of many runs of one optimizer, sharded over the mesh; advance makes `updates` inner updates."""

    def make(meta_params, alpha):
        return tasks.clipped(task.name, rule(alpha, meta_params))

    def each(f, xs):
        return jax.lax.map(f, xs, batch_size=None if _on_cpu(mesh) else len(xs[0]))

    def init(meta_params, alphas, keys):
        return each(lambda x: task.learner.init(jax.random.split(x[1])[0], make(meta_params, x[0])), (alphas, keys))

    def advance(meta_params, alphas, keys, agents, point):
        def live(x):
            alpha, key, agent = x
            optimizer, updates_key = make(meta_params, alpha), jax.random.fold_in(jax.random.split(key)[1], point)
            update = lambda a, k: task.learner.update(optimizer, a, k)
            agent, metrics = jax.lax.scan(update, agent, jax.random.split(updates_key, updates))
            finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(agent.params)]).all()
            return agent, jnp.stack([metrics["episode_return_sum"].sum(), metrics["episodes"].sum(), finite])

        return each(live, (alphas, keys, agents))

    one, many = PartitionSpec(), PartitionSpec("units")
    shard = lambda f, ins: jax.jit(jax.shard_map(f, mesh=mesh, in_specs=ins, out_specs=many, check_vma=False))
    return shard(init, (one, many, many)), shard(advance, (one, many, many, many, one))


def train(task, optimizer, alphas, keys, mesh, steps=None, progress=lambda part: None, store=Store()):
    """Trains R fresh agents side by side.

    Args:
        task: tasks.Task.
        optimizer: Optimizer.
        alphas, keys: [R] learning rate and PRNG key of each run.
        mesh: jax.sharding.Mesh with the axis "units".
        steps: environment steps of each run; None: the task's own.
        progress: called with the fraction of the work done since the last call.
        store: Store of finished runs; what it holds is not run again.
    Returns:
        Runs
    """
    num_updates = max(1, round((steps or task.steps) / task.steps_per_update))
    updates = max(1, num_updates // POINTS)
    points = round(num_updates / updates)
    rule = make_rule(optimizer.name, optimizer.inputs, points * updates * task.optimizer_steps)
    init, advance = _compiled(task, rule, mesh, updates)
    finished = [store.load(run, float(alpha)) for run, alpha in enumerate(alphas)]
    finished = [curves if np.shape(curves) == (3, points) else None for curves in finished]
    left = np.array([run for run, curves in enumerate(finished) if curves is None], int)
    progress(1 - len(left) / len(alphas))
    for group in _groups(left, len(alphas), mesh):
        run_alphas, run_keys = jnp.asarray(alphas, jnp.float32)[group], keys[group]
        agents = init(optimizer.meta_params, run_alphas, run_keys)
        curves = np.zeros((len(group), 3, points))
        for point in range(points):
            agents, curves[:, :, point] = advance(optimizer.meta_params, run_alphas, run_keys, agents, point)
            progress(len(set(group)) / len(alphas) / points)
        learned = jax.device_get(agents._replace(opt_state=(), env_state=()))
        for i, run in enumerate(group):
            if finished[run] is None:
                finished[run] = curves[i]
                store.save(int(run), float(alphas[run]), curves[i], jax.tree.map(lambda x: x[i], learned))
    env_steps = (1 + np.arange(points)) * updates * task.steps_per_update
    return Runs(env_steps, mean_returns(*np.stack(finished, axis=1)))


def _groups(left, num_runs, mesh):
    """The runs that are left, [L] of num_runs, in groups that run side by side: [G, S], the last filled up with repetitions."""
    # A CPU is fastest with one run per device, and all groups share one compiled program; an accelerator takes all at
    # once, and the same number after a resume, when fewer are left: their arithmetic is that of one program.
    per_device = 1 if _on_cpu(mesh) else -(-num_runs // mesh.devices.size)
    size = mesh.devices.size * per_device
    return np.resize(left, (-(-len(left) // size), size))


def _on_cpu(mesh):
    return mesh.devices.flat[0].platform == "cpu"


def mean_returns(return_sums, episodes, finite):
    """Mean returns [R, K]; where no episode ended, the value before, and before the first one, the value after."""
    returns = np.where(episodes > 0, return_sums / np.maximum(episodes, 1), np.nan)
    for run, counts in zip(returns, episodes):
        known = np.flatnonzero(counts)
        if known.size:
            run[:] = run[known[np.maximum(np.searchsorted(known, np.arange(run.size), "right") - 1, 0)]]
    return np.where(finite > 0, returns, np.nan)


def tuned(
    task,
    optimizer,
    rates,
    num_seeds,
    key,
    mesh,
    steps=None,
    progress=lambda part: None,
    store=lambda phase: Store(),
    tuning_seeds=TUNING_SEEDS,
):
    """The best of some learning rates by area on a few tuning seeds, then runs with it on num_seeds fresh ones: Tuned.

    A baseline runs the tuning seeds also where it has one learning rate: by them the better baseline is chosen. Arguments
    as in train; store: phase, "tuning" or "report", -> Store.
    """
    tuning_key, report_key = jax.random.split(key)
    needed = len(rates) > 1 or optimizer.name in statistics.BASELINES
    num_tuning = len(rates) * tuning_seeds if needed else 0

    def run(phase, alphas, keys):
        part = len(alphas) / (num_tuning + num_seeds)
        share = lambda n: progress(part * n)
        return train(task, optimizer, alphas, keys, mesh, steps, share, store(phase))

    best, area = rates[0], np.nan
    if needed:
        keys = jnp.tile(jax.random.split(tuning_key, tuning_seeds), len(rates))
        areas = run("tuning", np.repeat(rates, tuning_seeds), keys).area().reshape(len(rates), tuning_seeds).mean(1)
        chosen = int(np.argmax(statistics.worst_if_diverged(areas)))
        best, area = rates[chosen], float(areas[chosen])
    runs_ = run("report", np.full(num_seeds, best), jax.random.split(report_key, num_seeds))
    return Tuned(float(best), runs_, area)


def kept_runs(folder, task, optimizer, key, metadata, phase):
    """The Store of one optimizer on one task in a run's folder.

    Args:
        folder: pathlib.Path; runs/ and policies/ exist in it.
        task: tasks.Task.
        optimizer: name.
        key: draws the first states of the deterministic episodes; the same for all runs.
        metadata: anything JSON can hold, written into the policies' headers.
        phase: "tuning", or "report": a robot then also plays its deterministic episodes, and its policy is kept.
    """

    def load(run, alpha):
        arrays = read_run(folder, task.name, optimizer, phase, alpha, run)
        return None if arrays is None else arrays.get("curves")

    def save(run, alpha, curves, agent):
        arrays = {"curves": curves}
        if phase == "report" and task.play:
            arrays["deterministic"] = np.asarray(task.play(agent, key))
            header = metadata | {"task": task.name, "optimizer": optimizer, "alpha": alpha, "run": run}
            tree = {"policy": agent.params["policy"], "obs_stats": agent.obs_stats._asdict()}
            weights.save(policy_path(folder, task.name, optimizer, run), tree, header, POLICY_KIND)
        # The record comes last: where it is, everything of its run is.
        with runs.whole_file(_run_path(folder, task.name, optimizer, phase, alpha, run), "wb") as file:
            np.savez(file, **arrays)

    return Store(load, save)


def _run_path(folder, task, optimizer, phase, alpha, run):
    return folder / "runs" / f"{task}-{optimizer}-{phase}-{float(alpha)}-{run}.npz"


def policy_path(folder, task, optimizer, run):
    return folder / "policies" / f"{task}-{optimizer}-{run}.npz"


def read_run(folder, task, optimizer, phase, alpha, run):
    """{name: array} of a finished run; None if there is none, or if a crashed machine left it damaged: it is then made again."""
    try:
        with np.load(_run_path(folder, task, optimizer, phase, alpha, run), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except weights.UNREADABLE:
        return None


def deterministic_returns(folder, task, optimizer, alpha, num_runs):
    """The mean return of each reported run's deterministic episodes: [R]."""
    runs_ = [read_run(folder, task, optimizer, "report", alpha, run) for run in range(num_runs)]
    return np.array([run["deterministic"].mean() for run in runs_])


def load_policy(path):
    """Reads a kept policy: ({"policy": layers}, ppo.ObsStats, metadata), which tasks.play takes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, damaged, or not a chain of layers from observations to actions.
    """
    tree, metadata = weights.load(path, POLICY_KIND)
    try:
        stats = ppo.ObsStats(**tree["obs_stats"])
        layers = [tree["policy"][f"layer_{i}"] for i in range(len(tree["policy"]))]
        sizes = [stats.mean.shape[0], *(layer["bias"].shape[0] for layer in layers)]
        fits = all(layer["kernel"].shape == pair for layer, pair in zip(layers, zip(sizes, sizes[1:])))
    except (KeyError, TypeError, IndexError, AttributeError):
        fits = False
    if not fits:
        raise ValueError(f"{path} does not fit: its arrays are not a chain of layers from observations to actions")
    return {"policy": tree["policy"]}, stats, metadata
