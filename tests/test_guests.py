"""Every optimizer in every situation that optax's Adam, the first row of the table, lives in."""

import contextlib
import functools
from typing import NamedTuple

import guests
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optim4rl
import pipeline
from learned_optimizers import gated_adam, l2lgd2, linear_optim, star, velo

OPTIMIZERS = {
    "adam": gated_adam.LearnedOptimizer(lambda key: {}, lambda learning_rate, meta_params: optax.adam(learning_rate)),
    "optim4rl": optim4rl.OPTIM4RL,
    "linear_optim": linear_optim.LINEAR_OPTIM,
    "l2lgd2": l2lgd2.L2LGD2,
    "star": star.STAR,
    "gated_adam": gated_adam.GATED_ADAM,
    "velo": guests.small_velo(velo.VELO),
}
LEARNED = [name for name in OPTIMIZERS if name != "adam"]
NOT_EXPECTED = {
    # STAR divides features by their root mean square over a tensor: one broken scalar breaks the tensor.
    ("star", "one_nan_spoils_one_scalar"),
    ("star", "a_gradient_of_1e30_is_no_nan"),
    # So does VeLO, and the maximum over tensors that its LSTM takes breaks all others, too.
    ("velo", "one_nan_spoils_one_scalar"),
    # VeLO keeps averages of the loss as well, which belong to no parameter.
    ("velo", "state_is_shaped_like_the_parameters"),
    # VeLO's step is a small part of a tensor's size: it hardly leaves the zeros where that agent begins.
    ("velo", "the_pipeline_meta_trains_it"),
}
FLOAT32 = {"rtol": 2e-5, "atol": 1e-7}
PARAMS = {"b": np.array([0.3, -2.0, 1.0], np.float32), "w": np.array([[0.5, -0.1, 3.0], [1.0, 2.0, -1e-3]], np.float32)}
GRADS = {name: guests.random_grads(1, 3, *x.shape).astype(np.float32) for name, x in PARAMS.items()}  # of three steps
FIRST = jax.tree.map(lambda x: x[0], GRADS)


@functools.cache
def meta_params_of(name):
    return guests.random_meta_params(OPTIMIZERS[name], scale=0.3)


@functools.cache
def make(name, learning_rate=0.1):
    return OPTIMIZERS[name].make(learning_rate=learning_rate, meta_params=meta_params_of(name))


@functools.cache
def loop(optimizer):
    """Compiled once for all situations: ((params, state), grads [T, ...]) -> ((params, state), updates [T, ...])."""

    def step(carry, g):
        params, state = carry
        updates, state = optimizer.update(g, state, params)
        return (optax.apply_updates(params, updates), state), updates

    return jax.jit(lambda carry, grads: jax.lax.scan(step, carry, grads))


def run(optimizer, params=PARAMS, grads=GRADS):
    """Updates for successive gradients [T, ...], the parameters moving along, and the last state."""
    params = jax.tree.map(jnp.asarray, params)
    (_, state), updates = loop(optimizer)((params, optimizer.init(params)), grads)
    return updates, state


@functools.cache
def plain(name):
    """The updates of three ordinary steps, which other situations must reproduce."""
    return run(make(name))[0]


def assert_close(tree, expected, **tolerance):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **(FLOAT32 | tolerance)), tree, expected)


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype)), tree)


# Situations. Each is a function of an optimizer's name.


def steps_one_by_one(name):
    optimizer, params, updates = make(name), PARAMS, []
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for t in range(3):
        u, state = update(jax.tree.map(lambda x, t=t: x[t], GRADS), state, params)
        params = optax.apply_updates(params, u)
        updates.append(u)
    assert_close(jax.tree.map(lambda *x: np.stack(x), *updates), plain(name))


def without_jit(name):
    optimizer = make(name)
    updates, _ = optimizer.update(FIRST, optimizer.init(PARAMS), PARAMS)
    assert_close(updates, jax.tree.map(lambda x: x[0], plain(name)))


