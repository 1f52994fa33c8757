# SPDX-License-Identifier: MIT
"""PPO: the learner of the Brax robots, for any continuous environment and any optax optimizer (paper: appendix).

Proximal policy optimization (Schulman et al. 2017) as in Brax's trainer, which the paper used. An update is one
iteration: every environment acts for a number of short trajectories; the observation statistics take the observations
in; then num_epochs * num_minibatches optimizer steps follow, on minibatches of shuffled trajectories.

| symbol | in code | shape |
|---|---|---|
| T, N | rollout_length: steps of a trajectory; num_envs | |
| B | trajectories: batch_size * num_minibatches of an iteration, batch_size of a minibatch | |
| s | obs, normalised; the last one only bootstraps | [T + 1, B, D] |
| u, a | raw_action u ~ N(loc, scale); the environment sees a = tanh(u) | [T, B, A] |
| log pi(a|s) | log_prob, under the policy that acted | [T, B] |
| r | reward, as the environment gives it | [T, B] |
| rho | ratio: pi(a|s) now / when it acted | [T, B] |
| V, G, Adv | values; targets: lambda-returns; advantages | [T, B] |

A simulation may diverge. A step with a reward that is not finite, or beside an observation that is not usable, is invalid:
the loss leaves it out.

Example:
    import jax, jax.numpy as jnp, optax, ppo
    from types import SimpleNamespace
    env = SimpleNamespace(                       # a point that should stay near 0; brax_env.make(name) gives robots
        reset=jax.random.normal, observe=lambda x: x[None], obs_shape=(1,), action_size=1,
        step=lambda key, x, action: (jnp.clip(x + 0.3 * action[0], -1, 1), -(x**2), x > 9, x > 9))
    learner = ppo.make(env, ppo.Config(num_envs=32, batch_size=32, num_minibatches=4, value_hidden=(32, 32)))
    optimizer = optax.adam(3e-3)
    agent_state = learner.init(jax.random.key(0), optimizer)
    for key in jax.random.split(jax.random.key(1), 15):
        agent_state, metrics = jax.jit(learner.update, static_argnums=0)(optimizer, agent_state, key)
    print(metrics["reward"])                     # from about -0.4 to almost 0

Deviations from the PPO paper, as in Brax: rewards are scaled; every optimizer step computes values and advantages again;
an advantage is r + discount G' - V, where G' is the next step's target G: a TD error that lies k steps ahead has the weight
discount^k lambda^(k-1) instead of (discount lambda)^k.
Deviations of the meta-loss from the reference (github.com/sail-sg/optim4rl, MetaPPO.py): it uses as many trajectories as an
update does, and their observations enter the statistics. There it uses fewer, max(batch_size // num_envs, 1) * num_envs, and
the statistics stay as they are.
Copy this file: needs jax >= 0.10, optax >= 0.2.5, numpy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.ad_checkpoint import checkpoint_name

LARGEST = 1e9  # size of an observation that still counts as one: float32 can sum the squares of such numbers
MOST_COUNTED = 1e8  # observations in the statistics; near 2^30 a small batch would no longer change a float32 count


@dataclass(frozen=True)
class Config:  # the defaults are the paper's for inverted_double_pendulum
    num_envs: int = 2048  # N
    batch_size: int = 1024  # of a minibatch; counts trajectories, not steps (Brax's name for it)
    num_minibatches: int = 32  # optimizer steps of an epoch
    rollout_length: int = 5  # T; longer relies less on the value network
    num_epochs: int = 4  # how often each trajectory is used
    discount: float = 0.97
    gae_lambda: float = 0.95  # 0 trusts the value network, 1 the sampled rewards
    clip_epsilon: float = 0.3  # how far the policy gains by moving away from the one that acted
    entropy_cost: float = 1e-2  # keeps the policy exploring
    value_cost: float = 0.5  # weight of half the squared error
    reward_scale: float = 10.0  # brings returns to a size that the value network learns
    policy_hidden: tuple[int, ...] = (32,) * 4
    value_hidden: tuple[int, ...] = (256,) * 5  # nearly all arithmetic is here
    normalize_advantages: bool = True  # over a minibatch: the policy's loss does not depend on the reward's scale

    def __post_init__(self):
        names = ("num_envs", "batch_size", "num_minibatches", "rollout_length", "num_epochs")
        for name in (*names, "policy_hidden", "value_hidden"):
            sizes = np.ravel(getattr(self, name))
            if sizes.size and (not np.issubdtype(sizes.dtype, np.integer) or sizes.min() < 1):
                raise ValueError(f"{name} is {getattr(self, name)}; it takes whole numbers, at least 1")
        if (total := self.batch_size * self.num_minibatches) % self.num_envs:
            raise ValueError(f"batch_size * num_minibatches = {total} is no multiple of num_envs = {self.num_envs}")
        for fraction in ("discount", "gae_lambda"):
            if not 0 <= getattr(self, fraction) <= 1:
                raise ValueError(f"{fraction} is {getattr(self, fraction)}; it must lie between 0 and 1")


class ObsStats(NamedTuple):
    count: jax.Array  # [] observations seen, at most MOST_COUNTED
    mean: jax.Array  # [D]
    summed_variance: jax.Array  # [D] sum of squared distances from the mean
    std: jax.Array  # [D]


class AgentState(NamedTuple):
    params: dict  # {"policy", "value"}, each {"layer_0": {"kernel", "bias"}, ...}
    opt_state: Any
    env_state: Any  # every leaf [N, ...]
    obs_stats: ObsStats
    episode_return: jax.Array  # [N] return so far of the running episodes, unscaled
    episode_length: jax.Array  # [N] their steps so far


class Learner(NamedTuple):
    """What meta-training needs of an agent. An inner update of PPO is a whole iteration, of many optimizer steps."""

    init: Callable  # (key, optimizer) -> AgentState
    update: Callable  # (optimizer, agent_state, key) -> (agent_state, metrics): one inner update
    loss: Callable  # (agent_state, key) -> (loss, (agent_state, metrics)): of new trajectories, without an update


class Trajectories(NamedTuple):
    obs: jax.Array  # [T + 1, B, D], normalised
    raw_action: jax.Array  # [T, B, A]
    log_prob: jax.Array  # [T, B]
    reward: jax.Array  # [T, B]
    terminated: jax.Array  # [T, B] bool: the episode ended by itself
    truncated: jax.Array  # [T, B] bool: the time limit ended it, or the step is invalid
    valid: jax.Array  # [T, B] bool


def make(env, config=Config()):
    """PPO on env, an Env of pure functions of one environment, with obs_shape (D,) and action_size. Its step returns
    (state, reward, done, truncation) and restarts by itself, also where its simulation diverged.

    Returns: Learner. metrics: loss (mean over the optimizer steps); reward (mean per step); objective (mean return so far of
        the running episodes); invalid_steps; episode_return_sum, episode_length_sum, episodes: of those that ended.
    Raises: ValueError: observations of another shape.
    """
    if len(env.obs_shape) != 1:
        raise ValueError(f"obs_shape is {env.obs_shape}; PPO's networks take observations with one axis")
    return Learner(partial(init, env, config), partial(update, env, config), partial(loss, env, config))


def init(env, config, key, optimizer):
    """A new agent: AgentState."""
    policy_key, value_key, env_key = jax.random.split(key, 3)
    (obs_size,) = env.obs_shape
    policy_params = init_mlp(policy_key, (obs_size, *config.policy_hidden, 2 * env.action_size))
    params = {"policy": policy_params, "value": init_mlp(value_key, (obs_size, *config.value_hidden, 1))}
    env_state = jax.vmap(env.reset)(jax.random.split(env_key, config.num_envs))
    stats, so_far = init_obs_stats(obs_size), jnp.zeros((2, config.num_envs))
    return AgentState(params, optimizer.init(params), env_state, stats, *so_far)


def update(env, config, optimizer, agent_state, key):
    """One PPO iteration: -> (agent_state, metrics)."""
    collect_key, epochs_key = jax.random.split(key)
    agent_state, data, metrics = collect(env, config, agent_state, collect_key)
    one_epoch = partial(epoch, config, optax.with_extra_args_support(optimizer), data)
    # For meta-training only: the backward pass keeps the gradients named in epoch, and the optimizer's state before each
    # epoch. The states in between it computes again, to save memory.
    keep_gradients = jax.checkpoint_policies.save_only_these_names("agent_gradient")
    one_epoch = jax.checkpoint(one_epoch, policy=keep_gradients, prevent_cse=False)
    carry, keys = (agent_state.params, agent_state.opt_state), jax.random.split(epochs_key, config.num_epochs)
    (params, opt_state), losses = jax.lax.scan(one_epoch, carry, keys)
    return agent_state._replace(params=params, opt_state=opt_state), metrics | {"loss": losses.mean()}


def loss(env, config, agent_state, key):
    """The loss of the current parameters on fresh trajectories, as one batch: -> (loss, (agent_state, metrics))."""
    collect_key, loss_key = jax.random.split(key)
    agent_state, data, metrics = collect(env, config, agent_state, collect_key)
    loss = ppo_loss(agent_state.params, data, loss_key, config)
    return loss, (agent_state, metrics | {"loss": loss})


def epoch(config, optimizer, data, carry, key):
    """One pass over all trajectories in random order: ((params, opt_state), losses [num_minibatches])."""
    shuffle_key, loss_key = jax.random.split(key)
    order = jax.random.permutation(shuffle_key, config.num_minibatches * config.batch_size)

    def optimizer_step(carry, inputs):
        (params, opt_state), (chosen, key) = carry, inputs
        minibatch = jax.tree.map(lambda x: x[:, chosen], data)
        loss, grads = checkpoint_name(jax.value_and_grad(ppo_loss)(params, minibatch, key, config), "agent_gradient")
        # Some optimizers look at the loss too. They get the number only: no meta-gradient flows through it.
        updates, opt_state = optimizer.update(grads, opt_state, params, value=jax.lax.stop_gradient(loss))
        return (optax.apply_updates(params, updates), opt_state), loss

    loss_keys = jax.random.split(loss_key, config.num_minibatches)
    return jax.lax.scan(optimizer_step, carry, (order.reshape(config.num_minibatches, -1), loss_keys))


def collect(env, config, agent_state, key):
    """Acts for batch_size * num_minibatches trajectories: -> (agent_state, Trajectories, metrics)."""
    # Trajectories are data: no derivative, not even the meta-gradient, flows through actions, physics or statistics. It
    # could enter by the parameters only, so it is stopped here, and nothing is kept for a backward pass.
    params, stats = jax.lax.stop_gradient(agent_state.params), agent_state.obs_stats

    def step(carry, key):
        env_state, episode_return, episode_length = carry
        action_key, env_key = jax.random.split(key)
        obs = jax.vmap(env.observe)(env_state)
        loc, scale = policy(params, normalize(obs, stats))
        raw_action = loc + scale * jax.random.normal(action_key, loc.shape)
        env_keys = jax.random.split(env_key, config.num_envs)
        env_state, reward, done, truncated = jax.vmap(env.step)(env_keys, env_state, jnp.tanh(raw_action))
        sound, reward = jnp.isfinite(reward), jnp.where(jnp.isfinite(reward), reward, 0.0)
        episode = (episode_return + reward, episode_length + 1)
        ended_return, ended_length = (jnp.where(done, x, 0.0).sum() for x in episode)
        ended = {"episodes": done.sum(), "episode_return_sum": ended_return, "episode_length_sum": ended_length}
        transition = (obs, raw_action, log_prob(loc, scale, raw_action), reward, done & ~truncated, truncated, sound)
        return (env_state, *(jnp.where(done, 0.0, x) for x in episode)), (transition, ended, episode[0])

    def trajectory(carry, key):
        carry, outputs = jax.lax.scan(step, carry, jax.random.split(key, config.rollout_length))
        return carry, (outputs, jax.vmap(env.observe)(carry[0])[None])

    carry = (agent_state.env_state, agent_state.episode_return, agent_state.episode_length)
    keys = jax.random.split(key, config.batch_size * config.num_minibatches // config.num_envs)
    carry, ((transitions, ended, returns), last_obs) = jax.lax.scan(trajectory, carry, keys)
    obs, *rest, truncated, sound = transitions  # [R, T, N, ...] each, where R = len(keys)
    stats, obs = update_obs_stats(stats, obs), jnp.concatenate([obs, last_obs], axis=1)
    valid = sound & usable(obs[:, :-1]) & usable(obs[:, 1:])

    def join(x):  # [R, T, N, ...] -> [T, B, ...], where B = R * N
        x = x.swapaxes(0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    data = Trajectories(*map(join, (normalize(obs, stats), *rest, truncated | ~valid, valid)))
    agent_state = AgentState(agent_state.params, agent_state.opt_state, carry[0], stats, *carry[1:])
    metrics = jax.tree.map(jnp.sum, ended) | {"reward": data.reward.mean(), "objective": returns.mean()}
    return agent_state, data, metrics | {"invalid_steps": jnp.sum(~valid)}


def ppo_loss(params, data, key, config):
    """Clipped surrogate + value_cost * half the squared error - entropy_cost * entropy, each a mean over valid steps: [].

    data is Trajectories; key draws the sample that estimates the entropy.
    """
    mean = lambda x: jnp.sum(jnp.where(data.valid, x, 0.0)) / jnp.maximum(data.valid.sum(), 1)  # x [T, B]
    values = value(params, data.obs[:-1])
    bootstrap, rewards = value(params, data.obs[-1]), config.reward_scale * data.reward
    decays = {"discount": config.discount, "gae_lambda": config.gae_lambda}
    targets, advantages = gae(rewards, values, bootstrap, data.terminated, data.truncated, **decays)
    if config.normalize_advantages:
        centered = advantages - mean(advantages)
        advantages = centered / (jnp.sqrt(mean(centered**2)) + 1e-8)  # 1e-8: they may all be equal
    loc, scale = policy(params, data.obs[:-1])
    ratio = jnp.exp(log_prob(loc, scale, data.raw_action) - data.log_prob)
    # min(rho Adv, clip(rho, 1 - epsilon, 1 + epsilon) Adv): nothing is gained by moving the ratio further than epsilon
    clipped_ratio = jnp.clip(ratio, 1 - config.clip_epsilon, 1 + config.clip_epsilon)
    policy_loss = -mean(jnp.minimum(ratio * advantages, clipped_ratio * advantages))
    value_loss = 0.5 * mean((targets - values) ** 2)
    return policy_loss + config.value_cost * value_loss - config.entropy_cost * mean(entropy(loc, scale, key))


def gae(rewards, values, bootstrap, terminated, truncated, discount, gae_lambda):
    """Generalized advantage estimation, as Brax computes it: (targets, advantages) [T, B], without gradient.

    rewards, values, terminated, truncated are [T, B]; bootstrap is the value after the last step, [B].
    """
    # After a termination nothing follows: the next value counts 0. After a truncation more would have followed, but the
    # next observation is the next episode's, so the value of what would have is unknown. Such a step teaches nothing:
    # its TD error and advantage are 0, its target is its own value, and nothing accumulates across it.
    follows, known = 1.0 - terminated, 1.0 - truncated
    td_errors = known * (rewards + discount * follows * jnp.concatenate([values[1:], bootstrap[None]]) - values)

    def backward(correction, step):
        td_error, decay = step
        correction = td_error + decay * correction
        return correction, correction

    decays = discount * gae_lambda * follows * known
    corrections = jax.lax.scan(backward, jnp.zeros_like(bootstrap), (td_errors, decays), reverse=True)[1]
    targets = values + corrections
    advantages = known * (rewards + discount * follows * jnp.concatenate([targets[1:], bootstrap[None]]) - values)
    return jax.lax.stop_gradient((targets, advantages))


def log_prob(loc, scale, raw_action):
    """log pi(a|s) = sum_i log N(u_i; loc_i, scale_i) - log |da_i/du_i|; [..., A] -> [...]."""
    # A function of u, not of a: tanh is not invertible in floating point where it saturates.
    log_normal = -0.5 * ((raw_action - loc) / scale) ** 2 - jnp.log(scale) - 0.5 * jnp.log(2 * jnp.pi)
    return (log_normal - log_det_tanh(raw_action)).sum(-1)


def entropy(loc, scale, key):
    """H(pi) = sum_i H(N(loc_i, scale_i)) + E log |da_i/du_i|, the expectation by one sample; [..., A] -> [...]."""
    raw_action = loc + scale * jax.random.normal(key, loc.shape)
    return (0.5 + 0.5 * jnp.log(2 * jnp.pi) + jnp.log(scale) + log_det_tanh(raw_action)).sum(-1)


def log_det_tanh(u):
    """log |da/du| = log(1 - tanh(u)^2), in a form that does not underflow."""
    return 2 * (jnp.log(2.0) - u - jax.nn.softplus(-2 * u))


def policy(params, obs):
    """obs [..., D] -> (loc, scale), both [..., A]."""
    loc, raw_scale = jnp.split(mlp(params["policy"], obs), 2, axis=-1)
    return loc, jax.nn.softplus(raw_scale) + 1e-3  # 1e-3: a policy without noise would have no density


def value(params, obs):
    """obs [..., D] -> values [...]."""
    return mlp(params["value"], obs)[..., 0]


def init_mlp(key, sizes):
    """LeCun-uniform kernels, zero biases: {"layer_0": {"kernel" [in, out], "bias" [out]}, ...}."""
    kernel, layers = jax.nn.initializers.lecun_uniform(), zip(jax.random.split(key, len(sizes) - 1), sizes, sizes[1:])
    return {f"layer_{i}": {"kernel": kernel(key, (n, m)), "bias": jnp.zeros(m)} for i, (key, n, m) in enumerate(layers)}


def mlp(layers, x):
    """[..., in] -> [..., out], swish between the layers."""
    hidden = x.reshape(-1, x.shape[-1])  # one batch axis: its matrix products are faster than with several
    for i in range(len(layers)):
        hidden = jax.nn.silu(hidden) if i else hidden
        hidden = hidden @ layers[f"layer_{i}"]["kernel"] + layers[f"layer_{i}"]["bias"]
    return hidden.reshape(*x.shape[:-1], -1)


def init_obs_stats(obs_size):
    """Statistics that leave observations as they are."""
    return ObsStats(jnp.zeros(()), *jnp.zeros((2, obs_size)), jnp.ones(obs_size))


def update_obs_stats(stats, obs):
    """Welford's running mean and variance, by a batch of observations [..., D] at a time; only usable ones count."""
    obs = obs.reshape(-1, obs.shape[-1])
    used = usable(obs)[:, None]
    added, total = used.sum(), lambda x: jnp.where(used, x, 0.0).sum(0)
    count = stats.count + added
    # Distances from a point near the mean lose no digits: the mean so far, or at first this batch's.
    start = jnp.where(stats.count > 0, stats.mean, total(obs) / added)
    mean = start + total(obs - start) / count
    summed_variance = stats.summed_variance + total((obs - start) * (obs - mean))
    # Rounding may leave a sum below 0. The floor exceeds the rounding error of a mean of equal observations.
    floor = 1e-6 * jnp.maximum(1.0, jnp.abs(mean))
    std = jnp.clip(jnp.sqrt(jnp.maximum(summed_variance, 0.0) / count), floor, 1e6)
    fade = jnp.minimum(1.0, MOST_COUNTED / count)  # of old observations, so that new ones never cease to count
    updated = ObsStats(fade * count, mean, fade * summed_variance, std)
    return optax.tree.where(added > 0, updated, stats)


def usable(obs):
    """Which observations [..., D] are finite and of a size that float32 can square and sum: bool [...]."""
    return (jnp.abs(obs) <= LARGEST).all(-1)


def normalize(obs, stats):
    """obs [..., D] to mean 0 and standard deviation 1; entries that are not usable become 0."""
    return jnp.where(jnp.abs(obs) <= LARGEST, (obs - stats.mean) / stats.std, 0.0)
