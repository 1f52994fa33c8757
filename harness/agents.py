"""Fresh agents: trained side by side with any optimizer, and tuned like every other.

Many runs of one optimizer on a task of tasks.py share one compiled program, in which learning rate, seed and meta-parameters
are arguments. A store of kept.py saves them. A new optimizer is added here: one line in LEARNED.
"""

import functools
import itertools
import time
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from tqdm import tqdm

import optim4rl
import pipeline
from harness import statistics, stops, tasks
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
# At optax's defaults, with a constant step
HAND_DESIGNED = {"sign_descent": optax.sign_sgd, "adam": optax.adam, "rmsprop": optax.rmsprop}
# Adam and RMSProp with every setting that helps them: {name: (kind, memory, bias correction, falling step)}. The step falls
# linearly to 0 over the run. (Adam's defaults and RMSProp's are HAND_DESIGNED already.)
VARIANTS = {
    f"{kind}_{memory}{'_corrected' * corrected}{'_falling' * falls}": (kind, memory, corrected, falls)
    for kind, corrected in (("adam", True), ("rmsprop", False), ("rmsprop", True))  # Adam corrects always
    for memory, falls in itertools.product((0.9, 0.99, 0.999), (False, True))
    if (kind, memory, corrected, falls) not in (("adam", 0.999, True, False), ("rmsprop", 0.9, False, False))
}
UNTRAINED = {f"untrained_{name}": name for name in LEARNED}  # a learned optimizer before meta-training
NAMES = (*LEARNED, *HAND_DESIGNED, *UNTRAINED, *VARIANTS)
RECURRENT = ("optim4rl", "linear_optim", "l2lgd2")  # networks that see the gradient itself
INPUTS = ("normalised", "raw")
TUNING_SEEDS = 2
POINTS = 50  # of a learning curve


class Optimizer(NamedTuple):
    """What agents are trained with."""

    name: str  # one of NAMES; with `make` any name
    meta_params: Any = None  # of a learned optimizer
    inputs: str = "raw"  # one of INPUTS
    make: Callable | None = None  # (learning_rate, meta_params, num_steps) -> optax transformation, instead of its name


@functools.cache
def make_rule(name, inputs="raw", num_steps=1, make=None):
    """(learning_rate, meta_params) -> optax transformation, for a name in NAMES; num_steps: optimizer steps of the whole run.

    make: Optimizer.make, in place of what the name stands for.
    """
    if make is not None:
        return functools.partial(make, num_steps=num_steps)
    if name in HAND_DESIGNED:
        return lambda learning_rate, meta_params: HAND_DESIGNED[name](learning_rate)
    if name in VARIANTS:
        return lambda learning_rate, meta_params: _variant(*VARIANTS[name], learning_rate, num_steps)
    name = UNTRAINED.get(name, name)
    make = LEARNED[name].make
    if name == "velo":  # it plans its steps for the whole run
        make = functools.partial(make, num_steps=num_steps)
    if not sees_ratios(name, inputs):
        return make
    return lambda learning_rate, meta_params: normalised(make(learning_rate, meta_params))


def sees_ratios(name, inputs):
    """Whether the networks of a learned optimizer are fed g / RMS(g); the others either see g or need no inputs."""
    return inputs == "normalised" and name in RECURRENT


def _variant(kind, memory, corrected, falls, learning_rate, num_steps):
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
    runs: Runs | None  # with fresh seeds; None: only tuned
    tuning_area: float  # mean area with that alpha on the tuning seeds; NaN where there was nothing to tune


# Few at a time: on a robot the programs of one optimizer take 2,500 memory maps, of which Linux gives a process 65,530.
@functools.lru_cache(maxsize=4)
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
            finite = pipeline.all_finite(agent.params)
            return agent, jnp.stack([metrics["episode_return_sum"].sum(), metrics["episodes"].sum(), finite])

        return each(live, (alphas, keys, agents))

    def evaluate(keys, agents):
        # The same first states at every evaluation of a run. Neither init nor advance uses this key.
        played = lambda x: task.play(x[1], jax.random.fold_in(x[0], 2), task.evaluation_episodes)
        return each(lambda x: played(x).mean(), (keys, agents._replace(opt_state=(), env_state=())))

    one, many = PartitionSpec(), PartitionSpec("units")
    shard = lambda f, ins: jax.jit(jax.shard_map(f, mesh=mesh, in_specs=ins, out_specs=many, check_vma=False))
    return shard(init, (one, many, many)), shard(advance, (one, many, many, many, one)), shard(evaluate, (many, many))


