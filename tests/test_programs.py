"""The programs as a user runs them: real processes, real files."""

import dataclasses
import json
import re
import signal

import jax
import numpy as np
import pytest

import brax_env
import cli
import compare
import evaluate
import meta_config
import optim4rl
import ppo
import records
from programs import TINY_META, TINY_TEST, finish, read_csv, start


def test_meta_training_leaves_weights_metrics_pictures_and_a_table(whole_run):
    folder, out = whole_run
    assert [int(row["meta_step"]) for row in read_csv(folder / "metrics.csv")] == list(range(6))
    _, metadata = optim4rl.load(folder / "optimizer.npz")
    assert metadata["meta_steps"] == 6 and metadata["config"]["num_units"] == 4
    assert json.loads((folder / "config.json").read_text())["versions"]["jax"] == jax.__version__
    assert (folder / "curves.png").stat().st_size > 1000
    rows = json.loads((folder / "summary.json").read_text())
    assert [row["optimizer"] for row in rows] == list(compare.DEFAULT_OPTIMIZERS)
    assert all(-1 <= row["final"] <= 1 for row in rows) and "rmsprop" in out


def test_a_resume_with_another_config_is_refused(whole_run):
    folder, _ = whole_run
    code, _, err = finish("meta_train.py", f"--num-units 8 --resume {folder}")
    assert code == 2 and "num_units was 4, now 8" in err and len(err.splitlines()) == 1


def test_a_run_is_never_overwritten(whole_run):
    folder, _ = whole_run
    before = (folder / "optimizer.npz").read_bytes()
    code, _, err = finish("meta_train.py", f"{TINY_META} {TINY_TEST} --out {folder}")
    assert code == 2 and "already holds a run" in err and (folder / "optimizer.npz").read_bytes() == before


def test_weights_that_keep_a_part_of_what_was_learned_lie_that_far_from_the_untrained_ones(whole_run, tmp_path):
    flags = f"{TINY_META} --test-tasks , --keep 0.25 --out {tmp_path / 'part'}"
    assert finish("meta_train.py", flags)[0] == 0
    part, _ = optim4rl.load(tmp_path / "part" / "optimizer.npz")
    learned, _ = optim4rl.load(whole_run[0] / "optimizer.npz")
    untrained = optim4rl.init_meta_params(jax.random.split(jax.random.key(0))[0])
    quarter = lambda x, first, last: np.testing.assert_allclose(4 * (x - first), last - first, rtol=1e-3, atol=1e-6)
    jax.tree.map(quarter, part, untrained, learned)
    assert np.abs(learned["m"]["readout_kernel"]).max() > 1e-3  # something was learned


def test_evaluation_uses_the_learned_weights_on_gridworlds_and_robots(whole_run, tmp_path):
    weights, folder = whole_run[0] / "optimizer.npz", tmp_path / "evaluation"
    flags = f"--tasks catch,inverted_pendulum --optimizers optim4rl,adam --weights {weights} --learning-rate 1e-3 --seeds 2 --steps 1.5e4"
    code, out, err = finish("evaluate.py", f"{flags} --out {folder}")
    assert code == 0, err
    curves = read_csv(folder / "curves.csv")
    assert {(row["task"], row["optimizer"], row["run"]) for row in curves} == {
        (task, optimizer, run)
        for task in ("catch", "inverted_pendulum")
        for optimizer in ("optim4rl", "adam")
        for run in "01"
    }
    assert len(json.loads((folder / "summary.json").read_text())) == 4
    assert (folder / "curves.png").stat().st_size > 1000 and "interval" in out


