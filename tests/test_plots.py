"""Pictures: the numbers that they are drawn from, and that they are drawn."""

import csv
import itertools

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pipeline
from experiments import figure2
from harness import agents, plots, runs


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_picture_of_resets_is_reset_due_enumerated():
    due, age = figure2.reset_table(num_units=5, reset_interval=7, num_steps=21)
    for unit, step in itertools.product(range(5), range(21)):
        assert due[unit, step] == bool(pipeline.reset_due(step, unit, 5, 7))
        resets = [s for s in range(step + 1) if pipeline.reset_due(s, unit, 5, 7)]
        assert age[unit, step] == step - (resets[-1] if resets else 0)
    assert (due.sum(1) == 3).all() and age.max() == 6


def test_figure2_is_a_picture(tmp_path):
    figure2.main(["--out", str(tmp_path)])
    assert is_png(tmp_path / "figure2.png")
    for flags, message in (
        (["--num-units", "0"], "--num-units is 0"),
        (["--out", "/proc/nowhere"], "cannot write /proc"),
    ):
        with pytest.raises(runs.UsageError, match=message):
            figure2.main(flags)


def write_curves(folder, optimizer, num_runs=2):
    folder.mkdir()
    with open(folder / "curves.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "optimizer", "alpha", "run", "step", "episode_return"])
        for run, step in itertools.product(range(num_runs), (10, 20, 30)):
            writer.writerow(["catch", optimizer, 0.1, run, step, run + step / 10])
    return folder


def test_learning_curves_are_read_from_several_folders_and_drawn(tmp_path):
    folders = [write_curves(tmp_path / name, name) for name in ("star", "adam")]
    curves = plots.read_curves(folders)
    assert list(curves) == [("catch", "star"), ("catch", "adam")]
    steps, returns = curves["catch", "star"]
    np.testing.assert_array_equal(steps, [10, 20, 30])
    np.testing.assert_array_equal(returns, [[1, 2, 3], [2, 3, 4]])
    assert is_png(plots.learning_curves(tmp_path / "out" / "figure3.png", folders))


def test_the_legend_names_every_curve_also_those_of_one_panel_only(tmp_path, monkeypatch):
    first, second = write_curves(tmp_path / "a", "adam"), write_curves(tmp_path / "b", "star")
    (second / "curves.csv").write_text((second / "curves.csv").read_text().replace("catch", "ant"))
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    plots.learning_curves(tmp_path / "c.png", [first, second])
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["adam", "star"]


def test_each_optimizer_has_a_look_of_its_own():
    looks = {tuple(plots.style(name).values()) for name in agents.NAMES if name not in agents.VARIANTS}
    assert len(looks) == len(agents.NAMES) - len(agents.VARIANTS)


def test_bad_curves_are_refused(tmp_path):
    folder = write_curves(tmp_path / "a", "adam")
    for folders, message in (([tmp_path / "b"], "evaluate.py --out"), ([folder, folder], "in two folders")):
        with pytest.raises(runs.UsageError, match=message):
            plots.read_curves(folders)
    (folder / "curves.csv").write_text("task,optimizer\na,b\n")
    with pytest.raises(runs.UsageError, match="not a curves.csv"):
        plots.read_curves([folder])


def test_the_learned_step_of_rmsprop_is_its_warm_up():
    steps = plots.learned_step(optax.rmsprop(1.0, decay=0.9), [0.5, 3.0], 4)
    expected = 1 / np.sqrt(1 - 0.9 ** np.arange(1, 5))
    np.testing.assert_allclose(steps, np.stack([expected, expected], axis=1), rtol=1e-4)
    assert jnp.ndim(steps) == 2
