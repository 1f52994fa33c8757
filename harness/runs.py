"""A run of a program: its command line, its folder, its devices and processes, its errors in one line."""

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import shlex
import sys
import time
import typing

import jax
import numpy as np
import tyro
from jax.experimental import multihost_utils

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
ROOT = pathlib.Path(__file__).resolve().parents[1]
# Not of the run but of this start of it: a resumed run does not inherit them.
OF_THIS_START = ("coordinator", "num_processes", "process_id", "time_limit")
# What may differ between a run and its resumption: the result does not depend on it.
FREE_FLAGS = (*OF_THIS_START, "out", "resume", "devices", "checkpoint_every", "render")


class UsageError(Exception):
    """Bad input: its message is printed in one line and the program exits with status 2."""


def parse(config_class, presets, description, argv=None):
    """A config from the command line: a flag per field, whose comment is its help; `--preset` chooses other defaults.

    Args:
        config_class: frozen dataclass with a field preset; a tuple's flag takes values separated by commas or spaces.
        presets: {name: {field: value}}.
        description: text for --help.
        argv: list of strings, by default the process's.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    for before, argument in zip(["the first argument", *argv], argv):
        if argument == "" or (argument.startswith("--") and argument.endswith("=")):
            raise UsageError(f"{argument[:-1] or before} has an empty value; leave it out, or give , for an empty list")
    argv = _split_lists(config_class, argv)
    preset, resume = _value_of("--preset", argv), _value_of("--resume", argv)
    start = config_class()
    if resume is not None:
        if beside := [flag for flag in ("--preset", "--out") if _value_of(flag, argv) is not None]:
            raise UsageError(f"{beside[0]} beside --resume: the run in {resume} has its own")
        of_this_start = {name: value for name, value in vars(start).items() if name in OF_THIS_START}
        start = dataclasses.replace(read_config(config_class, resume), **of_this_start)
    elif preset in presets:
        start = dataclasses.replace(start, preset=preset, **presets[preset])
    return tyro.cli(config_class, default=start, args=argv, description=description)


def _value_of(flag, argv):
    """The value of a flag in a list of arguments, or None."""
    for i, argument in enumerate(argv):
        if argument.startswith(f"{flag}="):
            return argument.removeprefix(f"{flag}=")
        if argument == flag:
            return argv[i + 1] if i + 1 < len(argv) else None
    return None


def _split_lists(config_class, argv):
    """The same arguments, those of tuples split at commas: tyro takes spaces only."""
    lists = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(config_class) if _is_tuple(f.type)}
    result, of_list = [], False
    for argument in argv:
        if argument.startswith("--"):
            name, *value = argument.split("=", 1)
            of_list = name.replace("_", "-") in lists
            result.append(argument if not (of_list and value) else name)
            argument = value[0] if of_list and value else None
        if argument is not None:
            result += [part for part in argument.split(",") if part] if of_list else [argument]
    return result


def _is_tuple(annotation):
    return typing.get_origin(annotation) is tuple


def check_positive(config, names):
    """Raises UsageError where a number of the config, or one in a tuple, is not positive. None, no number yet, passes."""
    for name in names:
        values = getattr(config, name)
        for value in values if isinstance(values, tuple) else (values,):
            limit = 2**31 - 1 if isinstance(value, int) else 1e12
            if value is not None and not 0 < value <= limit:
                raise UsageError(f"{flag_of(name)} is {value}; it must be positive and at most {limit:g}")


def check_different(config, names):
    """Raises UsageError where a tuple of the config is empty or names something twice."""
    for name in names:
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            given = ",".join(map(str, values)) or "empty"
            raise UsageError(f"{flag_of(name)} is {given}; name at least one, each once")


def check_seed(seed):
    """Raises UsageError for a seed that would alias another one: JAX takes 32 bits of it."""
    if not 0 <= seed < 2**32:
        raise UsageError(f"--seed is {seed}; it must be 0 to 4294967295")


def usage(check, *args):
    """check(*args), a ValueError of which is a UsageError here."""
    try:
        return check(*args)
    except ValueError as error:
        raise UsageError(error) from None


def flag_of(name):
    """The flag of a config's field."""
    return "--" + name.replace("_", "-")


