"""What an evaluation keeps in its folder: every finished run, so that none is run twice, and the policies of trained robots.

| file | holds | shape |
|---|---|---|
| runs/TASK-OPTIMIZER-PHASE-ALPHA-RUN.npz | curves: sums of episode returns, numbers of episodes | [2, K] |
| | deterministic: returns of episodes without noise (a robot's reported runs) | [128] |
| policies/TASK-OPTIMIZER-RUN.npz | policy/layer_0/kernel, ...: the policy network | [in, out], [out] |
| | obs_stats/mean, ...: statistics that normalise observations | [D], count [] |
| | header: JSON with version, kind and metadata | [] |

A file is written under another name and renamed when it is complete: it is there whole or not at all, whenever the program dies.

Example, from a finished evaluation: the return of a robot that plays without noise:
    params, obs_stats, metadata = records.load_policy("runs/evaluate-.../policies/ant-adam-0.npz")
    returns = ppo.evaluate(brax_env.make(metadata["task"]), params, obs_stats, jax.random.key(0), 8)
"""

import json
import zipfile

import jax.numpy as jnp
import numpy as np

import cli
import compare
import optim4rl
import ppo

KIND = "ppo-policy"
_UNREADABLE = (OSError, EOFError, KeyError, TypeError, ValueError, RuntimeError, zipfile.BadZipFile)


def write(path, arrays):
    """Writes {name: array} as an .npz file, complete or not at all."""
    with cli.whole_file(path, "wb") as file:
        np.savez(file, **arrays)


def read(path):
    """{name: array} of an .npz file; None if there is none, or if a crashed machine left it damaged: it is then made anew."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except _UNREADABLE:
        return None


def run_path(folder, task, optimizer, phase, alpha, run):
    return folder / "runs" / f"{task}-{optimizer}-{phase}-{float(alpha)}-{run}.npz"


def policy_path(folder, task, optimizer, run):
    return folder / "policies" / f"{task}-{optimizer}-{run}.npz"


def store(folder, task, optimizer, key, metadata, phase):
    """The compare.Store of one optimizer on one task.

    Args:
        folder: pathlib.Path of the evaluation; runs/ and policies/ exist in it.
        task: suite.Task.
        optimizer: name.
        key: draws the first states of the deterministic episodes; the same for all runs.
        metadata: anything JSON can hold, written into the policies' headers.
        phase: "tuning", or "report": a robot then also plays its deterministic episodes, and its policy is kept.
    """

    def load(run, alpha):
        arrays = read(run_path(folder, task.name, optimizer, phase, alpha, run))
        return None if arrays is None else arrays.get("curves")

    def save(run, alpha, curves, agent):
        arrays = {"curves": curves}
        if phase == "report" and task.play:
            arrays["deterministic"] = np.asarray(task.play(agent, key))
            header = metadata | {"task": task.name, "optimizer": optimizer, "alpha": alpha, "run": run}
            path = policy_path(folder, task.name, optimizer, run)
            save_policy(path, agent.params, agent.obs_stats, header)
        # The record comes last: where it lies, everything of its run lies.
        write(run_path(folder, task.name, optimizer, phase, alpha, run), arrays)

    return compare.Store(load, save)


def deterministic_returns(folder, task, optimizer, alpha, num_runs):
    """The mean return of each reported run's deterministic episodes: [R]."""
    paths = [run_path(folder, task, optimizer, "report", alpha, run) for run in range(num_runs)]
    return np.array([read(path)["deterministic"].mean() for path in paths])


def save_policy(path, params, obs_stats, metadata):
    """Writes a robot's policy: params["policy"] of a ppo agent and its ppo.ObsStats; the value network is not kept."""
    optim4rl.save(path, {"policy": params["policy"], "obs_stats": obs_stats._asdict()}, metadata, KIND)


def load_policy(path):
    """Reads what save_policy wrote.

    Returns:
        ({"policy": layers}, ppo.ObsStats, metadata): what ppo.policy, ppo.normalize and ppo.evaluate take.
    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(str(arrays.pop("header")))
        version, kind, metadata = header["version"], header["kind"], header["metadata"]
        stats = ppo.ObsStats(*(jnp.asarray(arrays.pop(f"obs_stats/{name}")) for name in ppo.ObsStats._fields))
        layers = [
            {name: jnp.asarray(arrays.pop(f"policy/layer_{i}/{name}")) for name in ("kernel", "bias")}
            for i in range(len(arrays) // 2)
        ]
        sizes = [stats.mean.shape[0], *(layer["bias"].shape[0] for layer in layers)]
        fits = all(layer["kernel"].shape == pair for layer, pair in zip(layers, zip(sizes, sizes[1:])))
    except FileNotFoundError:
        raise
    except (*_UNREADABLE, IndexError) as error:
        raise ValueError(f"{path} is not a policy of this project, or is damaged ({error})") from None
    if version != optim4rl.FORMAT_VERSION or kind != KIND:
        raise ValueError(
            f"{path} holds {kind!r} of version {version}; expected {KIND!r} of version {optim4rl.FORMAT_VERSION}"
        )
    if arrays or not fits:
        raise ValueError(f"{path} does not fit: its arrays are not a chain of layers from observations to actions")
    return {"policy": {f"layer_{i}": layer for i, layer in enumerate(layers)}}, stats, metadata
