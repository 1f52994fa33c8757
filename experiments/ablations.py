"""Program: which parts of meta-training matter? One thing at a time is changed around a base (not in the paper; its reviewers asked).

    python ablations.py                              # all settings, 35 minutes on one CPU core
    python ablations.py --num-seeds 3 --out runs/try # a first look, a third of the time
    python ablations.py --resume runs/ablations-...  # goes on after any interruption; no finished meta-run is run again

The flags that take several values are the ablations: the first value is the base's, each other one is tried with all the
rest as in the base. Every setting learns from the same number of agent updates: with twice the units or twice the inner
updates, half the meta-steps; a unit's life is equally many updates whatever the inner updates. More environments in a unit
are more data.

A seed is a whole experiment: a meta-run of its own, then fresh agents, whose mean is one number. Intervals are over seeds.
Alpha is tuned alike for each setting, Adam and RMSProp: the best of eight for an agent of each of two seeds, which is not
reported. The run's folder receives config.json, results.csv, ablations.png, weights/ (of each meta-run) and settings/ (each finished setting).
"""

import csv
import dataclasses
import json
import math
import time
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import a2c
import cli
import compare
import figures
import gridworld
import optim4rl
import pipeline
import suite

REFERENCES = ("untrained", "adam", "rmsprop")  # optimizers without meta-training; untrained is Optim4RL's sign descent
META_LOSSES = ("whole", "policy")
TITLES = {
    "reset_interval": "reset interval m, 0: no pipeline",
    "num_units": "units n",
    "optimizer": "structure",
    "inner_updates": "inner updates",
    "num_envs": "environments of a unit",
    "reward_scale": "reward scale",
    "meta_loss": "meta-loss",
}


@dataclass(frozen=True)
class Config:
    reset_interval: tuple[int, ...] = cli.flag((48, 0, 6, 24), "m, in meta-steps; 0: no resets, no pipeline")
    num_units: tuple[int, ...] = cli.flag((12, 3, 48), "n: training units")
    optimizer: tuple[str, ...] = cli.flag(("optim4rl", "linear_optim"), f"of {', '.join(compare.LEARNED)}")
    inner_updates: tuple[int, ...] = cli.flag((4, 1, 2, 8, 16), "agent updates in a meta-step")
    num_envs: tuple[int, ...] = cli.flag((1, 4, 16, 64), "environments of a unit")
    reward_scale: tuple[float, ...] = cli.flag((100.0, 1.0, 1000.0), "factor on rewards in meta-training")
    meta_loss: tuple[str, ...] = cli.flag(META_LOSSES, "the agent's whole loss, or its policy's part alone")
    task: str = cli.flag("small_dense_short", "gridworld or catch, for meta-training and test")
    meta_steps: int = cli.flag(100, "meta-steps of the base")
    alpha: float = cli.flag(3e-3, "learning rate of the learned optimizer in meta-training")
    meta_learning_rate: float = cli.flag(3e-3, "step size of Adam on the meta-parameters")
    test_envs: int = cli.flag(64, "environments of a tested agent")
    test_steps: float = cli.flag(3.2e5, "environment steps of a tested agent")
    test_alphas: tuple[float, ...] = cli.flag(
        (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1), "learning rates among which every optimizer is tuned"
    )
    test_agents: int = cli.flag(1, "reported agents of each seed")
    num_seeds: int = cli.flag(10, "seeds: meta-runs of each setting")
    seed: int = cli.flag(0, "seed of everything")
    devices: int | None = cli.flag(
        None, "devices to use; none: as many as share all units equally, on a CPU one per core"
    )
    out: str | None = cli.flag(None, "folder of this run; none: a new one under runs/")
    resume: str | None = cli.flag(None, "folder of an interrupted run to go on with, its config taken from there")


PRESETS = {
    "quick": {},
    "paper": dict(
        reset_interval=(288, 0, 72, 144, 576),
        num_units=(512, 8, 64),
        meta_steps=585,
        test_envs=512,
        test_steps=3e7,
    ),
}


@dataclass(frozen=True)
class Setting:
    """One value of every ablation: a way to meta-train."""

    reset_interval: int
    num_units: int
    optimizer: str
    inner_updates: int
    num_envs: int
    reward_scale: float
    meta_loss: str


def settings(config):
    """{name: Setting}: the base, then what differs from it in one field, named like "num_units=4"."""
    base = Setting(**{name: getattr(config, name)[0] for name in TITLES})
    varied = {
        f"{name}={value}": replace(base, **{name: value}) for name in TITLES for value in getattr(config, name)[1:]
    }
    return {"base": base} | varied


def budget(config, setting):
    """(meta-steps, reset interval in meta-steps) of a setting, for the base's number of agent updates and life of a unit."""
    per_update = config.inner_updates[0] / setting.inner_updates
    meta_steps = config.meta_steps * per_update * config.num_units[0] / setting.num_units
    return max(1, round(meta_steps)), round(setting.reset_interval * per_update)


