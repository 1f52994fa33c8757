"""The tasks of both programs: each gridworld, Catch and robot with the agent that learns it, at the paper's settings or smaller ones.

A2C learns the gridworlds and Catch, PPO the robots. `make` gives a task as it is tested, `make_unit` the agent of a unit in
meta-training, which has smaller settings, and `clipped` the one rule on gradients that both follow.
"""

import functools
from dataclasses import replace
from typing import Any, Callable, NamedTuple

import jax
import optax

import a2c
import brax_env
import gridworld
import ppo

NAMES = gridworld.NAMES + brax_env.NAMES
PPO_SETTINGS = ("small", "paper")
EVALUATION_EPISODES = 128  # deterministic ones that a trained robot plays at the end; as many as Brax's trainer plays

# The paper's test settings: steps, and PPO's knobs (appendix).
PAPER_PPO = {
    "ant": (
        1e8,
        dict(num_envs=4096, batch_size=2048, rollout_length=5, num_epochs=4, entropy_cost=1e-2, reward_scale=10.0),
    ),
    "humanoid": (
        1e8,
        dict(num_envs=2048, batch_size=1024, rollout_length=10, num_epochs=8, entropy_cost=1e-3, reward_scale=0.1),
    ),
    "inverted_double_pendulum": (
        2e7,
        dict(num_envs=2048, batch_size=1024, rollout_length=5, num_epochs=4, entropy_cost=1e-2, reward_scale=10.0),
    ),
    "walker2d": (
        5e7,
        dict(
            num_envs=2048,
            batch_size=512,
            rollout_length=20,
            num_epochs=8,
            entropy_cost=1e-3,
            reward_scale=5.0,
            discount=0.997,
        ),
    ),
}
# Settings of our own in which a CPU learns to balance the pendulum in half a minute
SMALL_PPO = dict(
    num_envs=128,
    batch_size=32,
    num_minibatches=8,
    rollout_length=64,
    num_epochs=4,
    discount=0.99,
    entropy_cost=1e-3,
    reward_scale=0.01,
    value_hidden=(64,) * 3,
)
# and the robots that walk, and the double pendulum, as far as 5 to 20 seconds of a core take them. Their physics costs
# more than the networks: each step is learned from more often. The scale brings a discounted return near 1.
_SMALL_TRANSFER_PPO = dict(num_envs=64, batch_size=16, num_minibatches=8, rollout_length=32, num_epochs=8)
_SMALL_TRANSFER = {  # steps, reward scale
    "ant": (1.5e5, 0.1),
    "halfcheetah": (3e5, 0.1),
    "hopper": (1.2e5, 0.1),
    "humanoid": (1e5, 0.02),
    "inverted_double_pendulum": (3e5, 0.01),
    "walker2d": (2e5, 0.1),
}
# What differs in meta-training: the paper's, for ant and humanoid, and our own, with a tenth of an iteration's work.
_PAPER_META_PPO = dict(
    num_envs=2048, batch_size=1024, num_minibatches=8, rollout_length=5, num_epochs=4, value_hidden=(64,) * 5
)
_SMALL_META_PPO = dict(num_envs=32, batch_size=16, num_minibatches=4, rollout_length=32, num_epochs=2)
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
    steps_per_update: int
    steps: float
    learning_rates: tuple  # among which every optimizer is tuned
    # (agent, key) -> returns [EVALUATION_EPISODES] of whole episodes played without noise; None: not a robot
    play: Callable | None = None


class MetaDefaults(NamedTuple):
    """What a task has in meta-training where no flag says otherwise."""

    reward_scale: float
    alpha: float


@functools.cache
def make(name, num_envs=None, ppo_settings="small"):
    """The Task of that name. ValueError if there is none, or if a size makes no sense."""
    check(name, ppo_settings)
    if name in gridworld.NAMES:
        config = a2c.Config(num_envs=num_envs if num_envs is not None else 64 if name == "catch" else 512)
        learner, steps = a2c.make(gridworld.make(name), config), 5e5 if name == "catch" else 3e6
        return Task(name, learner, config.num_envs * config.rollout_length, steps, (3e-3, 1e-2, 3e-2, 1e-1))
    steps, knobs = ppo_knobs(name, ppo_settings)
    config, env = ppo.Config(**knobs), brax_env.make(name)
    return Task(
        name,
        ppo.make(env, config),
        config.batch_size * config.num_minibatches * config.rollout_length,
        steps,
        (3e-4, 1e-3, 3e-3, 1e-2),
        jax.jit(lambda agent, key: ppo.evaluate(env, agent.params, agent.obs_stats, key, EVALUATION_EPISODES)),
    )


def make_unit(name, reward_scale, num_envs=1, ppo_settings="small"):
    """The Learner of a unit in meta-training.

    Args:
        name: one of NAMES.
        reward_scale: factor on rewards; a world's metrics contain it, a robot's do not.
        num_envs: environments of an A2C unit; a robot's are among PPO's settings.
        ppo_settings: one of PPO_SETTINGS.
    """
    check(name, ppo_settings)
    if name in gridworld.NAMES:
        return a2c.make(gridworld.make(name, reward_scale), a2c.Config(num_envs=num_envs))
    return ppo.make(brax_env.make(name), replace(_meta_ppo(name, ppo_settings), reward_scale=reward_scale))


def meta_defaults(name, ppo_settings="small", estimator="gradient"):
    """MetaDefaults of a task, for a name in pipeline.ESTIMATORS.

    In worlds the paper's belong to the paper's gradient. An estimator that sees whole lives (pes, nres) learns from rewards as
    they are tested, and begins with a step that is too large for all of a life: what it learns is a way down.
    """
    if name in brax_env.NAMES:
        return MetaDefaults(_meta_ppo(name, ppo_settings).reward_scale, 3e-4 if ppo_settings == "paper" else 1e-3)
    if estimator == "gradient":
        return MetaDefaults(*_META_WORLDS.get(name, (1.0, 1e-2)))
    return MetaDefaults(1.0, 0.1 if name.startswith("small") else 0.03)


def clipped(name, optimizer):
    """The optimizer behind what the paper does with gradients: each entry clipped to [-1, 1], in all tasks but catch."""
    return optimizer if name == "catch" else optax.chain(optax.clip(1.0), optimizer)


def check(name, ppo_settings):
    """Raises ValueError for a name that does not exist."""
    if name not in NAMES:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(NAMES)}")
    if ppo_settings not in PPO_SETTINGS:
        raise ValueError(f"--ppo is {ppo_settings!r}; known: {', '.join(PPO_SETTINGS)}")


def ppo_knobs(name, ppo_settings):
    """(steps, knobs of ppo.Config) of a robot as tested. One that the paper has not takes the paper's for ant."""
    if ppo_settings == "paper":
        return PAPER_PPO.get(name, PAPER_PPO["ant"])
    if name in _SMALL_TRANSFER:
        steps, reward_scale = _SMALL_TRANSFER[name]
        return steps, SMALL_PPO | _SMALL_TRANSFER_PPO | dict(reward_scale=reward_scale)
    return 5e5, SMALL_PPO


def _meta_ppo(name, ppo_settings):
    """ppo.Config of a unit."""
    _, knobs = ppo_knobs(name, ppo_settings)
    return ppo.Config(**knobs | (_PAPER_META_PPO if ppo_settings == "paper" else _SMALL_META_PPO))
