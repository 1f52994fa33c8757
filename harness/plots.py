"""Pictures: learning curves of fresh agents, curves of a meta-training run, the step that a learned optimizer takes.

One colour per optimizer everywhere; a learned optimizer before meta-training has the same colour, dashed.
"""

import math
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from harness import agents, runs, statistics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_ORDER = (*agents.LEARNED, *agents.HAND_DESIGNED)


def style(optimizer):
    """Colour and line of an optimizer, as keyword arguments of Axes.plot."""
    base = agents.UNTRAINED.get(optimizer, optimizer)
    color = f"C{_ORDER.index(base)}" if base in _ORDER else "black"
    return {"color": color, "linestyle": "-" if base == optimizer else "--"}


def learning_curves(path, results):
    """Writes a picture of {(task, optimizer): agents.Tuned}; returns its path.

    One panel per task: interquartile means over runs, each smoothed over a tenth of its length, with intervals (see
    statistics.interval).
    """
    tasks = list(dict.fromkeys(task for task, _ in results))
    columns = len(tasks) if len(tasks) <= 4 else 3
    grid = -(-len(tasks) // columns), columns
    size = 2 + 4 * columns, 3.4 * grid[0]
    figure, axes = plt.subplots(*grid, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(tasks) :]:
        axis.remove()
    lines = {}
    for (task, optimizer), tuned in results.items():
        steps, returns = tuned.runs
        axis, window = axes.flat[tasks.index(task)], max(1, len(steps) // 10)
        smooth = np.lib.stride_tricks.sliding_window_view(returns, window, axis=1).mean(-1)
        mean, low, high = np.transpose([statistics.interval(values) for values in smooth.T])
        (lines[optimizer],) = axis.plot(steps[window - 1 :], mean, **style(optimizer))
        color = style(optimizer)["color"]
        axis.fill_between(steps[window - 1 :], low, high, alpha=0.2, color=color, linewidth=0)
        axis.set(title=f"{task} ({len(returns)} seeds)", xlabel="environment steps", ylabel="episode return")
        axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    figure.legend(lines.values(), lines.keys(), frameon=False, loc="outside right upper")
    return save(figure, path)


def meta_training(path, rows, tasks):
    """Meta-loss and episode return of each task over the meta-steps, smoothed over 20 of them, from the rows of metrics.csv."""
    size = (1 + 4 * len(tasks), 5.4)
    figure, axes = plt.subplots(2, len(tasks), figsize=size, sharex=True, squeeze=False, layout="constrained")
    for task, column in zip(tasks, axes.T):
        for axis, name in zip(column, ("meta_loss", "episode_return")):
            known = [row for row in rows if row[f"{task}/{name}"] != ""]
            steps = [int(row["meta_step"]) for row in known]
            values = [float(row[f"{task}/{name}"]) for row in known]
            window = max(1, min(20, len(values)))
            smooth = np.convolve(values or [math.nan], np.ones(window) / window, "valid")[: len(steps)]
            axis.plot(steps[window - 1 :], smooth)
        column[0].set_title(task)
        column[1].set_xlabel("meta-step")
    axes[0, 0].set_ylabel("meta-loss")
    axes[1, 0].set_ylabel("episode return of all units")
    return save(figure, path)


@partial(jax.jit, static_argnums=(0, 3))
def learned_step(make, meta_params, sizes, updates):
    """The size of a learned optimizer's step with alpha = 1 over an agent's age, for gradients of constant size.

    Args:
        make: (learning_rate, meta_params) -> optax transformation, for example optim4rl.optim4rl.
        meta_params: its meta-parameters.
        sizes: [N] absolute gradients of N scalars, positive throughout.
        updates: ages to look at, T.
    Returns: [T, N] |update|.
    """
    optimizer, grads = make(1.0, meta_params), jnp.asarray(sizes)
    step = lambda state, _: optimizer.update(grads, state, jnp.zeros_like(grads))[::-1]
    return jnp.abs(jax.lax.scan(step, optimizer.init(jnp.zeros_like(grads)), length=updates)[1])


def save(figure, path):
    """Writes the picture and returns its path."""
    try:
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise runs.UsageError(f"cannot write {path}: {error.strerror}; choose another folder") from None
    plt.close(figure)
    return path
