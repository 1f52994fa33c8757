"""What the programs share at the command line: flags from a config dataclass, one-line errors, devices, a run's folder."""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import signal
import sys
import time
import types
import typing

import jax
import numpy as np
from jax.experimental import multihost_utils


PROCESS_FLAGS = ("coordinator", "num_processes", "process_id")
# What may differ between a run and its resumption: the result does not depend on it.
FREE_FLAGS = (*PROCESS_FLAGS, "out", "resume", "devices", "checkpoint_every", "render")


class UsageError(Exception):
    """Bad input: its message is printed in one line and the program exits with status 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f"{message}; --help shows all flags")


def flag(default, help_text):
    """A field of a config dataclass that parse makes a flag of."""
    return dataclasses.field(default=default, metadata={"help": help_text})


def parse(config_class, presets, description, argv=None):
    """A config from the command line: one flag per field, `--preset` choosing the defaults.

    Args:
        config_class: frozen dataclass; each field is made by flag; a tuple field takes a comma-separated list.
        presets: {name: {field: value}}; the first is the default.
        description: text for --help.
        argv: list of strings, by default the process's.
    """
    default, *_ = presets
    choice = Parser(add_help=False)
    choice.add_argument("--preset", choices=list(presets), default=default)
    choice.add_argument("--resume")
    chosen = choice.parse_known_args(argv)[0]
    start = config_class(**presets[chosen.preset])
    if chosen.resume:
        of_this_start = {name: value for name, value in vars(start).items() if name in PROCESS_FLAGS}
        start = dataclasses.replace(read_config(config_class, chosen.resume), **of_this_start)
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset", choices=list(presets), default=default, help=f"defaults for all other flags ({default})"
    )
    for field in dataclasses.fields(config_class):
        value = getattr(start, field.name)
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        help_text = f"{field.metadata['help']} ({'none' if shown in (None, '') else shown})"
        name = "--" + field.name.replace("_", "-")
        kind = {"action": "store_true"} if field.type is bool else {"type": _reader(field.type)}
        parser.add_argument(name, default=value, help=help_text.replace("%", "%%"), **kind)
    values = vars(parser.parse_args(argv))
    values.pop("preset")
    return config_class(**values)


def _reader(annotation):
    """The function that reads a flag of that type: str, int, float, tuple[str, ...], tuple[float, ...], or any of them | None."""
    if isinstance(annotation, types.UnionType):
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) is not tuple:
        return annotation
    item = typing.get_args(annotation)[0]

    def comma_separated(text):
        return tuple(item(part) for part in text.split(",") if part)

    return comma_separated


def check_positive(config, names):
    """Raises UsageError where a number of the config, or one in a tuple, is not positive. None, no number yet, passes."""
    for name in names:
        values = getattr(config, name)
        for value in values if isinstance(values, tuple) else (values,):
            if value is not None and not 0 < value <= 1e12:
                raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be positive and at most 1e12")


def run(main):
    """Runs a program's main(); bad input and Ctrl-C end it with one line and the usual exit status."""
    try:
        main()
    except UsageError as error:
        print(f"{pathlib.Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


_stops = []  # the list of signals of the graceful_stop that is entered, if one is


@contextlib.contextmanager
def graceful_stop():
    """Within it, a first Ctrl-C or SIGTERM (a preempted job) only fills the list that it yields; a second one ends the program.

    One within another yields the list of the outer one: what comes between two inner ones stops the next.
    """
    if _stops:
        yield _stops[0]
        return
    received = []

    def on_signal(number, frame):
        signal.signal(number, before[number])
        received.append(number)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    _stops.append(received)
    try:
        yield received
    finally:
        _stops.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def join_processes(coordinator, num_processes, process_id):
    """Makes this process one of several of a run, on one host or many (jax.distributed). Comes before anything uses a device.

    Args:
        coordinator: "HOST:PORT" of process 0; "auto": SLURM, MPI or a TPU pod tells all three; None: the only process.
        num_processes, process_id: ints, or None with "auto".
    """
    known = {"num_processes": num_processes, "process_id": process_id}
    if coordinator in (None, "auto"):
        if stray := [f"--{name.replace('_', '-')}" for name, value in known.items() if value is not None]:
            raise UsageError(f"{' and '.join(stray)} without --coordinator HOST:PORT, the address of process 0")
    elif num_processes is None or process_id is None or not 0 <= process_id < num_processes:
        raise UsageError(f"--process-id is {process_id} of --num-processes {num_processes}; it must be 0 to N - 1 of N")
    if coordinator is None:
        return
    address = {} if coordinator == "auto" else known | {"coordinator_address": coordinator}
    try:
        jax.distributed.initialize(**address, shutdown_timeout_seconds=60)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"--coordinator {coordinator}: cannot meet the other processes ({error})") from None


def is_first_process():
    """Whether this process is the one that prints and writes; all compute."""
    return jax.process_index() == 0


def highest(*numbers):
    """The highest value of each number among all processes, an int array: what one of them wants, all do at the same step."""
    if jax.process_count() == 1:
        return np.array(numbers, int)
    return multihost_utils.process_allgather(np.array(numbers, int)).max(0)


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
    jax.config.update("jax_num_cpu_devices", wanted or os.cpu_count())
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "optim4rl"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    processes, local = jax.process_count(), jax.local_device_count()
    if wanted is not None and wanted > local:
        raise UsageError(f"--devices is {wanted}, but there are {local}")
    count = wanted or (local if divides is None else math.gcd(divides // processes, local))
    of_process = lambda i: [device for device in jax.devices() if device.process_index == i][:count]
    return jax.sharding.Mesh([device for i in range(processes) for device in of_process(i)], ("units",))


def command():
    """The command line, without the place where this repository happens to lie."""
    return " ".join(["python", pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])


def new_folder(out, name, config):
    """Makes a run's folder and writes its config.json: every field, the command and the versions. Never overwrites a run."""
    if out is None and jax.process_count() > 1:
        raise UsageError("several processes share one folder; name it with --out")
    folder = pathlib.Path(out or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if not is_first_process():
        return folder
    if (folder / "config.json").exists():
        raise UsageError(f"{folder} already holds a run; choose another folder with --out")
    versions = {package: importlib.metadata.version(package) for package in ("jax", "optax", "brax", "numpy")}
    content = {
        "command": command(),
        "config": dataclasses.asdict(config),
        "versions": versions,
        "python": sys.version.split()[0],
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / "config.json", "w") as file:
            json.dump(content, file, indent=1)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}; choose another folder with --out") from None
    return folder


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
        for field in dataclasses.fields(config_class):
            if field.name not in values:
                raise ValueError(f"its config has no {field.name}: an earlier version made it")
            if isinstance(values[field.name], list) != (typing.get_origin(field.type) is tuple):
                raise ValueError(f"{field.name} is {values[field.name]}, as an earlier version had it")
        return config_class(
            **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder} holds no run to resume ({error})") from None


def old_folder(folder, config):
    """The folder of a run to go on with; refused if its config was another one."""
    before, now = dataclasses.asdict(read_config(type(config), folder)), dataclasses.asdict(config)
    changed = [name for name in now if name not in FREE_FLAGS and now[name] != before[name]]
    differing = [f"{name} was {before[name]}, now {now[name]}" for name in changed]
    if differing:
        raise UsageError(f"{folder} was run with another config: {'; '.join(differing)}")
    return pathlib.Path(folder)
