"""Program: trains fresh agents with several optimizers and compares them, on gridworlds (A2C) and Brax robots (PPO).

    python evaluate.py                                                  # the paper's double pendulum, small settings: 3.5 minutes of 2 CPU cores
    python evaluate.py --tasks catch big_dense_long --learning-rate 1e-3 3e-3 1e-2 --seeds 10
    python evaluate.py --preset transfer                                # the paper's four robots, small settings: 40 minutes of 2 CPU cores
    python evaluate.py --preset gridworlds                              # the paper's six worlds at its size, an hour of 2 CPU cores
    python evaluate.py --preset paper --tasks ant                       # the paper's protocol: an accelerator, hours
    python evaluate.py --resume runs/evaluate-...                       # continues after an interruption; no finished run is run again
    python evaluate.py --resume runs/evaluate-... --render              # films of the trained robots, as HTML files

All optimizers are tuned alike: where several learning rates are given, the one with the largest area under the return curve
on two tuning seeds is taken, and fresh seeds are reported. A robot's curve is of episodes without noise, at 10 or 20 points
of its run. The run's folder receives config.json, weights/ (those evaluated), curves.csv (every reported run), summary.json,
curves.png, runs/ (each finished run, and the one under way), policies/ (each reported robot) and, with --render, films.
"""

import contextlib
import itertools
import pathlib
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax

from harness import agents, films, kept, plots, runs, statistics, stops, tasks, weights
from learned_optimizers import velo

COMPARED = ("optim4rl", "untrained_optim4rl", *agents.HAND_DESIGNED)
WEIGHTS = pathlib.Path(__file__).parent / "weights"  # NAME.npz
TaskName, PPOSettings = Literal[*tasks.NAMES], Literal[*tasks.PPO_SETTINGS]


