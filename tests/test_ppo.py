"""ppo.py against Brax's own loss and statistics, NumPy, the chain rule, and a robot that it must balance."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from brax.training import distribution, types
from brax.training.acme import running_statistics, specs
from brax.training.agents.ppo import losses
from brax.training.agents.ppo import networks as brax_networks

import brax_env
import ppo
from harness import tasks

T, B, D, A = 6, 16, 5, 2
CONFIG = ppo.Config(
    num_envs=B, batch_size=B, num_minibatches=1, rollout_length=T, policy_hidden=(8, 8), value_hidden=(16, 16)
)


def random_params(key):
    policy_key, value_key = jax.random.split(key)
    return {
        "policy": ppo.init_mlp(policy_key, (D, *CONFIG.policy_hidden, 2 * A)),
        "value": ppo.init_mlp(value_key, (D, *CONFIG.value_hidden, 1)),
    }


def random_data(key):
    keys = jax.random.split(key, 6)
    truncated = jax.random.bernoulli(keys[4], 0.15, (T, B))
    return ppo.Trajectories(
        obs=jax.random.normal(keys[0], (T + 1, B, D)),
        raw_action=jax.random.normal(keys[1], (T, B, A)),
        log_prob=jax.random.normal(keys[2], (T, B)) - 2,
        reward=jax.random.normal(keys[3], (T, B)),
        terminated=jax.random.bernoulli(keys[5], 0.15, (T, B)) & ~truncated,
        truncated=truncated,
        valid=jnp.ones((T, B), bool),
    )


def brax_loss(params, data, key):
    """Brax's loss of the same weights and data; its transitions are [B, T] and hold each next observation."""
    network = brax_networks.make_ppo_networks(
        D, A, policy_hidden_layer_sizes=CONFIG.policy_hidden, value_hidden_layer_sizes=CONFIG.value_hidden
    )
    rename = lambda layers: {"params": {name.replace("layer", "hidden"): layer for name, layer in layers.items()}}
    swap = lambda x: jnp.swapaxes(jnp.asarray(x, jnp.float32), 0, 1)
    transitions = types.Transition(
        observation=swap(data.obs[:-1]),
        action=swap(jnp.tanh(data.raw_action)),
        reward=swap(data.reward),
        discount=swap(1 - (data.terminated | data.truncated)),
        next_observation=swap(data.obs[1:]),
        extras={
            "state_extras": {"truncation": swap(data.truncated)},
            "policy_extras": {
                "raw_action": swap(data.raw_action),
                "log_prob": swap(data.log_prob),
                "distribution_params": swap(jnp.ones((T, B, 2 * A))),
            },
        },
    )
    return losses.compute_ppo_loss(
        losses.PPONetworkParams(policy=rename(params["policy"]), value=rename(params["value"])),
        None,
        transitions,
        key,
        network,
        entropy_cost=CONFIG.entropy_cost,
        discounting=CONFIG.discount,
        reward_scaling=CONFIG.reward_scale,
        gae_lambda=CONFIG.gae_lambda,
        clipping_epsilon=CONFIG.clip_epsilon,
        vf_coefficient=CONFIG.value_cost,
    )[0]


def test_loss_and_gradient_agree_with_braxs_own():
    params, data = random_params(jax.random.key(0)), random_data(jax.random.key(10))
    key = jax.random.key(20)  # the entropy's sample has the same shape and key in both
    ours, our_grads = jax.jit(jax.value_and_grad(ppo.ppo_loss), static_argnums=3)(params, data, key, CONFIG)
    theirs, their_grads = jax.jit(jax.value_and_grad(brax_loss))(params, data, key)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    # Sums over a batch in another order: float32 rounding, relative to the largest entries.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), our_grads, their_grads)


