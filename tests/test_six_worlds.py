"""experiments/six_worlds.py: one agent per meta-run and world, and the scores over meta-runs."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from programs import read_csv

from experiments import contents, six_worlds
from harness import runs

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def meta_seeds(tmp_path):
    """A folder like that of meta_seeds.py, of two meta-runs."""
    for seed in (3, 4):
        folder = tmp_path / "meta_seeds" / "meta_runs" / str(seed)
        folder.mkdir(parents=True)
        shutil.copy(ROOT / "weights/gated_adam.npz", folder / "optimizer.npz")
        (folder / "config.json").write_text(json.dumps({"config": {"optimizer": "gated_adam"}}))
    return tmp_path / "meta_seeds"


def test_each_meta_run_trains_an_agent_of_its_own_on_each_world(meta_seeds, tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "SIX", ("small_dense_short",))
    six_worlds.main(f"--meta-seeds {meta_seeds} --steps 2e4 --num-envs 4 --out {tmp_path / 'run'}".split())
    rows = read_csv(tmp_path / "run" / "agents.csv")
    assert [(row["task"], row["optimizer"], row["meta_seed"]) for row in rows] == [
        ("small_dense_short", "gated_adam", "3"),
        ("small_dense_short", "gated_adam", "4"),
    ]
    assert rows[0]["area"] != rows[1]["area"]  # the same weights, other random numbers


def test_a_folder_without_meta_runs_is_refused(tmp_path):
    with pytest.raises(runs.UsageError, match=f"--meta-seeds is {tmp_path}; there is no meta_runs"):
        six_worlds.main(["--meta-seeds", str(tmp_path)])


def test_meta_runs_are_counted_in_units_of_the_better_baseline(monkeypatch):
    areas = {("a", "adam"): 1.0, ("a", "rmsprop"): 2.0, ("b", "adam"): 4.0, ("b", "rmsprop"): 3.0}
    baselines = {pair: {"area_runs": np.full(5, x)} for pair, x in areas.items()}
    monkeypatch.setattr(contents, "six_worlds", lambda: baselines)
    monkeypatch.setattr(contents, "BIG", ("a", "b"))
    of_agents = (("a", "0", 3), ("a", "1", 2), ("b", "0", 4), ("b", "1", 3), ("c", "0", 9), ("c", "1", 9))
    rows = [dict(task=task, meta_seed=seed, area=area) for task, seed, area in of_agents]
    assert six_worlds.over(rows, ("a", "b")) == "1.06 [0.88, 1.25]"  # (3/2 + 4/4) / 2 and (2/2 + 3/4) / 2
    assert six_worlds.above(rows) == "1 of 2"
