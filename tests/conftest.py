"""What the tests share: where they run, and the golden numbers of the paper's reference implementation."""

import os
import pathlib
import tempfile

import jax
import numpy as np
import pytest
from programs import DEVICES, ROOT

# Tolerances are those of float32 on a CPU: an accelerator multiplies matrices less exactly. Set the variable to try one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all time of the tests is compilation. These flags make it five times as fast, and the programs two to four times slower.
# Code in one piece instead of many, for threads that other tests keep busy, is another tenth.
CHEAP = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
os.environ.setdefault("XLA_FLAGS", CHEAP)
# Compiled programs are shared by the processes of the tests, and by the next run of them.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(tempfile.gettempdir()) / f"optim4rl-{jax.__version__}")
)
# JAX leaves out what took less than a second to compile, here nearly all. A process of a program finds each of them in the cache;
# of the tests' own, whose smallest ones are never seen again, writing those would cost more than it saves.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
# A program that another process is just writing cannot be read, and is compiled again.
os.environ.setdefault("PYTHONWARNINGS", "ignore:Error reading persistent compilation cache:UserWarning")
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update(
    "jax_num_cpu_devices", DEVICES
)  # for the tests that share units among devices; all else uses the first


@pytest.fixture(scope="session")
def golden():
    """Arrays by name, e.g. "Optim4RL/updates": outputs of the reference implementation in float32 on a CPU."""
    with np.load(ROOT / "tests" / "data" / "optim4rl_a2c.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="session")
def golden_weights(golden):
    """Function: prefix -> the arrays below it, e.g. "Optim4RL/param/" -> {"rnn1/ir/kernel": array, ...}."""
    return lambda prefix: {name.removeprefix(prefix): x for name, x in golden.items() if name.startswith(prefix)}
