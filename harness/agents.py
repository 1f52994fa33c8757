"""Fresh agents: trained side by side with any optimizer, and tuned like every other.

Many runs of one optimizer on a task of tasks.py share one compiled program, in which learning rate, seed and meta-parameters
are arguments. A store of kept.py saves them. A new optimizer is added here: one line in LEARNED.
"""

import functools
import itertools
import time
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

import optim4rl
from harness import statistics, tasks
from harness.kept import Store
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
    """Learning curves of R runs in K points.

    A point is the mean over the updates since the one before, for a robot an evaluation: episodes without noise.
    """

    steps: np.ndarray  # [K] environment steps so far
    returns: np.ndarray  # [R, K] mean return of the episodes; NaN from where an agent was not finite

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


@functools.cache
def _compiled(task, rule, mesh, updates):
    """Jitted (init, advance, evaluate) of many runs of one optimizer, sharded over the mesh; advance makes `updates` inner updates."""

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

    def evaluate(keys, agents):
        # The same first states at every evaluation of a run. Neither init nor advance uses this key.
        played = lambda x: task.play(x[1], jax.random.fold_in(x[0], 2), task.evaluation_episodes)
        return each(lambda x: played(x).mean(), (keys, agents._replace(opt_state=(), env_state=())))

    one, many = PartitionSpec(), PartitionSpec("units")
    shard = lambda f, ins: jax.jit(jax.shard_map(f, mesh=mesh, in_specs=ins, out_specs=many, check_vma=False))
    return shard(init, (one, many, many)), shard(advance, (one, many, many, many, one)), shard(evaluate, (many, many))


def train(task, optimizer, alphas, keys, mesh, steps=None, progress=lambda part: None, store=Store()):
    """Trains R fresh agents side by side.

    Args:
        task: tasks.Task.
        optimizer: Optimizer.
        alphas, keys: [R] learning rate and PRNG key of each run.
        mesh: jax.sharding.Mesh with the axis "units".
        steps: environment steps of each run; None: the task's own.
        progress: called with the fraction of the work done since the last call.
        store: Store of runs; what it holds is not run again.
    Returns:
        Runs
    """
    num_updates = max(1, round((steps or task.steps) / task.steps_per_update))
    updates = max(1, num_updates // POINTS)
    points = round(num_updates / updates)
    rule = make_rule(optimizer.name, optimizer.inputs, points * updates * task.optimizer_steps)
    compiled = _compiled(task, rule, mesh, updates)
    # The points with an evaluation: evenly spaced, the last one among them
    due = np.diff(np.arange(points + 1) * min(task.evaluations, points) // points) > 0
    finished = [store.load(run, float(alpha)) for run, alpha in enumerate(alphas)]
    finished = [curves if np.shape(curves) == (3 + due.any(), points) else None for curves in finished]
    left = {run for run, curves in enumerate(finished) if curves is None}
    progress(1 - len(left) / len(alphas))
    for group in _groups(len(alphas), mesh, task.side_by_side):
        new = left & set(group.tolist())
        if not new:
            continue
        which = np.stack([group, np.asarray(alphas, float)[group]])
        args = (optimizer.meta_params, jnp.asarray(alphas, jnp.float32)[group], keys[group])
        share = lambda n: progress(n * len(new) / len(alphas) / points)
        learned, curves = _live(compiled, args, which, due, mesh, share, store)
        for run in new:
            i = group.tolist().index(run)
            finished[run] = curves[i]
            store.save(run, float(alphas[run]), curves[i], jax.tree.map(lambda x: x[i], learned))
        store.forget()
        left -= new
    env_steps = (1 + np.arange(points)) * updates * task.steps_per_update
    return_sums, episodes, finite, *evaluated = np.stack(finished, axis=1)
    if evaluated:
        return Runs(env_steps[due], np.where(finite > 0, evaluated[0], np.nan)[:, due])
    return Runs(env_steps, mean_returns(return_sums, episodes, finite))


def _live(compiled, args, which, due, mesh, progress, store):
    """The life of a group of agents, from where the store has it: (agents without environments, curves [S, 3 or 4, K]).

    compiled: of _compiled; args: (meta_params, alphas [S], keys [S]); which: as in Store; due: [K] bool, with an evaluation.
    """
    init, advance, evaluate = compiled
    curves = np.full((which.shape[1], 3 + due.any(), len(due)), np.nan)
    like = (jax.eval_shape(init, *args), curves, np.array(0))
    if kept := store.resume(which, like):
        agents, curves, first = kept
        agents = jax.device_put(agents, jax.NamedSharding(mesh, PartitionSpec("units")))
    else:
        agents, first = init(*args), np.array(0)
    progress(int(first))
    saved = time.monotonic()
    for point in range(int(first), len(due)):
        agents, curves[:, :3, point] = advance(*args, agents, point)
        if due[point]:
            curves[:, 3, point] = evaluate(args[-1], agents)
        keep = functools.partial(store.keep, which, (agents, curves, np.array(point + 1)))
        if time.monotonic() - saved > store.seconds:
            keep()
            saved = time.monotonic()
        try:
            progress(1)
        except SystemExit:  # the run is stopped
            keep()
            raise
    return jax.device_get(agents._replace(opt_state=(), env_state=())), curves


def _groups(num_runs, mesh, most=None):
    """The runs in groups that run side by side, [G, S], the last filled up with repetitions; after a resume the same groups."""
    # A CPU is fastest with one run per device, and all groups share one compiled program; an accelerator takes all at once.
    per_device = 1 if _on_cpu(mesh) else -(-min(num_runs, most or num_runs) // mesh.devices.size)
    size = mesh.devices.size * per_device
    return np.resize(np.arange(num_runs), (-(-num_runs // size), size))


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


def tune(
    task, optimizer, rates, key, mesh, steps=None, progress=lambda part: None, store=Store(), tuning_seeds=TUNING_SEEDS
):
    """The best of some learning rates by area on a few tuning seeds: (alpha, its mean area). Arguments as in tuned and train."""
    keys = jnp.tile(jax.random.split(jax.random.split(key)[0], tuning_seeds), len(rates))
    result = train(task, optimizer, np.repeat(rates, tuning_seeds), keys, mesh, steps, progress, store)
    areas = result.area().reshape(len(rates), tuning_seeds).mean(1)
    chosen = int(np.argmax(statistics.worst_if_diverged(areas)))
    return float(rates[chosen]), float(areas[chosen])


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

    A baseline runs the tuning seeds also where it has one learning rate: by them the better baseline is chosen; with no
    tuning seeds the first rate is taken. Arguments as in train; store: phase, "tuning" or "report", -> Store.
    """
    needed = tuning_seeds > 0 and (len(rates) > 1 or optimizer.name in statistics.BASELINES)
    share = len(rates) * tuning_seeds * needed / (len(rates) * tuning_seeds * needed + num_seeds)
    alpha, area = float(rates[0]), np.nan
    if needed:
        of_tuning = lambda part: progress(share * part)
        alpha, area = tune(task, optimizer, rates, key, mesh, steps, of_tuning, store("tuning"), tuning_seeds)
    keys, of_report = jax.random.split(jax.random.split(key)[1], num_seeds), lambda part: progress((1 - share) * part)
    runs_ = train(task, optimizer, np.full(num_seeds, alpha), keys, mesh, steps, of_report, store("report"))
    return Tuned(alpha, runs_, area)
