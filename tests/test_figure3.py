"""The comparison of optimizers, each meta-trained on the task of its test: which one is chosen, and the program as a user runs it."""

import json
import signal
import time

import jax
import numpy as np
import pytest
from programs import finish, read_csv, start

from experiments import figure3
from harness import agents, runs

TINY = (
    "--devices 1 --tasks catch --optimizers linear_optim --num-units 2 --meta-steps 4 --reset-interval 2 "
    "--test-steps 4e3 --test-envs 4 --seeds 2"
)


class FakeTask:
    name, learning_rates = "catch", (0.1, 0.2)


def test_the_best_meta_run_on_tuning_seeds_is_reported(tmp_path, monkeypatch):
    calls = []

    def tuned(task, optimizer, rates, num_seeds, key, *rest):
        calls.append((optimizer.meta_params, rates, jax.random.key_data(key).tolist()))
        returns = np.full((num_seeds, 2), float(optimizer.meta_params))
        return agents.Tuned(
            0.2, agents.Runs(np.array([10, 20]), returns), {7: 3.0, 5: np.nan, 6: 2.0}[optimizer.meta_params]
        )

    monkeypatch.setattr(agents, "tuned", tuned)
    candidates = {rate: agents.Optimizer("l2lgd2", value) for rate, value in ((1e-3, 5), (3e-3, 7), (1e-2, 6))}
    row, result = figure3.report(figure3.Config(seeds=3), tmp_path, FakeTask, candidates, None)
    assert (row["meta_learning_rate"], row["alpha"], row["area"]) == (3e-3, 0.2, 7.0) and len(result.runs.returns) == 3
    assert row["tuning_areas"] == {"0.001": None, "0.003": 3.0, "0.01": 2.0}
    assert [call[0] for call in calls] == [5, 7, 6] and calls[0][1] == [10.0, 20.0]  # untrained l2lgd2 is SGD
    assert len({tuple(call[2]) for call in calls}) == 1  # the same seeds for all


def test_a_stopped_comparison_continues_and_runs_nothing_twice(tmp_path):
    folder = tmp_path / "run"
    process = start("experiments.figure3", f"{TINY} --out {folder}")
    first = folder / "meta_runs" / "catch-linear_optim-0.001" / "curves.png"
    while not first.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130 and f"python -m experiments.figure3 --resume {folder}" in out, err
    kept = {path: path.stat().st_mtime_ns for path in first.parent.iterdir() if path.is_file()}
    assert not (folder / "meta_runs" / "catch-linear_optim-0.003" / "curves.png").exists() and first in kept
    code, out, err = finish("experiments.figure3", f"--resume {folder}")
    assert code == 0 and "linear_optim" in out, err
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    rows = json.loads((folder / "summary.json").read_text())
    assert [row["optimizer"] for row in rows] == ["linear_optim"] and rows[0]["meta_learning_rate"] in (1e-3, 3e-3)
    assert {row["run"] for row in read_csv(folder / "curves.csv")} == {"0", "1"}
    assert (folder / "figure3.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--optimizers ,", "--optimizers is empty"),
        ("--meta-learning-rates ,", "--meta-learning-rates is empty"),
        ("--seeds 0", "--seeds is 0"),
        ("--num-units 0", "--num-units is 0"),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(runs.UsageError, match=message) as error:
        figure3.main(flags.split())
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
