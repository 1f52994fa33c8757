"""Experiment: what the tables and numbers of the texts say, each a function of files in results/; see tables.py.

Intervals are those of statistics.interval where each run is kept, and else what summary.json says; none is made up.
"""

import csv
import functools
import itertools
import json

import numpy as np

from harness import agents, runs, statistics
from learned_optimizers import gated_adam

RESULTS = runs.ROOT / "results"
NAMES = {"untrained": "sign_descent"}  # as the version of the programs called it that made results/paper
BASELINES = statistics.BASELINES
HAND = ("sign_descent", *BASELINES)
FALLING = "rmsprop_0.9_corrected_falling"  # the best of the hand-designed settings on small worlds
START = "rmsprop_0.99_corrected"  # what Optim4RL with normalised inputs starts as
COMPARED = ("optim4rl", "untrained_optim4rl", *HAND)
BIG = ("big_sparse_short", "big_sparse_long", "big_dense_short", "big_dense_long")
SIX = ("small_dense_short", "small_dense_long", *BIG)  # the paper's
WORLDS = (*SIX, "small_sparse_short", "small_sparse_long", "catch")
ROBOTS = ("ant", "humanoid", "inverted_double_pendulum", "walker2d")
# Folders of runs with 1e6 steps, tuned
LONG = ("transfer_long", "transfer_falling", "transfer_hopper", "transfer_walker2d")
FIXED = ("transfer_fixed", "transfer_fixed_optim4rl")  # the same with one alpha, that of the paper
WALKING = ("ant", "inverted_double_pendulum")  # the paper's robots that learn there
NOT_TUNED = tuple(f"{name}, not tuned" for name in BASELINES)  # in long_robots


# --- What is kept


@functools.cache
def read_json(name):
    return json.loads((RESULTS / name).read_text())


@functools.cache
def read_csv(name):
    with open(RESULTS / name, newline="") as file:
        return list(csv.DictReader(file))


@functools.cache
def kept_rows(*folders):
    """{(task, optimizer): row of summary.json}; where each run's curve is kept, also its area_runs and final_runs."""
    rows = {}
    for folder in folders:
        pair_of = lambda row: (row["task"], NAMES.get(row["optimizer"], row["optimizer"]))
        rows |= {pair_of(row): dict(row) for row in read_json(f"{folder}/summary.json")}
        curves = read_csv(f"{folder}/curves.csv") if (RESULTS / folder / "curves.csv").exists() else []
        for pair, points in itertools.groupby(curves, pair_of):
            returns = np.reshape([float(point["episode_return"]) for point in points], (rows[pair]["seeds"], -1))
            result = agents.Runs(None, returns)
            rows[pair] |= {"area_runs": result.area(), "final_runs": result.final()}
    return rows


def six_worlds(*tuned):
    """kept_rows, of the paper's six worlds at 5e6 steps: both learned optimizers, their starts and fair opponents.

    Without tuning areas: on big worlds agents differ so much that two tuning seeds do not tell which baseline is better. A score
    is then in units of the one with the larger reported mean, which favours the baselines.
    """
    rows = kept_rows("six_worlds", "six_worlds/baselines", "gated_adam/six_worlds", "gated_adam/start", *tuned)
    return {pair: row | {"tuning_area": None} for pair, row in rows.items()}


def robots():
    """kept_rows, of the paper's four robots with small settings."""
    return kept_rows("transfer", "gated_adam/robots")


def long_robots():
    """kept_rows of the robots with 1e6 steps, by robot; some optimizers a second time, "..., not tuned", with the paper's alpha."""
    not_tuned = kept_rows(*FIXED).items()
    rows = kept_rows(*LONG) | {(task, f"{optimizer}, not tuned"): row for (task, optimizer), row in not_tuned}
    return dict(sorted(rows.items(), key=lambda item: item[0][0]))


def mean_of_log(folder, column, start, length):
    """Mean of a column of metrics.csv over some meta-steps."""
    values = [row[column] for row in read_csv(f"{folder}/metrics.csv")[start : start + length]]
    return float(np.mean([float(value) for value in values if value]))


