"""How the gradients of a meta-step drift: which ages are pooled, by hand, and the program on tiny units."""

import numpy as np
import pytest

from experiments import pipeline_drift
from experiments.pipeline_drift import LIFE, RESETS


def marked_lives(num_units):
    """[U, LIFE, LIFE * U]: each unit has one gradient per meta-step, in a bin that names the unit and its age."""
    counts = np.zeros((num_units, LIFE, num_units * LIFE), int)
    for unit in range(num_units):
        counts[unit, np.arange(LIFE), unit * LIFE + np.arange(LIFE)] = 1
    return counts


def test_synchronised_units_are_of_one_age_and_staggered_ones_of_all():
    counts, num_units = marked_lives(3), 3
    ages_of = lambda histogram: np.flatnonzero(histogram) % LIFE
    synchronised, staggered = (pipeline_drift.seen(counts, resets) for resets in RESETS[::-1])
    for step in range(LIFE):
        assert list(ages_of(synchronised[step])) == [step] * num_units
        # unit i is reset where step mod 63 is floor(i * 62 / 2): 0, 31, 62
        assert list(ages_of(staggered[step])) == [(step - due) % LIFE for due in (0, 31, 62)]
    for histograms in (synchronised, staggered):  # over a cycle both see every age of every unit once
        assert (histograms.sum(0) == 1).all()


def test_phases_are_the_first_the_middle_and_the_last_tenth():
    steps = np.eye(LIFE, dtype=int)
    beginning, middle, end = pipeline_drift.phases(steps)
    assert list(np.flatnonzero(beginning)) == [0, 1, 2, 3, 4, 5]
    assert list(np.flatnonzero(middle)) == [28, 29, 30, 31, 32, 33]
    assert list(np.flatnonzero(end)) == [57, 58, 59, 60, 61, 62]


def test_the_program_finds_less_drift_with_staggered_resets(tmp_path, capsys):
    folder = tmp_path / "run"
    pipeline_drift.main(f"--num-units 8 --groups 2 --num-envs 2 --devices 1 --out {folder}".split())
    header, *rows = (folder / "results.csv").read_text().split()
    assert header == "group,staggered,synchronised" and len(rows) == 2
    for row in rows:
        _, staggered, synchronised = map(float, row.split(","))
        assert 0 < staggered < synchronised
    assert "staggered      drift" in capsys.readouterr().out
    assert (folder / "pipeline_drift.png").read_bytes()[:4] == b"\x89PNG"


def test_bad_sizes_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pipeline_drift.runs.UsageError, match="--groups is 0"):
        pipeline_drift.main(["--groups", "0"])
    assert not list(tmp_path.iterdir())
