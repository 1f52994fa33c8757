"""GatedAdam against a NumPy transcription, optax's Adam and RMSProp, and finite differences."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from harness import weights
from learned_optimizers import gated_adam

ROOT = pathlib.Path(__file__).resolve().parents[1]
FLOAT64 = {"rtol": 1e-9, "atol": 1e-12}  # rounding of some hundred operations
FLOAT32 = {"rtol": 1e-4, "atol": 1e-6}


def random_meta_params(seed=0, dtype=np.float32):
    """Every number moved at random, so that no term of the rule is hidden by a zero."""
    random = np.random.default_rng(seed)
    untrained = gated_adam.init_meta_params(jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(x + random.normal(0, 0.3, x.shape), dtype), untrained)


def random_grads(seed, *shape):
    """Of every magnitude from 1e-5 to 1."""
    random = np.random.default_rng(seed)
    return random.normal(size=shape) * 10.0 ** random.uniform(-5, 0, shape)


def unroll(optimizer, grads):
    """The updates for successive gradients, one after another, [T, ...]."""
    step, state, updates = jax.jit(optimizer.update), optimizer.init(grads[0]), []
    for g in grads:
        update, state = step(g, state)
        updates.append(update)
    return np.stack(updates)


def numpy_unroll(meta_params, grads, eps):
    """The equations of the file's header, scalar by scalar: updates / alpha, [T, P]."""
    theta = {name: np.asarray(x) for name, x in meta_params.items()}
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    b1, b2 = sigmoid(theta["decay_logits"])
    m, v, updates = np.zeros_like(grads[0]), np.zeros_like(grads[0]), np.zeros_like(grads)
    for t, g in enumerate(grads, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        for i in range(len(g)):
            signal = np.log(m_hat[i] ** 2 / (v_hat[i] + eps) + 1e-4) / 5
            size = np.log(v_hat[i] / (v_hat.mean() + eps) + 1e-8) / 10
            ages = [np.exp(-t / 10), np.exp(-t / 100), np.exp(-t / 1000)]
            x = np.array([signal, size, *ages])
            o1, o2 = theta["kernel"] @ x + theta["bias"]
            s = sigmoid(o2)
            updates[t - 1, i] = -np.exp(o1) * ((1 - s) * g[i] + s * m_hat[i]) / np.sqrt(v_hat[i] + eps)
    return updates


def test_rule_is_the_equations_of_its_header_in_numpy():
    with jax.enable_x64(True):
        meta_params, grads = random_meta_params(1, np.float64), random_grads(2, 6, 20)
        updates = unroll(gated_adam.gated_adam(0.01, meta_params, eps=1e-7), grads)
    np.testing.assert_allclose(updates, 0.01 * numpy_unroll(meta_params, grads, eps=1e-7), **FLOAT64)


@pytest.mark.parametrize("bias, oracle", [(40.0, "adam"), (-40.0, "rmsprop")])
def test_untrained_rule_is_adam_or_rmsprop_where_its_gate_is_closed(bias, oracle):
    meta_params, grads = gated_adam.init_meta_params(jax.random.key(0)), random_grads(3, 30, 50).astype(np.float32)
    meta_params["bias"] = jnp.array([0.0, bias])
    expected = {
        "adam": optax.adam(0.1, b1=0.9, b2=0.99, eps=0, eps_root=1e-16),
        "rmsprop": optax.rmsprop(0.1, decay=0.99, eps=1e-16, bias_correction=True),
    }[oracle]
    np.testing.assert_allclose(
        unroll(gated_adam.gated_adam(0.1, meta_params), grads), unroll(expected, grads), **FLOAT32
    )


def test_rule_does_not_see_the_scale_of_the_gradients_and_is_odd_in_them():
    optimizer, grads = gated_adam.gated_adam(1.0, random_meta_params()), random_grads(4, 8, 40).astype(np.float32)
    updates = unroll(optimizer, grads)
    np.testing.assert_allclose(unroll(optimizer, 1e3 * grads), updates, rtol=1e-3, atol=1e-5)  # eps is seen a little
    np.testing.assert_array_equal(unroll(optimizer, -grads), -updates)


def test_gates_stop_counting_at_the_age_of_the_oldest_agents_of_meta_training():
    meta_params, moments = random_meta_params(), (jnp.full(3, 0.2), jnp.full(3, 0.2), 0.2)
    young, oldest, older = (gated_adam.gates(meta_params, *moments, age) for age in (251, 252, 50_000))
    np.testing.assert_array_equal(oldest, older)
    assert (np.array(young) != oldest).any()


def test_a_scalar_without_gradient_does_not_move():
    grads = random_grads(5, 8, 40).astype(np.float32)
    grads[:, ::4] = 0
    updates = unroll(gated_adam.gated_adam(1.0, random_meta_params()), grads)
    assert not np.any(updates[:, ::4]) and np.all(np.isfinite(updates)) and np.all(updates[:, 1::4])


def test_the_layout_of_a_tree_does_not_matter_and_shapes_and_dtypes_are_kept():
    shapes = {"a": (7, 5), "b": (3,), "c": (), "conv": (2, 3, 4, 6), "empty": (0,)}
    grads = [{name: jax.random.normal(jax.random.key(t), shape) for name, shape in shapes.items()} for t in range(3)]
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for g in grads]
    optimizer = gated_adam.gated_adam(0.1, random_meta_params())
    state, update_fn, updates = optimizer.init(grads[0]), jax.jit(optimizer.update), []
    for g in grads:
        update, state = update_fn(g, state)
        assert {name: x.shape for name, x in update.items()} == shapes
        updates.append(np.concatenate([np.ravel(x) for x in jax.tree.leaves(update)]))
    expected = 0.1 * numpy_unroll(random_meta_params(), np.stack(flat), eps=1e-16)
    np.testing.assert_allclose(np.stack(updates), expected, rtol=1e-3, atol=1e-5)  # float32 against float64
    half = {"w": jnp.ones(3, jnp.bfloat16)}
    update, state = optimizer.update(half, optimizer.init(half))
    assert update["w"].dtype == jnp.bfloat16 and state.m["w"].dtype == state.v["w"].dtype == jnp.float32