def test_advantages_and_targets_agree_with_braxs_own():
    data, values = random_data(jax.random.key(0)), jax.random.normal(jax.random.key(1), (T + 1, B))
    ours = ppo.gae(data.reward, values[:-1], values[-1], data.terminated, data.truncated, 0.97, 0.95)
    truncated, terminated = (x.astype(jnp.float32) for x in (data.truncated, data.terminated))
    theirs = losses.compute_gae(truncated, terminated, data.reward, values[:-1], values[-1], 0.95, 0.97)
    for our, their in zip(ours, theirs):
        np.testing.assert_allclose(our, their, rtol=1e-5, atol=1e-6)
    assert data.truncated.any() and data.terminated.any()
    assert not ours[1][data.truncated].any()  # a step that the time limit cut teaches nothing


def test_log_prob_and_entropy_agree_with_braxs_tanh_normal():
    parameters, raw = (
        jax.random.normal(jax.random.key(0), (32, 2 * A)) * 2,
        jax.random.normal(jax.random.key(1), (32, A)) * 3,
    )
    loc, scale = parameters[:, :A], jax.nn.softplus(parameters[:, A:]) + 1e-3
    theirs = distribution.NormalTanhDistribution(A)
    np.testing.assert_allclose(ppo.log_prob(loc, scale, raw), theirs.log_prob(parameters, raw), rtol=1e-5)
    key = jax.random.key(2)
    np.testing.assert_allclose(ppo.entropy(loc, scale, key), theirs.entropy(parameters, key), rtol=1e-5, atol=1e-5)


def test_observation_statistics_agree_with_brax_and_with_numpy():
    batches = [3 + 2 * jax.random.normal(key, (4, 8, D)) for key in jax.random.split(jax.random.key(0), 5)]
    ours, theirs = ppo.init_obs_stats(D), running_statistics.init_state(specs.Array((D,), jnp.dtype("float32")))
    for batch in batches:
        ours, theirs = ppo.update_obs_stats(ours, batch), running_statistics.update(theirs, batch)
    np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-5)
    np.testing.assert_allclose(ours.std, theirs.std, rtol=1e-5)
    everything = np.concatenate(batches).reshape(-1, D)
    np.testing.assert_allclose(ours.mean, everything.mean(0), rtol=1e-5)
    np.testing.assert_allclose(ours.std, everything.std(0), rtol=1e-5)


def test_statistics_keep_their_digits_where_observations_are_large_and_vary_little():
    columns = np.array([1e4, -3e5, 1e8, 1.0, 0.0]), np.array([0.1, 1.0, 1e3, 1e-4, 1e-3])
    batches = [m + s * np.random.default_rng(i).normal(size=(4000, 5)) for i, (m, s) in enumerate([columns] * 3)]
    batches = [batch.astype(np.float32) for batch in batches]
    stats = functools.reduce(ppo.update_obs_stats, batches, ppo.init_obs_stats(5))
    everything = np.concatenate(batches).astype(float)
    np.testing.assert_allclose(stats.mean, everything.mean(0), rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(stats.std, everything.std(0), rtol=0.01)


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, -12345.678, 3e8])
def test_an_observation_that_never_changes_is_normalised_to_about_zero(constant):
    obs, stats = jnp.full((7777, 1), constant), ppo.init_obs_stats(1)
    for _ in range(3):
        stats = ppo.update_obs_stats(stats, obs)
        assert abs(ppo.normalize(obs, stats)).max() < 1


