"""The programs run as a user runs them: real processes, real files."""

import csv
import os
import pathlib
import shlex
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEVICES = 4  # of the tests' own process. Only one with as many finds what it compiled in the cache.


def start(program, flags, **env):
    """A process of "meta_train.py" or of "experiments.full_size", which is started as a module."""
    place = [str(ROOT / program)] if program.endswith(".py") else ["-m", program]
    command = [sys.executable, *place, *shlex.split(flags)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | env, **pipes)


def start_on_full_disk(program, flags, size):
    """A process that can write no file beyond a size in bytes. It would leave the shared cache full of torn programs."""
    import resource  # not on Windows

    process = start(program, flags, JAX_ENABLE_COMPILATION_CACHE="false")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    return process


def finish(program, flags):
    """(exit status, what it printed, its errors)"""
    process = start(program, flags)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()  # nothing, where it has ended
    return process.returncode, out, err


def wait_until(happened, process):
    """Until happened() is true; fails where the process ends before. Asks now and then: a loop without a pause takes a core."""
    while not happened():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
