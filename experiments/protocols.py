"""Experiment: the paper's protocol, panel by panel, and what was run here, as a table for docs/results.md; see tables.py.

The paper's columns are from the configs of its reference implementation; what was run is read from results/.
"""

from experiments import full_size
from experiments.contents import RESULTS, markdown, read_json

OF_ROBOTS = "no noise, {} times in a run, 128 episodes"
# panel -> the reference's (steps of an agent, agents, how its alpha is chosen, what its returns are of), our earlier results
PAPER = {
    "Figure 1": ("2,930 updates, 512 environments", 1, ".003", "-", "figure1"),
    "Figure 5": ("10 epochs of MNIST, convolutional", 1, ".0003", "-", "figure5"),
    "Figure 3, catch": ("5e5", 10, ".001; best of 20 meta-runs", "training episodes", "figure3/catch"),
    "Figure 3, big_dense_long": (
        "3e7",
        10,
        "learned: .003, best of 40 meta-runs; others best of 6",
        "training episodes",
        "figure3/big_dense_long",
    ),
    "Figure 3, ant": ("1e8", 10, ".0003; best of 50 meta-runs", OF_ROBOTS.format(10), None),
    "Figure 3, humanoid": ("1e8", 10, ".0003; best of 50 meta-runs", OF_ROBOTS.format(10), None),
    "Figure 4, ant": ("1e8", 10, ".0003; best of 96 meta-runs", OF_ROBOTS.format(10), "transfer"),
    "Figure 4, humanoid": ("1e8", 10, ".0003; best of 96 meta-runs", OF_ROBOTS.format(10), "transfer"),
    "Figure 4, inverted_double_pendulum": ("2e7", 10, ".0003; best of 96 meta-runs", OF_ROBOTS.format(20), "transfer"),
    "Figure 4, walker2d": ("5e7", 10, ".00003; best of 96 meta-runs", OF_ROBOTS.format(20), "transfer"),
    "six worlds": ("3e7", 10, "Adam, RMSProp: best of 6", "training episodes", "gridworlds"),
}


def run_here(panel, folder):
    """What a folder of results/ says of a panel."""
    if folder is None:
        return "not run"
    if folder in ("figure1", "figure5"):
        config = read_json(f"{folder}/config.json")["config"]
        size = f"{config['num_envs']} environments" if folder == "figure1" else "digits, dense"
        return f"{config['updates']} updates, {size}, {config['seeds']} agents, {config['learning_rate']:g}"
    rows = read_json(f"{folder}/summary.json")
    rows = [row for row in rows if folder == "gridworlds" or row["task"] == panel.split(", ")[1]]

    def of(name):
        values = [row[name] for row in rows]
        return " to ".join(f"{x:,}" for x in sorted({min(values), max(values)}))

    return f"{of('steps')} steps, {of('seeds')} agents, tuned"


def panels(results=RESULTS / "full_size"):
    """A row per panel: the paper's protocol, what was run at other sizes, and how much of full_size.py's pieces is done."""
    config, rows = full_size.Config(results=str(results)), []
    pieces = list(full_size.pieces())
    for panel, (*paper, folder) in PAPER.items():
        states = [full_size.state_of(config, piece) for piece in pieces if piece.panel.startswith(panel)]
        done = f"{states.count('done')} of {len(states)} pieces"
        rows.append([panel, *paper, run_here(panel, folder), done])
    return rows


PANELS = "panel | steps | agents | alpha | returns | run here, smaller | at full size"
CONTENTS = {"panels": lambda: markdown(PANELS, *panels())}
