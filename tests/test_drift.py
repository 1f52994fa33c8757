"""Figures 1 and 5: their numbers against hand-computed ones, their files, and digits read from a file."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import drift
from harness import runs, tasks


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def digits(tmp_path):
    """A file of forty 5 x 4 images, and the arrays in it."""
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (40, 5, 4), np.uint8), random.integers(0, 10, 40).astype(np.uint8)
    np.savez(tmp_path / "digits.npz", x_train=images, y_train=labels)
    return tmp_path / "digits.npz", images, labels


def test_drift_is_the_mean_distance_of_three_point_masses():
    edges, counts = np.arange(5.0), np.zeros((3, 4))
    counts[0, 0], counts[1, 1], counts[2, 3] = 7, 2, 5  # distances 1, 3, 2, whatever the number of scalars
    assert drift.drift(counts, edges) == pytest.approx(2)
    counts[:] = [[1, 1, 0, 0], [0, 2, 0, 0], [0, 1, 1, 0]]  # half a mass moved by 1, twice; both halves by 1
    assert drift.drift(counts, edges) == pytest.approx((0.5 + 1 + 0.5) / 3)


def test_histogram_is_that_of_numpy_with_the_ends_taking_the_rest():
    random = np.random.default_rng(1)
    grads = {"a": random.normal(size=(30, 20)) * 10.0 ** random.uniform(-9, 3, (30, 20)), "b": np.zeros(5)}
    flat = np.concatenate([x.ravel() for x in grads.values()]).astype(np.float32)
    logs = np.clip(np.log10(np.abs(flat) + np.float32(1e-8)), -8, 2)
    expected, _ = np.histogram(logs, drift.EDGES)
    counts = np.asarray(drift.histogram(jax.tree.map(jnp.float32, grads)))
    assert counts.sum() == 605 and np.abs(counts - expected).sum() <= 4  # logarithms at an edge may round either way


def test_the_recorder_sees_the_gradient_of_the_agent_and_changes_nothing():
    config = drift.Config(num_envs=2)
    step, init = drift.a2c_step(config)
    init_key, key = jax.random.split(jax.random.key(0))
    agent_state, learner = init(init_key), tasks.make("big_dense_long", 2).learner
    recorded, counts = step(agent_state, key)
    grads = jax.jit(jax.grad(lambda p: learner.loss(agent_state._replace(params=p), key)[0]))(agent_state.params)
    assert int(counts.sum()) == sum(x.size for x in jax.tree.leaves(grads))
    assert np.abs(counts - drift.histogram(grads)).sum() <= 4  # another order of sums, at a bin's edge
    optimizer = optax.chain(optax.clip(1.0), optax.rmsprop(1e-3))
    plain = agent_state._replace(opt_state=optimizer.init(agent_state.params))
    plain, _ = jax.jit(lambda a, k: learner.update(optimizer, a, k))(plain, key)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), recorded.params, plain.params)


def test_digits_are_read_as_they_were_written(digits):
    path, images, labels = digits
    x, y = drift.load_mnist(path)
    np.testing.assert_array_equal(x, np.float32(images.reshape(40, 20) / 255))
    np.testing.assert_array_equal(y, labels)


@pytest.mark.parametrize("fault", ["missing", "no npz", "damaged", "text", "other names"])
def test_bad_digits_end_with_one_line_that_names_them(digits, fault):
    path, images, labels = digits
    if fault == "missing":
        path.unlink()
    elif fault == "no npz":
        path.write_text("not digits")
    elif fault == "damaged":
        np.savez_compressed(path, x_train=np.random.default_rng(0).integers(0, 9, (40, 99)), y_train=labels)
        content = bytearray(path.read_bytes())
        content[200:260] = bytes(60)
        path.write_bytes(content)
    else:
        np.savez(path, **{"x_train" if fault == "text" else "x": "digits", "y_train": labels})
    with pytest.raises(runs.UsageError, match=str(path)) as error:
        drift.load_mnist(path)
    assert "\n" not in str(error.value)


def test_missing_scikit_learn_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(runs.UsageError, match="pip install scikit-learn, or give --mnist FILE.npz"):
        drift.load_digits()


def test_scikit_learns_digits_are_64_shades():
    pytest.importorskip("sklearn")
    images, labels = drift.load_digits()
    assert images.shape == (1797, 64) and images.min() == 0 and images.max() == 1 and set(labels) == set(range(10))


def test_the_program_draws_what_it_counted(digits, tmp_path, capsys):
    folder = tmp_path / "run"
    flags = f"figure5 --mnist {digits[0]} --updates 6 --batch-size 8 --seeds 2 --out {folder}"
    drift.main(flags.split())
    with np.load(folder / "histograms.npz") as file:
        counts, edges = file["counts"], file["edges"]
    assert counts.shape == (2, 3, 100) and (counts.sum(2) == 20 * 32 + 32 + 32 * 10 + 10).all()
    low, high = sorted(drift.drift(life, edges) for life in counts)  # the interval of two seeds
    printed = f"{(low + high) / 2:.2f} [{low:.2f}, {high:.2f}] decades"
    assert low < high and is_png(folder / "drift.png") and printed in capsys.readouterr().out
    assert json.loads((folder / "config.json").read_text())["config"]["updates"] == 6


@pytest.mark.parametrize(
    "flags, message",
    [
        (["figure1", "--updates", "0"], "--updates is 0"),
        (["figure1", "--seed", "-1"], "--seed is -1"),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(runs.UsageError, match=message):
        drift.main(flags)
    assert not list(tmp_path.iterdir())


def test_finished_lives_survive_a_stop_and_the_figure_is_that_of_an_undisturbed_run(tmp_path, monkeypatch):
    config = drift.Config("figure5", updates=4, seeds=2, batch_size=8, network="conv", clip=0.0)
    monkeypatch.setattr(
        drift, "load_digits", lambda: (np.float32(np.random.default_rng(0).random((20, 16))), np.arange(20) % 10)
    )
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = drift.collect(config, tmp_path / "whole")
    live, calls = drift.phase_histograms, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 2:
            raise SystemExit(143)
        return live(*args)

    monkeypatch.setattr(drift, "phase_histograms", stopped)
    with pytest.raises(SystemExit):
        drift.collect(config, tmp_path / "stopped")
    np.testing.assert_array_equal(drift.collect(config, tmp_path / "stopped"), whole)
    assert len(calls) == 3  # the first life was kept
    assert whole.shape[:2] == (2, 3) and not list(tmp_path.glob("*/life_*"))
    number = 16 * (3 * 3 + 1) + (2 * 2 * 16 + 1) * 32 + 33 * 10  # of parameters: convolution, two layers
    assert whole[0, 0].sum() == number
