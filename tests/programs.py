"""The programs run as a user runs them: real processes, real files."""

import csv
import pathlib
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
TINY_META = "--tasks small_dense_short,catch --num-units 4 --meta-steps 6 --reset-interval 3 --test-tasks catch"
TINY_TEST = "--test-steps 4e3 --test-envs 4 --test-seeds 2 --test-learning-rates 1e-2"


def start(program, flags):
    """A process of "meta_train.py" or of "experiments.full_size", which is started as a module."""
    place = [str(ROOT / program)] if program.endswith(".py") else ["-m", program]
    command = [sys.executable, *place, *shlex.split(flags)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(program, flags):
    """(exit status, what it printed, its errors)"""
    process = start(program, flags)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
