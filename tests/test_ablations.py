"""The ablations: what differs between settings, the table against hand-computed rows, and the program as a user runs it."""

import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import a2c
import ablations
import cli
import gridworld
from programs import finish, read_csv, start

TINY = (
    "--devices 1 --num-units 4 --optimizer optim4rl --inner-updates 4 --num-envs 1 --reward-scale 100 --meta-loss whole "
    "--num-seeds 2 --meta-steps 3 --test-steps 4e3 --test-envs 4 --reset-interval"
)


def test_settings_differ_from_the_base_in_one_field():
    config = ablations.Config()
    settings = ablations.settings(config)
    base = settings.pop("base")
    assert len(settings) == sum(len(getattr(config, name)) - 1 for name in ablations.TITLES)
    for name, setting in settings.items():
        changed = [field for field in vars(base) if getattr(setting, field) != getattr(base, field)]
        assert [f"{field}={getattr(setting, field)}" for field in changed] == [name]


def test_settings_have_the_same_number_of_agent_updates_and_lives_of_equal_length():
    config = ablations.Config(num_units=(16, 4, 64), inner_updates=(4, 1, 2, 16), meta_steps=160, reset_interval=(72, 8))
    for name, setting in ablations.settings(config).items():
        meta_steps, reset_interval = ablations.budget(config, setting)
        assert meta_steps * setting.num_units * setting.inner_updates == 160 * 16 * 4
        assert reset_interval * setting.inner_updates == (8 if name == "reset_interval=8" else 72) * 4


def test_the_policys_meta_loss_is_the_policys_part_and_learning_is_unchanged():
    config = ablations.Config()
    base = ablations.settings(config)["base"]
    whole, policy = (
        ablations.make_learner(config, setting)
        for setting in (base, ablations.settings(config)["meta_loss=policy"])
    )
    optimizer, key = optax.sgd(0.1), jax.random.key(0)
    agent = whole.init(key, optimizer)
    updated, expected = policy.update(optimizer, agent, key)[0], whole.update(optimizer, agent, key)[0]
    jax.tree.map(np.testing.assert_array_equal, updated.params, expected.params)
    # An oracle from the loss's three terms: -mean(log pi(a|s) advantage), on the same rollout.
    agent_config = a2c.Config(num_envs=1)
    env = gridworld.make(config.task, 100.0)
    _, rollout, _ = a2c.collect(env, agent_config, agent.params, agent, key)
    logits, values = a2c.apply_network(agent.params, rollout.obs.reshape(-1, *env.obs_shape))
    td_errors = a2c.lambda_returns(rollout.rewards, rollout.dones, values[:, None], agent_config) - values[:-1, None]
    log_probs = jax.nn.log_softmax(logits[:-1])[jnp.arange(20), rollout.actions[:, 0]]
    np.testing.assert_allclose(policy.loss(agent, key)[0], -np.mean(log_probs * td_errors[:, 0]), rtol=1e-5)
    assert abs(policy.loss(agent, key)[0] - whole.loss(agent, key)[0]) > 1e-3


def test_the_table_has_the_base_in_each_ablation_and_intervals_over_seeds():
    config = ablations.Config(num_seeds=4)
    names = [*ablations.REFERENCES, *ablations.settings(config)]
    results = {
        name: {"alpha": 0.1, "meta_steps": 3, "area": [i, i + 1, i + 2, i + 9], "final": [i] * 4}
        for i, name in enumerate(names)
    }
    table = list(ablations.rows(config, results))
    assert len(table) == 3 + sum(len(getattr(config, name)) for name in ablations.TITLES)
    base = [row for row in table if row["base"]]
    assert [row["ablation"] for row in base] == list(ablations.TITLES.values())
    for row in base:
        assert (row["area"], row["final"], row["final_low"]) == (4.5, 3, 3)  # the interquartile mean of 3, 4, 5, 12
        assert 3 <= row["area_low"] < 4.5 < row["area_high"] <= 12
    assert all(len(row["areas"].split()) == row["seeds"] == 4 for row in table)


def test_a_stopped_program_goes_on_to_the_same_results(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    process = start("ablations.py", f"{TINY} 2,0 --out {folder}")
    while not (folder / "weights" / "base-0.npz").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and f"go on with: python ablations.py --resume {folder}" in out, err
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*/*")}
    assert not (folder / "results.csv").exists() and folder / "settings" / "adam.json" in kept
    code, out, err = finish("ablations.py", f"--resume {folder}")
    assert code == 0 and "reset interval" in out, err
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    code, _, err = finish("ablations.py", f"{TINY} 2,0 --out {whole}")
    assert code == 0, err
    assert (whole / "results.csv").read_bytes() == (folder / "results.csv").read_bytes()
    assert (folder / "ablations.png").read_bytes()[:4] == b"\x89PNG"
    rows = read_csv(folder / "results.csv")
    assert [row["value"] for row in rows] == ["untrained", "adam", "rmsprop", "0", "2"]
    assert len(list((folder / "weights").iterdir())) == 4


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--num-units 4,0", "--num-units is 0"),
        ("--num-units 4,4", "give different values"),
        ("--meta-loss half", "names 'half'; known: whole, policy"),
        ("--optimizer adam", "names 'adam'; known: optim4rl"),
        ("--task ant", "unknown task 'ant'"),
        ("--reset-interval -1", "--reset-interval is -1"),
        ("--num-seeds 0", "--num-seeds is 0"),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(cli.UsageError, match=message) as error:
        ablations.main(flags.split())
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_bad_flag_exits_with_status_2():
    code, out, err = finish("ablations.py", "--units 3")
    assert code == 2 and err.count("\n") == 1 and "--units" in err
