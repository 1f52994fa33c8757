"""Program: how fast everything is on the machine at hand, as a table and as JSON.

    python -m benchmarks.bench                               # everything
    python -m benchmarks.bench --only optimizer,a2c          # some groups
    python -m benchmarks.bench --only meta --units 8,32,128  # how a meta-step grows with the units

Every number is the median of several runs after one that compiles, whose time is given apart. The meta-steps are measured
in processes of their own, each with an empty compilation cache, so that the time to the first one and the peak memory are
those of a first start; "again" is the same start with the cache filled.
"""

import contextlib
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

import brax_env
import gridworld
import meta_train
import optim4rl
import pipeline
from benchmarks import optim4rl_kernel
from harness import agents, runs, tasks

GROUPS = ("machine", "env", "a2c", "ppo", "optimizer", "sizes", "kernels", "meta", "robots")


@dataclass(frozen=True)
class Config:
    only: tuple[Literal[*GROUPS], ...] = GROUPS  # groups
    units: tuple[int, ...] = (8, 128, 512)  # units of the growing meta-step, beside 32
    repeats: int = 5  # runs of which the median is taken
    out: str | None = None  # JSON file to write; None: print only


def measure(step, state, repeats):
    """(median seconds, compile seconds) of state = step(state), over `repeats` calls after the first."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        state = jax.block_until_ready(step(state))
        times.append(time.perf_counter() - start)
    median = float(np.median(times[1:]))
    return median, times[0] - median


def row(group, name, value, unit, compile_s=None):
    """One measurement as a record, printed as it is made."""
    compiled = "" if compile_s is None else f"compile {compile_s:6.1f} s"
    print(f"{group:10} {name:44} {value:12.4g} {unit:28} {compiled}".rstrip(), flush=True)
    return {"group": group, "name": name, "value": value, "unit": unit, "compile_s": compile_s}


def machine(repeats):
    """What the hardware can do, for comparison: a product of large matrices, and a copy of more than any cache holds."""
    matrix, numbers = jnp.ones((2048, 2048)), jnp.ones(2**27)
    seconds, _ = measure(lambda _: matrix @ matrix, None, repeats)
    yield row("machine", "matrix product", 2 * 2048**3 / seconds / 1e9, "GFLOP/s")
    size = numbers.nbytes
    seconds, _ = measure(jax.jit(jnp.negative, donate_argnums=0), numbers, repeats)
    yield row("machine", "read and write", 2 * size / seconds / 1e9, "GB/s")


def environments(repeats):
    """Random actions in 512 environments, 100 steps per call."""
    for name in (*tasks.PAPER_WORLDS, "catch", "inverted_double_pendulum"):
        robot = name in tasks.ROBOTS
        env = brax_env.make(name) if robot else gridworld.make(name)

        def step(states, key, env=env, robot=robot):
            action_key, env_key = jax.random.split(key)
            shape, keys = (512, env.action_size) if robot else (512,), jax.random.split(env_key, 512)
            draw = jax.random.uniform(action_key, shape)
            actions = 2 * draw - 1 if robot else (draw * env.num_actions).astype(int)
            return jax.vmap(env.step)(keys, states, actions)[0], None

        run = jax.jit(lambda states: jax.lax.scan(step, states, jax.random.split(jax.random.key(0), 100))[0])
        seconds, compile_s = measure(run, jax.vmap(env.reset)(jax.random.split(jax.random.key(1), 512)), repeats)
        yield row("env", name, 51_200 / seconds, "steps/s", compile_s)


def learner_speed(group, name, learner, steps_per_update, optimizer, repeats):
    keys = jax.random.split(jax.random.key(1), 10 if group == "a2c" else 1)
    run = jax.jit(lambda agent: jax.lax.scan(lambda a, k: (learner.update(optimizer, a, k)[0], None), agent, keys)[0])
    seconds, compile_s = measure(run, jax.jit(lambda key: learner.init(key, optimizer))(jax.random.key(0)), repeats)
    return row(group, name, len(keys) * steps_per_update / seconds, "steps/s", compile_s)


def learners(group, repeats):
    """A2C with 512 environments, PPO with the small settings of harness/tasks.py, under Adam and Optim4RL."""
    names = ("small_dense_short", "big_dense_long") if group == "a2c" else ("inverted_pendulum",)
    meta_params = agents.LEARNED["optim4rl"].init(jax.random.key(0))
    for name in names:
        task = tasks.make(name)
        for optimizer in ("adam", "optim4rl"):
            transformation = agents.make_rule(optimizer)(1e-3, meta_params)
            yield learner_speed(
                group, f"{name}, {optimizer}", task.learner, task.steps_per_update, transformation, repeats
            )


def optimizers(repeats, names=("adam", "rmsprop", *agents.LEARNED), num_scalars=2**20, group="optimizer", note=""):
    """Milliseconds per 2^20 scalars and update: forward alone, and in the meta-gradient through 4 updates."""
    updates = 4
    grads = jax.random.normal(jax.random.key(0), (updates, num_scalars))
    zeros = jnp.zeros(num_scalars)
    per_million = 1e3 * 2**20 / num_scalars / updates
    for name in names:
        learned = agents.LEARNED.get(name)
        meta_params = learned.init(jax.random.key(1)) if learned else jnp.zeros(())

        def unroll(meta_params, grads, name=name):
            optimizer = optax.with_extra_args_support(agents.make_rule(name)(1e-3, meta_params))

            def update(carry, g):
                params, opt_state = carry
                updates, opt_state = optimizer.update(g, opt_state, params, value=0.0)  # VeLO wants a loss
                return (params + updates, opt_state), None

            (params, _), _ = jax.lax.scan(update, (zeros, optimizer.init(zeros)), grads)
            return jnp.sum(params**2)

        for kind, function in (("forward", unroll), ("meta-gradient", jax.grad(unroll)))[: 2 if learned else 1]:
            run = partial(jax.jit(function), meta_params, grads)
            seconds, compile_s = measure(lambda _, run=run: run(), None, repeats)
            title, unit = f"{name}, {kind}{note}", "ms/update of 2^20 scalars"
            yield row(group, title, per_million * seconds, unit, compile_s)


def sizes(repeats):
    """How Optim4RL's time grows with the size of an agent."""
    for num_scalars in (10**3, 10**4, 10**5, 10**6, 10**7):
        for record in optimizers(repeats, ("optim4rl",), num_scalars, "sizes", f", {num_scalars:,} scalars"):
            yield record | {"num_scalars": num_scalars}


