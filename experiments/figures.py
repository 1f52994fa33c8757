"""Program: the paper's figures, from our own runs. Each figure's docstring names the commands that make its inputs.

    python figures.py figure1                               # A2C's gradients over its life: a minute on a CPU core
    python figures.py figure5                               # the same in supervised learning, beside figure 1: seconds
    python figures.py figure2                               # pipeline training's resets, and the update rule
    python figures.py figure3 --results DIR,DIR             # learning curves from folders of comparison.py or evaluate.py; figure4 too
    python figures.py ablations                             # from ablations.py's folder

Figures 1 and 5 keep small histograms in --results, and draw what is there already; any other data need another folder.
"""

import csv
import dataclasses
import itertools
import pathlib
import sys
import zipfile

import jax
import matplotlib
import numpy as np
import scipy.stats
from tqdm import tqdm

import cli
import compare
import gradients
import pipeline

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PHASES = ("beginning", "middle", "end")


@dataclasses.dataclass(frozen=True)
class Config:
    results: str | None = cli.flag(
        None, "folder of the data, comma-separated folders for figures 3 and 4; none: results/FIGURE"
    )
    out: str | None = cli.flag(None, "folder of the picture; none: the first of --results")
    updates: int = cli.flag(300, "figures 1 and 5: updates in the agent's or network's life")
    num_envs: int = cli.flag(64, "figure 1: environments of the agent")
    batch_size: int = cli.flag(128, "figure 5: images in a batch")
    learning_rate: float = cli.flag(1e-3, "figures 1 and 5: alpha of RMSProp")
    mnist: str | None = cli.flag(
        None, "figure 5: IMAGES,LABELS (IDX files, also .gz) or one .npz; none: scikit-learn's digits"
    )
    num_units: int = cli.flag(8, "figure 2: units n")
    reset_interval: int = cli.flag(24, "figure 2: reset interval m")
    seeds: int = cli.flag(5, "figures 1 and 5: lives, each with a seed of its own")
    seed: int = cli.flag(0, "seed of everything")


PRESETS = {
    "quick": {},
    "paper": dict(updates=2930, num_envs=512, num_units=512, reset_interval=288),  # 2930 updates: 3e7 steps
}


def figure1(config, folder, out):
    """Histograms of A2C's gradients at three phases of life on big_dense_long with RMSProp (paper: Figure 1).

    python figures.py figure1 [--preset paper]
    """
    make_histograms(config, folder, "figure1", gradients.a2c_step)
    return draw_histograms(out / "figure1.png", {"A2C on big_dense_long": read_histograms(folder)})


def figure5(config, folder, out):
    """The same for supervised learning of digits (paper: Figure 5), beside figure 1 where results/figure1 is there.

    python figures.py figure5 [--mnist train-images-idx3-ubyte.gz,train-labels-idx1-ubyte.gz]
    """
    make_histograms(config, folder, "figure5", gradients.supervised_step)
    panels, beside = {}, pathlib.Path("results/figure1")
    if (beside / "histograms.npz").exists():
        panels["A2C on big_dense_long"] = read_histograms(beside)
    data = "MNIST" if cli.read_config(Config, folder).mnist else "scikit-learn's digits"
    return draw_histograms(out / "figure5.png", panels | {f"supervised, {data}": read_histograms(folder)})


def make_histograms(config, folder, figure, make_step):
    """Collects a figure's data, unless the folder holds them: histograms.npz with counts [S, 3, B], edges [B + 1]."""
    if (folder / "histograms.npz").exists():
        saved = cli.read_config(Config, folder)
        for field in dataclasses.fields(Config)[2:]:
            value, before = getattr(config, field.name), getattr(saved, field.name)
            if value not in (before, field.default):
                flag = "--" + field.name.replace("_", "-")
                raise cli.UsageError(f"{folder} holds data of {flag} {before}, not {value}; choose another --results")
        return
    cli.check_positive(config, ("updates", "num_envs", "batch_size", "learning_rate", "seeds"))
    step, *_ = make_step(config)  # before the folder is made: bad input leaves nothing behind
    cli.new_folder(folder, figure, dataclasses.replace(config, results=None, out=None))
    lives = [dataclasses.replace(config, seed=config.seed + i) for i in range(config.seeds)]
    counts = [phase_histograms(step, *make_step(life)[1:], config.updates, figure) for life in lives]
    np.savez_compressed(folder / "histograms.npz", counts=np.stack(counts), edges=gradients.EDGES)


