"""Proximal policy optimization (PPO): a learner for any continuous environment, observations normalised.

The paper tests learned optimizers on robots with this learner (Section 6; Schulman et al. 2017, arXiv 1707.06347), in the
form that Brax's trainer gave it: many short trajectories, several epochs of minibatches over them, a tanh-normal policy.
The optimizer is an argument, any optax.GradientTransformation, built inside the traced function if need be: jax.grad of
`loss` after `update` is the meta-gradient with respect to whatever the optimizer was built from.

    symbol      here               shape
    T           rollout_length     steps of a trajectory
    N           num_envs           environments side by side
    B           trajectories       batch_size * num_minibatches in an iteration, batch_size in a minibatch
    D, A                           size of an observation, of an action
    s           obs                [T+1, B, D]  normalised; the last one only bootstraps
    u           raw_action         [T, B, A]    before tanh; the environment sees a = tanh(u)
    log pi      log_prob           [T, B]       of a, under the policy that acted
    r           reward             [T, B]       as the environment gave it
    V           values             [T, B]
    rho         ratio              [T, B]       pi(a|s) now / when it acted
    A           advantages         [T, B]

One iteration (`update`): every environment acts for batch_size * num_minibatches / num_envs trajectories of T steps;
the observation statistics take the new observations in; then num_epochs * num_minibatches optimizer steps.

Deviations:
- from the PPO paper, as in Brax: values and advantages are recomputed from the current parameters at every optimizer step;
  the advantage bootstraps from the lambda-target of the next step, so its weights are gamma, gamma^2 lambda, ... (V-trace
  with full ratios cut to 1), not gamma lambda, (gamma lambda)^2, ...; a step cut by the time limit has advantage 0.
- from Brax: trajectories lie time first, all trajectories are normalised once per iteration, one permutation serves all
  arrays. None of this changes the result, only the order of random numbers.

Example (an environment of one line of physics: stay near the origin):

    import jax, jax.numpy as jnp, optax, ppo
    from typing import NamedTuple, Callable
    class Env(NamedTuple):
        reset: Callable; step: Callable; observe: Callable; obs_shape: tuple; action_size: int; name: str
    def step(key, x, action):
        x = x + 0.1 * action[0]
        return x, -x**2, jnp.array(False), jnp.array(False)
    env = Env(lambda key: jax.random.normal(key), step, lambda x: x[None], (1,), 1, "point")
    learner = ppo.make(env, ppo.Config(num_envs=32, batch_size=32, num_minibatches=4, value_hidden=(32, 32)))
    optimizer = optax.adam(3e-3)
    agent = learner.init(jax.random.key(0), optimizer)
    update = jax.jit(lambda agent, key: learner.update(optimizer, agent, key))
    for key in jax.random.split(jax.random.key(1), 30):
        agent, metrics = update(agent, key)
    print(metrics["reward"])      # from about -1 towards 0

Copy this file: needs jax, optax.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import optax


@dataclass(frozen=True)
class Config:
    """Knobs of PPO; the defaults are the paper's for inverted_double_pendulum."""
    num_envs: int = 2048                     # more environments: steadier gradients, fewer updates per step
    batch_size: int = 1024                   # trajectories in a minibatch
    num_minibatches: int = 32                # optimizer steps in an epoch
    rollout_length: int = 5                  # steps of a trajectory; longer sees further, bootstraps less
    num_epochs: int = 4                      # how often each trajectory is used; more strays further from the policy that acted
    discount: float = 0.97
    gae_lambda: float = 0.95                 # 0 trusts the value network, 1 trusts the returns
    clip_epsilon: float = 0.3                # how far the ratio may pay off
    entropy_cost: float = 1e-2               # keeps the policy exploring
    value_cost: float = 0.5                  # the loss has half the squared error times this
    reward_scale: float = 10.0               # brings value targets to a size that the network fits quickly
    policy_hidden: tuple = (32,) * 4         # small: it acts at every step
    value_hidden: tuple = (256,) * 5         # large: nearly all arithmetic is here
    normalize_advantages: bool = True        # makes the step size independent of the reward's scale

    def __post_init__(self):
        sizes = (self.num_envs, self.batch_size, self.num_minibatches, self.rollout_length, self.num_epochs)
        if min(sizes) < 1:
            raise ValueError("num_envs, batch_size, num_minibatches, rollout_length and num_epochs must be at least 1, "
                             f"got {sizes}")
        if self.batch_size * self.num_minibatches % self.num_envs:
            raise ValueError(f"batch_size * num_minibatches = {self.batch_size * self.num_minibatches} must be a multiple "
                             f"of num_envs = {self.num_envs}: every environment gives equally many trajectories")
        if not (0 <= self.discount <= 1 and 0 <= self.gae_lambda <= 1):
            raise ValueError(f"discount and gae_lambda must lie in [0, 1], got {self.discount} and {self.gae_lambda}")


