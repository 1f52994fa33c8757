"""What is kept of agents on disk, so that no run is made twice and one under way is not lost.

| file in a run's folder | holds | shape |
|---|---|---|
| runs/TASK-OPTIMIZER-PHASE-ALPHA-RUN.npz | curves: in training, sums of episode returns, numbers of episodes, 1 while the agent is finite | [3, K] |
| | and of a robot, the mean return of its evaluation; NaN at points without one | [4, K] |
| runs/TASK-OPTIMIZER-PHASE.under_way | which: run and alpha of each agent of the group that is being trained | [2, S] |
| | 0, 1 ...: leaves of its state: whole agents, curves, points so far; deleted when the group is finished | [S, ...] |
| policies/TASK-OPTIMIZER-RUN.npz | policy/layer_0/kernel ..., obs_stats/mean ...: what tasks.play needs | [in, out], [D] |
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

import ppo
from harness import weights

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


def kept_runs(folder, task, optimizer, seconds, phase):
    """The Store of one optimizer on one task in a run's folder.

    Args:
        folder: pathlib.Path; it gets runs/ and, of robots, policies/.
        task, optimizer: tasks.Task; name.
        seconds: between two saves of the agents under way.
        phase: "tuning", or "report": a robot's policy is then kept, too.
    """

    def load(run, alpha):
        return _read(run_path(folder, task.name, optimizer, phase, alpha, run)).get("curves")

    def save(run, alpha, curves, agent):
        if phase == "report" and task.play:
            header = {"task": task.name, "optimizer": optimizer, "alpha": alpha, "run": run}
            tree = {"policy": agent.params["policy"], "obs_stats": agent.obs_stats._asdict()}
            weights.save(policy_path(folder, task.name, optimizer, run), tree, header, POLICY_KIND)
        # The record comes last: where it is, everything of its run is.
        weights.write_arrays(run_path(folder, task.name, optimizer, phase, alpha, run), {"curves": curves})

    def resume(which, like):
        leaves, structure = jax.tree.flatten(like)
        arrays = _read(under_way)
        if not np.array_equal(arrays.pop("which", None), which):
            return None
        fits = [(x.shape, x.dtype) for x in arrays.values()] == [(x.shape, x.dtype) for x in leaves]
        return jax.tree.unflatten(structure, arrays.values()) if fits else None

    def keep(which, state):
        leaves = jax.device_get(jax.tree.leaves(state))
        weights.write_arrays(under_way, {"which": which} | {str(i): leaf for i, leaf in enumerate(leaves)})

    under_way = folder / "runs" / f"{task.name}-{optimizer}-{phase}.under_way"
    return Store(load, save, resume, keep, lambda: under_way.unlink(missing_ok=True), seconds)


def run_path(folder, task, optimizer, phase, alpha, run):
    return folder / "runs" / f"{task}-{optimizer}-{phase}-{float(alpha)}-{run}.npz"


def policy_path(folder, task, optimizer, run):
    return folder / "policies" / f"{task}-{optimizer}-{run}.npz"


def _read(path):
    """{name: array} of a file; {} if there is none, or if a crashed machine left it damaged: its runs are made again."""
    try:
        return weights.read_arrays(path)
    except Exception:  # whatever a broken file makes its reader raise
        return {}


def load_policy(path):
    """Reads a kept policy: ({"policy": layers}, ppo.ObsStats, metadata), which tasks.play takes. Errors as in weights.load."""
    tree, metadata = weights.load(path, POLICY_KIND)
    return {"policy": tree["policy"]}, ppo.ObsStats(**tree["obs_stats"]), metadata
