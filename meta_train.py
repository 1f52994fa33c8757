"""Program: learns an optimizer by pipeline training on gridworlds, Catch and robots, then tests it on fresh agents (paper: the experiments).

    python meta_train.py                                    # two small worlds, evolution strategies, 5 minutes on 2 CPU cores
    python meta_train.py --preset gradient                  # the same worlds with the paper's gradient, 3 minutes
    python meta_train.py --preset paper                     # the paper's six worlds: 6 minutes of an H100, or 6 hours of 2 CPU cores
    python meta_train.py --preset pendulum                  # a robot, learned by PPO
    python meta_train.py --preset gated_adam                # the weights of gated_adam.py, 87 minutes
    python meta_train.py --resume runs/meta_train-...       # goes on where an interrupted run was saved

A run's folder receives config.json, metrics.csv (one row a meta-step), optimizer.npz (the learned weights, for evaluate.py),
checkpoints/, curves.png and, at the end, summary.json with the table.
"""

import contextlib
import itertools
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial

import jax
import optax
from tqdm import tqdm

import brax_env
import checkpoints
import cli
import compare
import gridworld
import metrics
import optim4rl
import pipeline
import suite

LEARNED_OPTIMIZERS = compare.LEARNED


def _knob(default, help_text):
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class Config:
    tasks: tuple[str, ...] = _knob(
        ("small_dense_short", "small_dense_long"), "comma-separated worlds and robots to learn from"
    )
    optimizer: str = _knob("optim4rl", f"learned optimizer: {', '.join(LEARNED_OPTIMIZERS)}")
    num_units: int = _knob(64, "n: training units of each task")
    num_envs: int = _knob(1, "environments of a unit; a robot's are among PPO's settings")
    ppo: str = _knob("small", "PPO's settings, for robots: paper, or small ones of our own")
    meta_steps: int = _knob(400, "length of the run")
    reset_interval: tuple[int, ...] = _knob(
        (72,),
        "m: meta-steps in the life of a unit, for all tasks or one each; 0: no resets, which is training without pipeline",
    )
    inner_updates: int = _knob(4, "agent updates in a meta-step")
    estimator: str = _knob(
        "gradient", "of the meta-gradient: gradient, the paper's; pes or nres, unbiased over whole lives"
    )
    sigma: float = _knob(0.03, "standard deviation of the perturbations of the meta-parameters by pes and nres")
    meta_learning_rate: float = _knob(1e-3, "step size of Adam on the meta-parameters")
    meta_decay: float = _knob(
        1.0, "part of that step size at the end of the run, to which it falls linearly; 1: constant"
    )
    meta_grad_clip: float = _knob(1.0, "global norm to which the meta-gradient is clipped")
    task_grad_norm: float = _knob(0.5, "norm to which each task's meta-gradient is rescaled; 0: not rescaled")
    alpha: tuple[float, ...] = _knob(
        (), "learning rate of the learned optimizer, for all tasks or one each; none: each task's own"
    )
    reward_scale: tuple[float, ...] = _knob((), "factor on rewards, for all tasks or one each; none: each task's own")
    test_tasks: tuple[str, ...] = _knob(
        ("small_dense_short", "small_dense_long", "small_sparse_short"), "tasks of the final table; none: no table"
    )
    test_steps: float = _knob(3.2e5, "environment steps of a run in the final table")
    test_envs: int = _knob(64, "environments of an agent in the final table; a robot's are among PPO's settings")
    test_seeds: int = _knob(10, "runs of each optimizer in the final table")
    test_learning_rates: tuple[float, ...] = _knob(
        (), "step sizes among which every optimizer of the table is tuned; none: the task's grid"
    )
    seed: int = _knob(0, "seed of everything")
    devices: int | None = _knob(None, "devices to use; none: as many as share the units equally, on a CPU one per core")
    checkpoint_every: float = _knob(120.0, "seconds between checkpoints")
    out: str | None = _knob(None, "folder of this run; none: a new one under runs/")
    coordinator: str | None = _knob(
        None, "HOST:PORT of process 0, in a run of several processes; auto: as SLURM or MPI tells"
    )
    num_processes: int | None = _knob(None, "processes of the run, all with the same --out; none: one, or auto")
    process_id: int | None = _knob(None, "which of them this is, 0 to N - 1; none: the only one, or auto")
    resume: str | None = _knob(None, "folder of an interrupted run to go on with, its config taken from there")


