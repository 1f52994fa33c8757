# SPDX-License-Identifier: MIT
"""Brax: the robots on which learned optimizers are tested, as episodes that restart by themselves (paper: appendix).

| symbol | in code | shape |
|---|---|---|
| s | State of one environment, arrays only; jax.vmap makes many | |
| obs | observe(state) | [D] |
| a | action, each entry in [-1, 1] | [A] |
| r | reward, unscaled; NaN where the simulation diverged | [] |
| done | the episode ended with this step; the returned state is already the next episode's first | [] bool |
| truncation | it did not end by itself: the time limit ended it, or the simulation diverged | [] bool |

Done and truncation differ because only after a true end (done and not truncation) is it certain that no reward follows.
A simulation diverges when an observation or reward stops being finite. Its episode ends there and the environment
restarts, so later steps are sound. The reward of that step is NaN: a learner can count the step and leave it out.

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

NOTE: while the simulation stays finite, rewards, dones and truncations are those of Brax's EpisodeWrapper and
AutoResetWrapper, step for step. As there, an environment starts all its episodes from the one state that its reset
drew; other environments have other first states.
NOTE: Brax is imported when the first robot is made, so importing this file alone is cheap.
Copy this file: needs jax >= 0.10, brax >= 0.14, mujoco and mujoco-mjx (of one version).
"""

import contextlib
import io
import os
import warnings
from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Brax's robots that have spring physics (swimmer does not)
NAMES = ("ant", "halfcheetah", "hopper", "humanoid", "humanoidstandup")
NAMES += ("inverted_double_pendulum", "inverted_pendulum", "pusher", "reacher", "walker2d")
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
    time: jax.Array  # [] int32 physics steps since the episode began: action_repeat for each action
    first_physics: Any  # what the next episode starts from
    first_obs: jax.Array  # [D]


def make(name, episode_length=1000, action_repeat=1, backend="spring"):
    """A Brax robot.

    Args:
        name: one of NAMES.
        episode_length: time limit in Brax's steps; an action applied k times takes k of them.
        action_repeat: how many steps each action lasts; their rewards are added.
        backend: Brax's physics, one of BACKENDS; the paper's is "spring".
    Returns: Env. Raises: ValueError: an unknown name or backend, or a size below one.
    """
    for size, steps in (("episode_length", episode_length), ("action_repeat", action_repeat)):
        if not isinstance(steps, Integral) or steps < 1:
            raise ValueError(f"{size} is {steps}; it must be a whole number, at least 1")
    robot = load_robot(name, backend)
    shapes = jax.eval_shape(robot.reset, jax.random.key(0))  # of Brax's whole record of an environment

    def reset(key):
        first = robot.reset(key)
        state = State(first.pipeline_state, first.obs, jnp.int32(0), first.pipeline_state, first.obs)
        return jax.tree.map(jnp.copy, state)  # an array that appears twice could not be donated

    def step(key, state, action):
        del key  # the physics draws no random numbers; other environments do

        def act(record, _):
            record = robot.step(record, action)
            return record, record.reward

        # Brax's step takes its whole record but reads only the physics of it: the rest is zeros, not carried along.
        record = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        record = record.replace(pipeline_state=state.physics, obs=state.obs)
        record, rewards = jax.lax.scan(act, record, length=action_repeat)
        time = state.time + action_repeat
        terminated, out_of_time = record.done.astype(bool), time >= episode_length
        reward = rewards.sum()
        sound = jnp.isfinite(reward) & jnp.isfinite(record.obs).all()
        done, truncation = terminated | out_of_time | ~sound, out_of_time & ~terminated | ~sound
        first = state._replace(physics=state.first_physics, obs=state.first_obs, time=jnp.zeros_like(time))
        state = state._replace(physics=record.pipeline_state, obs=record.obs, time=time)
        state = jax.tree.map(lambda x, y: jnp.where(done, x, y), first, state)
        return state, jnp.where(sound, reward, jnp.nan), done, truncation

    return Env(reset, step, lambda state: state.obs, shapes.obs.shape, robot.action_size, name)


def load_robot(name, backend="spring"):
    """Brax's own environment of that name (else ValueError), with no time limit: bodies in .sys, time step in .dt."""
    if name not in NAMES:
        raise ValueError(f"unknown Brax task {name!r}; known: {', '.join(NAMES)}")
    if backend not in BACKENDS:
        raise ValueError(f"unknown Brax backend {backend!r}; known: {', '.join(BACKENDS)}")
    with _quiet():
        from brax import envs

        return envs.get_environment(name, backend=backend)


@contextlib.contextmanager
def _quiet():
    """Keeps what Brax and MuJoCo do besides their work out of a program that only simulates; undone on leaving.

    Importing Brax prints that an optional GPU engine is missing. Loading a robot warns that "piplines" (sic) are no
    longer maintained. MuJoCo writes warnings to the screen and to MUJOCO_LOG.TXT; its import loads a graphics library.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        if "MUJOCO_GL" not in os.environ:  # who sets it gets the graphics they ask for; only the import reads it
            os.environ["MUJOCO_GL"] = "disabled"
            stack.callback(os.environ.pop, "MUJOCO_GL", None)
        import mujoco

        stack.callback(mujoco.set_mju_user_warning, mujoco.get_mju_user_warning())
        mujoco.set_mju_user_warning(lambda message: None)
        yield
