"""The figures' numbers against hand-computed ones, their files, and the reading of MNIST from files made here."""

import csv
import gzip
import itertools
import json
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import a2c
import cli
import compare
import figures
import gradients
import gridworld
import pipeline


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def write_idx(path, array):
    data = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


@pytest.fixture
def digits(tmp_path):
    """ "IMAGES,LABELS" of forty 5 x 4 images, and the arrays: IDX files, one gzipped."""
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (40, 5, 4), np.uint8), random.integers(0, 10, 40).astype(np.uint8)
    files = write_idx(tmp_path / "images.gz", images), write_idx(tmp_path / "labels", labels)
    return ",".join(files), images, labels


def test_drift_is_the_mean_distance_of_three_point_masses():
    edges, counts = np.arange(5.0), np.zeros((3, 4))
    counts[0, 0], counts[1, 1], counts[2, 3] = 7, 2, 5  # distances 1, 3, 2, whatever the number of scalars
    assert figures.drift(counts, edges) == pytest.approx(2)
    counts[:] = [[1, 1, 0, 0], [0, 2, 0, 0], [0, 1, 1, 0]]  # half a mass moved by 1, twice; both halves by 1
    assert figures.drift(counts, edges) == pytest.approx((0.5 + 1 + 0.5) / 3)


def test_histogram_is_that_of_numpy_with_the_ends_taking_the_rest():
    random = np.random.default_rng(1)
    grads = {"a": random.normal(size=(30, 20)) * 10.0 ** random.uniform(-9, 3, (30, 20)), "b": np.zeros(5)}
    flat = np.concatenate([x.ravel() for x in grads.values()]).astype(np.float32)
    logs = np.clip(np.log10(np.abs(flat) + np.float32(1e-8)), -8, 2)
    expected, _ = np.histogram(logs, gradients.EDGES)
    counts = np.asarray(gradients.histogram(jax.tree.map(jnp.float32, grads)))
    assert counts.sum() == 605 and np.abs(counts - expected).sum() <= 4  # logarithms at an edge may round either way


def test_the_recorder_sees_the_gradient_of_the_agent_and_changes_nothing():
    config = figures.Config(num_envs=2)
    step, agent_state, key = gradients.a2c_step(config)
    recorded, counts = step(agent_state, key)
    learner = a2c.make(gridworld.make("big_dense_long"), a2c.Config(num_envs=2))
    grads = jax.jit(jax.grad(lambda p: learner.loss(agent_state._replace(params=p), key)[0]))(agent_state.params)
    assert int(counts.sum()) == sum(x.size for x in jax.tree.leaves(grads))
    assert np.abs(counts - gradients.histogram(grads)).sum() <= 4  # another order of sums, at a bin's edge
    optimizer = optax.chain(optax.clip(1.0), optax.rmsprop(1e-3))
    plain = agent_state._replace(opt_state=optimizer.init(agent_state.params))
    plain, _ = jax.jit(lambda a, k: learner.update(optimizer, a, k))(plain, key)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), recorded.params, plain.params)


def test_idx_files_and_npz_files_give_the_same_digits(digits, tmp_path):
    files, images, labels = digits
    np.savez(tmp_path / "mnist.npz", x_train=images, y_train=labels)
    for source in (files, str(tmp_path / "mnist.npz")):
        x, y = gradients.load_mnist(source)
        np.testing.assert_array_equal(x, np.float32(images.reshape(40, 20) / 255))
        np.testing.assert_array_equal(y, labels)


FAULTS = ("missing", "truncated", "no idx", "labels first", "one file", "short gzip", "text as npz")


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_digits_end_with_one_line_that_names_them(digits, tmp_path, fault):
    files, images, labels = digits
    first, second = files.split(",")
    bad = tmp_path / "bad.npz"
    bad.write_text("not digits")
    if fault == "truncated":
        write_idx(tmp_path / "labels", labels)
        (tmp_path / "labels").write_bytes((tmp_path / "labels").read_bytes()[:-3])
    if fault == "short gzip":
        (tmp_path / "images.gz").write_bytes((tmp_path / "images.gz").read_bytes()[:50])
    changed = {"missing": f"{first},nowhere", "no idx": f"{first},{bad}", "labels first": f"{second},{first}"}
    changed |= {"one file": first, "text as npz": str(bad)}
    source = changed.get(fault, files)
    with pytest.raises(cli.UsageError) as error:
        gradients.load_mnist(source)
    assert source in str(error.value) and "\n" not in str(error.value)


