"""Meta-training on robots: its gradient against finite differences on frozen rollouts, its memory, its units, its settings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs import read_csv

import brax_env
import evaluate
import meta_train
import optim4rl
import pipeline
import ppo
from harness import runs, tasks, weights

TINY = ppo.Config(
    num_envs=4,
    batch_size=4,
    num_minibatches=2,
    rollout_length=3,
    num_epochs=2,
    policy_hidden=(4,),
    value_hidden=(4,),
    reward_scale=1.0,
)
UPDATES = 2  # M


def rolling_env():
    """A ball on a hill, which stands in for a robot because it compiles at once: 1 for each step until it has rolled away."""

    def reset(key):
        first = 0.3 * jax.random.normal(key, (2,))
        return first, first

    def step(key, state, action):
        (x, v), first = state
        v = v + 0.5 * x + 0.5 * action[0]
        ball = jnp.stack([x + 0.5 * v, v])
        done = jnp.abs(ball[0]) > 1
        return (jnp.where(done, first, ball), first), jnp.array(1.0), done, jnp.array(False)

    return brax_env.Env(reset, step, lambda state: state[0], (2,), 1, "ball")


def make_optimizer(meta_params):
    return tasks.clipped("inverted_pendulum", optim4rl.optim4rl(0.05, meta_params))


def some_meta_params():
    """Ones that have learned something: every meta-parameter away from zero."""
    meta_params, key = optim4rl.init_meta_params(jax.random.key(0)), jax.random.key(1)
    return jax.tree.map(lambda x, noise: x + 0.3 * noise, meta_params, optax.tree.random_like(key, meta_params))


def play(env, meta_params, agent, key):
    """A unit's updates as plain loops: all gradients that its optimizer saw, and the meta-loss's data."""
    unroll_key, loss_key = jax.random.split(key)
    collect = jax.jit(lambda agent, key: ppo.collect(env, TINY, agent, key)[:2])
    gradient = jax.jit(lambda params, data, key: jax.grad(ppo.ppo_loss)(params, data, key, TINY))
    optimizer, gradients = make_optimizer(meta_params), []
    for update_key in jax.random.split(unroll_key, UPDATES):
        collect_key, epochs_key = jax.random.split(update_key)
        agent, data = collect(agent, collect_key)
        for epoch_key in jax.random.split(epochs_key, TINY.num_epochs):
            shuffle_key, steps_key = jax.random.split(epoch_key)
            order = jax.random.permutation(shuffle_key, TINY.num_minibatches * TINY.batch_size)
            step_keys = jax.random.split(steps_key, TINY.num_minibatches)
            for chosen, step_key in zip(order.reshape(TINY.num_minibatches, -1), step_keys):
                minibatch = jax.tree.map(lambda x: x[:, chosen], data)
                gradients.append(gradient(agent.params, minibatch, step_key))
                updates, opt_state = optimizer.update(gradients[-1], agent.opt_state)
                agent = agent._replace(params=optax.apply_updates(agent.params, updates), opt_state=opt_state)
    collect_key, entropy_key = jax.random.split(loss_key)
    return gradients, agent.params, collect(agent, collect_key)[1], entropy_key


def frozen_loss(params, data, targets, advantages, key):
    """PPO's loss, written again, where all that its derivative holds fixed is data."""
    loc, scale = ppo.policy(params, data.obs[:-1])
    ratio = jnp.exp(ppo.log_prob(loc, scale, data.raw_action) - data.log_prob)
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    surrogate = jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.7, 1.3) * advantages).mean()
    errors = targets - ppo.value(params, data.obs[:-1])
    return -surrogate + 0.25 * (errors**2).mean() - 0.01 * ppo.entropy(loc, scale, key).mean()


