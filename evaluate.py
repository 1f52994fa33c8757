"""Program: compares optimizers by training fresh agents with them, on gridworlds and Catch (A2C) and Brax robots (PPO).

    python evaluate.py                                                  # one Brax robot, 3 minutes on 2 CPU cores
    python evaluate.py --tasks catch,big_dense_long --learning-rate 1e-3,3e-3,1e-2 --seeds 10
    python evaluate.py --preset transfer                                # the paper's four robots in small, 35 minutes on one core
    python evaluate.py --preset gridworlds --tasks small_dense_short    # weights/gated_adam.npz at the paper's size, 6 minutes
    python evaluate.py --preset paper --tasks ant                       # the paper's protocol: an accelerator, hours
    python evaluate.py --resume runs/evaluate-... --render              # films of the trained robots, as HTML files
    python evaluate.py --resume runs/evaluate-...                       # goes on after an interruption; no finished run is run again

All optimizers are tuned alike: where several learning rates are given, the one with the best return over the whole run on
two tuning seeds is taken, and fresh seeds are reported. A trained robot then plays 128 episodes without noise. The run's
folder receives config.json, weights/ (those evaluated), curves.csv (every reported run), summary.json, curves.png, runs/
(each finished run), policies/ (each reported robot) and, with --render, films.
"""

import csv
import itertools
import json
import pathlib
from dataclasses import asdict, dataclass
from functools import partial

import jax
from tqdm import tqdm

import brax_env
import cli
import compare
import figures
import optim4rl
import records
import render
import suite

WEIGHTS = pathlib.Path(__file__).parent / "weights"  # NAME.npz each


@dataclass(frozen=True)
class Config:
    tasks: tuple[str, ...] = cli.flag(("inverted_pendulum",), "comma-separated task names")
    optimizers: tuple[str, ...] = cli.flag(
        compare.DEFAULT_OPTIMIZERS, f"comma-separated optimizer names, of {', '.join(compare.OPTIMIZERS)}"
    )
    weights: str | None = cli.flag(None, "FILE of optim4rl, or NAME=FILE,NAME=FILE; none: weights/NAME.npz")
    learning_rate: tuple[float, ...] = cli.flag((), "alpha; several: each optimizer's best; none: the task's grid")
    fixed: tuple[str, ...] = cli.flag((), "NAME=ALPHA,NAME=ALPHA: optimizers that keep one learning rate on all tasks")
    seeds: int = cli.flag(3, "reported runs of each optimizer")
    steps: float | None = cli.flag(None, "environment steps of a run; none: the task's own budget")
    num_envs: int | None = cli.flag(None, "environments of an A2C agent; none: the paper's, 512 (Catch 64)")
    ppo: str = cli.flag("small", "PPO's settings: paper, or small ones of our own")
    seed: int = cli.flag(0, "seed of everything")
    devices: int | None = cli.flag(None, "devices to use; none: all, on a CPU one per core")
    out: str | None = cli.flag(None, "folder of this run; none: a new one under runs/")
    resume: str | None = cli.flag(None, "folder of an interrupted run to go on with, its config taken from there")
    render: bool = cli.flag(False, "film an episode of each robot and optimizer, as HTML")


PRESETS = {
    "quick": {},
    "gridworlds": dict(  # one alpha for the learned optimizer, the others tuned on each task
        tasks=suite.PAPER_WORLDS,
        optimizers=("gated_adam", "untrained_gated_adam", "untrained", "adam", "rmsprop"),
        fixed=("gated_adam=0.03",),
        learning_rate=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        seeds=10,
        steps=5e6,
    ),
    "transfer": dict(tasks=tuple(suite.PAPER_PPO)),
    "paper": dict(tasks=tuple(suite.PAPER_PPO), learning_rate=(3e-5, 1e-4, 3e-4, 1e-3), seeds=10, ppo="paper"),
}


