"""What the experiments share: meta-runs of meta_train.py that are made once, and agents trained with what they learned."""

import pathlib
from functools import partial

import evaluate
import meta_train
from harness import agents, kept, plots, runs, stops


def learned(config):
    """The agents.Optimizer that meta_train.py learns with this Config, in the folder config.out: read where that is finished."""
    folder = pathlib.Path(config.out)
    if not (folder / "config.json").exists():
        runs.new_folder(config.out, "meta_train", config)
    if not (folder / "curves.png").exists():  # drawn last
        mesh = runs.use_devices(config.devices, divides=config.num_units)
        _, rows = meta_train.learn(config, mesh, folder)
        plots.meta_training(folder / "curves.png", rows, config.tasks)
    return evaluate.load_optimizer(config.optimizer, folder / "optimizer.npz")


def test(folder, task, label, optimizer, rates, num_seeds, mesh, steps=None, tuning_seeds=agents.TUNING_SEEDS, seed=0):
    """agents.Tuned of an optimizer on a task, its runs kept in the folder under a label; num_seeds 0: only tuned.

    The seeds of tuning and of reporting depend on the task and on `seed` only: they are the same for all optimizers.
    """
    key = agents.task_key(seed, task.name)
    store = partial(kept.kept_runs, folder, task, label, kept.SECONDS)
    return agents.tuned(task, optimizer, rates, num_seeds, key, mesh, steps, store, tuning_seeds)


def run(name, config, mesh, body):
    """Calls body(folder) in the folder of an experiment, new or resumed. After a signal it says how to continue."""
    folder = runs.open_folder(name, config)
    print(f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}; results in {folder}")
    how_to_resume = runs.how_to_resume(f"-m experiments.{name}", folder)
    with runs.only_one(folder), stops.graceful_stop(how_to_resume):
        body(folder)
