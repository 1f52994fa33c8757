"""What may happen to a long run of meta-training: kills, full disks, damaged files, several processes."""

import os
import shutil
import signal
import socket
from functools import partial

import jax
import numpy as np
import pytest
from programs import DEVICES, read_csv, start, start_on_full_disk, wait_until

import meta_train
from harness import metrics, runs, weights

FLAGS = "--preset gradient --tasks catch --num-units 4 --meta-steps 5 --reset-interval 2 --test-tasks , --checkpoint-every 1e-9"
FLAGS += f" --devices {DEVICES}"


@pytest.fixture(scope="module")
def sound_run(tmp_path_factory):
    """The folder of a run that nothing disturbed; it keeps the checkpoints of meta-steps 3, 4 and 5."""
    folder = tmp_path_factory.mktemp("sound") / "run"
    meta_train.main(f"{FLAGS} --out {folder}".split())
    return folder


def resume(folder, flags=""):
    """Continues a run here, in another process than the one that was disturbed."""
    meta_train.main(f"--resume {folder} {flags}".split())


def assert_same_run(folder, other, exact=True):
    close = np.testing.assert_array_equal if exact else partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, *(weights.load(path / "optimizer.npz")[0] for path in (folder, other)))
    rows, others = ([row | {"seconds": ""} for row in read_csv(path / "metrics.csv")] for path in (folder, other))
    assert [row["meta_step"] for row in rows] == [row["meta_step"] for row in others]
    assert rows == others or not exact


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_an_interrupted_run_resumes_to_the_same_bits(sound_run, tmp_path, number, status):
    """After a SIGTERM it continues on one device instead of four: then to rounding."""
    folder, one_device = tmp_path / "run", number == signal.SIGTERM
    process = start("meta_train.py", f"{FLAGS} --out {folder}")
    wait_until(lambda: (folder / "metrics.csv").exists() and len(read_csv(folder / "metrics.csv")) >= 2, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in err, err
    assert number == signal.SIGKILL or f"--resume {folder}" in out
    resume(folder, "--devices 1" if one_device else "")
    assert_same_run(folder, sound_run, exact=not one_device)


def test_two_processes_with_a_device_each_change_only_the_rounding(sound_run, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = FLAGS.replace(f"--devices {DEVICES}", "--devices 1") + f" --out {tmp_path / 'run'} --coordinator {address}"
    processes = [start("meta_train.py", f"{flags} --num-processes 2 --process-id {i}") for i in range(2)]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "2 x cpu" in outputs[0][0]
    assert "results in" not in outputs[1][0] and "meta-step" not in outputs[1][1]  # the first process speaks for all
    assert_same_run(tmp_path / "run", sound_run, exact=False)


def test_a_full_disk_ends_the_run_in_one_line_with_the_checkpoint_before_it_whole(sound_run, tmp_path):
    """A limit on the size of files, too small for a checkpoint, stands for the disk."""
    folder = tmp_path / "run"
    shutil.copytree(sound_run, folder)
    for newer in sorted((folder / "checkpoints").iterdir())[1:]:
        shutil.rmtree(newer)
    process = start_on_full_disk("meta_train.py", f"--resume {folder}", 100_000)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in err, err
    assert err.splitlines()[-1].startswith(f"cannot write to {folder} (") and "is saved; to continue: python" in err
    resume(folder)
    assert_same_run(folder, sound_run)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_offered(sound_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(sound_run, folder)
    for large in (path for path in (folder / "checkpoints" / "5").rglob("*") if path.stat().st_size > 10_000):
        os.truncate(large, 5_000)
    with pytest.raises(runs.UsageError) as error:
        resume(folder)
    assert f"remove it to go on from {folder / 'checkpoints' / '4'}, which is whole" in str(error.value)
    assert "\n" not in str(error.value)
    shutil.rmtree(folder / "checkpoints" / "5")
    resume(folder)
    assert_same_run(folder, sound_run)


def test_a_task_lost_for_good_ends_the_run_and_is_named(tmp_path):
    """Steps of 1e12 overflow every agent's parameters, and so every meta-gradient."""
    flags = (
        "--tasks small_dense_short,catch --num-units 2 --num-envs 1 --meta-steps 60 --alpha 1e12,1e-3 --test-tasks ,"
    )
    with pytest.raises(
        SystemExit, match="the meta-gradient of small_dense_short was not finite in most of the last 20"
    ):
        meta_train.main(f"{flags} --out {tmp_path / 'run'}".split())
    weights.load(tmp_path / "run" / "optimizer.npz")
    rows = read_csv(tmp_path / "run" / "metrics.csv")
    assert len(rows) == 20 and all(row["small_dense_short/skipped"] == "1" for row in rows)  # whatever the clock says


def test_a_task_that_loses_most_meta_steps_is_lost_and_one_that_loses_half_is_not(tmp_path):
    log = metrics.Log(tmp_path / "metrics.csv", ("a", "b"), [1.0, 1.0], 0)
    values = dict.fromkeys(("meta_loss", "episode_return_sum", "episodes", "reward", "diverged"), 0.0)
    for step in range(30):
        log.add(step, [values | {"skipped": step % 10 != 0}, values | {"skipped": step % 2 == 0}])
    assert log.lost_tasks() == ["a"]


def test_a_full_disk_ends_an_evaluation_in_one_line(tmp_path):
    """A limit on the size of files stands for the disk."""
    flags = f"--tasks catch --optimizers adam --learning-rate 1e-3 --seeds 2 --steps 4e4 --num-envs 8 --out {tmp_path / 'run'}"
    process = start_on_full_disk("evaluate.py", flags, 1200)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and err.splitlines()[-1].startswith("cannot write: "), err
    assert "Traceback" not in err and (tmp_path / "run" / "config.json").exists()


def test_processes_that_were_started_with_different_flags_are_refused(monkeypatch):
    config, other = meta_train.Config(), meta_train.Config(num_units=8)
    digests = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        runs.multihost_utils, "process_allgather", lambda x: digests.append(x) or np.stack(digests[-2:])
    )
    runs.check_same_everywhere(config)
    runs.check_same_everywhere(config)
    with pytest.raises(runs.UsageError, match="started with different flags"):
        runs.check_same_everywhere(other)
