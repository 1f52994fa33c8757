"""Optim4RL against golden numbers, a NumPy transcription of the paper's equations, finite differences and optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optim4rl

GOLDEN = dict(rtol=1e-5, atol=1e-6)  # two float32 programs that add in different order
FLOAT64 = dict(rtol=1e-10, atol=1e-12)  # rounding of some hundred operations
TREE = {"scalar": 0.3, "vector": [-2.0, 0.0, 1e-5], "matrix": [[0.5, -0.1], [3.0, -1e-3]], "empty": []}
TREE = {name: np.array(x, np.float32) for name, x in TREE.items()}


def random_meta_params(seed=0, dtype=np.float32):
    """Every number random, the read-out's too, so that no term of the rule is hidden by a zero."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(random.normal(0, 0.5, x.shape), dtype), optim4rl.init_meta_params(jax.random.key(0))
    )


def random_grads(seed, *shape):
    """Of every magnitude from 1e-6 to 10, some exactly zero."""
    random = np.random.default_rng(seed)
    grads = random.normal(size=shape) * 10.0 ** random.uniform(-6, 1, shape)
    return np.where(random.random(shape) < 0.05, 0, grads)


def unroll(optimizer, grads):
    """The updates for successive gradients, one after another, [T, ...], and the last state."""
    step, state, updates = jax.jit(optimizer.update), optimizer.init(grads[0]), []
    for g in grads:
        update, state = step(g, state)
        updates.append(update)
    return np.stack(updates), state


def numpy_rule(meta_params, hidden, g, eps):
    """The equations of the paper for one scalar g, gate by gate: -> (next hidden states of both GRUs, delta / alpha)."""
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
    updates, state = unroll(optim4rl.optim4rl(meta_params, golden["learning_rate"]), golden["grads"])
    np.testing.assert_allclose(updates, golden["Optim4RL/updates"], **GOLDEN)
    hidden = np.stack([state.hidden["m"][0].T, state.hidden["v"][0].T])[:, :64]  # (2, 64, 8), the padding cut off
    np.testing.assert_allclose(hidden, golden["Optim4RL/hidden"], **GOLDEN)


def test_truncated_meta_gradient_is_that_of_the_reference(golden, golden_weights):
    A, b, w = (golden[f"Optim4RL/quad/{name}"] for name in ("A", "b", "w0"))
    loss = lambda w: 0.5 * jnp.sum((A @ w - b) ** 2)

    def meta_loss(meta_params, w):
        optimizer = optim4rl.optim4rl(meta_params, golden["learning_rate"])
        state = optimizer.init(w)
        for _ in range(4):
            updates, state = optimizer.update(jax.grad(loss)(w), state)
            w = w + updates
        return loss(w), w

    meta_params = optim4rl.from_reference(golden_weights("Optim4RL/param/"))
    (value, w4), meta_grads = jax.jit(jax.value_and_grad(meta_loss, has_aux=True))(meta_params, w)
    np.testing.assert_allclose(w4, golden["Optim4RL/quad/w4"], **GOLDEN)
    np.testing.assert_allclose(value, golden["Optim4RL/quad/meta_loss"], **GOLDEN)
    expected = optim4rl.from_reference(golden_weights("Optim4RL/quad/meta_grad/"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **GOLDEN), meta_grads, expected)


def test_rule_is_the_equations_of_the_paper_in_numpy():
    with jax.enable_x64(True):
        meta_params, grads = random_meta_params(1, np.float64), random_grads(2, 6, 20)
        updates, _ = unroll(optim4rl.optim4rl(meta_params, 0.01, eps=1e-3), grads)
    for i in range(20):
        hidden = {"m": np.zeros(8), "v": np.zeros(8)}
        for t in range(6):
            hidden, delta = numpy_rule(meta_params, hidden, grads[t, i], eps=1e-3)
            np.testing.assert_allclose(updates[t, i], 0.01 * delta, **FLOAT64)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])  # piece by piece; all at once, which a CPU can do, too