def vmap(name):
    optimizer, scale = make(name), np.array([1.0, -3.0], np.float32)
    of_agents = jax.tree.map(lambda x: np.multiply.outer(scale, x), (FIRST, PARAMS))
    both, state = jax.jit(jax.vmap(lambda g, p: optimizer.update(g, optimizer.init(p), p)))(*of_agents)
    assert all(len(x) == 2 for x in jax.tree.leaves(state))
    assert_close(jax.tree.map(lambda x: x[0], both), jax.tree.map(lambda x: x[0], plain(name)))


def donation_of_a_fresh_state(name):
    optimizer, params = make(name), jax.tree.map(jnp.array, PARAMS)
    _updates, state = jax.jit(optimizer.update, donate_argnums=1)(FIRST, optimizer.init(params), params)
    jax.jit(optimizer.update, donate_argnums=1)(FIRST, state, params)


def donation_after_a_step_without_jit(name):
    optimizer, params = make(name), jax.tree.map(jnp.array, PARAMS)
    _, state = optimizer.update(FIRST, optimizer.init(params), params)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)


ODD = {
    "none": None,
    "empty": np.zeros((0, 3), np.float32),
    "scalar": jnp.array(0.3),
    "python": 0.5,
    "np0d": np.float32(2),
}


def odd_leaves(name):
    optimizer, adam = make(name), optax.adam(0.1)
    state = optimizer.init(ODD)
    updates, state = jax.jit(optimizer.update)(ODD, state, ODD)
    updates, state = jax.jit(optimizer.update)(ODD, state, ODD)
    assert shapes(updates) == shapes(adam.update(ODD, adam.init(ODD), ODD)[0])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
    assert updates["scalar"] != 0 and updates["python"] != 0 and updates["np0d"] != 0


def leaves_without_gradient(name):
    optimizer = make(name)
    state = optimizer.init(PARAMS)
    updates, state = jax.jit(optimizer.update)(FIRST | {"b": None}, state, PARAMS)
    assert updates["b"] is None and np.all(np.isfinite(updates["w"]))


def empty_trees(name):
    for empty in ({}, [], (), {"none": None}):
        optimizer = make(name)
        updates, _ = optimizer.update(empty, optimizer.init(empty), empty)
        assert jax.tree.structure(updates) == jax.tree.structure(empty)


def dtypes_are_adam_s_and_stable(name):
    optimizer, adam = make(name), optax.adam(0.1)
    for of_params in (jnp.float32, jnp.bfloat16, jnp.float16):
        for of_grads in (jnp.float32, jnp.bfloat16, jnp.float16):
            params, grads = ({"w": jnp.ones(3, dtype)} for dtype in (of_params, of_grads))
            state = optimizer.init(params)
            updates, new_state = jax.eval_shape(optimizer.update, grads, state, params)
            expected, _ = jax.eval_shape(adam.update, grads, adam.init(params), params)
            assert shapes(updates) == shapes(expected)
            assert shapes(new_state) == shapes(state)


def bfloat16_gradients_of_float32_parameters(name):
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), GRADS)
    updates, _ = run(make(name), grads=half)
    expected, _ = run(make(name), grads=jax.tree.map(lambda x: x.astype(jnp.float32), half))
    assert_close(updates, expected, rtol=0.01, atol=1e-3)


def float64(name):
    with jax.enable_x64(True):
        grads, params = jax.tree.map(lambda x: np.asarray(x, np.float64), (FIRST, PARAMS))
        optimizer = make(name)
        updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
        assert all(x.dtype == np.float64 for x in jax.tree.leaves(updates))
        assert_close(updates, jax.tree.map(lambda x: x[0], plain(name)), rtol=1e-4, atol=1e-6)


def integer_leaves(name):
    optimizer, grads = make(name), {"steps": jnp.array([3, -2]), "w": jnp.array([3.0, -2.0])}
    try:
        updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(grads), grads)
    except TypeError as error:
        assert "steps" in str(error)
    else:
        assert updates["steps"].dtype == np.float32
        np.testing.assert_allclose(updates["steps"], updates["w"], rtol=1e-5)


def leaves_that_cannot_be_updated(name):
    for leaf in (np.zeros(2, jax.dtypes.float0), jnp.ones(2, complex), jnp.ones(2, bool), "text", jax.random.key(0)):
        optimizer = make(name)
        with pytest.raises(TypeError, match="bad"):
            optimizer.init({"bad": leaf})
        with pytest.raises(TypeError, match="bad"):
            optimizer.update({"bad": leaf}, optimizer.init({"bad": jnp.ones(2)}), {"bad": jnp.ones(2)})