def phase_histograms(step, state, key, updates, figure):
    """Sums of the histograms in each phase of one life: [3, B]."""
    length = max(1, updates // 30)  # updates of a phase: enough to see its whole distribution
    starts = np.linspace(0, updates - length, len(PHASES)).astype(int)
    counts = np.zeros((len(PHASES), len(gradients.EDGES) - 1), int)
    for t, step_key in enumerate(tqdm(jax.random.split(key, updates), desc=figure, unit="update")):
        state, histogram = step(state, step_key)
        inside = (starts <= t) & (t < starts + length)
        if inside.any():
            counts[inside] += np.asarray(histogram)
    return counts


def read_histograms(folder):
    """(counts [S, 3, B], edges [B + 1])."""
    try:
        with np.load(folder / "histograms.npz", allow_pickle=False) as file:
            return file["counts"], file["edges"]
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise cli.UsageError(f"{folder}/histograms.npz is damaged ({error}); delete it and run again") from None


def drift(counts, edges):
    """Mean Wasserstein distance of log10|g| between pairs of phases, in decades: counts [3, B], edges [B + 1]."""
    centers = (edges[:-1] + edges[1:]) / 2
    pairs = itertools.combinations(counts, 2)
    return float(np.mean([scipy.stats.wasserstein_distance(centers, centers, a, b) for a, b in pairs]))


def draw_histograms(path, panels):
    """panels: {title: (counts, edges)}, one panel each on one scale, of all seeds together; prints each one's drift."""
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1 + 4.5 * len(panels), 3.6), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, (title, (counts, edges)) in zip(axes[0], panels.items()):
        for phase, count in zip(PHASES, counts.sum(0)):
            axis.stairs(count / count.sum(), edges, label=phase, linewidth=1.5)
        mean, low, high = compare.interval([drift(life, edges) for life in counts])
        axis.set(title=f"{title}\ndrift {mean:.2f} [{low:.2f}, {high:.2f}] decades", xlabel="log10(|g| + 1e-8)")
        print(
            f"{title}: drift {mean:.3f} [{low:.3f}, {high:.3f}] decades (Wasserstein distance between {', '.join(PHASES)}, "
            f"mean of the pairs; interquartile mean and 95% bootstrap interval over {len(counts)} seeds)"
        )
    axes[0, 0].set(ylabel="share of all scalars", ylim=(0, None))
    axes[0, 0].legend(frameon=False)
    return save(figure, path)


def reset_table(num_units, reset_interval, num_steps):
    """(due, age), each [U, S]: whether a unit starts afresh (pipeline.reset_due itself); meta-steps since it did."""
    steps, units = np.arange(num_steps), np.arange(num_units)[:, None]
    due = np.asarray(pipeline.reset_due(steps, units, num_units, reset_interval))
    born = np.maximum.accumulate(np.where(due, steps, 0), axis=1)  # all start at step 0
    return due, steps - born


def figure2(config, folder, out):
    """Pipeline training's staggered resets, and Optim4RL's update rule (paper: Figure 2). Needs no run.

    python figures.py figure2
    """
    cli.check_positive(config, ("num_units", "reset_interval"))
    due, age = reset_table(config.num_units, config.reset_interval, 3 * config.reset_interval)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=(3, 2), layout="constrained")
    image = left.imshow(age, aspect="auto", interpolation="nearest", cmap="Blues", origin="lower")
    unit, step = np.nonzero(due)
    left.scatter(step, unit, s=24, marker="|", color="tab:red")
    left.set(title=f"Ages of {config.num_units} units, each reset (red) every {config.reset_interval} meta-steps")
    left.set(xlabel="meta-step", ylabel="unit")
    figure.colorbar(image, label="age in meta-steps")
    rule = "g, h1  $\\to$  GRU1  $\\to$  Linear1  $\\to$  o1\n$m = \\mathrm{sign}(g)\\,\\exp(o_1)$\n\n"
    rule += "g$^2$, h2  $\\to$  GRU2  $\\to$  Linear2  $\\to$  o2\n$v = \\exp(o_2)$\n\n"
    rule += "$\\Delta\\theta = -\\alpha\\, m\\, /\\, \\sqrt{v + \\epsilon}$"
    right.text(0.5, 0.5, rule, ha="center", va="center", fontsize=14, linespacing=1.5, transform=right.transAxes)
    right.set(title="The rule, for every scalar alike")
    right.axis("off")
    return save(figure, out / "figure2.png")


def read_curves(folders):
    """{(task, optimizer): (steps [K], returns [R, K])} from the curves.csv of evaluate.py's folders."""
    curves = {}
    for folder in folders:
        rows, path = {}, pathlib.Path(folder) / "curves.csv"
        try:
            with open(path, newline="") as file:
                for row in csv.DictReader(file):
                    runs = rows.setdefault((row["task"], row["optimizer"]), {})
                    runs.setdefault(int(row["run"]), {})[int(row["step"])] = float(row["episode_return"])
        except OSError:
            raise cli.UsageError(f"no file {path}; python evaluate.py --out {folder} makes it") from None
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise cli.UsageError(f"{path} is not a curves.csv of evaluate.py ({error!r})") from None
        for name, runs in rows.items():
            steps = sorted(runs[0]) if 0 in runs else []
            if name in curves or any(sorted(run) != steps for run in runs.values()):
                raise cli.UsageError(f"{path}: the runs of {name[1]} on {name[0]} are incomplete, or in two folders")
            curves[name] = np.array(steps), np.array([[run[step] for step in steps] for run in runs.values()])
    return curves


