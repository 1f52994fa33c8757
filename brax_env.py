"""Brax: the robots on which learned optimizers are tested, as episodes that restart by themselves (paper: appendix).

| symbol | here | shape |
|---|---|---|
| s | State of one environment, arrays only; jax.vmap makes many | |
| obs | observe(state) | [D] |
| a | action, each entry in [-1, 1] | [A] |
| r | reward, unscaled | [] |
| done | the episode ended with this step; the returned state is already the next episode's first | [] bool |
| truncation | the time limit alone ended it; it could have gone on | [] bool |

Done and truncation differ because only after a true end (done and not truncation) is it certain that no reward follows.

Example:
    import jax, brax_env
    env = brax_env.make("inverted_pendulum")
    states = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), 8))
    step = jax.jit(jax.vmap(env.step))
    for key in jax.random.split(jax.random.key(1), 100):
        action_key, *step_keys = jax.random.split(key, 9)
        actions = jax.random.uniform(action_key, (8, env.action_size), minval=-1, maxval=1)
        states, rewards, dones, truncations = step(jax.numpy.stack(step_keys), states, actions)
    print(jax.vmap(env.observe)(states).shape, rewards)

NOTE: rewards, dones and truncations are those of Brax's EpisodeWrapper and AutoResetWrapper, step for step. As there, an
environment starts all its episodes from the one state that its reset drew; other environments have other first states.
Copy this file: needs jax, brax.
"""

import contextlib
import io
import warnings
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

# Importing Brax prints that an optional GPU engine is missing and warns of a package it still imports; loading a robot
# warns that Brax is no longer developed. None of this belongs into the output of a training run.
with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from brax import envs
warnings.filterwarnings("ignore", message="Brax System, piplines and environments")

# Brax's robots that have spring physics (swimmer has not)
NAMES = (
    "ant",
    "halfcheetah",
    "hopper",
    "humanoid",
    "humanoidstandup",
    "inverted_double_pendulum",
    "inverted_pendulum",
    "pusher",
    "reacher",
    "walker2d",
)
BACKENDS = ("generalized", "positional", "spring")


class Env(NamedTuple):
    reset: Callable  # key -> State
    step: Callable  # (key, State, action [A]) -> (State, reward [], done [] bool, truncation [] bool)
    observe: Callable  # State -> obs [D]
    obs_shape: tuple  # (D,)
    action_size: int  # A
    name: str


class State(NamedTuple):
    physics: Any  # Brax's pytree of the bodies
    obs: jax.Array  # [D]
    time: jax.Array  # [] int32 steps since the episode began, repeated actions counted each
    first_physics: Any  # what the next episode starts from
    first_obs: jax.Array  # [D]


def make(name, episode_length=1000, action_repeat=1, backend="spring"):
    """A Brax robot.

    Args:
        name: one of NAMES.
        episode_length: time limit in Brax's steps; an action applied k times takes k of them.
        action_repeat: how many steps each action lasts; their rewards are added.
        backend: Brax's physics, one of BACKENDS; the paper's is "spring".
    Returns:
        Env.
    Raises:
        ValueError: an unknown name or backend, or a size below one.
    """
    _check(name, episode_length, action_repeat, backend)
    robot = envs.get_environment(name, backend=backend)
    shapes = jax.eval_shape(robot.reset, jax.random.key(0))  # of Brax's whole record of an environment

    def reset(key):
        first = robot.reset(key)
        return State(first.pipeline_state, first.obs, jnp.int32(0), first.pipeline_state, first.obs)

    def step(key, state, action):
        del key  # the physics draws no random numbers; other environments do
        # Brax's step takes its whole record but reads only the physics of it: the rest is zeros, not carried along.
        record = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        record = record.replace(pipeline_state=state.physics, obs=state.obs)
        record, rewards = jax.lax.scan(lambda r, _: _step_and_reward(robot, r, action), record, length=action_repeat)
        time = state.time + action_repeat
        terminated, out_of_time = record.done.astype(bool), time >= episode_length
        done = terminated | out_of_time
        first = State(state.first_physics, state.first_obs, jnp.zeros_like(time), state.first_physics, state.first_obs)
        state = State(record.pipeline_state, record.obs, time, state.first_physics, state.first_obs)
        state = jax.tree.map(lambda x, y: jnp.where(done, x, y), first, state)
        return state, rewards.sum(), done, out_of_time & ~terminated

    def observe(state):
        return state.obs

    return Env(reset, step, observe, shapes.obs.shape, robot.action_size, name)


def _step_and_reward(robot, record, action):
    record = robot.step(record, action)
    return record, record.reward


def _check(name, episode_length, action_repeat, backend):
    if name not in NAMES:
        raise ValueError(f"unknown Brax task {name!r}; known: {', '.join(NAMES)}")
    if backend not in BACKENDS:
        raise ValueError(f"unknown Brax backend {backend!r}; known: {', '.join(BACKENDS)}")
    for size, steps in (("episode_length", episode_length), ("action_repeat", action_repeat)):
        if steps < 1:
            raise ValueError(f"{size} is {steps}; it must be at least 1")
