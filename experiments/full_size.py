"""Experiment: the paper's figures at the paper's own size, in pieces that are made once (paper: Figures 1, 3, 4, 5).

    python -m experiments.full_size --plan                            # every piece: its state, its time here and on a GPU
    python -m experiments.full_size --only catch                      # pieces whose names begin so
    python -m experiments.full_size --time-limit 500                  # saves after 500 seconds, inside a piece or between two;
                                                                      # the same command continues
    python -m experiments.full_size --only catch_adam --scale 0.01 --results runs/try    # a hundredth of it, in seconds

Pieces come in order of worth. On a CPU the part that it can finish in a day is run, on an accelerator everything; named pieces
are run anywhere. Alphas are the reference's ("fixed"), where it has one, and then tuned like everywhere here. Meta-runs have
the reference's settings; the one with the largest area on tuning seeds counts. A piece leaves FOLDER/NAME.json, a row per
kind of alpha, and NAME.npz, the curves of its runs.
"""

import itertools
import pathlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax

import evaluate
import meta_train
from experiments import arms, contents, drift
from harness import agents, runs, statistics, stops, tasks, weights

GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # the reference's for Adam and RMSProp on gridworlds
WEIGHTS = {  # of the learned optimizers that were learned already: (whose, file)
    "optim4rl": ("optim4rl", evaluate.WEIGHTS / "optim4rl.npz"),
    "optim4rl_raw": ("optim4rl", runs.ROOT / "results/meta_seeds_raw/meta_runs/100/optimizer.npz"),
    "gated_adam": ("gated_adam", evaluate.WEIGHTS / "gated_adam.npz"),
}
FIGURE4 = ("optim4rl", "gated_adam", "adam", "rmsprop", "sign_descent")
FIXED = {"ant": 3e-4, "humanoid": 3e-4, "inverted_double_pendulum": 3e-4, "walker2d": 3e-5}  # the reference's alpha
TUNING_SEEDS = 3  # an accelerator trains three robots at once
FAIR = ("rmsprop_0.9_corrected", "rmsprop_0.9_corrected_falling", "rmsprop_0.99_corrected")
ONE_TASK = meta_train.PRESETS["gradient"] | dict(task_grad_norm=0.0, test_tasks=(), checkpoint_every=60.0)
ROBOT = ONE_TASK | dict(
    ppo="paper", num_units=1, meta_steps=488, alpha=(3e-4,)
)  # one unit, as the reference on a device
META = {  # as much experience in a meta-run as in a test
    "catch": ONE_TASK | dict(num_units=64, meta_steps=78, alpha=(1e-3,)),
    "big_dense_long": ONE_TASK | dict(num_units=512, meta_steps=585, alpha=(3e-3,)),
    "ant": ROBOT,
    "humanoid": ROBOT,
}
# What it takes: steps a second of all agents together, on 2 CPU cores and on one H100, and minutes of a meta-run
SPEED = {"small": (2.5e6, 8.2e7), "big": (2.5e5, 1.57e7), "catch": (8.7e5, 3e6), "ant": (3.3e4, 1.5e6)}
SPEED |= {"humanoid": (2e4, 9.3e5), "inverted": (2.3e4, 3.3e6), "walker2d": (5.3e4, 2.4e6)}
META_MINUTES = {"catch": (0.4, 0.2), "big": (98, 1.6), "ant": (163, 5), "humanoid": (163, 6)}


@dataclass(frozen=True)
class Config:
    only: tuple[str, ...] = ()  # names of pieces, or their beginnings; empty: all that suits this machine
    plan: bool = False  # print the pieces and run nothing
    scale: float = 1.0  # part of every length that is run: to try a piece
    results: str = "results/full_size"  # folder of all pieces
    devices: int | None = None  # None: all, on a CPU one per core
    time_limit: float | None = None  # seconds after which it saves and ends with status 0; None: no limit


