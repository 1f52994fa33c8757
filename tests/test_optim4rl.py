"""Optim4RL against golden numbers, a NumPy transcription of the paper's equations, finite differences and optax."""

import json
import os
import subprocess
import sys
from functools import partial

import guests
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT
from guests import random_grads
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optim4rl

GOLDEN = {"rtol": 1e-5, "atol": 1e-6}  # two float32 programs that add in different order
FLOAT64 = {"rtol": 1e-10, "atol": 1e-12}  # rounding of some hundred operations
TREE = {"scalar": 0.3, "vector": [-2.0, 0.0, 1e-5], "matrix": [[0.5, -0.1], [3.0, -1e-3]], "empty": []}
TREE = {name: np.array(x, np.float32) for name, x in TREE.items()}


def random_meta_params(seed=0, dtype=np.float32):
    """Every number random, the read-out's too, so that no term of the rule is hidden by a zero."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(random.normal(0, 0.5, x.shape), dtype), optim4rl.init_meta_params(jax.random.key(0))
    )


def unroll(optimizer, grads):
    """The updates for successive gradients, one after another, [T, ...], and the last state."""
    step, state, updates = jax.jit(optimizer.update), optimizer.init(grads[0]), []
    for g in grads:
        update, state = step(g, state)
        updates.append(update)
    return np.stack(updates), state


def numpy_rule(meta_params, hidden, g, eps):
    """The equations of the paper for one scalar g, gate by gate: (next hidden states of both GRUs, delta / alpha)."""
    next_hidden, outputs = {}, {}
    for name, x in (("m", g), ("v", g**2)):
        cell, h = {key: np.asarray(value) for key, value in meta_params[name].items()}, hidden[name]
        (w_r, w_z, w_n), (b_r, b_z, b_n) = cell["input_kernel"].reshape(3, -1), cell["input_bias"].reshape(3, -1)
        u_r, u_z, u_n = cell["recurrent_kernel"].reshape(3, len(h), len(h))
        r = 1 / (1 + np.exp(-(w_r * x + b_r + u_r @ h)))
        z = 1 / (1 + np.exp(-(w_z * x + b_z + u_z @ h)))
        n = np.tanh(w_n * x + b_n + r * (u_n @ h + cell["candidate_bias"]))
        next_hidden[name] = (1 - z) * n + z * h
        outputs[name] = cell["readout_kernel"] @ next_hidden[name] + cell["readout_bias"]
    return next_hidden, -np.sign(g) * np.exp(outputs["m"]) / np.sqrt(np.exp(outputs["v"]) + eps)


def test_updates_and_hidden_state_are_those_of_the_reference(golden, golden_weights):
    meta_params = optim4rl.from_reference(golden_weights("Optim4RL/param/"))
    updates, state = unroll(optim4rl.optim4rl(golden["learning_rate"], meta_params), golden["grads"])
    np.testing.assert_allclose(updates, golden["Optim4RL/updates"], **GOLDEN)
    hidden = np.stack([state.m.T, state.v.T])  # (2, 64, 8)
    np.testing.assert_allclose(hidden, golden["Optim4RL/hidden"], **GOLDEN)


def test_truncated_meta_gradient_is_that_of_the_reference(golden, golden_weights):
    guests.check_golden_meta_gradient(optim4rl, optim4rl.OPTIM4RL, "Optim4RL", golden, golden_weights, GOLDEN)


def test_rule_is_the_equations_of_the_paper_in_numpy():
    with jax.enable_x64(True):
        meta_params, grads = random_meta_params(1, np.float64), random_grads(2, 6, 20)
        updates, _ = unroll(optim4rl.optim4rl(0.01, meta_params, eps=1e-3), grads)
    for i in range(20):
        hidden = {"m": np.zeros(8), "v": np.zeros(8)}
        for t in range(6):
            hidden, delta = numpy_rule(meta_params, hidden, grads[t, i], eps=1e-3)
            np.testing.assert_allclose(updates[t, i], 0.01 * delta, **FLOAT64)


@pytest.fixture(params=["whole leaves", "pieces"])
def cut(request, monkeypatch):
    """Both ways through a tree: leaf by leaf; in pieces, as on one CPU device (the tests have four)."""
    monkeypatch.setattr(optim4rl, "_on_one_cpu", lambda leaves: request.param == "pieces")


def test_meta_gradient_is_that_of_finite_differences_and_of_forward_mode(monkeypatch, cut):
    monkeypatch.setattr(optim4rl, "PIECE", 16)  # two pieces of 10, and one of the small leaves together
    shapes = {"large": (5, 4), "small": (3,), "scalar": ()}
    with jax.enable_x64(True):
        meta_params = random_meta_params(3, np.float64)
        grads = {name: random_grads(4 + i, 3, *shape) for i, (name, shape) in enumerate(shapes.items())}
        target = np.random.default_rng(5).normal(size=24)
        flat, unflatten = jax.flatten_util.ravel_pytree(meta_params)

        @jax.jit
        def meta_loss(flat):
            optimizer = optim4rl.optim4rl(0.1, unflatten(flat))
            step = lambda state, g: optimizer.update(g, state)[::-1]
            _, updates = jax.lax.scan(step, optimizer.init(jax.tree.map(lambda g: g[0], grads)), grads)
            return jnp.sum((jax.flatten_util.ravel_pytree(jax.tree.map(lambda u: u.sum(0), updates))[0] - target) ** 2)

        meta_grads, step = jax.jit(jax.grad(meta_loss))(flat), 1e-5
        slope_along = jax.jit(lambda direction: jax.jvp(meta_loss, (flat,), (direction,))[1])
        for direction in np.random.default_rng(6).normal(size=(5, flat.size)):
            slope = (meta_loss(flat + step * direction) - meta_loss(flat - step * direction)) / (2 * step)
            np.testing.assert_allclose(meta_grads @ direction, slope, rtol=1e-6)  # error of the differences: step^2
            np.testing.assert_allclose(slope_along(direction), meta_grads @ direction, rtol=1e-9)  # float64


def test_no_derivative_flows_through_the_gradients():
    optimizer = optim4rl.optim4rl(0.1, random_meta_params())
    assert not np.any(jax.grad(lambda g: optimizer.update(g, optimizer.init(g))[0].sum())(jnp.array([0.5, -2.0])))


def test_nor_is_one_computed():
    """In vain, with zeros: it would cost the agent's backward pass once more, and the memory of its activations."""

    def meta_loss(meta_params):
        params, optimizer = jnp.linspace(0.1, 1.0, 5), optim4rl.optim4rl(0.1, meta_params)
        state = optimizer.init(params)
        for _ in range(2):
            updates, state = optimizer.update(jnp.sin(params), state)  # a gradient whose derivative is a cosine
            params = optax.apply_updates(params, updates)
        return (params**2).sum()

    compiled = jax.jit(jax.grad(meta_loss)).lower(optim4rl.init_meta_params(jax.random.key(0))).compile().as_text()
    assert " sine(" in compiled and "cosine(" not in compiled


