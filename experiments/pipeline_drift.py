"""Experiment: how close to identically distributed are the gradients of a meta-step? (paper: section 4.3; Figure 1's measure)

    python -m experiments.pipeline_drift                            # two minutes of 2 CPU cores

The paper's reason for staggered resets: at any time the units span all ages, so what the learned optimizer sees in one meta-step
has nearly the same distribution as in the next. Here 16 units as in the default of meta_train.py (small_dense_short, 64
environments, 63 meta-steps of 4 updates) are trained by RMSProp, which the default begins as. The gradients of a meta-step are
those of all units at the ages that pipeline.reset_due gives them. Their drift is drift.py's: the mean Wasserstein distance
between the histograms of log10(|g| + 1e-8) at the beginning, in the middle and at the end of a cycle of resets, in decades.

Written before the run: synchronised resets have the drift of a single agent's life, .1 to .2; staggered ones a tenth of it.

The folder receives config.json, results.csv (one row per group of units) and pipeline_drift.png.
"""

from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from jax.sharding import PartitionSpec

from experiments import contents, drift
from experiments.figure2 import reset_table
from harness import plots, runs, statistics, tasks
from harness.plots import plt

LIFE, INNER_UPDATES = 63, 4  # m, M
RESETS = ("staggered", "synchronised")


@dataclass(frozen=True)
class Config:
    num_units: int = 16  # n: units of a group, a pipeline
    groups: int = 8  # independent pipelines
    num_envs: int = 64  # environments of a unit
    learning_rate: float = 3e-2  # alpha of RMSProp
    seed: int = 0  # of everything
    devices: int | None = None  # None: as many as share the units equally, on a CPU one per core
    out: str | None = None  # folder of this run; None: a new one under runs/


def lives(config, mesh):
    """Histograms of the gradients in each meta-step of each unit's life: [groups, units, LIFE, B]."""
    learner = tasks.make("small_dense_short", config.num_envs).learner
    optimizer = drift.recorded(drift.Config(learning_rate=config.learning_rate))

    def update(agent, key):
        agent, _ = learner.update(optimizer, agent, key)
        return agent, agent.opt_state[0]

    def live(key):
        init_key, life_key = jax.random.split(key)
        keys = jax.random.split(life_key, LIFE * INNER_UPDATES)
        _, counts = jax.lax.scan(update, learner.init(init_key, optimizer), keys)
        return counts.reshape(LIFE, INNER_UPDATES, -1).sum(1)

    many = PartitionSpec("units")
    all_lives = jax.shard_map(partial(jax.lax.map, live), mesh=mesh, in_specs=many, out_specs=many, check_vma=False)
    keys = jax.random.split(jax.random.key(config.seed), config.groups * config.num_units)
    return np.asarray(jax.jit(all_lives)(keys)).reshape(config.groups, config.num_units, LIFE, -1)


def seen(counts, resets):
    """What the optimizer sees in each meta-step of a cycle: counts [U, LIFE, B] of lives -> [LIFE, B]."""
    _, age = reset_table(len(counts), LIFE, 2 * LIFE, resets)  # [U, steps]
    units = np.arange(len(counts))
    return np.stack([counts[units, age[:, step]].sum(0) for step in range(LIFE, 2 * LIFE)])


def phases(histograms):
    """[3, B]: sums over the first, the middle and the last tenth of a cycle."""
    length = LIFE // 10
    starts = np.linspace(0, LIFE - length, 3).astype(int)
    return np.stack([histograms[start : start + length].sum(0) for start in starts])


def draw(path, counts, drifts):
    """Per meta-step, the distance of its histogram to that of the whole cycle, one line per group."""
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for resets, color in zip(RESETS, ("C0", "C1")):
        for i, group in enumerate(counts):
            histograms = seen(group, resets)
            whole = histograms.sum(0)
            distances = [drift.distance(h, whole) for h in histograms]
            label = f"{resets}: drift {contents.interval(drifts[resets])}" if i == 0 else None
            axis.plot(distances, color=color, alpha=0.6, label=label)
    axis.set(xlabel="meta-step of a cycle", ylabel="decades", ylim=(0, None))
    axis.set(title="distance between the gradients of one meta-step and of the whole cycle")
    axis.legend(frameon=False)
    return plots.save(figure, path)


def main(argv=None):
    config = runs.parse(Config, {}, __doc__, argv)
    runs.check_seed(config.seed)
    runs.check_positive(config, ("num_units", "groups", "num_envs", "learning_rate"))
    mesh = runs.use_devices(config.devices, divides=config.num_units * config.groups)

    folder = runs.new_folder(config.out, "pipeline_drift", config)
    counts = lives(config, mesh)
    of_group = lambda group, resets: drift.drift(phases(seen(group, resets)))
    drifts = {resets: [of_group(group, resets) for group in counts] for resets in RESETS}
    rows = [[i, *(f"{x:.6g}" for x in row)] for i, row in enumerate(zip(*drifts.values()))]
    runs.write_csv(folder / "results.csv", ["group", *RESETS], rows)
    for resets, values in drifts.items():
        print(f"{resets:14} drift {contents.interval(values)} decades")
    print(f"{statistics.caption(config.groups)} A seed is a group of units here.")
    print(f"Picture: {draw(folder / 'pipeline_drift.png', counts, drifts)}")


kept = lambda resets: (
    lambda: contents.interval([float(row[resets]) for row in contents.read_csv("pipeline_drift/results.csv")])
)
CONTENTS = {f"pipeline_drift_{resets}": kept(resets) for resets in RESETS}


if __name__ == "__main__":
    runs.run(main)
