"""Experiment: pipeline training's staggered resets beside Optim4RL's update rule, as a picture (paper: Figure 2). Needs no run.

python -m experiments.figure2                                   # results/figure2/figure2.png
python -m experiments.figure2 --num-units 512 --reset-interval 288 --out runs
"""

import pathlib
from dataclasses import dataclass

import numpy as np

import pipeline
from harness import plots, runs
from harness.plots import plt


@dataclass(frozen=True)
class Config:
    num_units: int = 8  # n
    reset_interval: int = 24  # m
    out: str = "results/figure2"  # folder of the picture


def reset_table(num_units, reset_interval, num_steps, resets="staggered"):
    """(due, age), each [U, S]: whether a unit is reset (pipeline.reset_due itself); meta-steps since it was."""
    steps, units = np.arange(num_steps), np.arange(num_units)[:, None]
    due = np.asarray(pipeline.reset_due(steps, units, num_units, reset_interval, resets))
    born = np.maximum.accumulate(np.where(due, steps, 0), axis=1)  # all begin at step 0
    return due, steps - born


def main(argv=None):
    config = runs.parse(Config, {}, __doc__, argv)
    runs.check_positive(config, ("num_units", "reset_interval"))
    due, age = reset_table(config.num_units, config.reset_interval, 3 * config.reset_interval)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=(3, 2), layout="constrained")
    image = left.imshow(age, aspect="auto", interpolation="nearest", cmap="Blues", origin="lower")
    unit, step = np.nonzero(due)
    left.scatter(step, unit, s=24, marker="|", color="tab:red")
    left.set(title=f"{config.num_units} units, each reset (red) every {config.reset_interval} meta-steps")
    left.set(xlabel="meta-step", ylabel="unit")
    figure.colorbar(image, label="age in meta-steps")
    rule = "g, h1  $\\to$  GRU1  $\\to$  Linear1  $\\to$  o1\n$m = \\mathrm{sign}(g)\\,\\exp(o_1)$\n\n"
    rule += "g$^2$, h2  $\\to$  GRU2  $\\to$  Linear2  $\\to$  o2\n$v = \\exp(o_2)$\n\n"
    rule += "update $= -\\alpha\\, m\\, /\\, \\sqrt{v + \\epsilon}$"
    right.text(0.5, 0.5, rule, ha="center", va="center", fontsize=14, linespacing=1.5, transform=right.transAxes)
    right.set(title="Optim4RL, for each parameter")
    right.axis("off")
    print(plots.save(figure, pathlib.Path(config.out) / "figure2.png"))


if __name__ == "__main__":
    runs.run(main)
