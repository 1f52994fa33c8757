# SPDX-License-Identifier: MIT
"""A2C: the learner of the gridworlds and Catch, for any discrete environment and any optax optimizer (paper: appendix).

An update is one rollout of T steps in N environments, one gradient averaged over all of them, one optimizer step.

| symbol | in code | shape |
|---|---|---|
| pi(a|s), V(s) | softmax(logits), values: two linear heads on one body | [T + 1, N, A], [T + 1, N] |
| a, r, d | actions, rewards, dones of the rollout | [T, N] |
| G | lambda-return, bootstrapped by the value after the rollout | [T, N] |
| td | TD(lambda) error G - V(s): the advantage and the critic's error in one | [T, N] |

The body, ReLU everywhere: an optional 2 x 2 convolution (conv_features), flatten, one dense layer (hidden_size). The
paper's sizes: small gridworlds Config(), big ones Config(conv_features=16), Catch Config(hidden_size=256).

Example:
    import jax, jax.numpy as jnp, optax, a2c
    from types import SimpleNamespace
    env = SimpleNamespace(                       # a bandit with two arms; gridworld.make(name) gives the real ones
        reset=lambda key: jnp.zeros(()), observe=lambda state: jnp.ones(1), obs_shape=(1,), num_actions=2,
        step=lambda key, state, action: (state, action * 1.0, jnp.array(True)))
    learner, optimizer = a2c.make(env, a2c.Config(num_envs=8)), optax.adam(1e-2)
    agent_state = learner.init(jax.random.key(0), optimizer)
    update = jax.jit(lambda agent_state, key: learner.update(optimizer, agent_state, key))
    for key in jax.random.split(jax.random.key(1), 20):
        agent_state, metrics = update(agent_state, key)

Deviations from the textbook, as in the reference implementation (github.com/sail-sg/optim4rl):
- the convolution takes the last axis of a gridworld's observation (columns) for channels, planes and rows for space;
- whatever ends an episode is a true end, after which nothing is earned. That includes the time limit of a gridworld,
  although no observation shows the time that is left.
Not in the reference: where env.step returns truncation as a fourth output, a step that the time limit ended teaches nothing,
since what would have come after it is unknown.
Copy this file: needs jax >= 0.10, optax >= 0.2.5.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


@dataclass(frozen=True)
class Config:
    num_envs: int = 512  # N; the paper: 512 (Catch 64) in a test, 1 per unit in meta-training
    rollout_length: int = 20  # T
    discount: float = 0.995
    gae_lambda: float = 0.95  # lambda of the lambda-return
    critic_weight: float = 0.5
    entropy_weight: float = 0.01
    hidden_size: int = 32  # of the dense layer; the paper: 256 on Catch, else 32
    conv_features: int = 0  # of a 2 x 2 convolution before it, 0 for none; the paper: 16 on big gridworlds, else 0

    def __post_init__(self):
        for size, least in dict(num_envs=1, rollout_length=1, hidden_size=1, conv_features=0).items():
            if not isinstance(getattr(self, size), Integral) or getattr(self, size) < least:
                raise ValueError(f"{size} is {getattr(self, size)}; it must be a whole number, at least {least}")
        for fraction in ("discount", "gae_lambda"):
            if not 0 <= getattr(self, fraction) <= 1:
                raise ValueError(f"{fraction} is {getattr(self, fraction)}; it must lie between 0 and 1")


class AgentState(NamedTuple):
    params: dict
    opt_state: Any
    env_state: Any  # every leaf [N, ...]
    episode_return: jax.Array  # [N] return so far of the running episodes


class Learner(NamedTuple):
    """What meta-training needs of an agent. An inner update of A2C is one rollout and one optimizer step."""

    init: Callable  # (key, optimizer) -> AgentState
    update: Callable  # (optimizer, agent_state, key) -> (agent_state, metrics): one inner update
    loss: Callable  # (agent_state, key) -> (loss, (agent_state, metrics)): of a new rollout, without an update


class Rollout(NamedTuple):
    env_states: Any  # every leaf [T + 1, N, ...]
    outputs: tuple  # of the network, in these states: logits [T + 1, N, A], values [T + 1, N]
    actions: jax.Array  # [T, N]
    rewards: jax.Array  # [T, N]
    dones: jax.Array  # [T, N]
    truncations: Any  # [T, N], or None where env.step does not tell


def make(env, config=Config()):
    """A2C on env, an Env of pure functions of one environment, with obs_shape and num_actions.

    Returns: Learner. metrics: loss; reward (mean per step); objective (mean return so far of the running episodes, for
        evolution strategies: every rollout has one, whether an episode ended in it or not); episode_return_sum and
        episodes, over the episodes that ended.
    Raises: ValueError: a convolution of observations that do not have three axes.
    """
    if config.conv_features and len(env.obs_shape) != 3:
        raise ValueError(f"conv_features is {config.conv_features}, but observations of shape {env.obs_shape} need 0")

    def init(key, optimizer):
        params_key, env_key = jax.random.split(key)
        params = init_network(params_key, env, config)
        env_state = jax.vmap(env.reset)(jax.random.split(env_key, config.num_envs))
        return AgentState(params, optimizer.init(params), env_state, jnp.zeros(config.num_envs))

    def rollout_loss(params, agent_state, key):
        agent_state, rollout, metrics = collect(env, config, params, agent_state, key)
        logits, values = with_gradient(env, params, rollout.env_states, rollout.outputs)
        loss, _ = a2c_loss(logits, values, rollout.actions, rollout.rewards, rollout.dones, config, rollout.truncations)
        return loss, (agent_state, metrics | {"loss": loss})

    def update(optimizer, agent_state, key):
        params = agent_state.params
        grads, (agent_state, metrics) = jax.grad(rollout_loss, has_aux=True)(params, agent_state, key)
        # Some optimizers look at the loss too. They get the number only: no meta-gradient flows through it.
        value = jax.lax.stop_gradient(metrics["loss"])
        optimizer = optax.with_extra_args_support(optimizer)
        updates, opt_state = optimizer.update(grads, agent_state.opt_state, params, value=value)
        params = optax.apply_updates(params, updates)
        return agent_state._replace(params=params, opt_state=opt_state), metrics

    return Learner(init, update, loss=lambda agent_state, key: rollout_loss(agent_state.params, agent_state, key))


def a2c_loss(logits, values, actions, rewards, dones, config, truncations=None):
    """The loss of one rollout: policy gradient + critic_weight * squared error - entropy_weight * entropy, each a mean.

    Args:
        logits: [T + 1, N, A]; the last step's are not used.
        values: [T + 1, N]; the last step's are the bootstrap.
        actions, rewards, dones: [T, N].
        truncations: [T, N], 1 where a time limit alone ended the episode; None: nowhere.
    Returns: (loss [], td_errors [T, N]); the gradient of td_errors is that of -values.
    """
    td_errors = lambda_returns(rewards, dones, values, config, truncations) - values[:-1]
    log_probs = jax.nn.log_softmax(logits[:-1])  # (T, N, A)
    chosen = jnp.take_along_axis(log_probs, actions[..., None], axis=-1)[..., 0]  # (T, N)
    # The advantage is a weight here: the policy's loss must not train the critic.
    policy_loss = -jnp.mean(chosen * jax.lax.stop_gradient(td_errors))
    critic_loss = jnp.mean(td_errors**2)
    entropy = -jnp.mean(jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1))
    loss = policy_loss + config.critic_weight * critic_loss - config.entropy_weight * entropy
    return loss, td_errors


def lambda_returns(rewards, dones, values, config, truncations=None):
    """G_t = r_t + discount (1 - d_t) ((1 - lambda) V_{t+1} + lambda G_{t+1}), G_T = V_T; G_t = V_t where t is truncated.

    Args: rewards, dones, truncations (or None): [T, N]; values: [T + 1, N]. Returns: [T, N], without gradient.
    """
    values = jax.lax.stop_gradient(values)  # targets are fixed: TD learning is a semi-gradient method

    def backward(next_return, step):
        reward, done, value, next_value, truncated = step
        mixed = (1 - config.gae_lambda) * next_value + config.gae_lambda * next_return
        return_ = reward + config.discount * (1 - done) * mixed
        return_ = return_ if truncated is None else jnp.where(truncated, value, return_)
        return return_, return_

    steps = (rewards, dones, values[:-1], values[1:], truncations)
    return jax.lax.scan(backward, values[-1], steps, reverse=True)[1]


def collect(env, config, params, agent_state, key):
    """One rollout of the current policy: -> (agent_state, Rollout, metrics)."""
    # Acting is not differentiated: actions are samples, and with_gradient differentiates the outputs, afterwards.
    params = jax.lax.stop_gradient(params)

    def step(carry, key):
        env_state, episode_return = carry
        action_key, env_key = jax.random.split(key)
        outputs = network_outputs(env, params, env_state)
        actions = jax.random.categorical(action_key, outputs[0])
        env_keys = jax.random.split(env_key, config.num_envs)
        next_state, rewards, dones, *truncations = jax.vmap(env.step)(env_keys, env_state, actions)
        ended_return = episode_return + rewards
        episode_return = jnp.where(dones, 0.0, ended_return)
        kept = ((env_state, outputs), actions, rewards, dones.astype(rewards.dtype), ended_return, truncations)
        return (next_state, episode_return), kept

    carry, keys = (agent_state.env_state, agent_state.episode_return), jax.random.split(key, config.rollout_length)
    (env_state, episode_return), kept = jax.lax.scan(step, carry, keys)
    seen, actions, rewards, dones, returns, truncations = kept
    last_seen = (env_state, network_outputs(env, params, env_state))
    seen = jax.tree.map(lambda xs, x: jnp.concatenate([xs, x[None]]), seen, last_seen)
    rollout = Rollout(*seen, actions, rewards, dones, truncations[0] if truncations else None)
    metrics = {"reward": rewards.mean(), "objective": returns.mean()}
    metrics |= {"episode_return_sum": jnp.sum(dones * returns), "episodes": dones.sum()}
    return agent_state._replace(env_state=env_state, episode_return=episode_return), rollout, metrics


def init_network(key, env, config):
    """Parameters: LeCun-uniform body, LeCun-normal heads, zero biases.

    Returns: {"conv" (if conv_features > 0) [4C, conv_features], "body" [D, hidden_size], "policy" [hidden_size, A],
        "value" [hidden_size, 1]}, each {"kernel", "bias"}. C: columns of the observation; D: features after flattening.
    """
    conv_features, hidden_size = config.conv_features, config.hidden_size
    uniform, normal = jax.nn.initializers.lecun_uniform(), jax.nn.initializers.lecun_normal()
    conv_key, body_key, policy_key, value_key = jax.random.split(key, 4)

    def linear(initializer, key, fan_in, fan_out):
        return {"kernel": initializer(key, (fan_in, fan_out)), "bias": jnp.zeros(fan_out)}

    params, features = {}, math.prod(env.obs_shape)
    if conv_features:
        channels = env.obs_shape[-1]
        params["conv"] = linear(uniform, conv_key, 4 * channels, conv_features)
        features = features // channels * conv_features
    return params | {
        "body": linear(uniform, body_key, features, hidden_size),
        "policy": linear(normal, policy_key, hidden_size, env.num_actions),
        "value": linear(normal, value_key, hidden_size, 1),
    }


def apply_network(params, obs):
    """obs [B, *obs_shape] -> (logits [B, A], values [B])."""
    linear = lambda name, x: x @ params[name]["kernel"] + params[name]["bias"]
    if "conv" in params:
        obs = jax.nn.relu(linear("conv", patches_2x2(obs)))  # (B, planes, rows, F)
    body = jax.nn.relu(linear("body", obs.reshape(obs.shape[0], -1)))
    return linear("policy", body), linear("value", body)[:, 0]


def network_outputs(env, params, env_states):
    """The network's outputs in env_states, every leaf [B, ...]: (logits [B, A], values [B])."""
    return apply_network(params, jax.vmap(env.observe)(env_states))


