"""LinearOptim, L2LGD2 and STAR against golden numbers, NumPy transcriptions and optax."""

import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import baselines
import pipeline

GOLDEN = dict(rtol=1e-5, atol=1e-6)  # two float32 programs that add in different order
RECURRENT = {"LinearOptim": baselines.LINEAR_OPTIM, "L2LGD2": baselines.L2LGD2}
ALL = RECURRENT | {"STAR": baselines.STAR}
TREE = {"scalar": 0.3, "vector": [-2.0, 0.0, 1e-5], "matrix": [[0.5, -0.1], [3.0, -1e-3]], "empty": np.zeros((0, 3))}
TREE = {name: np.array(x, np.float32) for name, x in TREE.items()}


def random_meta_params(name, seed=0, dtype=np.float32):
    """Every number random, the read-out's too, so that no term of a rule is hidden by a zero; decays stay decays."""
    random, scale = np.random.default_rng(seed), {"STAR": 0.3}.get(name, 0.5)
    return {
        key: jnp.asarray(random.normal(0, 0.01 if "decays" in key else scale, x.shape), dtype)
        for key, x in ALL[name].init(jax.random.key(0)).items()
    }


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


@pytest.mark.parametrize("name", RECURRENT)
def test_updates_and_hidden_state_are_those_of_the_reference(name, golden, golden_weights):
    meta_params = baselines.from_reference(name, golden_weights(f"{name}/param/"))
    optimizer = RECURRENT[name].make(meta_params, golden["learning_rate"])
    updates, state = unroll(optimizer, golden["grads"], jnp.zeros(64))
    np.testing.assert_allclose(updates, golden[f"{name}/updates"], **GOLDEN)
    np.testing.assert_allclose(state.hidden[0].T[:64], golden[f"{name}/hidden"], **GOLDEN)  # the padding cut off


@pytest.mark.parametrize("name", RECURRENT)
def test_truncated_meta_gradient_is_that_of_the_reference(name, golden, golden_weights):
    A, b, w = (golden[f"{name}/quad/{x}"] for x in ("A", "b", "w0"))
    loss = lambda w: 0.5 * jnp.sum((A @ w - b) ** 2)

    def meta_loss(meta_params, w):
        optimizer = RECURRENT[name].make(meta_params, golden["learning_rate"])
        state = optimizer.init(w)
        for _ in range(4):
            updates, state = optimizer.update(jax.grad(loss)(w), state)
            w = w + updates
        return loss(w), w

    meta_params = baselines.from_reference(name, golden_weights(f"{name}/param/"))
    (value, w4), meta_grads = jax.jit(jax.value_and_grad(meta_loss, has_aux=True))(meta_params, w)
    np.testing.assert_allclose(w4, golden[f"{name}/quad/w4"], **GOLDEN)
    np.testing.assert_allclose(value, golden[f"{name}/quad/meta_loss"], **GOLDEN)
    expected = baselines.from_reference(name, golden_weights(f"{name}/quad/meta_grad/"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **GOLDEN), meta_grads, expected)


def test_star_moves_the_parameters_as_the_reference_does():
    with np.load(pathlib.Path(__file__).parent / "data" / "star.npz") as file:
        star = {name.removeprefix("Star/"): file[name] for name in file.files}
    weights = {name.removeprefix("param/"): x for name, x in star.items() if name.startswith("param/")}
    meta_params = baselines.from_reference("STAR", weights)
    optimizer = baselines.star(meta_params, star["step_mult"], star["nominal_stepsize"])
    tree = lambda prefix: {name: jnp.asarray(star[f"{prefix}/{name}"]) for name in ("b", "w", "c")}
    params, update = tree("w0"), jax.jit(optimizer.update)
    state = optimizer.init(params)
    for t in range(12):
        updates, state = update(tree(f"grads/{t}"), state, params)
        params = optax.apply_updates(params, updates)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **GOLDEN), params, tree(f"w/{t}"))


def numpy_rule(name, meta_params, h, g):
    """One scalar, gate by gate: -> (next hidden state [H], delta / alpha)."""
    cell, size = {key: np.asarray(value) for key, value in meta_params.items()}, len(h)
    x = np.array([g])
    if name == "L2LGD2":
        log = np.log(abs(g) + 1e-8) / 10
        x = np.array([log, np.sign(g)]) if log >= -1 else np.array([-1, np.exp(10) * g])
    W, b, U = cell["input_kernel"], cell["input_bias"], cell["recurrent_kernel"]
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    r = sigmoid(W[:size] @ x + b[:size] + U[:size] @ h)
    z = sigmoid(W[size : 2 * size] @ x + b[size : 2 * size] + U[size : 2 * size] @ h)
    n = np.tanh(W[2 * size :] @ x + b[2 * size :] + r * (U[2 * size :] @ h + cell["candidate_bias"]))
    h = (1 - z) * n + z * h
    o = cell["readout_kernel"] @ h + cell["readout_bias"]
    return h, -np.exp(o[0]) * g if name == "L2LGD2" else -(np.exp(o[0]) * g + np.exp(o[1]) * o[2])


