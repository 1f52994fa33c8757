"""Program: learns an optimizer by pipeline training, then trains fresh agents with it (paper: Algorithm 1, experiments).

    python meta_train.py                                    # two small worlds: 4 minutes on 2 CPU cores
    python meta_train.py --preset raw                       # the same for the paper's inputs, raw gradients
    python meta_train.py --preset gradient                  # the paper's rule and gradient on the same worlds: 3 minutes
    python meta_train.py --preset paper                     # the paper's six worlds: 6 minutes of an H100, 4 hours of 2 CPU cores
    python meta_train.py --preset pendulum                  # a robot, learned by PPO: 6 minutes
    python meta_train.py --preset gated_adam                # the rule of learned_optimizers/gated_adam.py: 3 minutes
    python meta_train.py --resume runs/meta_train-...       # continues a run that was stopped

A run's folder receives config.json, metrics.csv (one row per meta-step), optimizer.npz (the learned weights, for evaluate.py),
checkpoints/, runs/ (the agents of the table), curves.png and, at the end, summary.json with the table.
"""

import itertools
import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import evolution
import pipeline
from harness import agents, checkpoints, kept, metrics, plots, runs, statistics, stops, tasks, weights

Estimator = Literal["gradient", "nres", "pes"]
TESTED = ("small_dense_short", "small_dense_long", "small_sparse_short")
TaskName, PPOSettings = Literal[*tasks.NAMES], Literal[*tasks.PPO_SETTINGS]

# The paper's gradient, and as much of its pipeline as 2 CPU cores train in 2 minutes
GRADIENT = dict(inputs="raw", estimator="gradient", num_units=64, num_envs=1, meta_steps=400, reset_interval=(72,))
GRADIENT |= dict(meta_learning_rate=1e-3, meta_decay=1.0, gru_scale=1.0, alpha=(), test_learning_rates=())
PRESETS = {
    "quick": {},
    # What suited the paper's inputs best
    "raw": dict(inputs="raw", meta_learning_rate=1e-2, gru_scale=1.0, alpha=(0.1,)),
    "gradient": GRADIENT,
    "paper": GRADIENT
    | dict(tasks=tasks.PAPER_WORLDS, num_units=512, meta_steps=585, reset_interval=(288,))
    | dict(test_tasks=tasks.WORLDS, test_steps=5e6, test_envs=512),
    "gated_adam": dict(optimizer="gated_adam", sigma=0.2, meta_learning_rate=3e-2, meta_decay=0.1),
    "pendulum": GRADIENT
    | dict(tasks=("inverted_pendulum",), num_units=8, meta_steps=100, reset_interval=(12,))
    | dict(alpha=(3e-4,), meta_learning_rate=5e-3, test_tasks=("inverted_pendulum",), test_seeds=3),
}


