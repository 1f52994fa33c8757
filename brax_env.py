"""Brax robots as environments that restart by themselves.

The paper tests a learned optimizer on robots that it has never seen (Section 6 and the appendix on Brax): ant, humanoid,
inverted_double_pendulum and walker2d, simulated by Brax with its "spring" physics. This file turns a Brax task into a
bundle of pure functions for ONE environment; a learner adds jax.vmap for many.

    symbol          here              shape
    D               obs_shape[0]      size of an observation
    A               action_size       size of an action, each entry in [-1, 1]
    s               State             a NamedTuple of arrays only
    o               observe(s)        [D]
    a               action            [A]
    r               reward            []     float, not scaled
    done            done              []     bool, the episode ended at this step, for whatever reason
    truncation      truncation        []     bool, the time limit alone ended it: the robot could have gone on

Done and truncation are told apart because only a true end (done and not truncation) means that no reward can follow.
When done is true, the state returned is already the first state of the next episode.

Deviations:
- As in Brax's own AutoResetWrapper, every episode of an environment starts from the state that its reset drew; a fresh
  reset at each step would be computed for all environments and used by few. Many environments side by side
  give the variety of first states.
- Rewards, dones and truncations are those of Brax's EpisodeWrapper and AutoResetWrapper, step for step. Brax's metrics and
  info are not carried along.

Example (inverted_pendulum, 100 random steps in 8 environments):

    import jax, brax_env
    env = brax_env.make("inverted_pendulum")
    states = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), 8))
    step = jax.jit(jax.vmap(env.step))
    for key in jax.random.split(jax.random.key(1), 100):
        action_key, step_key = jax.random.split(key)
        actions = jax.random.uniform(action_key, (8, env.action_size), minval=-1, maxval=1)
        states, rewards, dones, truncations = step(jax.random.split(step_key, 8), states, actions)
    print(jax.vmap(env.observe)(states).shape, rewards, dones)

Copy this file: needs jax, brax.
"""

import contextlib
import io
import warnings
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

# Importing Brax prints about an optional GPU engine and warns about a package that it no longer needs; loading a robot
# warns that Brax itself is no longer developed. None of that concerns the reader of a training log.
with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from brax import envs
warnings.filterwarnings("ignore", message="Brax System, piplines and environments")

# Brax's tasks that run on the "spring" physics (swimmer does not).
NAMES = ("ant", "halfcheetah", "hopper", "humanoid", "humanoidstandup", "inverted_double_pendulum", "inverted_pendulum",
         "pusher", "reacher", "walker2d")
BACKENDS = ("generalized", "positional", "spring")


class Env(NamedTuple):
    """One environment as pure functions."""
    reset: Callable        # key -> State
    step: Callable         # (key, State, action [A]) -> (State, reward [], done [], truncation [])
    observe: Callable      # State -> obs [D]
    obs_shape: tuple       # (D,)
    action_size: int       # A
    name: str


class State(NamedTuple):
    """State of one environment, and what it needs to start over."""
    physics: Any           # Brax's state of the bodies, a pytree of arrays
    obs: jax.Array         # [D]
    time: jax.Array        # [] int32, physics steps since the episode began
    first_physics: Any     # what the next episode starts from
    first_obs: jax.Array   # [D]


def make(name, episode_length=1000, action_repeat=1, backend="spring"):
    """Builds a Brax task.

    Args:
      name: one of NAMES.
      episode_length: time limit, in environment steps of Brax; an action repeated k times counts k.
      action_repeat: how often each action is applied; the rewards are summed.
      backend: physics engine of Brax, one of BACKENDS; the paper uses "spring".
    Returns:
      Env.
    Raises:
      ValueError: an unknown name or backend, or a size below 1.
    """
    _check(name, episode_length, action_repeat, backend)
    robot = envs.get_environment(name, backend=backend)
    example = jax.eval_shape(robot.reset, jax.random.key(0))        # shapes only: nothing is simulated

    def reset(key):
        first = robot.reset(key)
        return State(first.pipeline_state, first.obs, jnp.int32(0), first.pipeline_state, first.obs)

    def step(key, state, action):
        del key  # Brax's physics draws no random numbers; other environments do
        # Brax's step wants its whole record back. It reads nothing of it but the physics, so the rest may be zeros.
        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), example)
        before = blank.replace(pipeline_state=state.physics, obs=state.obs)
        after, rewards = jax.lax.scan(lambda s, _: _step_with_reward(robot, s, action), before, length=action_repeat)
        time = state.time + action_repeat
        terminated = after.done.astype(bool)
        timeout = time >= episode_length
        done = terminated | timeout
        physics, obs, time = jax.tree.map(lambda first, now: jnp.where(done, first, now),
                                          (state.first_physics, state.first_obs, jnp.zeros_like(time)),
                                          (after.pipeline_state, after.obs, time))
        next_state = state._replace(physics=physics, obs=obs, time=time)
        return next_state, rewards.sum(), done, timeout & ~terminated

    def observe(state):
        return state.obs

    return Env(reset, step, observe, example.obs.shape, robot.action_size, name)


def _step_with_reward(robot, brax_state, action):
    brax_state = robot.step(brax_state, action)
    return brax_state, brax_state.reward


def _check(name, episode_length, action_repeat, backend):
    if name not in NAMES:
        raise ValueError(f"unknown Brax task {name!r}; choose from {', '.join(NAMES)}")
    if backend not in BACKENDS:
        raise ValueError(f"unknown Brax backend {backend!r}; choose from {', '.join(BACKENDS)}")
    if episode_length < 1 or action_repeat < 1:
        raise ValueError(f"episode_length and action_repeat must be at least 1, got {episode_length} and {action_repeat}")
