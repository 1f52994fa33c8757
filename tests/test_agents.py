"""Fresh agents: their curves, how they are tuned, and what is kept of them."""

import gc
import signal
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import brax_env
import meta_train
import ppo
from harness import agents, kept, runs, stops, tasks, weights
from learned_optimizers import velo


@pytest.fixture(scope="module")
def mesh():
    return jax.sharding.Mesh(jax.devices("cpu")[:2], ("units",))


def test_points_without_an_ended_episode_take_the_value_before():
    sums, episodes = np.array([[0.0, 6.0, 0.0, 4.0]]), np.array([[0, 2, 0, 1]])
    np.testing.assert_array_equal(agents.mean_returns(sums, episodes, np.ones((1, 4))), [[3.0, 3.0, 3.0, 4.0]])


def test_a_run_too_short_for_a_fifth_is_tabled_by_its_last_point():
    returns = np.arange(14.0).reshape(2, 7)
    for num_points, expected in ((1, [0, 7]), (2, [1, 8]), (7, [6, 13])):
        result = agents.Runs(np.arange(num_points), returns[:, :num_points])
        np.testing.assert_array_equal(result.final(), expected)


def test_an_agent_whose_parameters_are_not_finite_has_no_return(mesh):
    task, keys = tasks.make("catch", 4), jax.random.split(jax.random.key(0), 2)
    result = agents.train(task, agents.Optimizer("adam"), [1e-3, np.inf], keys, mesh, steps=800)
    assert np.isfinite(result.returns[0]).all() and np.isnan(result.returns[1]).any()
    assert np.isnan(result.area()[1])


def test_a_diverged_candidate_is_never_chosen(mesh):
    task = tasks.make("catch", 4)
    result = agents.tuned(task, agents.Optimizer("sign_descent"), [np.inf, 1e-3], 2, jax.random.key(0), mesh, 800)
    assert result.alpha == 1e-3 and np.isfinite(result.tuning_area)


def test_what_the_store_holds_is_not_run_again_and_another_shape_is(mesh):
    task, keys, saved = tasks.make("catch", 4), jax.random.split(jax.random.key(0), 3), []
    held = np.ones((3, 10))
    wrong_shape = np.ones((3, 7))
    store = agents.Store(lambda run, alpha: {0: held, 1: wrong_shape}.get(run), lambda run, *rest: saved.append(run))
    result = agents.train(task, agents.Optimizer("adam"), [1e-3] * 3, keys, mesh, steps=800, store=store)
    assert saved == [1, 2] and result.returns.shape == (3, 10)
    np.testing.assert_array_equal(result.returns[0], 1.0)


def test_programs_of_earlier_optimizers_are_let_go(mesh):
    """Else a process that tests many optimizers on robots runs out of memory maps."""
    task, names = tasks.make("catch", 4), ("adam", "rmsprop", "sign_descent", "adam_0.9_corrected", "rmsprop_0.99")
    programs = [weakref.ref(agents._compiled(task, agents.make_rule(name), mesh, 1)[1]) for name in names]
    gc.collect()
    assert programs[0]() is None and programs[-1]() is not None