def load_weights(config):
    """The meta_params of every learned optimizer asked for. A resumed run goes on with the weights that it began with."""
    files, meta_params = {file.stem: file for file in WEIGHTS.glob("*.npz")}, {}
    for text in filter(None, (config.weights or "").split(",")):
        name, file = text.split("=", 1) if "=" in text else ("optim4rl", text)
        if name not in compare.LEARNED:
            raise cli.UsageError(f"--weights names {name!r}; known: {', '.join(compare.LEARNED)}")
        files[name] = file
    if config.resume:
        files |= {file.stem: file for file in pathlib.Path(config.resume, "weights").glob("*.npz")}
    for name in filter(compare.LEARNED.get, config.optimizers):
        if name not in files:
            remedy = f"python meta_train.py --optimizer {name} makes a file, --weights {name}=FILE takes it"
            raise cli.UsageError(f"{name} needs weights: {remedy}")
        like = compare.LEARNED[name].init(jax.random.key(0))
        meta_params[name], _ = optim4rl.load(files[name], name, like)
    return meta_params


def fixed_rates(config):
    """{optimizer: (alpha,)} of those that are not tuned. Raises UsageError for what is no NAME=ALPHA."""
    rates = {}
    for text in config.fixed:
        name, _, alpha = text.partition("=")
        try:
            rates[name] = (float(alpha),)
        except ValueError:
            rates[name] = (0.0,)
        if name not in config.optimizers or not 0 < rates[name][0] <= 1e12:
            raise cli.UsageError(f"--fixed has {text!r}; give NAME=ALPHA, NAME one of {', '.join(config.optimizers)}")
    return rates


def check(config):
    """Raises UsageError for what cannot be; returns (tasks, meta_params of each optimizer)."""
    fixed_rates(config)
    try:
        tasks = [suite.make(name, config.num_envs, config.ppo) for name in config.tasks]
        meta_params = compare.untrained_params(jax.random.key(config.seed))
        meta_params |= load_weights(config)
    except FileNotFoundError as error:
        raise cli.UsageError(f"no weight file {error.filename}; python meta_train.py makes one") from None
    except ValueError as error:
        raise cli.UsageError(error) from None
    for name in config.optimizers:
        if name not in compare.OPTIMIZERS:
            raise cli.UsageError(f"unknown optimizer {name!r}; known: {', '.join(compare.OPTIMIZERS)}")
    for name, value in (("--tasks", config.tasks), ("--optimizers", config.optimizers)):
        if not value:
            raise cli.UsageError(f"{name} is empty; name at least one")
    if config.render and not any(task.play for task in tasks):
        robots = ", ".join(brax_env.NAMES)
        raise cli.UsageError(f"--render films robots, and --tasks {','.join(config.tasks)} names none; known: {robots}")
    cli.check_positive(config, ("seeds", "steps", "learning_rate"))
    return tasks, meta_params


def open_folder(config, meta_params):
    """The run's folder, new or resumed, with all that the runs write to."""
    if config.resume:
        folder = cli.old_folder(config.resume, config)
    else:
        folder = cli.new_folder(config.out, "evaluate", config)
    try:
        for name in ("runs", "policies", "weights"):
            (folder / name).mkdir(exist_ok=True)
        for name in set(compare.LEARNED) & set(meta_params):
            optim4rl.save(folder / "weights" / f"{name}.npz", meta_params[name], kind=name)
        (folder / "curves.csv").open("a").close()
    except OSError as error:
        raise cli.UsageError(f"cannot write to {folder}: {error.strerror}; make it writable") from None
    return folder


