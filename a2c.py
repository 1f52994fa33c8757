"""A2C: the learner of the gridworlds and Catch, for any discrete environment and any optax optimizer (paper: appendix).

An update is one rollout of T steps in N environments, one gradient averaged over all of them, one optimizer step.

| symbol | here | shape |
|---|---|---|
| pi(a|s), V(s) | softmax(logits), values: two linear heads on one body | [T + 1, N, A], [T + 1, N] |
| a, r, d | actions, rewards, dones of the rollout | [T, N] |
| G | lambda-return, bootstrapped by the value after the rollout | [T, N] |
| td | TD(lambda) error G - V(s): the advantage and the critic's error in one | [T, N] |

The body (paper's choice, by task): flatten and Dense 32 on small worlds; a 2 x 2 convolution with 16 features, then Dense 32
on big ones; Dense 256 on Catch. ReLU everywhere.

Example:
    import jax, jax.numpy as jnp, optax, a2c
    from typing import NamedTuple, Callable
    class Env(NamedTuple):                       # a bandit with two arms; gridworld.make(name) gives the real ones
        reset: Callable = lambda key: jnp.zeros(())
        step: Callable = lambda key, state, action: (state, action * 1.0, jnp.array(True))
        observe: Callable = lambda state: jnp.ones(1)
        obs_shape: tuple = (1,)
        num_actions: int = 2
        name: str = "bandit"
    learner, optimizer = a2c.make(Env(), a2c.Config(num_envs=8)), optax.adam(1e-2)
    agent_state = learner.init(jax.random.key(0), optimizer)
    update = jax.jit(lambda agent_state, key: learner.update(optimizer, agent_state, key))
    for key in jax.random.split(jax.random.key(1), 20):
        agent_state, metrics = update(agent_state, key)

NOTE: the convolution takes the observation as it lies, planes x rows as space and columns as channels, as the reference does.
Copy this file: needs jax, optax.
"""

import math
from dataclasses import dataclass
from typing import Any, Callable, NamedTuple

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
    hidden_size: int | None = None  # None: the paper's choice, 256 on Catch, else 32
    conv_features: int | None = None  # None: the paper's choice, 16 on big worlds, else 0, which is no convolution


class AgentState(NamedTuple):
    params: dict
    opt_state: Any
    env_state: Any  # every leaf [N, ...]
    episode_return: jax.Array  # [N] return so far of the running episodes


class Learner(NamedTuple):
    init: Callable  # (key, optimizer) -> AgentState
    update: Callable  # (optimizer, agent_state, key) -> (agent_state, metrics); one inner update
    loss: Callable  # (agent_state, key) -> (loss, (agent_state, metrics)); fresh rollout: the meta-loss


class Rollout(NamedTuple):
    env_states: Any  # every leaf [T + 1, N, ...]
    outputs: tuple  # of the network, in these states: logits [T + 1, N, A], values [T + 1, N]
    actions: jax.Array  # [T, N]
    rewards: jax.Array  # [T, N]
    dones: jax.Array  # [T, N]


def make(env, config=Config()):
    """A2C on env.

    Args:
        env: Env of pure functions of one environment, with obs_shape and num_actions.
        config: Config.
    Returns:
        Learner. metrics: loss; reward (mean per step); objective (mean return so far of the running episodes);
        episode_return_sum and episodes, over the episodes that ended.
    Raises:
        ValueError: a size below one.
    """
    for size in ("num_envs", "rollout_length"):
        if getattr(config, size) < 1:
            raise ValueError(f"{size} is {getattr(config, size)}; it must be at least 1")

    def init(key, optimizer):
        params_key, env_key = jax.random.split(key)
        params = init_network(params_key, env, config)
        env_state = jax.vmap(env.reset)(jax.random.split(env_key, config.num_envs))
        return AgentState(params, optimizer.init(params), env_state, jnp.zeros(config.num_envs))

    def rollout_loss(params, agent_state, key):
        agent_state, rollout, metrics = collect(env, config, params, agent_state, key)
        logits, values = replay(env, params, rollout.env_states, rollout.outputs)
        loss, _ = a2c_loss(logits, values, rollout.actions, rollout.rewards, rollout.dones, config)
        return loss, (agent_state, metrics | {"loss": loss})

    def update(optimizer, agent_state, key):
        params = agent_state.params
        grads, (agent_state, metrics) = jax.grad(rollout_loss, has_aux=True)(params, agent_state, key)
        updates, opt_state = optimizer.update(grads, agent_state.opt_state, params)
        params = optax.apply_updates(params, updates)
        return agent_state._replace(params=params, opt_state=opt_state), metrics

    def loss(agent_state, key):
        return rollout_loss(agent_state.params, agent_state, key)

    return Learner(init, update, loss)


def a2c_loss(logits, values, actions, rewards, dones, config):
    """The loss of one rollout: policy gradient + critic_weight * squared error - entropy_weight * entropy, each a mean.

    Args:
        logits: [T + 1, N, A]; the last step's are not used.
        values: [T + 1, N]; the last step's are the bootstrap.
        actions, rewards, dones: [T, N].
        config: Config.
    Returns:
        (loss [], td_errors [T, N]); the gradient of td_errors is that of -values.
    """
    td_errors = lambda_returns(rewards, dones, values, config) - values[:-1]
    log_probs = jax.nn.log_softmax(logits[:-1])  # (T, N, A)
    chosen = jnp.take_along_axis(log_probs, actions[..., None], axis=-1)[..., 0]  # (T, N)
    # The advantage is a weight here: the policy's loss must not train the critic.
    policy_loss = -jnp.mean(chosen * jax.lax.stop_gradient(td_errors))
    critic_loss = jnp.mean(td_errors**2)
    entropy = -jnp.mean(jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1))
    loss = policy_loss + config.critic_weight * critic_loss - config.entropy_weight * entropy
    return loss, td_errors