PRESETS = {
    "quick": dict(
        estimator="nres",
        num_units=16,
        num_envs=64,
        meta_steps=500,
        reset_interval=(63,),  # times 4 updates: the life of an agent in the final table
        sigma=0.1,
        meta_learning_rate=1e-2,
        meta_decay=0.0,
        test_learning_rates=(1e-2, 2e-2, 3e-2, 5e-2, 1e-1),
    ),
    "gradient": {},  # the paper's estimator, and as much of its pipeline as 2 CPU cores train in 2 minutes
    "paper": dict(
        tasks=suite.PAPER_WORLDS,
        num_units=512,
        meta_steps=585,
        reset_interval=(288,),
        test_tasks=gridworld.NAMES,
        test_steps=5e6,
        test_envs=512,
    ),
    "gated_adam": dict(
        tasks=("small_dense_short", "small_dense_long", "big_dense_short", "big_dense_long"),
        optimizer="gated_adam",
        estimator="nres",
        num_units=16,
        num_envs=64,
        meta_steps=1250,
        reset_interval=(125,),
        sigma=0.4,
        meta_learning_rate=4e-3,
        alpha=(0.03,),
        reward_scale=(1.0,),
    ),
    "pendulum": dict(
        tasks=("inverted_pendulum",),
        num_units=8,
        meta_steps=100,
        reset_interval=(12,),
        alpha=(3e-4,),
        meta_learning_rate=5e-3,
        test_tasks=("inverted_pendulum",),
        test_seeds=3,
    ),
}