def learning_curves(name, folders, out):
    """A picture NAME.png in the folder out, of the curves.csv in folders; returns its path.

    One panel a task: interquartile means over runs, each smoothed over a tenth of its length, and 95% bootstrap intervals.
    """
    curves = read_curves(folders)
    tasks = list(dict.fromkeys(task for task, _ in curves))
    if not tasks:
        raise cli.UsageError(f"no runs in {', '.join(folders)}")
    columns = len(tasks) if len(tasks) <= 4 else 3
    grid = -(-len(tasks) // columns), columns
    size = 2 + 4 * columns, 3.4 * grid[0]
    figure, axes = plt.subplots(*grid, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(tasks) :]:
        axis.remove()
    for (task, optimizer), (steps, returns) in curves.items():
        axis, color = axes.flat[tasks.index(task)], compare.COLORS.get(optimizer, "black")
        window = max(1, len(steps) // 10)
        returns = np.lib.stride_tricks.sliding_window_view(returns, window, axis=1).mean(-1)
        mean, low, high = np.transpose([compare.interval(values) for values in returns.T])
        axis.plot(steps[window - 1 :], mean, label=optimizer, color=color)
        axis.fill_between(steps[window - 1 :], low, high, alpha=0.2, color=color, linewidth=0)
        axis.set(title=f"{task} ({len(returns)} seeds)", xlabel="environment steps", ylabel="episode return")
        axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, loc="outside right upper")
    return save(figure, out / f"{name}.png")


def figure3(config, folders, out):
    """Learning curves, each learned optimizer meta-trained on the task it is tested on (paper: Figure 3).

    python comparison.py --out runs/comparison
    python figures.py figure3 --results runs/comparison
    """
    return learning_curves("figure3", folders, out)


def figure4(config, folders, out):
    """Learning curves on robots of an optimizer that was meta-trained on gridworlds alone (paper: Figure 4).

    python evaluate.py --preset transfer --out results/transfer    # or --preset paper, on an accelerator
    python figures.py figure4 --results results/transfer
    """
    return learning_curves("figure4", folders, out)


def ablations(config, folders, out):
    """Returns of each setting of meta-training, changed one at a time; optimizers without meta-training as lines.

    python ablations.py --out results/ablations
    python figures.py ablations
    """
    rows = read_ablations(pathlib.Path(folders[0]) / "results.csv")
    lines, points = rows[:3], rows[3:]
    figure, axis = plt.subplots(figsize=(8.5, 1.4 + 0.27 * len(points)), layout="constrained")
    for row in lines:
        color = compare.COLORS[row["value"]]
        axis.axvline(row["area"], color=color, label=row["value"])
        axis.axvspan(row["area_low"], row["area_high"], color=color, alpha=0.15, linewidth=0)
    first = [row["ablation"] != before["ablation"] for before, row in zip(rows[2:], points)]
    heights = np.arange(len(points)) + 0.7 * np.cumsum(first)  # a gap before each ablation
    for row, height in zip(points, heights):
        errors = [[row["area"] - row["area_low"]], [row["area_high"] - row["area"]]]
        axis.errorbar(
            row["area"], height, xerr=errors, fmt="D" if row["base"] == "1" else "o", color="black", capsize=2
        )
    axis.set_yticks(heights, [f"{row['ablation']}:  " * new + row["value"] for new, row in zip(first, points)])
    axis.invert_yaxis()
    axis.set(
        xlabel=f"episode return, mean over an agent's life ({rows[0]['seeds']} seeds)",
        title="one change at a time; diamond: the base",
    )
    figure.legend(frameon=False, loc="outside right upper")
    return save(figure, out / "ablations.png")


def read_ablations(path):
    """The rows of ablations.py's results.csv: dicts of text, the measured columns as numbers."""
    measured = ("area", "area_low", "area_high")
    try:
        with open(path, newline="") as file:
            return [row | {name: float(row[name]) for name in measured} for row in csv.DictReader(file)]
    except OSError:
        raise cli.UsageError(f"no file {path}; python ablations.py --out {path.parent} makes it") from None
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise cli.UsageError(f"{path} is not a results.csv of ablations.py ({error!r})") from None


def save(figure, path):
    """Writes the picture and returns its path."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise cli.UsageError(f"cannot write {path}: {error.strerror}; choose another folder with --out") from None
    plt.close(figure)
    return path


FIGURES = {function.__name__: function for function in (figure1, figure2, figure3, figure4, figure5, ablations)}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    name, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    config = cli.parse(Config, PRESETS, __doc__, flags)  # --help ends here
    if name not in FIGURES:
        raise cli.UsageError(f"{'no figure named' if name is None else repr(name)}; known: {', '.join(FIGURES)}")
    folders = (config.results or f"results/{name}").split(",")
    out = pathlib.Path(config.out or folders[0])
    if name in ("figure1", "figure5"):
        if len(folders) > 1:
            raise cli.UsageError(f"--results is {config.results!r}; {name} takes one folder")
        folders = pathlib.Path(folders[0])
    print(FIGURES[name](config, folders, out))


if __name__ == "__main__":
    cli.run(main)