def test_an_observation_that_is_not_usable_leaves_the_statistics_alone():
    good = 2 + jax.random.normal(jax.random.key(0), (100, D))
    expected = ppo.update_obs_stats(ppo.init_obs_stats(D), good)
    bad = jnp.stack([good[0].at[i].set(x) for i, x in enumerate([jnp.nan, jnp.inf, -jnp.inf, 1e20])])
    found = ppo.update_obs_stats(ppo.init_obs_stats(D), jnp.concatenate([bad, good]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)
    for stats in (ppo.init_obs_stats(D), expected):
        jax.tree.map(np.testing.assert_array_equal, ppo.update_obs_stats(stats, bad), stats)
    normalized = ppo.normalize(bad, expected)
    np.testing.assert_array_equal(normalized[jnp.arange(4), jnp.arange(4)], 0)
    assert np.isfinite(normalized).all()


def test_statistics_of_a_long_run_still_follow_what_is_seen():
    stats = ppo.ObsStats(jnp.float32(3e9), jnp.zeros(1), jnp.full(1, 3e9), jnp.ones(1))  # 3e9 + 160 == 3e9
    obs, many = jnp.tile(jnp.array([[4.0], [6.0]]), (80, 1)), 500_000
    stats, _ = jax.lax.scan(lambda stats, _: (ppo.update_obs_stats(stats, obs), None), stats, length=many)
    # Old observations fade with weight exp(-160 many / MOST_COUNTED); mixture of N(0, 1) and 5 +- 1.
    new = 1 - np.exp(-160 * many / ppo.MOST_COUNTED)
    np.testing.assert_allclose(stats.mean, 5 * new, rtol=0.05)
    np.testing.assert_allclose(stats.std, np.sqrt(1 + 25 * new * (1 - new)), rtol=0.05)


def point_env():
    """A toy: the state moves by the action and pays its negative square."""

    def step(key, x, action):
        x = x + 0.3 * action[0]
        return x, -(x**2), jnp.array(False), jnp.array(False)

    return brax_env.Env(jax.random.normal, step, lambda x: x[None], (1,), 1, "point")


TOY = ppo.Config(
    num_envs=8, batch_size=8, num_minibatches=2, num_epochs=2, policy_hidden=(8,), value_hidden=(8,), reward_scale=1.0
)


def diverging_env(wrong, in_reward):
    """The point, whose 7th step has a wrong number as its reward, or else as the observation after it, and ends."""

    def step(key, state, action):
        x, time = state
        x, time = x + 0.3 * action[0], time + 1
        reward = jnp.where((time == 7) & in_reward, wrong, -(x**2))
        return (x, time), reward, time == 7, time == 7

    def observe(state):
        return jnp.where((state[1] == 7) & ~in_reward, wrong, state[0])[None]

    return brax_env.Env(lambda key: (jax.random.normal(key), jnp.int32(0)), step, observe, (1,), 1, "diverging")


@functools.cache
def updated_by_diverging():
    """Function: (wrong, in_reward) -> (agent, metrics) after one update, of 16 trajectories of 5 steps."""

    def run(wrong, in_reward):
        learner, optimizer = ppo.make(diverging_env(wrong, in_reward), TOY), optax.adam(1e-2)
        return learner.update(optimizer, learner.init(jax.random.key(0), optimizer), jax.random.key(1))

    return jax.jit(run)


@pytest.mark.parametrize(
    "in_reward, wrong, num_invalid", [(False, np.nan, 2), (False, 1e20, 2), (True, np.nan, 1), (True, np.inf, 1)]
)
def test_a_step_that_diverges_is_counted_and_poisons_nothing(in_reward, wrong, num_invalid):
    agent, metrics = updated_by_diverging()(wrong, in_reward)
    # The 7th step of each of the 8 environments ends in the wrong observation, their 8th begins with it.
    assert metrics["invalid_steps"] == num_invalid * 8
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((agent, metrics)) if jnp.isdtype(x.dtype, "real floating"))
    assert agent.obs_stats.count == (80 if in_reward else 72) and agent.obs_stats.std < 10
    assert metrics["episodes"] == 8


def test_the_loss_leaves_invalid_steps_out():
    params, data, key = random_params(jax.random.key(0)), random_data(jax.random.key(10)), jax.random.key(20)
    # Trajectories that are wholly invalid count as little as if they were not there.
    config = dataclasses.replace(CONFIG, entropy_cost=0.0)  # its sample depends on the batch's size
    valid = jnp.arange(B) < 10
    masked = data._replace(valid=jnp.broadcast_to(valid, (T, B)), truncated=data.truncated | ~valid)
    fewer = jax.tree.map(lambda x: x[:, :10], data)
    loss = jax.jit(jax.value_and_grad(ppo.ppo_loss), static_argnums=3)
    found, expected = (loss(params, x, key, config) for x in (masked, fewer))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)
    nothing = loss(params, masked._replace(valid=jnp.zeros((T, B), bool)), key, config)
    assert not any(np.any(x) for x in jax.tree.leaves(nothing))


