"""The ablations: what differs between settings, the table against hand-computed rows, and the program as a user runs it."""

import signal
import time

import pytest
from programs import finish, read_csv, start

from experiments import ablations
from harness import runs

TINY = (
    "--devices 1 --num-units 4 --optimizer optim4rl --inner-updates 4 --num-envs 1 --reward-scale 100 --num-seeds 1 "
    "--meta-steps 3 --test-steps 4e3 --test-envs 4 --test-alphas 1e-2,3e-2 --reset-interval"
)


def test_settings_differ_from_the_base_in_one_field_and_what_makes_up_for_it():
    settings = ablations.settings(ablations.Config())
    base = settings.pop("base")
    assert base.estimator == "gradient" and base.inputs == "raw"
    for name, setting in settings.items():
        field, value = name.split("=")
        changed = {f for f in vars(base) if getattr(setting, f) != getattr(base, f)}
        allowed = {
            "num_units": {"meta_steps"},
            "inner_updates": {"meta_steps", "reset_interval"},
            "optimizer": {"alpha"},
        }
        assert field in changed and changed <= {field} | allowed.get(field, set())
        given = getattr(setting, field)
        assert str(given[0] if isinstance(given, tuple) else given) == value


def test_settings_have_the_same_number_of_agent_updates_and_lives_of_equal_length():
    config = ablations.Config(
        num_units=(16, 4, 64), inner_updates=(4, 1, 2, 16), meta_steps=160, reset_interval=(72, 8)
    )
    for name, setting in ablations.settings(config).items():
        assert setting.meta_steps * setting.num_units * setting.inner_updates == 160 * 16 * 4
        assert setting.reset_interval[0] * setting.inner_updates == (8 if name == "reset_interval=8" else 72) * 4


def test_the_table_has_the_base_in_each_ablation_and_intervals_over_seeds():
    config = ablations.Config()
    names = [*ablations.REFERENCES, *ablations.settings(config)]
    results = {
        name: {"alphas": [0.1, 0.2], "meta_steps": 3, "area": [i, i + 1, i + 2, i + 9], "final": [i] * 4}
        for i, name in enumerate(names)
    }
    table = list(ablations.rows(config, results))
    assert len(table) == 3 + sum(len(getattr(config, name)) for name in ablations.TITLES)
    base = [row for row in table if row["base"]]
    assert [row["ablation"] for row in base] == list(ablations.TITLES.values())
    for row in base:
        assert (row["area"], row["final"], row["final_low"]) == (4.5, 3, 3)  # the interquartile mean of 3, 4, 5, 12
        assert (row["area_low"], row["area_high"]) == (3, 12)  # of four seeds: the least and the largest
    assert all(len(row["areas"].split()) == row["seeds"] == 4 for row in table)


def test_a_stopped_program_continues_and_runs_nothing_twice(tmp_path):
    folder = tmp_path / "run"
    process = start("experiments.ablations", f"{TINY} 2,0 --out {folder}")
    first = folder / "meta_runs" / "base-0" / "curves.png"
    while not first.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130 and f"to continue: python -m experiments.ablations --resume {folder}" in out, err
    kept = {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()} | {first: first.stat().st_mtime_ns}
    assert not (folder / "results.csv").exists() and any(
        path.name.startswith("small_dense_short-adam") for path in kept
    )
    code, out, err = finish("experiments.ablations", f"--resume {folder}")
    assert code == 0 and "reset interval" in out, err
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    assert (folder / "ablations.png").read_bytes()[:4] == b"\x89PNG"
    rows = read_csv(folder / "results.csv")
    assert [row["value"] for row in rows] == ["sign_descent", "adam", "rmsprop", "0", "2"]
    assert len({row["areas"] for row in rows}) == 5 and len(list((folder / "meta_runs").iterdir())) == 2


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--num-units 4,0", "--num-units is 0"),
        ("--num-units 4,4", "give different values"),
        ("--reset-interval -1", "--reset-interval is -1"),
        ("--num-seeds 0", "--num-seeds is 0"),
        ("--test-alphas ,", "--test-alphas is empty"),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(runs.UsageError, match=message) as error:
        ablations.main(flags.split())
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_bad_flag_exits_with_status_2():
    code, out, err = finish("experiments.ablations", "--units 3")
    assert code == 2 and "--units" in err and "Traceback" not in err