def one_nan_spoils_one_scalar(name):
    grads = jax.tree.map(np.array, GRADS)
    grads["w"][0, 1, 2] = np.nan
    updates, _ = run(make(name), grads=grads)
    assert np.isnan(updates["w"][:, 1, 2]).any()
    updates["w"] = updates["w"].at[:, 1, 2].set(0)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))


def a_gradient_of_1e30_is_no_nan(name):
    grads = jax.tree.map(np.array, GRADS)
    grads["w"][0, 1, 2] = 1e30
    updates, _ = run(make(name), grads=grads)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))


def derivatives_of_learning_rate_and_meta_parameters(name):
    with jax.enable_x64(True):
        meta_params = guests.random_meta_params(OPTIMIZERS[name], 3, np.float64, scale=0.3)
        flat, unflatten = jax.flatten_util.ravel_pytree((np.float64(0.1), meta_params))
        grads, target = guests.random_grads(4, 3, 2, 3), np.random.default_rng(5).normal(size=(2, 3))

        def meta_loss(flat):
            learning_rate, meta_params = unflatten(flat)
            optimizer = OPTIMIZERS[name].make(learning_rate=learning_rate, meta_params=meta_params)
            carry = (jnp.asarray(target), optimizer.init(target))
            return jnp.sum((loop.__wrapped__(optimizer)(carry, grads)[0][0] + target) ** 2)

        step, direction = 1e-6, np.random.default_rng(6).normal(size=flat.size)
        forward = jax.jit(lambda x: jax.jvp(meta_loss, (x,), (direction,)))
        slope = (forward(flat + step * direction)[0] - forward(flat - step * direction)[0]) / (2 * step)
        reverse = jax.jit(jax.grad(meta_loss))(flat) @ direction
        np.testing.assert_allclose(reverse, slope, rtol=1e-5)  # error of the differences
        np.testing.assert_allclose(forward(flat)[1], reverse, rtol=1e-8)


def no_derivative_flows_through_the_gradients(name):
    optimizer = make(name)

    def moved(g):
        return sum(x.sum() for x in jax.tree.leaves(optimizer.update(g, optimizer.init(PARAMS), PARAMS)[0]))

    assert not any(np.any(x) for x in jax.tree.leaves(jax.jit(jax.grad(moved))(FIRST)))


def chain(name):
    clipped = jax.tree.map(lambda x: np.clip(x, -0.5, 0.5), GRADS)
    assert_close(run(optax.chain(optax.clip(0.5), make(name)))[0], run(make(name), grads=clipped)[0])


def schedule(name):
    updates, _ = run(make(name, optax.linear_schedule(0.1, 0.0, 4)))
    assert_close(jax.tree.map(lambda x: x[0], updates), jax.tree.map(lambda x: x[0], plain(name)))
    # Only where the parameters do not matter is the second step known too; half of alpha at least is seen in all.
    assert not np.allclose(updates["w"][2], plain(name)["w"][2])


def inject_hyperparams(name):
    def of(learning_rate):
        return OPTIMIZERS[name].make(learning_rate=learning_rate, meta_params=meta_params_of(name))

    updates, state = run(optax.inject_hyperparams(of)(learning_rate=0.1))
    assert_close(updates, plain(name))
    assert state.hyperparams.keys() == {"learning_rate"}


def inject_hyperparams_into_the_function_itself(name):
    function = {"adam": lambda learning_rate, meta_params: optax.adam(learning_rate)}.get(name, OPTIMIZERS[name].make)
    optimizer = optax.inject_hyperparams(function)(learning_rate=0.1, meta_params=meta_params_of(name))
    assert_close(run(optimizer)[0], plain(name))


def masked(name):
    updates, _state = run(optax.masked(make(name), {"b": False, "w": True}))
    alone, _ = run(make(name), {"w": PARAMS["w"]}, {"w": GRADS["w"]})
    assert_close(updates, {"b": GRADS["b"], "w": alone["w"]})


