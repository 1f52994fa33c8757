"""Pipeline training against enumeration, plain Python loops, golden numbers and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_units import (
    ESTIMATORS,
    GOLDEN,
    THETA,
    Learner,
    Unit,
    assert_close,
    living_units,
    make_optimizer,
    make_task,
    noisy_learner,
    run,
)

import optim4rl
import pipeline


def one_unit(units, i):
    return jax.tree.map(lambda x: np.asarray(x[i]), units.state)


def test_resets_follow_the_schedule_of_the_paper():
    for n in [*range(1, 20), 64, 100, 512]:
        for m in [*range(1, 20), 32, 72, 288, 576]:
            due = np.asarray(pipeline.reset_due(np.arange(m)[:, None], np.arange(n), n, m))  # (m, n)
            # Exact where linspace's floating-point rounding could fall below a whole number: numerator // denominator.
            offsets = np.floor(np.linspace(0, m - 1, n) + 1e-9)
            np.testing.assert_array_equal(due, np.arange(m)[:, None] == offsets)
            assert np.all(due.sum(0) == 1)  # each unit once in an interval
    steps, units = np.arange(100)[:, None], np.arange(8)
    for never in (dict(reset_interval=0), dict(reset_interval=5, resets="none")):
        assert not np.any(pipeline.reset_due(steps, units, 8, **never))
    together = pipeline.reset_due(steps, units, 8, 5, "synchronised")
    np.testing.assert_array_equal(together, np.broadcast_to(steps % 5 == 0, (100, 8)))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_reset_unit_has_nothing_left_of_its_past(estimator):
    task = make_task(estimator=estimator)
    pasts = [living_units(task, jax.random.key(seed)) for seed in (2, 3)]
    renewed = set()
    for step in range(5):
        units_a, units_b = (run(task, units, range(step + 1))[1] for units in pasts)
        renewed |= {i for i in range(6) if int(np.floor(np.linspace(0, 4, 6)[i])) == step}
        for i in range(6):
            same = jax.tree.leaves(jax.tree.map(np.array_equal, one_unit(units_a, i), one_unit(units_b, i)))
            assert all(same) == (i in renewed)


def test_units_do_not_influence_one_another():
    task = make_task(reset_interval=0)
    units = living_units(task, jax.random.key(2))
    perturbed = units._replace(state=units.state._replace(params=units.state.params.at[2].add(0.1)))
    _, after, _ = run(task, units, range(3))
    _, after_perturbed, _ = run(task, perturbed, range(3))
    for i in range(6):
        same = np.array_equal(after.state.params[i], after_perturbed.state.params[i])
        assert same == (i != 2)  # to the bit


def test_meta_gradient_is_that_of_the_reference(golden, golden_weights):
    A, b, w0 = (golden[f"Optim4RL/quad/{name}"] for name in ("A", "b", "w0"))
    quadratic = lambda w: 0.5 * jnp.sum((A @ w - b) ** 2)

    def update(optimizer, unit, key):
        updates, opt_state = optimizer.update(jax.grad(quadratic)(unit.params), unit.opt_state)
        return Unit(unit.params + updates, opt_state), {}

    learner = Learner(None, update, lambda unit, key: (quadratic(unit.params), (unit, {})))
    make = lambda meta_params: optim4rl.optim4rl(golden["learning_rate"], meta_params)
    meta_params = optim4rl.from_reference(golden_weights("Optim4RL/param/"))
    unit = Unit(jnp.asarray(w0), make(meta_params).init(w0))
    gradient = jax.jit(lambda theta: pipeline.meta_gradient(learner, make, 4, theta, unit, jax.random.key(0)))
    meta_grads, unit, metrics = gradient(meta_params)
    assert_close(unit.params, golden["Optim4RL/quad/w4"], GOLDEN)
    assert_close(metrics["meta_loss"], golden["Optim4RL/quad/meta_loss"], GOLDEN)
    assert_close(meta_grads, optim4rl.from_reference(golden_weights("Optim4RL/quad/meta_grad/")), GOLDEN)


def test_meta_gradient_is_that_of_finite_differences():
    # Gradients come from the key alone: Optim4RL takes them as given, so that only then both mean the same.
    def update(optimizer, unit, key):
        updates, opt_state = optimizer.update(jax.random.normal(key, (4,)), unit.opt_state)
        return Unit(unit.params + updates, opt_state), {}

    learner = Learner(None, update, lambda unit, key: (jnp.sum((unit.params - 1) ** 2), (unit, {})))
    make = lambda meta_params: optim4rl.optim4rl(0.1, meta_params)
    with jax.enable_x64(True):
        random = np.random.default_rng(4)
        like = optim4rl.init_meta_params(jax.random.key(0))
        flat, unflatten = jax.flatten_util.ravel_pytree(jax.tree.map(lambda x: random.normal(0, 0.5, x.shape), like))
        unit = Unit(jnp.arange(4.0), make(unflatten(flat)).init(jnp.arange(4.0)))
        gradient = jax.jit(lambda x: pipeline.meta_gradient(learner, make, 4, unflatten(x), unit, jax.random.key(5)))
        meta_loss = lambda x: gradient(x)[2]["meta_loss"]
        meta_grads, step = jax.flatten_util.ravel_pytree(gradient(flat)[0])[0], 1e-5
        for direction in random.normal(size=(4, flat.size)):
            slope = (meta_loss(flat + step * direction) - meta_loss(flat - step * direction)) / (2 * step)
            np.testing.assert_allclose(meta_grads @ direction, slope, rtol=1e-6)  # error of the differences: step^2


def test_a_step_is_the_mean_of_a_python_loop_over_units():
    learner, task, key = noisy_learner(), make_task(), jax.random.key(1)
    units = living_units(task, jax.random.key(2))
    meta_grads, after, metrics = run(task, units, [2])
    results = []
    for i in range(6):
        reset_key, unroll_key = pipeline.unit_keys(key, i, 2)
        unit = jax.tree.map(lambda x: x[i], units.state)
        if int(np.floor(np.linspace(0, 4, 6)[i])) == 2:
            unit = learner.init(reset_key, make_optimizer(THETA))
        results.append(pipeline.meta_gradient(learner, make_optimizer, 3, THETA, unit, unroll_key))
    all_grads, all_units, all_metrics = (jax.tree.map(lambda *xs: np.stack(xs), *x) for x in zip(*results))
    assert_close(after.state, all_units)
    assert_close(meta_grads, jax.tree.map(lambda x: x.mean(0), all_grads))
    assert_close(metrics, jax.tree.map(lambda x: x.mean(0), all_metrics) | {"diverged": 0})


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_devices_and_batches_of_units_change_only_the_rounding(estimator):
    """The meta-parameters after six meta-steps, resets among them."""

    def learn(num_devices, units_at_once=None):
        mesh = jax.sharding.Mesh(jax.devices("cpu")[:num_devices], ("units",))
        meta_optimizer, key = optax.adam(1e-2), jax.random.key(2)
        tasks = [make_task(mesh=mesh, num_units=8, estimator=estimator, units_at_once=units_at_once)]
        state = pipeline.init(tasks, meta_optimizer, THETA, key)
        for _ in range(6):
            state, metrics = pipeline.meta_step(tasks, meta_optimizer, state, key)
        return jax.device_get((state, metrics))

    assert_close(learn(2, units_at_once=3), learn(1))  # of 4 units on each device: 3 and the one that remains


@pytest.mark.parametrize("break_params", [True, False])
def test_a_diverged_unit_is_left_out_counted_and_reset(break_params):
    """Either its parameters or its meta-gradient alone are not finite."""
    task, key = make_task(noisy_learner(break_params), reset_interval=0), jax.random.key(1)
    healthy = living_units(task, jax.random.key(2))
    poisoned = healthy._replace(state=healthy.state._replace(poison=healthy.state.poison.at[4].set(1.0)))
    meta_grads, after, metrics = run(task, poisoned, [0])
    assert metrics["diverged"] == 1
    learner, all_grads = noisy_learner(), []
    for i in (0, 1, 2, 3, 5):
        unroll_key = pipeline.unit_keys(key, i, 0)[1]
        unit = jax.tree.map(lambda x: x[i], healthy.state)
        all_grads.append(pipeline.meta_gradient(learner, make_optimizer, 3, THETA, unit, unroll_key)[0])
    assert_close(meta_grads, jax.tree.map(lambda *xs: np.mean(xs, 0), *all_grads))

    _, after, metrics = run(task, after, [1])
    assert metrics["diverged"] == 0 and after.state.poison[4] == 0 and np.all(np.isfinite(after.state.params))


def test_several_tasks_are_averaged_each_rescaled_if_asked():
    tasks, key, meta_optimizer = [make_task(), make_task(num_units=4)], jax.random.key(7), optax.sgd(1.0)
    grads = []
    for i, task in enumerate(tasks):
        units = task.init(THETA, jax.random.fold_in(key, i))
        grads.append(task.step(THETA, units, 0, jax.random.fold_in(key, i))[0])
    for norm in (None, 0.5):
        state = pipeline.init(tasks, meta_optimizer, THETA, key)
        state, metrics = pipeline.meta_step(tasks, meta_optimizer, state, key, task_grad_norm=norm)
        factors = [1 if norm is None else norm / np.sqrt(sum(x**2 for x in jax.tree.leaves(g))) for g in grads]
        expected = jax.tree.map(lambda p, a, b: p - (factors[0] * a + factors[1] * b) / 2, THETA, *grads)
        assert_close(state.meta_params, expected)
        assert state.step == 1 and len(metrics) == 2
    assert not np.any(pipeline.rescale(jnp.zeros(3), 0.5))  # a zero gradient stays zero


def test_a_task_without_a_finite_meta_gradient_is_skipped():
    key, meta_optimizer = jax.random.key(7), optax.sgd(1.0)
    tasks = [make_task(reset_interval=0) for _ in range(2)]
    state = pipeline.init(tasks, meta_optimizer, THETA, key)
    state, _ = pipeline.meta_step(tasks, meta_optimizer, state, key)  # in which the units come to life
    healthy, lost = state.units
    poisoned = lost._replace(state=lost.state._replace(poison=jnp.ones(6)))
    before = state.meta_params
    expected = tasks[0].step(before, jax.tree.map(jnp.copy, healthy), state.step, jax.random.fold_in(key, 0))[0]
    state, metrics = pipeline.meta_step(tasks, meta_optimizer, state._replace(units=(healthy, poisoned)), key)
    assert [bool(m["skipped"]) for m in metrics] == [False, True] and metrics[1]["diverged"] == 6
    assert_close(state.meta_params, jax.tree.map(lambda p, g: p - g, before, expected))
    _, metrics = pipeline.meta_step(tasks, meta_optimizer, state, key)
    assert not any(m["skipped"] for m in metrics)  # all its units were reset


def test_a_meta_step_without_any_finite_meta_gradient_changes_nothing():
    """Neither theta nor Adam's moments and count: twenty lost meta-steps later the next one is what it would have been."""
    key, meta_optimizer = jax.random.key(7), optax.adam(optax.linear_schedule(0.1, 0.0, 100))
    tasks = [make_task(reset_interval=0)]
    state = pipeline.init(tasks, meta_optimizer, THETA, key)
    for _ in range(3):
        state, _ = pipeline.meta_step(tasks, meta_optimizer, state, key)
    before = jax.device_get((state.meta_params, state.meta_opt_state))
    nothing = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), THETA)
    huge = jax.tree.map(lambda x: jnp.full_like(x, 3e38), THETA)  # finite, but Adam's square of it is not
    for grads in 10 * [nothing, huge]:
        meta_params, opt_state, skipped = pipeline.update_meta_params(meta_optimizer, None, [grads], *before[::-1])
        assert bool(skipped[0])
        jax.tree.map(np.testing.assert_array_equal, (meta_params, opt_state), before)


@pytest.mark.parametrize("size, value", [("num_units", 0), ("reset_interval", -1), ("inner_updates", 0)])
def test_impossible_sizes_are_refused(size, value):
    with pytest.raises(ValueError, match=f"^{size} is {value}; it must be at least"):
        pipeline.make_task(noisy_learner(), make_optimizer, pipeline.Config(**{size: value}))


def test_units_that_devices_cannot_share_are_refused():
    mesh = jax.sharding.Mesh(jax.devices("cpu")[:2], ("units",))
    with pytest.raises(ValueError, match="num_units is 7; 2 devices can share 6 or 8 equally"):
        make_task(mesh=mesh, num_units=7)
