"""Experiment: which parts of meta-training matter? One thing at a time is changed (not in the paper; its reviewers asked).

    python -m experiments.ablations                              # all settings, 35 minutes on one CPU core
    python -m experiments.ablations --num-seeds 3 --out runs/try # a first look, a third of the time
    python -m experiments.ablations --resume runs/ablations-...  # continues after any interruption; no finished meta-run is run again

The flags that take several values are the ablations: the first value is the base's, each other one is tried with all the
rest as in the base. Every setting learns from the same number of agent updates: with twice the units or twice the inner
updates, half the meta-steps; a unit's life is equally many updates whatever the inner updates. More environments in a unit
are more data. A seed is a whole experiment: a meta-run, then fresh agents, whose mean is one number. Intervals are over seeds.
The folder receives config.json, meta_runs/, results.csv and ablations.png.
"""

import csv
import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from tqdm import tqdm

import meta_train
import pipeline
from experiments import arms
from harness import agents, plots, runs, statistics, tasks
from harness.plots import plt

REFERENCES = agents.HAND_DESIGNED  # optimizers without meta-training
TITLES = {
    "reset_interval": "reset interval m, 0: no pipeline",
    "num_units": "units n",
    "optimizer": "structure",
    "inner_updates": "inner updates",
    "num_envs": "environments of a unit",
    "reward_scale": "reward scale",
}


@dataclass(frozen=True)
class Config:
    preset: Literal["quick", "paper"] = "quick"  # other defaults for all other flags
    reset_interval: tuple[int, ...] = (48, 0, 6, 24)  # m, in meta-steps; 0: no resets, no pipeline
    num_units: tuple[int, ...] = (12, 3, 48)  # n: training units
    optimizer: tuple[Literal[*agents.LEARNED], ...] = ("optim4rl", "linear_optim")  # what is learned
    inner_updates: tuple[int, ...] = (4, 1, 2, 8, 16)  # agent updates in a meta-step
    num_envs: tuple[int, ...] = (1, 4, 16, 64)  # environments of a unit
    reward_scale: tuple[float, ...] = (100.0, 1.0, 1000.0)  # factor on rewards in meta-training
    task: Literal[*tasks.WORLDS] = "small_dense_short"  # for meta-training and test
    meta_steps: int = 100  # meta-steps of the base
    alpha: float = 3e-3  # learning rate of the learned optimizer in meta-training
    meta_learning_rate: float = 3e-3  # step size of Adam on the meta-parameters
    test_envs: int = 64  # environments of a tested agent
    test_steps: float = 3.2e5  # environment steps of a tested agent
    test_alphas: tuple[float, ...] = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1)  # among which all are tuned
    test_agents: int = 1  # reported agents of each seed
    num_seeds: int = 10  # seeds: meta-runs of each setting
    seed: int = 0  # the first of them
    devices: int | None = None  # None: as many as share all units equally, on a CPU one per core
    out: str | None = None  # folder of this run; None: a new one under runs/
    resume: str | None = None  # folder of a stopped run to continue; its config is taken from there


PRESETS = {
    "quick": {},
    "paper": dict(
        reset_interval=(288, 0, 72, 144, 576), num_units=(512, 8, 64), meta_steps=585, test_envs=512, test_steps=3e7
    ),
}


def settings(config):
    """{name: meta_train.Config}: the base, then what differs from it in one field, named like "num_units=4"."""
    base = {name: getattr(config, name)[0] for name in TITLES}
    varied = {f"{name}={value}": base | {name: value} for name in TITLES for value in getattr(config, name)[1:]}
    return {name: setting(config, base, values) for name, values in ({"base": base} | varied).items()}


def setting(config, base, values):
    """meta_train.Config with the base's number of agent updates, and its life of a unit in updates."""
    per_update = base["inner_updates"] / values["inner_updates"]
    meta_steps = max(1, round(config.meta_steps * per_update * base["num_units"] / values["num_units"]))
    alphas = agents.learning_rates(agents.Optimizer(values["optimizer"]), [config.alpha])
    changes = values | dict(tasks=(config.task,), test_tasks=(), meta_steps=meta_steps, alpha=tuple(alphas))
    changes |= dict(reset_interval=(round(values["reset_interval"] * per_update),))
    changes |= dict(reward_scale=(values["reward_scale"],), meta_learning_rate=config.meta_learning_rate)
    return meta_train.Config(**meta_train.PRESETS["gradient"] | changes, devices=config.devices)


def run_all(config, folder, mesh):
    """{name: {"meta_steps", "alphas", "area", "final"}, a number per seed} of the references and of all settings."""
    results, task = {}, tasks.make(config.task, config.test_envs)
    everything = dict.fromkeys(REFERENCES) | settings(config)
    for name, of_meta_run in tqdm(everything.items(), unit="setting"):
        tested = []
        for seed in range(config.seed, config.seed + config.num_seeds):
            if of_meta_run is None:
                optimizer = agents.Optimizer(name)
            else:
                out = str(folder / "meta_runs" / f"{name}-{seed}")
                optimizer = arms.learned(replace(of_meta_run, seed=seed, out=out), mesh)
            args = (folder, task, f"{name}-{seed}", optimizer, config.test_alphas, config.test_agents, mesh)
            tested.append(arms.test(*args, config.test_steps, seed=seed))
        results[name] = {
            "meta_steps": of_meta_run.meta_steps if of_meta_run else 0,
            "alphas": [result.alpha for result in tested],
            "area": [result.runs.area().mean() for result in tested],
            "final": [result.runs.final().mean() for result in tested],
        }
    return results


