"""Evolution strategies against NumPy loops, and against a life whose gradient is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_units import GOLDEN, THETA, Learner, Unit, assert_close, make_optimizer, noisy_learner

import evolution
import pipeline


@pytest.mark.parametrize("backend", ["cpu", "gpu"])  # the agents of a pair one by one; at once, which a CPU can do, too
@pytest.mark.parametrize("name", ["pes", "nres"])
def test_evolution_strategies_are_those_of_a_numpy_loop(monkeypatch, name, backend):
    """Three meta-steps of one pair: both agents see the same noise, and only the optimizers differ, by an epsilon that pes
    draws in each, and that nres keeps."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    sigma, random = 0.1, jax.random.key(3)
    init, step = getattr(evolution, name)(sigma)(noisy_learner(), make_optimizer, 3)
    pair = init(THETA, random)
    draw = lambda key: jax.tree.map(lambda e: sigma * float(e), optax.tree.random_like(key, THETA))
    only_epsilon, total = draw(jax.random.split(random)[1]), {"log_rate": 0.0, "decay": 0.0}
    params, momentum = np.array(pair.agents.params), np.zeros((2, 3))
    for key in jax.random.split(random, 3):
        meta_grads, pair, metrics = step(THETA, pair, key)
        epsilon_key, unroll_key = jax.random.split(key)
        epsilon = draw(epsilon_key) if name == "pes" else only_epsilon
        total = {name: total[name] + epsilon[name] for name in total} if name == "pes" else only_epsilon
        losses = np.zeros(2)
        for noise in (np.array(jax.random.normal(k, (3,))) for k in jax.random.split(unroll_key, 3)):
            for i, sign in enumerate((1, -1)):
                rate, decay = (float(THETA[name]) + sign * epsilon[name] for name in ("log_rate", "decay"))
                momentum[i] = params[i] + noise + decay * momentum[i]
                params[i] -= np.exp(rate) * momentum[i]
                losses[i] += np.sum(params[i] ** 2) / 3
        expected = {name: total[name] * (losses[0] - losses[1]) / (2 * sigma**2) for name in total}
        assert_close(meta_grads, expected, dict(rtol=1e-3, atol=1e-4))  # a difference of like numbers over sigma^2
        assert_close((pair.agents.params, metrics["meta_loss"]), (params, losses.mean()), GOLDEN)


def test_evolution_strategies_see_the_whole_life_where_the_gradient_sees_its_last_window():
    # w grows by theta in each of 5 windows; loss w^2. Over a life: d/dtheta mean_t (t theta)^2 = 2 theta mean_t t^2 = 22 theta.
    # Truncated, the w before the window counts as given: 2 theta mean_t t = 6 theta.
    def update(optimizer, unit, key):
        updates, opt_state = optimizer.update(jnp.ones(()), unit.opt_state)
        params = unit.params + updates
        return Unit(params, opt_state), {"reward": -(params**2)}

    init = lambda key, optimizer: Unit(jnp.zeros(()), optimizer.init(0.0))
    learner = Learner(init, update, lambda unit, key: (unit.params**2, (unit, {"reward": -(unit.params**2)})))
    make, theta, num_units, grads = lambda theta: optax.sgd(-theta), jnp.array(0.5), 2000, {}
    estimators = {"gradient": pipeline.gradient, "pes": evolution.pes(0.1), "nres": evolution.nres(0.1)}
    for estimator in estimators:
        task = pipeline.make_task(learner, make, pipeline.Config(num_units, 5, 1), estimator=estimators[estimator])
        units = task.init(theta, jax.random.key(0))
        means = []
        for step in range(30):
            meta_grads, units, _ = task.step(theta, units, jnp.int32(step), jax.random.key(1))
            means.append(meta_grads)
        grads[estimator] = np.array(means[5:])  # by then every unit began at its own time; all ages in 5 meta-steps
    np.testing.assert_allclose(grads["gradient"].mean(), 3.0, rtol=1e-3)
    # A life's estimates belong together: means of whole lives are independent.
    errors = {name: x.reshape(5, 5).mean(1).std() / np.sqrt(5) for name, x in grads.items()}
    for name in ("pes", "nres"):
        assert abs(grads[name].mean() - 11.0) < 4 * errors[name] and errors[name] < 0.5


@pytest.mark.parametrize("name", ["pes", "nres"])
def test_noise_begins_again_at_an_interval_of_its_own(name):
    """nres keeps one epsilon for three meta-steps, then another; the sum of pes begins again at zero."""
    init, step = getattr(evolution, name)(0.1, noise_interval=3)(noisy_learner(), make_optimizer, 1)
    pair, seen = init(THETA, jax.random.key(0)), []
    for key in jax.random.split(jax.random.key(1), 7):
        _, pair, _ = step(THETA, pair, key)
        new = optax.tree.random_like(jax.random.split(key)[0], THETA)
        seen.append((float(pair.xi["decay"]), 0.1 * float(new["decay"])))
    xi, new = np.transpose(seen)
    if name == "nres":
        np.testing.assert_array_equal(xi[:3], xi[0])
        np.testing.assert_allclose(xi[3:], [new[3]] * 3 + [new[6]], rtol=1e-6)
    else:
        expected = np.concatenate([np.cumsum(new[:3]), np.cumsum(new[3:6]), new[6:]])
        np.testing.assert_allclose(xi, expected, rtol=1e-5, atol=1e-6)