def test_a_killed_evaluation_goes_on_to_the_same_result_and_runs_nothing_twice(tmp_path):
    flags = "--tasks catch,inverted_pendulum --optimizers adam --learning-rate 1e-3,1e-2 --seeds 3 --steps 3e4"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert finish("evaluate.py", f"{flags} --out {whole}")[0] == 0
    process, kept = start("evaluate.py", f"{flags} --out {killed}"), killed / "runs"
    while len(list(kept.glob("catch-*.npz")) if kept.exists() else ()) < 3:
        assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()
    before = {path.name: path.stat().st_mtime_ns for path in kept.glob("*.npz")}
    code, out, err = finish("evaluate.py", f"--resume {killed} --render")
    assert code == 0, err
    film = (killed / "inverted_pendulum-adam.html").read_text()
    assert "<canvas" in film and not re.search(r"https?://|<link|<script[^>]+src", film)  # opens without a network
    for name in ("summary.json", "curves.csv"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert all((kept / name).stat().st_mtime_ns == time for name, time in before.items())
    assert "return without noise" in out

    params, obs_stats, metadata = records.load_policy(killed / "policies" / "inverted_pendulum-adam-0.npz")
    returns = ppo.evaluate(brax_env.make(metadata["task"]), params, obs_stats, jax.random.key(0), 8)
    assert metadata["optimizer"] == "adam" and np.all(np.asarray(returns) > 0)
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes((killed / "policies" / "inverted_pendulum-adam-0.npz").read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        records.load_policy(damaged)


def test_a_stopped_evaluation_says_how_to_go_on(tmp_path):
    process = start("evaluate.py", f"--tasks catch --optimizers adam --learning-rate 1e-3 --out {tmp_path / 'run'}")
    while not (tmp_path / "run" / "runs").exists():
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143 and f"evaluate.py --resume {tmp_path / 'run'}" in out and "Traceback" not in err


@pytest.mark.parametrize(
    "program, flags, message",
    [
        ("meta_train.py", "--tasks small_dense", "small_dense_short, small_dense_long"),
        ("meta_train.py", "--num-units 5 --devices 2", "4 or 6"),
        ("meta_train.py", "--number-of-units 5", "unrecognized arguments: --number-of-units"),
        ("evaluate.py", "--seeds many", "invalid int value: 'many'"),
        ("meta_train.py", "--out /proc/nowhere", "cannot write to /proc/nowhere"),
        ("evaluate.py", "--weights no/such/file.npz", "no/such/file.npz"),
    ],
)
def test_bad_input_ends_with_one_line_and_status_2(program, flags, message):
    code, _, err = finish(program, flags)
    assert code == 2 and message in err and len(err.splitlines()) == 1


def test_a_config_of_an_earlier_version_is_refused(tmp_path):
    values = dataclasses.asdict(meta_config.Config())
    (tmp_path / "config.json").write_text(json.dumps({"config": values}))
    assert cli.read_config(meta_config.Config, tmp_path) == meta_config.Config()
    for name, value in (("reset_interval", 72), ("num_units", [64])):
        (tmp_path / "config.json").write_text(json.dumps({"config": values | {name: value}}))
        with pytest.raises(cli.UsageError, match=f"holds no run to resume .{name} is "):
            cli.read_config(meta_config.Config, tmp_path)
    del values["meta_decay"]
    (tmp_path / "config.json").write_text(json.dumps({"config": values}))
    with pytest.raises(cli.UsageError, match="its config has no meta_decay: an earlier version made it"):
        cli.read_config(meta_config.Config, tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(optimizer="adamw"), "known: optim4rl"),
        (dict(tasks=()), "empty"),
        (dict(test_tasks=("moon",)), "unknown task 'moon'"),
        (dict(num_envs=0), "--num-envs is 0"),
        (dict(meta_steps=-1), "--meta-steps is -1"),
        (dict(meta_decay=-0.5), "--meta-decay is -0.5"),
        (dict(keep=1.5), "--keep is 1.5; it must be between 0 and 1"),
        (dict(meta_learning_rate=float("nan")), "--meta-learning-rate is nan"),
        (dict(alpha=(1e-3, -1.0)), "--alpha is -1.0"),
        (dict(alpha=(1e-3, 1e-3, 1e-3)), "--alpha is 0.001,0.001,0.001, for 2 tasks"),
        (dict(reset_interval=()), "--reset-interval is empty, for 2 tasks"),
    ],
)
def test_impossible_meta_training_is_refused(changes, message):
    with pytest.raises(cli.UsageError, match=message):
        meta_config.check(meta_config.Config(**changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(optimizers=("adam", "sgd")), "unknown optimizer 'sgd'; known: optim4rl"),
        (dict(tasks=("moon",)), "unknown task 'moon'; known: small_sparse_short"),
        (dict(seeds=0), "--seeds is 0"),
        (dict(steps=-1.0), "--steps is -1.0"),
        (dict(tasks=("catch",), num_envs=0), "num_envs is 0"),
        (dict(learning_rate=(0.0,)), "--learning-rate is 0.0"),
        (dict(ppo="large"), "known: small, paper"),
        (dict(fixed=("adam",)), "--fixed has 'adam'; give NAME=ALPHA"),
        (dict(fixed=("adam=-1",)), "--fixed has 'adam=-1'"),
        (dict(fixed=("adma=0.1",)), "NAME one of adam"),
        (dict(tasks=("catch",), render=True), "--render films robots"),
    ],
)
def test_impossible_evaluations_are_refused(changes, message):
    with pytest.raises(cli.UsageError, match=message):
        evaluate.check(evaluate.Config(**{"optimizers": ("adam",), **changes}))