@pytest.mark.parametrize("change", ["nothing", "other runs", "damaged"])
def test_agents_under_way_continue_where_they_were_kept(mesh, tmp_path, change):
    """To the same bits; a group of other runs, or a damaged file, is not taken, and the runs are made again."""
    task, keys, points = tasks.make("catch", 4), jax.random.split(jax.random.key(0), 3), []

    def train(alphas, stop_after=None):
        store = kept.kept_runs(tmp_path, task, "adam", 0.0, "report")  # kept at every point

        def keep(which, state):
            store.keep(which, state)
            points.append(int(state[-1]))
            if len(points) == stop_after:
                signal.raise_signal(signal.SIGTERM)

        with stops.graceful_stop("to continue"):
            return agents.train(task, agents.Optimizer("adam"), alphas, keys, mesh, 800, store._replace(keep=keep))

    alphas = [1e-3, 1e-2, 1e-2]
    expected = agents.train(task, agents.Optimizer("adam"), alphas, keys, mesh, 800)
    with pytest.raises(SystemExit, match="143"):
        train(alphas, stop_after=5)
    (under_way,) = (tmp_path / "runs").iterdir()
    if change == "damaged":
        content = bytearray(under_way.read_bytes())
        content[len(content) // 2] ^= 1
        under_way.write_bytes(content)
    if change == "other runs":
        alphas = [1e-2, 1e-3, 1e-2]
        expected = agents.train(task, agents.Optimizer("adam"), alphas, keys, mesh, 800)
    points.clear()
    np.testing.assert_array_equal(train(alphas).returns, expected.returns)
    first = 6 if change == "nothing" else 1
    assert points == [*range(first, 11), *range(1, 11)]  # of ten; two of the three runs side by side, then the third
    assert not under_way.exists() and len(list((tmp_path / "runs").glob("*.npz"))) == 3


def robot(evaluations):
    """A toy for PPO: its action should be the number that it sees. Episodes of four steps."""

    def step(key, state, action):
        time, x = state
        return (time + 1, x), -((x - action[0]) ** 2), (time + 1) % 4 == 0, jnp.array(False)

    reset = lambda key: (jnp.int32(0), jax.random.uniform(key, (), minval=-0.5, maxval=0.5))
    env = brax_env.Env(reset, step, lambda state: jnp.stack([state[1], 1.0]), (2,), 1, "toy")
    small = dict(num_envs=8, batch_size=8, num_minibatches=2, rollout_length=6, num_epochs=2)
    learner = ppo.make(env, ppo.Config(**small, policy_hidden=(8,), value_hidden=(8,)))
    play = jax.jit(lambda agent, key, num: tasks.play(env, agent.params, agent.obs_stats, key, num), static_argnums=2)
    return tasks.Task("toy", learner, 96, 4, 960, (1e-2,), play, evaluations, 5)


def test_a_robot_is_scored_by_episodes_without_noise_which_change_nothing_in_its_training(mesh):
    """Ten points, four evaluations: at the last point the agents that the run leaves, from the first states of the run."""
    saved, keys = {False: [], True: []}, jax.random.split(jax.random.key(0), 2)
    for scored in saved:
        store = kept.Store(save=lambda run, alpha, curves, agent: saved[scored].append((curves, agent)))
        task = robot(4 * scored)
        result = agents.train(task, agents.Optimizer("adam"), [1e-2, np.inf], keys, mesh, store=store)
    np.testing.assert_array_equal(result.steps, 96 * np.array([3, 5, 8, 10]))
    for key, (unscored, _), (curves, agent) in zip(keys, *saved.values()):
        np.testing.assert_array_equal(curves[:3], unscored)
        assert np.flatnonzero(~np.isnan(curves[3])).tolist() == [2, 4, 7, 9]
        expected = task.play(agent, jax.random.fold_in(key, 2), 5).mean()
        np.testing.assert_allclose(curves[3, -1], expected, rtol=1e-6)
    np.testing.assert_array_equal(result.returns[0], saved[True][0][0][3, [2, 4, 7, 9]])
    assert np.isnan(result.returns[1]).all()  # it diverged
    assert (-4 < result.returns[0]).all() and (result.returns[0] < 0).all()


def test_agents_of_one_run_share_no_random_numbers():
    """A key of the updates is never the key of the initialisation, nor of another point."""
    key = jax.random.key(3)
    init_key, updates_key = jax.random.split(key)
    used = [jax.random.split(jax.random.fold_in(updates_key, point), 7) for point in range(50)]
    evaluation_key = jax.random.fold_in(key, 2)
    data = np.concatenate([jax.random.key_data(keys) for keys in (init_key[None], evaluation_key[None], *used)])
    assert len({tuple(row) for row in data.tolist()}) == 2 + 50 * 7


def test_sign_descent_is_raw_optim4rl_without_learned_weights():
    learned = agents.make_rule("untrained_optim4rl")(0.1, agents.untrained("optim4rl", jax.random.key(0)).meta_params)
    plain, grads = agents.make_rule("sign_descent")(0.1, None), {"w": jnp.array([[1e-3, -2.0], [0.5, 0.0]])}
    updates = [optimizer.update(grads, optimizer.init(grads))[0]["w"] for optimizer in (learned, plain)]
    np.testing.assert_allclose(*updates, rtol=1e-6)


def test_normalised_inputs_are_the_gradient_over_its_root_mean_square():
    def seen(inputs):  # what the learned rule is given: one that returns its input tells
        return agents.normalised(optax.identity()) if inputs else optax.identity()

    optimizer, v = seen(True), np.zeros(3)
    state = optimizer.init(jnp.zeros(3))
    for t in range(1, 30):
        g = np.random.default_rng(t).normal(size=3).astype(np.float32) * [1e-4, 1e-3, 1.0]
        updates, state = optimizer.update(jnp.asarray(g, jnp.float32), state)
        v = 0.99 * v + 0.01 * g**2
        expected = np.clip(g / np.sqrt(v / (1 - 0.99**t) + 1e-10), -10, 10)
        np.testing.assert_allclose(updates, expected, rtol=2e-3)


@pytest.mark.parametrize("name", agents.NAMES)
def test_every_name_is_an_optimizer_that_moves_parameters_downhill(name):
    meta_params = (
        agents.LEARNED[base].init(jax.random.key(0))
        if (base := agents.UNTRAINED.get(name, name)) in agents.LEARNED
        else None
    )
    for inputs in agents.INPUTS:
        optimizer, params = agents.make_rule(name, inputs)(0.1, meta_params), {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
        updates, _ = optax.with_extra_args_support(optimizer).update(params, optimizer.init(params), params, value=1.0)
        if base == "velo":  # downhill is what it must learn
            assert all(leaf.all() and jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
        else:
            assert all((leaf < 0).all() for leaf in jax.tree.leaves(updates))


def test_velo_knows_the_length_of_the_run_and_has_no_learning_rate():
    meta_params, params = velo.init_meta_params(jax.random.key(0), 16, 8), {"w": jnp.ones(3)}
    expected = velo.velo(7, meta_params, learning_rate=0.5)
    optimizer = agents.make_rule("untrained_velo", "normalised", 7)(0.5, meta_params)
    updates = [x.update(params, x.init(params), params, value=1.0)[0]["w"] for x in (optimizer, expected)]
    np.testing.assert_array_equal(*updates)
    for name in ("velo", "untrained_velo"):
        assert agents.learning_rates(agents.Optimizer(name), [0.1, 1e-3]) == [1.0]
    for of_default in ({}, {"alpha": ()}):
        assert meta_train.per_task(meta_train.Config(optimizer="velo", **of_default), "alpha") == [1.0, 1.0]
    with pytest.raises(runs.UsageError, match="--alpha is 0.5; VeLO has no alpha: give --alpha 1"):
        meta_train.per_task(meta_train.Config(optimizer="velo", alpha=(0.5,)), "alpha")


def test_a_unit_s_planned_steps_count_those_of_its_agent():
    assert tasks.unit_steps("catch", "small", 63, 4) == 63 * 4
    assert tasks.unit_steps("ant", "small", 5, 4) == 5 * 4 * 2 * 4  # 2 epochs of 4 minibatches


def test_a_policy_comes_back_as_it_was_kept(tmp_path):
    stats = ppo.init_obs_stats(3)._asdict()
    layers = ppo.init_mlp(jax.random.key(0), (3, 4, 2))
    weights.save(tmp_path / "a.npz", {"policy": layers, "obs_stats": stats}, {"task": "ant"}, kept.POLICY_KIND)
    params, found, metadata = kept.load_policy(tmp_path / "a.npz")
    jax.tree.map(np.testing.assert_array_equal, (params["policy"], found._asdict()), (layers, stats))
    assert metadata == {"task": "ant"}
