"""The programs as a user runs them: real files, and real processes where a process is what is tested."""

import json
import pathlib
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from programs import DEVICES, finish, read_csv, start, wait_until

import brax_env
import evaluate
import meta_train
import optim4rl
from harness import agents, kept, runs, tasks, weights
from learned_optimizers import velo

TINY_META = "--tasks small_dense_short,catch --num-units 4 --meta-steps 6 --reset-interval 3 --test-tasks catch"
TINY_TEST = "--test-steps 4e3 --test-envs 4 --test-seeds 2 --test-learning-rates 1e-2"


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """(folder, what it printed) of a small meta-training run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("meta") / "run"
    code, out, err = finish("meta_train.py", f"{TINY_META} {TINY_TEST} --devices {DEVICES} --out {folder}")
    assert code == 0, err
    return folder, out


def test_meta_training_leaves_weights_metrics_pictures_and_a_table(whole_run):
    folder, out = whole_run
    assert out.startswith(f"{DEVICES} x cpu; 4 units each of small_dense_short, catch")
    assert [int(row["meta_step"]) for row in read_csv(folder / "metrics.csv")] == list(range(6))
    _, metadata = optim4rl.load(folder / "optimizer.npz")
    assert metadata["inputs"] == "normalised" and metadata["meta_steps"] == 6 and metadata["config"]["num_units"] == 4
    assert json.loads((folder / "config.json").read_text())["versions"]["jax"] == jax.__version__
    assert (folder / "curves.png").stat().st_size > 1000
    rows = json.loads((folder / "summary.json").read_text())
    assert [row["optimizer"] for row in rows] == ["optim4rl", "untrained_optim4rl", *agents.HAND_DESIGNED]
    assert all(-1 <= row["final"] <= 1 for row in rows) and "rmsprop" in out


def test_a_resume_with_another_config_is_refused(whole_run):
    folder, _ = whole_run
    with pytest.raises(runs.UsageError, match="num_units was 4, now 8$"):
        meta_train.main(f"--num-units 8 --resume {folder}".split())


def test_a_run_is_never_overwritten(whole_run):
    folder, _ = whole_run
    before = (folder / "optimizer.npz").read_bytes()
    with pytest.raises(runs.UsageError, match="already holds a run"):
        meta_train.main(f"{TINY_META} {TINY_TEST} --out {folder}".split())
    assert (folder / "optimizer.npz").read_bytes() == before


def test_the_table_is_without_influence_on_what_is_learned(whole_run, tmp_path, capsys):
    meta_train.main(f"{TINY_META} --test-tasks , --out {tmp_path / 'again'}".split())
    # JAX runs already: as many devices as share the units equally
    assert capsys.readouterr().out.startswith(f"{DEVICES} x cpu")
    again, _ = optim4rl.load(tmp_path / "again" / "optimizer.npz")
    learned, _ = optim4rl.load(whole_run[0] / "optimizer.npz")
    jax.tree.map(np.testing.assert_array_equal, again, learned)
    assert np.abs(learned["m"]["readout_kernel"]).max() > 1e-3  # something was learned


def test_a_table_that_was_stopped_trains_no_finished_agent_again(whole_run, tmp_path, monkeypatch):
    folder = shutil.copytree(whole_run[0], tmp_path / "run")
    expected = (folder / "summary.json").read_text()
    (folder / "summary.json").unlink()
    monkeypatch.setattr(agents, "_live", None)  # what trains them
    meta_train.main(["--resume", str(folder)])
    assert (folder / "summary.json").read_text() == expected


def test_a_killed_evaluation_continues_to_the_same_result_and_runs_nothing_twice(whole_run, tmp_path):
    """Of the learned weights and of Adam, on a gridworld and a robot."""
    flags = f"--tasks catch,inverted_pendulum --optimizers optim4rl,adam --weights {whole_run[0] / 'optimizer.npz'}"
    flags += " --learning-rate 1e-3 --num-envs 8 --seeds 2 --steps 1e4"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert finish("evaluate.py", f"{flags} --out {whole}")[0] == 0
    process, records = start("evaluate.py", f"{flags} --out {killed}"), killed / "runs"
    wait_until(lambda: len(list(records.glob("catch-*.npz"))) >= 3, process)
    process.kill()
    process.communicate()
    before = {path.name: path.stat().st_mtime_ns for path in records.glob("*.npz")}
    code, out, err = finish("evaluate.py", f"--resume {killed} --render")
    assert code == 0, err
    film = (killed / "inverted_pendulum-adam.html").read_text()
    assert "<canvas" in film and not re.search(r"https?://|<link|<script[^>]+src", film)  # opens without a network
    for name in ("summary.json", "curves.csv"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert all((records / name).stat().st_mtime_ns == time for name, time in before.items())
    assert "episodes without noise" in out and "Mean [least, largest] of 2 seeds" in out
    assert len({tuple(row[x] for x in ("task", "optimizer", "run")) for row in read_csv(killed / "curves.csv")}) == 8
    assert len(json.loads((killed / "summary.json").read_text())) == 4
    assert (killed / "curves.png").stat().st_size > 1000

    params, obs_stats, metadata = kept.load_policy(killed / "policies" / "inverted_pendulum-adam-0.npz")
    returns = tasks.play(brax_env.make(metadata["task"]), params, obs_stats, jax.random.key(0), 8)
    assert metadata["optimizer"] == "adam" and np.all(np.asarray(returns) > 0)
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes((killed / "policies" / "inverted_pendulum-adam-0.npz").read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        kept.load_policy(damaged)


def test_an_evaluation_killed_or_out_of_time_inside_a_run_continues_to_the_same_bits(tmp_path, capsys):
    flags = "--tasks catch --optimizers adam --learning-rate 1e-3,1e-2 --num-envs 8 --seeds 2 --steps 4e4 --devices 1"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    evaluate.main(f"{flags} --out {whole}".split())
    assert "return, whole run" in capsys.readouterr().out
    process = start("evaluate.py", f"{flags} --checkpoint-every 1e-9 --out {broken}")
    under_way = broken / "runs" / "catch-adam-tuning.under_way"

    def in_the_second_run():  # it is looked at while it stands still: the file comes and goes with each group of runs
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.02)
        seen = under_way.exists() and list(broken.glob("runs/*-1.npz"))
        if not seen:
            process.send_signal(signal.SIGCONT)
        return seen

    wait_until(in_the_second_run, process)
    process.kill()
    process.communicate()
    with np.load(under_way) as file:
        points, which = max(file.values(), key=lambda x: int(x) if x.shape == () else -1), file["which"]
    assert 0 < points < 50 and which.shape == (2, 1)  # in the middle of one run
    with pytest.raises(SystemExit) as stop:
        evaluate.main(f"--resume {broken} --time-limit 1e-9".split())
    out = capsys.readouterr().out
    assert stop.value.code == 0 and f"evaluate.py --resume {broken}" in out and "return, whole run" not in out
    evaluate.main(f"--resume {broken}".split())
    for name in ("summary.json", "curves.csv"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
    assert not list(broken.glob("runs/*.under_way"))


def test_a_stopped_evaluation_says_how_to_continue(tmp_path):
    process = start("evaluate.py", f"--tasks catch --optimizers adam --learning-rate 1e-3 --out {tmp_path / 'run'}")
    wait_until((tmp_path / "run" / "runs").exists, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143 and f"evaluate.py --resume {tmp_path / 'run'}" in out and "Traceback" not in err


@pytest.mark.parametrize(
    "program, flags, message",
    [
        ("meta_train.py", "--out /proc/nowhere", "cannot write to /proc/nowhere"),
        ("evaluate.py", "--weights no/such/file.npz", "no/such/file.npz"),
    ],
)
def test_bad_input_ends_with_one_line_and_status_2(program, flags, message):
    code, _, err = finish(program, flags)
    assert code == 2 and message in err and len(err.splitlines()) == 1


def test_units_that_devices_cannot_share_are_refused():
    with pytest.raises(runs.UsageError, match="4 or 6"):
        meta_train.main(["--num-units", "5", "--devices", "2"])


@pytest.mark.parametrize(
    "program, flags, message",
    [
        (meta_train, "--tasks small_dense", "small_dense_short"),
        (meta_train, "--number-of-units 5", "--number-of-units"),
        (meta_train, "--num-unit 5", "--num-unit"),
        (meta_train, "--optimizer adamw", "adamw"),
        (meta_train, "--test-tasks moon", "moon"),
        (meta_train, "--preset large", "large"),
        (meta_train, "--num-units", "--num-units"),
        (evaluate, "--seeds many", "many"),
        (evaluate, "--optimizers adam sgd", "sgd"),
        (evaluate, "--tasks moon", "moon"),
        (evaluate, "--ppo large", "large"),
    ],
)
def test_flags_that_do_not_exist_are_refused_in_a_few_lines(program, flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(flags.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and len(err.splitlines()) < 30


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(tasks=()), "empty"),
        (dict(tasks=("catch", "catch")), "name at least one, each once"),
        (dict(num_envs=0), "--num-envs is 0"),
        (dict(num_units=2**40), "--num-units is 1099511627776"),
        (dict(meta_steps=-1), "--meta-steps is -1"),
        (dict(meta_decay=-0.5), "--meta-decay is -0.5"),
        (dict(meta_learning_rate=float("nan")), "--meta-learning-rate is nan"),
        (dict(alpha=(1e-3, -1.0)), "--alpha is -1.0"),
        (dict(alpha=(1e-3, 1e-3, 1e-3)), "--alpha is 0.001,0.001,0.001, for 2 tasks"),
        (dict(reset_interval=()), "--reset-interval is empty, for 2 tasks"),
        (dict(seed=2**32), "--seed is 4294967296; it must be 0 to 4294967295"),
        (dict(resets="none"), "nres without resets never draws its noise again; give --noise-interval"),
    ],
)
def test_impossible_meta_training_is_refused(changes, message):
    with pytest.raises(runs.UsageError, match=message):
        meta_train.check(meta_train.Config(**changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(optimizers=("adam", "adam")), "--optimizers is adam,adam; name at least one, each once"),
        (dict(seeds=0), "--seeds is 0"),
        (dict(steps=-1.0), "--steps is -1.0"),
        (dict(tasks=("catch",), num_envs=0), "--num-envs is 0"),
        (dict(learning_rate=(0.0,)), "--learning-rate is 0.0"),
        (dict(fixed=("adam",)), "--fixed has 'adam'; give NAME=ALPHA"),
        (dict(fixed=("adam=-1",)), "--fixed has 'adam=-1'"),
        (dict(fixed=("adma=0.1",)), "NAME one of adam"),
        (dict(tasks=("catch",), render=True), "--render films robots"),
        (dict(weights=("star=x.npz",)), "--weights star=x.npz: star is not among --optimizers adam"),
    ],
)
def test_impossible_evaluations_are_refused(changes, message):
    with pytest.raises(runs.UsageError, match=message):
        evaluate.check(evaluate.Config(**{"optimizers": ("adam",), **changes}))


def test_a_missing_policy_is_named_when_it_should_be_filmed(tmp_path):
    task = tasks.Task("inverted_pendulum", None, 1, 1, 1.0, (), play=len)
    with pytest.raises(runs.UsageError, match="no film of adam on inverted_pendulum: .*inverted_pendulum-adam-0.npz"):
        evaluate.film(evaluate.Config(optimizers=("adam",)), tmp_path, [task])


def test_a_finished_run_without_its_checkpoints_is_not_begun_again(whole_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole_run[0], folder)
    shutil.rmtree(folder / "checkpoints")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(runs.UsageError, match="has no checkpoint, but its run has weights"):
        meta_train.main(["--resume", str(folder)])
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_weights_of_another_kind_or_size_are_refused(tmp_path):
    other, large, unknown = (tmp_path / f"{name}.npz" for name in ("other", "large", "unknown"))
    weights.save(unknown, optim4rl.init_meta_params(jax.random.key(0)), {"inputs": "squared"})
    weights.save(other, optim4rl.init_meta_params(jax.random.key(0)), kind="star")
    weights.save(large, optim4rl.init_meta_params(jax.random.key(0), hidden_size=16))
    for path, message in (
        (other, "'star'"),
        (large, "expected"),
        (unknown, "inputs 'squared'; known: normalised, raw"),
    ):
        with pytest.raises(runs.UsageError, match=message):
            evaluate.check(evaluate.Config(optimizers=("optim4rl",), weights=(str(path),)))


def test_each_learned_optimizer_takes_its_own_weights_by_name(tmp_path):
    files = {name: str(tmp_path / f"a=b {name}.npz") for name in agents.LEARNED}
    for i, (name, learned) in enumerate(agents.LEARNED.items()):
        weights.save(files[name], learned.init(jax.random.key(i)), {"inputs": "normalised"}, kind=name)
    given = tuple(f"{name}={file}" for name, file in files.items())
    config = evaluate.Config(optimizers=(*files, "sign_descent"), weights=given, fixed=("star=0.5",))
    assert evaluate.fixed_rates(config) == {"star": [0.5]}
    optimizers = evaluate.make_optimizers(config)
    for i, (name, learned) in enumerate(agents.LEARNED.items()):
        jax.tree.map(np.testing.assert_array_equal, optimizers[name].meta_params, learned.init(jax.random.key(i)))
        assert optimizers[name].inputs == "normalised"
    with pytest.raises(
        runs.UsageError, match="linear_optim needs weights: python meta_train.py --optimizer linear_optim"
    ):
        evaluate.make_optimizers(evaluate.Config(optimizers=("linear_optim",)))
    with pytest.raises(runs.UsageError, match="holds weights of 'star', not of 'l2lgd2'"):
        evaluate.make_optimizers(evaluate.Config(optimizers=("l2lgd2",), weights=(f"l2lgd2={files['star']}",)))


def test_velo_is_meta_trained_and_evaluated_with_its_published_file_and_its_own(tmp_path, monkeypatch, capsys):
    small = velo.VELO._replace(init=lambda key: velo.init_meta_params(key, hidden_size=16, bank_size=8))
    monkeypatch.setitem(agents.LEARNED, "velo", small)
    flags = "--optimizer velo --tasks catch --num-units 2 --num-envs 2 --meta-steps 2 --reset-interval 2"
    meta_train.main(f"{flags} --test-tasks , --devices 1 --out {tmp_path / 'meta'}".split())
    rows = read_csv(tmp_path / "meta" / "metrics.csv")
    assert len(rows) == 2 and all(np.isfinite(float(row["catch/meta_loss"])) for row in rows)
    published = pathlib.Path(__file__).parent / "data" / "velo_small_params.msgpack"
    flags = f"--tasks catch --optimizers velo --num-envs 2 --seeds 2 --steps 1e3 --weights velo={published}"
    evaluate.main(f"{flags} --out {tmp_path / 'test'}".split())
    assert f"{DEVICES} x cpu; 2 seeds" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "test" / "summary.json").read_text())
    assert row["optimizer"] == "velo" and row["alpha"] == 1.0 and -1 <= row["final"] <= 1
    copy, own = tmp_path / "test" / "weights" / "velo.npz", tmp_path / "meta" / "optimizer.npz"  # a copy for --resume
    for file in (copy, own):
        (optimizer,) = evaluate.make_optimizers(
            evaluate.Config(optimizers=("velo",), weights=(f"velo={file}",))
        ).values()
        assert optimizer.meta_params["lstm"]["h0"].shape == (1, 16)


@pytest.mark.parametrize("given", [(), ("velo=no/such/file",)])
def test_velo_without_weights_is_told_in_one_line_where_they_can_be_had(given):
    with pytest.raises(runs.UsageError, match="^[^\n]*storage.googleapis.com/gresearch[^\n]*$"):
        evaluate.make_optimizers(evaluate.Config(optimizers=("velo",), weights=given))


def test_shipped_weights_are_found_by_name():
    names = {file.stem for file in evaluate.WEIGHTS.glob("*.npz")}
    assert names == {"optim4rl", "gated_adam"}
    optimizers = evaluate.make_optimizers(evaluate.Config(optimizers=tuple(names)))
    for name in names:
        untrained = agents.untrained(name, jax.random.key(0)).meta_params
        assert any(np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (optimizers[name].meta_params, untrained))))
