"""What is kept of agents on disk, so that no run is made twice and one under way is not lost.

| file in a run's folder | holds | shape |
|---|---|---|
| runs/TASK-OPTIMIZER-PHASE-ALPHA-RUN.npz | curves: in training, sums of episode returns, numbers of episodes, 1 while the agent is finite | [3, K] |
| | and of a robot, the mean return of its evaluation; NaN at points without one | [4, K] |
| | deterministic: returns of episodes without noise (a robot's reported runs) | [128] |
| runs/TASK-OPTIMIZER-PHASE.under_way | which: run and alpha of each agent of the group that is being trained | [2, S] |
| | 0, 1 ...: leaves of its state: whole agents, curves, points so far; deleted when the group is finished | [S, ...] |
| policies/TASK-OPTIMIZER-RUN.npz | policy/layer_0/kernel ..., obs_stats/mean ...: what tasks.play needs | [in, out], [D] |
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

import ppo
from harness import runs, tasks, weights

POLICY_KIND = "ppo-policy"
SECONDS = 60.0  # between two saves of the agents under way


class Store(NamedTuple):
    """Where runs are kept: functions, by default of a store that keeps nothing."""

    load: Callable = lambda run, alpha: None  # (number of the run, alpha) -> curves [3 or 4, K], or None: not run yet
    # Called when a run is finished; the agent comes without its environments and its optimizer's state.
    save: Callable = lambda run, alpha, curves, agent: None
    # Of a group under way; which: [2, S] numbers of its runs, and their alphas.
    resume: Callable = lambda which, like: None  # (which, state of the same shapes) -> state as it was kept, or None
    keep: Callable = lambda which, state: None  # replaces what was kept
    forget: Callable = lambda: None  # the group is finished
    seconds: float = SECONDS


def kept_runs(folder, task, optimizer, key, metadata, seconds, phase):
    """The Store of one optimizer on one task in a run's folder.

    Args:
        folder: pathlib.Path; runs/ and policies/ exist in it.
        task: tasks.Task.
        optimizer: name.
        key: draws the first states of the deterministic episodes; the same for all runs.
        metadata: anything JSON can hold, written into the policies' headers.
        seconds: between two saves of the agents under way.
        phase: "tuning", or "report": a robot then also plays its deterministic episodes, and its policy is kept.
    """

    def load(run, alpha):
        arrays = read_run(folder, task.name, optimizer, phase, alpha, run)
        return None if arrays is None else arrays.get("curves")

    def save(run, alpha, curves, agent):
        arrays = {"curves": curves}
        if phase == "report" and task.play:
            arrays["deterministic"] = np.asarray(task.play(agent, key, tasks.EVALUATION_EPISODES))
            header = metadata | {"task": task.name, "optimizer": optimizer, "alpha": alpha, "run": run}
            tree = {"policy": agent.params["policy"], "obs_stats": agent.obs_stats._asdict()}
            weights.save(policy_path(folder, task.name, optimizer, run), tree, header, POLICY_KIND)
        # The record comes last: where it is, everything of its run is.
        with runs.whole_file(_run_path(folder, task.name, optimizer, phase, alpha, run), "wb") as file:
            np.savez(file, **arrays)

    def resume(which, like):
        leaves, structure = jax.tree.flatten(like)
        arrays = _read(under_way) or {}
        found = [arrays.get(str(i)) for i in range(len(leaves))]
        fits = len(arrays) == 1 + len(leaves) and np.array_equal(arrays["which"], which)
        fits = fits and all((x.shape, x.dtype) == (y.shape, y.dtype) for x, y in zip(found, leaves))
        return jax.tree.unflatten(structure, found) if fits else None

    def keep(which, state):
        leaves = jax.device_get(jax.tree.leaves(state))
        with runs.whole_file(under_way, "wb") as file:
            np.savez(file, which=which, **{str(i): leaf for i, leaf in enumerate(leaves)})

    under_way = folder / "runs" / f"{task.name}-{optimizer}-{phase}.under_way"
    return Store(load, save, resume, keep, lambda: under_way.unlink(missing_ok=True), seconds)


def _run_path(folder, task, optimizer, phase, alpha, run):
    return folder / "runs" / f"{task}-{optimizer}-{phase}-{float(alpha)}-{run}.npz"


def policy_path(folder, task, optimizer, run):
    return folder / "policies" / f"{task}-{optimizer}-{run}.npz"


def read_run(folder, task, optimizer, phase, alpha, run):
    """{name: array} of a finished run; None if there is none."""
    return _read(_run_path(folder, task, optimizer, phase, alpha, run))


def _read(path):
    """{name: array} of an .npz file; None if there is none, or if a crashed machine left it damaged: its runs are made again."""
    try:
        with np.load(path, allow_pickle=False) as file:
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