@dataclass(frozen=True)
class Config:
    preset: Literal[*PRESETS] = "quick"  # other defaults for all other flags
    tasks: tuple[TaskName, ...] = ("small_dense_short", "small_dense_long")  # worlds and robots to learn from
    optimizer: Literal[*agents.LEARNED] = "optim4rl"  # what is learned
    inputs: Literal[*agents.INPUTS] = "normalised"  # what its networks see: g / RMS(g), or raw: g as in the paper
    estimator: Estimator = "nres"  # of the meta-gradient; gradient: the paper's; nres, pes: of whole lives
    num_units: int = 16  # n: training units of each task
    num_envs: int = 64  # environments of a unit; a robot's are among PPO's settings
    ppo: PPOSettings = "small"  # PPO's settings, for robots
    meta_steps: int = 500  # length of the run
    resets: Literal[*pipeline.RESETS] = "staggered"  # of units; staggered is pipeline training
    reset_interval: tuple[int, ...] = (63,)  # m: meta-steps of a unit's life, for all tasks or per task; 0: no resets
    inner_updates: int = 4  # agent updates in a meta-step
    sigma: float = 0.1  # standard deviation of the perturbations of nres and pes
    noise_interval: int = 0  # meta-steps after which their noise begins again; 0: with a unit's life
    meta_learning_rate: float = 7e-3  # step size of Adam on the meta-parameters
    meta_decay: float = 0.0  # part of that step size at the end of the run, to which it falls linearly; 1: constant
    gru_scale: float = 0.1  # part of sigma and of that step size that the weights of GRUs get; 1: all, as in the paper
    meta_grad_clip: float = 1.0  # global norm to which the meta-gradient is clipped
    clip_entries: bool = False  # each of its entries is clipped to that size instead
    task_grad_norm: float = 0.5  # norm to which each task's meta-gradient is rescaled; 0: not rescaled
    alpha: tuple[float, ...] = (0.05,)  # learning rate of what is learned, for all or per task; empty: each task's own
    reward_scale: tuple[float, ...] = ()  # factor on rewards, for all or per task; empty: each task's own
    test_tasks: tuple[TaskName, ...] = TESTED  # tasks of the final table; empty: no table
    test_steps: float = 3.2e5  # environment steps of a run in the final table
    test_envs: int = 64  # environments of an agent in the final table; a robot's are among PPO's settings
    test_seeds: int = 10  # runs of each optimizer in the final table
    test_learning_rates: tuple[float, ...] = (1e-2, 2e-2, 3e-2, 5e-2, 1e-1)
    """step sizes among which every optimizer of the table is tuned; empty: the task's grid"""
    seed: int = 0  # of everything
    devices: int | None = None  # None: as many as share the units equally, on a CPU one per core
    checkpoint_every: float = 120.0  # seconds between checkpoints
    out: str | None = None  # folder of this run; None: a new one under runs/
    coordinator: str | None = None  # HOST:PORT of process 0, in a run of several processes; auto: as SLURM or MPI tells
    num_processes: int | None = None  # processes of the run, all with the same --out; None: one, or auto
    process_id: int | None = None  # which of them this is, 0 to N - 1; None: the only one, or auto
    resume: str | None = None  # folder of a stopped run to continue; its config is taken from there


def make_tasks(config, mesh):
    """The pipeline's tasks: in each, an agent that learns it, and the optimizer as a function of its meta-parameters."""
    estimators = {"gradient": pipeline.gradient, "nres": evolution.nres(config.sigma, config.noise_interval)}
    estimators["pes"] = evolution.pes(config.sigma, config.noise_interval)

    def make_task(name, alpha, reward_scale, settings):
        life = (settings.resets != "none" and settings.reset_interval) or config.meta_steps
        steps = tasks.unit_steps(name, config.ppo, life, config.inner_updates)
        rule = agents.make_rule(config.optimizer, config.inputs, steps)
        learner = tasks.make_unit(name, reward_scale, config.num_envs, config.ppo)
        make_optimizer = lambda scaled: tasks.clipped(name, rule(alpha, unscaled(config, scaled)))
        return pipeline.make_task(learner, make_optimizer, settings, mesh, estimators[config.estimator])

    alphas, reward_scales = per_task(config, "alpha"), per_task(config, "reward_scale")
    return list(map(make_task, config.tasks, alphas, reward_scales, pipeline_configs(config)))


def learn(config, mesh, folder):
    """Algorithm 1's loop, from the folder's newest checkpoint if it has one: (meta-parameters, the rows of metrics.csv)."""
    all_tasks, meta_optimizer = make_tasks(config, mesh), make_meta_optimizer(config)
    _, run_key = jax.random.split(jax.random.key(config.seed))
    start = jax.tree.map(jnp.divide, init_meta_params(config), scales(config))
    learned = lambda state: jax.device_get(unscaled(config, state.meta_params))

    def save(state):
        """All that a resumed run needs, and the weights of now for evaluate.py."""
        log.flush()
        checkpoints.save(manager, int(state.step), state)
        save_weights(folder, config, learned(state), {"meta_steps": int(state.step)})

    with checkpoints.manager(folder / "checkpoints", runs.how_to_resume("meta_train.py", folder)) as manager:
        state = pipeline.init(all_tasks, meta_optimizer, start, run_key)
        state = checkpoints.restore(manager, state, finished=(folder / "optimizer.npz").exists())
        log = metrics.Log(folder / "metrics.csv", config.tasks, metric_scales(config), int(state.step))
        saved, signal, first = time.monotonic(), 0, int(state.step)
        bar = {"unit": "meta-step", "dynamic_ncols": True, "disable": not runs.is_first_process()}
        bar = tqdm(range(first, config.meta_steps), initial=first, total=config.meta_steps, **bar)
        for step in bar:
            state, step_metrics = pipeline.meta_step(
                all_tasks, meta_optimizer, state, run_key, config.task_grad_norm or None
            )
            log.add(step, step_metrics)
            bar.set_postfix(log.recent(), refresh=False)
            overdue = time.monotonic() - saved > config.checkpoint_every
            signal, overdue = runs.highest(stops.received(), overdue)
            if signal or ((step + 1) % metrics.WINDOW == 0 and log.lost_tasks()):
                break
            if overdue:
                save(state)
                saved = time.monotonic()
        save(state)
    if not signal and (lost := log.lost_tasks()):
        raise SystemExit(
            f"stopped after {int(state.step)} meta-steps: the meta-gradient of {', '.join(lost)} was not finite in most of "
            f"the last {metrics.WINDOW}; those meta-steps changed nothing; the weights are in {folder}/optimizer.npz"
        )
    if signal:
        raise SystemExit(128 + int(signal))
    return learned(state), log.rows


