"""Resets in reinforcement learning: what differs between arms, the table, and the program as a user stops and continues it."""

import dataclasses
import pathlib
import signal
import time

import numpy as np
import pytest
from programs import finish, read_csv, start

from experiments import pipeline_rl
from harness import agents, runs


def test_arms_of_a_group_differ_in_their_resets_only():
    config, settings = pipeline_rl.Config(), {}
    for arm in pipeline_rl.ARMS:
        made = dataclasses.asdict(pipeline_rl.meta_config(config, pathlib.Path("run"), arm, 7))
        assert made.pop("out") == f"run/meta_runs/{arm}-7" and made["seed"] == 7
        group, resets = arm.rsplit("-", 1)
        assert made.pop("resets") == resets
        # nres without resets would never draw its noise again
        assert made.pop("noise_interval") == (63 if resets == "none" and group.startswith("nres") else 0)
        assert settings.setdefault(group, made) == made
    assert len({repr(made) for made in settings.values()}) == len(pipeline_rl.GROUPS)
    for made in settings.values():  # equally many agent updates, and lives of a length
        assert abs(made["meta_steps"] * made["inner_updates"] - 2000) <= 16
        assert abs(made["reset_interval"][0] * made["inner_updates"] - 252) <= 4


def test_scores_are_in_units_of_the_mean_of_tuned_rmsprop(tmp_path):
    def tuned(area):
        return agents.Tuned(0.05, agents.Runs(np.arange(5), np.full((4, 5), area)), np.nan)

    steps = 1 / np.arange(1, 251)
    results = {("rmsprop", 0): (tuned(3.0), None), ("rmsprop", 1): (tuned(5.0), None)}
    results |= {("nres_falling-none", seed): (tuned(2.0 + seed), steps) for seed in range(2)}
    table = list(pipeline_rl.rows(results))
    assert [(row["arm"], row["score"]) for row in table] == [
        ("rmsprop", "0.75"),
        ("rmsprop", "1.25"),
        ("nres_falling-none", "0.5"),
        ("nres_falling-none", "0.75"),
    ]
    assert table[-1]["step_250"] == "0.004" and table[0]["step_250"] == ""
    assert "| nres_falling |  |  | 0.62 [0.50, 0.75] |  |" in pipeline_rl.table(table)
    results |= {(name, seed): (tuned(1.0), None) for name in agents.HAND_DESIGNED for seed in range(2)}
    path = pipeline_rl.draw(tmp_path / "rl.png", list(pipeline_rl.rows(results)), results)
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_a_stopped_program_continues_and_runs_nothing_twice(tmp_path):
    folder, arm = tmp_path / "run", "gradient_constant-none"
    flags = f"--devices 1 --arms {arm} --seeds 3 --meta-steps 2 --test-agents 1 --test-steps 4e3 --out {folder}"
    process = start("experiments.pipeline_rl", flags)
    while not list((folder / "runs").glob("*adam*report*")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130 and f"to continue: python -m experiments.pipeline_rl --resume {folder}" in out, err
    kept = {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()}
    code, out, err = finish("experiments.pipeline_rl", f"--resume {folder}")
    assert code == 0 and "| gradient_constant |" in out, err
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    names = [*agents.HAND_DESIGNED, "untrained_optim4rl", arm]
    assert [row["arm"] for row in read_csv(folder / "results.csv")] == names
    assert (folder / "pipeline_rl.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--seeds ,", "--seeds is empty"),
        ("--seeds 1,1", "each once"),
        ("--arms nres_falling-none nres_falling-none", "each once"),
        ("--test-agents 0", "--test-agents is 0"),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(runs.UsageError, match=message) as error:
        pipeline_rl.main(flags.split())
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_bad_flag_exits_with_status_2():
    code, out, err = finish("experiments.pipeline_rl", "--units 3")
    assert code == 2 and "--units" in err and "Traceback" not in err