@pytest.mark.parametrize(
    "processes, message",
    [
        ((None, 2, None), "--num-processes without --coordinator HOST:PORT"),
        (("auto", None, 1), "--process-id without --coordinator HOST:PORT"),
        (("localhost:1234", 2, 2), "--process-id is 2 of --num-processes 2; it must be 0 to N - 1 of N"),
        (("localhost:1234", None, 0), "--num-processes None"),
        (("auto", None, None), "--coordinator auto: cannot meet the other processes"),
    ],
)
def test_impossible_processes_are_refused(processes, message):
    with pytest.raises(cli.UsageError, match=message):
        cli.join_processes(*processes)


def test_weights_of_another_kind_or_size_are_refused(tmp_path):
    other, large = tmp_path / "other.npz", tmp_path / "large.npz"
    optim4rl.save(other, optim4rl.init_meta_params(jax.random.key(0)), kind="star")
    optim4rl.save(large, optim4rl.init_meta_params(jax.random.key(0), hidden_size=16))
    for path, message in ((other, "'star'"), (large, "expected")):
        with pytest.raises(cli.UsageError, match=message):
            evaluate.check(evaluate.Config(optimizers=("optim4rl",), weights=str(path)))


def test_each_learned_optimizer_takes_its_own_weights_by_name(tmp_path):
    files = {name: str(tmp_path / f"{name}.npz") for name in compare.LEARNED}
    for i, (name, learned) in enumerate(compare.LEARNED.items()):
        optim4rl.save(files[name], learned.init(jax.random.key(i)), kind=name)
    weights = ",".join(f"{name}={file}" for name, file in files.items())
    config = evaluate.Config(tasks=("catch",), optimizers=(*files, "untrained"), weights=weights, fixed=("star=0.5",))
    assert evaluate.fixed_rates(config) == {"star": (0.5,)}
    _, meta_params = evaluate.check(config)
    for i, (name, learned) in enumerate(compare.LEARNED.items()):
        jax.tree.map(np.testing.assert_array_equal, meta_params[name], learned.init(jax.random.key(i)))
    with pytest.raises(cli.UsageError, match="star needs weights: python meta_train.py --optimizer star"):
        evaluate.check(evaluate.Config(optimizers=("star",), weights=files["optim4rl"]))
    with pytest.raises(cli.UsageError, match="--weights names 'sta'; known: optim4rl, linear_optim"):
        evaluate.check(evaluate.Config(optimizers=("star",), weights=f"sta={files['star']}"))
    with pytest.raises(cli.UsageError, match="holds weights of 'star', not of 'l2lgd2'"):
        evaluate.check(evaluate.Config(optimizers=("l2lgd2",), weights=f"l2lgd2={files['star']}"))