def make_learner(config, setting):
    """The agent of a unit, with the meta-loss of the setting."""
    env = gridworld.make(config.task, setting.reward_scale)
    agent = a2c.Config(num_envs=setting.num_envs)
    learner = a2c.make(env, agent)
    if setting.meta_loss == "policy":  # the agent still learns with its whole loss
        learner = learner._replace(loss=a2c.make(env, replace(agent, critic_weight=0.0, entropy_weight=0.0)).loss)
    return learner


def make_meta_run(config, setting, mesh):
    """(key, stop) -> meta_params, learned by pipeline training; all seeds share its compiled programs."""
    learned, (meta_steps, reset_interval) = compare.LEARNED[setting.optimizer], budget(config, setting)
    units = pipeline.Config(setting.num_units, reset_interval, setting.inner_updates)
    alpha = config.alpha * compare.alpha_factor(setting.optimizer)
    make_optimizer = lambda meta_params: suite.clipped(config.task, learned.make(meta_params, alpha))
    tasks = [pipeline.make_task(make_learner(config, setting), make_optimizer, units, mesh)]
    meta_optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(config.meta_learning_rate))

    def meta_run(key, stop):
        init_key, run_key = jax.random.split(key)
        state = pipeline.init(tasks, meta_optimizer, learned.init(init_key), run_key)
        for _ in range(meta_steps):
            # Rescaled to norm 0.5, as meta_train.py does: whatever the scale of rewards, the meta-gradient is as long.
            state, _ = pipeline.meta_step(tasks, meta_optimizer, state, run_key, 0.5)
            stop()
        return state.meta_params

    return meta_run


def seed_keys(config, seed):
    """(meta_key, tuning_key, report_key) of a seed, the same for every setting."""
    return jax.random.split(jax.random.fold_in(jax.random.key(config.seed), seed), 3)


def meta_params_of_seeds(config, folder, name, setting, mesh, stop):
    """The meta-parameters of each seed: read where its meta-run is finished, learned and written where it is not."""
    meta_run, like = None, compare.LEARNED[setting.optimizer].init(jax.random.key(0))
    for seed in range(config.num_seeds):
        path = folder / "weights" / f"{name}-{seed}.npz"
        if not path.exists():
            meta_run = meta_run or make_meta_run(config, setting, mesh)
            metadata = {"setting": dataclasses.asdict(setting), "seed": seed}
            optim4rl.save(path, meta_run(seed_keys(config, seed)[0], stop), metadata, setting.optimizer)
        yield optim4rl.load(path, setting.optimizer, like)[0]


def test(config, optimizer, params_of_seeds, mesh, stop):
    """Tunes alpha on agents of the first seeds' meta-runs, then trains fresh agents of all: a dict of what is kept."""
    task = suite.make(config.task, config.test_envs)
    rates = [rate * compare.alpha_factor(optimizer) for rate in config.test_alphas]

    def train(meta_params, alphas, keys):
        return compare.train(task, optimizer, meta_params, alphas, keys, mesh, config.test_steps, lambda part: stop())

    params_of_seeds = list(params_of_seeds)
    keys = [seed_keys(config, seed) for seed in range(config.num_seeds)]
    tuning = [
        train(p, np.array(rates), jnp.tile(k[1], len(rates))).area()
        for p, k in zip(params_of_seeds[: compare.TUNING_SEEDS], keys)
    ]
    alpha = rates[int(np.nan_to_num(np.mean(tuning, axis=0), nan=-np.inf).argmax())]
    agents = config.test_agents
    runs = [train(p, np.full(agents, alpha), jax.random.split(k[2], agents)) for p, k in zip(params_of_seeds, keys)]
    return {
        "optimizer": optimizer,
        "alpha": alpha,
        "area": [float(run.area().mean()) for run in runs],
        "final": [float(run.final().mean()) for run in runs],
        "tuning_area": dict(zip(map(str, rates), np.mean(tuning, axis=0).tolist())),
    }


def run_all(config, folder, mesh, stop):
    """{name: what test returns} of all settings and of the references; what is finished is read."""
    results, all_settings = {}, dict.fromkeys(REFERENCES) | settings(config)
    with tqdm(all_settings.items(), unit="setting") as bar:
        for name, setting in bar:
            bar.set_description(name)
            path = folder / "settings" / f"{name}.json"
            if not path.exists():
                result = run_one(config, folder, name, setting, mesh, stop)
                with cli.whole_file(path, "w") as file:
                    json.dump(result, file, indent=1)
            results[name] = json.loads(path.read_text())
    return results


