"""Experiment: do the meta-runs of meta_seeds.py, learned on two small worlds, train agents on the paper's six, at its size?

    python -m experiments.six_worlds                                # ten Optim4RLs: 37 minutes of a core
    python -m experiments.six_worlds --meta-seeds results/gated_adam/meta_seeds
    python -m experiments.six_worlds --resume runs/six_worlds-...   # continues after any interruption

Each meta-run trains one agent per world, with random numbers of its own and the same alpha everywhere: 512 environments and 5
million steps, a sixth of the paper's. So an interval is over meta-runs, and contains the noise of agents. The better of Adam and
RMSProp is that of docs/results.md. The folder receives config.json and agents.csv (one row per agent).
"""

import json
import pathlib
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

import evaluate
from experiments import arms, contents
from harness import runs, statistics, tasks


@dataclass(frozen=True)
class Config:
    meta_seeds: str = "results/meta_seeds"  # folder of meta_seeds.py
    learning_rate: float = 0.02  # alpha of all agents
    steps: float = 5e6  # environment steps of an agent
    num_envs: int = 512  # environments of an agent
    devices: int = 1  # agents are trained one after another; two runs of this program are for two cores
    out: str | None = None  # folder of this run; None: a new one under runs/
    resume: str | None = None  # folder of a stopped run to continue; its config is taken from there


def load(folder):
    """{meta-seed: agents.Optimizer} from a folder of meta_seeds.py. Raises runs.UsageError: there is none."""
    files = sorted(pathlib.Path(folder, "meta_runs").glob("*/optimizer.npz"))
    if not files:
        raise runs.UsageError(f"--meta-seeds is {folder}; there is no meta_runs/*/optimizer.npz in it")
    kind = json.loads((files[0].parent / "config.json").read_text())["config"]["optimizer"]
    return {int(file.parent.name): evaluate.load_optimizer(kind, file) for file in files}


def run_all(config, optimizers, folder, mesh):
    """The rows of agents.csv: (world, optimizer, meta-seed, area, last fifth)."""
    rows, pairs = [], [(name, seed) for name in contents.SIX for seed in optimizers]
    for name, seed in tqdm(pairs, unit="agent"):
        task, label, optimizer = tasks.make(name, config.num_envs), f"meta-seed {seed}", optimizers[seed]
        result = arms.test(folder, task, label, optimizer, (config.learning_rate,), 1, mesh, config.steps, seed=seed)
        rows.append([name, optimizer.name, seed, *(f"{x[0]:.6g}" for x in (result.runs.area(), result.runs.final()))])
    return rows


def areas(rows, worlds, column):
    """({world: [S] area of each meta-run's agent}, {world: [R] areas of the better of Adam and RMSProp})."""
    baselines = contents.six_worlds()
    of_world = lambda world: [baselines[world, name][f"{column}_runs"] for name in contents.BASELINES]
    learned = {world: [float(row[column]) for row in rows if row["task"] == world] for world in worlds}
    return learned, {world: max(of_world(world), key=statistics.iqm) for world in worlds}


def over(rows, worlds, column="area"):
    """The score over meta-runs, in the mean of some worlds."""
    return contents.span(*statistics.over_meta_runs(*areas(rows, worlds, column)))


def above(rows):
    learned, units = areas(rows, contents.BIG, "area")
    on_big = np.mean([np.array(learned[world]) / statistics.iqm(units[world]) for world in contents.BIG], axis=0)
    return f"{sum(on_big > 1)} of {len(on_big)}"


def table(*folders):
    """A line per folder of this program, a column per group of worlds."""
    groups = {"all six": contents.SIX, "four big": contents.BIG, "two small": contents.SIX[:2]}
    lines = []
    for folder in folders:
        rows = contents.read_csv(f"{folder}/agents.csv")
        cells = [*(over(rows, worlds) for worlds in groups.values()), over(rows, contents.BIG, "final")]
        lines.append([rows[0]["optimizer"], *cells, above(rows)])
    return contents.markdown(f"meta-runs of | {' | '.join(groups)} | four big, last fifth | above 1 on big", *lines)


OPTIM4RL, GATED_ADAM = "six_worlds/meta_runs", "gated_adam/six_worlds_meta_runs"
CONTENTS = {
    "at_size": lambda: table(OPTIM4RL, GATED_ADAM),
    "at_size_big": lambda: over(contents.read_csv(f"{OPTIM4RL}/agents.csv"), contents.BIG),
    "at_size_above": lambda: above(contents.read_csv(f"{OPTIM4RL}/agents.csv")),
}


def main(argv=None):
    config = runs.parse(Config, {}, __doc__, argv)
    runs.check_positive(config, ("learning_rate", "steps", "num_envs", "devices"))
    optimizers, mesh = load(config.meta_seeds), runs.use_devices(config.devices)

    def body(folder):
        rows = run_all(config, optimizers, folder, mesh)
        runs.write_csv(folder / "agents.csv", ["task", "optimizer", "meta_seed", "area", "final"], rows)
        print(f"{folder}/agents.csv")

    arms.run("six_worlds", config, mesh, body)


if __name__ == "__main__":
    runs.run(main)
