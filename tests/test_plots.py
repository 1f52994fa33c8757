"""Pictures: the numbers that they are drawn from, and that they are drawn."""

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


def result(task, optimizer, num_runs=2):
    returns = np.arange(num_runs)[:, None] + np.array([1.0, 2.0, 3.0])
    return {(task, optimizer): agents.Tuned(0.1, agents.Runs(np.array([10, 20, 30]), returns), np.nan)}


def test_learning_curves_are_a_picture(tmp_path):
    results = result("catch", "star") | result("catch", "adam") | result("ant", "adam")
    assert is_png(plots.learning_curves(tmp_path / "out" / "curves.png", results))


def test_the_legend_names_every_curve_also_those_of_one_panel_only(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    plots.learning_curves(tmp_path / "c.png", result("catch", "adam") | result("ant", "star"))
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["adam", "star"]
    (line,) = figures[0].axes[0].get_lines()
    np.testing.assert_array_equal(line.get_xydata(), [[10, 1.5], [20, 2.5], [30, 3.5]])


def test_each_optimizer_has_a_look_of_its_own():
    looks = {tuple(plots.style(name).values()) for name in agents.NAMES if name not in agents.VARIANTS}
    assert len(looks) == len(agents.NAMES) - len(agents.VARIANTS)


def test_the_learned_step_of_rmsprop_is_its_warm_up():
    steps = plots.learned_step(lambda alpha, decay: optax.rmsprop(alpha, decay=decay), 0.9, [0.5, 3.0], 4)
    expected = 1 / np.sqrt(1 - 0.9 ** np.arange(1, 5))
    np.testing.assert_allclose(steps, np.stack([expected, expected], axis=1), rtol=1e-4)
    assert jnp.ndim(steps) == 2
