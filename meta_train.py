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
import os
import sys
import time
from dataclasses import asdict
from functools import partial

import jax
import numpy as np
import optax
from tqdm import tqdm

import checkpoints
import cli
import compare
import meta_config
import metrics
import optim4rl
import pipeline
import suite


def make_tasks(config, mesh):
    """The pipeline's tasks."""
    make_learned = compare.LEARNED[config.optimizer].make

    def make_task(name, alpha, reward_scale, settings):
        learner = suite.make_unit(name, reward_scale, config.num_envs, config.ppo)
        make_optimizer = lambda meta_params: suite.clipped(name, make_learned(meta_params, alpha))
        return pipeline.make_task(learner, make_optimizer, settings, mesh)

    alphas, reward_scales = meta_config.per_task(config, "alpha"), meta_config.per_task(config, "reward_scale")
    return list(map(make_task, config.tasks, alphas, reward_scales, meta_config.pipeline_configs(config)))


def learn(config, mesh, folder):
    """The meta-training, from the folder's newest checkpoint if it has one: returns the meta-parameters and metrics.csv's rows."""
    tasks = make_tasks(config, mesh)
    clip = optax.clip_by_global_norm(config.meta_grad_clip)
    first, last = config.meta_learning_rate, config.meta_learning_rate * config.meta_decay
    meta_optimizer = optax.chain(clip, optax.adam(optax.linear_schedule(first, last, config.meta_steps)))
    _, run_key = jax.random.split(jax.random.key(config.seed))
    norm = config.task_grad_norm or None
    meta_step = lambda state: pipeline.meta_step(tasks, meta_optimizer, state, run_key, norm)
    with checkpoints.manager(folder / "checkpoints") as manager:
        state = pipeline.init(tasks, meta_optimizer, init_meta_params(config), run_key)
        with failures_in_one_line(folder, manager):
            state = checkpoints.restore(manager, like=state) or state
            path = folder / "metrics.csv" if cli.is_first_process() else None
            log = metrics.Log(path, config.tasks, meta_config.metric_scales(config), int(state.step))
            state, signal = advance(config, meta_step, state, log, partial(save, manager, folder, config, log))
    if lost := log.hopeless():
        raise SystemExit(
            f"stopped after {int(state.step)} meta-steps: the meta-gradient of {', '.join(lost)} was not finite in the last "
            f"{metrics.MAX_SKIPPED}; the weights before are in {folder}/optimizer.npz"
        )
    if signal:
        print(f"stopped and saved after {int(state.step)} meta-steps; {how_to_resume(folder)}")
        raise SystemExit(128 + signal)
    return kept(config, state.meta_params), log.rows


def init_meta_params(config):
    """The meta-parameters that meta-training begins with."""
    init_key, _ = jax.random.split(jax.random.key(config.seed))
    return compare.LEARNED[config.optimizer].init(init_key)


def kept(config, meta_params):
    """The meta-parameters that are tested and saved: some of the way from the untrained ones to those that were learned.

    Between the two they may do on the tasks of meta-training what the learned ones do, and better on unlike ones
    (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models").
    """
    between = lambda first, last: (1 - config.keep) * np.asarray(first) + config.keep * np.asarray(last)
    return jax.tree.map(between, init_meta_params(config), meta_params)


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
    save_weights(folder, config, kept(config, state.meta_params), {"meta_steps": int(state.step)})


def how_to_resume(folder):
    return f"go on with: python meta_train.py --resume {folder}"


def save_weights(folder, config, meta_params, metadata):
    if cli.is_first_process():
        metadata = {"command": cli.command(), "config": asdict(config)} | metadata
        optim4rl.save(folder / "optimizer.npz", meta_params, metadata, config.optimizer)


def test(config, mesh, folder, learned_params):
    """Fresh agents trained with the learned optimizer, before and after meta-training, and with Adam and RMSProp: prints the table."""
    untrained = compare.UNTRAINED[config.optimizer]
    meta_params = {config.optimizer: learned_params, untrained: init_meta_params(config)}
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
    config = cli.parse(meta_config.Config, meta_config.PRESETS, __doc__, argv)
    meta_config.check(config)
    cli.join_processes(config.coordinator, config.num_processes, config.process_id)
    mesh = cli.use_devices(config.devices, divides=config.num_units)
    try:
        for settings in meta_config.pipeline_configs(config):
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