PRESETS = {
    "quick": {},
    # One alpha for Optim4RL; RMSProp with a falling step, the best setting on small worlds, is tuned on each
    "gridworlds": dict(tasks=tasks.PAPER_WORLDS, seeds=6, steps=5e6, learning_rate=(1e-2, 2e-2, 5e-2))
    | dict(optimizers=("optim4rl", "rmsprop_0.9_corrected_falling"), fixed=("optim4rl=0.02",)),
    "transfer": dict(tasks=tuple(tasks.PAPER_PPO), seeds=10, learning_rate=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "paper": dict(tasks=tuple(tasks.PAPER_PPO), learning_rate=(3e-5, 1e-4, 3e-4, 1e-3), seeds=10, ppo="paper"),
}


@dataclass(frozen=True)
class Config:
    preset: Literal[*PRESETS] = "quick"  # other defaults for all other flags
    tasks: tuple[TaskName, ...] = ("inverted_double_pendulum",)  # worlds and robots
    optimizers: tuple[Literal[*agents.NAMES], ...] = COMPARED  # what trains the agents
    weights: tuple[str, ...] = ()  # FILE of optim4rl, or NAME=FILE; empty: weights/NAME.npz
    learning_rate: tuple[float, ...] = ()  # alpha; several: each optimizer's best; empty: the task's grid
    fixed: tuple[str, ...] = ()  # NAME=ALPHA: optimizers that keep one learning rate on all tasks
    seeds: int = 3  # reported runs of each optimizer
    steps: float | None = None  # environment steps of a run; None: the task's own budget
    num_envs: int | None = None  # environments of an A2C agent; None: the paper's, 512 (Catch 64)
    truncation: bool = False  # agents are told where a gridworld's horizon alone ended an episode
    ppo: PPOSettings = "small"  # PPO's settings
    seed: int = 0  # of everything
    devices: int | None = None  # None: all, on a CPU one per core
    checkpoint_every: float = kept.SECONDS  # seconds between saves of the agents under way
    time_limit: float | None = None  # seconds after which it saves and ends with status 0; None: no limit
    out: str | None = None  # folder of this run; None: a new one under runs/
    resume: str | None = None  # folder of a stopped run to continue; its config is taken from there
    render: bool = False  # film an episode of each robot and optimizer, as HTML


def check(config):
    """Raises UsageError for what cannot be; returns (tasks, {name: agents.Optimizer})."""
    runs.check_different(config, ("tasks", "optimizers"))
    runs.check_seed(config.seed)
    runs.check_positive(config, ("seeds", "steps", "learning_rate", "num_envs", "checkpoint_every", "time_limit"))
    fixed_rates(config)
    if config.render and not set(config.tasks) & set(tasks.ROBOTS):
        names = ", ".join(tasks.ROBOTS)
        raise runs.UsageError(f"--render films robots, and --tasks {','.join(config.tasks)} names none; known: {names}")
    optimizers = make_optimizers(config)
    return [tasks.make(name, config.num_envs, config.ppo, config.truncation) for name in config.tasks], optimizers


def make_optimizers(config):
    """{name: agents.Optimizer} of config.optimizers, the learned ones with their weights."""
    files, optimizers = weight_files(config), {}
    for name in config.optimizers:
        if name in agents.LEARNED:
            optimizers[name] = load_optimizer(name, files.get(name))
        elif name in agents.UNTRAINED:  # the start of the weights, where there are some: with their inputs
            base = agents.UNTRAINED[name]
            file = files.get(base, WEIGHTS / f"{base}.npz")
            inputs = load_optimizer(base, file).inputs if pathlib.Path(file).exists() else "raw"
            optimizers[name] = agents.untrained(base, jax.random.key(config.seed), inputs)
        else:
            optimizers[name] = agents.Optimizer(name)
    return optimizers


def weight_files(config):
    """{name: file} of the learned optimizers. A resumed run takes the weights that it began with."""
    if config.resume:
        return {file.stem: file for file in pathlib.Path(config.resume, "weights").glob("*.npz")}
    files, given = {file.stem: file for file in WEIGHTS.glob("*.npz")}, {}
    for text in config.weights:
        name, equals, file = text.partition("=")
        name, file = (name, file) if equals and name in agents.LEARNED else ("optim4rl", text)
        if name not in config.optimizers:
            raise runs.UsageError(f"--weights {text}: {name} is not among --optimizers {','.join(config.optimizers)}")
        if not file or name in given:
            raise runs.UsageError(f"--weights {text}: give one FILE of optim4rl, or NAME=FILE")
        given[name] = file
    return files | given


def load_optimizer(name, file):
    """The agents.Optimizer of a learned optimizer and its weight file, which also says what inputs it was learned with.

    file: path, or None where there is none. Raises runs.UsageError: no such file, or not one of this optimizer.
    """
    try:
        if file is None:
            raise FileNotFoundError
        if name == "velo" and pathlib.Path(file).suffix != ".npz":  # the published weights
            return agents.Optimizer(name, velo.load(file)[0])
        meta_params, metadata = weights.load(file, name, agents.LEARNED[name].init(jax.random.key(0)))
        if (inputs := metadata.get("inputs", "raw")) not in agents.INPUTS:
            raise ValueError(f"{file} was learned with inputs {inputs!r}; known: {', '.join(agents.INPUTS)}")
    except FileNotFoundError:
        missing = f"no weight file {file}" if file else f"{name} needs weights"
        remedy = f"python meta_train.py --optimizer {name} makes a file, --weights {name}=FILE takes it"
        more = f"; {velo.SOURCES}" if name == "velo" else ""
        raise runs.UsageError(f"{missing}: {remedy}{more}") from None
    except ValueError as error:
        raise runs.UsageError(error) from None
    return agents.Optimizer(name, meta_params, inputs)


def fixed_rates(config):
    """{optimizer: [alpha]} of those that are not tuned. Raises UsageError for what is no NAME=ALPHA."""
    rates = {}
    for text in config.fixed:
        name, _, alpha = text.partition("=")
        rate = 0.0
        with contextlib.suppress(ValueError):
            rate = float(alpha)
        if name in rates or name not in config.optimizers or not 0 < rate <= 1e12:
            raise runs.UsageError(f"--fixed has {text!r}; give NAME=ALPHA, NAME one of {', '.join(config.optimizers)}")
        rates[name] = [rate]
    return rates


def run_all(config, folder, all_tasks, optimizers, mesh):
    """{(task, optimizer): agents.Tuned}: tunes and trains with all optimizers on all tasks."""
    for name in set(agents.LEARNED) & set(optimizers):  # from these copies a run is resumed
        learned = optimizers[name]
        weights.save(folder / "weights" / f"{name}.npz", learned.meta_params, {"inputs": learned.inputs}, name)
    results, fixed = {}, fixed_rates(config)
    for task, optimizer in itertools.product(all_tasks, optimizers.values()):
        key, _ = jax.random.split(agents.task_key(config.seed, task.name))  # the key that results/ were made with
        rates = agents.learning_rates(optimizer, config.learning_rate or task.learning_rates)
        rates = fixed.get(optimizer.name, rates)
        store = partial(kept.kept_runs, folder, task, optimizer.name, config.checkpoint_every)
        tuned = agents.tuned(task, optimizer, rates, config.seeds, key, mesh, config.steps, store)
        results[task.name, optimizer.name] = tuned
    return results


def write(folder, results):
    """Writes curves.csv, summary.json and curves.png, and prints the table."""
    rows = [
        [*pair, tuned.alpha, run, int(step), f"{value:.6g}"]
        for pair, tuned in results.items()
        for run, returns in enumerate(tuned.runs.returns)
        for step, value in zip(tuned.runs.steps, returns)
    ]
    header = ["task", "optimizer", "alpha", "run", "step", "episode_return"]
    runs.write_csv(folder / "curves.csv", header, rows)
    rows, text = statistics.report(results)
    runs.write_json(folder / "summary.json", rows)
    plots.learning_curves(folder / "curves.png", results)
    print(f"\n{text}")


def film(config, folder, robots):
    """An HTML file of one episode of the first reported robot of each optimizer."""
    for task, optimizer in itertools.product(robots, config.optimizers):
        try:
            params, stats, metadata = kept.load_policy(kept.policy_path(folder, task.name, optimizer, 0))
        except (OSError, ValueError) as error:
            raise runs.UsageError(f"no film of {optimizer} on {task.name}: {error}") from None
        path = folder / f"{task.name}-{optimizer}.html"
        title = f"{task.name}, trained with {optimizer} (alpha {metadata['alpha']:g})"
        path.write_text(films.film(task.name, params, stats, jax.random.key(config.seed), title))
        print(f"Film: {path}")


def main(argv=None):
    config = runs.parse(Config, PRESETS, __doc__, argv)
    mesh = runs.use_devices(config.devices)
    all_tasks, optimizers = check(config)
    folder = runs.open_folder("evaluate", config)
    with runs.only_one(folder), stops.graceful_stop(runs.how_to_resume("evaluate.py", folder), config.time_limit):
        print(f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}; {config.seeds} seeds; results in {folder}")
        write(folder, run_all(config, folder, all_tasks, optimizers, mesh))
    if robots := [task for task in all_tasks if task.play]:
        episodes = ", ".join(f"{task.name} {task.evaluations} x {task.evaluation_episodes}" for task in robots)
        print(
            f"A robot's returns are of episodes without noise, as in the paper ({episodes}, in a run).\n"
            f"The returns in training are kept in {folder}/runs."
        )
    print(f"Curves: {folder}/curves.png")
    if config.render:
        film(config, folder, robots)


if __name__ == "__main__":
    runs.run(main)
