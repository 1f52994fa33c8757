"""experiments/headroom.py: its rules beside optax, its regression, and who chooses for whom."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs import read_csv

from experiments import headroom
from harness import agents

PARAMS = {
    network: {f"layer_{i}": {"kernel": jnp.full((2, 2), 0.5), "bias": jnp.zeros(2)} for i in range(2)}
    for network in ("policy", "value")
}


def steps(rule, num=3):
    """The updates of PARAMS for three gradients."""
    random, state, updates = np.random.default_rng(0), rule.init(PARAMS), []
    for _ in range(num):
        grads = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), PARAMS)
        update, state = rule.update(grads, state, PARAMS)
        updates.append(update)
    return updates


def rule(**knobs):
    """The rule with all knobs neutral but these; an iteration of PPO has two steps, a run three."""
    table = np.array([list((headroom.NEUTRAL | {"log10_alpha": -2.0, "log10_forget": -2.0} | knobs).values())])
    return headroom.make_rule(2, 0.0, jnp.asarray(table, jnp.float32), num_steps=3)


def assert_close(found, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-9), found, expected)


def test_the_opponents_are_optax_s_adam_and_rmsprop():
    table = jnp.asarray([list(knobs.values()) for knobs in headroom.FAIR.values()], jnp.float32)
    falling = optax.linear_schedule(1e-3, 1e-3 / 1024, 3)
    for name, expected in {
        "adam_0.99_0.003": optax.adam(3e-3, b2=0.99),
        "adam_0.9_falling_0.001": optax.adam(falling, b2=0.9),
        "rmsprop_0.9_0.01": optax.rmsprop(1e-2, 0.9, eps=1e-10, bias_correction=True, eps_in_sqrt=False),
    }.items():
        row = list(headroom.FAIR).index(name)
        assert_close(steps(headroom.make_rule(2, float(row), table, num_steps=3)), steps(expected))


@pytest.mark.parametrize(
    ("knob", "factor"),
    [
        ("log2_value", lambda network, layer, kind: 8.0 if network == "value" else 1.0),
        ("log2_head", lambda network, layer, kind: 8.0 if layer == "layer_1" else 1.0),
        ("log2_bias", lambda network, layer, kind: 8.0 if kind == "bias" else 1.0),
    ],
)
def test_some_tensors_have_a_step_of_their_own(knob, factor):
    scaled = lambda path, x: x * factor(*(key.key for key in path))
    expected = [jax.tree.map_with_path(scaled, update) for update in steps(rule())]
    assert_close(steps(rule(**{knob: 3.0})), expected)


def test_the_step_falls_within_an_iteration_and_over_the_run():
    times = lambda factors: [jax.tree.map(lambda x, f=f: f * x, update) for f, update in zip(factors, steps(rule()))]
    assert_close(steps(rule(log2_epoch=-2.0)), times((1, 0.5, 1)))
    assert_close(steps(rule(log2_end=-1.0)), times((1, 5 / 6, 2 / 3)))


def test_an_update_has_a_largest_rms_and_can_be_in_units_of_the_tensor():
    limited = steps(rule(log2_limit=-2.0), 1)[0]["policy"]["layer_0"]["kernel"]
    np.testing.assert_allclose(np.sqrt(np.mean(limited**2)), 0.01 / 4, rtol=1e-5)
    plain, own = (steps(rule(own_units=power), 1)[0]["policy"]["layer_0"] for power in (0.0, 1.0))
    np.testing.assert_allclose(own["kernel"], plain["kernel"] * 5, rtol=1e-5)  # ten times .5
    np.testing.assert_allclose(own["bias"], plain["bias"] * 0.1, rtol=1e-5)  # zeros count as .01


def test_the_regression_finds_the_best_setting():
    table = headroom.draw(0, 180)
    low, high = np.array(list(headroom.RANGES.values())).T
    top = low + 0.7 * (high - low)
    values = -(((table - top) / (high - low)) ** 2).sum(1) + 0.1 * np.random.default_rng(1).normal(size=180)
    assert (np.abs(headroom.best(table, values) - top) < 0.15 * (high - low)).all()
    assert (table >= low).all() and (table <= high).all()


def test_a_knob_is_worth_what_it_adds_to_its_value_in_adam():
    table, random = headroom.draw(0, 180), np.random.default_rng(1)
    value, b1 = (table[:, list(headroom.RANGES).index(knob)] for knob in ("log2_value", "b1"))
    noise = lambda: 0.01 * random.normal(size=180)
    found = headroom.worth(table, {name: np.exp(0.1 * value - 0.5 * b1 + noise()) for name in "ab"})
    for knob, top, ratio in (("log2_value", 3, np.exp(0.3)), ("b1", 0, np.exp(0.45)), ("own_units", None, 1)):
        best, mean, low, high = found[knob]
        assert top in (None, best) and abs(mean / ratio - 1) < 0.01 and low <= mean <= high and high - low < 0.02
    assert "log10_alpha" not in found


def test_a_robot_has_no_say_in_the_setting_that_the_others_choose_for_it():
    table, random = headroom.draw(0, 60), np.random.default_rng(0)
    areas = {name: random.uniform(1, 2, 60) for name in "abc"}
    areas["b"][7] = np.nan  # diverged: as bad as can be
    before = headroom.choose(table, areas)
    areas["a"] = areas["a"][::-1]
    after = headroom.choose(table, areas)
    for label in ("common", "best_draw"):
        np.testing.assert_array_equal(before["a"][label], after["a"][label])
        assert (before["b"][label] != after["b"][label]).any()
    assert (before["a"]["own"] != after["a"]["own"]).any()
    assert np.isfinite(before["a"]["common"]).all()


def test_the_best_opponent_by_its_tuning_seeds_stands_beside_the_chosen_rules(tmp_path, monkeypatch, capsys):
    calls, best = {}, "rmsprop_0.9_0.001"

    def train(task, optimizer, which, keys, mesh, steps, store):
        """An agent's return is 1, with the best opponent's setting 5."""
        calls[task.name, optimizer.name, len(which)] = np.asarray(jax.random.key_data(keys)).tolist()
        setting = np.asarray(list(headroom.FAIR[best].values()), np.float32)
        returns = [5.0 if (np.asarray(row) == setting).all() else 1.0 for row in optimizer.meta_params]
        return agents.Runs(np.array([10]), np.array(returns)[np.asarray(which, int), None])

    monkeypatch.setattr(agents, "train", train)
    headroom.main(f"--robots ant hopper --draws 40 --seeds 5 --out {tmp_path / 'run'}".split())
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())
    found = {(row["task"], row["optimizer"]): row["area"] for row in rows}
    labels = {"common": 1, "best_draw": 1, "own": 1, "fair": 5}
    assert found == {(robot, label): area for robot in ("ant", "hopper") for label, area in labels.items()}
    assert "common                         0.200 [0.200, 0.200]" in capsys.readouterr().out
    tuning = read_csv(tmp_path / "run" / "tuning.csv")
    assert [float(row[best]) for row in tuning] == [5, 5] and list(tuning[0]) == ["robot", *headroom.FAIR]
    assert len(read_csv(tmp_path / "run" / "draws.csv")) == 40 and len(read_csv(tmp_path / "run" / "settings.csv")) == 6
    # Draws have seeds of their own, all opponents the same two, and all reported agents the same other ones.
    draws, fair = calls["ant", "drawn", 40], calls["ant", "fair", 2 * len(headroom.FAIR)]
    assert len({tuple(key) for key in draws}) == 40 and fair == fair[:2] * len(headroom.FAIR)
    reported = calls["ant", "common", 5]
    assert calls["ant", "fair", 5] == calls["ant", "own", 5] == reported
    assert not {tuple(key) for key in reported} & {tuple(key) for key in draws + fair}