def make_meta_optimizer(config):
    """Adam on the meta-parameters behind a clip."""
    clip = (optax.clip if config.clip_entries else optax.clip_by_global_norm)(config.meta_grad_clip)
    first, last = config.meta_learning_rate, config.meta_learning_rate * config.meta_decay
    return optax.chain(clip, optax.adam(optax.linear_schedule(first, last, config.meta_steps)))


def save_weights(folder, config, meta_params, metadata):
    if runs.is_first_process():
        metadata = {"command": runs.command(), "inputs": config.inputs, "config": asdict(config)} | metadata
        weights.save(folder / "optimizer.npz", meta_params, metadata, config.optimizer)


def init_meta_params(config):
    """The meta-parameters that meta-training begins with."""
    init_key, _ = jax.random.split(jax.random.key(config.seed))
    return agents.init_meta_params(config.optimizer, init_key, config.inputs)


def scales(config):
    """The scale of each meta-parameter: gru_scale in the GRUs, else 1. The pipeline learns meta_params / scale.

    So perturbations and steps of the meta-parameters themselves are multiplied by it. Returns: a tree like the meta-parameters.
    """
    of_a_gru = lambda path: config.optimizer in agents.RECURRENT and not path[-1].key.startswith("readout")
    like = jax.eval_shape(lambda: init_meta_params(config))
    return jax.tree.map_with_path(
        lambda path, x: jnp.asarray(config.gru_scale if of_a_gru(path) else 1.0, x.dtype), like
    )


def unscaled(config, scaled):
    """scale * scaled: the meta-parameters themselves, from what the pipeline learns."""
    return jax.tree.map(jnp.multiply, scaled, scales(config))


def test(config, mesh, folder, learned_params):
    """Trains fresh agents with the learned optimizer, its untrained start and hand-designed ones, all tuned.

    Prints the table, writes summary.json, and adds the results to optimizer.npz.
    """
    learned = agents.Optimizer(config.optimizer, learned_params, config.inputs)
    untrained = agents.Optimizer(f"untrained_{config.optimizer}", init_meta_params(config), config.inputs)
    optimizers = [learned, untrained, *map(agents.Optimizer, agents.HAND_DESIGNED)]
    results, pairs = {}, list(itertools.product(config.test_tasks, optimizers))
    with tqdm(total=len(pairs), desc="test", unit="optimizer") as bar:
        for name, optimizer in pairs:
            task, key = tasks.make(name, config.test_envs, config.ppo), agents.task_key(config.seed, name)
            rates = agents.learning_rates(optimizer, config.test_learning_rates or task.learning_rates)
            store = partial(kept.kept_runs, folder, task, optimizer.name, kept.SECONDS)
            tuned = agents.tuned(task, optimizer, rates, config.test_seeds, key, mesh, config.test_steps, store)
            results[name, optimizer.name] = tuned
            bar.update()
    rows, text = statistics.report(results)
    runs.write_json(folder / "summary.json", rows)
    save_weights(folder, config, learned_params, {"meta_steps": config.meta_steps, "results": rows})
    unseen = ", ".join(name for name in config.test_tasks if name not in config.tasks) or "none"
    print(f"\nFresh agents, {config.test_steps:.1e} steps; in gridworlds {config.test_envs} environments.")
    print(f"Every optimizer is tuned: the best of several alphas on {agents.TUNING_SEEDS} other seeds.")
    print(f"Never seen in meta-training: {unseen}.\n\n{text}")
    print("The intervals are over agents of this one meta-run; another meta-run makes another optimizer.")


