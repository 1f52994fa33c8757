"""Program: our PPO beside Brax's own trainer, on the same robot, hyperparameters, seeds and evaluations.

    python -m benchmarks.brax_ppo                                    # inverted_pendulum, small settings, 3 seeds each
    python -m benchmarks.brax_ppo --task inverted_double_pendulum --ppo paper --seeds 5 --steps 4.9e5 --points 3

Both are trained with plain Adam and stop at equal numbers of environment steps to play 128 whole episodes without noise, from
newly drawn first states. They draw their random numbers differently, so they agree as two sets of seeds do, not to the bit. The
time of an epoch (what lies between two evaluations) counts no evaluation. Early epochs also compile, Brax's first two: speed is
that of the median epoch after these, and what all epochs took beyond it is given as the time of compilation. On a CPU these are
seconds of the cores that work, not of the wall: what else the machine does counts for neither trainer. The folder receives
config.json, curves.csv (every evaluation) and results.json.
"""

import csv
import json
import time
import types
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import brax_env
import ppo
from harness import runs, tasks

EPISODE_LENGTH, EPISODES = 1000, tasks.EVALUATION_EPISODES
clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
PAPER_LEARNING_RATES = {"walker2d": 3e-5}  # elsewhere 3e-4


@dataclass(frozen=True)
class Config:
    task: Literal[*tasks.ROBOTS] = "inverted_pendulum"  # a Brax robot
    seeds: int = 3  # runs of each trainer
    steps: float | None = None  # environment steps of a run; None: the settings' own
    ppo: Literal[*tasks.PPO_SETTINGS] = "small"  # settings: paper, or small ones of our own
    learning_rate: float | None = None  # of Adam; None: 1e-3, or the paper's
    points: int = 10  # evaluations after the first, which precedes training
    out: str | None = None  # folder of this run; None: a new one under runs/


class Plan(NamedTuple):
    """What both trainers do."""

    name: str
    config: ppo.Config
    learning_rate: float
    points: int
    updates: int  # PPO iterations of an epoch
    steps: int  # environment steps of an epoch


class Run(NamedTuple):
    returns: np.ndarray  # [points + 1] mean return of the episodes without noise
    seconds: np.ndarray  # [points] of each epoch


def make_plan(config):
    """The Plan of a Config. Raises UsageError for what cannot be."""
    runs.check_positive(config, ("seeds", "steps", "learning_rate", "points"))
    steps, knobs = tasks.ppo_knobs(config.task, config.ppo)
    learning_rate = PAPER_LEARNING_RATES.get(config.task, 3e-4) if config.ppo == "paper" else 1e-3
    settings = ppo.Config(**knobs)
    steps_per_update = settings.batch_size * settings.num_minibatches * settings.rollout_length
    updates = int(np.ceil((config.steps or steps) / config.points / steps_per_update))  # rounded up, as Brax does
    return Plan(
        config.task,
        settings,
        config.learning_rate or learning_rate,
        config.points,
        updates,
        updates * steps_per_update,
    )


def train_ours(plan, seed):
    """One Run of ppo.py."""
    env, optimizer = brax_env.make(plan.name, EPISODE_LENGTH), optax.adam(plan.learning_rate)
    learner = ppo.make(env, plan.config)
    init_key, train_key, play_key = jax.random.split(jax.random.key(seed), 3)

    @partial(jax.jit, donate_argnums=0)  # as Brax does
    def epoch(agent, key):
        keys = jax.random.split(key, plan.updates)
        return jax.lax.scan(lambda agent, key: (learner.update(optimizer, agent, key)[0], None), agent, keys)[0]

    evaluate = jax.jit(lambda agent, key: tasks.play(env, agent.params, agent.obs_stats, key, EPISODES).mean())
    # float waits: an evaluation still under way would count for the next epoch.
    play = lambda agent, point: float(evaluate(agent, jax.random.fold_in(play_key, point)))
    agent = jax.jit(lambda: learner.init(init_key, optimizer))()
    returns, seconds = [play(agent, 0)], []
    for point in range(plan.points):
        start = clock()
        agent = jax.block_until_ready(epoch(agent, jax.random.fold_in(train_key, point)))
        seconds.append(clock() - start)
        returns.append(play(agent, point + 1))
    return Run(np.array(returns), np.array(seconds))