def test_the_meta_gradient_of_a_robot_agrees_with_finite_differences_on_frozen_rollouts():
    """What is cut: data, targets and gradients do not follow theta. So the difference replays the gradients of theta."""
    with jax.enable_x64(True):
        env = rolling_env()
        learner, theta, key = ppo.make(env, TINY), some_meta_params(), jax.random.key(3)
        agent = jax.jit(lambda: learner.init(jax.random.key(2), make_optimizer(theta)))()
        gradient = jax.jit(lambda t: pipeline.meta_gradient(learner, make_optimizer, UPDATES, t, agent, key))
        meta_grads, updated, metrics = gradient(theta)

        gradients, params, data, entropy_key = play(env, theta, agent, key)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), updated.params, params)
        values = ppo.value(params, data.obs)
        targets, advantages = ppo.gae(data.reward, values[:-1], values[-1], data.terminated, data.truncated, 0.97, 0.95)
        optimizer_step = jax.jit(lambda t, g, state: make_optimizer(t).update(g, state))

        def meta_loss(theta):
            params, opt_state = agent.params, agent.opt_state
            for g in gradients:
                updates, opt_state = optimizer_step(theta, g, opt_state)
                params = optax.apply_updates(params, updates)
            return frozen_loss(params, data, targets, advantages, entropy_key)

        np.testing.assert_allclose(metrics["meta_loss"], meta_loss(theta), rtol=1e-9)
        for direction_key in jax.random.split(jax.random.key(4), 3):
            direction = optax.tree.random_like(direction_key, theta)
            along = lambda size: meta_loss(jax.tree.map(lambda t, d: t + size * d, theta, direction))
            difference = (along(1e-5) - along(-1e-5)) / 2e-5
            assert data.obs.dtype == jnp.float64 and abs(difference) > 1e-4
            # Central differences err by about 1e-10 (third derivative) and 1e-16 / 1e-5 (rounding).
            np.testing.assert_allclose(optax.tree.vdot(meta_grads, direction), difference, rtol=1e-4)


def test_the_backward_pass_keeps_gradients_not_activations():
    """What memory grows by with each optimizer step: the gradient, and its part of one optimizer state for each epoch."""
    env = rolling_env()

    def temporary_bytes(num_epochs):
        config = dataclasses.replace(TINY, num_envs=256, batch_size=64, num_minibatches=4, num_epochs=num_epochs)
        config = dataclasses.replace(config, policy_hidden=(16,) * 2, value_hidden=(16,) * 2)
        learner, theta, key = ppo.make(env, config), some_meta_params(), jax.random.key(0)
        agent = jax.eval_shape(lambda: learner.init(key, make_optimizer(theta)))
        unit = lambda agent: pipeline.meta_gradient(learner, make_optimizer, 1, theta, agent, key)
        num_scalars = sum(x.size for x in jax.tree.leaves(agent.params))
        return jax.jit(unit).lower(agent).compile().memory_analysis().temp_size_in_bytes, num_scalars

    (few, num_scalars), (many, _) = temporary_bytes(2), temporary_bytes(10)
    growth = (many - few) / (8 * 4) / 4 / num_scalars  # floats for each scalar and optimizer step
    # 1 for the gradient and 16 / 4 for the state. All states would be 17; activations of 3 x 64 x 64 floats, 15 more.
    assert 1 < growth < 8


@pytest.fixture
def tiny_units(monkeypatch):
    monkeypatch.setattr(tasks, "_meta_ppo", lambda name, ppo_settings: TINY)
    monkeypatch.setattr(brax_env, "make", lambda name: rolling_env())


def test_units_on_two_devices_are_reset_in_turn(tiny_units):
    config = meta_train.Config(
        tasks=("inverted_pendulum",), num_units=2, reset_interval=(3,), inner_updates=1, estimator="pes", alpha=(0.05,)
    )
    (task,) = meta_train.make_tasks(config, jax.sharding.Mesh(jax.devices()[:2], ("units",)))
    units, ages = task.init(some_meta_params(), jax.random.key(1)), []
    for step in range(5):
        meta_grads, units, metrics = task.step(some_meta_params(), units, jnp.int32(step), jax.random.key(1))
        ages.append(units.state.agents.obs_stats.count[:, 0])
    # Unit 0 is reset at steps 0 and 3, unit 1 at step 2; a step lives through one rollout.
    rollout = TINY.batch_size * TINY.num_minibatches * TINY.rollout_length
    np.testing.assert_array_equal(np.stack(ages), rollout * np.array([[1, 1], [2, 2], [3, 1], [1, 2], [2, 3]]))
    # The ball pays 1 for each step, whatever the weights: the mean reward would give no gradient.
    assert metrics["reward"] == 1 and metrics["diverged"] == 0 and optax.tree.norm(meta_grads) > 0


def test_each_task_has_its_own_reset_interval():
    config = meta_train.Config(tasks=("catch", "inverted_pendulum"), num_units=5, reset_interval=(125, 9))
    assert [(c.num_units, c.reset_interval) for c in meta_train.pipeline_configs(config)] == [(5, 125), (5, 9)]