def kernels(repeats):
    """Optim4RL by its GPU kernels, with blocks of several sizes. On a CPU nothing: there they are interpreted."""
    if jax.default_backend() == "cpu":
        return
    for block, num_warps in itertools.product((32, 64, 128), (2, 4, 8)):
        with mock.patch.multiple(optim4rl_kernel, BLOCK=block, NUM_WARPS=num_warps), by_kernels():
            note = f", blocks of {block} scalars, {num_warps} warps"
            yield from optimizers(repeats, ("optim4rl",), group="kernels", note=note)
    case = dict(tasks=tasks.PAPER_WORLDS, num_units=512)
    cases = {"six worlds x 512 units": (1, case), "six worlds x 512 units, kernels": (1, case | dict(kernels=True))}
    yield from meta_steps(cases, repeats, "kernels")


def by_kernels():
    """While this context lasts, what is traced of Optim4RL uses the kernels."""
    return mock.patch.object(optim4rl, "update_rule", optim4rl_kernel.update_rule)


def meta_step_worker(
    repeats, tasks, num_units=32, devices=None, estimator="gradient", ppo="small", kernels=False, process=(None,) * 3
):
    """In a process of its own: prints a JSON record of seconds to the first meta-step, per meta-step, and peak memory.

    devices: of each process, None: all; kernels: of optim4rl_kernel.py; process: as runs.join_processes takes it.
    """
    began = time.perf_counter()
    runs.join_processes(*process)
    preset = meta_train.PRESETS["gradient"] | dict(num_units=num_units, estimator=estimator)
    config = meta_train.Config(**preset, tasks=tasks, ppo=ppo)
    mesh, key = runs.use_devices(devices, divides=num_units), jax.random.key(0)
    worlds, meta_optimizer = meta_train.make_tasks(config, mesh), optax.adam(1e-3)
    meta_params = agents.LEARNED["optim4rl"].init(key)
    step = lambda state: pipeline.meta_step(worlds, meta_optimizer, state, key, 0.5)[0]
    with by_kernels() if kernels else contextlib.nullcontext():  # init compiles the meta-step
        state = jax.block_until_ready(step(pipeline.init(worlds, meta_optimizer, meta_params, key)))
    first = time.perf_counter() - began
    seconds, _ = measure(step, state, repeats)
    print(json.dumps({"first": first, "step": seconds, "peak": peak_memory()}))


