"""Which agent learns which task, at the paper's settings or smaller ones (paper: appendix).

A2C learns the gridworlds and Catch, PPO the robots. `make` gives a task as it is tested, `make_unit` the agent of a unit in
meta-training, which has smaller settings, and `clipped` the one rule on gradients that both follow. A new environment is
added here: its name, its agent, its budget.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import a2c
import brax_env
import gridworld
import ppo

WORLDS, ROBOTS = gridworld.NAMES, brax_env.NAMES
NAMES = WORLDS + ROBOTS
PPO_SETTINGS = ("small", "paper")
# Robots are scored as in the paper, by episodes without noise at some points of a run. The training episodes that happen to
# end would count short lives too often.
EVALUATION_EPISODES = 128  # of one evaluation; as many as Brax's trainer plays
# With small settings an evaluation has fewer: on ant they take half as long as the training, 128 would take seven times as long.
SMALL_EVALUATION_EPISODES = 8

# PPO's test settings. A robot that a table does not have takes those of its first row.
PPO_KNOBS = ("num_envs", "batch_size", "rollout_length", "num_epochs", "entropy_cost", "reward_scale", "discount")
PAPER_PPO = {  # steps, and the knobs in this order (appendix)
    "ant": (1e8, 4096, 2048, 5, 4, 1e-2, 10.0, 0.97),
    "humanoid": (1e8, 2048, 1024, 10, 8, 1e-3, 0.1, 0.97),
    "inverted_double_pendulum": (2e7, 2048, 1024, 5, 4, 1e-2, 10.0, 0.97),
    "walker2d": (5e7, 2048, 512, 20, 8, 1e-3, 5.0, 0.997),
}
# Settings of our own in which a CPU learns to balance the pendulum in half a minute, and the others as far as 5 to 20
# seconds of a core take them. Their physics costs more than the networks: each step is learned from more often. The scale
# brings a discounted return near 1.
SMALL_PPO = {
    "inverted_pendulum": (5e5, 128, 32, 64, 4, 1e-3, 0.01, 0.99),
    "ant": (1.5e5, 64, 16, 32, 8, 1e-3, 0.1, 0.99),
    "halfcheetah": (3e5, 64, 16, 32, 8, 1e-3, 0.1, 0.99),
    "hopper": (1.2e5, 64, 16, 32, 8, 1e-3, 0.1, 0.99),
    "humanoid": (1e5, 64, 16, 32, 8, 1e-3, 0.02, 0.99),
    "inverted_double_pendulum": (3e5, 64, 16, 32, 8, 1e-3, 0.01, 0.99),
    "walker2d": (2e5, 64, 16, 32, 8, 1e-3, 0.1, 0.99),
}
SMALL_SIZES = dict(num_minibatches=8, value_hidden=(64,) * 3)
# What differs in meta-training: the paper's, for ant and humanoid, and our own, with a tenth of an iteration's work
PAPER_META_PPO = dict(num_envs=2048, batch_size=1024, num_minibatches=8, rollout_length=5, num_epochs=4)
PAPER_META_PPO |= dict(value_hidden=(64,) * 5)
SMALL_META_PPO = dict(num_envs=32, batch_size=16, num_minibatches=4, rollout_length=32, num_epochs=2)
# The paper's reward scale and alpha of each world in meta-training (appendix).
_META_WORLDS = {
    "small_dense_long": (1e3, 1e-3),
    "small_dense_short": (1e2, 3e-3),
    "big_sparse_short": (1e2, 3e-3),
    "big_dense_short": (1e1, 3e-3),
    "big_sparse_long": (1e1, 1e-3),
    "big_dense_long": (1.0, 3e-3),
    "catch": (1.0, 1e-3),
}
PAPER_WORLDS = tuple(name for name in _META_WORLDS if name != "catch")  # of its six-task run


class Task(NamedTuple):
    """A task as it is tested: who learns, and how long."""

    name: str
    learner: Any  # a2c.Learner or ppo.Learner
    steps_per_update: int  # environment steps of an inner update
    optimizer_steps: int  # of an inner update: 1 in A2C, num_epochs * num_minibatches in PPO
    steps: float
    learning_rates: tuple  # among which every optimizer is tuned
    # (agent, key, num_episodes) -> returns [num_episodes] of whole episodes played without noise; None: not a robot
    play: Callable | None = None
    evaluations: int = 0  # in a run: its curve, instead of the returns in training; 0: not a robot
    evaluation_episodes: int = 0  # of one evaluation
    side_by_side: int | None = None  # agents that an accelerator trains at once; None: all that are asked for


class MetaDefaults(NamedTuple):
    """What a task has in meta-training where no flag says otherwise."""

    reward_scale: float
    alpha: float


@functools.cache
def make(name, num_envs=None, ppo_settings="small", truncation=False):
    """The Task of that name. Raises ValueError if there is none. truncation: as in gridworld.make."""
    if name in WORLDS:
        num_envs = num_envs or (64 if name == "catch" else 512)
        learner, config = _a2c(name, num_envs, truncation=truncation)
        steps = 5e5 if name == "catch" else 3e6
        return Task(name, learner, num_envs * config.rollout_length, 1, steps, (3e-3, 1e-2, 3e-2, 1e-1))
    steps, knobs = ppo_knobs(name, ppo_settings)
    config, env, is_paper = ppo.Config(**knobs), brax_env.make(name), ppo_settings == "paper"
    return Task(
        name,
        ppo.make(env, config),
        steps_per_update=config.batch_size * config.num_minibatches * config.rollout_length,
        optimizer_steps=config.num_epochs * config.num_minibatches,
        steps=steps,
        learning_rates=(3e-4, 1e-3, 3e-3, 1e-2),
        play=jax.jit(lambda agent, key, num: play(env, agent.params, agent.obs_stats, key, num), static_argnums=2),
        evaluations=10 if name in ("ant", "humanoid") else 20,  # as in the paper
        evaluation_episodes=EVALUATION_EPISODES if is_paper else SMALL_EVALUATION_EPISODES,
        side_by_side=3 if is_paper else None,  # minutes of an H100: a stop loses less, and memory is enough
    )


def make_unit(name, reward_scale, num_envs=1, ppo_settings="small"):
    """The Learner of a unit in meta-training.

    reward_scale: factor on rewards; a world's metrics contain it, a robot's do not; num_envs: environments of an A2C unit, a
    robot's are among PPO's settings.
    """
    if name in WORLDS:
        return _a2c(name, num_envs, reward_scale)[0]
    return ppo.make(brax_env.make(name), replace(_meta_ppo(name, ppo_settings), reward_scale=reward_scale))


def unit_steps(name, ppo_settings, meta_steps, inner_updates):
    """Optimizer steps of make_unit's Learner in so many meta-steps."""
    if name in WORLDS:
        return meta_steps * inner_updates
    config = _meta_ppo(name, ppo_settings)
    return meta_steps * inner_updates * config.num_epochs * config.num_minibatches