def test_there_are_514_meta_parameters():
    assert sum(x.size for x in jax.tree.leaves(optim4rl.init_meta_params(jax.random.key(0)))) == 514
    with pytest.raises(ValueError, match="hidden_size is 0"):
        optim4rl.init_meta_params(jax.random.key(0), hidden_size=0)


def test_untrained_rule_is_exactly_sign_descent():
    optimizer = optim4rl.optim4rl(0.03, optim4rl.init_meta_params(jax.random.key(1)))
    grads = random_grads(7, 5, 100).astype(np.float32)
    np.testing.assert_array_equal(unroll(optimizer, grads)[0], -np.float32(0.03) * np.sign(grads))


def test_the_read_out_of_an_untrained_rule_that_sees_nothing_can_be_any_smooth_schedule():
    cell = optim4rl.init_meta_params(jax.random.key(2))["m"]
    step = lambda h, x: (optim4rl.gru(cell, h, x), h[:, 0])
    _, clocks = jax.lax.scan(step, jnp.zeros((8, 1)), jnp.zeros((500, 1)))  # (500, 8)
    t = np.arange(500)
    for schedule in (-2 * t / 500, -np.log(1 + t / 50), np.cos(np.pi * t / 500)):
        features = np.column_stack([clocks, np.ones(500)])
        weights = np.linalg.lstsq(features, schedule, rcond=None)[0]
        np.testing.assert_allclose(features @ weights, schedule, atol=0.1)
        assert abs(weights).max() < 20


