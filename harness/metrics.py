"""metrics.csv: one row per meta-step, written as a run goes, kept without gaps over a resume."""

import csv
import math
import os
import time

import jax
import numpy as np

from harness import checkpoints

WINDOW = 20  # meta-steps, of which a task may skip half before the run gives up


class Log:
    """metrics.csv and the numbers of the progress line. Metrics stay on the device until a second has passed."""

    def __init__(self, path, tasks, reward_scales, step):
        """path: metrics.csv, of which the rows before a checkpoint's step are kept; None: nothing is written."""
        self.tasks, self.scales, self.waiting, self.flushed = tasks, reward_scales, [], time.time()
        columns = ("meta_loss", "episode_return", "reward", "diverged", "skipped")
        names = ["meta_step", "seconds"] + [f"{task}/{name}" for task in tasks for name in columns]
        self.rows = read_rows(path, names, step) if path and step else []
        self.skipped = sum(int(row[f"{task}/skipped"]) for task in tasks for row in self.rows)
        self.start = time.time() - float(self.rows[-1]["seconds"] if self.rows else 0)
        partial = path.with_suffix(".partial") if path else os.devnull
        self.file = open(partial, "w", newline="")  # closed with the process
        self.writer = csv.DictWriter(self.file, names)
        self.writer.writeheader()
        self.writer.writerows(self.rows)
        self.file.flush()
        if path:  # from here on it grows under its own name
            os.replace(partial, path)

    def add(self, step, metrics):
        self.waiting.append((step, time.time() - self.start, metrics))
        if time.time() - self.flushed > 1:
            self.flush()

    def flush(self):
        """Writes what waits; raises OSError where the disk is full."""
        for step, seconds, metrics in jax.device_get(self.waiting):
            row = {"meta_step": step, "seconds": f"{seconds:.2f}"}
            for task, scale, values in zip(self.tasks, self.scales, metrics):
                ended = values["episodes"] > 0
                row[f"{task}/meta_loss"] = f"{values['meta_loss']:.6g}"
                row[f"{task}/episode_return"] = (
                    f"{values['episode_return_sum'] / values['episodes'] / scale:.6g}" if ended else ""
                )
                row[f"{task}/reward"] = f"{values['reward'] / scale:.6g}"
                row[f"{task}/diverged"] = int(values["diverged"])
                row[f"{task}/skipped"] = int(values["skipped"])
                self.skipped += row[f"{task}/skipped"]
            self.writer.writerow(row)
            self.rows.append(row)
        self.waiting, self.flushed = [], time.time()
        self.file.flush()

    def recent(self):
        """Means over the last meta-steps, for the progress line."""
        last = self.rows[-20:]
        mean = lambda name: np.mean([float(row[name]) for row in last if row[name] != ""] or [math.nan])
        losses = np.mean([mean(f"{task}/meta_loss") for task in self.tasks])
        returns = {f"return {task}": f"{mean(f'{task}/episode_return'):.2f}" for task in self.tasks}
        return {"meta-loss": f"{losses:.3g}"} | returns | ({"skipped": self.skipped} if self.skipped else {})

    def lost_tasks(self):
        """The tasks whose meta-gradient was not finite in most of the last WINDOW meta-steps."""
        self.flush()
        last = self.rows[-WINDOW:]
        return [task for task in self.tasks if sum(int(row[f"{task}/skipped"]) for row in last) > len(last) / 2]


def read_rows(path, names, step):
    """The first `step` rows of a metrics.csv, one per meta-step. Raises checkpoints.Damaged where they are not all there."""
    try:
        with open(path, newline="") as file:
            rows = [row for _, row in zip(range(step), csv.DictReader(file))]
        numbers = [[float(row[name] or "nan") for name in names] for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise checkpoints.Damaged(f"{path} cannot be read ({error})") from None
    if [values[0] for values in numbers] != list(range(step)):
        raise checkpoints.Damaged(f"{path} does not hold the {step} meta-steps before the checkpoint")
    return rows