def test_meta_gradient_is_that_of_finite_differences(monkeypatch, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(optim4rl, "PIECE", 16)  # 30 scalars: two pieces, one of them padded
    with jax.enable_x64(True):
        meta_params, grads = random_meta_params(3, np.float64), random_grads(4, 3, 30)
        target = np.random.default_rng(5).normal(size=30)
        flat, unflatten = jax.flatten_util.ravel_pytree(meta_params)

        @jax.jit
        def meta_loss(flat):
            optimizer = optim4rl.optim4rl(unflatten(flat), 0.1)
            step = lambda state, g: optimizer.update(g, state)[::-1]
            _, updates = jax.lax.scan(step, optimizer.init(grads[0]), grads)
            return jnp.sum((updates.sum(0) - target) ** 2)

        meta_grads, step = jax.grad(meta_loss)(flat), 1e-5
        for direction in np.random.default_rng(6).normal(size=(5, flat.size)):
            slope = (meta_loss(flat + step * direction) - meta_loss(flat - step * direction)) / (2 * step)
            np.testing.assert_allclose(meta_grads @ direction, slope, rtol=1e-6)  # error of the differences: step^2


def test_no_derivative_flows_through_the_gradients():
    optimizer = optim4rl.optim4rl(random_meta_params(), 0.1)
    assert not np.any(jax.grad(lambda g: optimizer.update(g, optimizer.init(g))[0].sum())(jnp.array([0.5, -2.0])))


def test_nor_is_one_computed():
    """In vain, with zeros: it would cost the agent's backward pass once more, and the memory of its activations."""

    def meta_loss(meta_params):
        params, optimizer = jnp.linspace(0.1, 1.0, 5), optim4rl.optim4rl(meta_params, 0.1)
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
    optimizer = optim4rl.optim4rl(optim4rl.init_meta_params(jax.random.key(1)), 0.03)
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
        updates, _ = unroll(optim4rl.optim4rl(random_meta_params(seed), 1.0), grads)
        np.testing.assert_array_equal(np.sign(updates), -np.sign(grads))


def test_every_scalar_of_a_tree_is_updated_by_itself():
    optimizer = optim4rl.optim4rl(random_meta_params(), 0.1)
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
    optimizer = optim4rl.optim4rl(random_meta_params(), 0.1)
    updates, _ = jax.jit(optimizer.update)(empty, optimizer.init(empty))
    assert jax.tree.structure(updates) == jax.tree.structure(empty)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_several_pieces_agree_with_scalars_one_by_one(monkeypatch, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    grads = random_grads(9, 3, 2 * optim4rl.PIECE + 100).astype(np.float32)
    optimizer = optim4rl.optim4rl(random_meta_params(), 0.1)
    updates, state = unroll(optimizer, grads)
    assert state.hidden["m"].shape[0] == 3

    states = jax.vmap(optimizer.init)(grads[0])  # an optimizer for each scalar
    for t in range(3):
        one_by_one, states = jax.jit(jax.vmap(optimizer.update))(grads[t], states)
        np.testing.assert_allclose(updates[t], one_by_one, rtol=1e-5)  # float32


def test_jit_vmap_and_scan_change_nothing():
    optimizer = optim4rl.optim4rl(random_meta_params(), 0.1)
    grads = random_grads(10, 4, 3, 7).astype(np.float32)  # (steps, agents, scalars)
    expected = np.stack([unroll(optimizer, grads[:, agent])[0] for agent in range(3)], axis=1)
    step = lambda states, g: jax.vmap(optimizer.update)(g, states)[::-1]
    _, updates = jax.jit(lambda gs: jax.lax.scan(step, jax.vmap(optimizer.init)(gs[0]), gs))(grads)
    np.testing.assert_allclose(updates, expected, rtol=1e-5)  # float32


def test_it_composes_with_chain_and_a_schedule():
    grads = random_grads(11, 5, 30).astype(np.float32)
    rule = lambda alpha: optim4rl.optim4rl(random_meta_params(), alpha)
    chained, _ = unroll(optax.chain(optax.clip(0.5), rule(optax.linear_schedule(0.1, 0.0, 4))), grads)
    plain, _ = unroll(rule(1.0), np.clip(grads, -0.5, 0.5))
    np.testing.assert_allclose(chained, plain * np.array([0.1, 0.075, 0.05, 0.025, 0])[:, None], rtol=1e-5)  # float32


def test_it_composes_with_multi_transform():
    rule = optim4rl.optim4rl(random_meta_params(), 0.1)
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
    optimizer = optax.inject_hyperparams(optim4rl.optim4rl)(meta_params, learning_rate=0.1)
    state = optimizer.init(g)
    state.hyperparams["learning_rate"] = jnp.array(0.7)
    rule = optim4rl.optim4rl(meta_params, 0.7)
    expected, _ = rule.update(g, rule.init(g))
    np.testing.assert_allclose(optimizer.update(g, state)[0], expected, rtol=1e-5)  # float32


def test_it_composes_with_apply_if_finite():
    optimizer = optax.apply_if_finite(optim4rl.optim4rl(random_meta_params(), 0.1), max_consecutive_errors=3)
    g = TREE["vector"]
    update, state = optimizer.update(g, optimizer.init(g))
    skipped, after = optimizer.update(g * np.nan, state)
    assert not np.any(skipped)
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)


def test_a_saved_file_is_read_back_with_its_metadata(tmp_path):
    path, meta_params, metadata = tmp_path / "w.npz", random_meta_params(), {"seed": 3, "command": "a --b", "c": [1.5]}
    optim4rl.save(path, meta_params, metadata)
    loaded, loaded_metadata = optim4rl.load(path)
    assert loaded_metadata == metadata and jax.tree.structure(loaded) == jax.tree.structure(meta_params)
    jax.tree.map(np.testing.assert_array_equal, loaded, meta_params)
    small = optim4rl.init_meta_params(jax.random.key(0), hidden_size=4)
    optim4rl.save(path, small, kind="another")
    assert optim4rl.load(path, kind="another", like=small)[1] == {}


def write_bad_file(path, fault, monkeypatch):
    """A file that is not what load expects, in the named way."""
    hidden_size = 4 if fault == "other hidden size" else 8
    meta_params = optim4rl.init_meta_params(jax.random.key(0), hidden_size)
    monkeypatch.setattr(optim4rl, "FORMAT_VERSION", 2 if fault == "other version" else 1)
    optim4rl.save(path, meta_params, kind="star" if fault == "other kind" else "optim4rl")
    monkeypatch.undo()
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
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        np.savez(path, **arrays | {"header": np.array('{"version": 1, "kind": "optim4rl"}')})
    if fault == "pickled":
        np.savez(path, header=np.array({"version": 1}, dtype=object))


FAULTS = ("truncated", "empty", "flipped bit", "text", "foreign", "no metadata", "pickled")
FAULTS += ("other hidden size", "other version", "other kind")


@pytest.mark.parametrize("fault", FAULTS)
def test_load_refuses_another_file_in_one_line_that_names_it(tmp_path, monkeypatch, fault):
    path = tmp_path / "bad.npz"
    write_bad_file(path, fault, monkeypatch)
    with pytest.raises(ValueError) as error:
        optim4rl.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="missing.npz"):
        optim4rl.load(tmp_path / "missing.npz")


@pytest.mark.parametrize("broken", ["savez", "replace"])
def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch, broken):
    def interrupt(file, *args, **kwargs):
        if broken == "savez":
            file.write(b"half a file")
        raise KeyboardInterrupt

    optim4rl.save(tmp_path / "w.npz", random_meta_params(1))
    monkeypatch.setattr(np if broken == "savez" else optim4rl.os, broken, interrupt)
    with pytest.raises(KeyboardInterrupt):
        optim4rl.save(tmp_path / "w.npz", random_meta_params(2))
    jax.tree.map(np.testing.assert_array_equal, optim4rl.load(tmp_path / "w.npz")[0], random_meta_params(1))
