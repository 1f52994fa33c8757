"""A run's command line, folder, devices and processes."""

import dataclasses
import json
import os
import pathlib
import shlex
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import jax
import pytest

import evaluate
import meta_train
from harness import runs, tasks

ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Config:
    preset: Literal["small", "large"] = "small"  # other defaults
    names: tuple[str, ...] = ("a", "b")  # some names
    sizes: tuple[int, ...] = ()  # some sizes
    rate: float = 0.5  # a rate
    out: str | None = None  # a folder
    resume: str | None = None  # a folder
    render: bool = False  # a film


PRESETS = {"small": {}, "large": dict(sizes=(7, 8), rate=2.0)}


@pytest.mark.parametrize(
    "argv, changes",
    [
        ([], {}),
        (["--names", "c,d", "--rate", "1e-3"], dict(names=("c", "d"), rate=1e-3)),
        (["--names", "c", "d", "--render"], dict(names=("c", "d"), render=True)),
        (["--names=c,d", "--sizes", "1", "2,3"], dict(names=("c", "d"), sizes=(1, 2, 3))),
        (["--names", ",", "--out", "a,b"], dict(names=(), out="a,b")),
        (["--preset", "large"], dict(preset="large", sizes=(7, 8), rate=2.0)),
        (["--rate=3", "--preset=large"], dict(preset="large", sizes=(7, 8), rate=3.0)),
    ],
)
def test_flags_lists_and_presets_become_a_config(argv, changes):
    assert runs.parse(Config, PRESETS, "", argv) == dataclasses.replace(Config(), **changes)


@pytest.mark.parametrize("argv", [["--out", ""], ["--names", ""], ["--render", "--out="]])
def test_empty_values_are_refused(argv):
    with pytest.raises(runs.UsageError, match="^--(out|names) has an empty value"):
        runs.parse(Config, PRESETS, "", argv)


def test_help_shows_every_flag_with_its_comment_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        runs.parse(Config, PRESETS, "What it does.", ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(word in text for word in ("What it does", "--names", "some names", "0.5"))


def test_a_preset_is_the_config_with_other_defaults():
    for program in (meta_train, evaluate):
        for name in program.PRESETS:
            config = runs.parse(program.Config, program.PRESETS, "", ["--preset", name])
            assert config == program.Config(**{"preset": name, **program.PRESETS[name]})


def test_a_resumed_run_takes_its_config_and_nothing_else(tmp_path):
    config = Config(names=("x",), rate=0.25)
    runs.new_folder(tmp_path / "run", "test", config)
    folder = str(tmp_path / "run")
    again = runs.parse(Config, PRESETS, "", ["--resume", folder, "--render"])
    assert again == dataclasses.replace(config, resume=folder, render=True)
    assert runs.open_folder("test", again) == tmp_path / "run"
    for flag, message in (
        (["--preset", "large"], "preset was small, now large"),
        (["--out", "elsewhere"], "out was None, now elsewhere"),
        (["--rate", "0.75"], "rate was 0.25, now 0.75"),
    ):
        with pytest.raises(runs.UsageError, match=f"run was run with another config: {message}"):
            runs.parse(Config, PRESETS, "", ["--resume", folder, *flag])


@pytest.mark.parametrize("change", [dict(names="x"), dict(rate=None, more=1), dict()])
def test_a_config_of_another_version_is_refused(tmp_path, change):
    values = dataclasses.asdict(Config()) | change
    if not change:
        del values["rate"]
    (tmp_path / "config.json").write_text(json.dumps({"config": values}))
    with pytest.raises(runs.UsageError, match="holds no run to resume .*another version"):
        runs.read_config(Config, tmp_path)


def test_the_recorded_command_runs_when_pasted(monkeypatch, tmp_path):
    argv = ["--test-tasks", "", "--out", "a folder/$x", "--names", "a,b"]
    for program, start in (
        (ROOT / "meta_train.py", "meta_train.py"),
        (ROOT / "experiments/full_size.py", "-m experiments.full_size"),
    ):
        monkeypatch.setattr(sys, "argv", [str(program), *argv])
        assert shlex.split(runs.command()) == ["python", *start.split(), *argv]


def test_a_folder_that_is_in_use_is_refused(tmp_path):
    with runs.only_one(tmp_path):
        program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from harness import runs; import pathlib\n"
        program += f"with runs.only_one(pathlib.Path({str(tmp_path)!r})): pass"
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert "another process is working in" in result.stderr
    with runs.only_one(tmp_path):
        pass


def test_all_gpus_of_a_slurm_node_are_taken_by_its_only_task():
    one_task = {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "4", "SLURM_LOCALID": "0"}
    assert runs.slurm_gpus(one_task) == [0, 1, 2, 3]
    assert runs.slurm_gpus(one_task | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}) is None
    assert runs.slurm_gpus({"SLURM_TASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": ""}) is None
    assert runs.slurm_gpus({}) is None


def test_cores_are_those_that_the_process_may_use():
    if hasattr(os, "sched_setaffinity"):
        core = min(os.sched_getaffinity(0))
        program = f"import os, sys; os.sched_setaffinity(0, [{core}]); sys.path.insert(0, {str(ROOT)!r})\n"
        program += "from harness import runs; print(runs.use_devices(None).devices.size)"
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
        assert result.stdout.strip() == "1", result.stderr


def test_the_environments_cache_folder_comes_first(tmp_path):
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import jax; from harness import runs\n"
    program += "runs.use_devices(1); print(jax.config.jax_compilation_cache_dir)"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == str(tmp_path), result.stderr


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
    with pytest.raises(runs.UsageError, match=message):
        runs.join_processes(*processes)


def test_impossible_devices_are_refused():
    for wanted, message in ((0, "--devices is 0"), (len(jax.devices()) + 1, "but there are")):
        with pytest.raises(runs.UsageError, match=message):
            runs.use_devices(wanted)


def test_a_gridworld_program_needs_no_brax():
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules['brax'] = sys.modules['mujoco'] = None\n"
    program += "import evaluate, meta_train; from harness import tasks; tasks.make('catch')"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert set(tasks.ROBOTS) >= {"ant", "humanoid"}