def test_meta_gradient_is_that_of_finite_differences():
    with jax.enable_x64(True):
        meta_params, grads = random_meta_params(3, np.float64), random_grads(6, 4, 30)
        flat, unflatten = jax.flatten_util.ravel_pytree(meta_params)

        @jax.jit
        def meta_loss(flat):
            optimizer = gated_adam.gated_adam(0.1, unflatten(flat))
            step = lambda state, g: optimizer.update(g, state)[::-1]
            return jnp.sum(jax.lax.scan(step, optimizer.init(grads[0]), grads)[1].sum(0) ** 2)

        meta_grads, step = jax.grad(meta_loss)(flat), 1e-5
        for direction in np.random.default_rng(7).normal(size=(5, flat.size)):
            slope = (meta_loss(flat + step * direction) - meta_loss(flat - step * direction)) / (2 * step)
            np.testing.assert_allclose(meta_grads @ direction, slope, rtol=1e-6)  # error of the differences: step^2


def test_learning_rate_may_be_a_schedule():
    grads, meta_params = random_grads(8, 4, 10).astype(np.float32), random_meta_params()
    steps = np.array([1.0, 0.5, 0.25, 0.125], np.float32)
    updates = unroll(gated_adam.gated_adam(lambda count: jnp.asarray(steps)[count], meta_params), grads)
    expected = steps[:, None] * unroll(gated_adam.gated_adam(1.0, meta_params), grads)
    np.testing.assert_allclose(updates, expected, rtol=1e-6)


def test_there_are_14_meta_parameters():
    assert sum(x.size for x in jax.tree.leaves(gated_adam.init_meta_params(jax.random.key(0)))) == 14


def test_weights_in_the_file_are_the_mean_of_ten_meta_runs_to_the_last_bit():
    meta_runs = (ROOT / "results/gated_adam/meta_seeds/meta_runs").glob("*/optimizer.npz")
    learned = [weights.load(path, "gated_adam")[0] for path in sorted(meta_runs)]
    shipped, _ = weights.load(ROOT / "weights/gated_adam.npz", "gated_adam")
    assert len(learned) == 10 and gated_adam.WEIGHTS.keys() == shipped.keys()
    for name, x in gated_adam.WEIGHTS.items():
        assert isinstance(x, np.ndarray) and x.dtype == np.float32
        np.testing.assert_array_equal(x, shipped[name])
        np.testing.assert_array_equal(x, np.mean([tree[name] for tree in learned], axis=0))


def test_importing_the_file_touches_no_device():
    program = "import gated_adam; from jax._src import xla_bridge; assert not xla_bridge._backends; print('untouched')"
    folder = ROOT / "learned_optimizers"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert done.stdout == "untouched\n", done.stderr


def test_moments_are_float32_for_gradients_in_half_precision():
    params, optimizer = {"w": jnp.ones(20)}, gated_adam.gated_adam(1.0)
    grads = np.random.default_rng(11).normal(0, 1e-4, (10, 20))  # their squares are 0 in float16
    full = run_in_scan(optimizer, params, jnp.asarray(grads, jnp.float32))
    for dtype, rtol in ((jnp.float16, 0.01), (jnp.bfloat16, 0.1)):  # a rounded gradient may change sign to noise
        half = run_in_scan(optimizer, params, jnp.asarray(grads, dtype))
        np.testing.assert_allclose(half, full, rtol=rtol, atol=rtol / 10)


def run_in_scan(optimizer, params, grads):
    def step(state, g):
        updates, state = optimizer.update({"w": g}, state, params)
        return state, updates["w"]

    return jax.lax.scan(step, optimizer.init(params), grads)[1]


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38, -1e30, 1e20, 1.8e19, 1e18])
def test_a_broken_scalar_spoils_at_most_itself(value):
    grads = random_grads(12, 6, 400).astype(np.float32)
    broken = np.concatenate([grads[:, :200], np.full((6, 1), value, np.float32), grads[:, 200:]], axis=1)
    optimizer = gated_adam.gated_adam(1.0)
    updates, adam = unroll(optimizer, broken), unroll(optax.adam(1.0), broken)
    assert np.isfinite(updates[:, 200]).all() or not np.isfinite(adam[:, 200]).all()
    others = np.delete(updates, 200, axis=1)
    if (
        abs(value) < 1.84e19
    ):  # its square is a float32, and counts in mean v: other steps change, within what the rule allows
        assert np.isfinite(others).all() and np.abs(others).max() < 100
    else:
        np.testing.assert_allclose(others, unroll(optimizer, grads), rtol=1e-4, atol=1e-6)


def test_a_large_gradient_here_and_there_is_survived():
    grads = random_grads(13, 30, 50).astype(np.float32)
    grads[3] *= 1e18
    updates = unroll(gated_adam.gated_adam(1.0), grads)
    assert np.isfinite(updates).all() and np.abs(updates).max() < 100
