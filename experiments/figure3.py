"""Program: every learned optimizer meta-trained on the very task that it is tested on, beside Adam and RMSProp (paper: Figure 3).

    python comparison.py                              # Catch and big_dense_long, about half an hour on one CPU core
    python comparison.py --tasks catch --out runs/try # Catch alone
    python comparison.py --resume runs/comparison-... # goes on after any interruption; nothing finished is run again

All learned optimizers get the same budget: a meta-training run of each meta learning rate, the same units and meta-steps.
Of these and of the learning rates alpha the best return over the whole run on two tuning seeds is taken; all other optimizers
are tuned over the same alphas on the same seeds. Fresh seeds are reported: agents of the one chosen meta-run, so that intervals do
not contain how much meta-runs differ. The folder receives config.json, TASK-OPTIMIZER-RATE/ (each meta-run: metrics.csv,
curves.png, weights), runs/ (each finished agent), weights/ (the chosen ones), curves.csv, summary.json and figure3.png.
"""

import csv
import itertools
import json
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import cli
import compare
import evaluate
import figures
import gridworld
import meta_config
import meta_train
import metrics
import optim4rl
import pipeline
import records
import suite


@dataclass(frozen=True)
class Config:
    tasks: tuple[str, ...] = cli.flag(("catch", "big_dense_long"), "comma-separated gridworlds, or catch")
    optimizers: tuple[str, ...] = cli.flag(
        ("optim4rl", "untrained", "adam", "rmsprop", "linear_optim", "l2lgd2", "star"),
        f"of {', '.join(compare.OPTIMIZERS)}",
    )
    meta_learning_rates: tuple[float, ...] = cli.flag(
        (1e-3, 3e-3), "of Adam on the meta-parameters: a meta-run of each"
    )
    num_units: int = cli.flag(12, "n: training units")
    meta_steps: int = cli.flag(100, "length of a meta-run")
    reset_interval: int = cli.flag(48, "m: meta-steps in the life of a unit; 0: no resets")
    test_steps: float = cli.flag(3.2e5, "environment steps of a tested agent")
    test_envs: int = cli.flag(64, "environments of a tested agent")
    seeds: int = cli.flag(5, "reported agents of each optimizer")
    seed: int = cli.flag(0, "seed of everything")
    devices: int | None = cli.flag(
        None, "devices to use; none: as many as share the units equally, on a CPU one per core"
    )
    out: str | None = cli.flag(None, "folder of this run; none: a new one under runs/")
    resume: str | None = cli.flag(None, "folder of an interrupted run to go on with, its config taken from there")


PRESETS = {
    "quick": {},
    "paper": dict(
        meta_learning_rates=(1e-4, 3e-4, 1e-3, 3e-3),
        num_units=512,
        meta_steps=585,
        reset_interval=288,
        test_steps=3e7,
        test_envs=512,
        seeds=10,
    ),
}


def meta_run(config, folder, task, optimizer, rate, mesh):
    """The meta-parameters of one meta-run, a folder as meta_train.py makes them: read where finished, else gone on with."""
    path = folder / f"{task}-{optimizer}-{rate:g}"
    run = meta_config.Config(
        tasks=(task,),
        optimizer=optimizer,
        num_units=config.num_units,
        meta_steps=config.meta_steps,
        reset_interval=(config.reset_interval,),
        alpha=(suite.meta_defaults(task).alpha * compare.alpha_factor(optimizer),),
        meta_learning_rate=rate,
        test_tasks=(),
        seed=config.seed,
        devices=config.devices,
        out=str(path),
    )
    if not (path / "config.json").exists():
        cli.new_folder(run.out, "meta_train", run)
    if (path / "curves.png").exists():  # drawn last
        return optim4rl.load(path / "optimizer.npz", optimizer, compare.LEARNED[optimizer].init(jax.random.key(0)))[0]
    meta_params, rows = meta_train.learn(run, mesh, path)
    metrics.plot(path / "curves.png", rows, run.tasks)
    return meta_params