def test_a_world_and_a_robot_are_learned_from_in_one_run(tmp_path, capsys):
    folder = tmp_path / "run"
    flags = "--preset gradient --tasks small_dense_short,inverted_pendulum --num-units 2 --meta-steps 3 --reset-interval 2,3 --inner-updates 1"
    meta_train.main(f"{flags} --test-tasks , --out {folder}".split())
    rows = read_csv(folder / "metrics.csv")
    assert [float(row["inverted_pendulum/reward"]) for row in rows] == [1.0] * 3  # its reward scale divides nothing
    # A random policy falls after some 30 steps, and each step pays 1.
    returns = [
        float(row["inverted_pendulum/episode_return"]) for row in rows if row["inverted_pendulum/episode_return"]
    ]
    assert returns and all(3 < value < 200 for value in returns)
    assert all(row["inverted_pendulum/diverged"] == "0" for row in rows)
    assert (folder / "curves.png").stat().st_size > 1000
    weights.load(folder / "optimizer.npz")
    assert "return inverted_pendulum" in capsys.readouterr().err


def test_the_papers_settings_are_those_of_its_appendix():
    for name, obs_size, entropy_cost, reward_scale in (("ant", 27, 1e-2, 10), ("humanoid", 244, 1e-3, 0.1)):
        config = tasks._meta_ppo(name, "paper")
        sizes = (config.num_envs, config.batch_size, config.num_minibatches, config.rollout_length, config.num_epochs)
        assert sizes == (2048, 1024, 8, 5, 4)
        assert (config.discount, config.entropy_cost, config.reward_scale) == (0.97, entropy_cost, reward_scale)
        assert tasks.meta_defaults(name, "paper") == (reward_scale, 3e-4)
        learner = tasks.make_unit(name, reward_scale, ppo_settings="paper")
        agent = jax.eval_shape(lambda key: learner.init(key, optax.sgd(0.1)), jax.random.key(0))
        hidden = {part: [layer["kernel"].shape[1] for layer in agent.params[part].values()] for part in agent.params}
        assert hidden["policy"][:-1] == [32] * 4 and hidden["value"] == [64] * 5 + [1]
        assert agent.params["value"]["layer_0"]["kernel"].shape[0] == obs_size


def test_the_small_transfer_is_the_papers_four_robots_at_small_settings():
    config = runs.parse(evaluate.Config, evaluate.PRESETS, "", ["--preset", "transfer"])
    assert set(config.tasks) == {"ant", "humanoid", "inverted_double_pendulum", "walker2d"} and config.ppo == "small"
    for name in config.tasks:
        steps, knobs = tasks.ppo_knobs(name, "small")
        settings = ppo.Config(**knobs)
        steps_per_update = settings.batch_size * settings.num_minibatches * settings.rollout_length
        assert steps_per_update == 4096 and 1e5 <= steps <= 3e5
        assert steps / settings.num_envs > 1000  # an episode of full length ends within a run
        assert tasks.meta_defaults(name) == (settings.reward_scale, 1e-3)


def test_gradients_are_clipped_in_all_tasks_but_catch():
    for name, expected in (("ant", 1.0), ("big_dense_long", 1.0), ("catch", 5.0)):
        optimizer = tasks.clipped(name, optax.sgd(1.0))
        updates, _ = optimizer.update(jnp.array([5.0, -5.0, 0.5]), optimizer.init(jnp.zeros(3)))
        np.testing.assert_allclose(updates, [-expected, expected, -0.5])


def test_reward_scales_of_metrics_are_the_worlds_own():
    config = meta_train.Config(**meta_train.PRESETS["gradient"], tasks=("small_dense_long", "ant"))
    assert meta_train.metric_scales(config) == [1e3, 1.0]
    assert meta_train.metric_scales(dataclasses.replace(config, reward_scale=(7.0,))) == [7.0, 1.0]


def test_what_no_flag_says_depends_on_task_and_estimator():
    names = ("small_dense_long", "big_dense_long", "ant")
    for estimator, alphas, reward_scales in (
        ("gradient", [1e-3, 3e-3, 1e-3], [1e3, 1.0, 0.1]),
        ("nres", [0.1, 0.03, 1e-3], [1.0, 1.0, 0.1]),
    ):
        config = meta_train.Config(tasks=names, estimator=estimator, alpha=())
        assert meta_train.per_task(config, "alpha") == alphas
        assert meta_train.per_task(config, "reward_scale") == reward_scales
    assert meta_train.per_task(dataclasses.replace(config, alpha=(0.5,)), "alpha") == [0.5] * 3
