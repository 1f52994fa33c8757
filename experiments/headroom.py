"""Experiment: how much could any optimizer of this kind gain on robots, without learning? (paper: section 5, transfer)

    python -m experiments.headroom                                 # 2 hours and 20 minutes of 2 CPU cores
    python -m experiments.headroom --resume runs/headroom-...      # continues after any interruption

Rules are drawn at random, each trains one agent of small PPO per robot, and the logarithm of its area is regressed on its
numbers. A rule is Adam with the knobs of RANGES: memories of both moments, separate steps for the value network, heads and
biases, a step that falls over training and within an iteration of PPO, a limit on the RMS of a tensor's update, and updates
in units of the tensor's own RMS. Three rules then train fresh agents on each robot:

- common: what the regression expects most of, of the *other* robots' draws
- best_draw: the draw that did best on the other robots
- own: as common, of this robot's own draws

The opponent is the best of FAIR, tuned on the robot itself. Written before the run: if common and best_draw stay below 1.05 of
it in the mean over robots, no rule of this kind reaches 1.10 there by learning.

The folder receives config.json, draws.csv (one row per rule: its knobs and its area on each robot), settings.csv (the three
rules of each robot), tuning.csv (each opponent's area on the tuning seeds) and summary.json.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import arms, contents
from harness import agents, kept, runs, statistics, tasks

# Knob -> (least, largest); those that begin with log2 or log10 are exponents
RANGES = {
    "log10_alpha": (-3.5, -1.75),
    "log2_value": (-2, 3),  # step of the value network / that of the policy
    "log2_head": (-2, 2),  # of the last layers / that of the others
    "log2_bias": (-2, 2),  # of biases / that of kernels
    "log2_end": (-4, 0.5),  # of the last step of a run / that of the first, in between linear
    "log2_epoch": (-2, 1),  # of the last step in an iteration of PPO / that of the first, geometric
    "b1": (0.0, 0.95),  # memory of the first moment
    "log10_forget": (-3, -1),  # 1 - memory of the second
    "log2_limit": (-2, 3),  # largest RMS of a tensor's update before alpha
    "own_units": (0.0, 1.0),  # power of the tensor's RMS in its update: 0, as in Adam, to 1, as in Adafactor and LAMB
}
LOW, HIGH = np.array(list(RANGES.values())).T
# Environment steps after which small PPO has left the start and is not at its end. The paper's other two robots have no such
# budget here: walker2d stands at 300 to 460 from 1e5 to 1e6 steps, humanoid falls after a tenth of its episode.
BUDGETS = {"ant": 3e5, "halfcheetah": 1.5e5, "hopper": 5e5, "inverted_double_pendulum": 3e5}
# The opponents, rules with all knobs but these neutral: Adam and RMSProp with bias correction, tuned over memory, a constant
# or a falling step, and alpha
NEUTRAL = dict.fromkeys(RANGES, 0.0) | {"log2_limit": 10.0}
FAIR = {
    f"{kind}_{memory}{'_falling' * (end < 0)}_{alpha:g}": NEUTRAL
    | {"b1": b1, "log10_forget": np.log10(1 - memory), "log2_end": end, "log10_alpha": np.log10(alpha)}
    for kind, b1 in (("adam", 0.9), ("rmsprop", 0.0))
    for memory in (0.9, 0.99)
    for end in (0.0, -10.0)  # the last step is 1/1000 of the first
    for alpha in (3e-4, 1e-3, 3e-3, 1e-2)
}


@dataclass(frozen=True)
class Config:
    robots: tuple[Literal[*BUDGETS], ...] = tuple(BUDGETS)
    draws: int = 180  # rules, one agent of each per robot
    seeds: int = 10  # reported agents
    tuning_seeds: int = 2  # of the opponents
    scale: float = 1.0  # part of each robot's budget
    seed: int = 0  # of everything
    devices: int | None = None  # None: all, on a CPU one per core
    out: str | None = None  # folder of this run; None: a new one under runs/
    resume: str | None = None  # folder of a stopped run to continue; its config is taken from there


def draw(seed, num):
    """[num, knobs] uniform within RANGES."""
    return np.random.default_rng(seed).uniform(LOW, HIGH, (num, len(RANGES)))


def make_rule(optimizer_steps, which, table, num_steps):
    """The optax transformation of row `which` (a float, since it takes the place of alpha) of a table of knobs [rows, knobs]."""
    knobs = dict(zip(RANGES, table[jnp.asarray(which).astype(int)]))
    power = lambda name, base=2.0: base ** knobs[name]

    def schedule(count):
        over_run = 1 + (power("log2_end") - 1) * count / num_steps
        over_iteration = power("log2_epoch") ** ((count % optimizer_steps) / optimizer_steps)
        return power("log10_alpha", 10.0) * over_run * over_iteration

    def scaled(updates, params):
        rms = lambda x: jnp.sqrt(jnp.mean(x**2) + 1e-12)

        def of_tensor(path, update, param):
            network, layer, kind = (key.key for key in path)
            factor = power("log2_value") if network == "value" else 1.0
            factor *= power("log2_head") if layer == f"layer_{len(params[network]) - 1}" else 1.0
            factor *= power("log2_bias") if kind == "bias" else 1.0
            factor *= jnp.minimum(1.0, power("log2_limit") / rms(update))
            return factor * update * jnp.maximum(10 * rms(param), 0.1) ** knobs["own_units"]

        return jax.tree.map_with_path(of_tensor, updates, params)

    moments = optax.scale_by_adam(knobs["b1"], 1 - power("log10_forget", 10.0), eps=1e-10)
    return optax.chain(moments, optax.stateless(scaled), optax.scale_by_learning_rate(schedule))


def regress(table, values):
    """Least squares of values [rows] on a table of knobs [rows, knobs] and their squares.

    Returns: settings [..., knobs] -> what each knob adds to the expected value, [..., knobs], but for a constant.
    """
    to_unit = lambda knobs: 2 * (knobs - LOW) / (HIGH - LOW) - 1  # -1 to 1
    unit = to_unit(table)
    fit = np.linalg.lstsq(np.c_[unit, unit**2, np.ones(len(unit))], values)[0]
    linear, square = np.split(fit[:-1], 2)
    return lambda knobs: linear * to_unit(knobs) + square * to_unit(knobs) ** 2


def best(table, values):
    """The setting [knobs] within RANGES of which the regression expects most."""
    settings = np.linspace(LOW, HIGH, 41)
    return settings[np.argmax(regress(table, values)(settings), axis=0), np.arange(len(RANGES))]


def logs(areas):
    """{robot: areas [rows]} as logarithms in units of each robot's median, at least log .1."""
    return {name: np.log(np.fmax(area / np.nanmedian(area), 0.1)) for name, area in areas.items()}  # fmax: of NaN, too


