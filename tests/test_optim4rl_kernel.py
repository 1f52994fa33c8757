"""The GPU kernel of Optim4RL: interpreted on a CPU beside the plain rule, which test_optim4rl.py compares with golden numbers and
finite differences, and lowered for CUDA."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_optim4rl import random_meta_params

import optim4rl
from benchmarks import optim4rl_kernel


def arrays(hidden_size, *shape, dtype=np.float32):
    """(meta_params, h1, h2, g)."""
    random = np.random.default_rng(1)
    meta_params = optim4rl.init_meta_params(jax.random.key(0), hidden_size)
    meta_params = jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.5, x.shape), dtype), meta_params)
    draw = lambda *shape: jnp.asarray(random.normal(0, 1, shape), dtype)
    return meta_params, draw(hidden_size, *shape), draw(hidden_size, *shape), draw(*shape)


def assert_close(found, expected, tolerance):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * np.abs(y).max())


# One scalar; more than one program of the backward kernel, the last of them cut; other widths
@pytest.mark.parametrize(("hidden_size", "shape"), [(8, ()), (8, (7, 200)), (16, (70,))])
def test_it_computes_the_plain_rule_and_its_derivatives(hidden_size, shape):
    with jax.enable_x64(True):
        meta_params, *of_scalars, g = arrays(hidden_size, *shape, dtype=np.float64)
        results = []
        for rule in (optim4rl.update_rule, optim4rl_kernel.update_rule):
            new, pull_back = jax.vjp(
                lambda *args, rule=rule: rule(args[0], 1e-8, *args[1:], g), meta_params, *of_scalars
            )
            results.append((new, pull_back(jax.tree.map(jnp.cos, new))))
        assert_close(results[1], results[0], 1e-10)


def meta_gradient(grads, meta_params):
    """Through two updates of each of several agents: of the sum of squares of their parameters."""

    def loss(meta_params, grads):
        optimizer = optim4rl.optim4rl(0.1, meta_params)
        state, params = optimizer.init(grads[0]), jnp.zeros_like(grads[0])
        for g in grads:
            updates, state = optimizer.update(g, state)
            params += updates
        return (params**2).sum()

    return jax.grad(lambda meta_params: jax.vmap(partial(loss, meta_params))(grads).sum())(meta_params)


def test_it_takes_the_plain_rule_s_place_in_the_meta_gradient_of_several_agents(monkeypatch):
    grads = jnp.asarray(np.random.default_rng(2).normal(size=(3, 2, 70)), jnp.float32)
    expected = meta_gradient(grads, random_meta_params())
    monkeypatch.setattr(optim4rl, "update_rule", optim4rl_kernel.update_rule)
    assert_close(meta_gradient(grads, random_meta_params()), expected, 1e-5)


@pytest.mark.parametrize("weights_of_each_agent", [False, True])
def test_it_is_lowered_to_triton_for_a_gpu(monkeypatch, weights_of_each_agent):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    meta_params, *of_scalars = arrays(8, 4, 100)
    of_scalars = [jnp.moveaxis(x, -2, 0) for x in of_scalars]  # 4 agents
    if weights_of_each_agent:
        meta_params = jax.tree.map(lambda x: jnp.stack([x] * 4), meta_params)
    loss = lambda *args: sum(x.sum() for x in optim4rl_kernel.update_rule(args[0], 1e-8, *args[1:]))
    step = jax.vmap(jax.grad(loss, argnums=(0, 1, 2)), in_axes=(0 if weights_of_each_agent else None, 0, 0, 0))
    lowered = jax.jit(step).trace(meta_params, *of_scalars).lower(lowering_platforms=("cuda",))
    assert "__gpu$xla.gpu.triton" in lowered.as_text()


def test_another_hidden_size_is_refused():
    meta_params, *of_scalars = arrays(6, 5)
    with pytest.raises(ValueError, match="the hidden size is 6; the kernel takes a power of two from 8 on"):
        optim4rl_kernel.update_rule(meta_params, 1e-8, *of_scalars)