def test_ppo_learns_on_any_environment():
    learner, optimizer = ppo.make(point_env(), TOY), optax.adam(1e-2)
    train = jax.jit(lambda agent, keys: jax.lax.scan(lambda a, k: learner.update(optimizer, a, k), agent, keys))
    agent = learner.init(jax.random.key(0), optimizer)
    rewards = train(agent, jax.random.split(jax.random.key(1), 200))[1]["reward"]
    assert rewards[-20:].mean() > 0.2 * rewards[:20].mean() - 0.01  # both negative: a fifth of the cost


def test_an_optimizer_sees_the_loss_and_no_gradient_flows_through_it():
    config = dataclasses.replace(TOY, num_epochs=1, num_minibatches=1)
    learner = ppo.make(point_env(), config)
    agent = learner.init(jax.random.key(0), optax.sgd(0.0))

    def step(grads, state, params=None, *, value, **_):  # an optimizer whose step is the loss
        return jax.tree.map(lambda g: value + 0 * g, grads), state

    optimizer = optax.GradientTransformationExtraArgs(lambda params: (), step)

    def moved_by(params):
        after, metrics = learner.update(optimizer, agent._replace(params=params, opt_state=()), jax.random.key(1))
        name = ("value", "layer_0", "bias")
        before, after = (functools.reduce(lambda tree, key: tree[key], name, p) for p in (params, after.params))
        return (after - before)[0], metrics["loss"]

    (moved, loss), slope = jax.jit(jax.value_and_grad(moved_by, has_aux=True))(agent.params)
    np.testing.assert_allclose(moved, loss, rtol=1e-5)
    assert loss != 0 and not any(np.any(x) for x in jax.tree.leaves(slope))


def test_the_meta_gradient_is_the_chain_rule_through_the_optimizer():
    # One optimizer step, params' = params - alpha g: d loss(params') / d alpha = -<grad loss(params'), g>.
    config = dataclasses.replace(TOY, num_epochs=1, num_minibatches=1)
    learner, alpha = ppo.make(point_env(), config), 0.1
    agent = learner.init(jax.random.key(0), optax.sgd(0.0))

    def meta_loss(alpha):
        updated, _ = learner.update(optax.sgd(alpha), agent, jax.random.key(1))
        return learner.loss(updated, jax.random.key(2))[0], updated

    meta_grad, updated = jax.jit(jax.grad(meta_loss, has_aux=True))(alpha)
    loss_of = lambda params: learner.loss(updated._replace(params=params), jax.random.key(2))[0]
    loss_grads = jax.jit(jax.grad(loss_of))(updated.params)
    grads = jax.tree.map(lambda before, after: (before - after) / alpha, agent.params, updated.params)
    by_hand = -sum(jnp.vdot(*pair) for pair in zip(jax.tree.leaves(loss_grads), jax.tree.leaves(grads)))
    np.testing.assert_allclose(meta_grad, by_hand, rtol=1e-3)  # g is a difference of float32 numbers


def test_nothing_is_differentiated_through_rollouts():
    learner = ppo.make(point_env(), TOY)
    agent = learner.init(jax.random.key(0), optax.sgd(0.0))
    reward = lambda params: learner.loss(agent._replace(params=params), jax.random.key(1))[1][1]["reward"]
    assert not any(g.any() for g in jax.tree.leaves(jax.jit(jax.grad(reward))(agent.params)))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_envs": 0}, "num_envs is 0"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"value_hidden": (8, 0)}, r"value_hidden is \(8, 0\)"),
        ({"num_envs": 7, "batch_size": 8, "num_minibatches": 1}, "= 8 is no multiple of num_envs = 7"),
        ({"discount": 1.5}, "discount is 1.5"),
        ({"gae_lambda": float("nan")}, "gae_lambda is nan"),
    ],
)
def test_impossible_configs_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        ppo.Config(**changes)