# --- Text


def number(x):
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.2f}"


def span(mean, low, high):
    return statistics.shown(mean, low, high, number)


def interval(values):
    """The interval of [R] numbers; empty for none."""
    return span(*statistics.interval(values)) if len(values) else ""


def cell(row, name):
    """A mean and its interval. Few seeds of which only a summary is kept have none that means anything."""
    if f"{name}_runs" in row:
        return interval(row[f"{name}_runs"])
    if row["seeds"] < statistics.ENOUGH:
        return number(row[name])
    return span(row[name], row[f"{name}_low"], row[f"{name}_high"])


def markdown(header, *lines):
    """A table; header: titles with | between them."""
    titles = header.split(" | ")
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (titles, ["---"] * len(titles), *lines))


def per_task(rows, tasks, optimizers):
    """A line per task, a column per optimizer, the alphas last."""
    lines = []
    for task in tasks:
        known = [rows.get((task, optimizer)) for optimizer in optimizers]
        alphas = ", ".join(f"{row['alpha']:g}" if row else "-" for row in known)
        lines.append([task, *(cell(row, "area") if row else "not run" for row in known), alphas])
    return markdown(f"task | {' | '.join(optimizers)} | their alphas", *lines)


def per_pair(rows):
    """A line per task and optimizer."""
    lines = ([*pair, f"{row['alpha']:g}", cell(row, "area"), cell(row, "final")] for pair, row in rows.items())
    return markdown("task | optimizer | alpha | return, whole run | return, last fifth", *lines)


# --- Ratios


def mean_ratio(rows, tasks, optimizer, units, name="area"):
    """Mean over tasks of an optimizer's mean in units of another's, or of the better of several."""
    better = [max(rows[task, unit][name] for unit in units) for task in tasks]
    return number(np.mean([rows[task, optimizer][name] / unit for task, unit in zip(tasks, better)]))


def score(rows, tasks, optimizer, name="area", baselines=BASELINES):
    """statistics.scores of one optimizer. Better is the baseline with the larger area on tuning seeds; where there is none, with the
    larger reported mean."""
    pairs = itertools.product(tasks, dict.fromkeys((optimizer, *baselines)))  # others would change the random numbers
    areas = {pair: rows[pair][f"{name}_runs"] for pair in pairs if f"{name}_runs" in rows.get(pair, {})}
    if any((task, optimizer) not in areas for task in tasks):
        return "runs not kept"
    means = {pair: float(statistics.iqm(values)) for pair, values in areas.items()}
    for task in tasks:
        if all(rows[task, baseline].get("tuning_area") for baseline in baselines):
            means |= {(task, baseline): rows[task, baseline]["tuning_area"] for baseline in baselines}
    return span(*statistics.scores(areas, means, baselines)[0][optimizer])


# --- Contents


def protocol():
    def column(folder):
        c = read_json(f"{folder}/config.json")["config"]
        by_gradient = c["estimator"] == "gradient"
        of = f"the loss after {c['inner_updates']} updates" if by_gradient else "returns of whole lives"
        units = f"{c['num_units']}{'' if by_gradient else ' pairs'}, {c['num_envs']}"
        test = f"{c['test_envs']} environments, {c['test_steps']:,.0f} steps"
        life = f"{c['reset_interval'][0] * c['inner_updates']:,}"
        return [of, len(c["tasks"]), units, life, c["meta_steps"], 1, test]

    titles = (
        "meta-gradient of|worlds|units of each, environments of one|updates in a unit's life|meta-steps|meta-runs|test"
    )
    paper = "the loss after 4 updates|6|512, 1|288 to 2,304|585|96|512 environments, 30,000,000 steps"
    columns = zip(titles.split("|"), paper.split("|"), *map(column, ("paper", "meta_seeds/meta_runs/100")))
    return markdown(" | paper | --preset paper | the default", *columns)