def report(config, folder, task, optimizer, meta_params, mesh, stop):
    """Tunes and trains with one optimizer, under a progress bar: (row of the table, Runs)."""
    # Keys depend on seed and task alone: every optimizer sees the same ones. 0 and 1 are tuning's and the report's.
    key = jax.random.fold_in(jax.random.key(config.seed), sum(map(ord, task.name)))
    play_key, rates = jax.random.fold_in(key, 2), config.learning_rate or task.learning_rates
    rates = fixed_rates(config).get(optimizer, rates)
    store = partial(records.store, folder, task, optimizer, play_key, {"config": asdict(config)})
    bar_format = "{desc:36} {percentage:3.0f}% |{bar:30}| {elapsed} < {remaining}"
    with tqdm(total=100, desc=f"{task.name} {optimizer}", bar_format=bar_format) as bar:

        def progress(part):
            bar.update(min(100 * part, 100 - bar.n))
            end_if(stop, folder)

        alpha, runs = compare.tuned(
            task, optimizer, meta_params, rates, config.seeds, key, mesh, config.steps, progress, store
        )
    row = compare.summarize(task, optimizer, alpha, runs)
    if task.play:
        values = records.deterministic_returns(folder, task.name, optimizer, alpha, config.seeds)
        row["deterministic"], row["deterministic_low"], row["deterministic_high"] = map(float, compare.interval(values))
        row["deterministic_runs"] = values.tolist()
    return row, runs


def end_if(stop, folder):
    """Ends the program after Ctrl-C or SIGTERM. Only the runs under way are lost."""
    if stop:
        print(f"\nstopped; finished runs are kept; go on with: python evaluate.py --resume {folder}")
        raise SystemExit(128 + stop[0])


def write_curves(writer, row, runs):
    """The curves of one optimizer as rows of curves.csv."""
    for i, returns in enumerate(runs.returns):
        for step, value in zip(runs.steps, returns):
            writer.writerow([row["task"], row["optimizer"], row["alpha"], i, int(step), f"{value:.6g}"])


def run_all(config, folder, tasks, meta_params, mesh, stop):
    """All optimizers on all tasks; writes curves.csv, summary.json and curves.png: returns the table's rows and compare.scores."""
    rows, areas = [], {}
    with open(folder / "curves.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "optimizer", "alpha", "run", "step", "episode_return"])
        for task, optimizer in itertools.product(tasks, config.optimizers):
            row, runs = report(config, folder, task, optimizer, meta_params.get(optimizer), mesh, stop)
            rows.append(row)
            areas[task.name, optimizer] = runs.area()
            write_curves(writer, row, runs)
            file.flush()
    (folder / "summary.json").write_text(json.dumps(rows, indent=1))
    figures.learning_curves("curves", [folder], folder)
    return rows, compare.scores(areas)


def film(config, folder, tasks):
    """An HTML file of one episode of the first reported robot of each optimizer."""
    for task, optimizer in itertools.product([task for task in tasks if task.play], config.optimizers):
        params, obs_stats, metadata = records.load_policy(records.policy_path(folder, task.name, optimizer, 0))
        path = folder / f"{task.name}-{optimizer}.html"
        title = f"{task.name}, trained with {optimizer} (alpha {metadata['alpha']:g})"
        path.write_text(render.film(task.name, params, obs_stats, jax.random.key(config.seed), title))
        print(f"Film: {path}")


def main(argv=None):
    config = cli.parse(Config, PRESETS, __doc__, argv)
    mesh = cli.use_devices(config.devices)
    tasks, meta_params = check(config)
    with cli.graceful_stop() as stop:
        folder = open_folder(config, meta_params)
        print(f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}; {config.seeds} seeds; results in {folder}")
        rows, scores = run_all(config, folder, tasks, meta_params, mesh, stop)
    print(f"\n{compare.table(rows)}\n\nInterquartile mean and 95% bootstrap interval over {config.seeds} seeds.")
    if scores:
        print(compare.scores_text(scores, f"the better of {' and '.join(compare.BASELINES)}"))
    if any(task.play for task in tasks):
        print(f"Without noise: mean return of {suite.EVALUATION_EPISODES} episodes at the end of each reported run.")
    print(f"Curves: {folder}/curves.png")
    if config.render:
        film(config, folder, tasks)


if __name__ == "__main__":
    cli.run(main)