def test_update_is_against_the_gradient_whatever_the_weights():
    grads = random_grads(8, 10, 100).astype(np.float32)
    for seed in range(3):
        updates, _ = unroll(optim4rl.optim4rl(1.0, random_meta_params(seed)), grads)
        np.testing.assert_array_equal(np.sign(updates), -np.sign(grads))


def test_every_scalar_of_a_tree_is_updated_by_itself():
    optimizer = optim4rl.optim4rl(0.1, random_meta_params())
    state, update, update_one = optimizer.init(TREE), jax.jit(optimizer.update), jax.jit(optimizer.update)
    for grads in (TREE, jax.tree.map(lambda x: -2 * x, TREE)):  # the second step has a hidden state
        updates, state = update(grads, state)
    jax.tree.map(lambda u, g: np.testing.assert_equal((u.shape, u.dtype), (g.shape, g.dtype)), updates, TREE)
    for name, leaf in TREE.items():
        for index in np.ndindex(leaf.shape):
            _, state_one = update_one(leaf[index], optimizer.init(leaf[index]))
            one, _ = update_one(-2 * leaf[index], state_one)
            np.testing.assert_allclose(updates[name][index], one, rtol=1e-5)  # float32


@pytest.mark.parametrize("empty", [{}, [], {"a": np.zeros((0, 3), np.float32)}])
def test_an_empty_tree_is_fine(empty):
    optimizer = optim4rl.optim4rl(0.1, random_meta_params())
    updates, _ = jax.jit(optimizer.update)(empty, optimizer.init(empty))
    assert jax.tree.structure(updates) == jax.tree.structure(empty)


def unroll_tree(grads):
    """The last state and all updates for gradients whose every leaf is [T, ...]."""
    optimizer = optim4rl.optim4rl(0.1, random_meta_params())
    grads = jax.tree.map(np.float32, grads)
    step = lambda state, g: optimizer.update(g, state)[::-1]
    return jax.jit(lambda grads: jax.lax.scan(step, optimizer.init(jax.tree.map(lambda g: g[0], grads)), grads))(grads)


@pytest.mark.parametrize("size", [2 * 2048, 3 * 1500, 4099])  # full pieces; smaller ones; a prime, which has none
def test_pieces_agree_with_whole_leaves(monkeypatch, size):
    grads = {"large": random_grads(9, 3, size), "small": random_grads(10, 3, 7), "also": random_grads(11, 3, 2, 2)}
    monkeypatch.setattr(optim4rl, "_on_one_cpu", lambda leaves: True)
    in_pieces = unroll_tree(grads)
    monkeypatch.setattr(optim4rl, "_on_one_cpu", lambda leaves: False)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), in_pieces, unroll_tree(grads))  # float32


def test_gates_are_not_kept_for_the_backward_pass(cut):
    optimizer, w = optim4rl.optim4rl(0.1, random_meta_params()), jnp.ones((64, 64))

    def meta_loss(meta_params):
        optimizer = optim4rl.optim4rl(0.1, meta_params)
        step = lambda state, t: optimizer.update(jnp.sin(w * t), state)[::-1]
        return jax.lax.scan(step, optimizer.init(w), jnp.arange(50.0))[1].sum()

    memory = jax.jit(jax.grad(meta_loss)).lower(random_meta_params()).compile().memory_analysis()
    state = sum(x.nbytes for x in jax.tree.leaves(optimizer.init(w)))
    assert memory.temp_size_in_bytes < 2.5 * 50 * state  # the gates are six times the state


def test_jit_vmap_and_scan_change_nothing():
    optimizer = optim4rl.optim4rl(0.1, random_meta_params())
    grads = random_grads(10, 4, 3, 7).astype(np.float32)  # (steps, agents, scalars)
    expected = np.stack([unroll(optimizer, grads[:, agent])[0] for agent in range(3)], axis=1)
    step = lambda states, g: jax.vmap(optimizer.update)(g, states)[::-1]
    _, updates = jax.jit(lambda gs: jax.lax.scan(step, jax.vmap(optimizer.init)(gs[0]), gs))(grads)
    np.testing.assert_allclose(updates, expected, rtol=1e-5)  # float32