def truncation():
    ends, told = kept_rows("truncation/ends"), kept_rows("truncation/told")
    lines = [[*pair, *(cell(rows[pair], name) for name in ("area", "final") for rows in (ends, told))] for pair in ends]
    header = "task | optimizer | whole run, a true end | told | last fifth, a true end | told"
    return markdown(header, *lines)


def pendulum_units():
    mean = lambda folder, at: number(mean_of_log(folder, "inverted_pendulum/episode_return", at, 12))
    learned = ["meta-trained", *(mean("pendulum_meta", at) for at in (12, 24, 36, 84))]
    held = ["optimizer held as it was", *(mean("pendulum_control", at) for at in (12, 24, 36)), "not run"]
    return markdown("return in meta-steps | 12 to 23 | 24 to 35 | 36 to 47 | 84 to 95", learned, held)


def gated_scores():
    small = {"the paper's two small worlds": SIX[:2]}
    groups = small | {"its four big worlds": BIG, "all six": SIX, "its four robots": ROBOTS}
    columns = [("gated_adam", "area"), ("gated_adam", "final"), ("untrained_gated_adam", "area"), ("optim4rl", "area")]
    rows = six_worlds() | robots()
    lines = [[title, *(score(rows, tasks, *column) for column in columns)] for title, tasks in groups.items()]
    return markdown("tasks | gated_adam | its last fifth | untrained_gated_adam | optim4rl", *lines)


def gated_gates():
    """exp(o1), which the 14 numbers give, at age 100, with m^2 / v = .1 and v = mean v."""

    def step(signal=0.1, size=1.0, age=100):
        o1, _ = gated_adam.gates(gated_adam.WEIGHTS, np.sqrt(signal), np.float32(size), 1.0, age)
        return np.exp(o1)

    sweeps = {"age, in updates": ("age", (1, 10, 50, 100, 250)), "m^2 / v": ("signal", (0.001, 0.01, 0.1, 1))}
    sweeps |= {"v / mean v": ("size", (0.01, 1, 100))}
    steps = lambda name, values: ", ".join(f"{value:g}: {step(**{name: value}):.2f}" for value in values)
    lines = [[title, steps(name, values)] for title, (name, values) in sweeps.items()]
    return markdown("what changes | its value: the step / alpha", *lines)


def brax_ppo():
    lines = []
    for folder in ("brax_ppo_paper", "brax_ppo_ant"):
        task = read_json(f"{folder}/config.json")["config"]["task"]
        for row in read_json(f"{folder}/results.json"):
            returns = [interval(row[name]) for name in ("final_runs", "whole_runs")]
            lines.append([task, row["steps"], row["seeds"], row["trainer"], *returns, number(row["steps_per_second"])])
    return markdown("robot | steps | seeds | trainer | last evaluation | mean of all | steps/s", *lines)


def speeds(group, separator):
    """{what was timed: {which number: value}} of a group of the benchmark, whose rows are named by both."""
    found = {}
    for row in read_json("speed/bench.json")["rows"]:
        if row["group"] == group:
            name, _, kind = row["name"].partition(separator)
            found.setdefault(name, {})[kind] = row["value"]
    return found


def meta_speed():
    kinds = ("", "first meta-step", "peak memory")
    cells = lambda values: [f"{values[kind]:.3g}" if kind in values else "" for kind in kinds]
    lines = [[name, *cells(values)] for name, values in speeds("meta", ": ").items()]
    return markdown("units | s per meta-step | s to the first one | peak GiB", *lines)


def optimizer_sizes():
    cells = {}
    for row in read_json("speed/sizes.json")["rows"]:
        cells.setdefault(f"{row['num_scalars']:,}", []).append(f"{row['value']:.3g}")
    return markdown(
        "scalars | update, ms per 2^20 | in a meta-gradient, ms per 2^20", *([n, *ms] for n, ms in cells.items())
    )