class Piece(NamedTuple):
    name: str
    panel: str
    folder: str  # of its files; some pieces are parts of others, and share it
    call: Callable  # (config, folder, mesh) -> {"fixed" or "tuned": (row of NAME.json, agents.Tuned or None)}
    minutes: tuple  # on 2 CPU cores, on one H100
    on_cpu: bool  # whether a CPU runs it unasked


def gradients(figure, flags, config, folder, mesh):
    """Figures 1 and 5."""
    flags = flags | {"updates": max(3, round(config.scale * flags["updates"]))}
    drifts = drift.make(drift.Config(figure, **flags), folder)
    return {"drift": (statistics.measured("drift", drifts) | flags, None)}


def candidates(task, label, settings, config, folder):
    """{label of a candidate: agents.Optimizer}: meta-trained with each of the settings, or the one of that label."""
    if not settings:
        return {label: evaluate.load_optimizer(*WEIGHTS[label]) if label in WEIGHTS else agents.Optimizer(label)}

    base, found = META[task] | dict(tasks=(task,), optimizer=label, devices=config.devices), {}
    for i, setting in enumerate(settings):
        of_run = meta_train.Config(**base | setting, out=str(folder / "meta_runs" / f"{label}-{i}"))
        of_run = replace(of_run, meta_steps=max(2, round(config.scale * of_run.meta_steps)))
        try:
            found[f"{label}-{i}"] = arms.learned(of_run)
        except SystemExit as stop:
            if isinstance(stop.code, int):
                raise
            print(stop.code)  # it lost its meta-gradient, and does not count
    return found


def test(name, label, alphas, seeds, settings, config, folder, mesh):
    """Fresh agents; alphas: {"fixed" or "tuned": learning rates}."""
    task, results = tasks.make(name, ppo_settings="paper"), {}
    options = candidates(name, label, settings, config, folder)
    if not options:  # all meta-runs lost their meta-gradients: no agents, and the piece is done
        return {}

    def run(option, rates, num_seeds, tuning_seeds):
        args = (folder, task, option, options[option], rates, num_seeds, mesh, config.scale * paper_steps(name))
        return arms.test(*args, tuning_seeds)

    for title, rates in alphas.items():
        areas, best = {}, next(iter(options))
        if title == "tuned":
            rates = agents.learning_rates(options[best], rates)
        if len(options) > 1:
            areas = {option: run(option, rates, 0, TUNING_SEEDS).tuning_area for option in options}
            best = max(areas, key=lambda option: statistics.worst_if_diverged(areas[option]))
        more = {"alphas": list(rates), "chosen": best}
        more |= {"tuning_areas": {option: statistics.json_number(area) for option, area in areas.items()}}
        tuned = run(best, rates, seeds, TUNING_SEEDS if len(rates) > 1 else 0)
        results[title] = statistics.summarize(name, label, tuned) | more, tuned
        options = {best: options[best]}  # which is then tuned, too
    return results


def precision(config, folder, mesh):
    """Optim4RL on a small world with matrix products as the device makes them, on a GPU in TF32, and in float32.

    Both should be level, and level with a CPU's small_dense_short_optim4rl.
    """
    name, results = "small_dense_short", {}
    task, steps = tasks.make(name), config.scale * paper_steps(name)
    optimizer = evaluate.load_optimizer(*WEIGHTS["optim4rl"])
    for kind in ("default", "float32"):
        with jax.default_matmul_precision(kind):
            tuned = arms.test(folder, task, f"optim4rl-{kind}", optimizer, (0.03,), 10, mesh, steps)
        results[kind] = statistics.summarize(name, "optim4rl", tuned), tuned
    return results


# --- The pieces


def paper_steps(task):
    """Environment steps of one agent."""
    return 5e5 if task == "catch" else 3e7 if task in tasks.WORLDS else tasks.PAPER_PPO[task][0]


