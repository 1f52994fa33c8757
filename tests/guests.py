"""What the tests of the learned optimizers share: random meta-parameters, random gradients, and a loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax


def random_meta_params(optimizer, seed=0, dtype=np.float32, scale=0.5):
    """Every number moved at random, so that no term of a rule is hidden by a zero; decays stay decays, VeLO's bank tame."""
    random = np.random.default_rng(seed)

    def move(path, x):
        small = any(name in jax.tree_util.keystr(path) for name in ("decays", "bank"))
        return jnp.asarray(x + random.normal(0, 0.01 if small else scale, np.shape(x)), dtype)

    return jax.tree.map_with_path(move, optimizer.init(jax.random.key(0)))


def small_velo(learned):
    """VeLO's LearnedOptimizer with a small network that makes no wild steps, for callers that may give no loss: it is 0 then.

    (Of any other constant loss the loss features see rounding alone.)
    """

    def init(key):
        meta_params = learned.init(key, hidden_size=16, bank_size=8)
        return meta_params | {"bank": jax.tree.map(lambda x: 0.1 * x, meta_params["bank"])}

    @functools.wraps(learned.make)
    def make(*args, **kwargs):
        optimizer = learned.make(*args, **kwargs)

        def update(updates, state, params=None, *, value=0.0, **extra_args):
            return optimizer.update(updates, state, params, value=value, **extra_args)

        return optax.GradientTransformationExtraArgs(optimizer.init, update)

    return learned._replace(init=init, make=make)


def random_grads(seed, *shape):
    """Of every magnitude from 1e-6 to 10, some exactly zero."""
    random = np.random.default_rng(seed)
    grads = random.normal(size=shape) * 10.0 ** random.uniform(-6, 1, shape)
    return np.where(random.random(shape) < 0.05, 0, grads)


def unroll(optimizer, grads, params):
    """Updates for successive gradients [T, ...], the parameters moving along, and the last state."""
    step, state, updates = jax.jit(optimizer.update), optimizer.init(params), []
    for g in grads:
        update, state = step(g, state, params)
        params = optax.apply_updates(params, update)
        updates.append(update)
    return np.stack(updates), state


def check_golden_updates(module, optimizer, name, golden, golden_weights, tolerance):
    """Updates and hidden states of one GRU are those of the reference implementation."""
    meta_params = module.from_reference(golden_weights(f"{name}/param/"))
    optimizer = optimizer.make(golden["learning_rate"], meta_params)
    updates, state = unroll(optimizer, golden["grads"], jnp.zeros(64))
    np.testing.assert_allclose(updates, golden[f"{name}/updates"], **tolerance)
    np.testing.assert_allclose(state.hidden.T, golden[f"{name}/hidden"], **tolerance)


def check_golden_meta_gradient(module, optimizer, name, golden, golden_weights, tolerance):
    """The meta-gradient through 4 updates of a quadratic is that of the reference implementation."""
    A, b, w = (golden[f"{name}/quad/{x}"] for x in ("A", "b", "w0"))

    def loss(w):
        return 0.5 * jnp.sum((A @ w - b) ** 2)

    def meta_loss(meta_params, w):
        rule = optimizer.make(golden["learning_rate"], meta_params)
        state = rule.init(w)
        for _ in range(4):
            updates, state = rule.update(jax.grad(loss)(w), state)
            w = w + updates
        return loss(w), w

    meta_params = module.from_reference(golden_weights(f"{name}/param/"))
    (value, w4), meta_grads = jax.jit(jax.value_and_grad(meta_loss, has_aux=True))(meta_params, w)
    np.testing.assert_allclose(w4, golden[f"{name}/quad/w4"], **tolerance)
    np.testing.assert_allclose(value, golden[f"{name}/quad/meta_loss"], **tolerance)
    expected = module.from_reference(golden_weights(f"{name}/quad/meta_grad/"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), meta_grads, expected)


def numpy_gru(meta_params, h, x):
    """One GRU step of one scalar, gate by gate: h [H], x [D] -> (next h, its read-out [O])."""
    cell, size = {key: np.asarray(value) for key, value in meta_params.items()}, len(h)
    W, b, U = cell["input_kernel"], cell["input_bias"], cell["recurrent_kernel"]
    r = 1 / (1 + np.exp(-(W[:size] @ x + b[:size] + U[:size] @ h)))
    z = 1 / (1 + np.exp(-(W[size : 2 * size] @ x + b[size : 2 * size] + U[size : 2 * size] @ h)))
    n = np.tanh(W[2 * size :] @ x + b[2 * size :] + r * (U[2 * size :] @ h + cell["candidate_bias"]))
    h = (1 - z) * n + z * h
    return h, cell["readout_kernel"] @ h + cell["readout_bias"]
