"""Experiment: how much do meta-runs of `python meta_train.py` differ, and do they beat tuned Adam and RMSProp?

    python -m experiments.meta_seeds                                # 10 meta-runs of the default: 40 minutes of 2 CPU cores
    python -m experiments.meta_seeds --preset raw                   # the same with the paper's inputs
    python -m experiments.meta_seeds --preset gated_adam            # mean.npz: the weights of learned_optimizers/gated_adam.py
    python -m experiments.meta_seeds --seeds 0 1 --out runs/two
    python -m experiments.meta_seeds --resume runs/meta_seeds-...   # continues after any interruption

A meta-seed is a whole experiment: a meta-run, then fresh agents on each test task. Its score on a task is the area under their
return curves in units of the better baseline's. Adam and RMSProp are tuned on five seeds of their own, at optax's defaults and
in each of agents.VARIANTS. The folder receives config.json, agents.csv (one row per reported agent), curves.npz, meta_runs/ (a
folder of meta_train.py per meta-run), mean.npz (the mean of their weights), summary.json and learned_step.png.
"""

from dataclasses import asdict, dataclass
from typing import Literal

import jax
import numpy as np
from tqdm import tqdm

import meta_train
from experiments import arms, contents
from harness import agents, plots, runs, statistics, tasks, weights
from harness.plots import plt

GRID = (1e-2, 1.78e-2, 3.16e-2, 5.62e-2, 1e-1)  # of the hand-designed optimizers: quarter decades
MEAN = "mean of all weights"  # the meta-runs' weights, averaged
Preset = Literal["quick", "raw", "gradient", "gated_adam"]  # those that learn from worlds, whose alphas GRID has


@dataclass(frozen=True)
class Config:
    preset: Preset = "quick"  # of meta_train.py
    seeds: tuple[int, ...] = tuple(range(100, 110))  # meta-seeds; the default was chosen on others
    variants: bool = True  # also Adam and RMSProp with other memories, bias correction and a falling step
    tuning_seeds: int = 5  # seeds on which the hand-designed optimizers are tuned
    devices: int | None = None  # None: as many as share the units equally, on a CPU one per core
    out: str | None = None  # folder of this run; None: a new one under runs/
    resume: str | None = None  # folder of a stopped run to continue; its config is taken from there


def meta_config(config, folder, seed):
    """meta_train.Config of one meta-run."""
    flags = {"preset": config.preset} | meta_train.PRESETS[config.preset]
    return meta_train.Config(**flags, devices=config.devices, seed=seed, out=str(folder / "meta_runs" / str(seed)))


def run_all(config, folder, mesh):
    """{(task, label): agents.Tuned}: hand-designed optimizers, the untrained rule, "meta-seed S" of each meta-run, MEAN.

    It also writes mean.npz, the weights of MEAN.
    """
    base, results = meta_config(config, folder, 0), {}
    all_tasks = [tasks.make(name, base.test_envs) for name in base.test_tasks]
    rates = base.test_learning_rates or GRID

    def test(label, optimizer, rates, tuning_seeds):
        for task in all_tasks:
            args = (folder, task, label, optimizer, rates, base.test_seeds, mesh, base.test_steps, tuning_seeds)
            results[task.name, label] = arms.test(*args)

    hand_designed = [*agents.HAND_DESIGNED, *(agents.VARIANTS if config.variants else ())]
    with tqdm(hand_designed, unit="optimizer") as bar:
        for name in bar:
            bar.set_description(name)
            test(name, agents.Optimizer(name), GRID, config.tuning_seeds)
    untrained = agents.untrained(base.optimizer, jax.random.key(0), base.inputs)
    test(untrained.name, untrained, rates, agents.TUNING_SEEDS)
    learned = [arms.learned(meta_config(config, folder, seed)) for seed in config.seeds]
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *(optimizer.meta_params for optimizer in learned))
    metadata = {"mean_of": asdict(config), "inputs": base.inputs}
    weights.save(folder / "mean.npz", mean, metadata, base.optimizer)
    labels = [f"meta-seed {seed}" for seed in config.seeds]
    for label, optimizer in zip([*labels, MEAN], [*learned, learned[0]._replace(meta_params=mean)]):
        test(label, optimizer, rates, agents.TUNING_SEEDS)
    return results


