"""The quadratic on which resets are compared: its parts against NumPy, and the result that its table shows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import pipeline_toy
from harness import runs

CONFIG = pipeline_toy.Config(num_units=16, meta_steps=189)


def test_a_life_is_a_numpy_loop():
    step = lambda age: 0.3 / (1 + age)
    init_key, life_key = jax.random.split(jax.random.split(jax.random.key(99), 1)[0])
    curvatures = np.logspace(-2, 0, 24)
    params, losses = np.array(jax.random.normal(init_key, (24,)), float), []
    for age, key in enumerate(jax.random.split(life_key, 252)):
        noise = 0.3 * np.sqrt(curvatures) * np.array(jax.random.normal(key, (24,)))
        params -= step(age) * np.sign(curvatures * params + noise)
        losses.append(np.sum(curvatures * params**2) / 2)
    np.testing.assert_allclose(pipeline_toy.life_loss(step, num_agents=1), np.mean(losses), rtol=1e-4)


def test_the_step_size_is_the_exponential_of_nine_clocks():
    theta, age = np.random.default_rng(0).normal(size=9), 10
    clocks = [1, *(np.exp(-age / 2**i) for i in range(1, 9))]
    np.testing.assert_allclose(pipeline_toy.step_size(jnp.array(theta), age), 0.05 * np.exp(theta @ clocks), rtol=1e-5)


@pytest.fixture(scope="module")
def references():
    return pipeline_toy.references()


@pytest.mark.parametrize("estimator", pipeline_toy.ESTIMATORS)
def test_staggered_resets_beat_none_by_a_wide_margin(estimator, references):
    constant, _, hand_made = references
    losses = {}
    for resets in ("staggered", "none"):
        task = pipeline_toy.make_task(estimator, resets, CONFIG)
        meta_optimizer = pipeline_toy.make_meta_optimizer("0.03", CONFIG.meta_steps)
        theta = pipeline_toy.meta_train(task, meta_optimizer, CONFIG, seed=0)
        losses[resets] = pipeline_toy.life_loss(lambda age: pipeline_toy.step_size(theta, age)) / constant
    assert losses["staggered"] < 0.5 and losses["none"] > 2 * losses["staggered"]
    assert hand_made / constant < losses["staggered"] + 0.05  # no better than a good schedule, but for luck


def test_the_table_and_the_picture_have_every_setting(tmp_path, references):
    settings = [(e, r, x) for e in pipeline_toy.ESTIMATORS for r in pipeline_toy.RESETS for x in pipeline_toy.RATES]
    rows = [dict(zip(pipeline_toy.COLUMNS, (*setting, i, x))) for setting in settings for i, x in enumerate((0.5, 200))]
    assert pipeline_toy.table(rows).count("> 100") == 2 * len(settings)  # the mean and the largest
    learned = {setting: jnp.zeros((2, 9)) for setting in settings}
    path = pipeline_toy.draw(tmp_path / "toy.png", learned, references[1])
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_bad_sizes_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(runs.UsageError, match="--num-units is 0"):
        pipeline_toy.main(["--num-units", "0"])
    assert not list(tmp_path.iterdir())