def train_brax(plan, seed):
    """One Run of brax.training.agents.ppo.train."""
    robot = brax_env.load_robot(plan.name, "spring")  # first: it keeps Brax quiet
    from brax.training.agents.ppo import networks, train

    config, evaluations = plan.config, []
    train.time = types.SimpleNamespace(time=clock)  # what it measures its speed with
    train.train(
        environment=robot,
        num_timesteps=plan.steps * plan.points,
        max_devices_per_host=1,
        num_envs=config.num_envs,
        episode_length=EPISODE_LENGTH,
        learning_rate=plan.learning_rate,
        entropy_cost=config.entropy_cost,
        discounting=config.discount,
        unroll_length=config.rollout_length,
        batch_size=config.batch_size,
        num_minibatches=config.num_minibatches,
        num_updates_per_batch=config.num_epochs,
        normalize_observations=True,
        reward_scaling=config.reward_scale,
        clipping_epsilon=config.clip_epsilon,
        gae_lambda=config.gae_lambda,
        normalize_advantage=config.normalize_advantages,
        vf_loss_coefficient=config.value_cost,
        network_factory=partial(
            networks.make_ppo_networks,
            policy_hidden_layer_sizes=config.policy_hidden,
            value_hidden_layer_sizes=config.value_hidden,
        ),
        seed=seed,
        num_evals=plan.points + 1,
        num_eval_envs=EPISODES,
        deterministic_eval=True,
        progress_fn=lambda steps, metrics: evaluations.append((int(steps), metrics)),
    )
    steps, metrics = zip(*evaluations)
    if list(steps) != [plan.steps * point for point in range(plan.points + 1)]:
        raise RuntimeError(f"Brax evaluated after {steps} steps, we every {plan.steps}: not comparable")
    returns = [float(m["eval/episode_reward"]) for m in metrics]
    return Run(np.array(returns), np.array([plan.steps / float(m["training/sps"]) for m in metrics[1:]]))


def _device_put_replicated(tree, devices):
    """What jax.device_put_replicated was: brax 0.14.2 still calls it, jax has removed it."""
    stacked = jax.tree.map(lambda x: jnp.stack([x] * len(devices)), tree)
    # Through pmap: its outputs lie as its inputs should.
    return jax.pmap(lambda x: x, devices=devices)(stacked)


TRAINERS = {"ours": train_ours, "brax": train_brax}


def summarize(plan, trainer, done):
    """One row of the table as a dict; returns are means over seeds with their standard errors."""
    returns, seconds = np.stack([run.returns for run in done]), np.stack([run.seconds for run in done])
    median = np.median(seconds[:, 2:]) if plan.points > 2 else np.nan
    values = {"final": returns[:, -1], "whole": returns[:, 1:].mean(1)}
    row = {"trainer": trainer, "seeds": len(done), "steps": plan.steps * plan.points}
    for name, x in values.items():
        error = x.std(ddof=1) / len(x) ** 0.5 if len(x) > 1 else np.nan
        row |= {name: float(x.mean()), f"{name}_error": float(error), f"{name}_runs": x.tolist()}
    compile_s = np.median((seconds - median).sum(1))
    return row | {"steps_per_second": float(plan.steps / median), "compile_seconds": float(compile_s)}


def table(rows):
    """The rows as text, and the difference of the two trainers in standard errors of it."""
    lines = [f"{'trainer':8} {'last evaluation':>20} {'all evaluations':>20} {'steps/s':>10} {'compile s':>10}"]
    for row in rows:
        cells = [f"{row[name]:10.1f} +- {row[name + '_error']:6.1f}" for name in ("final", "whole")]
        lines.append(
            f"{row['trainer']:8} {cells[0]:>20} {cells[1]:>20} {row['steps_per_second']:10.0f} {row['compile_seconds']:10.1f}"
        )
    ours, brax = rows
    for name, title in (("final", "last evaluation"), ("whole", "all evaluations")):
        error = np.hypot(ours[f"{name}_error"], brax[f"{name}_error"])
        lines.append(f"ours - brax, {title}: {ours[name] - brax[name]:.1f} +- {error:.1f}")
    return "\n".join(lines)


def main(argv=None):
    config = runs.parse(Config, {}, __doc__, argv)
    plan = make_plan(config)
    folder = runs.new_folder(config.out, "brax_ppo", config)
    if not hasattr(jax, "device_put_replicated"):
        jax.device_put_replicated = _device_put_replicated
    print(f"{jax.devices()[0].device_kind}; {plan.points} x {plan.steps} steps of {plan.name}; results in {folder}")
    trained = {trainer: [] for trainer in TRAINERS}
    with open(folder / "curves.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trainer", "seed", "step", "deterministic_return", "epoch_seconds"])
        for seed in range(config.seeds):
            for trainer, train_one in TRAINERS.items():  # in turn, so that a drift of the machine meets both
                run = train_one(plan, seed)
                trained[trainer].append(run)
                for point, (value, seconds) in enumerate(zip(run.returns, ["", *run.seconds])):
                    writer.writerow([trainer, seed, point * plan.steps, f"{value:.6g}", seconds])
                file.flush()
                print(f"seed {seed}, {trainer}: {' '.join(f'{x:.0f}' for x in run.returns)}", flush=True)
    rows = [summarize(plan, trainer, done) for trainer, done in trained.items()]
    known = [{name: None if x != x else x for name, x in row.items()} for row in rows]  # JSON has no NaN
    (folder / "results.json").write_text(json.dumps(known, indent=1))
    print(f"\n{table(rows)}\n\nMean return of {EPISODES} episodes without noise, +- its standard error over seeds.")


if __name__ == "__main__":
    runs.run(main)