def rows(config, results):
    """The table, one dict per row: the references, then every value of each ablation, the base's among them."""
    groups = {"reference": {name: name for name in REFERENCES}}
    for name, title in TITLES.items():
        values = getattr(config, name)
        if len(values) > 1:
            named = {value: f"{name}={value}" for value in values} | {values[0]: "base"}
            groups[title] = {value: named[value] for value in sorted(values)}
    for group, named in groups.items():
        for value, name in named.items():
            result = results[name]
            row = {"ablation": group, "value": value, "base": int(name == "base"), "meta_steps": result["meta_steps"]}
            row |= {"seeds": len(result["area"]), "alphas": " ".join(f"{alpha:g}" for alpha in result["alphas"])}
            for key in ("area", "final"):
                row[key], row[f"{key}_low"], row[f"{key}_high"] = statistics.interval(result[key])
            yield row | {"areas": " ".join(f"{area:.4f}" for area in result["area"])}


def write_csv(path, table):
    """The table as a file; areas has the return over the whole run of each seed."""
    with runs.whole_file(path, "w") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        for row in table:
            writer.writerow(
                {name: f"{x:.4f}" if type(x) is float and name != "value" else x for name, x in row.items()}
            )


def text(table):
    """The table as text."""
    cell = lambda row, name: f"{row[name]:6.2f} [{row[name + '_low']:.2f}, {row[name + '_high']:.2f}]"
    lines = [f"{'ablation':34} {'value':14} {'meta-steps':>10}   {'return, whole run':22} return, last fifth"]
    for before, row in zip([None, *table], table):
        if before and before["ablation"] != row["ablation"]:
            lines.append("")
        value = f"{row['value']}{' (base)' * row['base']}"
        lines.append(
            f"{row['ablation']:34} {value:14} {row['meta_steps']:10}   {cell(row, 'area'):22} {cell(row, 'final')}"
        )
    return "\n".join(lines)


def draw(path, table):
    """The table as a picture: one point per setting, the references as lines."""
    lines, points = table[: len(REFERENCES)], table[len(REFERENCES) :]
    figure, axis = plt.subplots(figsize=(8.5, 1.4 + 0.27 * len(points)), layout="constrained")
    for row in lines:
        color = plots.style(row["value"])["color"]
        axis.axvline(row["area"], color=color, label=row["value"])
        axis.axvspan(row["area_low"], row["area_high"], color=color, alpha=0.15, linewidth=0)
    first = [row["ablation"] != before["ablation"] for before, row in zip(table[len(REFERENCES) - 1 :], points)]
    heights = np.arange(len(points)) + 0.7 * np.cumsum(first)  # a gap before each ablation
    for row, height in zip(points, heights):
        errors = [[row["area"] - row["area_low"]], [row["area_high"] - row["area"]]]
        axis.errorbar(row["area"], height, xerr=errors, fmt="D" if row["base"] else "o", color="black", capsize=2)
    axis.set_yticks(heights, [f"{row['ablation']}:  " * new + str(row["value"]) for new, row in zip(first, points)])
    axis.invert_yaxis()
    axis.set(xlabel=f"episode return, mean over an agent's life ({table[0]['seeds']} seeds)")
    axis.set(title="one change at a time; diamond: the base")
    figure.legend(frameon=False, loc="outside right upper")
    return plots.save(figure, path)


def check(config):
    """Raises UsageError for what cannot be, before anything is written."""
    for name in (*TITLES, "test_alphas"):
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            given = ",".join(map(str, values)) or "empty"
            raise runs.UsageError(f"{runs.flag_of(name)} is {given}; give different values, the base's first")
    if min(config.reset_interval) < 0:
        raise runs.UsageError(f"--reset-interval is {min(config.reset_interval)}; it must be at least 0")
    runs.check_seed(config.seed)
    positive = ("num_units", "inner_updates", "num_envs", "reward_scale", "meta_steps", "alpha", "meta_learning_rate")
    runs.check_positive(config, positive + ("test_alphas", "test_envs", "test_steps", "test_agents", "num_seeds"))


def main(argv=None):
    config = runs.parse(Config, PRESETS, __doc__, argv)
    check(config)
    mesh = runs.use_devices(config.devices, divides=math.gcd(*config.num_units))
    for n in config.num_units:
        runs.usage(pipeline.check, pipeline.Config(n), mesh.devices.size)

    def body(folder):
        table = list(rows(config, run_all(config, folder, mesh)))
        write_csv(folder / "results.csv", table)
        print(f"\n{text(table)}\n\n{statistics.caption(config.num_seeds)}")
        print(f"Picture: {draw(folder / 'ablations.png', table)}")

    arms.run("ablations", config, mesh, body)


if __name__ == "__main__":
    runs.run(main)