def optimizer_speed():
    rows = speeds("optimizer", ", ")
    adam = rows["adam"]["forward"]
    cells = lambda kinds: [f"{kinds[k]:.1f}" if k in kinds else "" for k in ("forward", "meta-gradient")]
    lines = [[name, *cells(kinds), f"{kinds['forward'] / adam:.2g}"] for name, kinds in rows.items()]
    return markdown("optimizer | update, ms | in a meta-gradient, ms | update / Adam's", *lines)


CONTENTS = {
    "protocol": protocol,
    "paper_full": lambda: per_task(kept_rows("paper"), WORLDS, ("optim4rl", *HAND)),
    "paper_score": lambda: mean_ratio(kept_rows("paper"), WORLDS, "optim4rl", HAND[:1]),
    "paper_score_final": lambda: mean_ratio(kept_rows("paper"), WORLDS, "optim4rl", HAND[:1], "final"),
    "truncation": truncation,
    "robots": lambda: per_task(robots(), ROBOTS, (*COMPARED, "gated_adam")),
    "robots_long": lambda: per_pair(long_robots()),
    "robots_long_score": lambda: score(long_robots(), WALKING, "optim4rl"),
    "robots_long_final": lambda: score(long_robots(), WALKING, "optim4rl", "final"),
    "robots_long_start": lambda: score(long_robots(), WALKING, "untrained_optim4rl"),
    "robots_long_falling": lambda: score(long_robots(), WALKING, "optim4rl", baselines=(FALLING,)),
    "robots_easy": lambda: score(long_robots(), WALKING, "optim4rl", baselines=NOT_TUNED),
    "robots_easy_rmsprop": lambda: score(long_robots(), WALKING, "rmsprop", baselines=NOT_TUNED),
    "robots_fixed": lambda: score(long_robots(), WALKING, "optim4rl, not tuned", baselines=NOT_TUNED),
    "robots_score": lambda: score(kept_rows("transfer"), ROBOTS, "optim4rl"),
    "robots_start": lambda: score(kept_rows("transfer"), ROBOTS, "untrained_optim4rl"),
    "robots_sign": lambda: score(kept_rows("transfer"), ROBOTS, "sign_descent"),
    "robots_over_start": lambda: score(kept_rows("transfer"), ROBOTS, "optim4rl", baselines=COMPARED[1:2]),
    "pendulum_units": pendulum_units,
    "six_worlds": lambda: per_task(six_worlds(), SIX, ("optim4rl", "gated_adam", FALLING, START, *HAND)),
    "six_worlds_all": lambda: score(six_worlds(), SIX, "optim4rl"),
    "six_worlds_big": lambda: score(six_worlds(), BIG, "optim4rl"),
    "six_worlds_big_sign": lambda: mean_ratio(six_worlds(), BIG, "optim4rl", HAND[:1]),
    "six_worlds_small": lambda: score(six_worlds(), SIX[:2], "optim4rl"),
    "six_worlds_big_final": lambda: score(six_worlds(), BIG, "optim4rl", "final"),
    "six_worlds_big_falling": lambda: score(six_worlds(), BIG, "optim4rl", baselines=(FALLING,)),
    "six_worlds_big_start": lambda: score(six_worlds(), BIG, "optim4rl", baselines=(START,)),
    "six_worlds_small_tuned": lambda: score(six_worlds("six_worlds/small_tuned"), SIX[:2], "optim4rl"),
    "gated_scores": gated_scores,
    "gated_gates": gated_gates,
    "gated_six": lambda: score(six_worlds(), SIX, "gated_adam"),
    "gated_big_start": lambda: score(six_worlds(), BIG, "gated_adam", baselines=("untrained_gated_adam",)),
    "gated_small_tuned": lambda: score(six_worlds("gated_adam/small_tuned"), SIX[:2], "gated_adam"),
    "gated_robots_start": lambda: score(robots(), ROBOTS, "gated_adam", baselines=("untrained_gated_adam",)),
    "gated_four_robots": lambda: score(robots(), ROBOTS, "gated_adam"),
    "brax_ppo": brax_ppo,
    "meta_speed": meta_speed,
    "optimizer_speed": optimizer_speed,
    "optimizer_sizes": optimizer_sizes,
}
