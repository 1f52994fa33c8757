"""metrics.csv: one row per meta-step, written as a run goes, kept without gaps over a resume."""

import contextlib
import csv
import itertools
import math
import time

import jax
import numpy as np

from harness import runs

WINDOW = 20  # meta-steps, of which a task may skip half before the run gives up


class Log:
    """metrics.csv and the numbers of the progress line. A row is written when the next one comes: no device waits for it."""

    def __init__(self, path, tasks, reward_scales, step):
        """path: metrics.csv, of which the rows before a checkpoint's step are kept; the first process writes it."""
        self.tasks, self.scales, self.waiting = tasks, reward_scales, []
        columns = ("meta_loss", "episode_return", "reward", "diverged", "skipped")
        names = ["meta_step", "seconds"] + [f"{task}/{name}" for task in tasks for name in columns]
        self.rows = read_rows(path, step) if step else []
        self.start = time.time() - float(self.rows[-1]["seconds"] if self.rows else 0)
        if runs.is_first_process():
            runs.write_csv(path, names, [row.values() for row in self.rows])
        self.path, self.names = path, names

    def add(self, step, metrics):
        """metrics: those of pipeline.meta_step. Raises OSError where the disk is full."""
        self.flush()
        self.waiting = [(step, f"{time.time() - self.start:.2f}", metrics)]

    def flush(self):
        """Writes the row that waits."""
        for step, seconds, metrics in self.waiting:
            row = {"meta_step": step, "seconds": seconds}
            for task, scale, values in zip(self.tasks, self.scales, jax.device_get(metrics)):
                sums, episodes = values["episode_return_sum"], values["episodes"]
                row[f"{task}/meta_loss"] = f"{values['meta_loss']:.6g}"
                row[f"{task}/episode_return"] = f"{sums / episodes / scale:.6g}" if episodes > 0 else ""
                row[f"{task}/reward"] = f"{values['reward'] / scale:.6g}"
                row[f"{task}/diverged"] = int(values["diverged"])
                row[f"{task}/skipped"] = int(values["skipped"])
            self.rows.append(row)
            if runs.is_first_process():
                with open(self.path, "a") as file:
                    csv.DictWriter(file, self.names, lineterminator="\n").writerow(row)
        self.waiting = []

    def recent(self):
        """Means over the last meta-steps, and how often a task was left out in them: for the progress line."""
        last = self.rows[-WINDOW:]
        mean = lambda name: np.mean([float(row[name]) for row in last if row[name] != ""] or [math.nan])
        losses = np.mean([mean(f"{task}/meta_loss") for task in self.tasks])
        returns = {f"return {task}": f"{mean(f'{task}/episode_return'):.2f}" for task in self.tasks}
        skipped = sum(int(row[f"{task}/skipped"]) for task in self.tasks for row in last)
        return {"meta-loss": f"{losses:.3g}"} | returns | ({"skipped": skipped} if skipped else {})

    def lost_tasks(self):
        """The tasks whose meta-gradient was not finite in most of the last WINDOW meta-steps."""
        self.flush()
        last = self.rows[-WINDOW:]
        return [task for task in self.tasks if sum(int(row[f"{task}/skipped"]) for row in last) > len(last) / 2]


def read_rows(path, step):
    """The first `step` rows of a metrics.csv, one per meta-step. Raises runs.UsageError where they are not all there."""
    rows = []
    with contextlib.suppress(OSError), open(path, newline="") as file:
        rows = list(itertools.islice(csv.DictReader(file), step))
    if [row["meta_step"] for row in rows] != list(map(str, range(step))):
        raise runs.UsageError(f"{path} does not hold the {step} meta-steps before the checkpoint")
    return rows