def test_it_composes_with_chain_and_a_schedule():
    grads = random_grads(11, 5, 30).astype(np.float32)
    rule = lambda alpha: optim4rl.optim4rl(alpha, random_meta_params())
    chained, _ = unroll(optax.chain(optax.clip(0.5), rule(optax.linear_schedule(0.1, 0.0, 4))), grads)
    plain, _ = unroll(rule(1.0), np.clip(grads, -0.5, 0.5))
    np.testing.assert_allclose(chained, plain * np.array([0.1, 0.075, 0.05, 0.025, 0])[:, None], rtol=1e-5)  # float32


def test_it_composes_with_multi_transform():
    rule = optim4rl.optim4rl(0.1, random_meta_params())
    labels = {"scalar": "learned", "vector": "sgd", "matrix": "learned", "empty": "sgd"}
    optimizer = optax.multi_transform({"learned": rule, "sgd": optax.sgd(0.5)}, labels)
    updates, _ = optimizer.update(TREE, optimizer.init(TREE))
    np.testing.assert_allclose(updates["vector"], -0.5 * TREE["vector"])
    for name in ("scalar", "matrix"):
        np.testing.assert_allclose(
            updates[name], rule.update(TREE[name], rule.init(TREE[name]))[0], rtol=1e-5
        )  # float32


def test_it_composes_with_inject_hyperparams():
    meta_params, g = random_meta_params(), TREE["vector"]
    optimizer = optax.inject_hyperparams(optim4rl.optim4rl)(learning_rate=0.1, meta_params=meta_params)
    state = optimizer.init(g)
    state.hyperparams["learning_rate"] = jnp.array(0.7)
    rule = optim4rl.optim4rl(0.7, meta_params)
    expected, _ = rule.update(g, rule.init(g))
    np.testing.assert_allclose(optimizer.update(g, state)[0], expected, rtol=1e-5)  # float32


def test_it_composes_with_apply_if_finite():
    optimizer = optax.apply_if_finite(optim4rl.optim4rl(0.1, random_meta_params()), max_consecutive_errors=3)
    g = TREE["vector"]
    _, state = optimizer.update(g, optimizer.init(g))
    skipped, after = optimizer.update(g * np.nan, state)
    assert not np.any(skipped)
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)


def test_the_state_is_shaped_like_the_parameters():
    optimizer = optim4rl.optim4rl(0.1, random_meta_params())
    state = optimizer.init(TREE)
    for tree in (state.m, state.v):
        assert jax.tree.map(jnp.shape, tree) == jax.tree.map(lambda x: (8, *x.shape), TREE)
    doubled = optax.tree.map_params(optimizer, lambda x: x + 1, state)
    assert doubled.count == 0 and all((x == 1).all() for x in jax.tree.leaves((doubled.m, doubled.v)))


def test_a_fresh_state_can_be_donated():
    optimizer = optim4rl.optim4rl(0.1, random_meta_params())
    step = jax.jit(optimizer.update, donate_argnums=1)
    state = optimizer.init(TREE)
    for _ in range(2):
        _, state = step(TREE, state)
    assert state.count == 2


def test_none_leaves_and_python_numbers_are_fine(cut):
    optimizer = optim4rl.optim4rl(0.1, random_meta_params())
    params = {"w": 1.0, "frozen": None, "b": np.ones(3, np.float32)}
    updates, state = jax.jit(optimizer.update)(params, optimizer.init(params))
    assert updates["frozen"] is None and state.m["frozen"] is None and updates["w"].shape == ()
    np.testing.assert_allclose(updates["b"], np.full(3, updates["w"]), rtol=1e-5)  # float32
    optax.apply_updates(params, updates)