def choose(table, areas):
    """{robot: {label: setting [knobs]}} of a table of knobs and {robot: areas [rows]}."""
    values, settings = logs(areas), {}
    for name in areas:
        others = np.mean([values[other] for other in areas if other != name], axis=0)
        settings[name] = {"common": best(table, others), "best_draw": table[np.argmax(others)]}
        settings[name]["own"] = best(table, values[name])
    return settings


def worth(table, areas):
    """Each knob at its best in units of its value in Adam, by the regression over all robots: {knob: (best, ratio, low, high)}.

    95% intervals by resampling the draws, with the same best. Adam's memories are .9 and .99; alpha has no such value.
    """
    mean = np.mean(list(logs(areas).values()), axis=0)
    top, adam = best(table, mean), np.array(list((NEUTRAL | {"b1": 0.9, "log10_forget": -2.0}).values()))
    adam = np.clip(adam, LOW, HIGH)

    def ratios(rows):
        expected = regress(table[rows], mean[rows])
        return np.exp(expected(top) - expected(adam))

    random = np.random.default_rng(0)
    resampled = [ratios(random.integers(len(table), size=len(table))) for _ in range(1000)]
    columns = zip(top, ratios(np.arange(len(table))), *np.quantile(resampled, (0.025, 0.975), axis=0))
    return {knob: values for knob, values in zip(RANGES, columns) if knob != "log10_alpha"}