def settings_of(rates, intervals):
    """The reference's sweep on one task: meta learning rates, two kinds of clipping, reset intervals."""
    clips = (dict(meta_grad_clip=0.5), dict(meta_grad_clip=1.0, clip_entries=True))
    product = itertools.product(rates, clips, intervals)
    return [dict(meta_learning_rate=rate, reset_interval=(m,)) | clip for rate, clip, m in product]


def piece(panel, task, label, alphas, seeds=10, settings=(), made=0, part="", on_cpu=False):
    """Agents of one optimizer on one task. made: agents of an earlier piece in the same folder."""
    kind, num_runs, candidates = next(name for name in SPEED if task.startswith(name)), -made, max(1, len(settings))
    for rates in alphas.values():
        num_runs += seeds + (len(rates) * candidates * TUNING_SEEDS if len(rates) * candidates > 1 else 0)
        candidates = 1  # the best of the settings is then tuned
    agents_minutes = [num_runs * paper_steps(task) / speed / 60 for speed in SPEED[kind]]
    minutes = [x + len(settings) * y for x, y in zip(agents_minutes, META_MINUTES.get(kind, (0, 0)))]
    return Piece(
        name=f"{task}_{label}{part}",
        panel=panel,
        folder=f"{task}_{label}",
        call=partial(test, task, label, alphas, seeds, settings),
        minutes=minutes,
        on_cpu=on_cpu,
    )