def multi_transform(name):
    labels = {"b": "sgd", "w": "this"}
    updates, _ = run(optax.multi_transform({"sgd": optax.sgd(1.0), "this": make(name)}, labels))
    alone, _ = run(make(name), {"w": PARAMS["w"]}, {"w": GRADS["w"]})
    assert_close(updates, {"b": -GRADS["b"], "w": alone["w"]})


def multi_steps(name):
    twice = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), GRADS)  # the mean of two equal gradients
    updates, _ = run(optax.MultiSteps(make(name), 2).gradient_transformation(), grads=twice)
    assert_close(jax.tree.map(lambda x: x[1::2], updates), plain(name))
    assert not any(np.any(x[::2]) for x in jax.tree.leaves(updates))


def apply_if_finite(name):
    with_nan = jax.tree.map(lambda x: np.concatenate([np.full_like(x[:1], np.nan), x]), GRADS)
    updates, _ = run(optax.apply_if_finite(make(name), 3), grads=with_nan)
    assert_close(jax.tree.map(lambda x: x[1:], updates), plain(name))
    assert not any(np.any(x[0]) for x in jax.tree.leaves(updates))


def extra_arguments(name):
    optimizer = optax.with_extra_args_support(make(name)) if name == "adam" else make(name)
    updates, _ = jax.jit(optimizer.update)(FIRST, optimizer.init(PARAMS), PARAMS, value=1.0)
    assert_close(updates, jax.tree.map(lambda x: x[0], plain(name)))


def state_is_shaped_like_the_parameters(name):
    optimizer = make(name)
    state = optimizer.init(PARAMS)
    marked = optax.tree_map_params(optimizer, lambda x: "like the parameters", state)
    named = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(marked)}
    assert all(isinstance(x, str) for path, x in named.items() if "count" not in path)


class Agent(NamedTuple):
    params: jax.Array
    opt_state: tuple


def the_pipeline_meta_trains_it(name):
    target = jnp.arange(1.0, 7.0).reshape(2, 3)

    class Learner:
        def init(key, optimizer):
            return Agent(jnp.zeros((2, 3)), optimizer.init(jnp.zeros((2, 3))))

        def update(optimizer, unit, key):
            updates, opt_state = optimizer.update(unit.params - target, unit.opt_state, unit.params)
            return Agent(unit.params + updates, opt_state), {}

        def loss(unit, key):
            return jnp.sum((unit.params - target) ** 2), (unit, {})

    def make_optimizer(meta_params):
        return OPTIMIZERS[name].make(learning_rate=0.01, meta_params=meta_params)

    config, key = pipeline.Config(num_units=4, reset_interval=4, inner_updates=2), jax.random.key(0)
    task = pipeline.make_task(Learner, make_optimizer, config)
    meta_optimizer, losses = optax.adam(0.03), []
    state = pipeline.init([task], meta_optimizer, OPTIMIZERS[name].init(key), key)
    for _ in range(40):
        state, [metrics] = pipeline.meta_step([task], meta_optimizer, state, key)
        losses.append(float(metrics["meta_loss"]))
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])


def flax_train_state(name):
    pytest.importorskip("flax")
    from flax import serialization
    from flax.training.train_state import TrainState

    state = TrainState.create(apply_fn=None, params=jax.tree.map(jnp.array, PARAMS), tx=make(name))
    step = jax.jit(lambda state, g: state.apply_gradients(grads=g), donate_argnums=0)
    state = step(state, FIRST)
    fresh = TrainState.create(apply_fn=None, params=PARAMS, tx=state.tx)
    restored = serialization.from_bytes(fresh, serialization.to_bytes(state))
    assert_close(step(restored, FIRST).params, step(state, FIRST).params)


def flax_nnx_optimizer(name):
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, make(name), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: jnp.mean(model(jnp.ones((1, 2))) ** 2))(model))

    before = np.array(model.kernel[...])
    step(model, optimizer)
    step(model, optimizer)
    assert np.isfinite(model.kernel[...]).all() and np.all(model.kernel[...] != before)