def run_all(config, folder, mesh):
    """({robot: areas [draws]}, {robot: {label: setting}}, {robot: {opponent: tuning area}}, {(robot, label): agents.Tuned}).

    Labels: "fair", the best opponent, and those of `choose`.
    """
    table, fair, results = draw(config.seed, config.draws), {}, {}
    opponents = np.array([list(knobs.values()) for knobs in FAIR.values()])
    all_tasks = {name: tasks.make(name) for name in config.robots}
    # The same function for all agents of a robot, so that their program is compiled once
    makes = {name: partial(make_rule, task.optimizer_steps) for name, task in all_tasks.items()}

    def train(label, name, rows, seeds, phase="tuning"):
        """One agent per row of knobs; the seeds repeat."""
        optimizer = agents.Optimizer(label, jnp.asarray(rows, jnp.float32), make=makes[name])
        store = kept.kept_runs(folder, all_tasks[name], label, kept.SECONDS, phase)
        key = jax.random.split(agents.task_key(config.seed, name))[int(phase == "report")]
        steps = config.scale * BUDGETS[name]
        keys = jnp.tile(jax.random.split(key, seeds), len(rows) // seeds)
        return agents.train(all_tasks[name], optimizer, np.arange(len(rows)), keys, mesh, steps, store)

    def report(label, name, setting, tuning_area=np.nan):
        fresh = train(label, name, np.tile(setting, (config.seeds, 1)), config.seeds, "report")
        results[name, label] = agents.Tuned(10 ** float(setting[0]), fresh, tuning_area)

    drawn = {name: train("drawn", name, table, len(table)).area() for name in config.robots}
    settings = choose(table, drawn)
    for name in config.robots:
        for label, setting in settings[name].items():
            report(label, name, setting)
        rows = np.repeat(opponents, config.tuning_seeds, axis=0)
        areas = train("fair", name, rows, config.tuning_seeds).area().reshape(len(FAIR), -1).mean(1)
        fair[name] = dict(zip(FAIR, areas))
        best_fair = np.argmax(statistics.worst_if_diverged(areas))
        report("fair", name, opponents[best_fair], areas[best_fair])
    return drawn, settings, fair, results


def robots_table():
    rows, lines = contents.kept_rows("headroom"), []
    labels = ("common", "best_draw", "own", "fair")
    for areas in contents.read_csv("headroom/tuning.csv"):
        robot = areas["robot"]
        opponent = max(FAIR, key=lambda name, areas=areas: statistics.worst_if_diverged(float(areas[name])))
        lines.append([robot, *(contents.cell(rows[robot, label], "area") for label in labels), opponent])
    return contents.markdown(f"robot | {' | '.join(labels)} | the best opponent", *lines)


def knobs_table():
    rows = contents.read_csv("headroom/draws.csv")
    column = lambda name: np.array([float(row[name]) for row in rows])
    table, areas = np.stack([column(knob) for knob in RANGES], axis=1), {robot: column(robot) for robot in BUDGETS}
    lines = [[knob, f"{top:.2g}", contents.span(*ratio)] for knob, (top, *ratio) in worth(table, areas).items()]
    return contents.markdown("knob | its best | area at its best / at Adam's value", *lines)


def score(label):
    return contents.score(contents.kept_rows("headroom"), BUDGETS, label, baselines=("fair",))


CONTENTS = {"headroom_robots": robots_table, "headroom_knobs": knobs_table}
CONTENTS |= {f"headroom_{label}": partial(score, label) for label in ("common", "best_draw", "own")}


def main(argv=None):
    config = runs.parse(Config, {}, __doc__, argv)
    runs.check_different(config, ("robots",))
    runs.check_seed(config.seed)
    runs.check_positive(config, ("draws", "seeds", "tuning_seeds", "scale"))
    mesh = runs.use_devices(config.devices)

    def body(folder):
        drawn, settings, fair, results = run_all(config, folder, mesh)
        digits = lambda values: [f"{x:.6g}" for x in values]
        rows = np.c_[draw(config.seed, config.draws), np.stack(list(drawn.values()), axis=1)]
        runs.write_csv(folder / "draws.csv", [*RANGES, *drawn], map(digits, rows))
        rows = [[name, label, *digits(setting)] for name, some in settings.items() for label, setting in some.items()]
        runs.write_csv(folder / "settings.csv", ["robot", "rule", *RANGES], rows)
        rows = [[name, *digits(areas.values())] for name, areas in fair.items()]
        runs.write_csv(folder / "tuning.csv", ["robot", *FAIR], rows)
        rows = [statistics.summarize(*pair, tuned) for pair, tuned in results.items()]
        runs.write_json(folder / "summary.json", rows)
        areas = {pair: tuned.runs.area() for pair, tuned in results.items()}
        found, _ = statistics.scores(areas, {pair: tuned.tuning_area for pair, tuned in results.items()}, ("fair",))
        print(f"{statistics.table(rows)}\n\nArea / that of the best Adam or RMSProp:")
        print(*(f"  {name:30} {statistics.shown(*score)}" for name, score in found.items()), sep="\n")

    arms.run("headroom", config, mesh, body)


if __name__ == "__main__":
    runs.run(main)