def report(config, folder, task, optimizer, candidates, mesh, progress):
    """The best candidate and alpha on tuning seeds, and fresh agents: (row of the table, Runs, meta_params).

    candidates: {meta learning rate: meta_params}, or {0: None} for an optimizer without.
    """
    key = jax.random.fold_in(jax.random.key(config.seed + 1), sum(map(ord, task.name)))
    tuning_key, report_key = jax.random.split(key)
    rates = [alpha * compare.alpha_factor(optimizer) for alpha in task.learning_rates]
    trials = compare.TUNING_SEEDS
    total = len(candidates) * len(rates) * trials + config.seeds

    def train(phase, meta_params, alphas, keys):
        store = records.store(folder, task, optimizer, None, {}, phase)
        share = lambda part: progress(part * len(alphas) / total)
        return compare.train(task, optimizer, meta_params, alphas, keys, mesh, config.test_steps, share, store)

    scores, tuning_keys = {}, jnp.tile(jax.random.split(tuning_key, trials), len(rates))
    for meta_rate, meta_params in candidates.items():
        areas = train(f"tuning-{meta_rate:g}", meta_params, np.repeat(rates, trials), tuning_keys).area()
        scores |= {(meta_rate, alpha): area for alpha, area in zip(rates, areas.reshape(-1, trials).mean(1).tolist())}
    meta_rate, alpha = max(scores, key=scores.get)
    report_keys = jax.random.split(report_key, config.seeds)
    runs = train(f"report-{meta_rate:g}", candidates[meta_rate], np.full(config.seeds, alpha), report_keys)
    row = compare.summarize(task, optimizer, alpha, runs) | {"meta_learning_rate": meta_rate}
    return row | {"tuning": [[*pair, area] for pair, area in scores.items()]}, runs, candidates[meta_rate]


def make_candidates(config, folder, task, optimizer, mesh):
    """{meta learning rate: meta_params} of an optimizer, meta-trained on the task if it can be."""
    if optimizer in compare.LEARNED:
        return {rate: meta_run(config, folder, task, optimizer, rate, mesh) for rate in config.meta_learning_rates}
    return {0: compare.untrained_params(jax.random.key(config.seed)).get(optimizer)}


def run_all(config, folder, mesh):
    """All optimizers on all tasks: writes the chosen weights, curves.csv and summary.json; returns the table's rows."""
    rows = []
    with open(folder / "curves.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["task", "optimizer", "alpha", "run", "step", "episode_return"])
        for name, optimizer in itertools.product(config.tasks, config.optimizers):
            task = suite.make(name, config.test_envs)
            candidates = make_candidates(config, folder, name, optimizer, mesh)
            bar_format = "{desc:36} {percentage:3.0f}% |{bar:30}| {elapsed} < {remaining}"
            bar = tqdm(total=100, desc=f"{name} {optimizer}", bar_format=bar_format)
            with cli.graceful_stop() as signals, bar:

                def progress(part):
                    bar.update(min(100 * part, 100 - bar.n))
                    if signals:  # only the agent under way is lost
                        raise SystemExit(128 + signals[0])

                row, runs, meta_params = report(config, folder, task, optimizer, candidates, mesh, progress)
            if optimizer in compare.LEARNED:
                optim4rl.save(folder / "weights" / f"{name}-{optimizer}.npz", meta_params, row, optimizer)
            rows.append(row)
            evaluate.write_curves(writer, row, runs)
            file.flush()
    (folder / "summary.json").write_text(json.dumps(rows, indent=1))
    return rows


def check(config):
    """Raises UsageError for what cannot be, before anything is written."""
    for name, values, known in (
        ("task", config.tasks, gridworld.NAMES),
        ("optimizer", config.optimizers, tuple(compare.OPTIMIZERS)),
    ):
        if not values:
            raise cli.UsageError(f"--{name}s is empty; name at least one")
        if unknown := [value for value in values if value not in known]:
            raise cli.UsageError(f"unknown {name} {unknown[0]!r}; known: {', '.join(known)}")
    if not config.meta_learning_rates:
        raise cli.UsageError("--meta-learning-rates is empty; give at least one")
    cli.check_positive(config, ("num_units", "meta_learning_rates", "meta_steps", "test_steps", "test_envs", "seeds"))


def main(argv=None):
    config = cli.parse(Config, PRESETS, __doc__, argv)
    check(config)
    mesh = cli.use_devices(config.devices, divides=config.num_units)
    try:
        pipeline.check(pipeline.Config(config.num_units, config.reset_interval), mesh.devices.size)
    except ValueError as error:
        raise cli.UsageError(error) from None
    if config.resume:
        folder = cli.old_folder(config.resume, config)
    else:
        folder = cli.new_folder(config.out, "comparison", config)
    for name in ("runs", "weights"):
        (folder / name).mkdir(exist_ok=True)
    print(f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}; {config.seeds} seeds; results in {folder}")
    try:
        with cli.graceful_stop():  # from here on: a meta-run or a tuning that begins after a signal ends at once
            rows = run_all(config, folder, mesh)
    except SystemExit as stop:
        if isinstance(stop.code, int):  # a signal; a meta-run that lost its meta-gradient has words of its own
            print(f"\nstopped; the comparison goes on with: python comparison.py --resume {folder}")
        raise
    print(f"\n{compare.table(rows)}\n\nInterquartile mean and 95% bootstrap interval over {config.seeds} seeds.")
    print(f"Curves: {figures.learning_curves('figure3', [folder], folder)}")


if __name__ == "__main__":
    cli.run(main)
