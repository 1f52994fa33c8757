"""What the experiments share: meta-runs of meta_train.py that are made once, and agents trained with what they learned."""

import pathlib
from functools import partial

import jax

import meta_train
from harness import agents, kept, plots, runs, stops, weights


def learned(config, mesh):
    """The agents.Optimizer that meta_train.py learns with this Config, in the folder config.out: read where that is finished."""
    folder = pathlib.Path(config.out)
    if not (folder / "config.json").exists():
        runs.new_folder(config.out, "meta_train", config)
    if not (folder / "curves.png").exists():  # drawn last
        _, rows = meta_train.learn(config, mesh, folder)
        plots.meta_training(folder / "curves.png", rows, config.tasks)
    like = agents.LEARNED[config.optimizer].init(jax.random.key(0))
    meta_params, _ = weights.load(folder / "optimizer.npz", config.optimizer, like)
    return agents.Optimizer(config.optimizer, meta_params, config.inputs)


def test(folder, task, label, optimizer, rates, num_seeds, mesh, steps=None, tuning_seeds=agents.TUNING_SEEDS, seed=0):
    """agents.Tuned of an optimizer on a task, its runs kept in the folder under a label; num_seeds 0: only tuned.

    The seeds of tuning and of reporting depend on the task and on `seed` only: they are the same for all optimizers.
    """
    key = agents.task_key(seed, task.name)
    play_key = jax.random.fold_in(key, 2)  # tuning and reporting have the two keys of split(key)
    store = partial(kept.kept_runs, folder, task, label, play_key, {}, kept.SECONDS)
    return agents.tuned(task, optimizer, rates, num_seeds, key, mesh, steps, store, tuning_seeds)


def run(name, config, mesh, body, time_limit=None):
    """Calls body(folder) in the folder of an experiment, new or resumed. After a signal, or time_limit seconds, it says how to continue."""
    folder = runs.open_folder(name, config)
    for part in ("runs", "meta_runs"):
        (folder / part).mkdir(exist_ok=True)
    print(f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}; results in {folder}")
    how_to_resume = runs.how_to_resume(f"-m experiments.{name}", folder)
    with runs.only_one(folder), stops.graceful_stop(how_to_resume, time_limit):
        return body(folder)