def pieces():
    """All pieces in order of worth."""
    learned, tuned = ("optim4rl", "linear_optim", "l2lgd2", "star"), {"tuned": (*GRID, 0.1)}
    figure1 = partial(gradients, "figure1", dict(updates=2930, num_envs=512, learning_rate=3e-3))
    figure5 = partial(gradients, "figure5", dict(updates=140, learning_rate=3e-4, network="conv", clip=0.0))
    yield Piece("figure1", "Figure 1", "figure1", figure1, (25, 0.2), True)
    yield Piece("figure5", "Figure 5, with digits", "figure5", figure5, (1, 0.1), True)
    sweep = settings_of((1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (32, 64))
    for label in ("adam", "rmsprop", "sign_descent", *learned):
        both, settings = {"fixed": (1e-3,)} | tuned, sweep if label in learned else ()
        yield piece("Figure 3, catch", "catch", label, both, settings=settings, on_cpu=True)
    yield Piece("precision", "TF32 and float32", "precision", precision, (4, 0.2), False)
    for label, world in itertools.product(("adam", "rmsprop", *WEIGHTS, "sign_descent", *FAIR), tasks.PAPER_WORLDS):
        on_cpu = world.startswith("small") and label in ("adam", "rmsprop", "optim4rl", contents.FALLING)
        yield piece("six worlds", world, label, tuned, on_cpu=on_cpu)
    sweep = settings_of((1e-5, 3e-5, 1e-4, 3e-4, 1e-3), (72, 144, 288, 576))
    for label in learned:
        yield piece(
            "Figure 3, big_dense_long", "big_dense_long", label, {"fixed": (3e-3,)}, settings=sweep, part="_learned"
        )
    of_robots = list(itertools.product(("inverted_double_pendulum", "walker2d", "ant", "humanoid"), FIGURE4))
    for seeds, (robot, label) in itertools.product((3, 10), of_robots):  # first 3 runs of each
        made = 3 if seeds == 10 else 0
        alphas = {"fixed": (FIXED[robot],)}
        yield piece(f"Figure 4, {robot}", robot, label, alphas, seeds, made=made, part=f"_{seeds}")
    for robot, label in of_robots:
        alphas = {"tuned": (FIXED[robot], 3.3 * FIXED[robot], 10 * FIXED[robot])}
        yield piece(f"Figure 4, {robot}", robot, label, alphas, 3, part="_tuned")
    for robot, label in itertools.product(("ant", "humanoid"), learned):
        one = [dict(meta_learning_rate=3e-4, reset_interval=(64,))]
        yield piece(f"Figure 3, {robot}", robot, label, {"fixed": (FIXED[robot],)}, 3, one, part="_learned")


# --- The program


def state_of(config, piece):
    folder = pathlib.Path(config.results, piece.folder)
    if (folder / f"{piece.name}.json").exists():
        return "done"
    return "partly" if any(folder.glob("*/*")) or any(folder.glob("life_*")) else "not run"


def print_plan(config, chosen):
    """A line per panel; with --only also one per piece."""
    of_state = {piece.name: state_of(config, piece) for piece in chosen}

    def line(title, states, group):
        state = states.pop() if len(states) == 1 else "partly"
        times = [sum(piece.minutes[i] for piece in group) for i in (0, 1)]
        cpu, gpu = (f"{x / 60:7.1f} h  " if x >= 60 else f"{x:7.1f} min" for x in times)
        cpu_part = sum(piece.on_cpu for piece in group)
        part = f"{cpu_part} of {len(group)} on a CPU" if cpu_part else ""
        print(f"{title:50} {state:8} {cpu} {gpu}  {part}")

    print(f"{'':50} {'state':8} {'2 CPU cores':>11} {'one H100':>11}  the CPU part, in pieces")
    for panel in dict.fromkeys(piece.panel for piece in chosen):
        group = [piece for piece in chosen if piece.panel == panel]
        line(panel, {of_state[piece.name] for piece in group}, group)
        for piece in group if config.only else ():
            line(f"  {piece.name}", {of_state[piece.name]}, [piece])
    left = [piece for piece in chosen if of_state[piece.name] != "done"]
    cpu, gpu = sum(piece.minutes[0] for piece in left if piece.on_cpu), sum(piece.minutes[1] for piece in left)
    longest = max((piece.minutes[1] for piece in left), default=0)
    print(
        f"\nLeft: {cpu / 60:.1f} h of 2 cores for the CPU part; {gpu / 60:.1f} h of an H100, {longest:.0f} minutes the longest piece."
    )


def make(config, piece, mesh):
    """Runs a piece from where it stands, and writes what came out."""
    folder = pathlib.Path(config.results, piece.folder)
    if not (folder / "config.json").exists():
        runs.new_folder(folder, piece.folder, config)
    elif (scale := runs.read_config(Config, folder).scale) != config.scale:
        raise runs.UsageError(f"{folder} was run with --scale {scale}; choose another --results")
    with runs.only_one(folder):
        results = piece.call(config, folder, mesh)
    curves = {
        f"{title}_{name}": x
        for title, (_, tuned) in results.items()
        if tuned
        for name, x in tuned.runs._asdict().items()
    }
    if curves:
        weights.write_arrays(folder / f"{piece.name}.npz", curves, compressed=True)
    runs.write_json(folder / f"{piece.name}.json", {title: row for title, (row, _) in results.items()})


def main(argv=None):
    config = runs.parse(Config, {}, __doc__, argv)
    runs.check_positive(config, ("scale", "time_limit"))
    known = list(pieces())
    for name in config.only:
        if not any(piece.name.startswith(name) for piece in known):
            raise runs.UsageError(f"--only {name}: no piece's name begins so; --plan lists them")
    chosen = [piece for piece in known if not config.only or piece.name.startswith(config.only)]
    if config.plan:
        return print_plan(config, chosen)
    mesh = runs.use_devices(config.devices)
    everything = config.only or mesh.devices.flat[0].platform != "cpu"
    with stops.graceful_stop(f"to continue: {runs.command()}", config.time_limit):
        for piece in chosen:
            if (everything or piece.on_cpu) and state_of(config, piece) != "done":
                print(
                    f"{piece.panel}: {piece.name}, about {piece.minutes[mesh.devices.flat[0].platform != 'cpu']:.0f} minutes"
                )
                make(config, piece, mesh)


if __name__ == "__main__":
    runs.run(main)
