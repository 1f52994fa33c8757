"""Experiment: when do resets, and staggered ones, matter? pipeline.py on a noisy quadratic (paper: section 4.3, without RL).

    python -m experiments.pipeline_toy                              # a minute of a CPU core

An agent is 24 numbers w with the loss sum_i c_i w_i^2 / 2, curvatures c from .01 to 1 and noisy gradients. It lives for 252
updates: 63 meta-steps of 4. What is learned is a step size over age: sign descent whose step is alpha exp(theta . clocks), 9
numbers theta and 9 clocks that tell the age, 1 and exp(-age / 2), exp(-age / 4), ..., exp(-age / 256). The rule can know the
age and nothing else, so all depends on whether it is taught about all ages. A meta-run's score is the mean loss over the
lives of 512 fresh agents, in units of the best constant step's. A constant meta learning rate, as in the paper; one column
has a rate that falls to 0.

Written before the runs, from a sketch in NumPy of such a quadratic (12 to 20 meta-seeds, each arm at its best rate). With the
paper's gradient: staggered .42 to .46, synchronised .68 to .91, no resets 5.4 to 5.7. With pes: .70, .68, 1.05. So resets
should matter for every estimator, and staggering for the paper's gradient only.

The folder receives config.json, results.csv (one row per meta-run) and pipeline_toy.png.
"""

import csv
import itertools
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import a2c
import evolution
import pipeline
from experiments import arms
from harness import plots, runs, statistics
from harness.plots import plt

CURVATURES = jnp.logspace(-2, 0, 24)
CLOCKS = 2.0 ** jnp.arange(1, 9)  # time constants in updates
ALPHA, NOISE, SIGMA = 0.05, 0.3, 0.1
INNER_UPDATES, LIFE = 4, 63  # M; m in meta-steps
RESETS = pipeline.RESETS
# Units that are never reset draw the noise of nres and pes again after as many meta-steps as a life has elsewhere.
ESTIMATORS = {
    "gradient": lambda interval: pipeline.gradient,
    "nres": lambda interval: evolution.nres(SIGMA, interval),
    "pes": lambda interval: evolution.pes(SIGMA, interval),
}
RATES = {"0.01": (0.01, 1), "0.03": (0.03, 1), "0.1": (0.1, 1), "0.03 to 0": (0.03, 0)}  # first, part of it at the end


@dataclass(frozen=True)
class Config:
    num_units: int = 64  # n
    meta_steps: int = 378  # of a meta-run; 63 make a life
    seeds: int = 8  # meta-runs of each setting
    out: str | None = None  # folder of this run; None: a new one under runs/
    resume: str | None = None  # folder of an interrupted run, which is made again with its config


class Agent(NamedTuple):
    params: jax.Array  # [24] w
    opt_state: jax.Array  # [] age in updates


def loss(params):
    return jnp.sum(CURVATURES * params**2) / 2


def make_learner():
    """The Learner of pipeline.py whose agents descend the quadratic."""

    def init(key, optimizer):
        params = jax.random.normal(key, CURVATURES.shape)
        return Agent(params, optimizer.init(params))

    def update(optimizer, agent, key):
        noise = NOISE * jnp.sqrt(CURVATURES) * jax.random.normal(key, CURVATURES.shape)
        updates, opt_state = optimizer.update(CURVATURES * agent.params + noise, agent.opt_state)
        params = agent.params + updates
        return Agent(params, opt_state), {"reward": -loss(params)}

    return a2c.Learner(init, update, lambda agent, key: (loss(agent.params), (agent, {"reward": -loss(agent.params)})))


def step_size(theta, age):
    """alpha exp(theta . clocks): theta [9], age [...] in updates."""
    clocks = jnp.exp(-jnp.asarray(age)[..., None] / CLOCKS)
    return ALPHA * jnp.exp(theta[0] + clocks @ theta[1:])


def sign_descent(step):
    """Sign descent with a step size (age) -> step; its state is the age."""

    def update(grads, age, params=None):
        return -step(age) * jnp.sign(grads), age + 1

    return optax.GradientTransformation(lambda params: jnp.zeros(()), update)


def make_optimizer(theta):
    return sign_descent(partial(step_size, theta))


def life_loss(step, num_agents=512):
    """Mean loss over the lives of fresh agents with a step size (age) -> step."""
    learner, optimizer = make_learner(), sign_descent(step)

    def live(key):
        init_key, life_key = jax.random.split(key)
        keys = jax.random.split(life_key, LIFE * INNER_UPDATES)
        _, metrics = jax.lax.scan(partial(learner.update, optimizer), learner.init(init_key, optimizer), keys)
        return -metrics["reward"].mean()

    return jax.vmap(live)(jax.random.split(jax.random.key(99), num_agents)).mean()


def references():
    """(the best constant step's loss over a life, that of the best step / (1 + age / time)), by grids."""
    steps, times = jnp.geomspace(0.003, 1, 26), jnp.geomspace(4, 256, 13)
    constant = jax.vmap(lambda s: life_loss(lambda age: s))(steps).min()
    falling = lambda s, t: life_loss(lambda age: s / (1 + age / t))
    return float(constant), float(jax.vmap(lambda t: jax.vmap(falling, (0, None))(steps, t))(times).min())