def test_star_is_meta_trained_and_evaluated_by_name(tmp_path):
    flags = "--preset gradient --optimizer star --tasks catch --num-units 2 --meta-steps 2 --reset-interval 2 --test-tasks catch"
    code, out, err = finish("meta_train.py", f"{flags} {TINY_TEST} --out {tmp_path / 'meta'}")
    assert code == 0 and "untrained_star" in out, err
    flags = f"--tasks catch --optimizers star,adam --weights star={tmp_path / 'meta' / 'optimizer.npz'} --learning-rate 1e-3"
    code, _, err = finish("evaluate.py", f"{flags} --seeds 2 --steps 1e4 --out {tmp_path / 'test'}")
    assert code == 0, err
    rows = json.loads((tmp_path / "test" / "summary.json").read_text())
    assert [row["optimizer"] for row in rows] == ["star", "adam"] and all(-1 <= row["final"] <= 1 for row in rows)


def test_shipped_weights_are_found_by_name():
    names = {file.stem for file in evaluate.WEIGHTS.glob("*.npz")}
    assert names == {"optim4rl", "gated_adam"}
    _, meta_params = evaluate.check(evaluate.Config(optimizers=tuple(names)))
    for name in names:
        assert any(
            np.any(x != y)
            for x, y in zip(*map(jax.tree.leaves, (meta_params[name], meta_params[compare.UNTRAINED[name]])))
        )


def test_the_interval_holds_the_interquartile_mean_and_narrows_with_seeds():
    values = np.random.default_rng(0).normal(size=400)
    few, many = compare.interval(values[:10]), compare.interval(values)
    assert few[1] <= few[0] <= few[2] and many[2] - many[1] < few[2] - few[1]
    assert compare.interval([0.0, 1.0, 2.0, 100.0])[0] == 1.5  # the mean of the middle half


def test_scores_are_areas_in_units_of_the_better_baseline():
    areas = {("a", "adam"): [2.0, 2.0], ("a", "rmsprop"): [1.0, 1.0], ("a", "mine"): [4.0, 4.0]}
    areas |= {("b", "adam"): [3.0, 3.0], ("b", "rmsprop"): [5.0, 5.0], ("b", "mine"): [10.0, 10.0]}
    areas |= {("c", "adam"): [1.0, 1.0], ("c", "mine"): [9.0, 9.0]}  # without RMSProp: does not count
    scores = compare.scores({name: np.array(values) for name, values in areas.items()})
    np.testing.assert_allclose(scores["mine"], (2.0, 2.0, 2.0), rtol=1e-12)
    np.testing.assert_allclose(scores["adam"][0], (1 + 1 + 3 / 5 + 3 / 5) / 4, rtol=1e-12)
    random = np.random.default_rng(1)
    noisy = {("a", name): random.normal(mean, 0.1, 20) for name, mean in (("adam", 1), ("rmsprop", 1), ("mine", 1.1))}
    mean, low, high = compare.scores(noisy)["mine"]
    assert low < mean < high and 0.02 < high - low < 0.3
    assert compare.scores({("a", "adam"): np.ones(2)}) == {}
    assert compare.scores({("a", "adam"): -np.ones(2), ("a", "rmsprop"): -np.ones(2)}) == {}


def test_points_without_an_ended_episode_take_the_value_before():
    sums, episodes = np.array([[0.0, 6.0, 0.0, 4.0]]), np.array([[0, 2, 0, 1]])
    np.testing.assert_array_equal(compare._fill(sums, episodes), [[3.0, 3.0, 3.0, 4.0]])