def with_gradient(env, params, env_states, outputs, piece=64):
    """outputs, which acting has computed already, as a differentiable function of params.

    The forward pass returns the known outputs. The backward pass computes the activations again, on a CPU one piece of
    the states after another, since the activations of a piece fit a core's cache. The result is that of
    network_outputs(env, params, env_states) in the loss; an update on a CPU is 1.2 to 1.4 times as fast.

    Args:
        params: the network's.
        env_states: every leaf [T + 1, N, ...].
        outputs: (logits [T + 1, N, A], values [T + 1, N]), the network's with these params in these states.
        piece: the most states at a time on a CPU. An accelerator takes all at once.
    """

    def backward(num_at_once, params, env_states, cotangents):
        cut = lambda x: x.reshape(-1, num_at_once, *x.shape[2:])

        def add(total, inputs):
            states, cotangents = inputs
            (grads,) = jax.vjp(lambda params: network_outputs(env, params, states), params)[1](cotangents)
            return jax.tree.map(jnp.add, total, grads), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(add, zeros, jax.tree.map(cut, (env_states, cotangents)))[0]

    num_states = outputs[1].size
    piece = max(d for d in range(1, min(piece, num_states) + 1) if num_states % d == 0)
    on = dict(cpu=partial(backward, piece), default=partial(backward, num_states))
    known = jax.custom_vjp(lambda params, env_states, outputs: outputs)
    known.defvjp(
        lambda params, env_states, outputs: (outputs, (params, env_states)),
        lambda residuals, cotangents: (jax.lax.platform_dependent(*residuals, cotangents, **on), None, None),
    )
    return known(params, env_states, outputs)


def patches_2x2(x):
    """The inputs of a 2 x 2 convolution with zero padding after the last row and column: [B, X, Y, C] -> [B, X, Y, 4C].

    As a matrix product over patches, the convolution is also fast for many agents with weights of their own (vmap).
    """
    _, size_x, size_y, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    corners = [padded[:, i : i + size_x, j : j + size_y] for i in (0, 1) for j in (0, 1)]
    return jnp.concatenate(corners, axis=-1)