def make_task(estimator, resets, config, mesh=None):
    """The pipeline.Task of one arm."""
    settings = pipeline.Config(config.num_units, LIFE, INNER_UPDATES, resets, units_at_once=config.num_units)
    estimate = ESTIMATORS[estimator](LIFE if resets == "none" else 0)
    return pipeline.make_task(make_learner(), make_optimizer, settings, mesh, estimate)


def make_meta_optimizer(rate, meta_steps):
    first, part = RATES[rate]
    schedule = optax.linear_schedule(first, first * part, meta_steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def meta_train(task, meta_optimizer, config, seed):
    """theta [9] after a meta-run."""
    key = jax.random.key(seed)
    state = pipeline.init([task], meta_optimizer, jnp.zeros(1 + len(CLOCKS)), key)
    for _ in range(config.meta_steps):
        state, _ = pipeline.meta_step([task], meta_optimizer, state, key)
    return state.meta_params


def run_all(config, mesh):
    """{(estimator, resets, rate): [seeds, 9] theta}."""
    learned, pairs = {}, list(itertools.product(ESTIMATORS, RESETS))
    meta_optimizers = {rate: make_meta_optimizer(rate, config.meta_steps) for rate in RATES}
    for estimator, resets in tqdm(pairs, unit="arm"):
        task = make_task(estimator, resets, config, mesh)
        for rate, meta_optimizer in meta_optimizers.items():
            thetas = [meta_train(task, meta_optimizer, config, seed) for seed in range(config.seeds)]
            learned[estimator, resets, rate] = jnp.stack(thetas)
    return learned


def text(scores, hand_made):
    """The table as text; scores: {(estimator, resets, rate): [seeds]}."""
    number = lambda x: f"{x:.2f}" if x < 100 else "> 100"
    lines = [f"{'meta learning rate':26}" + "".join(f"{rate:22}" for rate in RATES)]
    for estimator, resets in itertools.product(ESTIMATORS, RESETS):
        cells = [statistics.interval(scores[estimator, resets, rate]) for rate in RATES]
        cells = "".join(f"{'{} [{}, {}]'.format(*map(number, cell)):22}" for cell in cells)
        lines.append(f"{estimator:11}{resets:15}{cells}".rstrip())
    return "\n".join([*lines, f"a hand-made step / (1 + age / time)  {hand_made:.2f}"])


def draw(path, learned, scores, hand_made):
    """Left: each meta-run's score. Right: the step sizes that the paper's gradient learned with rate 0.03."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), width_ratios=(3, 2), layout="constrained")
    positions = np.arange(len(ESTIMATORS) * len(RATES))
    for resets, shift, color in zip(RESETS, (-0.2, 0, 0.2), ("C0", "C1", "C3")):
        for x, (estimator, rate) in zip(positions, itertools.product(ESTIMATORS, RATES)):
            values = np.minimum(np.nan_to_num(scores[estimator, resets, rate], nan=np.inf), 30)
            label = resets if x == 0 else None
            left.plot(np.full(len(values), x + shift), values, ".", color=color, alpha=0.6, label=label)
        ages = np.arange(LIFE * INNER_UPDATES)
        for theta in learned["gradient", resets, "0.03"]:
            right.plot(ages, step_size(theta, ages), color=color, alpha=0.5)
    left.axhline(1, color="black", linestyle=":", label="best constant step")
    left.axhline(hand_made, color="black", linestyle="--", label="step / (1 + age / time)")
    left.set_yscale("log")
    pairs = itertools.product(ESTIMATORS, enumerate(RATES))
    left.set_xticks(positions, [rate if i else f"{rate}\n{estimator}" for estimator, (i, rate) in pairs], fontsize=8)
    left.set(title="loss over a life / the best constant step's; 30 and more at 30")
    left.set_xlabel("estimator, meta learning rate")
    right.set(title="learned by the paper's gradient, rate 0.03", xlabel="age in updates", ylabel="step size")
    right.set_yscale("log")
    left.legend(frameon=False, fontsize=8)
    return plots.save(figure, path)


def write_csv(path, scores):
    with runs.whole_file(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["estimator", "resets", "meta_learning_rate", "seed", "score"])
        for setting, values in scores.items():
            writer.writerows([*setting, seed, f"{value:.6g}"] for seed, value in enumerate(values))


def main(argv=None):
    config = runs.parse(Config, {}, __doc__, argv)
    runs.check_positive(config, ("num_units", "meta_steps", "seeds"))
    mesh = runs.use_devices(1)

    def body(folder):
        best_constant, hand_made = references()
        learned = run_all(config, mesh)
        score = jax.jit(jax.vmap(lambda theta: life_loss(partial(step_size, theta)) / best_constant))
        scores = {setting: np.asarray(score(thetas)) for setting, thetas in learned.items()}
        write_csv(folder / "results.csv", scores)
        print(
            f"\nMean loss over a life, in units of the best constant step's.\n{text(scores, hand_made / best_constant)}"
        )
        print(f"\n{statistics.caption(config.seeds)} A seed is a meta-run here.")
        print(f"Picture: {draw(folder / 'pipeline_toy.png', learned, scores, hand_made / best_constant)}")

    arms.run("pipeline_toy", config, mesh, body)


if __name__ == "__main__":
    runs.run(main)
