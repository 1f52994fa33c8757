"""Experiment: the paper's protocol, panel by panel, and what full_size.py has run of it, as tables for docs/results.md.

The paper's columns are from the configs of its reference implementation.
"""

import json

from experiments import full_size
from experiments.contents import RESULTS, SIX, cell, markdown, score

IN_TRAINING, TEN, TWENTY = "training episodes", "128 episodes without noise, 10 times", "the same, 20 times"
# panel -> the reference's (steps of an agent, agents, how its alpha is chosen, what its returns are of)
PAPER = {
    "Figure 1": ("2,930 updates, 512 environments", 1, ".003", "-"),
    "Figure 5": ("10 epochs of MNIST, convolutional", 1, ".0003", "-"),
    "Figure 3, catch": ("5e5", 10, ".001; best of 20 meta-runs", IN_TRAINING),
    "Figure 3, big_dense_long": ("3e7", 10, "learned: .003, best of 40 meta-runs; others best of 6", IN_TRAINING),
    "Figure 3, ant": ("1e8", 10, ".0003; best of 50 meta-runs", TEN),
    "Figure 3, humanoid": ("1e8", 10, ".0003; best of 50 meta-runs", TEN),
    "Figure 4, ant": ("1e8", 10, ".0003; best of 96 meta-runs", TEN),
    "Figure 4, humanoid": ("1e8", 10, ".0003; best of 96 meta-runs", TEN),
    "Figure 4, inverted_double_pendulum": ("2e7", 10, ".0003; best of 96 meta-runs", TWENTY),
    "Figure 4, walker2d": ("5e7", 10, ".00003; best of 96 meta-runs", TWENTY),
    "six worlds": ("3e7", 10, "Adam, RMSProp: best of 6", IN_TRAINING),
}


def panels(results=RESULTS / "full_size"):
    """A row per panel: the paper's protocol, and how many of full_size.py's pieces are done."""
    config, rows, pieces = full_size.Config(results=str(results)), [], list(full_size.pieces())
    for panel, paper in PAPER.items():
        states = [full_size.state_of(config, piece) for piece in pieces if piece.panel.startswith(panel)]
        rows.append([panel, *paper, f"{states.count('done')} of {len(states)} pieces"])
    return rows


def finished(panel, results=RESULTS / "full_size"):
    """(kind of alpha, row) of what the finished pieces of a panel wrote."""
    paths = [results / piece.folder / f"{piece.name}.json" for piece in full_size.pieces() if piece.panel == panel]
    return [item for path in paths if path.exists() for item in json.loads(path.read_text()).items()]


def outcome(panel):
    """What the finished pieces of a panel say, a row per task, optimizer and kind of alpha."""
    rows = []
    for kind, row in sorted(finished(panel), key=lambda item: item[1]["task"]):
        alpha = f"{row['alpha']:g}{', tuned' * (kind == 'tuned')}"
        rows.append([row["task"], row["optimizer"], alpha, cell(row, "area"), cell(row, "final")])
    return markdown("task | optimizer | alpha | return, whole run | return, last fifth", *rows)


def small_worlds():
    """Optim4RL's score on the paper's two small worlds at its whole length, in units of RMSProp's area."""
    rows = {(row["task"], row["optimizer"]): row for _, row in finished("six worlds")}
    return score(rows, SIX[:2], "optim4rl", baselines=("rmsprop",))


CONTENTS = {
    "panels": lambda: markdown("panel | steps | agents | alpha | returns | run here", *panels()),
    "full_size_catch": lambda: outcome("Figure 3, catch"),
    "full_size_worlds": lambda: outcome("six worlds"),
    "full_size_small": small_worlds,
}