class ObsStats(NamedTuple):
    """Running statistics of observations."""
    count: jax.Array             # [] float
    mean: jax.Array              # [D]
    summed_variance: jax.Array   # [D]  sum of squared distances from the mean
    std: jax.Array               # [D]


class AgentState(NamedTuple):
    """Everything that an agent carries from one update to the next."""
    params: Any                  # {"policy": layers, "value": layers}
    opt_state: Any
    env_state: Any               # leaves [N, ...]
    obs_stats: ObsStats
    episode_return: jax.Array    # [N]  rewards of the running episodes so far, neither scaled nor discounted
    episode_length: jax.Array    # [N]  their steps so far


class Trajectories(NamedTuple):
    """What one optimizer step learns from; axis 1 is the batch everywhere."""
    obs: jax.Array               # [T+1, B, D]
    raw_action: jax.Array        # [T, B, A]
    log_prob: jax.Array          # [T, B]
    reward: jax.Array            # [T, B]
    terminated: jax.Array        # [T, B]  bool, the episode truly ended
    truncated: jax.Array         # [T, B]  bool, the time limit cut it


class Learner(NamedTuple):
    init: Callable               # (key, optimizer) -> AgentState
    update: Callable             # (optimizer, agent_state, key) -> (agent_state, metrics)
    loss: Callable               # (agent_state, key) -> (loss, (agent_state, metrics))


def make(env, config=Config()):
    """PPO for `env`: see the module's docstring for the three functions' signatures and DETAILS of `update` and `loss`."""
    return Learner(partial(init, env, config), partial(update, env, config), partial(loss, env, config))


# Networks ------------------------------------------------------------------------------------------------------------------

def init_mlp(key, sizes):
    """Layers {"layer_0": {"kernel" [in, out], "bias" [out]}, ...}; LeCun-uniform kernels, zero biases."""
    init_kernel = jax.nn.initializers.lecun_uniform()
    keys = jax.random.split(key, len(sizes) - 1)
    return {f"layer_{i}": {"kernel": init_kernel(k, (n_in, n_out)), "bias": jnp.zeros(n_out)}
            for i, (k, n_in, n_out) in enumerate(zip(keys, sizes[:-1], sizes[1:]))}


def mlp(layers, x):
    """[..., in] -> [..., out], swish between the layers."""
    for i in range(len(layers)):
        x = jax.nn.silu(x) if i else x
        x = x @ layers[f"layer_{i}"]["kernel"] + layers[f"layer_{i}"]["bias"]
    return x


def policy(params, obs):
    """obs [..., D] -> mean and standard deviation [..., A] of the raw action."""
    loc, raw_scale = jnp.split(mlp(params["policy"], obs), 2, axis=-1)
    return loc, jax.nn.softplus(raw_scale) + 1e-3      # 1e-3: never deterministic, so a ratio never divides by zero


def value(params, obs):
    """obs [..., D] -> [...]."""
    return mlp(params["value"], obs)[..., 0]


# The tanh-normal policy: u ~ N(loc, scale), a = tanh(u) --------------------------------------------------------------------

def log_det_tanh(u):
    """log |da/du| = log(1 - tanh(u)^2), in the form that does not underflow for large |u|."""
    return 2.0 * (jnp.log(2.0) - u - jax.nn.softplus(-2.0 * u))


def log_prob(loc, scale, raw_action):
    """log pi(a|s) = sum_i log N(u_i; loc_i, scale_i) - log |da_i/du_i|.  [..., A] -> [...].

    It takes u, not a: near |a| = 1 the inverse of tanh is lost to rounding.
    """
    log_normal = -0.5 * ((raw_action - loc) / scale)**2 - jnp.log(scale) - 0.5 * jnp.log(2.0 * jnp.pi)
    return (log_normal - log_det_tanh(raw_action)).sum(-1)


def entropy(loc, scale, key):
    """H(pi) = sum_i H(N(loc_i, scale_i)) + E[log |da_i/du_i|], the expectation from one sample.  [..., A] -> [...]."""
    raw_action = loc + scale * jax.random.normal(key, loc.shape)
    return (0.5 + 0.5 * jnp.log(2.0 * jnp.pi) + jnp.log(scale) + log_det_tanh(raw_action)).sum(-1)


# Loss ----------------------------------------------------------------------------------------------------------------------