def per_task(config, name):
    """One number per task, from a flag that gives one for all, or one each; each task's own where it gives none."""
    values = getattr(config, name)
    if not values and name in suite.MetaDefaults._fields:
        return [getattr(suite.meta_defaults(task, config.ppo, config.estimator), name) for task in config.tasks]
    if len(values) not in (1, len(config.tasks)):
        flag, given = name.replace("_", "-"), ",".join(map(str, values)) or "empty"
        raise cli.UsageError(f"--{flag} is {given}, for {len(config.tasks)} tasks; give one number, or one each")
    return list(values) * (len(config.tasks) // len(values))


def metric_scales(config):
    """What rewards in the metrics of each task are multiplied by: worlds scale their rewards, robots leave it to PPO's loss."""
    scales = per_task(config, "reward_scale")
    return [1.0 if task in brax_env.NAMES else scale for task, scale in zip(config.tasks, scales)]


def pipeline_configs(config):
    """pipeline.Config of each task."""
    rest = (config.inner_updates, config.estimator, config.sigma)
    return [pipeline.Config(config.num_units, interval, *rest) for interval in per_task(config, "reset_interval")]


def make_tasks(config, mesh):
    """The pipeline's tasks."""
    make_learned = LEARNED_OPTIMIZERS[config.optimizer].make

    def make_task(name, alpha, reward_scale, settings):
        learner = suite.make_unit(name, reward_scale, config.num_envs, config.ppo)
        make_optimizer = lambda meta_params: suite.clipped(name, make_learned(meta_params, alpha))
        return pipeline.make_task(learner, make_optimizer, settings, mesh)

    alphas, reward_scales = per_task(config, "alpha"), per_task(config, "reward_scale")
    return list(map(make_task, config.tasks, alphas, reward_scales, pipeline_configs(config)))


def check(config):
    """Raises UsageError for what cannot be, before anything is written."""
    if config.optimizer not in LEARNED_OPTIMIZERS:
        raise cli.UsageError(f"unknown optimizer {config.optimizer!r}; known: {', '.join(LEARNED_OPTIMIZERS)}")
    if config.estimator not in pipeline.ESTIMATORS:
        raise cli.UsageError(f"unknown estimator {config.estimator!r}; known: {', '.join(pipeline.ESTIMATORS)}")
    if not config.tasks:
        raise cli.UsageError("--tasks is empty; name at least one")
    try:
        for name in config.tasks + config.test_tasks:
            suite.check(name, config.ppo)
    except ValueError as error:
        raise cli.UsageError(error) from None
    cli.check_positive(config, ("num_envs", "alpha", "reward_scale", "sigma", "meta_steps"))
    cli.check_positive(config, ("meta_learning_rate", "meta_grad_clip", "checkpoint_every"))
    cli.check_positive(config, ("test_envs", "test_steps", "test_seeds", "test_learning_rates"))
    for name in ("alpha", "reward_scale", "reset_interval"):
        per_task(config, name)
    if not 0 <= config.meta_decay <= 1:
        raise cli.UsageError(f"--meta-decay is {config.meta_decay}; it must be between 0 and 1")
    if not 0 <= config.task_grad_norm < math.inf:
        raise cli.UsageError(f"--task-grad-norm is {config.task_grad_norm}; it must be positive, or 0")


def learn(config, mesh, folder):
    """The meta-training, from the folder's newest checkpoint if it has one: returns the meta-parameters and metrics.csv's rows."""
    tasks = make_tasks(config, mesh)
    clip = optax.clip_by_global_norm(config.meta_grad_clip)
    first, last = config.meta_learning_rate, config.meta_learning_rate * config.meta_decay
    meta_optimizer = optax.chain(clip, optax.adam(optax.linear_schedule(first, last, config.meta_steps)))
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    meta_params = LEARNED_OPTIMIZERS[config.optimizer].init(init_key)
    norm = config.task_grad_norm or None
    meta_step = lambda state: pipeline.meta_step(tasks, meta_optimizer, state, run_key, norm)
    with checkpoints.manager(folder / "checkpoints") as manager:
        state = pipeline.init(tasks, meta_optimizer, meta_params, run_key)
        with failures_in_one_line(folder, manager):
            state = checkpoints.restore(manager, like=state) or state
            path = folder / "metrics.csv" if cli.is_first_process() else None
            log = metrics.Log(path, config.tasks, metric_scales(config), int(state.step))
            state, signal = advance(config, meta_step, state, log, partial(save, manager, folder, config, log))
    if lost := log.hopeless():
        raise SystemExit(
            f"stopped after {int(state.step)} meta-steps: the meta-gradient of {', '.join(lost)} was not finite in the last "
            f"{metrics.MAX_SKIPPED}; the weights before are in {folder}/optimizer.npz"
        )
    if signal:
        print(f"stopped and saved after {int(state.step)} meta-steps; {how_to_resume(folder)}")
        raise SystemExit(128 + signal)
    return state.meta_params, log.rows


@contextlib.contextmanager
def failures_in_one_line(folder, manager):
    """Ends the program where a checkpoint is damaged, the disk is full or another process is lost, saying how to go on."""
    try:
        yield
        return
    except checkpoints.Damaged as error:
        raise cli.UsageError(error) from None
    except OSError as error:
        what = f"cannot write to {folder} ({error})"
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        what = f"another process of this run was lost ({str(error).splitlines()[0]})"
    last = manager.latest_step()
    saved = "nothing was saved before" if last is None else f"meta-step {last} is saved; {how_to_resume(folder)}"
    print(f"{what}; {saved}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)  # at once: an ordinary end would wait for the lost process, and for writes that cannot be done


def advance(config, meta_step, state, log, save):
    """Meta-steps until the run ends, a signal comes or a task has lost its gradient; saves at intervals of time and at the end.

    Returns: (MetaState, the signal's number or 0).
    """
    saved, steps = time.time(), range(int(state.step), config.meta_steps)
    look = {"unit": "meta-step", "dynamic_ncols": True, "disable": not cli.is_first_process()}
    with cli.graceful_stop() as signals, tqdm(total=config.meta_steps, initial=steps.start, **look) as bar:
        for step in steps:
            state, step_metrics = meta_step(state)
            log.add(step, step_metrics)
            bar.set_postfix(log.recent(), refresh=False)
            bar.update()
            late = time.time() - saved > config.checkpoint_every
            signal, lost, late = cli.highest(max(signals, default=0), bool(log.hopeless()), late)
            if signal or lost:
                break
            if late:
                save(state)
                saved = time.time()
        save(state)
        (signal,) = cli.highest(max(signals, default=0))  # one that came while the last state was saved, too
    return state, int(signal)


def save(manager, folder, config, log, state):
    """Everything that a resumed run needs, and the weights of now for evaluate.py."""
    log.flush()
    checkpoints.save(manager, int(state.step), state)
    save_weights(folder, config, state.meta_params, {"meta_steps": int(state.step)})


def how_to_resume(folder):
    return f"go on with: python meta_train.py --resume {folder}"


def save_weights(folder, config, meta_params, metadata):
    if cli.is_first_process():
        metadata = {"command": cli.command(), "config": asdict(config)} | metadata
        optim4rl.save(folder / "optimizer.npz", meta_params, metadata, config.optimizer)


def test(config, mesh, folder, learned_params):
    """Fresh agents trained with the learned optimizer, before and after meta-training, and with Adam and RMSProp: prints the table."""
    init_key, _ = jax.random.split(jax.random.key(config.seed))
    untrained = compare.UNTRAINED[config.optimizer]
    meta_params = {config.optimizer: learned_params, untrained: LEARNED_OPTIMIZERS[config.optimizer].init(init_key)}
    pairs = list(itertools.product(config.test_tasks, (*meta_params, "adam", "rmsprop")))
    tasks = {name: suite.make(name, config.test_envs, config.ppo) for name in config.test_tasks}
    rates = {name: config.test_learning_rates or task.learning_rates for name, task in tasks.items()}
    seeds, key, rows, areas = config.test_seeds, jax.random.key(config.seed + 1), [], {}
    with tqdm(total=len(pairs), bar_format="{desc:44} {bar:30} {elapsed} < {remaining}") as bar:
        progress = lambda part: bar.update(min(part, len(pairs) - bar.n))
        for name, optimizer in pairs:
            bar.set_description(f"testing {optimizer} on {name}")
            task, params = tasks[name], meta_params.get(optimizer)
            alpha, runs = compare.tuned(
                task, optimizer, params, rates[name], seeds, key, mesh, config.test_steps, progress
            )
            rows.append(compare.summarize(task, optimizer, alpha, runs) | {"seen": name in config.tasks})
            areas[name, optimizer] = runs.area()
    (folder / "summary.json").write_text(json.dumps(rows, indent=1))
    save_weights(folder, config, learned_params, {"meta_steps": config.meta_steps, "results": rows})
    unseen = ", ".join(name for name in config.test_tasks if name not in config.tasks) or "none"
    print(
        f"\nFresh agents, {config.test_steps:.1e} steps, {seeds} seeds; in gridworlds {config.test_envs} environments."
    )
    print(f"Every optimizer is tuned over alpha = {'; '.join(sorted(set(map(str, rates.values()))))}.")
    print(f"Never seen in meta-training: {unseen}.")
    print(f"Interquartile mean [95% bootstrap interval]; {untrained} is {config.optimizer} before meta-training.\n")
    print(compare.table(rows))
    if scores := compare.scores(areas, baselines=(untrained,)):
        print(f"\n{compare.scores_text(scores, untrained)}")


def main(argv=None):
    config = cli.parse(Config, PRESETS, __doc__, argv)
    check(config)
    cli.join_processes(config.coordinator, config.num_processes, config.process_id)
    mesh = cli.use_devices(config.devices, divides=config.num_units)
    try:
        for settings in pipeline_configs(config):
            pipeline.check(settings, mesh.devices.size)
    except ValueError as error:
        raise cli.UsageError(error) from None
    folder = (
        cli.old_folder(config.resume, config) if config.resume else cli.new_folder(config.out, "meta_train", config)
    )
    say = print if cli.is_first_process() else lambda text: None
    kind, worlds = mesh.devices.flat[0].device_kind, ", ".join(config.tasks)
    say(f"{mesh.devices.size} x {kind}; {config.num_units} units each of {worlds}; results in {folder}; compiling ...")
    learned_params, rows = learn(config, mesh, folder)
    if cli.is_first_process():
        metrics.plot(folder / "curves.png", rows, config.tasks)
    say(f"Weights: {folder}/optimizer.npz   Curves: {folder}/curves.png")
    if config.test_tasks and jax.process_count() > 1:
        say(f"The table of fresh agents is left to one process alone; {how_to_resume(folder)}")
    elif config.test_tasks:
        test(config, mesh, folder, learned_params)


if __name__ == "__main__":
    cli.run(main)
