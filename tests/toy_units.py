"""Units that learn in microseconds, for the tests of pipeline.py and evolution.py."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import evolution
import pipeline

GOLDEN = dict(rtol=1e-5, atol=1e-6)  # two float32 programs that add in different order
FLOAT32 = dict(rtol=2e-5, atol=1e-7)  # the same sums, compiled in another way


class Unit(NamedTuple):
    params: Any
    opt_state: Any
    poison: Any = 0.0  # not zero: this unit goes wrong


class Learner(NamedTuple):
    init: Any
    update: Any
    loss: Any


def noisy_learner(break_params=False):
    """Three numbers, noisy gradients of |w|^2 / 2 from the key. Deterministic given its keys, different for each unit."""

    def measure(params):
        return {"reward": -jnp.sum(params**2)}

    def init(key, optimizer):
        params = jax.random.normal(key, (3,))
        return Unit(params, optimizer.init(params), jnp.zeros(()))

    def update(optimizer, unit, key):
        grads = unit.params + jax.random.normal(key, (3,))
        updates, opt_state = optimizer.update(grads, unit.opt_state, unit.params)
        params = unit.params + updates
        params = jnp.where(unit.poison * break_params != 0, jnp.nan, params)
        return Unit(params, opt_state, unit.poison), measure(params)

    def loss(unit, key):
        value = jnp.sum((unit.params + 0.1 * jax.random.normal(key, (3,))) ** 2) / 2
        return value * jnp.where(unit.poison != 0, jnp.nan, 1.0), (unit, measure(unit.params))

    return Learner(init, update, loss)


THETA = {"log_rate": jnp.log(jnp.array(0.05)), "decay": jnp.array(0.8)}


def make_optimizer(theta):
    return optax.sgd(jnp.exp(theta["log_rate"]), momentum=theta["decay"])


ESTIMATORS = {"gradient": pipeline.gradient, "pes": evolution.pes(0.03), "nres": evolution.nres(0.03)}


def make_task(learner=None, mesh=None, num_units=6, reset_interval=5, estimator="gradient", **config):
    config = pipeline.Config(num_units=num_units, reset_interval=reset_interval, inner_updates=3, **config)
    return pipeline.make_task(learner or noisy_learner(), make_optimizer, config, mesh, ESTIMATORS[estimator])


def run(task, units, steps, key=jax.random.key(1), theta=THETA):
    """Successive meta-steps with the same theta: the last (meta_grads, units, metrics). The units given are kept."""
    units = jax.tree.map(jnp.copy, units)  # a step gives their memory away
    for step in steps:
        meta_grads, units, metrics = task.step(theta, units, jnp.int32(step), key)
    return meta_grads, units, metrics


def living_units(task, key):
    """Units after their first meta-step."""
    return run(task, task.init(THETA, key), [0], key)[1]


def assert_close(x, y, tolerance=FLOAT32):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), x, y)