@pytest.mark.parametrize("params_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("grads_dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_are_stable_in_a_scan(params_dtype, grads_dtype):
    optimizer = optim4rl.optim4rl(optax.linear_schedule(0.1, 0.0, 4), random_meta_params())
    params, grads = jnp.ones((2, 3), params_dtype), jnp.full((2, 3), 0.5, grads_dtype)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), updates

    (params, state), updates = jax.lax.scan(step, (params, optimizer.init(params)), length=3)
    assert params.dtype == params_dtype and state.m.dtype == np.float32
    assert updates.dtype == jnp.promote_types(params_dtype, grads_dtype)  # as with optax.adam
    expected, _ = unroll(optimizer, np.full((3, 2, 3), 0.5, np.float32))
    np.testing.assert_allclose(updates.astype(np.float32), expected, rtol=1e-2)  # bfloat16


def test_integers_are_as_in_adam():
    params = jnp.arange(3)
    for optimizer in (optim4rl.optim4rl(0.1, random_meta_params()), optax.adam(0.1)):
        assert optimizer.update(params, optimizer.init(params))[0].dtype == np.float32


def test_extra_arguments_are_ignored():
    optimizer = optim4rl.optim4rl(0.1, random_meta_params())
    updates, _ = optimizer.update(TREE, optimizer.init(TREE), TREE, value=1.0)
    jax.tree.map(np.testing.assert_array_equal, updates, optimizer.update(TREE, optimizer.init(TREE))[0])


def test_a_gradient_that_is_nan_spoils_only_its_own_scalar(cut):
    grads = {"large": random_grads(12, 4096).astype(np.float32), "small": np.ones(3, np.float32)}
    spoilt = jax.tree.map(np.copy, grads)
    spoilt["large"][100] = spoilt["small"][1] = np.nan
    optimizer = optim4rl.optim4rl(0.1, random_meta_params())
    expected, found = (jax.jit(optimizer.update)(g, optimizer.init(g)) for g in (grads, spoilt))
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(found)):
        if x.size > 1:
            bad = np.arange(x.shape[-1]) == (1 if x.shape[-1] == 3 else 100)
            assert np.isnan(y[..., bad]).all()
            np.testing.assert_array_equal(y[..., ~bad], x[..., ~bad])


def test_sharded_parameters_stay_sharded():
    optimizer, meta_params = optim4rl.optim4rl(0.1, random_meta_params()), random_meta_params()
    values = {"w": np.linspace(-1, 1, 4 * 4096, dtype=np.float32).reshape(4096, 4), "b": np.ones(8, np.float32)}
    expected, _ = jax.jit(optimizer.update)(values, optimizer.init(values))
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4,), ("x",), axis_types=(axis_type,))
        with jax.set_mesh(mesh):
            params = jax.device_put(values, NamedSharding(mesh, P("x")))
            state = optimizer.init(params)
            assert state.m["w"].sharding.is_equivalent_to(NamedSharding(mesh, P(None, "x")), 3)
            step = jax.jit(optimizer.update, donate_argnums=1).lower(params, state).compile()
            assert "all-gather" not in step.as_text() and "all-to-all" not in step.as_text()
            updates, state = step(params, state)
            assert updates["w"].sharding.is_equivalent_to(NamedSharding(mesh, P("x")), 2)
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), updates, expected)
            optax.apply_updates(params, updates)

    def moved(meta_params):  # on the explicit mesh also the meta-gradient
        updates, _ = optim4rl.optim4rl(0.1, meta_params).update(params, optimizer.init(params))
        return sum(x.sum() for x in jax.tree.leaves(updates))

    with jax.set_mesh(mesh):
        jax.jit(jax.grad(moved))(meta_params)


ONE_DEVICE = """
import jax, jax.numpy as jnp, optim4rl
from jax.sharding import AxisType, PartitionSpec as P
optimizer = optim4rl.optim4rl(0.1, optim4rl.init_meta_params(jax.random.key(0)))
pieces = lambda f, *xs: " scan" in str(jax.make_jaxpr(f)(*xs))
w = jnp.ones((64, 64))
assert pieces(lambda w: optimizer.update(w, optimizer.init(w)), w)
with jax.set_mesh(jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit,))):
    w = jax.device_put(w, P("x"))
    print(jax.jit(optimizer.update)(w, optimizer.init(w))[0].shape)
"""


