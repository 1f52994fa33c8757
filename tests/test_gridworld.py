"""Gridworlds and Catch against a simulator in plain Python, which knows rows and columns, and their statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gridworld

SPARSE, DENSE = [(1, 0, 0.05), (-1, 0.5, 0.05)], [(1, 0, 0.5), (-1, 0.5, 0.5)]
TABLE = {  # the paper's: height, width, objects (reward, end probability, respawn probability), horizon
    "small_sparse_short": (3, 8, SPARSE, 50),
    "small_sparse_long": (8, 3, SPARSE, 500),
    "small_dense_short": (4, 6, DENSE, 50),
    "small_dense_long": (6, 4, DENSE, 500),
    "big_sparse_short": (10, 12, [SPARSE[0]] * 2 + [SPARSE[1]] * 2, 50),
    "big_sparse_long": (12, 10, [SPARSE[0]] * 2 + [SPARSE[1]] * 2, 500),
    "big_dense_short": (9, 13, [DENSE[0]] * 2 + [DENSE[1]] * 2, 50),
    "big_dense_long": (13, 9, [DENSE[0]] * 2 + [DENSE[1]] * 2, 500),
}
COMPASS = {0: "", 1: "N", 2: "E", 3: "S", 4: "W", 5: "SW", 6: "SE", 7: "NE", 8: "NW"}


class Simulator:
    """A gridworld as the paper tells it, object by object. Cells are (row, column), None for a collected object."""

    def __init__(self, spec, reset_draws):
        self.height, self.width, self.objects, self.horizon = spec
        self.cells = [(row, column) for row in range(self.height) for column in range(self.width)]
        self.restart(reset_draws)

    def restart(self, draws):
        free = list(self.cells)  # whoever starts takes a cell away
        self.agent, *self.places = [free.pop(int(draw * np.float32(len(free)))) for draw in draws]
        self.time = 0

    def step(self, action, end_draws, respawn_draws, cell_draws, reset_draws):
        row, column = self.agent
        row += ("S" in COMPASS[action]) - ("N" in COMPASS[action])
        column += ("E" in COMPASS[action]) - ("W" in COMPASS[action])
        if 0 <= row < self.height and 0 <= column < self.width:
            self.agent = (row, column)
        reward, done = 0, False
        for i, (value, end_probability, respawn_probability) in enumerate(self.objects):
            if self.places[i] == self.agent:
                reward += value
                done = done or end_draws[i] < end_probability
                self.places[i] = None
            if self.places[i] is None and respawn_draws[i] < np.float32(respawn_probability):
                self.places[i] = self.cells[int(cell_draws[i] * np.float32(len(self.cells)))]
        self.time += 1
        done = bool(done or self.time == self.horizon)
        if done:
            self.restart(reset_draws)
        return reward, done

    def observe(self):
        planes = np.zeros((len(self.objects) + 1, self.height + 2, self.width + 2))
        for plane, place in zip(planes, [*self.places, self.agent]):
            if place is not None:
                plane[place[0] + 1, place[1] + 1] = 1
        return planes


def play(env, keys, actions, state):
    """Successive steps from a state: rewards [T], dones [T], observations [T, ...]."""

    def step(state, inputs):
        state, reward, done = env.step(inputs[0], state, inputs[1])
        return state, (reward, done, env.observe(state))

    return jax.jit(lambda: jax.lax.scan(step, state, (keys, actions)))()[1]


@functools.cache
def random_play(name, num_steps=600, num_envs=300):
    """A random policy: states before each step, actions, rewards, dones, states after it, each [T, N]."""
    env = gridworld.make(name)

    def step(states, key):
        action_key, env_key = jax.random.split(key)
        actions = jax.random.randint(action_key, (num_envs,), 0, env.num_actions)
        after, rewards, dones = jax.vmap(env.step)(jax.random.split(env_key, num_envs), states, actions)
        return after, (states, actions, rewards, dones, after)

    states = jax.vmap(env.reset)(jax.random.split(jax.random.key(1), num_envs))
    scan = jax.jit(lambda keys: jax.lax.scan(step, states, keys)[1])
    return jax.tree.map(np.asarray, scan(jax.random.split(jax.random.key(2), num_steps)))


def assert_frequency(events, probability):
    """Of independent events; five standard deviations: one failure in two million seeds."""
    assert events.size > 500
    assert abs(events.mean() - probability) < 5 * np.sqrt(probability * (1 - probability) / events.size)


def assert_uniform(samples, num_values):
    """Chi-square statistic within five standard deviations of its mean, the degrees of freedom."""
    counts, expected = np.bincount(samples.ravel(), minlength=num_values), samples.size / num_values
    assert counts.size == num_values
    statistic, freedom = np.sum((counts - expected) ** 2 / expected), num_values - 1
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


def test_worlds_are_those_of_the_table():
    worlds = {name: (w.height, w.width, list(w.objects), w.horizon) for name, w in gridworld.GRIDWORLDS.items()}
    assert worlds == TABLE
    assert gridworld.NAMES == (*TABLE, "catch")
    for name, (height, width, objects, _) in TABLE.items():
        env = gridworld.make(name)
        assert (env.obs_shape, env.num_actions) == ((len(objects) + 1, height + 2, width + 2), 9)
    assert (gridworld.make("catch").obs_shape, gridworld.make("catch").num_actions) == ((10, 5), 3)


@pytest.mark.parametrize("name", TABLE)
def test_every_step_is_that_of_a_plain_simulator(name):
    env, spec, num_steps = gridworld.make(name), TABLE[name], 700
    num_objects, reset_key = len(spec[2]), jax.random.key(3)
    keys = jax.random.split(jax.random.key(4), num_steps)
    actions = np.random.default_rng(5).integers(0, 9, num_steps)
    rewards, dones, observations = play(env, keys, actions, env.reset(reset_key))

    draw_keys, reset_keys = jnp.swapaxes(jax.vmap(jax.random.split)(keys), 0, 1)
    draws = np.asarray(jax.vmap(lambda key: jax.random.uniform(key, (3, num_objects)))(draw_keys))
    reset_draws = np.asarray(jax.vmap(lambda key: jax.random.uniform(key, (num_objects + 1,)))(reset_keys))
    simulator = Simulator(spec, np.asarray(jax.random.uniform(reset_key, (num_objects + 1,))))
    np.testing.assert_array_equal(env.observe(env.reset(reset_key)), simulator.observe())
    for t in range(num_steps):
        assert simulator.step(actions[t], *draws[t], reset_draws[t]) == (rewards[t], dones[t]), t
        np.testing.assert_array_equal(observations[t], simulator.observe(), err_msg=str(t))
    assert np.any(dones) and np.any(rewards > 0) and np.any(rewards < 0)  # all was seen


def test_every_step_of_catch_is_that_of_a_plain_simulator():
    env, num_steps = gridworld.make("catch"), 300
    keys = jax.random.split(jax.random.key(6), num_steps)
    actions = np.random.default_rng(7).integers(0, 3, num_steps)
    columns = np.asarray(jax.vmap(lambda key: jax.random.randint(key, (), 0, 5))(keys))
    state = env.reset(keys[0])
    rewards, dones, observations = play(env, keys, actions, state)
    row, column, paddle = 0, columns[0], 2
    for t in range(num_steps):
        row, paddle = row + 1, min(max(paddle + (-1, 0, 1)[actions[t]], 0), 4)
        expected = (0, False) if row < 9 else (1 if column == paddle else -1, True)
        assert (rewards[t], dones[t]) == expected
        if row == 9:
            row, column, paddle = 0, columns[t], 2
        board = np.zeros((10, 5))
        board[row, column] = board[9, paddle] = 1
        np.testing.assert_array_equal(observations[t], board)
    assert dones.sum() == num_steps // 9 and {-1, 1} <= set(rewards.tolist())


@pytest.mark.parametrize("name", ["small_sparse_short", "small_dense_long"])
def test_collection_and_respawn_have_their_probabilities(name):
    _, _, objects, horizon = TABLE[name]
    before, _, rewards, dones, after = random_play(name)
    continues = before.time + 1 < horizon
    assert_frequency(dones[(rewards == -1) & continues], 0.5)  # the bad object alone was collected
    assert not np.any(dones[(rewards == 1) & continues])
    for i, (value, _, respawn) in enumerate(objects):
        absent = before.objects[..., i] == gridworld.ABSENT
        just_collected = (rewards == value) & ~absent
        for there in (absent & ~dones, just_collected & ~dones):
            assert_frequency(after.objects[..., i][there] != gridworld.ABSENT, respawn)
        assert_uniform(after.objects[..., i][absent & ~dones & (after.objects[..., i] >= 0)], 24)


@pytest.mark.parametrize("name", ["small_sparse_short", "big_sparse_long"])
def test_no_episode_outlives_its_horizon(name):
    horizon = TABLE[name][3]
    before, _, _, dones, _ = random_play(name)
    assert before.time.max() == horizon - 1  # so some episodes last that long
    assert np.all(dones[before.time == horizon - 1])
    assert np.all(before.time[1:][dones[:-1]] == 0)


@pytest.mark.parametrize("name", ["small_dense_short", "big_dense_short"])
def test_starts_are_distinct_and_uniform(name):
    height, width, objects, _ = TABLE[name]
    states = jax.jit(jax.vmap(gridworld.make(name).reset))(jax.random.split(jax.random.key(8), 20_000))
    cells = np.concatenate([states.agent[:, None], states.objects], axis=1)  # (20_000, O + 1)
    assert all(len(set(row)) == len(objects) + 1 for row in cells.tolist())
    for column in cells.T:
        assert_uniform(column, height * width)
    apart = (cells[:, 1] - cells[:, 0]) % (height * width)  # given the agent's cell, all others are equally likely
    assert_uniform(apart - 1, height * width - 1)


@pytest.mark.parametrize("name", ["small_dense_long", "big_dense_short"])
def test_nothing_ever_stands_in_the_wall(name):
    height, width, _, _ = TABLE[name]
    before, *_ = random_play(name)
    assert before.agent.min() == 0 and before.agent.max() == height * width - 1
    assert before.objects.min() == gridworld.ABSENT and before.objects.max() == height * width - 1
    observe = jax.jit(jax.vmap(jax.vmap(gridworld.make(name).observe)))
    planes = np.asarray(observe(jax.tree.map(lambda x: x[:100, :50], before)))
    assert not planes[..., [0, -1], :].any() and not planes[..., [0, -1]].any()
    assert np.all(planes[..., -1, :, :].sum((-1, -2)) == 1)  # one agent
    absent = before.objects[:100, :50] == gridworld.ABSENT
    np.testing.assert_array_equal(planes[..., :-1, :, :].sum((-1, -2)), ~absent)  # each object once, or collected


@pytest.mark.parametrize("name", ["small_dense_short", "catch"])
def test_reward_scale_multiplies_every_reward_and_nothing_else(name):
    keys = jax.random.split(jax.random.key(9), 300)
    actions = np.random.default_rng(10).integers(0, 3, 300)
    plain, scaled = (
        play(env, keys, actions, env.reset(keys[0])) for env in (gridworld.make(name), gridworld.make(name, 100.0))
    )
    np.testing.assert_array_equal(scaled[0], 100 * plain[0])
    np.testing.assert_array_equal(scaled[1], plain[1])
    np.testing.assert_array_equal(scaled[2], plain[2])
    assert np.any(plain[0])


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'huge'.*small_sparse_short.*big_dense_long, catch"):
        gridworld.make("huge")


OBJECT = gridworld.Object(1.0, 0.0, 0.5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"objects": ()}, "objects is ().*at least one"),
        ({"height": 1, "width": 1}, "1 x 1 grid is too small"),
        ({"height": 1, "width": 2, "objects": (OBJECT,) * 2}, "1 x 2 grid is too small for an agent and 2"),
        ({"height": -2, "width": -3}, "-2 x -3 grid is too small"),
        ({"horizon": 0}, "horizon is 0"),
        ({"objects": (OBJECT, OBJECT._replace(end_prob=1.5))}, "end_prob of object 1 is 1.5"),
        ({"objects": ((1.0, 0.0, -0.1),)}, "respawn_prob of object 0 is -0.1"),
        ({"objects": (OBJECT._replace(respawn_prob=float("nan")),)}, "respawn_prob of object 0 is nan"),
        ({"objects": (OBJECT._replace(reward=float("inf")),)}, "reward of object 0 is inf"),
    ],
)
def test_a_world_that_makes_no_sense_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        gridworld.make_gridworld(gridworld.World(4, 4, (OBJECT,), 10)._replace(**changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["small_dense_short", "catch"])
def test_types_survive_float64_and_any_reward_scale(name):
    with jax.enable_x64(True):
        env, keys = gridworld.make(name, 100), jax.random.split(jax.random.key(11), 60)
        state = env.reset(keys[0])
        actions = np.random.default_rng(12).integers(0, env.num_actions, 60)  # int64
        rewards, _, observations = play(env, keys, actions, state)  # a scan: each step must keep the state's types
        assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("int32")}
        assert rewards.dtype == "float64" and set(np.abs(rewards).tolist()) <= {0.0, 100.0, 200.0}
        assert observations.dtype == "float32"
    for scale in (2, np.float64(2), jnp.float32(2)):
        env = gridworld.make(name, scale)
        reward = jax.eval_shape(env.step, keys[0], env.reset(keys[0]), 0)[1]
        assert reward.dtype == "float32" and not reward.weak_type


def test_truncation_is_told_where_the_horizon_alone_ends_an_episode():
    plain, told = gridworld.make("small_dense_short"), gridworld.make("small_dense_short", truncation=True)
    keys = jax.random.split(jax.random.key(0), 64)
    steps = {"plain": jax.jit(jax.vmap(plain.step)), "told": jax.jit(jax.vmap(told.step))}
    states, ends = jax.vmap(plain.reset)(keys), {"truncated": 0, "ended": 0}
    for t in range(120):
        step_keys = jax.vmap(lambda key, t=t: jax.random.fold_in(key, t))(keys)
        actions = jax.random.randint(jax.random.fold_in(keys[0], t), (64,), 0, 9)
        times, expected = states.time, steps["plain"](step_keys, states, actions)
        *found, truncated = steps["told"](step_keys, states, actions)
        jax.tree.map(np.testing.assert_array_equal, tuple(found), expected)
        states, _, dones = expected
        assert not np.any(truncated & ~(dones & (times == 49)))
        ends = {"truncated": ends["truncated"] + truncated.sum(), "ended": ends["ended"] + (dones & ~truncated).sum()}
    assert ends["truncated"] > 5 and ends["ended"] > 50
