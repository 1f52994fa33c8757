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
import figures
import gridworld
from programs import finish, read_csv, start

TINY = (
    "--devices 1 --num-units 4 --optimizer optim4rl --inner-updates 4 --num-envs 1 --reward-scale 100 --meta-loss whole "
    "--num-seeds 2 --meta-steps 3 --test-steps 4e3 --test-envs 4 --test-alphas 1e-2,3e-2 --reset-interval"
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
    config = ablations.Config(
        num_units=(16, 4, 64), inner_updates=(4, 1, 2, 16), meta_steps=160, reset_interval=(72, 8)
    )
    for name, setting in ablations.settings(config).items():
        meta_steps, reset_interval = ablations.budget(config, setting)
        assert meta_steps * setting.num_units * setting.inner_updates == 160 * 16 * 4
        assert reset_interval * setting.inner_updates == (8 if name == "reset_interval=8" else 72) * 4


def test_the_policys_meta_loss_is_the_policys_part_and_learning_is_unchanged():
    config = ablations.Config()
    of = lambda name: ablations.make_learner(config, ablations.settings(config)[name])
    whole, policy, env, agent_config = (
        of("base"),
        of("meta_loss=policy"),
        gridworld.make(config.task, 100.0),
        a2c.Config(1),
    )

    def oracle(agent, key):  # -mean(log pi(a|s) advantage), on the same rollout
        _, rollout, _ = a2c.collect(env, agent_config, agent.params, agent, key)
        obs = jax.vmap(jax.vmap(env.observe))(rollout.env_states)[:, 0]
        logits, values = a2c.apply_network(agent.params, obs)
        returns = a2c.lambda_returns(rollout.rewards, rollout.dones, values[:, None], agent_config)
        log_probs = jax.nn.log_softmax(logits[:-1])[jnp.arange(20), rollout.actions[:, 0]]
        return -jnp.mean(log_probs * (returns[:, 0] - values[:-1]))

    @jax.jit
    def all_numbers(key):
        optimizer = optax.sgd(0.1)
        agent = whole.init(key, optimizer)
        losses = policy.loss(agent, key)[0], oracle(agent, key), whole.loss(agent, key)[0]
        return losses, [learner.update(optimizer, agent, key)[0].params for learner in (policy, whole)]

    (found, expected, other), (updated, updated_by_whole) = all_numbers(jax.random.key(0))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert abs(found - other) > 1e-3
    jax.tree.map(np.testing.assert_array_equal, updated, updated_by_whole)


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


def test_a_stopped_program_goes_on_and_runs_nothing_twice(tmp_path):
    folder = tmp_path / "run"
    process = start("ablations.py", f"{TINY} 2,0 --out {folder}")
    while not (folder / "weights" / "base-0.npz").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130 and f"go on with: python ablations.py --resume {folder}" in out, err
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*/*")}
    assert not (folder / "results.csv").exists() and folder / "settings" / "adam.json" in kept
    code, out, err = finish("ablations.py", f"--resume {folder}")
    assert code == 0 and "reset interval" in out, err
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    assert (folder / "ablations.png").read_bytes()[:4] == b"\x89PNG"
    rows = read_csv(folder / "results.csv")
    assert [row["value"] for row in rows] == ["untrained", "adam", "rmsprop", "0", "2"]
    figures.main(["ablations", "--results", str(folder), "--out", str(tmp_path)])  # drawn again from the file alone
    assert (tmp_path / "ablations.png").read_bytes() == (folder / "ablations.png").read_bytes()
    with pytest.raises(cli.UsageError, match="no file .*; python ablations.py --out"):
        figures.main(["ablations", "--results", str(tmp_path / "nowhere")])
    assert len({row["areas"] for row in rows}) == 5 and len(list((folder / "weights").iterdir())) == 4


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
        ("--test-alphas ,", "--test-alphas is empty"),
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