def run(main):
    """Runs a program's main(); bad input and Ctrl-C end it with one line and the usual exit status."""
    try:
        main()
    except UsageError as error:
        print(f"{pathlib.Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        print(f"cannot write: {error}; what was finished before is kept", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def join_processes(coordinator, num_processes, process_id):
    """Makes this process one of several of a run, on one host or many (jax.distributed). Comes before anything uses a device.

    Args:
        coordinator: "HOST:PORT" of process 0; "auto": SLURM, MPI or a TPU pod tells all three; None: the only process.
        num_processes, process_id: ints, or None with "auto".
    """
    known = {"num_processes": num_processes, "process_id": process_id}
    if coordinator in (None, "auto"):
        if stray := [flag_of(name) for name, value in known.items() if value is not None]:
            raise UsageError(f"{' and '.join(stray)} without --coordinator HOST:PORT, the address of process 0")
    elif num_processes is None or process_id is None or not 0 <= process_id < num_processes:
        raise UsageError(f"--process-id is {process_id} of --num-processes {num_processes}; it must be 0 to N - 1 of N")
    if coordinator is None:
        return
    address = {} if coordinator == "auto" else known | {"coordinator_address": coordinator}
    try:
        jax.distributed.initialize(**address, local_device_ids=slurm_gpus(os.environ), shutdown_timeout_seconds=60)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"--coordinator {coordinator}: cannot meet the other processes ({error})") from None


def slurm_gpus(environ):
    """The ids of all GPUs of a node whose only task is this one; None: JAX decides, which would take one GPU per task."""
    alone = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", "")).partition("(")[0] == "1"
    gpus = environ.get("SLURM_GPUS_ON_NODE", "")
    return list(range(int(gpus))) if alone and gpus.isdigit() and int(gpus) else None


def is_first_process():
    """Whether this process is the one that prints and writes; all compute."""
    return jax.process_index() == 0


def highest(*numbers):
    """The highest value of each number among all processes, an int array: what one of them wants, all do at the same step."""
    if jax.process_count() == 1:
        return np.array(numbers, int)
    return multihost_utils.process_allgather(np.array(numbers, int)).max(0)


def check_same_everywhere(config):
    """Raises UsageError where the processes of one run were started with different values."""
    shared = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE_FLAGS}
    digest = hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).digest()
    mine = np.frombuffer(digest[:4], np.uint32).astype(int)
    if jax.process_count() > 1 and np.ptp(multihost_utils.process_allgather(mine), axis=0).any():
        raise UsageError("the processes of this run were started with different flags; give all of them the same")


