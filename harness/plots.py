"""Pictures: learning curves of fresh agents, curves of a meta-training run, the step that a learned optimizer takes.

One colour per optimizer everywhere; a learned optimizer before meta-training has the same colour, dashed.
"""

import csv
import math
import pathlib

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


def read_curves(folders):
    """{(task, optimizer): (steps [K], returns [R, K])} from the curves.csv of evaluate.py's folders."""
    curves = {}
    for folder in folders:
        rows, path = {}, pathlib.Path(folder) / "curves.csv"
        try:
            with open(path, newline="") as file:
                for row in csv.DictReader(file):
                    of_pair = rows.setdefault((row["task"], row["optimizer"]), {})
                    of_pair.setdefault(int(row["run"]), {})[int(row["step"])] = float(row["episode_return"])
        except OSError:
            raise runs.UsageError(f"no file {path}; python evaluate.py --out {folder} makes it") from None
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise runs.UsageError(f"{path} is not a curves.csv of evaluate.py ({error!r})") from None
        for name, of_pair in rows.items():
            steps = sorted(of_pair[0]) if 0 in of_pair else []
            if name in curves or any(sorted(run) != steps for run in of_pair.values()):
                raise runs.UsageError(f"{path}: the runs of {name[1]} on {name[0]} are incomplete, or in two folders")
            curves[name] = np.array(steps), np.array([[run[step] for step in steps] for run in of_pair.values()])
    return curves


def learning_curves(path, folders):
    """Writes a picture of the curves.csv in folders; returns its path.

    One panel per task: interquartile means over runs, each smoothed over a tenth of its length, with intervals (see
    statistics.interval).
    """
    curves = read_curves(folders)
    tasks = list(dict.fromkeys(task for task, _ in curves))
    if not tasks:
        raise runs.UsageError(f"no runs in {', '.join(map(str, folders))}")
    columns = len(tasks) if len(tasks) <= 4 else 3
    grid = -(-len(tasks) // columns), columns
    size = 2 + 4 * columns, 3.4 * grid[0]
    figure, axes = plt.subplots(*grid, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(tasks) :]:
        axis.remove()
    lines = {}
    for (task, optimizer), (steps, returns) in curves.items():
        axis, window = axes.flat[tasks.index(task)], max(1, len(steps) // 10)
        returns = np.lib.stride_tricks.sliding_window_view(returns, window, axis=1).mean(-1)
        mean, low, high = np.transpose([statistics.interval(values) for values in returns.T])
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


def learned_step(optimizer, sizes, updates):
    """The size of a learned optimizer's step over an agent's age, for gradients of constant size.

    Args:
        optimizer: optax transformation, for example of agents.make_rule, with alpha = 1.
        sizes: [N] absolute gradients of N scalars, positive throughout.
        updates: ages to look at, T.
    Returns: [T, N] |update|.
    """
    grads = jnp.asarray(sizes)
    step = lambda state, _: optimizer.update(grads, state, jnp.zeros_like(grads))[::-1]
    return np.abs(jax.lax.scan(step, optimizer.init(jnp.zeros_like(grads)), length=updates)[1])


def save(figure, path):
    """Writes the picture and returns its path."""
    try:
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise runs.UsageError(f"cannot write {path}: {error.strerror}; choose another folder") from None
    plt.close(figure)
    return path