def train(task, optimizer, alphas, keys, mesh, steps=None, store=Store()):
    """Trains R fresh agents side by side, under a progress bar.

    Args:
        task: tasks.Task.
        optimizer: Optimizer.
        alphas, keys: [R] learning rate and PRNG key of each run.
        mesh: jax.sharding.Mesh with the axis "units".
        steps: environment steps of each run; None: the task's own.
        store: Store of runs; what it holds is not run again.
    Returns:
        Runs
    Raises:
        SystemExit: a signal came (stops.py); the agents under way are in the store.
    """
    num_updates = max(1, round((steps or task.steps) / task.steps_per_update))
    updates = max(1, num_updates // POINTS)
    points = round(num_updates / updates)
    num_steps = points * updates * task.optimizer_steps
    rule = make_rule(optimizer.name, optimizer.inputs, num_steps, optimizer.make)
    compiled = _compiled(task, rule, mesh, updates)
    # The points with an evaluation: evenly spaced, the last one among them
    due = np.diff(np.arange(points + 1) * min(task.evaluations, points) // points) > 0
    finished = [store.load(run, float(alpha)) for run, alpha in enumerate(alphas)]
    finished = [curves if np.shape(curves) == (3 + due.any(), points) else None for curves in finished]
    title = f"{task.name} {optimizer.name}, {len(alphas)} agents"
    with tqdm(total=len(alphas) * points, desc=title, unit="point", leave=None, dynamic_ncols=True) as bar:
        bar.update(points * sum(curves is not None for curves in finished))
        for group in _groups(len(alphas), mesh, task.side_by_side):
            new = {run: i for i, run in enumerate(group.tolist()) if finished[run] is None}
            if not new:
                continue
            which = np.stack([group, np.asarray(alphas, float)[group]])
            args = (optimizer.meta_params, jnp.asarray(alphas, jnp.float32)[group], keys[group])
            learned, curves = _live(compiled, args, which, due, mesh, lambda n: bar.update(n * len(new)), store)
            for run, i in new.items():
                finished[run] = curves[i]
                store.save(run, float(alphas[run]), curves[i], jax.tree.map(lambda x: x[i], learned))
            store.forget()
    env_steps = (1 + np.arange(points)) * updates * task.steps_per_update
    return_sums, episodes, finite, *evaluated = np.stack(finished, axis=1)
    if evaluated:
        return Runs(env_steps[due], np.where(finite > 0, evaluated[0], np.nan)[:, due])
    return Runs(env_steps, mean_returns(return_sums, episodes, finite))


def _live(compiled, args, which, due, mesh, progress, store):
    """The life of a group of agents, from where the store has it: (agents without environments, curves [S, 3 or 4, K]).

    compiled: of _compiled; args: (meta_params, alphas [S], keys [S]); which: as in Store; due: [K] bool, with an evaluation;
    progress: called with the number of new points.
    """
    init, advance, evaluate = compiled
    curves = np.full((which.shape[1], 3 + due.any(), len(due)), np.nan)
    like = (jax.eval_shape(init, *args), curves, np.array(0))
    agents, curves, first = store.resume(which, like) or (init(*args), curves, 0)
    agents = jax.device_put(agents, jax.NamedSharding(mesh, PartitionSpec("units")))
    progress(int(first))
    stops.end_if_received()
    saved = time.monotonic()
    for point in range(int(first), len(due)):
        agents, curves[:, :3, point] = advance(*args, agents, point)
        if due[point]:
            curves[:, 3, point] = evaluate(args[-1], agents)
        if stops.received() or time.monotonic() - saved > store.seconds:
            store.keep(which, (agents, curves, np.array(point + 1)))
            saved = time.monotonic()
            stops.end_if_received()
        progress(1)
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
    first = np.argmax(episodes > 0, axis=1, keepdims=True)
    last_known = np.maximum.accumulate(np.where(episodes > 0, np.arange(episodes.shape[1]), first), axis=1)
    return np.where(finite > 0, np.take_along_axis(returns, last_known, axis=1), np.nan)


def tuned(
    task, optimizer, rates, num_seeds, key, mesh, steps=None, store=lambda phase: Store(), tuning_seeds=TUNING_SEEDS
):
    """The best of some learning rates by area on a few tuning seeds, then runs with it on num_seeds fresh ones: Tuned.

    One learning rate is tried on the tuning seeds only where that says something: for a baseline, since by them the better
    one is chosen, and where num_seeds is 0. With no tuning seeds the first rate is taken. Arguments as in train; store:
    phase, "tuning" or "report", -> Store.
    """
    tuning_key, report_key = jax.random.split(key)
    alpha, area, fresh = float(rates[0]), np.nan, None
    if tuning_seeds and (len(rates) > 1 or optimizer.name in statistics.BASELINES or not num_seeds):
        alphas, keys = np.repeat(rates, tuning_seeds), jnp.tile(jax.random.split(tuning_key, tuning_seeds), len(rates))
        result = train(task, optimizer, alphas, keys, mesh, steps, store("tuning"))
        areas = statistics.worst_if_diverged(result.area().reshape(len(rates), tuning_seeds).mean(1))
        alpha, area = float(rates[np.argmax(areas)]), float(areas.max())
    if num_seeds:
        keys = jax.random.split(report_key, num_seeds)
        fresh = train(task, optimizer, np.full(num_seeds, alpha), keys, mesh, steps, store("report"))
    return Tuned(alpha, fresh, area)
