"""The comparison of optimizers, each meta-trained on the task of its test: which one is chosen, and the program as a user runs it."""

import json
import signal
import time

import jax
import numpy as np
import pytest

import cli
import compare
import comparison
import optim4rl
from programs import finish, read_csv, start

TINY = (
    "--devices 1 --tasks catch --optimizers linear_optim --num-units 2 --meta-steps 4 --reset-interval 2 "
    "--test-steps 4e3 --test-envs 4 --seeds 2"
)


class FakeTask:
    name, learning_rates = "catch", (0.1, 0.2)


def test_the_best_candidate_and_alpha_on_tuning_seeds_are_reported_on_fresh_ones(tmp_path, monkeypatch):
    calls = []

    def train(task, optimizer, meta_params, alphas, keys, mesh, steps, progress, store):
        calls.append((meta_params, list(alphas), jax.random.key_data(keys)))
        progress(1.0)
        returns = np.array([meta_params + (1 if alpha == 0.2 else 0) for alpha in alphas], float)
        return compare.Runs(np.array([10]), returns[:, None])

    monkeypatch.setattr(compare, "train", train)
    parts = []
    config = comparison.Config(seeds=3)
    row, runs, chosen = comparison.report(config, tmp_path, FakeTask, "star", {1e-3: 7, 1e-2: 5}, None, parts.append)
    assert chosen == 7 and (row["meta_learning_rate"], row["alpha"], row["area"]) == (1e-3, 0.2, 8)
    assert row["tuning"] == [[1e-3, 0.1, 7], [1e-3, 0.2, 8], [1e-2, 0.1, 5], [1e-2, 0.2, 6]]
    assert sum(parts) == pytest.approx(1) and len(runs.returns) == 3
    tuning, again, report = calls
    assert tuning[1] == again[1] == [0.1, 0.1, 0.2, 0.2] and report[:2] == (7, [0.2] * 3)
    np.testing.assert_array_equal(tuning[2], again[2])  # every candidate on the same seeds, no reported one among them
    assert not {tuple(key) for key in tuning[2].tolist()} & {tuple(key) for key in report[2].tolist()}
    assert len({tuple(key) for key in report[2].tolist()}) == 3


def test_a_stopped_comparison_goes_on_and_runs_nothing_twice(tmp_path):
    folder = tmp_path / "run"
    process = start("comparison.py", f"{TINY} --out {folder}")
    first = folder / "catch-linear_optim-0.001" / "curves.png"
    while not first.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130 and f"python comparison.py --resume {folder}" in out, err
    kept = {path: path.stat().st_mtime_ns for path in first.parent.iterdir() if path.is_file()}
    assert not (folder / "catch-linear_optim-0.003" / "curves.png").exists() and first in kept
    code, out, err = finish("comparison.py", f"--resume {folder}")
    assert code == 0 and "linear_optim" in out, err
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    rows = json.loads((folder / "summary.json").read_text())
    assert [row["optimizer"] for row in rows] == ["linear_optim"]
    assert {row["run"] for row in read_csv(folder / "curves.csv")} == {"0", "1"}
    assert (folder / "figure3.png").read_bytes()[:4] == b"\x89PNG"
    like = compare.LEARNED["linear_optim"].init(jax.random.key(0))
    _, metadata = optim4rl.load(folder / "weights" / "catch-linear_optim.npz", "linear_optim", like)
    assert metadata["meta_learning_rate"] in (1e-3, 3e-3)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--tasks ant", "unknown task 'ant'"),
        ("--optimizers sgd", "unknown optimizer 'sgd'"),
        ("--optimizers ,", "--optimizers is empty"),
        ("--meta-learning-rates ,", "--meta-learning-rates is empty"),
        ("--seeds 0", "--seeds is 0"),
        ("--num-units 0", "--num-units is 0"),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(cli.UsageError, match=message) as error:
        comparison.main(flags.split())
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