def per_task(config, name):
    """One number per task, from a flag that gives one for all, or one per task; each task's own where it gives none."""
    if (name, config.optimizer) == ("alpha", "velo"):
        if config.alpha not in ((), (1.0,), Config.alpha):
            raise runs.UsageError(f"--alpha is {','.join(map(str, config.alpha))}; VeLO has no alpha: give --alpha 1")
        return [1.0] * len(config.tasks)
    values = getattr(config, name)
    if not values and name in tasks.MetaDefaults._fields:
        return [getattr(tasks.meta_defaults(task, config.ppo, config.estimator), name) for task in config.tasks]
    if len(values) not in (1, len(config.tasks)):
        given = f"{runs.flag_of(name)} is {','.join(map(str, values)) or 'empty'}"
        raise runs.UsageError(f"{given}, for {len(config.tasks)} tasks; give one number, or one per task")
    return list(values) * (len(config.tasks) // len(values))


def metric_scales(config):
    """What rewards in the metrics of each task are multiplied by: worlds scale their rewards, robots leave it to PPO's loss."""
    scales = per_task(config, "reward_scale")
    return [1.0 if task in tasks.ROBOTS else scale for task, scale in zip(config.tasks, scales)]


def pipeline_configs(config):
    """pipeline.Config of each task."""
    intervals = per_task(config, "reset_interval")
    return [pipeline.Config(config.num_units, m, config.inner_updates, config.resets) for m in intervals]


def check(config):
    """Raises UsageError for what cannot be, before anything is written."""
    runs.check_different(config, ("tasks",))
    runs.check_seed(config.seed)
    sizes = ("num_units", "num_envs", "meta_steps", "inner_updates", "test_envs", "test_steps", "test_seeds")
    rates = ("alpha", "reward_scale", "sigma", "meta_learning_rate", "meta_grad_clip", "gru_scale")
    runs.check_positive(config, (*sizes, *rates, "test_learning_rates", "checkpoint_every"))
    for name in ("alpha", "reward_scale", "reset_interval"):
        per_task(config, name)
    for name, most in (("meta_decay", 1), ("task_grad_norm", 1e12), ("noise_interval", 2**31)):
        if not 0 <= getattr(config, name) <= most:
            raise runs.UsageError(f"{runs.flag_of(name)} is {getattr(config, name)}; it must be between 0 and {most:g}")
    never_reset = config.resets == "none" or 0 in config.reset_interval
    if never_reset and config.estimator != "gradient" and not config.noise_interval:
        raise runs.UsageError(f"{config.estimator} without resets never draws its noise again; give --noise-interval")


def main(argv=None):
    config = runs.parse(Config, PRESETS, __doc__, argv)
    check(config)
    runs.join_processes(config.coordinator, config.num_processes, config.process_id)
    mesh = runs.use_devices(config.devices, divides=config.num_units)
    runs.check_same_everywhere(config)
    try:
        for settings in pipeline_configs(config):
            pipeline.check(settings, mesh.devices.size)
    except ValueError as error:
        raise runs.UsageError(error) from None
    folder = runs.open_folder("meta_train", config)
    how_to_resume = runs.how_to_resume("meta_train.py", folder)
    say = print if runs.is_first_process() else lambda text: None
    with runs.only_one(folder), stops.graceful_stop(how_to_resume):
        units = f"{config.num_units} units each of {', '.join(config.tasks)}"
        say(f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}; {units}; results in {folder}")
        inputs = f" with {config.inputs} inputs" if config.optimizer in agents.RECURRENT else ""
        say(f"{config.optimizer}{inputs} by {config.estimator}; the paper's: --preset gradient")
        learned_params, rows = learn(config, mesh, folder)
        if runs.is_first_process():
            plots.meta_training(folder / "curves.png", rows, config.tasks)
        say(f"Weights: {folder}/optimizer.npz   Curves: {folder}/curves.png")
        if config.test_tasks and jax.process_count() > 1:
            say(f"The table of fresh agents is left to one process alone; {how_to_resume}")
        elif config.test_tasks:
            test(config, mesh, folder, learned_params)


if __name__ == "__main__":
    runs.run(main)