def test_one_cpu_device_takes_pieces():
    """In a process that sees no more."""
    flags = {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ONE_DEVICE]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | flags, capture_output=True, text=True, check=False)
    assert run.stdout == "(64, 64)\n", run.stderr


def test_so_does_a_shard_of_units():
    optimizer = optim4rl.optim4rl(0.1, random_meta_params())
    mesh, units = jax.sharding.Mesh(jax.devices()[:2], ("units",)), jax.sharding.PartitionSpec("units")
    update = lambda w: jax.lax.map(lambda w: optimizer.update(w, optimizer.init(w))[0], w)
    sharded = jax.shard_map(update, mesh=mesh, in_specs=units, out_specs=units, check_vma=False)
    w = random_grads(13, 4, 64, 64).astype(np.float32)
    assert str(jax.make_jaxpr(sharded)(w)).count(" scan") == 2  # units, pieces
    np.testing.assert_allclose(jax.jit(sharded)(w), jax.jit(update)(w), rtol=1e-5)  # float32


def write_weights(path, meta_params, **header):
    """A file as the project's programs write it."""
    header = {"version": 1, "kind": "optim4rl", "metadata": {"seed": 3}} | header
    arrays = {"/".join(k.key for k in keys): np.asarray(x) for keys, x in jax.tree.leaves_with_path(meta_params)}
    np.savez(path, header=np.array(json.dumps(header)), **arrays)


@pytest.mark.parametrize("hidden_size", [8, 3])
def test_a_weight_file_is_read_with_its_metadata(tmp_path, hidden_size):
    meta_params = optim4rl.init_meta_params(jax.random.key(4), hidden_size)
    write_weights(tmp_path / "w.npz", meta_params)
    loaded, metadata = optim4rl.load(tmp_path / "w.npz")
    assert metadata == {"seed": 3} and jax.tree.structure(loaded) == jax.tree.structure(meta_params)
    jax.tree.map(np.testing.assert_array_equal, loaded, meta_params)


def test_the_learned_weights_load():
    meta_params, metadata = optim4rl.load(ROOT / "weights" / "optim4rl.npz")
    assert sum(x.size for x in jax.tree.leaves(meta_params)) == 514 and metadata


def write_bad_file(path, fault):
    """A file that is not what load expects, in the named way."""
    meta_params = random_meta_params()
    if fault == "a missing array":
        del meta_params["v"]["readout_bias"]
    if fault == "another shape":
        meta_params["m"]["input_bias"] = np.zeros(23)
    if fault == "not finite":
        meta_params["v"]["candidate_bias"] = np.array([*[0.0] * 7, np.nan])
    if fault == "integers":
        meta_params["v"]["candidate_bias"] = np.zeros(8, int)
    header = {"another version": {"version": 2}, "another kind": {"kind": "star"}}.get(fault, {})
    write_weights(path, meta_params, **header)
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    if fault == "empty":
        path.write_bytes(b"")
    if fault == "text":
        path.write_text("not weights\n" * 100)
    if fault == "foreign":
        np.savez(path, a=np.ones(3))
    if fault == "flipped bit":  # "encrypted", in the first entry of the table of contents
        data = bytearray(path.read_bytes())
        data[data.index(b"PK\x01\x02") + 8] ^= 1
        path.write_bytes(data)
    if fault == "no metadata":
        np.savez(path, header=np.array('{"version": 1, "kind": "optim4rl"}'))
    if fault == "pickled":
        np.savez(path, header=np.array({"version": 1}, dtype=object))


FAULTS = ("truncated", "empty", "flipped bit", "text", "foreign", "no metadata", "pickled", "another version")
FAULTS += ("another kind", "a missing array", "another shape", "not finite", "integers")


@pytest.mark.parametrize("fault", FAULTS)
def test_load_refuses_another_file_in_one_line_that_names_it(tmp_path, fault):
    path = tmp_path / "bad.npz"
    write_bad_file(path, fault)
    with pytest.raises(ValueError) as error:
        optim4rl.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_load_says_that_there_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.npz"):
        optim4rl.load(tmp_path / "missing.npz")