@pytest.mark.parametrize("name", RECURRENT)
def test_rule_is_the_equations_of_the_paper_in_numpy(name):
    with jax.enable_x64(True):
        meta_params, grads = random_meta_params(name, 1, np.float64), random_grads(2, 5, 12)
        updates, _ = unroll(RECURRENT[name].make(meta_params, 0.01), grads, np.zeros(12))
    for i in range(12):
        h = np.zeros(8)
        for t in range(5):
            h, delta = numpy_rule(name, meta_params, h, grads[t, i])
            np.testing.assert_allclose(updates[t, i], 0.01 * delta, rtol=1e-10, atol=1e-12)  # rounding in float64


@pytest.mark.parametrize("name, count", [("LinearOptim", 275), ("L2LGD2", 281), ("STAR", 207)])
def test_the_header_counts_the_meta_parameters(name, count):
    assert sum(x.size for x in ALL[name].init(jax.random.key(0)).values()) == count
    assert f"{count} " in baselines.__doc__ or f"{count})" in baselines.__doc__


@pytest.mark.parametrize("name", RECURRENT)
def test_an_untrained_rule_is_exactly_sgd(name):
    grads = random_grads(3, 4, 50).astype(np.float32)
    optimizer = RECURRENT[name].make(RECURRENT[name].init(jax.random.key(1)), 0.03)
    np.testing.assert_array_equal(unroll(optimizer, grads, np.zeros(50, np.float32))[0], -np.float32(0.03) * grads)


def test_an_untrained_star_is_the_mean_of_three_adams_without_bias_correction():
    grads, m, v = random_grads(4, 4, 6).astype(np.float32), np.zeros((3, 6)), np.zeros(6)
    optimizer = baselines.star(baselines.init_star(jax.random.key(1)), 1.0, nominal_stepsize=0.1)
    updates, _ = unroll(optimizer, grads, np.ones(6, np.float32))
    decays = np.array([[0.9], [0.99], [0.999]])
    for t, g in enumerate(grads):
        m, v = decays * m + (1 - decays) * g, 0.999 * v + 0.001 * g**2
        expected = -0.1 * np.exp(0.001) * np.mean(m / np.sqrt(v + 1e-6), axis=0)
        np.testing.assert_allclose(updates[t], expected, rtol=1e-4, atol=1e-8)  # float32: 1 - 0.999 has 4 digits


def test_star_says_that_it_needs_the_parameters():
    optimizer = baselines.STAR.make(random_meta_params("STAR"), 0.1)
    with pytest.raises(ValueError, match="STAR sees the parameters"):
        optimizer.update(TREE, optimizer.init(TREE))


@pytest.mark.parametrize("name", ALL)
def test_meta_gradient_is_that_of_finite_differences(name):
    with jax.enable_x64(True):
        meta_params, grads = random_meta_params(name, 3, np.float64), random_grads(4, 3, 5, 6)
        target = np.random.default_rng(5).normal(size=(5, 6))
        flat, unflatten = jax.flatten_util.ravel_pytree(meta_params)

        @jax.jit
        def meta_loss(flat):
            optimizer = ALL[name].make(unflatten(flat), 0.1)

            def step(carry, g):
                params, state = carry
                updates, state = optimizer.update(g, state, params)
                return (optax.apply_updates(params, updates), state), None

            (params, _), _ = jax.lax.scan(step, (target, optimizer.init(target)), grads)
            return jnp.sum((params + target) ** 2)

        meta_grads, step = jax.grad(meta_loss)(flat), 1e-6
        for direction in np.random.default_rng(6).normal(size=(3, flat.size)):
            slope = (meta_loss(flat + step * direction) - meta_loss(flat - step * direction)) / (2 * step)
            np.testing.assert_allclose(meta_grads @ direction, slope, rtol=1e-5)  # error of the differences


@pytest.mark.parametrize("name", ALL)
def test_no_derivative_flows_through_the_gradients(name):
    optimizer, params = ALL[name].make(random_meta_params(name), 0.1), jnp.ones(2)
    moved = lambda g: optimizer.update(g, optimizer.init(params), params)[0].sum()
    assert not np.any(jax.grad(moved)(jnp.array([0.5, -2.0])))


