"""What both programs share: fresh agents trained with an optimizer, tuned like every other, and the table that compares them.

Many runs of one optimizer on a task of suite.py share one compiled program, in which learning rate, seed and
meta-parameters are arguments.
"""

import functools
import warnings
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
from jax.sharding import PartitionSpec

import baselines
import gated_adam
import optim4rl
import suite

# Learned optimizers, each with weights of its own
LEARNED = {
    "optim4rl": optim4rl.OPTIM4RL,
    "linear_optim": baselines.LINEAR_OPTIM,
    "l2lgd2": baselines.L2LGD2,
    "star": baselines.STAR,
    "gated_adam": gated_adam.GATED_ADAM,
}
# name -> (meta_params, alpha) -> optax.GradientTransformation; "untrained" is Optim4RL before meta-training: sign descent;
# untrained_NAME is what another learned optimizer is then
OPTIMIZERS = {
    "optim4rl": optim4rl.optim4rl,
    "untrained": optim4rl.optim4rl,
    "adam": lambda meta_params, alpha: optax.adam(alpha),
    "rmsprop": lambda meta_params, alpha: optax.rmsprop(alpha),
}
DEFAULT_OPTIMIZERS = tuple(OPTIMIZERS)
OPTIMIZERS |= {name: learned.make for name, learned in LEARNED.items()}
UNTRAINED = {name: "untrained" if name == "optim4rl" else f"untrained_{name}" for name in LEARNED}
OPTIMIZERS |= {UNTRAINED[name]: learned.make for name, learned in LEARNED.items()}
# The memory that untrained GatedAdam has, b2 = 0.99 and bias-corrected, without its form
OPTIMIZERS |= {
    "adam_99": lambda meta_params, alpha: optax.adam(alpha, b2=0.99),
    "rmsprop_99": lambda meta_params, alpha: optax.rmsprop(alpha, decay=0.99, bias_correction=True),
}
COLORS = dict(
    zip(
        OPTIMIZERS,
        ("tab:red", "tab:gray", "tab:blue", "tab:green", "tab:orange", "tab:purple", "tab:brown", "tab:pink")
        + ("tab:olive", "tab:cyan", "black", "gold", "navy", "darkgreen"),
    )
)
BASELINES = ("adam", "rmsprop")  # designed by hand
TUNING_SEEDS = 2


def untrained_params(key):
    """{name in UNTRAINED.values(): meta_params before meta-training}."""
    return {UNTRAINED[name]: learned.init(key) for name, learned in LEARNED.items()}


def alpha_factor(optimizer):
    """What a grid of alphas is multiplied by for an optimizer of that name."""
    # Before meta-training these two are SGD, whose steps are as small as gradients are (1e-3 to 1e-1 here), where the
    # others' steps are about alpha: with the same alphas no agent of theirs would learn.
    return 100.0 if optimizer.endswith(("linear_optim", "l2lgd2")) else 1.0


