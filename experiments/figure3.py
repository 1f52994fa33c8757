"""Experiment: each learned optimizer meta-trained on the task that it is tested on, beside hand-designed ones (paper: Figure 3).

    python -m experiments.figure3                              # Catch and big_dense_long, about half an hour on one CPU core
    python -m experiments.figure3 --tasks catch --out runs/try # Catch alone
    python -m experiments.figure3 --resume runs/figure3-...    # continues after any interruption; nothing finished is run again

All learned optimizers get the same budget: a meta-run per meta learning rate, the same units and meta-steps. The meta-run and
the alpha with the largest area on two tuning seeds are taken; all other optimizers are tuned over the same alphas on the same
seeds. Fresh seeds are reported: agents of the one chosen meta-run, so that intervals do not contain how much meta-runs differ.
The folder receives config.json, meta_runs/, curves.csv, summary.json and figure3.png.
"""

import csv
import itertools
import json
from dataclasses import dataclass
from typing import Literal

import jax
from tqdm import tqdm

import evaluate
import meta_train
import pipeline
from experiments import arms
from harness import agents, plots, runs, statistics, tasks

WorldName = Literal[*tasks.WORLDS]
OPTIMIZERS = ("optim4rl", *agents.HAND_DESIGNED, "linear_optim", "l2lgd2", "star")


@dataclass(frozen=True)
class Config:
    preset: Literal["quick", "paper"] = "quick"  # other defaults for all other flags
    tasks: tuple[WorldName, ...] = ("catch", "big_dense_long")  # gridworlds, or catch
    optimizers: tuple[Literal[*agents.NAMES], ...] = (
        OPTIMIZERS  # what trains the agents; learned ones are learned first
    )
    inputs: Literal[*agents.INPUTS] = "raw"  # what their networks see; raw: g as in the paper
    meta_learning_rates: tuple[float, ...] = (1e-3, 3e-3)  # of Adam on the meta-parameters: a meta-run per rate
    num_units: int = 12  # n: training units
    meta_steps: int = 100  # length of a meta-run
    reset_interval: int = 48  # m: meta-steps in the life of a unit; 0: no resets
    test_steps: float = 3.2e5  # environment steps of a tested agent
    test_envs: int = 64  # environments of a tested agent
    seeds: int = 5  # reported agents of each optimizer
    seed: int = 0  # of everything
    devices: int | None = None  # None: as many as share the units equally, on a CPU one per core
    out: str | None = None  # folder of this run; None: a new one under runs/
    resume: str | None = None  # folder of a stopped run to continue; its config is taken from there


PRESETS = {
    "quick": {},
    "paper": dict(
        meta_learning_rates=(1e-4, 3e-4, 1e-3, 3e-3),
        num_units=512,
        meta_steps=585,
        reset_interval=288,
        test_steps=3e7,
        test_envs=512,
        seeds=10,
    ),
}


def meta_config(config, folder, task, optimizer, rate):
    """meta_train.Config of one meta-run: the paper's gradient on one task."""
    changes = {name: getattr(config, name) for name in ("inputs", "num_units", "meta_steps", "seed", "devices")}
    changes |= dict(tasks=(task,), optimizer=optimizer, reset_interval=(config.reset_interval,), test_tasks=())
    alphas = agents.learning_rates(agents.Optimizer(optimizer, inputs=config.inputs), [tasks.meta_defaults(task).alpha])
    changes |= dict(alpha=tuple(alphas), meta_learning_rate=rate)
    out = str(folder / "meta_runs" / f"{task}-{optimizer}-{rate:g}")
    return meta_train.Config(**meta_train.PRESETS["gradient"] | changes, out=out)


def candidates(config, folder, task, name, mesh):
    """{meta learning rate: agents.Optimizer}, meta-trained on the task if it can be."""
    if name in agents.LEARNED:
        learned = lambda rate: arms.learned(meta_config(config, folder, task, name, rate), mesh)
        return {rate: learned(rate) for rate in config.meta_learning_rates}
    if name in agents.UNTRAINED:
        return {0: agents.untrained(agents.UNTRAINED[name], jax.random.key(config.seed), config.inputs)}
    return {0: agents.Optimizer(name)}


def report(config, folder, task, optimizers, mesh):
    """The best of several optimizers {meta learning rate: agents.Optimizer} on tuning seeds: (row of the table, agents.Tuned)."""

    def test(rate, optimizer):
        label = f"{optimizer.name}-{rate:g}" if rate else optimizer.name
        args = (folder, task, label, optimizer, task.learning_rates, config.seeds, mesh, config.test_steps)
        return arms.test(*args, seed=config.seed)

    results = {rate: test(rate, optimizer) for rate, optimizer in optimizers.items()}
    best = max(results, key=lambda rate: statistics.worst_if_diverged(results[rate].tuning_area))
    row = statistics.summarize(task.name, optimizers[best].name, results[best]) | {"meta_learning_rate": best}
    tuning = {f"{rate:g}": statistics.json_number(result.tuning_area) for rate, result in results.items()}
    return row | {"tuning_areas": tuning}, results[best]


def run_all(config, folder, mesh):
    """All optimizers on all tasks: writes curves.csv and summary.json; returns the table's rows."""
    rows = []
    with open(folder / "curves.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["task", "optimizer", "alpha", "run", "step", "episode_return"])
        for name, optimizer in tqdm(list(itertools.product(config.tasks, config.optimizers)), unit="optimizer"):
            optimizers = candidates(config, folder, name, optimizer, mesh)
            row, result = report(config, folder, tasks.make(name, config.test_envs), optimizers, mesh)
            rows.append(row)
            evaluate.write_curves(writer, row, result.runs)
            file.flush()
    with runs.whole_file(folder / "summary.json", "w") as file:
        json.dump(rows, file, indent=1)
    return rows


def check(config):
    """Raises UsageError for what cannot be, before anything is written."""
    for name in ("tasks", "optimizers", "meta_learning_rates"):
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            given = ",".join(map(str, values)) or "empty"
            raise runs.UsageError(f"{runs.flag_of(name)} is {given}; name at least one, each once")
    runs.check_seed(config.seed)
    runs.check_positive(config, ("num_units", "meta_learning_rates", "meta_steps", "test_steps", "test_envs", "seeds"))


def main(argv=None):
    config = runs.parse(Config, PRESETS, __doc__, argv)
    check(config)
    mesh = runs.use_devices(config.devices, divides=config.num_units)
    runs.usage(pipeline.check, pipeline.Config(config.num_units, config.reset_interval), mesh.devices.size)

    def body(folder):
        rows = run_all(config, folder, mesh)
        print(f"\n{statistics.table(rows)}\n\n{statistics.caption(config.seeds)}")
        print(f"Curves: {plots.learning_curves(folder / 'figure3.png', [folder])}")

    arms.run("figure3", config, mesh, body)


if __name__ == "__main__":
    runs.run(main)