def equinox_mlp(name):
    eqx = pytest.importorskip("equinox")
    model, optimizer = eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0)), make(name)
    state = optimizer.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit(donate="all-except-first")
    def step(x, model, state):
        grads = eqx.filter_grad(lambda model: jnp.mean(jax.vmap(model)(x) ** 2))(model)
        updates, state = optimizer.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    before = np.array(model.layers[1].weight)
    for _ in range(2):
        model, state = step(jnp.ones((4, 2)), model, state)
    assert np.isfinite(model.layers[1].weight).all() and np.any(model.layers[1].weight != before)


SPREAD = {"b": ((8,), PartitionSpec("d")), "w": ((8, 12), PartitionSpec("d")), "w2": ((3, 8), PartitionSpec(None, "d"))}


def spread_over_four_devices(name, kind):
    """Nothing of a leaf's shape may be gathered: neither state nor updates."""
    optimizer, mesh = make(name), jax.make_mesh((4,), ("d",), (kind,))
    whole = {
        leaf: np.random.default_rng(0).normal(size=shape).astype(np.float32) for leaf, (shape, _) in SPREAD.items()
    }
    expected, _ = jax.jit(optimizer.update)(whole, optimizer.init(whole), whole)
    with jax.set_mesh(mesh) if kind == AxisType.Explicit else contextlib.nullcontext():
        params = {leaf: jax.device_put(x, NamedSharding(mesh, SPREAD[leaf][1])) for leaf, x in whole.items()}
        fresh = optimizer.init(params)
        updates, state = jax.jit(optimizer.update)(params, fresh, params)
    for path, x in jax.tree.leaves_with_path((fresh, state)):
        if any(x.shape[max(0, x.ndim - len(shape)) :] == shape for shape, _ in SPREAD.values()) or x.size > 100:
            assert not x.sharding.is_fully_replicated, (jax.tree_util.keystr(path), x.sharding)
    for leaf, x in updates.items():
        assert x.sharding.is_equivalent_to(params[leaf].sharding, x.ndim), (leaf, x.sharding)
    assert_close(jax.device_get(updates), jax.device_get(expected), rtol=1e-4, atol=1e-6)


def parameters_sharded_on_an_explicit_mesh(name):
    spread_over_four_devices(name, AxisType.Explicit)


def fully_sharded_data_parallel(name):
    spread_over_four_devices(name, AxisType.Auto)


ALL = [
    steps_one_by_one,
    without_jit,
    vmap,
    donation_of_a_fresh_state,
    donation_after_a_step_without_jit,
    odd_leaves,
    empty_trees,
    bfloat16_gradients_of_float32_parameters,
    float64,
    integer_leaves,
    one_nan_spoils_one_scalar,
    a_gradient_of_1e30_is_no_nan,
    derivatives_of_learning_rate_and_meta_parameters,
    chain,
    schedule,
    inject_hyperparams,
    inject_hyperparams_into_the_function_itself,
    masked,
    multi_transform,
    multi_steps,
    apply_if_finite,
    extra_arguments,
    state_is_shaped_like_the_parameters,
    parameters_sharded_on_an_explicit_mesh,
    fully_sharded_data_parallel,
    flax_train_state,
    flax_nnx_optimizer,
    equinox_mlp,
]
# Where Adam fails: a gradient None changes the structure of its state, one of another dtype the dtype of its moments.
ONLY_LEARNED = [
    leaves_without_gradient,
    dtypes_are_adam_s_and_stable,
    leaves_that_cannot_be_updated,
    no_derivative_flows_through_the_gradients,
    the_pipeline_meta_trains_it,
]


@pytest.mark.parametrize("situation", ALL, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_guest_behaves_where_adam_does(name, situation):
    if (name, situation.__name__) in NOT_EXPECTED:
        with pytest.raises(AssertionError):
            situation(name)
    else:
        situation(name)


@pytest.mark.parametrize("situation", ONLY_LEARNED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_optimizer(name, situation):
    test_a_guest_behaves_where_adam_does(name, situation)


@pytest.mark.parametrize("name", ["linear_optim", "l2lgd2", "star"])  # GatedAdam sees a mean over all leaves
def test_leaves_are_updated_one_by_one(name):
    together = plain(name)
    for key, g in GRADS.items():
        assert_close({key: together[key]}, run(make(name), {key: PARAMS[key]}, {key: g})[0])