def run_one(config, folder, name, setting, mesh, stop):
    """One setting, or one reference, whose setting is None."""
    start = time.time()
    if setting:
        params_of_seeds = meta_params_of_seeds(config, folder, name, setting, mesh, stop)
        result = test(config, setting.optimizer, params_of_seeds, mesh, stop)
        return result | {"meta_steps": budget(config, setting)[0], "seconds": time.time() - start}
    init_keys = [jax.random.split(seed_keys(config, seed)[0])[0] for seed in range(config.num_seeds)]
    params_of_seeds = [compare.LEARNED["optim4rl"].init(key) if name == "untrained" else None for key in init_keys]
    return test(config, name, params_of_seeds, mesh, stop) | {"meta_steps": 0, "seconds": time.time() - start}


def rows(config, results):
    """The table, a dict a row: the references, then every value of each ablation, the base's among them."""
    groups = {"reference": {name: name for name in REFERENCES}}
    for name, title in TITLES.items():
        values = getattr(config, name)
        if len(values) > 1:
            named = {value: f"{name}={value}" for value in values} | {values[0]: "base"}
            groups[title] = {value: named[value] for value in sorted(values)}
    for group, named in groups.items():
        for value, name in named.items():
            result = results[name]
            row = {"ablation": group, "value": value, "base": int(name == "base")}
            row |= {key: result[key] for key in ("meta_steps", "alpha")} | {"seeds": config.num_seeds}
            for key in ("area", "final"):
                row[key], row[f"{key}_low"], row[f"{key}_high"] = map(float, compare.interval(result[key]))
            yield row | {"areas": " ".join(f"{area:.4f}" for area in result["area"])}


def write_csv(path, table):
    """The table as a file; areas has the return over the whole run of each seed."""
    with cli.whole_file(path, "w") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        for row in table:
            measured = {
                name: f"{row[name]:.4f}" for name in row if name.startswith(("area", "final")) and name != "areas"
            }
            writer.writerow(row | measured)


def text(table):
    """The table as text."""
    cell = lambda row, name: f"{row[name]:6.2f} [{row[name + '_low']:.2f}, {row[name + '_high']:.2f}]"
    lines = [
        f"{'ablation':34} {'value':14} {'meta-steps':>10} {'alpha':>7}   {'return, whole run':22} return, last fifth"
    ]
    for before, row in zip([None, *table], table):
        if before and before["ablation"] != row["ablation"]:
            lines.append("")
        value = f"{row['value']}{' (base)' * row['base']}"
        cells = f"{row['meta_steps']:10} {row['alpha']:7.0e}   {cell(row, 'area'):22} {cell(row, 'final')}"
        lines.append(f"{row['ablation']:34} {value:14} {cells}")
    return "\n".join(lines)


def check(config):
    """Raises UsageError for what cannot be, before anything is written."""
    known = {"optimizer": tuple(compare.LEARNED), "meta_loss": META_LOSSES}
    for name in TITLES:
        values, flag = getattr(config, name), "--" + name.replace("_", "-")
        if not values or len(set(values)) < len(values):
            raise cli.UsageError(f"{flag} is {','.join(map(str, values))!r}; give different values, the base's first")
        if unknown := [value for value in values if name in known and value not in known[name]]:
            raise cli.UsageError(f"{flag} names {unknown[0]!r}; known: {', '.join(known[name])}")
    if not config.test_alphas:
        raise cli.UsageError("--test-alphas is empty; give at least one")
    if config.task not in gridworld.NAMES:
        raise cli.UsageError(f"unknown task {config.task!r}; known: {', '.join(gridworld.NAMES)}")
    if min(config.reset_interval) < 0:
        raise cli.UsageError(f"--reset-interval is {min(config.reset_interval)}; it must be at least 0")
    positive = ("num_units", "inner_updates", "num_envs", "reward_scale", "meta_steps", "alpha", "meta_learning_rate")
    cli.check_positive(config, positive + ("test_alphas", "test_envs", "test_steps", "test_agents", "num_seeds"))


def main(argv=None):
    config = cli.parse(Config, PRESETS, __doc__, argv)
    check(config)
    mesh = cli.use_devices(config.devices, divides=math.gcd(*config.num_units))
    try:
        for n in config.num_units:
            pipeline.check(pipeline.Config(n), mesh.devices.size)
    except ValueError as error:
        raise cli.UsageError(error) from None
    if config.resume:
        folder = cli.old_folder(config.resume, config)
    else:
        folder = cli.new_folder(config.out, "ablations", config)
    for name in ("weights", "settings"):
        (folder / name).mkdir(exist_ok=True)
    print(f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}; {config.num_seeds} seeds; results in {folder}")
    with cli.graceful_stop() as received:

        def stop():
            if received:
                print(f"\nstopped; finished meta-runs are kept; go on with: python ablations.py --resume {folder}")
                raise SystemExit(128 + received[0])

        table = list(rows(config, run_all(config, folder, mesh, stop)))
    write_csv(folder / "results.csv", table)
    print(f"\n{text(table)}\n\nInterquartile mean [95% bootstrap interval] over {config.num_seeds} seeds.")
    print(f"Picture: {figures.ablations(None, [folder], folder)}")


if __name__ == "__main__":
    cli.run(main)
