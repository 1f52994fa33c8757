"""brax_env against Brax's own wrappers, step by step, on inverted_pendulum (the cheapest robot)."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brax import envs
from brax.envs.wrappers import training

import brax_env

N = 8


@pytest.fixture(scope="module")
def rollouts():
    """Function: (steps, action_repeat, episode_length) -> our and Brax's (obs, reward, done, truncation), each [steps, N, ...]."""
    return jax.jit(_rollouts, static_argnums=(0, 1, 2))


def _rollouts(steps, action_repeat, episode_length):
    env = brax_env.make("inverted_pendulum", episode_length, action_repeat)
    brax = training.wrap(envs.get_environment("inverted_pendulum", backend="spring"), episode_length, action_repeat)
    keys = jax.random.split(jax.random.PRNGKey(0), N)  # Brax's wrappers take the shape of old-style keys
    # Some environments are pushed hard and fall, others gently and live until the time limit.
    push = jnp.linspace(0.0, 1.0, N)[None, :, None]
    actions = push * jax.random.uniform(jax.random.key(1), (steps, N, 1), minval=-1.0)

    def our_step(state, action):
        state, reward, done, truncation = jax.vmap(env.step)(keys, state, action)
        return state, (jax.vmap(env.observe)(state), reward, done, truncation)

    def brax_step(state, action):
        state = brax.step(state, action)
        return state, (state.obs, state.reward, state.done, state.info["truncation"])

    ours = jax.lax.scan(our_step, jax.vmap(env.reset)(keys), actions)[1]
    return ours, jax.lax.scan(brax_step, brax.reset(keys), actions)[1]


@pytest.mark.parametrize("action_repeat, episode_length", [(1, 40), (2, 41)])
def test_every_step_equals_that_of_braxs_wrappers(rollouts, action_repeat, episode_length):
    ours, theirs = rollouts(100, action_repeat, episode_length)
    for x, y in zip(ours, theirs):
        # The same operations in another program: rounding only, which 100 steps of physics amplify a little.
        np.testing.assert_allclose(np.asarray(x, float), np.asarray(y, float), rtol=1e-4, atol=1e-4)
    assert ours[2].dtype == ours[3].dtype == bool


def test_truncation_is_told_apart_from_termination(rollouts):
    (obs, _, done, truncation), _ = rollouts(100, 1, 40)
    assert truncation.any() and (done & ~truncation).any()
    assert not (truncation & ~done).any()
    assert truncation[39, 0] and not truncation[:39, 0].any()  # the environment without pushes lives to its 40th step
    # A pole that falls has left the band of 0.2 in which it counts as upright: such a state is never shown.
    assert np.abs(obs[..., 1]).max() <= 0.2


def test_an_episode_ends_after_episode_length_steps_and_restarts_from_its_first_state(rollouts):
    (obs, _, done, _), _ = rollouts(100, 1, 40)
    assert np.flatnonzero(done[:, 0]).tolist() == [39, 79]
    first_obs = jax.vmap(lambda key: brax_env.make("inverted_pendulum").reset(key).obs)(
        jax.random.split(jax.random.key(0), N)
    )
    for t, n in zip(*np.nonzero(done)):
        np.testing.assert_allclose(obs[t, n], first_obs[n], atol=1e-6)


def test_the_state_holds_arrays_only_and_keeps_its_types():
    env = brax_env.make("inverted_pendulum")
    state = jax.eval_shape(env.reset, jax.random.key(0))
    action = jax.ShapeDtypeStruct((env.action_size,), jnp.float32)
    next_state, reward, done, truncation = jax.eval_shape(env.step, jax.random.key(0), state, action)
    same = jax.tree.map(lambda x, y: x.shape == y.shape and x.dtype == y.dtype, state, next_state)
    assert all(jax.tree.leaves(same))
    assert reward.shape == done.shape == truncation.shape == ()
    assert env.obs_shape == state.obs.shape == (4,) and env.action_size == 1 and env.name == "inverted_pendulum"


def test_every_name_is_a_task_of_brax_that_can_be_made():
    for name in set(brax_env.NAMES) - {"humanoidstandup"}:  # the slowest to load, and the same robot as humanoid
        env = brax_env.make(name)
        assert env.obs_shape[0] > 0 and env.action_size > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(name="inverted_pendulun"), "inverted_pendulum"),
        (dict(name="swimmer"), "ant, halfcheetah"),
        (dict(name="ant", backend="mjx"), "spring"),
        (dict(name="ant", episode_length=0), "episode_length"),
        (dict(name="ant", action_repeat=0), "action_repeat"),
    ],
)
def test_impossible_arguments_are_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        brax_env.make(**arguments)
    assert "\n" not in str(error.value)


def test_import_and_make_print_nothing():
    program = "import brax_env; brax_env.make('inverted_pendulum')"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "" and run.stderr == ""