def test_observations_with_several_axes_are_refused():
    with pytest.raises(ValueError, match=r"obs_shape is \(2, 3\)"):
        ppo.make(point_env()._replace(obs_shape=(2, 3)), TOY)


def test_the_pendulum_is_balanced():
    config = ppo.Config(
        num_envs=128,
        batch_size=32,
        num_minibatches=8,
        rollout_length=64,
        discount=0.99,
        entropy_cost=1e-3,
        reward_scale=0.01,
        value_hidden=(64,) * 3,
    )
    learner, optimizer = ppo.make(brax_env.make("inverted_pendulum"), config), optax.adam(1e-3)
    agent = jax.jit(lambda key: learner.init(key, optimizer))(jax.random.key(0))

    # Longer at work than in the compiler, unlike other programs of the tests: a level above conftest.py's is faster.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})
    def train(agent, keys):
        return jax.lax.scan(lambda a, k: learner.update(optimizer, a, k), agent, keys)

    agent, metrics = train(agent, jax.random.split(jax.random.key(1), 30))
    returns = lambda part: metrics["episode_return_sum"][part].sum() / metrics["episodes"][part].sum()
    # A random policy falls after some 30 steps; 1000 is the most, and what it comes close to in another 20 updates.
    assert returns(slice(0, 2)) < 60 and returns(slice(25, 30)) > 600


def counting_env(length=3):
    """A toy whose episodes last `length` steps and pay 1, 2, ..., length; every second one is cut by the time limit."""

    def step(key, time, action):
        done = (time + 1) % length == 0
        return (time + 1) % (2 * length), time % length + 1.0, done, done & (time < length)

    observe = lambda time: jnp.array([time % length, 1.0]) + 0.0
    return brax_env.Env(lambda key: jnp.int32(0), step, observe, (2,), 1, "counting")


def test_one_update_equals_a_python_loop():
    env, optimizer = counting_env(), optax.adam(1e-2)
    learner, key = ppo.make(env, TOY), jax.random.key(1)
    start = jax.jit(lambda: learner.init(jax.random.key(0), optimizer))()
    ours, metrics = jax.jit(lambda agent: learner.update(optimizer, agent, key))(start)

    collect_key, epochs_key = jax.random.split(key)
    time, mean, std = np.zeros(TOY.num_envs, int), np.zeros(2), np.ones(2)
    seen, rewards, trajectories = [], [], []  # 2 rounds of T steps; a trajectory: lists of its steps
    for round_key in jax.random.split(collect_key, 2):
        steps = []
        for step_key in jax.random.split(round_key, TOY.rollout_length):
            action_key, _ = jax.random.split(step_key)
            obs = np.stack([time % 3, np.ones_like(time)], -1).astype(np.float32)
            loc, scale = ppo.policy(start.params, (obs - mean) / std)
            raw_action = loc + scale * jax.random.normal(action_key, loc.shape)
            reward, done, truncated = time % 3 + 1.0, (time + 1) % 3 == 0, time == 2
            steps.append((obs, raw_action, ppo.log_prob(loc, scale, raw_action), reward, done & ~truncated, truncated))
            seen.append(obs), rewards.append(reward)
            time = (time + 1) % 6
        last = np.stack([time % 3, np.ones_like(time)], -1).astype(np.float32)
        obs, *rest = (np.stack(x) for x in zip(*steps))
        trajectories.append((np.concatenate([obs, last[None]]), *rest))
    seen = np.stack(seen).reshape(-1, 2)
    mean, std = seen.mean(0), np.maximum(seen.std(0), 1e-6)
    obs, *rest = (np.concatenate(x, axis=1) for x in zip(*trajectories))
    data = [(obs - mean) / std, *rest, np.ones((TOY.rollout_length, 16), bool)]

    params, opt_state = start.params, start.opt_state
    gradient = jax.jit(jax.grad(ppo.ppo_loss), static_argnums=3)
    for epoch_key in jax.random.split(epochs_key, TOY.num_epochs):
        shuffle_key, loss_key = jax.random.split(epoch_key)
        order = np.asarray(jax.random.permutation(shuffle_key, 16)).reshape(2, 8)
        for chosen, key in zip(order, jax.random.split(loss_key, 2)):
            minibatch = ppo.Trajectories(*(jnp.asarray(x[:, chosen]) for x in data))
            grads = gradient(params, minibatch, key, TOY)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
    # Adam's first steps are near +-learning rate whatever the gradient: rounding shows where a gradient is almost 0.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours.params, params)
    np.testing.assert_allclose(metrics["reward"], np.mean(rewards), rtol=1e-6)
    np.testing.assert_allclose(metrics["objective"], np.mean([1, 3, 6] * 3 + [1]))  # returns so far, step after step
    episodes = 10 // 3 * TOY.num_envs  # 2 rounds of 5 steps; each whole episode pays 1 + 2 + 3
    assert (metrics["episodes"], metrics["episode_return_sum"], metrics["episode_length_sum"]) == (
        episodes,
        6 * episodes,
        3 * episodes,
    )
    assert (ours.episode_length == 1).all() and (ours.episode_return == 1).all()


