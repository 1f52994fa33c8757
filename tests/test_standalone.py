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
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONCEPTS = ("gridworld", "a2c", "optim4rl", "pipeline", "evolution", "brax_env", "ppo")
LEARNED = tuple(sorted(path.stem for path in (ROOT / "learned_optimizers").glob("*.py")))
PATHS = {name: ROOT / f"{name}.py" for name in CONCEPTS}
PATHS |= {name: ROOT / "learned_optimizers" / f"{name}.py" for name in LEARNED}
FLOORS = ("harness", "experiments", "benchmarks")
FILES = [path for place in (".", "learned_optimizers", *FLOORS) for path in sorted((ROOT / place).glob("*.py"))]


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
    (folder / f"{name}.py").write_text(PATHS[name].read_text())
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", example(PATHS[name])]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The finished example of each file: two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(PATHS, pool.map(lambda name: run_alone(name, tmp_path_factory.mktemp(name)), PATHS)))


@pytest.mark.parametrize("name", PATHS)
def test_a_file_copied_alone_runs_its_example(finished, name):
    assert name in imports_of(example(PATHS[name]))
    assert finished[name].returncode == 0, finished[name].stderr


@pytest.mark.parametrize("name", PATHS)
def test_a_file_made_to_be_copied_says_what_it_needs_and_imports_no_other_file_of_ours(name):
    text = PATHS[name].read_text()
    assert text.startswith("# SPDX-License-Identifier: MIT\n") and "\nCopy this file: needs jax" in text
    assert not imports_of(text) & ({path.stem for path in FILES} | set(FLOORS) | {"learned_optimizers"})


@pytest.mark.parametrize("number", [0, 1])
def test_the_readme_s_examples_run_as_pasted(number, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(ROOT)
    exec(blocks[number], names := {})
    params = {"w": jnp.ones((3, 2))}
    updates, _ = names["optimizer"].update(params, names["optimizer"].init(params), params)
    assert (updates["w"] < 0).all()
    assert number == 1 or (names["params"]["w"] < 1).all()  # the second block makes an optimizer only


def test_the_readme_names_files_and_functions_that_exist():
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\((?!https?://)([^)#]+)", text)
    assert len(links) > 25 and not [link for link in links if not (ROOT / link).exists()]
    last = None
    for row in re.findall(r"^\|[^|]*\|[^|]*\|$", text.split("## Paper to code")[1].split("##")[0], re.M):
        file = (re.findall(r"\]\((\w+\.py)\)", row) or [None])[0]
        last = file or last  # a row without a file is of the one above
        for name in re.findall(r"`(\w+)`", row):
            assert f"def {name}(" in (ROOT / last).read_text(), (last, name)


def test_nine_files_stand_at_the_root():
    assert {path.stem for path in ROOT.glob("*.py")} == {*CONCEPTS, "meta_train", "evaluate"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_down_and_no_file_needs_a_neural_network_library(path):
    """experiments, benchmarks -> programs -> harness -> concepts and learned optimizers."""
    imports = imports_of(path.read_text())
    assert not imports & {"flax", "haiku", "equinox", "tensorflow"}
    if path.parent.name == "harness":
        assert not imports & {"meta_train", "evaluate", "experiments", "benchmarks"}
    if path.parent == ROOT:
        assert not imports & {"experiments", "benchmarks"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_can_be_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 350