def lambda_returns(rewards, dones, values, config):
    """G_t = r_t + discount (1 - d_t) ((1 - lambda) V_{t+1} + lambda G_{t+1}), G_T = V_T. [T, N], without gradient."""
    values = jax.lax.stop_gradient(values)  # targets are fixed: TD learning is a semi-gradient method

    def backward(next_return, step):
        reward, done, next_value = step
        mixed = (1 - config.gae_lambda) * next_value + config.gae_lambda * next_return
        return_ = reward + config.discount * (1 - done) * mixed
        return return_, return_

    return jax.lax.scan(backward, values[-1], (rewards, dones, values[1:]), reverse=True)[1]


def collect(env, config, params, agent_state, key):
    """One rollout of the current policy: -> (agent_state, Rollout, metrics)."""
    # Sampled actions carry no derivative, and that of the network's outputs is left to replay: nothing else is kept.
    params = jax.lax.stop_gradient(params)

    def step(carry, key):
        env_state, episode_return = carry
        action_key, env_key = jax.random.split(key)
        outputs = look(env, params, env_state)
        actions = jax.random.categorical(action_key, outputs[0])
        env_keys = jax.random.split(env_key, config.num_envs)
        next_state, rewards, dones = jax.vmap(env.step)(env_keys, env_state, actions)
        ended_return = episode_return + rewards
        episode_return = jnp.where(dones, 0.0, ended_return)
        kept = ((env_state, outputs), actions, rewards, dones.astype(rewards.dtype), ended_return)
        return (next_state, episode_return), kept

    carry = (agent_state.env_state, agent_state.episode_return)
    carry, (seen, actions, rewards, dones, returns) = jax.lax.scan(
        step, carry, jax.random.split(key, config.rollout_length)
    )
    last_seen = (carry[0], look(env, params, carry[0]))
    seen = jax.tree.map(lambda xs, x: jnp.concatenate([xs, x[None]]), seen, last_seen)
    rollout = Rollout(*seen, actions, rewards, dones)
    metrics = {"reward": rewards.mean(), "objective": returns.mean()}
    metrics |= {"episode_return_sum": jnp.sum(dones * returns), "episodes": dones.sum()}
    return agent_state._replace(env_state=carry[0], episode_return=carry[1]), rollout, metrics


def init_network(key, env, config):
    """Parameters: LeCun-uniform body, LeCun-normal heads, zero biases.

    Returns:
        {"conv" (big worlds) [4C, F], "body" [D, hidden_size], "policy" [hidden_size, A], "value" [hidden_size, 1]},
        each {"kernel", "bias"}.
    """
    conv_features, hidden_size = config.conv_features, config.hidden_size
    if conv_features is None:
        conv_features = 16 if env.name.startswith("big_") else 0
    if hidden_size is None:
        hidden_size = 256 if env.name == "catch" else 32
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

    def linear(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"]

    if "conv" in params:
        obs = jax.nn.relu(linear("conv", patches_2x2(obs)))  # (B, planes, rows, F)
    body = jax.nn.relu(linear("body", obs.reshape(obs.shape[0], -1)))
    return linear("policy", body), linear("value", body)[:, 0]


def look(env, params, env_states):
    """What the network says in env_states, every leaf [B, ...]: (logits [B, A], values [B])."""
    return apply_network(params, jax.vmap(env.observe)(env_states))


def replay(env, params, env_states, outputs, piece=64):
    """The network's outputs in a rollout as a function of its parameters: known already, only their gradient needs a look back.

    It looks at all states again, on an accelerator at once, on a CPU a piece at a time, whose activations fit a core's cache.
    On a CPU an update is 1.2 (small worlds) to 1.4 times (big ones) as fast as with a loss that computes the outputs anew.

    Args:
        env: Env.
        params: the network's.
        env_states: every leaf [T + 1, N, ...].
        outputs: (logits [T + 1, N, A], values [T + 1, N]) of apply_network with these parameters in these states.
        piece: at most so many states at a time.
    Returns:
        outputs.
    """
    num_states = outputs[1].size
    if jax.default_backend() != "cpu":
        piece = num_states
    piece = max(d for d in range(1, min(piece, num_states) + 1) if num_states % d == 0)
    cut = lambda x: x.reshape(num_states // piece, piece, *x.shape[2:])

    def backward(residuals, cotangents):
        params, env_states = residuals

        def add(total, part):
            states, cotangents = part
            (grads,) = jax.vjp(lambda params: look(env, params, states), params)[1](cotangents)
            return jax.tree.map(jnp.add, total, grads), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(add, zeros, jax.tree.map(cut, (env_states, cotangents)))[0], None, None

    known = jax.custom_vjp(lambda params, env_states, outputs: outputs)
    known.defvjp(lambda params, env_states, outputs: (outputs, (params, env_states)), backward)
    return known(params, env_states, outputs)


def patches_2x2(x):
    """The inputs of a 2 x 2 convolution with zero padding after the last row and column: [B, X, Y, C] -> [B, X, Y, 4C].

    As a matrix product over patches the convolution runs fast also with other weights for each agent (vmap).
    """
    _, size_x, size_y, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    corners = [padded[:, i : i + size_x, j : j + size_y] for i in (0, 1) for j in (0, 1)]
    return jnp.concatenate(corners, axis=-1)