def test_the_meta_gradient_agrees_with_finite_differences():
    # The optimizer moves the policy only: if values moved, their targets, which the loss holds fixed, would move too.
    optimizer = lambda alpha: optax.multi_transform(
        {"policy": optax.adam(alpha), "value": optax.set_to_zero()}, {"policy": "policy", "value": "value"}
    )
    with jax.enable_x64(True):
        learner, alpha = ppo.make(point_env(), TOY), 1e-2
        agent = jax.jit(lambda: learner.init(jax.random.key(0), optimizer(alpha)))()
        update = jax.jit(lambda alpha: learner.update(optimizer(alpha), agent, jax.random.key(1))[0])
        meta_grad = jax.jit(jax.grad(lambda alpha: learner.loss(update(alpha), jax.random.key(2))[0]))(alpha)
        # The meta-loss's trajectories are data: the ones at alpha serve both sides of the difference.
        collect_key, loss_key = jax.random.split(jax.random.key(2))
        data = jax.jit(lambda agent: ppo.collect(point_env(), TOY, agent, collect_key)[1])(update(alpha))
        loss = jax.jit(lambda params: ppo.ppo_loss(params, data, loss_key, TOY))
        meta_loss = lambda alpha: loss(update(alpha).params)
        difference = (meta_loss(alpha + 1e-6) - meta_loss(alpha - 1e-6)) / 2e-6
        assert data.obs.dtype == jnp.float64 and abs(difference) > 1e-3
        # Central differences err by about 1e-12 (third derivative) and 1e-16 / 1e-6 (rounding).
        np.testing.assert_allclose(meta_grad, difference, rtol=1e-5)


def test_agents_on_a_vmapped_axis_learn_as_they_do_alone():
    learner, optimizer = ppo.make(counting_env(), TOY), optax.sgd(1e-2)
    live = jax.jit(lambda key: learner.update(optimizer, learner.init(key, optimizer), key))
    keys = jax.random.split(jax.random.key(0), 3)
    together, alone = jax.jit(jax.vmap(live))(keys), live(keys[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-4, atol=1e-5), together, alone)


def test_evaluation_plays_whole_episodes():
    learner = ppo.make(counting_env(), TOY)
    agent = learner.init(jax.random.key(0), optax.sgd(0.0))
    returns = tasks.play(counting_env(), agent.params, agent.obs_stats, jax.random.key(1), 4)
    np.testing.assert_array_equal(returns, [6.0] * 4)  # 1 + 2 + 3, and nothing of the next episode


def test_an_evaluation_survives_a_simulation_that_diverges():
    env = diverging_env(np.nan, jnp.array(True))
    agent = ppo.make(env, TOY).init(jax.random.key(0), optax.sgd(0.0))
    returns = tasks.play(env, agent.params, agent.obs_stats, jax.random.key(1), 4)
    assert np.isfinite(returns).all() and (returns < 0).all()
