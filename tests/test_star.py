"""STAR against golden numbers of the reference, and its untrained rule against a NumPy loop."""

import pathlib

import guests
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learned_optimizers import star

GOLDEN = {"rtol": 1e-5, "atol": 1e-6}  # two float32 programs that add in different order


def test_star_moves_the_parameters_as_the_reference_does():
    with np.load(pathlib.Path(__file__).parent / "data" / "star.npz") as file:
        data = {name.removeprefix("Star/"): file[name] for name in file.files}
    weights = {name.removeprefix("param/"): x for name, x in data.items() if name.startswith("param/")}
    optimizer = star.star(data["step_mult"], star.from_reference(weights), data["nominal_stepsize"])

    def tree(prefix):
        return {name: jnp.asarray(data[f"{prefix}/{name}"]) for name in ("b", "w", "c")}

    params, update = tree("w0"), jax.jit(optimizer.update)
    state = optimizer.init(params)
    for t in range(12):
        updates, state = update(tree(f"grads/{t}"), state, params)
        params = optax.apply_updates(params, updates)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **GOLDEN), params, tree(f"w/{t}"))


def test_the_untrained_rule_is_the_mean_of_three_adams_without_bias_correction():
    grads, m, v = guests.random_grads(4, 4, 6).astype(np.float32), np.zeros((3, 6)), np.zeros(6)
    optimizer = star.star(1.0, star.init_meta_params(jax.random.key(1)), nominal_stepsize=0.1)
    updates, _ = guests.unroll(optimizer, grads, np.ones(6, np.float32))
    decays = np.array([[0.9], [0.99], [0.999]])
    for t, g in enumerate(grads):
        m, v = decays * m + (1 - decays) * g, 0.999 * v + 0.001 * g**2
        expected = -0.1 * np.exp(0.001) * np.mean(m / np.sqrt(v + 1e-6), axis=0)
        np.testing.assert_allclose(updates[t], expected, rtol=1e-4, atol=1e-8)  # float32: 1 - 0.999 has 4 digits


def test_state_is_shaped_like_the_parameters_but_for_averaged_axes():
    params = {"matrix": jnp.ones((5, 3)), "vector": jnp.ones(4), "kernel": jnp.ones((2, 7, 3))}
    state = jax.tree.map(jnp.shape, star.STAR.make(0.1, star.init_meta_params(jax.random.key(0))).init(params))
    assert state.m == {"matrix": (3, 5, 3), "vector": (3, 4), "kernel": (3, 2, 7, 3)}
    assert state.rms == {"matrix": (5, 3), "vector": (4,), "kernel": (2, 7, 3)}
    assert state.row == {"matrix": (3, 1, 3), "vector": (3, 4), "kernel": (3, 2, 1, 3)}
    assert state.col == {"matrix": (3, 5, 1), "vector": (3, 4), "kernel": (3, 2, 7, 1)}


def test_star_says_that_it_needs_the_parameters():
    optimizer, tree = star.star(0.1, star.init_meta_params(jax.random.key(0))), {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match="STAR sees the parameters"):
        optimizer.update(tree, optimizer.init(tree))


def test_the_header_counts_the_meta_parameters():
    assert sum(x.size for x in star.init_meta_params(jax.random.key(0)).values()) == 207
    assert "207 numbers" in star.__doc__
