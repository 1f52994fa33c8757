"""brax_env.py against Brax's own wrappers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brax import envs

import brax_env

N, LIMIT = 4, 40  # a random policy drops most pendulums before LIMIT steps; the best ones meet the time limit


@pytest.fixture(scope="module")
def both():
    """(reward, done, truncation, obs) of the same actions in our environments and in Brax's wrapped ones: [T, N, ...]."""
    ours = brax_env.make("inverted_pendulum", episode_length=LIMIT)
    theirs = envs.wrappers.training.wrap(envs.get_environment("inverted_pendulum", backend="spring"), episode_length=LIMIT)
    keys = jax.random.split(jax.random.key(0), N)
    # The first environment is left alone, the others are pushed.
    actions = jax.random.uniform(jax.random.key(1), (120, N, 1), minval=-1, maxval=1) * jnp.array([0.0, 1, 1, 1])[:, None]

    def our_step(state, action):
        state, reward, done, truncation = jax.vmap(ours.step)(keys, state, action)
        return state, (reward, done, truncation, jax.vmap(ours.observe)(state))

    def their_step(state, action):
        state = theirs.step(state, action)
        return state, (state.reward, state.done, state.info["truncation"], state.obs)

    ran_ours = jax.jit(lambda: jax.lax.scan(our_step, jax.vmap(ours.reset)(keys), actions)[1])()
    ran_theirs = jax.jit(lambda: jax.lax.scan(their_step, theirs.reset(jax.random.key_data(keys)), actions)[1])()
    return ran_ours, ran_theirs


def test_steps_agree_with_braxs_wrappers(both):
    for ours, theirs in zip(*both):
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, rtol=1e-4, atol=1e-4)


def test_a_time_limit_is_told_apart_from_a_fall(both):
    _, done, truncation, _ = map(np.asarray, both[0])
    assert done.dtype == bool and truncation.dtype == bool
    assert truncation.any() and (done & ~truncation).any() and not (truncation & ~done).any()
    assert done.reshape(-1, LIMIT, N)[:, :, 0].any(1).all()  # nobody lives longer than the limit


def test_after_an_end_the_next_episode_has_begun(both):
    _, done, _, obs = map(np.asarray, both[0])
    env = brax_env.make("inverted_pendulum")
    first = jax.jit(jax.vmap(lambda key: env.observe(env.reset(key))))(jax.random.split(jax.random.key(0), N))
    for t, n in zip(*np.nonzero(done)):
        np.testing.assert_allclose(obs[t, n], first[n], atol=1e-6)


@pytest.mark.parametrize("arguments, message", [
    (("moon_lander",), "inverted_pendulum"),
    (("ant", 0), "0"),
    (("ant", 1000, 1, "newton"), "spring"),
])
def test_impossible_robots_are_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        brax_env.make(*arguments)
    assert "\n" not in str(error.value)


def test_shapes_are_those_of_the_robot():
    env = brax_env.make("ant")
    assert env.obs_shape == (27,) and env.action_size == 8 and env.name == "ant"