def areas_of(results):
    """{(task, label): [R] area of each reported agent}."""
    return {pair: result.runs.area() for pair, result in results.items()}


def summarize(results):
    """What summary.json holds: {"better_baseline": {task: name}, "ratios" and "alphas": {label: {task: number}}}."""
    task_names, labels = (list(dict.fromkeys(names)) for names in zip(*results))
    tuning = lambda task: lambda name: results[task, name].tuning_area
    better = {task: max(statistics.BASELINES, key=tuning(task)) for task in task_names}
    iqm = {pair: float(statistics.iqm(areas)) for pair, areas in areas_of(results).items()}
    return {
        "better_baseline": better,
        "ratios": {
            label: {task: iqm[task, label] / iqm[task, better[task]] for task in task_names} for label in labels
        },
        "alphas": {label: {task: results[task, label].alpha for task in task_names} for label in labels},
    }


def write_agents(path, results):
    """One row per reported agent."""
    rows = [
        [*pair, result.alpha, i, f"{area:.6g}", f"{final:.6g}"]
        for pair, result in results.items()
        for i, (area, final) in enumerate(zip(result.runs.area(), result.runs.final()))
    ]
    runs.write_csv(path, ["task", "optimizer", "alpha", "agent", "area", "final"], rows)


def write_curves(path, results):
    """Learning curves of all reported agents: an array [agents, points] per TASK/OPTIMIZER, and the steps [points] of TASK."""
    curves = {f"{task}/{label}": np.float32(result.runs.returns) for (task, label), result in results.items()}
    curves |= {task: result.runs.steps for (task, _), result in results.items()}
    weights.write_arrays(path, curves, compressed=True)


def draw(path, config, folder):
    """The step that each meta-run's optimizer takes with alpha = 1 where its networks see a constant |x|: over age, over |x|."""
    base, updates = meta_config(config, folder, 0), 250
    middle = 1.0 if base.inputs == "normalised" else 1e-3  # raw gradients are as small as that
    sizes = middle * np.geomspace(0.03, 3, 21)
    make, start = agents.LEARNED[base.optimizer].make, meta_train.init_meta_params(base)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for seed in config.seeds:
        meta_params = arms.learned(meta_config(config, folder, seed)).meta_params
        steps = plots.learned_step(make, meta_params, sizes, updates)  # [updates, sizes]
        left.plot(1 + np.arange(updates), steps[:, np.searchsorted(sizes, middle)], color="C0", alpha=0.5)
        for age, color in ((1, "C1"), (60, "C2"), (250, "C3")):
            label = f"after {age} updates" if seed == config.seeds[0] else None
            right.loglog(sizes, steps[age - 1], color=color, alpha=0.5, label=label)
    right.loglog(sizes, plots.learned_step(make, start, sizes, 1)[0], color="black", linestyle=":", label="its start")
    left.set(
        title=f"|x| = {middle:g}, one line per meta-run", xlabel="age in updates", ylabel="step / alpha", ylim=(0, None)
    )
    sees_ratios = agents.sees_ratios(base.optimizer, base.inputs)
    right.set(title="x = g / RMS(g)" if sees_ratios else "x = g", xlabel="|x|", ylabel="step / alpha")
    right.legend(frameon=False)
    return plots.save(figure, path)


def meta_runs(summary):
    return [label for label in summary["ratios"] if label.startswith("meta-seed")]


def others(summary):
    """The optimizers that are not learned here."""
    return [label for label in summary["ratios"] if label in (*agents.NAMES, MEAN)]


def over_tasks(summary, label):
    return float(np.mean(list(summary["ratios"][label].values())))


def over(summary, areas, *task_names):
    """The score over meta-runs, in the mean of some tasks."""
    better = summary["better_baseline"]
    learned = {task: [statistics.iqm(areas[task, label]) for label in meta_runs(summary)] for task in task_names}
    return contents.span(*statistics.over_meta_runs(learned, {task: areas[task, better[task]] for task in task_names}))


def above(summary):
    scores = [over_tasks(summary, label) for label in meta_runs(summary)]
    return f"{sum(score > 1 for score in scores)} of {len(scores)}"