def _a2c(name, num_envs, reward_scale=1.0, truncation=False):
    """(Learner, a2c.Config) of a world, with the paper's network: a convolution on big worlds, a wide layer on Catch."""
    config = a2c.Config(num_envs=num_envs, hidden_size=256 if name == "catch" else 32)
    config = replace(config, conv_features=16 if name.startswith("big_") else 0)
    return a2c.make(gridworld.make(name, reward_scale, truncation), config), config


def play(env, params, obs_stats, key, num_episodes):
    """Returns [num_episodes] of episodes side by side, without noise: a = tanh(loc). It ends when all have ended."""
    reset_key, key = jax.random.split(key)

    def step(carry):
        env_state, returns, ended, key = carry
        key, env_key = jax.random.split(key)
        loc, _ = ppo.policy(params, ppo.normalize(jax.vmap(env.observe)(env_state), obs_stats))
        keys = jax.random.split(env_key, num_episodes)
        env_state, reward, done, _ = jax.vmap(env.step)(keys, env_state, jnp.tanh(loc))
        reward = jnp.where(ended | ~jnp.isfinite(reward), 0.0, reward)
        return env_state, returns + reward, ended | done, key

    env_state = jax.vmap(env.reset)(jax.random.split(reset_key, num_episodes))
    carry = (env_state, jnp.zeros(num_episodes), jnp.zeros(num_episodes, bool), key)
    return jax.lax.while_loop(lambda carry: ~carry[2].all(), step, carry)[1]


def meta_defaults(name, ppo_settings="small", estimator="gradient"):
    """MetaDefaults of a task, for the estimator "gradient", "pes" or "nres".

    In worlds the paper's belong to the paper's gradient. An estimator that sees whole lives (pes, nres) learns from rewards as
    they are tested, and begins with a step that is too large for all of a life: what it learns is a way down.
    """
    if name in ROBOTS:
        return MetaDefaults(_meta_ppo(name, ppo_settings).reward_scale, 3e-4 if ppo_settings == "paper" else 1e-3)
    if estimator == "gradient":
        return MetaDefaults(*_META_WORLDS.get(name, (1.0, 1e-2)))
    return MetaDefaults(1.0, 0.1 if name.startswith("small") else 0.03)


def clipped(name, optimizer):
    """The optimizer behind what the paper does with gradients: each entry clipped to [-1, 1], in all tasks but catch."""
    return optimizer if name == "catch" else optax.chain(optax.clip(1.0), optimizer)


def ppo_knobs(name, ppo_settings):
    """(steps, knobs of ppo.Config) of a robot as tested."""
    table, sizes = (PAPER_PPO, {}) if ppo_settings == "paper" else (SMALL_PPO, SMALL_SIZES)
    steps, *knobs = table.get(name, next(iter(table.values())))
    return steps, dict(zip(PPO_KNOBS, knobs)) | sizes


def _meta_ppo(name, ppo_settings):
    """ppo.Config of a unit."""
    _, knobs = ppo_knobs(name, ppo_settings)
    return ppo.Config(**knobs | (PAPER_META_PPO if ppo_settings == "paper" else SMALL_META_PPO))
