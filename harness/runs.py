"""A run of a program: its command line, its folder, its devices and processes, its errors in one line."""

import contextlib
import csv
import dataclasses
import errno
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import platform
import shlex
import sys
import time
import typing
import zlib

import jax
import numpy as np
import tyro
from jax.experimental import multihost_utils

import pipeline

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
ROOT = pathlib.Path(__file__).resolve().parents[1]
# Not of the run but of this start of it: a resumed run does not inherit them.
OF_THIS_START = ("coordinator", "num_processes", "process_id", "time_limit")
# What may differ between a run and its resumption: the result does not depend on it.
FREE_FLAGS = {*OF_THIS_START, "resume", "devices", "checkpoint_every", "render"}


class UsageError(Exception):
    """Bad input: its message is printed in one line and the program exits with status 2."""


def parse(config_class, presets, description, argv=None):
    """A config from the command line: a flag per field, whose comment is its help; a tuple's takes commas or spaces.

    config_class: frozen dataclass; presets: {name: {field: value}}, the other defaults that `--preset NAME` chooses;
    description: text for --help; argv: list of strings, by default the process's.
    """
    argv = sys.argv[1:] if argv is None else argv
    argv = [part for argument in argv for part in (argument.split("=", 1) if argument.startswith("--") else [argument])]
    if "" in argv:
        before = ["the first argument", *argv][argv.index("")]
        raise UsageError(f"{before} has an empty value; leave it out, or give , for an empty list")
    values = dict(itertools.pairwise([*argv, None]))  # what follows each flag
    preset, resume, start = values.get("--preset"), values.get("--resume"), config_class()
    if resume is not None:
        of_this_start = {name: value for name, value in vars(start).items() if name in OF_THIS_START}
        start = dataclasses.replace(read_config(config_class, resume), **of_this_start)
    elif preset in presets:
        start = dataclasses.replace(start, preset=preset, **presets[preset])
    config = tyro.cli(config_class, default=start, args=_split_lists(config_class, argv), description=description)
    changed = [name for name in vars(start).keys() - FREE_FLAGS if getattr(config, name) != getattr(start, name)]
    if resume is not None and changed:
        differing = "; ".join(f"{name} was {getattr(start, name)}, now {getattr(config, name)}" for name in changed)
        raise UsageError(f"{resume} was run with another config: {differing}")
    return config


def _split_lists(config_class, argv):
    """The same arguments, those of tuples split at commas: tyro takes spaces only."""
    lists = {flag_of(field.name) for field in dataclasses.fields(config_class) if _is_tuple(field.type)}
    result, of_list = [], False
    for argument in argv:
        of_list = argument.replace("_", "-") in lists if argument.startswith("--") else of_list
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


def check_seed(*seeds):
    """Raises UsageError for a seed that would alias another one: JAX takes 32 bits of it."""
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise UsageError(f"--seed is {seed}; it must be 0 to 4294967295")


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
    except BrokenPipeError:  # what reads our output has ended, for example head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
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

    coordinator: "HOST:PORT" of process 0; "auto": SLURM, MPI or a TPU pod tells all three; None: the only process.
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
    return multihost_utils.process_allgather(np.array(numbers, int)).max(0)


def check_same_everywhere(config):
    """Raises UsageError where the processes of one run were started with different values."""
    shared = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE_FLAGS | {"out"}}
    mine = np.uint32(zlib.crc32(json.dumps(shared, sort_keys=True).encode()))
    if np.ptp(multihost_utils.process_allgather(mine)):
        raise UsageError("the processes of this run were started with different flags; give all of them the same")


def use_devices(wanted, divides=None):
    """The jax.sharding.Mesh with the axis "units" of `wanted` devices of each process; also sets the compilation cache.

    None: all devices, on a CPU one per core, or the largest number of them that divides so many units.
    """
    if wanted is not None and wanted < 1:
        raise UsageError(f"--devices is {wanted}; it must be at least 1")
    with contextlib.suppress(RuntimeError):  # JAX runs already, for example in a notebook: its devices are taken
        jax.config.update("jax_num_cpu_devices", wanted or usable_cores())
    if not jax.config.jax_compilation_cache_dir:  # the environment's JAX_COMPILATION_CACHE_DIR comes first
        jax.config.update("jax_compilation_cache_dir", str(cache_folder()))
    processes, local = jax.process_count(), jax.local_device_count()
    if wanted is not None and wanted > local:
        raise UsageError(f"--devices is {wanted}, but there are {local}")
    count = wanted or (local if divides is None else math.gcd(divides // processes, local))
    if divides is not None:
        try:
            pipeline.check(pipeline.Config(num_units=divides), processes * count)
        except ValueError as error:
            raise UsageError(f"{error}; or change --devices") from None
    of_process = lambda i: [device for device in jax.devices() if device.process_index == i][:count]
    return jax.sharding.Mesh([device for i in range(processes) for device in of_process(i)], ("units",))


def usable_cores():
    """The number of cores that this process may use, fewer than the machine has under taskset or in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cache_folder():
    """Where compiled programs are kept: a folder per version of jaxlib and per processor, whose programs are no use to another."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    model = platform.processor()
    with contextlib.suppress(OSError, StopIteration):  # Linux
        model = next(line for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    processor = zlib.crc32(f"{platform.machine()} {model}".encode())
    return cache / "optim4rl" / f"jaxlib-{importlib.metadata.version('jaxlib')}-{processor:08x}"


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
        write_json(folder / "config.json", content)
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
    """Within it, a file to write, its folder made; it takes the place of what was at the path only when it is complete."""
    partial = pathlib.Path(f"{path}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial, mode) as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path, content):
    with whole_file(path, "w") as file:
        json.dump(content, file, indent=1)


def write_csv(path, header, rows):
    """header: names of the columns; rows: iterables of values."""
    with whole_file(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def read_config(config_class, folder):
    """The config of the run in a folder."""
    try:
        values = json.loads((pathlib.Path(folder) / "config.json").read_text())["config"]
        fields = {field.name: field.type for field in dataclasses.fields(config_class)}
        other = fields.keys() ^ values.keys()
        other |= {name for name in fields.keys() - other if isinstance(values[name], list) != _is_tuple(fields[name])}
        if other:
            raise ValueError(f"another version made it; what differs: {', '.join(sorted(other))}")
        return config_class(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{folder} holds no run to resume ({error})") from None


def open_folder(name, config):
    """The folder of config.resume, or a new one."""
    return pathlib.Path(config.resume) if config.resume else new_folder(config.out, name, config)