def test_missing_scikit_learn_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(cli.UsageError, match="pip install scikit-learn, or give files of MNIST"):
        gradients.load_digits()


def test_scikit_learns_digits_are_64_shades():
    pytest.importorskip("sklearn")
    images, labels = gradients.load_digits()
    assert images.shape == (1797, 64) and images.min() == 0 and images.max() == 1 and set(labels) == set(range(10))


def test_figure5_is_made_from_files_once_and_then_drawn_again(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # no results/figure1 there: one panel
    flags = ["figure5", "--mnist", digits[0], "--updates", "6", "--batch-size", "8", "--seeds", "2"]
    figures.main(flags)
    folder = tmp_path / "results" / "figure5"
    counts, edges = figures.read_histograms(folder)
    assert counts.shape == (2, 3, 100) and (counts.sum(2) == 20 * 32 + 32 + 32 * 10 + 10).all()
    low, high = sorted(figures.drift(life, edges) for life in counts)  # the interval of two seeds
    printed = f"{(low + high) / 2:.3f} [{low:.3f}, {high:.3f}] decades"
    assert low < high and is_png(folder / "figure5.png") and printed in capsys.readouterr().out
    assert json.loads((folder / "config.json").read_text())["config"]["updates"] == 6
    monkeypatch.setattr(gradients, "supervised_step", None)  # not called again
    figures.main(["figure5", "--out", str(tmp_path / "again")])
    assert is_png(tmp_path / "again" / "figure5.png")
    with pytest.raises(cli.UsageError, match="--updates 6, not 7"):
        figures.main(["figure5", "--updates", "7"])


def test_the_picture_of_resets_is_reset_due_enumerated():
    due, age = figures.reset_table(num_units=5, reset_interval=7, num_steps=21)
    for unit, step in itertools.product(range(5), range(21)):
        assert due[unit, step] == bool(pipeline.reset_due(step, unit, 5, 7))
        resets = [s for s in range(step + 1) if pipeline.reset_due(s, unit, 5, 7)]
        assert age[unit, step] == step - (resets[-1] if resets else 0)
    assert (due.sum(1) == 3).all() and age.max() == 6


def test_figure2_is_a_picture(tmp_path):
    figures.main(["figure2", "--out", str(tmp_path)])
    assert is_png(tmp_path / "figure2.png")


def write_curves(folder, optimizer, runs=2):
    folder.mkdir()
    with open(folder / "curves.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "optimizer", "alpha", "run", "step", "episode_return"])
        for run, step in itertools.product(range(runs), (10, 20, 30)):
            writer.writerow(["catch", optimizer, 0.1, run, step, run + step / 10])
    return folder


def test_learning_curves_are_read_from_several_folders_and_drawn(tmp_path):
    folders = [str(write_curves(tmp_path / name, name)) for name in ("star", "adam")]
    curves = figures.read_curves(folders)
    assert list(curves) == [("catch", "star"), ("catch", "adam")]
    steps, returns = curves["catch", "star"]
    np.testing.assert_array_equal(steps, [10, 20, 30])
    np.testing.assert_array_equal(returns, [[1, 2, 3], [2, 3, 4]])
    figures.main(["figure3", "--results", ",".join(folders), "--out", str(tmp_path / "out")])
    assert is_png(tmp_path / "out" / "figure3.png")
    assert len(set(compare.COLORS.values())) == len(compare.OPTIMIZERS)  # each optimizer has a colour of its own


def test_bad_curves_are_refused(tmp_path):
    folder = write_curves(tmp_path / "a", "adam")
    for folders, message in (([tmp_path / "b"], "evaluate.py --out"), ([folder, folder], "in two folders")):
        with pytest.raises(cli.UsageError, match=message):
            figures.read_curves(folders)
    (folder / "curves.csv").write_text("task,optimizer\na,b\n")
    with pytest.raises(cli.UsageError, match="not a curves.csv"):
        figures.read_curves([folder])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["figure6"], "'figure6'; known: figure1, figure2"),
        ([], "no figure named"),
        (["figure1", "--updates", "0"], "--updates is 0"),
        (["figure2", "--num-units", "0"], "--num-units is 0"),
        (["figure1", "--results", "a,b"], "takes one folder"),
        (["figure5", "--mnist", "x"], "--mnist is 'x'; give IMAGES,LABELS"),
        (["figure2", "--out", "/proc/nowhere"], "cannot write /proc/nowhere"),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(cli.UsageError, match=message):
        figures.main(flags)
    assert not list(tmp_path.iterdir())