def gae(rewards, values, bootstrap, terminated, truncated, discount, gae_lambda):
    """Generalized advantage estimation (Schulman et al. 2016) as Brax computes it.

    Args:
      rewards, values: [T, B].
      bootstrap: [B], the value of the observation after the last step.
      terminated, truncated: [T, B], bool.
    Returns:
      value targets and advantages, both [T, B], constants to differentiation.
    """
    # After a termination no reward follows: the next value counts 0. After a time limit rewards would have followed,
    # but the next observation is already the next episode's, so their value is not known here. Such a step
    # teaches nothing: its TD error and advantage are set to 0 and nothing is accumulated across it.
    continues = discount * (1.0 - terminated)                                          # [T, B]
    known = 1.0 - truncated                                                            # [T, B]
    next_values = jnp.concatenate([values[1:], bootstrap[None]])
    td_errors = known * (rewards + continues * next_values - values)

    def accumulate(correction, step):
        td_error, decay = step
        correction = td_error + decay * correction                                     # [B]
        return correction, correction

    _, corrections = jax.lax.scan(accumulate, jnp.zeros_like(bootstrap), (td_errors, continues * known * gae_lambda),
                                  reverse=True)
    targets = values + corrections
    next_targets = jnp.concatenate([targets[1:], bootstrap[None]])
    advantages = known * (rewards + continues * next_targets - values)
    # Targets are data, as in supervised learning: the loss pulls values to targets, not targets to values.
    return jax.lax.stop_gradient((targets, advantages))


def ppo_loss(params, data, key, config):
    """The clipped surrogate, half the squared value error, and the entropy bonus: [] from Trajectories."""
    obs = data.obs[:-1]
    values = value(params, obs)
    targets, advantages = gae(data.reward * config.reward_scale, values, value(params, data.obs[-1]),
                              data.terminated, data.truncated, config.discount, config.gae_lambda)
    if config.normalize_advantages:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)      # 1e-8: all advantages may be equal
    loc, scale = policy(params, obs)
    ratio = jnp.exp(log_prob(loc, scale, data.raw_action) - data.log_prob)
    # policy_loss = -E[min(rho A, clip(rho, 1 - eps, 1 + eps) A)]: moving the ratio further than eps is not rewarded.
    clipped_ratio = jnp.clip(ratio, 1.0 - config.clip_epsilon, 1.0 + config.clip_epsilon)
    policy_loss = -jnp.minimum(ratio * advantages, clipped_ratio * advantages).mean()
    value_loss = 0.5 * ((targets - values)**2).mean()
    return policy_loss + config.value_cost * value_loss - config.entropy_cost * entropy(loc, scale, key).mean()


# Observation statistics ----------------------------------------------------------------------------------------------------

def init_obs_stats(obs_size):
    return ObsStats(jnp.zeros(()), jnp.zeros(obs_size), jnp.zeros(obs_size), jnp.ones(obs_size))


def update_obs_stats(stats, obs):
    """Welford's running mean and variance, a whole batch of obs [..., D] at a time."""
    obs = obs.reshape(-1, obs.shape[-1])
    count = stats.count + obs.shape[0]
    mean = stats.mean + (obs - stats.mean).sum(0) / count
    summed_variance = stats.summed_variance + ((obs - stats.mean) * (obs - mean)).sum(0)
    # The floor keeps an observation that never changes finite; rounding may leave its sum below zero.
    std = jnp.clip(jnp.sqrt(jnp.maximum(summed_variance, 0.0) / count), 1e-6, 1e6)
    return ObsStats(count, mean, summed_variance, std)


def normalize(obs, stats):
    return (obs - stats.mean) / stats.std


# Learner -------------------------------------------------------------------------------------------------------------------

def init(env, config, key, optimizer):
    policy_key, value_key, env_key = jax.random.split(key, 3)
    (obs_size,) = env.obs_shape
    params = {"policy": init_mlp(policy_key, (obs_size, *config.policy_hidden, 2 * env.action_size)),
              "value": init_mlp(value_key, (obs_size, *config.value_hidden, 1))}
    env_state = jax.vmap(env.reset)(jax.random.split(env_key, config.num_envs))
    return AgentState(params, optimizer.init(params), env_state, init_obs_stats(obs_size),
                      jnp.zeros(config.num_envs), jnp.zeros(config.num_envs))