class Runs(NamedTuple):
    """Learning curves of R runs in K points; a point is the mean over the updates since the one before."""

    steps: np.ndarray  # [K] environment steps so far
    returns: np.ndarray  # [R, K] mean return of the episodes that ended

    def area(self):
        """Mean return over the whole run: [R]."""
        return self.returns.mean(1)

    def final(self):
        """Mean return over the last fifth of the run, at least one point: [R]."""
        return self.returns[:, -max(1, self.returns.shape[1] // 5) :].mean(1)


class Store(NamedTuple):
    """Where finished runs are kept, so that none is run twice: a pair of functions, by default of a store that keeps nothing."""

    load: Callable = lambda run, alpha: None  # (number of the run, alpha) -> curves [2, K], or None: not run yet
    # Called when a run is finished; the agent comes without its environments and its optimizer's state.
    save: Callable = lambda run, alpha, curves, agent: None


@functools.cache
def _compiled(task, rule, mesh, updates):
    """Jitted (init, advance) of many runs of one optimizer, sharded over the mesh; advance makes `updates` updates."""

    def make(meta_params, alpha):
        return suite.clipped(task.name, rule(meta_params, alpha))

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


def train(task, optimizer, meta_params, alphas, keys, mesh, steps=None, progress=lambda n: None, store=Store()):
    """Trains R fresh agents side by side.

    Args:
        task: suite.Task.
        optimizer: a name in OPTIMIZERS.
        meta_params: the learned optimizer's, or None.
        alphas, keys: [R] learning rate and PRNG key of each run.
        mesh: jax.sharding.Mesh with the axis "units".
        steps: environment steps of each run; None: the task's own.
        progress: called with the fraction of the work done since the last call.
        store: Store of finished runs; what it holds is not run again.
    Returns:
        Runs
    """
    num_updates = max(1, round((steps or task.steps) / task.steps_per_update))
    updates = max(1, num_updates // 50)
    points = round(num_updates / updates)
    init, advance = _compiled(task, OPTIMIZERS[optimizer], mesh, updates)
    finished = [store.load(run, float(alpha)) for run, alpha in enumerate(alphas)]
    left = np.array([run for run, curves in enumerate(finished) if curves is None], int)
    progress(1 - len(left) / len(alphas))
    for group in _groups(left, len(alphas), mesh):
        run_alphas, run_keys = jnp.asarray(alphas, jnp.float32)[group], keys[group]
        agents = init(meta_params, run_alphas, run_keys)
        curves = np.zeros((2, len(group), points))  # sums of returns, numbers of episodes
        for point in range(points):
            agents, sums = advance(meta_params, run_alphas, run_keys, agents, point)
            curves[:, :, point] = jax.device_get(sums)
            progress(len(set(group)) / len(alphas) / points)
        learned = jax.device_get(agents._replace(opt_state=(), env_state=()))
        for i, run in enumerate(group):
            if finished[run] is None:
                finished[run] = curves[:, i]
                store.save(int(run), float(alphas[run]), curves[:, i], jax.tree.map(lambda x: x[i], learned))
    env_steps = (1 + np.arange(points)) * updates * task.steps_per_update
    return Runs(env_steps, _fill(*np.stack(finished, axis=1)))


def _groups(left, num_runs, mesh):
    """The runs that are left, [L] of num_runs, in groups that run side by side: [G, S], the last filled up with repetitions."""
    # A CPU is fastest with one run a device, and all groups share one compiled program; an accelerator takes all at once,
    # and the same number after a resume, when fewer are left: their arithmetic is that of one program.
    per_device = 1 if _on_cpu(mesh) else -(-num_runs // mesh.devices.size)
    size = mesh.devices.size * per_device
    return np.resize(left, (-(-len(left) // size), size))


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


def tuned(
    task,
    optimizer,
    meta_params,
    rates,
    num_seeds,
    key,
    mesh,
    steps=None,
    progress=lambda n: None,
    store=lambda phase: Store(),
):
    """The best of some learning rates on TUNING_SEEDS seeds, and Runs with it on num_seeds fresh ones: (alpha, Runs).

    Arguments as in train; store: phase, "tuning" or "report", -> Store.
    """
    tuning_key, report_key = jax.random.split(key)
    num_tuning = len(rates) * TUNING_SEEDS if len(rates) > 1 else 0

    def run(phase, alphas, keys):
        part = len(alphas) / (num_tuning + num_seeds)
        share = lambda n: progress(part * n)
        return train(task, optimizer, meta_params, alphas, keys, mesh, steps, share, store(phase))

    best = rates[0]
    if num_tuning:
        keys = jnp.tile(jax.random.split(tuning_key, TUNING_SEEDS), len(rates))
        runs = run("tuning", np.repeat(rates, TUNING_SEEDS), keys)
        scores = np.nan_to_num(runs.area(), nan=-np.inf).reshape(len(rates), TUNING_SEEDS).mean(1)
        best = rates[int(np.argmax(scores))]
    return best, run("report", np.full(num_seeds, best), jax.random.split(report_key, num_seeds))


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


def scores(areas, baselines=BASELINES, resamples=2000):
    """Each optimizer's area under the return curve, in units of the better baseline's, over tasks and seeds.

    Args:
        areas: {(task, optimizer): [R]}, one number a run. A task counts if it has all baselines, the better one above zero.
        baselines: names of optimizers; the better one of a task is that of the higher interquartile mean.
        resamples: of the runs of each task and optimizer, the baseline's too.
    Returns:
        {optimizer: (interquartile mean over all tasks and runs, low, high)}, a 95% bootstrap interval.
    """
    iqm = lambda x, axis=None: scipy.stats.trim_mean(x, 0.25, axis=axis)
    tasks = [task for task in dict.fromkeys(task for task, _ in areas) if all((task, b) in areas for b in baselines)]
    better = {task: max(baselines, key=lambda name: iqm(areas[task, name])) for task in tasks}
    better = {task: b for task, b in better.items() if iqm(areas[task, b]) > 0}  # nothing has a ratio to a loss
    random, result = np.random.default_rng(0), {}
    for optimizer in dict.fromkeys(name for _, name in areas):
        ratios = []  # of each task: [1 + resamples, R], the runs themselves first
        for task in (task for task in better if (task, optimizer) in areas):
            draws = []
            for name in (optimizer, better[task]):
                values = np.asarray(areas[task, name], float)
                chosen = random.integers(values.size, size=(resamples, values.size))
                draws.append(np.concatenate([values[None], values[chosen]]))
            ratios.append(draws[0] / iqm(draws[1], axis=1)[:, None])
        if ratios:
            mean, *resampled = iqm(np.concatenate(ratios, axis=1), axis=1)
            result[optimizer] = (float(mean), *map(float, np.percentile(resampled, (2.5, 97.5))))
    return result


def scores_text(scores, unit):
    """What scores returned, in units of what unit names: a heading, and a line for each optimizer."""
    lines = [f"Area under the return curve / that of {unit}, all tasks and seeds:"]
    lines += [f"  {name:22} {x:.3f} [{low:.3f}, {high:.3f}]" for name, (x, low, high) in scores.items()]
    return "\n".join(lines)


def summarize(task, optimizer, alpha, runs):
    """One row of the table as a dict."""
    row = {
        "task": task.name,
        "optimizer": optimizer,
        "alpha": alpha,
        "seeds": len(runs.returns),
        "steps": int(runs.steps[-1]),
    }
    for name, values in (("final", runs.final()), ("area", runs.area())):
        row[name], row[f"{name}_low"], row[f"{name}_high"] = map(float, interval(values))
    return row


def table(rows):
    """The rows as text: interquartile means and 95% bootstrap intervals over seeds; robots have also the deterministic episodes."""
    cell = lambda row, name: f"{row[name]:9.2f}  [{row[name + '_low']:.2f}, {row[name + '_high']:.2f}]"
    columns = {"final": "return, last fifth", "area": "return, whole run", "deterministic": "return without noise"}
    columns = {name: title for name, title in columns.items() if any(name in row for row in rows)}
    titles = " ".join(f"{title:30}" for title in columns.values())
    lines = [f"{'task':25} {'optimizer':22} {'alpha':>7}   {titles}".rstrip()]
    for before, row in zip([None, *rows], rows):
        if before and before["task"] != row["task"]:
            lines.append("")
        cells = " ".join(f"{cell(row, name) if name in row else '':30}" for name in columns)
        lines.append(f"{row['task']:25} {row['optimizer']:22} {row['alpha']:7.0e}   {cells}".rstrip())
    return "\n".join(lines)
