"""The paper's figures in pieces: what is planned, what one piece leaves, what is chosen, and a stop in the middle."""

import json

import numpy as np
import pytest
from programs import finish, start

from experiments import arms, full_size
from harness import agents, runs, tasks

SHORT = "--scale 0.005 --devices 1"


def test_a_piece_is_stopped_by_its_time_limit_continues_and_is_made_once(tmp_path, capsys):
    flags = f"--only catch_adam figure5 {SHORT} --results {tmp_path}"
    code, out, err = finish("experiments.full_size", f"{flags} --time-limit 1e-9")
    assert code == 0 and "to continue: python -m experiments.full_size --only catch_adam figure5" in out, err
    assert not list(tmp_path.glob("*/*.json.partial")) and not (tmp_path / "catch_adam/catch_adam.json").exists()
    code, out, err = finish("experiments.full_size", flags)
    assert code == 0 and "Figure 3, catch: catch_adam" in out, err
    rows = json.loads((tmp_path / "catch_adam/catch_adam.json").read_text())
    assert rows["fixed"]["alpha"] == 1e-3 and rows["tuned"]["alpha"] in rows["tuned"]["alphas"]
    with np.load(tmp_path / "catch_adam/catch_adam.npz") as curves:
        assert curves["fixed_returns"].shape == (10, len(curves["fixed_steps"]))
        np.testing.assert_allclose(curves["tuned_returns"].mean(1), rows["tuned"]["area_runs"], rtol=1e-5)
    drift = json.loads((tmp_path / "figure5/figure5.json").read_text())["drift"]
    assert drift["drift"] > 0 and drift["network"] == "conv" and drift["clip"] == 0
    full_size.main(f"{flags} --plan".split())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if "catch_adam " in line] == ["done"]
    full_size.main(flags.split())
    assert capsys.readouterr().out == ""  # nothing is left


def test_the_best_setting_on_tuning_seeds_is_tested_and_only_that_one_is_tuned(tmp_path, monkeypatch):
    calls, areas = [], {"star-0": np.nan, "star-1": 3.0, "star-2": 2.0}
    options = {name: agents.Optimizer("star", inputs="raw") for name in areas}

    def test(folder, task, label, optimizer, rates, num_seeds, mesh, steps, tuning_seeds):
        calls.append((label, tuple(rates), num_seeds, steps, tuning_seeds))
        if not num_seeds:
            return agents.Tuned(rates[0], None, areas[label])
        return agents.Tuned(rates[0], agents.Runs(np.array([10, 20]), np.ones((num_seeds, 2))), np.nan)

    monkeypatch.setattr(full_size, "candidates", lambda *args: options)
    monkeypatch.setattr(arms, "test", test)
    config = full_size.Config(scale=0.5)
    results = full_size.test(
        "catch", "star", {"fixed": (1e-3,), "tuned": (0.1, 0.2)}, 4, [{}] * 3, config, tmp_path, None
    )
    assert calls[:3] == [(name, (1e-3,), 0, 2.5e5, 3) for name in areas]
    assert calls[3:] == [("star-1", (1e-3,), 4, 2.5e5, 0), ("star-1", (0.1, 0.2), 4, 2.5e5, 3)]
    assert results["fixed"][0]["tuning_areas"] == {"star-0": None, "star-1": 3.0, "star-2": 2.0}
    assert results["tuned"][0]["chosen"] == "star-1" and results["tuned"][0]["seeds"] == 4


def test_meta_runs_have_the_settings_of_the_reference_and_a_lost_one_does_not_count(tmp_path, monkeypatch):
    made = []

    def learned(config):
        made.append(config)
        if config.meta_learning_rate == 3e-4:
            raise SystemExit("its meta-gradient was not finite")
        return config.out

    monkeypatch.setattr(arms, "learned", learned)
    sweep = full_size.settings_of((1e-4, 3e-4), (32, 64))
    found = full_size.candidates("catch", "star", sweep, full_size.Config(), tmp_path)
    assert list(found) == ["star-0", "star-1", "star-2", "star-3"] and len(made) == 8
    assert {(x.meta_learning_rate, x.reset_interval, x.meta_grad_clip, x.clip_entries) for x in made} == {
        (rate, (m,), clip, entries)
        for rate in (1e-4, 3e-4)
        for m in (32, 64)
        for clip, entries in ((0.5, False), (1.0, True))
    }
    # 5e5 steps in all: 64 units, 20 steps, 4 inner updates and the meta-loss
    assert {x.meta_steps for x in made} == {int(5e5 / (64 * 20 * 5))}
    assert {(x.num_units, x.alpha, x.inputs, x.task_grad_norm) for x in made} == {(64, (1e-3,), "raw", 0.0)}


def test_the_plan_has_every_panel(capsys, tmp_path):
    full_size.main(["--plan", "--results", str(tmp_path)])
    out = capsys.readouterr().out
    panels = ["Figure 1", "Figure 5", *(f"Figure 3, {task}" for task in ("catch", "big_dense_long", "ant", "humanoid"))]
    for panel in [*panels, "six worlds", *(f"Figure 4, {robot}" for robot in tasks.PAPER_PPO)]:
        assert sum(line.startswith(panel) and "not run" in line for line in out.splitlines()) == 1
    known = list(full_size.pieces())
    assert len({piece.name for piece in known}) == len(known)
    assert all(min(piece.minutes) > 0 for piece in known)
    assert {piece.panel for piece in known if piece.on_cpu} == {
        "Figure 1",
        "Figure 5, with digits",
        "Figure 3, catch",
        "six worlds",
    }


def test_bad_flags_are_one_line_and_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, message in (
        ("--only moon", "--only moon: no piece"),
        ("--scale 0", "--scale is 0"),
        ("--time-limit -1", "-1"),
    ):
        with pytest.raises(runs.UsageError, match=message) as error:
            full_size.main(flags.split())
        assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_piece_is_not_continued_at_another_scale(tmp_path):
    runs.new_folder(tmp_path / "catch_adam", "catch_adam", full_size.Config(scale=0.1))
    with pytest.raises(runs.UsageError, match="was run with --scale 0.1"):
        full_size.main(["--only", "catch_adam", "--results", str(tmp_path)])


def test_a_cpu_multiplies_in_float32(tmp_path):
    full_size.main(f"--only precision {SHORT} --results {tmp_path}".split())
    rows = json.loads((tmp_path / "precision/precision.json").read_text())
    assert rows["default"] == rows["float32"] and rows["default"]["steps"] > 1e5


def test_a_program_whose_reader_has_ended_says_nothing():
    process = start("experiments.full_size", "--plan", PYTHONUNBUFFERED="1")
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 141)