def table(summary, areas):
    """Area / that of the better of Adam and RMSProp: a line per optimizer, a column per task."""
    tasks_of = list(summary["better_baseline"])
    number = lambda label: map(contents.number, (over_tasks(summary, label), *summary["ratios"][label].values()))
    lines = [[label, *number(label)] for label in others(summary)]
    learned = next(x for x in others(summary) if x.startswith("untrained_")).removeprefix("untrained_")
    cells = [over(summary, areas, *tasks_of), *(over(summary, areas, task) for task in tasks_of)]
    titles = " | ".join(["optimizer", "all tasks", *tasks_of])
    return contents.markdown(titles, [f"{learned}, over meta-runs", *cells], *lines)


def unseen(folder):
    """The scores on tasks that were not learned from."""
    summary, areas = kept(folder)
    seed = meta_runs(summary)[0].split()[1]
    seen = contents.read_json(f"{folder}/meta_runs/{seed}/config.json")["config"]["tasks"]
    return ", ".join(
        f"{over(summary, areas, task)} on {task}" for task in summary["better_baseline"] if task not in seen
    )


def best_variant(summary):
    hand_designed = [x for x in others(summary) if x in agents.HAND_DESIGNED or x in agents.VARIANTS]
    best = max(hand_designed, key=lambda x: over_tasks(summary, x))
    return f"{best} {contents.number(over_tasks(summary, best))}"


def single(summary, areas):
    """What one meta-run prints: 95% of the scores of all meta-runs, their and the baselines' agents drawn again."""
    random, drawn = np.random.default_rng(0), []
    draw = lambda pair: random.choice(areas[pair], len(areas[pair]))
    for label in meta_runs(summary) * 200:
        better = summary["better_baseline"].items()
        ratios = [draw((task, label)) / statistics.iqm(draw((task, name))) for task, name in better]
        drawn.append(statistics.iqm(np.concatenate(ratios)))
    return "{} to {}".format(*map(contents.number, np.quantile(drawn, (0.025, 0.975))))


def kept(folder):
    """(what summary.json holds, areas_of the agents) of a folder of results/."""
    summary, areas = contents.read_json(f"{folder}/summary.json"), {}
    for row in contents.read_csv(f"{folder}/agents.csv"):
        areas.setdefault((row["task"], row["optimizer"]), []).append(float(row["area"]))
    return summary, areas


def contents_of(folder):
    """{name: function} of what this program wrote into a folder of results/."""
    summary = lambda: kept(folder)[0]
    return {
        "score": lambda: over(*kept(folder), *summary()["better_baseline"]),
        "above": lambda: above(summary()),
        "best_variant": lambda: best_variant(summary()),
        "sign": lambda: contents.number(over_tasks(summary(), "sign_descent")),
        "table": lambda: table(*kept(folder)),
        "unseen": lambda: unseen(folder),
        "single": lambda: single(*kept(folder)),
    }


CONTENTS = {f"default_{name}": content for name, content in contents_of("meta_seeds").items()}
CONTENTS |= {f"raw_{name}": contents_of("meta_seeds_raw")[name] for name in ("score", "above")}
GATED = contents_of("gated_adam/meta_seeds")
CONTENTS |= {f"gated_{name}": GATED[name] for name in ("score", "above", "unseen", "table")}


def main(argv=None):
    config = runs.parse(Config, {}, __doc__, argv)
    runs.check_different(config, ("seeds",))
    runs.check_seed(*config.seeds)
    runs.check_positive(config, ("tuning_seeds",))
    mesh = runs.use_devices(config.devices, divides=meta_train.Config.num_units)

    def body(folder):
        results = run_all(config, folder, mesh)
        summary = summarize(results)
        write_agents(folder / "agents.csv", results)
        write_curves(folder / "curves.npz", results)
        runs.write_json(folder / "summary.json", summary)
        print(f"\nArea / that of the better of Adam and RMSProp\n{table(summary, areas_of(results))}")
        print("Interquartile mean [95% bootstrap interval] over meta-runs and the agents of the baseline.")
        print(f"{above(summary)} meta-runs are above 1.")
        print(f"Picture: {draw(folder / 'learned_step.png', config, folder)}")

    arms.run("meta_seeds", config, mesh, body)


if __name__ == "__main__":
    runs.run(main)