def use_devices(wanted, divides=None):
    """The mesh of `wanted` devices of each process (None: all; a CPU makes one per core), and a compilation cache.

    Args:
        wanted: number of devices or None.
        divides: if given and wanted is None, the largest number of devices that divides this many units.
    Returns:
        jax.sharding.Mesh with the axis "units".
    """
    if wanted is not None and wanted < 1:
        raise UsageError(f"--devices is {wanted}; it must be at least 1")
    with contextlib.suppress(
        RuntimeError
    ):  # JAX runs already, in a notebook for example: its devices are taken as they are
        jax.config.update("jax_num_cpu_devices", wanted or usable_cores())
    if not jax.config.jax_compilation_cache_dir:  # the environment's JAX_COMPILATION_CACHE_DIR comes first
        jax.config.update("jax_compilation_cache_dir", str(cache_folder()))
    processes, local = jax.process_count(), jax.local_device_count()
    if wanted is not None and wanted > local:
        raise UsageError(f"--devices is {wanted}, but there are {local}")
    count = wanted or (local if divides is None else math.gcd(divides // processes, local))
    of_process = lambda i: [device for device in jax.devices() if device.process_index == i][:count]
    return jax.sharding.Mesh([device for i in range(processes) for device in of_process(i)], ("units",))


def usable_cores():
    """The number of cores that this process may use, fewer than the machine has under taskset or in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cache_folder():
    """Where compiled programs are kept: a folder per version of jaxlib and per processor, whose programs are no use to another."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    try:
        model = next(line for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    except (OSError, StopIteration):
        model = platform.processor()
    processor = hashlib.sha256(f"{platform.machine()} {model}".encode()).hexdigest()[:8]
    return cache / "optim4rl" / f"jaxlib-{importlib.metadata.version('jaxlib')}-{processor}"


def command():
    """The command line, ready to be pasted in the repository's folder."""
    program = pathlib.Path(sys.argv[0]).resolve()
    module = program.relative_to(ROOT).with_suffix("").parts if program.is_relative_to(ROOT) else ()
    start = ["-m", ".".join(module)] if len(module) > 1 else [program.name]
    return shlex.join(["python", *start, *sys.argv[1:]])


def how_to_resume(program, folder):
    """The command that continues a run."""
    return f"to continue: python {program} --resume {shlex.quote(str(folder))}"


def new_folder(out, name, config):
    """Makes a run's folder and writes its config.json: every field, the command and the versions. Never overwrites a run."""
    if out is None and jax.process_count() > 1:
        raise UsageError("several processes share one folder; name it with --out")
    folder = pathlib.Path(out or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if not is_first_process():
        return folder
    if (folder / "config.json").exists():
        raise UsageError(f"{folder} already holds a run; choose another folder with --out")
    content = {
        "command": command(),
        "config": dataclasses.asdict(config),
        "versions": {package: importlib.metadata.version(package) for package in ("jax", "optax", "numpy")},
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / "config.json", "w") as file:
            json.dump(content, file, indent=1)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}; choose another folder with --out") from None
    return folder


@contextlib.contextmanager
def only_one(folder):
    """Within it, no other process on this machine may work in the folder. The lock ends with the process, however it dies."""
    if fcntl is None or not is_first_process():
        yield
        return
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process is working in {folder}; wait for it, or stop it") from None
        yield


@contextlib.contextmanager
def whole_file(path, mode):
    """Within it, a file to write; it takes the place of what was at the path only when it is complete."""
    partial = f"{path}.partial"
    with open(partial, mode) as file:
        yield file
    os.replace(partial, path)


def read_config(config_class, folder):
    """The config of the run in a folder."""
    try:
        values = json.loads((pathlib.Path(folder) / "config.json").read_text())["config"]
        fields = {field.name: field.type for field in dataclasses.fields(config_class)}
        for name in fields.keys() ^ values.keys():
            raise ValueError(
                f"{name} is in {'its' if name in values else 'the present'} config only: another version made it"
            )
        for name, kind in fields.items():
            if isinstance(values[name], list) != _is_tuple(kind):
                raise ValueError(f"{name} is {values[name]}, as another version had it")
        return config_class(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{folder} holds no run to resume ({error})") from None


def old_folder(folder, config):
    """The folder of a run to continue; refused if its config was another one."""
    before, now = dataclasses.asdict(read_config(type(config), folder)), dataclasses.asdict(config)
    changed = [name for name in now if name not in FREE_FLAGS and now[name] != before[name]]
    if changed:
        differing = "; ".join(f"{name} was {before[name]}, now {now[name]}" for name in changed)
        raise UsageError(f"{folder} was run with another config: {differing}")
    return pathlib.Path(folder)


def open_folder(name, config):
    """The folder of config.resume, or a new one."""
    return old_folder(config.resume, config) if config.resume else new_folder(config.out, name, config)
