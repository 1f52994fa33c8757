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
from experiments import contents
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
COLUMNS = ("estimator", "resets", "meta_learning_rate", "seed", "score")
RATES = {"0.01": (0.01, 1), "0.03": (0.03, 1), "0.1": (0.1, 1), "0.03 to 0": (0.03, 0)}  # first, part of it at the end


@dataclass(frozen=True)
class Config:
    num_units: int = 64  # n
    meta_steps: int = 378  # of a meta-run; 63 make a life
    seeds: int = 8  # meta-runs of each setting
    out: str | None = None  # folder of this run; None: a new one under runs/


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
    """(the best constant step's loss over a life, the best step / (1 + age / time), its loss), by grids."""
    steps, times = jnp.geomspace(0.003, 1, 26), jnp.geomspace(4, 256, 13)
    constant = jax.vmap(lambda s: life_loss(lambda age: s))(steps).min()
    losses = jax.vmap(lambda t: jax.vmap(lambda s: life_loss(lambda age: s / (1 + age / t)))(steps))(times)
    t, s = np.unravel_index(losses.argmin(), losses.shape)
    return float(constant), lambda age: steps[s] / (1 + age / times[t]), float(losses.min())


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


def table(rows):
    """A line per estimator and kind of resets, a column per meta learning rate; a loss of 100 and more is one that exploded."""
    scores = {}
    for row in rows:
        setting = row["estimator"], row["resets"]
        scores.setdefault(setting, {}).setdefault(row["meta_learning_rate"], []).append(float(row["score"]))
    number = lambda x: contents.number(x) if x < 100 else "> 100"
    of_rate = lambda values: statistics.shown(*statistics.interval(values), number)
    lines = [[*setting, *map(of_rate, rates.values())] for setting, rates in scores.items()]
    return contents.markdown(f"meta-gradient by | resets | {' | '.join(RATES)}", *lines)


def draw(path, learned, hand_made):
    """The step sizes that the paper's gradient learned with rate 0.03, one line per meta-run, and the best made by hand."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    ages = np.arange(LIFE * INNER_UPDATES)
    for resets, color in zip(RESETS, ("C0", "C1", "C3")):
        for i, theta in enumerate(learned["gradient", resets, "0.03"]):
            axis.plot(ages, step_size(theta, ages), color=color, alpha=0.5, label=resets if i == 0 else None)
    axis.plot(ages, hand_made(ages), color="black", linestyle="--", label="by hand: step / (1 + age / time)")
    axis.set(title="learned by the paper's gradient, rate 0.03", xlabel="age in updates", ylabel="step size")
    axis.set_yscale("log")
    axis.legend(frameon=False)
    return plots.save(figure, path)


def main(argv=None):
    config = runs.parse(Config, {}, __doc__, argv)
    runs.check_positive(config, ("num_units", "meta_steps", "seeds"))
    mesh = runs.use_devices(1)

    folder = runs.new_folder(config.out, "pipeline_toy", config)
    best_constant, hand_made, hand_made_loss = references()
    learned, rows = run_all(config, mesh), []
    score = jax.jit(jax.vmap(lambda theta: life_loss(partial(step_size, theta)) / best_constant))
    for setting, thetas in learned.items():
        for seed, value in enumerate(score(thetas)):
            rows.append(dict(zip(COLUMNS, (*setting, seed, f"{value:.6g}"))))
    runs.write_csv(folder / "results.csv", COLUMNS, [row.values() for row in rows])
    print(f"\nMean loss over a life, in units of the best constant step's.\n{table(rows)}")
    print(f"A step size made by hand: {hand_made_loss / best_constant:.2f}. {statistics.caption(config.seeds)}")
    print(f"A seed is a meta-run here. Picture: {draw(folder / 'pipeline_toy.png', learned, hand_made)}")


CONTENTS = {"pipeline_toy": lambda: table(contents.read_csv("pipeline_toy/results.csv"))}


if __name__ == "__main__":
    runs.run(main)
