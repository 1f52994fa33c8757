"""brax_env against Brax's own wrappers, step by step, on inverted_pendulum (the cheapest robot)."""

import functools
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brax.envs.wrappers import training

import brax_env

N = 8
ROOT = brax_env.__file__.rpartition("/")[0]


@functools.cache
def rollouts(action_repeat, episode_length, steps=100):
    """(our (obs, reward, done, truncation), Brax's, our first obs): [steps, N, ...] each, and [N, D]."""
    env = brax_env.make("inverted_pendulum", episode_length, action_repeat)
    brax = training.wrap(brax_env.load_robot("inverted_pendulum"), episode_length, action_repeat)
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

    def both():
        start = jax.vmap(env.reset)(keys)
        ours = jax.lax.scan(our_step, start, actions)[1]
        return ours, jax.lax.scan(brax_step, brax.reset(keys), actions)[1], jax.vmap(env.observe)(start)

    return jax.tree.map(np.asarray, jax.jit(both)())


@pytest.mark.parametrize("action_repeat, episode_length", [(1, 40), (2, 41)])
def test_every_step_equals_that_of_braxs_wrappers(action_repeat, episode_length):
    ours, theirs, _ = rollouts(action_repeat, episode_length)
    for x, y in zip(ours, theirs):
        # The same operations in another program: rounding only, which 100 steps of physics amplify a little.
        np.testing.assert_allclose(np.asarray(x, float), np.asarray(y, float), rtol=1e-4, atol=1e-4)
    assert ours[2].dtype == ours[3].dtype == bool


def test_truncation_is_told_apart_from_termination():
    (obs, _, done, truncation), *_ = rollouts(1, 40)
    assert truncation.any() and (done & ~truncation).any()
    assert not (truncation & ~done).any()
    assert truncation[39, 0] and not truncation[:39, 0].any()  # the environment without pushes lives to its 40th step
    # A pole that falls has left the band of 0.2 in which it counts as upright: such a state is never shown.
    assert np.abs(obs[..., 1]).max() <= 0.2


def test_an_episode_ends_after_episode_length_steps_and_restarts_from_its_first_state():
    (obs, _, done, _), _, first_obs = rollouts(1, 40)
    assert np.flatnonzero(done[:, 0]).tolist() == [39, 79]
    for t, n in zip(*np.nonzero(done)):
        np.testing.assert_allclose(obs[t, n], first_obs[n], atol=1e-6)


@pytest.fixture(scope="module")
def pendulum():
    """(env, its compiled step, which donates the state)."""
    env = brax_env.make("inverted_pendulum")
    return env, jax.jit(env.step, donate_argnums=1)


def test_a_first_state_can_be_donated_twice(pendulum):
    env, step = pendulum
    for _ in range(2):  # if a state held arrays of the robot, the first donation would delete them
        state = env.reset(jax.random.key(0))  # not compiled: equal arrays may be one
        state, reward, *_ = step(jax.random.key(1), state, jnp.zeros(1))
        assert np.isfinite(reward) and state.time == 1


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_simulation_that_diverges_restarts_and_leaves_its_reward_nan(pendulum, wrong):
    env, step = pendulum
    state = env.reset(jax.random.key(0))
    first_obs = np.asarray(state.obs)
    broken = jax.tree.map(
        lambda x: jnp.full_like(x, wrong) if jnp.isdtype(x.dtype, "real floating") else x, state.physics
    )
    state, reward, done, truncation = step(jax.random.key(1), state._replace(physics=broken), jnp.zeros(1))
    assert np.isnan(reward) and done and truncation and state.time == 0
    np.testing.assert_array_equal(state.obs, first_obs)
    state, reward, done, truncation = step(jax.random.key(2), state, jnp.zeros(1))
    assert np.isfinite(reward) and not done and not truncation and state.time == 1


def test_a_step_keeps_its_types_in_float64():
    with jax.enable_x64(True):
        env = brax_env.make("inverted_pendulum")
        state = jax.eval_shape(env.reset, jax.random.key(0))
        after = jax.eval_shape(env.step, jax.random.key(0), state, jax.ShapeDtypeStruct((1,), jnp.float64))[0]
        assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, after)


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
        ({"name": "inverted_pendulun"}, "inverted_pendulum"),
        ({"name": "swimmer"}, "ant, halfcheetah"),
        ({"name": "ant", "backend": "mjx"}, "spring"),
        ({"name": "ant", "episode_length": 0}, "episode_length"),
        ({"name": "ant", "action_repeat": 0}, "action_repeat is 0"),
        ({"name": "ant", "episode_length": 2.5}, "episode_length is 2.5"),
    ],
)
def test_impossible_arguments_are_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        brax_env.make(**arguments)
    assert "\n" not in str(error.value)


def test_making_a_robot_leaves_no_trace(tmp_path):
    """Nothing printed, no file, no graphics library, no setting changed; and importing brax_env alone loads no Brax."""
    program = """
        import os, sys, warnings, jax
        before = list(warnings.filters), dict(os.environ)
        import brax_env
        assert brax_env.NAMES and not {"brax", "mujoco"} & set(sys.modules)
        brax_env.make("halfcheetah")  # of which MuJoCo has a warning
        import mujoco
        assert {"brax", "mujoco"} <= set(sys.modules) and not {"glfw", "OpenGL"} & set(sys.modules)
        assert dict(os.environ) == before[1] and mujoco.get_mju_user_warning() is None
        assert [f for f in warnings.filters if "piplines" in str(f[1])] == []
    """
    environment = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"} | {"PYTHONPATH": ROOT}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
