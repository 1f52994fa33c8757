"""Each concept file works alone, copied into an empty folder, and the example in its header runs as printed."""

import ast
import os
import pathlib
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONCEPTS = ("gridworld", "brax_env", "a2c", "ppo", "optim4rl", "gated_adam", "baselines", "velo", "pipeline")
FILES = sorted(path.name for path in ROOT.glob("*.py"))


def imports_of(program):
    """Top-level names of all modules that a program imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module.split(".")[0])
    return names


def example(path):
    """The indented lines after the line that begins with "Example" in a file's header."""
    lines = iter(ast.get_docstring(ast.parse(path.read_text())).splitlines())
    for line in lines:
        if line.startswith("Example"):
            break
    block = []
    for line in lines:
        if line and not line.startswith("    "):
            break
        block.append(line)
    return textwrap.dedent("\n".join(block))


def run_alone(name, folder):
    """Runs a file's example in a folder that holds nothing else of ours."""
    source = ROOT / f"{name}.py"
    (folder / source.name).write_text(source.read_text())
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", example(source)], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The finished example of each concept file: two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CONCEPTS, pool.map(lambda name: run_alone(name, tmp_path_factory.mktemp(name)), CONCEPTS)))


@pytest.mark.parametrize("name", CONCEPTS)
def test_a_file_copied_alone_runs_its_example(finished, name):
    program = example(ROOT / f"{name}.py")
    assert name in imports_of(program)
    assert finished[name].returncode == 0, finished[name].stderr


def test_the_readme_s_examples_run_as_printed(monkeypatch):
    *optimizers, schedule = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(ROOT)
    for block in optimizers:
        names = {"params": {"w": jnp.ones((3, 2))}, "grads": {"w": jnp.full((3, 2), 1e-3)}}
        exec(block, names)
        assert (names["updates"]["w"] < 0).all()
    assert len(optimizers) == 2
    exec(schedule, names := {})
    printed = [float(number) for number in re.findall(r"0?\.\d+", schedule.split("#")[1])]
    np.testing.assert_allclose(-names["updates"][np.array([0, 59, 124, 249, 487]), 0], printed, atol=6e-4)


@pytest.mark.parametrize("name", CONCEPTS)
def test_a_concept_file_imports_no_other_file_of_ours(name):
    assert not imports_of((ROOT / f"{name}.py").read_text()) & {path.stem for path in ROOT.glob("*.py")}


@pytest.mark.parametrize("file", FILES)
def test_no_file_needs_a_neural_network_library(file):
    assert not imports_of((ROOT / file).read_text()) & {"flax", "haiku", "equinox"}


@pytest.mark.parametrize("file", FILES)
def test_every_file_can_be_read_in_one_sitting(file):
    assert len((ROOT / file).read_text().splitlines()) <= 360
