"""Interquartile means, intervals and scores against hand-computed ones."""

import json

import numpy as np
import pytest
import scipy.stats

from harness import agents, statistics


def test_the_interval_holds_the_interquartile_mean_and_narrows_with_seeds():
    values = np.random.default_rng(0).normal(size=400)
    few, many = statistics.interval(values[:10]), statistics.interval(values)
    assert few[1] <= few[0] <= few[2] and many[2] - many[1] < few[2] - few[1]
    assert statistics.interval([0.0, 1.0, 2.0, 3.0, 100.0])[0] == 2.0  # the mean of the middle


def test_the_interquartile_mean_is_scipys_trimmed_one():
    for size in range(1, 12):
        values = np.random.default_rng(size).normal(size=(3, size))
        for axis in (0, 1, None):
            np.testing.assert_allclose(statistics.iqm(values, axis), scipy.stats.trim_mean(values, 0.25, axis))


def test_the_interval_covers_the_mean_as_often_as_it_says():
    random = np.random.default_rng(1)
    intervals = [statistics.interval(random.normal(size=10)) for _ in range(300)]
    assert 0.87 < np.mean([low <= 0 <= high for _, low, high in intervals]) < 0.98  # percentile bootstrap of ten values


def test_the_interval_over_meta_runs_holds_the_noise_of_the_baseline():
    random, both, alone = np.random.default_rng(2), [], []
    for _ in range(300):  # ten meta-runs on two tasks, 1.1 times as good as a baseline of ten noisy agents
        units = {task: random.normal(2.0, 0.2, 10) for task in "ab"}
        learned = {task: 2.2 + random.normal(0.0, 0.02, 10) for task in "ab"}
        both.append(statistics.over_meta_runs(learned, units))
        ratios = np.mean([learned[task] / statistics.iqm(units[task]) for task in "ab"], axis=0)
        alone.append(statistics.interval(ratios))
        assert both[-1][0] == pytest.approx(alone[-1][0])
    covered = lambda intervals: np.mean([low <= 1.1 <= high for _, low, high in intervals])
    assert 0.87 < covered(both) < 0.98 and covered(alone) < 0.6


def test_fewer_than_five_seeds_have_their_mean_least_and_largest():
    assert statistics.interval([3.0, 1.0, 8.0]) == (4.0, 1.0, 8.0)
    assert statistics.interval([0.0, 0.0, 0.0, 100.0]) == (25.0, 0.0, 100.0)
    assert "least, largest" in statistics.caption(3) and "bootstrap" in statistics.caption(5)


def test_a_diverged_run_counts_as_the_worst_and_too_many_make_the_mean_worthless():
    nine = np.arange(1.0, 10)
    assert statistics.interval([*nine, np.nan])[0] == statistics.iqm([*nine, 0.0])
    assert statistics.interval([np.nan] * 5 + [1.0] * 5)[0] == -np.inf


def test_scores_are_areas_in_units_of_the_better_baseline():
    areas = {("a", "adam"): [2.0, 2.0], ("a", "rmsprop"): [1.0, 1.0], ("a", "mine"): [4.0, 4.0]}
    areas |= {("b", "adam"): [3.0, 3.0], ("b", "rmsprop"): [5.0, 5.0], ("b", "mine"): [10.0, 10.0]}
    areas |= {("c", "adam"): [1.0, 1.0], ("c", "mine"): [9.0, 9.0]}  # without RMSProp: does not count
    areas = {name: np.array(values) for name, values in areas.items()}
    tuning = {name: values.mean() for name, values in areas.items()}
    scores, left_out = statistics.scores(areas, tuning)
    np.testing.assert_allclose(scores["mine"], (2.0, 2.0, 2.0), rtol=1e-12)
    np.testing.assert_allclose(scores["adam"][0], (1 + 1 + 3 / 5 + 3 / 5) / 4, rtol=1e-12)
    assert left_out == {"c": "without rmsprop"}


def test_the_better_baseline_is_chosen_on_the_tuning_seeds_and_is_1_in_its_own_units():
    random = np.random.default_rng(1)
    means = {"adam": 1.0, "rmsprop": 1.1, "mine": 1.1}
    areas = {("a", name): random.normal(mean, 0.1, 20) for name, mean in means.items()}
    for better in ("adam", "rmsprop"):
        tuning = {("a", name): float(name == better) for name in means}
        scores, _ = statistics.scores(areas, tuning)
        assert scores[better][0] == pytest.approx(1, abs=1e-9)
        mean, low, high = scores["mine"]
        assert low < mean < high and 0.02 < high - low < 0.3
        assert mean == pytest.approx(statistics.iqm(areas["a", "mine"]) / statistics.iqm(areas["a", better]))


@pytest.mark.parametrize("baseline", [[-1.0] * 6, [-3.0, 2.0, 0.1, -0.1, 4.0, -2.0], [np.nan] * 6])
def test_a_baseline_that_is_not_surely_above_zero_leaves_its_task_out_and_says_so(baseline):
    areas = {("a", name): np.array(baseline) for name in ("adam", "rmsprop", "mine")}
    scores, left_out = statistics.scores(areas, {name: 1.0 for name in areas})
    assert scores == {} and list(left_out) == ["a"] and "not surely above 0" in left_out["a"]


def test_one_diverged_run_of_a_baseline_changes_no_other_optimizers_place():
    random = np.random.default_rng(2)
    areas = {("a", name): random.normal(1, 0.1, 10) for name in ("adam", "rmsprop", "mine")}
    areas["a", "adam"][3] = np.nan
    scores, left_out = statistics.scores(areas, {("a", name): float(name == "rmsprop") for _, name in areas})
    assert set(scores) == {"adam", "rmsprop", "mine"} and not left_out
    assert np.isfinite([scores["rmsprop"], scores["mine"]]).all() and np.isfinite(scores["adam"][0])


def test_the_table_says_how_many_runs_diverged_and_its_rows_are_json():
    returns = np.linspace(1, 2, 20).reshape(10, 2)
    returns[:4] = np.nan
    tuned = agents.Tuned(0.0123, agents.Runs(np.array([10, 20]), returns), np.nan)
    (row,), text = statistics.report({("catch", "adam"): tuned})
    assert json.loads(json.dumps(row, allow_nan=False)) == row and row["diverged"] == 4
    assert row["area"] is None and row["area_runs"][:4] == [None] * 4
    assert "4 of 10 diverged" in text and "0.0123" in text and "catch does not count: without rmsprop" in text


def test_the_longest_names_do_not_touch_the_next_column():
    longest = max(agents.NAMES, key=len)
    tuned = agents.Tuned(0.0123, agents.Runs(np.array([10, 20]), np.full((3, 2), 1.0)), np.nan)
    _, text = statistics.report({("inverted_double_pendulum", longest): tuned})
    assert text.splitlines()[1].split()[:3] == ["inverted_double_pendulum", longest, "0.0123"]
