"""Experiment: does pipeline training help an optimizer for reinforcement learning? (paper: section 4.3, its first claim)

    python -m experiments.pipeline_rl                               # 8 meta-runs of each arm: 90 minutes of 2 CPU cores
    python -m experiments.pipeline_rl --seeds 0 --out runs/try      # a first look
    python -m experiments.pipeline_rl --resume runs/pipeline_rl-... # continues after any interruption

An arm is one way to meta-train Optim4RL with normalised inputs on small_dense_short; all else is the default of meta_train.py:
16 units of 64 environments, 500 meta-steps, lives of 252 updates. What differs is the estimator of the meta-gradient, whether
its meta learning rate is constant, as in the paper, or falls to 0, and the resets: staggered (pipeline training), synchronised
(the same lives, but all units are of the same age at any time) or none (one life of 2,000 updates). gradient_constant_32 looks
32 updates ahead, not 4. A meta-run's score is the area under the return curve of fresh agents, which live for 250 updates, in
units of tuned RMSProp's. All optimizers are tuned over nine alphas.

Written before the runs. nres judges whole lives. So staggered and synchronised should be level within 3% where the rate
falls to 0, since a whole cycle of ages is averaged; with a constant rate synchronised should be at least 5% worse. Without
resets nres should reach at most .95 of tuned sign descent. The paper's gradient learns steps that are too small whatever the
resets; with 32 updates ahead less so. After tuning alpha its areas should be .75 of RMSProp's staggered, .6 synchronised and at
most .4 without resets.

The folder receives config.json, meta_runs/ (a folder of meta_train.py each), results.csv (one row per meta-run: its score, and
the steps that its optimizer takes at the ages 1, 60 and 250 where the networks see a constant 1), curves.npz (returns [agents,
points] per meta-run) and pipeline_rl.png.
"""

import itertools
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from tqdm import tqdm

import meta_train
import optim4rl
import pipeline
from experiments import arms, contents
from harness import agents, plots, runs, statistics, tasks, weights
from harness.plots import plt

RESETS = pipeline.RESETS
COLORS = dict(zip(RESETS, ("C0", "C1", "C3")))
# What differs from the default of meta_train.py
GROUPS = {
    "nres_falling": dict(estimator="nres", meta_learning_rate=1e-2, meta_decay=0.0),
    "nres_constant": dict(estimator="nres", meta_learning_rate=1e-2, meta_decay=1.0),
    "gradient_constant": dict(estimator="gradient", meta_learning_rate=3e-3, meta_decay=1.0),
}
GROUPS["gradient_constant_32"] = GROUPS["gradient_constant"] | dict(inner_updates=32, reset_interval=(8,))
# Without resets one arm per estimator is enough.
ARMS = tuple(
    f"{group}-{resets}"
    for group, resets in itertools.product(GROUPS, RESETS)
    if resets != "none" or group in ("nres_falling", "gradient_constant")
)
AGES = (1, 60, 250)
ALPHAS = (1e-2, 2e-2, 3e-2, 5e-2, 1e-1, 2e-1, 4e-1, 8e-1, 1.6)  # among which every optimizer is tuned


@dataclass(frozen=True)
class Config:
    arms: tuple[Literal[*ARMS], ...] = ARMS  # GROUP-RESETS
    seeds: tuple[int, ...] = tuple(range(200, 208))  # meta-seeds
    meta_steps: int = 500  # of a meta-run, of 4 updates each
    test_agents: int = 4  # reported agents of each meta-run
    test_steps: float = 3.2e5  # environment steps of an agent
    devices: int | None = None  # None: as many as share the units equally, on a CPU one per core
    out: str | None = None  # folder of this run; None: a new one under runs/
    resume: str | None = None  # folder of a stopped run to continue; its config is taken from there