def peak_memory():
    """The most memory that this process has held, in GiB; NaN where the system is not Linux.

    Not resource's ru_maxrss: it begins with what the process that started this one had held.
    """
    status = pathlib.Path("/proc/self/status")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**20 if status.exists() else float("nan")


def start_worker(repeats, case, env):
    call = f"from benchmarks import bench; bench.meta_step_worker({repeats}, **{case})"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", call], env=env, **pipes)


def meta_steps(cases, repeats, group="meta"):
    """cases: {name: (number of processes, arguments of meta_step_worker)}. The first case is started twice."""
    for number, (name, (count, case)) in enumerate(cases.items()):
        members = [{"process": ("localhost:9911", count, i)} for i in range(count)] if count > 1 else [{}]
        with tempfile.TemporaryDirectory() as cache:
            env = os.environ | {"XDG_CACHE_HOME": cache, "JAX_COMPILATION_CACHE_DIR": ""}
            for again in ("", " again") if number == 0 else ("",):
                workers = [start_worker(repeats, case | member, env) for member in members]
                outputs, errors = zip(*(worker.communicate() for worker in workers))
                if any(worker.returncode for worker in workers):
                    raise SystemExit(f"{name} failed:\n" + "\n".join(errors))
                seen = json.loads(outputs[0].splitlines()[-1])
                yield row(group, f"{name}{again}: first meta-step", seen["first"], "s from the start of Python's work")
        yield row(group, name, seen["step"], "s/meta-step")
        yield row(group, f"{name}: peak memory", seen["peak"], "GiB")


def meta_cases(units):
    """Six worlds together, by one device and all, one process and two, both estimators; more and more worlds; and units."""
    six = dict(tasks=tasks.PAPER_WORLDS)
    most = min(max(units), 512)  # the paper's
    return (
        {
            "six worlds x 32 units": (1, six),
            "six worlds x 32 units, 1 device": (1, six | dict(devices=1)),
            "six worlds x 32 units, 2 processes of 1 device": (2, six | dict(devices=1)),
            "six worlds x 32 units, pes": (1, six | dict(estimator="pes")),
            "three worlds x 32 units": (1, dict(tasks=tasks.PAPER_WORLDS[:3])),
        }
        | {f"{world} x 32 units": (1, dict(tasks=(world,))) for world in tasks.PAPER_WORLDS}
        | {"catch x 64 units": (1, dict(tasks=("catch",), num_units=64))}
        | {f"big_dense_long x {num} units": (1, dict(tasks=("big_dense_long",), num_units=num)) for num in units}
        | {f"six worlds x {most} units": (1, six | dict(num_units=most))}
    )


def robot_cases():
    """Units of a robot: what one of them costs, and what two more add."""
    return {
        f"ant x {num} units, {settings} PPO": (1, dict(tasks=("ant",), num_units=num, devices=1, ppo=settings))
        for settings in ("small", "paper")
        for num in (1, 3)
    }


def main(argv=None):
    config = runs.parse(Config, {}, __doc__, argv)
    runs.check_positive(config, ("units", "repeats"))
    measurements = {
        "machine": lambda: machine(config.repeats),
        "env": lambda: environments(config.repeats),
        "a2c": lambda: learners("a2c", config.repeats),
        "ppo": lambda: learners("ppo", config.repeats),
        "optimizer": lambda: optimizers(config.repeats),
        "sizes": lambda: sizes(config.repeats),
        "kernels": lambda: kernels(config.repeats),
        "meta": lambda: meta_steps(meta_cases(config.units), config.repeats),
        "robots": lambda: meta_steps(robot_cases(), repeats=1),  # the paper's settings take minutes on a CPU
    }
    device = jax.devices()[0]
    print(f"{os.cpu_count()} cores; jax {jax.__version__} on {device.platform} ({device.device_kind})")
    rows = [measured for group in config.only for measured in measurements[group]()]
    if config.out:
        hardware = {"cores": os.cpu_count(), "device": device.device_kind, "jax": jax.__version__}
        runs.write_json(config.out, {"machine": hardware, "rows": rows})


if __name__ == "__main__":
    runs.run(main)