def collect(env, config, agent_state, key):
    """Acts for batch_size * num_minibatches trajectories -> (agent_state, Trajectories, metrics)."""
    # Data are constants: neither the agent-gradient nor the meta-gradient flows through sampled actions, physics or
    # statistics. Params are the only way in, so stopping them here stops everything (and saves the memory of it).
    params = jax.lax.stop_gradient(agent_state.params)
    stats = agent_state.obs_stats

    def act_once(carry, key):
        env_state, episode_return, episode_length = carry
        action_key, step_key = jax.random.split(key)
        obs = jax.vmap(env.observe)(env_state)
        loc, scale = policy(params, normalize(obs, stats))
        raw_action = loc + scale * jax.random.normal(action_key, loc.shape)
        env_state, reward, done, truncated = jax.vmap(env.step)(jax.random.split(step_key, config.num_envs), env_state,
                                                                jnp.tanh(raw_action))
        step = (obs, raw_action, log_prob(loc, scale, raw_action), reward, done & ~truncated, truncated)
        episode_return, episode_length = episode_return + reward, episode_length + 1
        ended = {"episodes": done.sum(), "episode_return_sum": (done * episode_return).sum(),
                 "episode_length_sum": (done * episode_length).sum()}
        return (env_state, ~done * episode_return, ~done * episode_length), (step, ended)

    def trajectory(carry, key):
        carry, (steps, ended) = jax.lax.scan(act_once, carry, jax.random.split(key, config.rollout_length))
        return carry, (steps, ended, jax.vmap(env.observe)(carry[0])[None])

    num_rounds = config.batch_size * config.num_minibatches // config.num_envs
    carry = agent_state.env_state, agent_state.episode_return, agent_state.episode_length
    carry, rounds = jax.lax.scan(trajectory, carry, jax.random.split(key, num_rounds))
    (obs, *steps), ended, last_obs = rounds                                            # leaves [rounds, T, N, ...]
    stats = update_obs_stats(stats, obs)
    obs = normalize(jnp.concatenate([obs, last_obs], axis=1), stats)
    data = Trajectories(*(jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]) for x in (obs, *steps)))
    metrics = {"reward": data.reward.mean(), **jax.tree.map(jnp.sum, ended)}
    env_state, episode_return, episode_length = carry
    agent_state = agent_state._replace(env_state=env_state, obs_stats=stats, episode_return=episode_return,
                                       episode_length=episode_length)
    return agent_state, data, metrics


def epoch(config, optimizer, data, carry, key):
    """One pass over all trajectories in random order, an optimizer step for each minibatch."""
    shuffle_key, loss_key = jax.random.split(key)
    order = jax.random.permutation(shuffle_key, config.num_minibatches * config.batch_size)
    loss_keys = jax.random.split(loss_key, config.num_minibatches)

    def optimizer_step(carry, minibatch):
        params, opt_state = carry
        indices, key = minibatch
        minibatch = jax.tree.map(lambda x: x[:, indices], data)
        loss, grads = jax.value_and_grad(ppo_loss)(params, minibatch, key, config)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return jax.lax.scan(optimizer_step, carry, (order.reshape(config.num_minibatches, -1), loss_keys))


def update(env, config, optimizer, agent_state, key):
    """One PPO iteration -> (agent_state, metrics)."""
    collect_key, epoch_key = jax.random.split(key)
    agent_state, data, metrics = collect(env, config, agent_state, collect_key)
    carry = agent_state.params, agent_state.opt_state
    (params, opt_state), losses = jax.lax.scan(partial(epoch, config, optimizer, data), carry,
                                               jax.random.split(epoch_key, config.num_epochs))
    return agent_state._replace(params=params, opt_state=opt_state), {"loss": losses.mean(), **metrics}


def loss(env, config, agent_state, key):
    """The loss of the current parameters on fresh trajectories, all at once: the meta-loss."""
    collect_key, loss_key = jax.random.split(key)
    agent_state, data, metrics = collect(env, config, agent_state, collect_key)
    total = ppo_loss(agent_state.params, data, loss_key, config)
    return total, (agent_state, {"loss": total, **metrics})


def evaluate(env, params, obs_stats, key, num_episodes):
    """Plays whole episodes with the mode of the policy, a = tanh(loc) -> returns [num_episodes]."""
    reset_key, key = jax.random.split(key)
    env_state = jax.vmap(env.reset)(jax.random.split(reset_key, num_episodes))

    def act_once(carry):
        env_state, returns, finished, key = carry
        key, step_key = jax.random.split(key)
        loc, _ = policy(params, normalize(jax.vmap(env.observe)(env_state), obs_stats))
        env_state, reward, done, _ = jax.vmap(env.step)(jax.random.split(step_key, num_episodes), env_state, jnp.tanh(loc))
        return env_state, returns + ~finished * reward, finished | done, key

    carry = env_state, jnp.zeros(num_episodes), jnp.zeros(num_episodes, bool), key
    return jax.lax.while_loop(lambda carry: ~carry[2].all(), act_once, carry)[1]