def meta_config(config, folder, arm, seed):
    """meta_train.Config of one meta-run."""
    group, _, resets = arm.rpartition("-")
    changes = dict(tasks=("small_dense_short",), reward_scale=(1.0,)) | GROUPS[group]
    changes["meta_steps"] = -(-4 * config.meta_steps // changes.get("inner_updates", 4))  # as many updates in every arm
    # Without resets the noise of nres is drawn again after as many meta-steps as a life has elsewhere.
    interval = 63 if resets == "none" and changes["estimator"] == "nres" else 0
    changes |= dict(resets=resets, noise_interval=interval, seed=seed, devices=config.devices)
    return meta_train.Config(**changes, out=str(folder / "meta_runs" / f"{arm}-{seed}"))


def run_all(config, folder, mesh):
    """{(arm or name of an optimizer that is not learned here, seed): (agents.Tuned, steps at AGES or None)}"""
    base, results = meta_train.Config(), {}
    task = tasks.make("small_dense_short", base.test_envs)
    untrained = agents.untrained("optim4rl", jax.random.key(0), "normalised")
    references = {optimizer.name: optimizer for optimizer in (*map(agents.Optimizer, agents.HAND_DESIGNED), untrained)}
    pairs = list(itertools.product(config.seeds, [*references, *config.arms]))  # a seed is complete before the next
    for seed, label in tqdm(pairs, unit="meta-run"):
        optimizer, steps = references.get(label), None
        if optimizer is None:
            optimizer = arms.learned(meta_config(config, folder, label, seed))
            steps = plots.learned_step(optim4rl.optim4rl, optimizer.meta_params, np.ones(1), max(AGES))[:, 0]
        args = (folder, task, f"{label}-{seed}", optimizer, ALPHAS, config.test_agents, mesh, config.test_steps)
        results[label, seed] = arms.test(*args, seed=seed), steps
    return results


def rows(results):
    """The rows of results.csv."""
    area = lambda label, seed: float(statistics.worst_if_diverged(results[label, seed][0].runs.area()).mean())
    labels, seeds = (list(dict.fromkeys(names)) for names in zip(*results))
    rmsprop = np.mean([area("rmsprop", seed) for seed in seeds])
    for label, seed in itertools.product(labels, seeds):
        tuned, steps = results[label, seed]
        row = {"arm": label, "seed": seed, "alpha": tuned.alpha, "area": f"{area(label, seed):.6g}"}
        row |= {"final": f"{tuned.runs.final().mean():.6g}", "score": f"{area(label, seed) / rmsprop:.6g}"}
        yield row | {f"step_{age}": "" if steps is None else f"{steps[age - 1]:.6g}" for age in AGES}


def scores_of(rows):
    """{(group or optimizer, resets or ""): [score of each meta-seed]}"""
    scores = {}
    for row in rows:
        arm = tuple(row["arm"].rsplit("-", 1)) if "-" in row["arm"] else (row["arm"], "")
        scores.setdefault(arm, []).append(float(row["score"]))
    return scores


def ratio(scores, group):
    """Staggered / synchronised resets, paired by meta-seed; empty where one was not run."""
    pair = [scores.get((group, resets), []) for resets in RESETS[:2]]
    return contents.interval(np.divide(*pair)) if all(pair) else ""


def table(rows):
    """A line per way to learn, a column per kind of resets, and the ratio of the first two."""
    scores, lines = scores_of(rows), []
    for group in dict.fromkeys(group for group, _ in scores):
        if (group, "") in scores:
            lines.append([f"{group}, not learned here", contents.interval(scores[group, ""]), "", "", ""])
        else:
            cells = [contents.interval(scores.get((group, resets), [])) for resets in RESETS]
            lines.append([group, *cells, ratio(scores, group)])
    return contents.markdown("learned by | staggered | synchronised | none | staggered / synchronised", *lines)


def draw(path, made, results):
    """Left: the score of each meta-run. Right, per group: the step over age of each."""
    groups = [group for group in GROUPS if any(row["arm"].startswith(f"{group}-") for row in made)]
    figure, axes = plt.subplots(1, 1 + len(groups), figsize=(4 + 3.2 * len(groups), 3.8), layout="constrained")
    for i, (group, resets) in enumerate(itertools.product(groups, RESETS)):
        scores = [float(row["score"]) for row in made if row["arm"] == f"{group}-{resets}"]
        label = resets if i < len(RESETS) else None
        axes[0].plot(np.full(len(scores), i + i // 3), scores, ".", color=COLORS[resets], label=label)
        for (arm, _), (_, steps) in results.items():
            if arm == f"{group}-{resets}":
                axes[1 + groups.index(group)].plot(1 + np.arange(len(steps)), steps, color=COLORS[resets], alpha=0.5)
    for name in agents.HAND_DESIGNED:
        heights = [float(row["score"]) for row in made if row["arm"] == name]
        axes[0].axhline(np.mean(heights), **plots.style(name), label=name)
    axes[0].set_xticks(1 + 4 * np.arange(len(groups)), [group.replace("_", "\n") for group in groups], fontsize=8)
    axes[0].set(ylabel="area / that of tuned RMSProp")
    for axis, group in zip(axes[1:], groups):
        axis.set(title=group, xlabel="age in updates", ylabel="step / alpha", ylim=(0, None))
    figure.legend(frameon=False, loc="outside right upper")
    return plots.save(figure, path)


def main(argv=None):
    config = runs.parse(Config, {}, __doc__, argv)
    runs.check_different(config, ("arms", "seeds"))
    runs.check_seed(*config.seeds)
    runs.check_positive(config, ("meta_steps", "test_agents", "test_steps"))
    mesh = runs.use_devices(config.devices, divides=meta_train.Config.num_units)

    def body(folder):
        results = run_all(config, folder, mesh)
        made = list(rows(results))
        runs.write_csv(folder / "results.csv", made[0], [row.values() for row in made])
        curves = {f"{label}-{seed}": np.float32(tuned.runs.returns) for (label, seed), (tuned, _) in results.items()}
        weights.write_arrays(folder / "curves.npz", curves, compressed=True)
        print(f"\nArea / that of tuned RMSProp\n{table(made)}\n{statistics.caption(len(config.seeds))}")
        print(f"A seed is a meta-run here. Picture: {draw(folder / 'pipeline_rl.png', made, results)}")

    arms.run("pipeline_rl", config, mesh, body)


kept = lambda: contents.read_csv("pipeline_rl/results.csv")
score = lambda group, resets: lambda: contents.interval(scores_of(kept())[group, resets])
ratio_of = lambda group: lambda: ratio(scores_of(kept()), group)
CONTENTS = {
    "pipeline_rl": lambda: table(kept()),
    "rl_nres_none": score("nres_falling", "none"),
    "rl_nres_ratio": ratio_of("nres_falling"),
    "rl_nres_constant_ratio": ratio_of("nres_constant"),
    "rl_gradient": score("gradient_constant", "staggered"),
    "rl_gradient_none": score("gradient_constant", "none"),
    "rl_gradient_ratio": ratio_of("gradient_constant"),
    "rl_gradient_32_ratio": ratio_of("gradient_constant_32"),
}


if __name__ == "__main__":
    runs.run(main)