@pytest.mark.parametrize("name", ALL)
def test_any_tree_is_updated_tensor_by_tensor_in_its_own_shapes_and_types(name):
    optimizer = ALL[name].make(random_meta_params(name), 0.1)
    tree = TREE | {"half": TREE["matrix"].astype(jnp.bfloat16)}
    state, update = optimizer.init(tree), jax.jit(optimizer.update)
    for grads in (tree, jax.tree.map(lambda x: -2 * x, tree)):  # the second step has a state
        updates, state = update(grads, state, tree)
    jax.tree.map(lambda u, g: np.testing.assert_equal((u.shape, u.dtype), (g.shape, g.dtype)), updates, tree)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    for key, leaf in TREE.items():
        _, one_state = optimizer.update(leaf, optimizer.init(leaf), leaf)
        one, _ = optimizer.update(-2 * leaf, one_state, leaf)
        np.testing.assert_allclose(updates[key], one, rtol=2e-5, atol=1e-9)  # float32


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("empty", [{}, [], {"a": np.zeros((0, 3), np.float32)}])
def test_an_empty_tree_is_fine(name, empty):
    optimizer = ALL[name].make(random_meta_params(name), 0.1)
    updates, _ = jax.jit(optimizer.update)(empty, optimizer.init(empty), empty)
    assert jax.tree.structure(updates) == jax.tree.structure(empty)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])  # piece by piece; all at once, which a CPU can do, too
@pytest.mark.parametrize("name", RECURRENT)
def test_several_pieces_agree_with_scalars_one_by_one(monkeypatch, name, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    g = random_grads(9, 2 * baselines.PIECE + 100).astype(np.float32)
    optimizer = RECURRENT[name].make(random_meta_params(name), 0.1)
    together, state = jax.jit(optimizer.update)(g, optimizer.init(g))
    assert state.hidden.shape[0] == 3
    one_by_one, _ = jax.jit(jax.vmap(lambda x: optimizer.update(x, optimizer.init(x))))(g)
    np.testing.assert_allclose(together, one_by_one, rtol=2e-5, atol=1e-7)  # float32, o3 may cancel


@pytest.mark.parametrize("name", ALL)
def test_jit_vmap_and_scan_change_nothing(name):
    optimizer, params = ALL[name].make(random_meta_params(name), 0.1), np.ones((3, 7), np.float32)
    grads = random_grads(10, 4, 3, 7).astype(np.float32)  # (steps, agents, scalars)
    expected = np.stack([unroll(optimizer, grads[:, i], params[i])[0] for i in range(3)], axis=1)

    def step(carry, g):
        params, states = carry
        updates, states = jax.vmap(optimizer.update)(g, states, params)
        return (params + updates, states), updates

    _, updates = jax.jit(lambda gs: jax.lax.scan(step, (params, jax.vmap(optimizer.init)(params)), gs))(grads)
    np.testing.assert_allclose(updates, expected, rtol=2e-5, atol=1e-6)  # float32


@pytest.mark.parametrize("name", ALL)
def test_it_composes_with_chain_and_a_schedule(name):
    grads, params, meta_params = random_grads(11, 1, 30), np.ones(30, np.float32), random_meta_params(name)
    rule = lambda alpha: ALL[name].make(meta_params, alpha)
    schedule = optax.linear_schedule(0.1, 0.0, 4)
    chained, _ = unroll(optax.chain(optax.clip(0.5), rule(schedule)), grads.astype(np.float32), params)
    plain, _ = unroll(rule(0.1), np.clip(grads, -0.5, 0.5).astype(np.float32), params)
    np.testing.assert_allclose(chained, plain, rtol=2e-5, atol=1e-7)  # float32


@pytest.mark.parametrize("name", ALL)
def test_the_pipeline_meta_trains_it(name):
    target = jnp.arange(1.0, 7.0).reshape(2, 3)

    class Agent(NamedTuple):
        params: jax.Array
        opt_state: tuple

    class Learner:
        def init(key, optimizer):
            return Agent(jnp.zeros((2, 3)), optimizer.init(jnp.zeros((2, 3))))

        def update(optimizer, unit, key):
            updates, opt_state = optimizer.update(unit.params - target, unit.opt_state, unit.params)
            return Agent(unit.params + updates, opt_state), {}

        loss = lambda unit, key: (jnp.sum((unit.params - target) ** 2), (unit, {}))

    config, key = pipeline.Config(num_units=4, reset_interval=4), jax.random.key(0)
    task = pipeline.make_task(Learner, lambda meta_params: ALL[name].make(meta_params, 0.01), config)
    meta_optimizer, losses = optax.adam(0.03), []
    state = pipeline.init([task], meta_optimizer, ALL[name].init(key), key)
    for _ in range(40):
        state, [metrics] = pipeline.meta_step([task], meta_optimizer, state, key)
        losses.append(float(metrics["meta_loss"]))
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="unknown optimizer 'Star'; known: LinearOptim, L2LGD2, STAR"):
        baselines.from_reference("Star", {})
