"""What the numbers of many runs say: interquartile means with intervals, the score against the better baseline, tables.

A run that diverged has NaN as its return. It counts as worse than any number: it is trimmed with the worst quarter, and
where more than that quarter diverged, the mean is -inf.
"""

import numpy as np
import scipy.stats

BASELINES = ("adam", "rmsprop")  # designed by hand; a score is in units of the better one


def worst_if_diverged(values):
    """The same numbers, with -inf for NaN."""
    values = np.asarray(values, float)
    return np.where(np.isnan(values), -np.inf, values)


def iqm(values, axis=None):
    """Interquartile mean: the mean of the middle half."""
    return scipy.stats.trim_mean(worst_if_diverged(values), 0.25, axis=axis)


def interval(values):
    """Interquartile mean of [R] values and its 95% bootstrap interval: (mean, low, high).

    Below five values, of which a bootstrap says too little, the interval is from the least to the largest.
    """
    values = worst_if_diverged(values)
    if len(values) < 5:
        return float(iqm(values)), float(values.min()), float(values.max())
    resampled = values[np.random.default_rng(0).integers(len(values), size=(10_000, len(values)))]
    low, high = np.quantile(
        iqm(resampled, axis=1), (0.025, 0.975), method="nearest"
    )  # nearest: -inf is not interpolated
    return float(iqm(values)), float(low), float(high)


def scores(areas, tuning_areas, baselines=BASELINES, resamples=2000):
    """Each optimizer's area under the return curve, in units of the better baseline's, over tasks and seeds.

    The better baseline of a task is chosen on the tuning seeds, not on the runs that it divides. A baseline that is compared
    with itself is resampled once, so its score is 1.

    Args:
        areas: {(task, optimizer): [R]}, one number per reported run.
        tuning_areas: {(task, optimizer): number}, the mean of the chosen alpha on the tuning seeds.
        baselines: names of optimizers.
        resamples: of the runs of each task and optimizer, the baseline's too.
    Returns:
        ({optimizer: (interquartile mean over all tasks and runs, low, high)} with 95% bootstrap intervals,
        {task: why it does not count}: a baseline was not run, or is not surely above zero, so that ratios mean nothing)
    """
    tasks, left_out, better = dict.fromkeys(task for task, _ in areas), {}, {}
    for task in tasks:
        known = [name for name in baselines if (task, name) in areas]
        best = max(known, key=lambda name: worst_if_diverged(tuning_areas[task, name]), default=None)
        if len(known) < len(baselines):
            left_out[task] = f"without {' and '.join(sorted(set(baselines) - set(known)))}"
        elif not interval(areas[task, best])[1] > 0:
            left_out[task] = f"the return of {best} is not surely above 0"
        else:
            better[task] = best
    random, result = np.random.default_rng(0), {}
    for optimizer in dict.fromkeys(name for _, name in areas):
        ratios = [
            _ratios(areas, task, optimizer, better[task], random, resamples)
            for task in better
            if (task, optimizer) in areas
        ]
        if ratios:
            mean, *resampled = iqm(np.concatenate(ratios, axis=1), axis=1)
            low, high = np.quantile(resampled, (0.025, 0.975), method="nearest")
            result[optimizer] = (float(mean), float(low), float(high))
    return result, left_out


def _ratios(areas, task, optimizer, baseline, random, resamples):
    """Areas in units of the baseline's interquartile mean: [1 + resamples, R], the runs themselves first."""
    draws = {}
    for name in dict.fromkeys((optimizer, baseline)):
        values = np.asarray(areas[task, name], float)
        chosen = random.integers(values.size, size=(resamples, values.size))
        draws[name] = np.concatenate([values[None], values[chosen]])
    return worst_if_diverged(draws[optimizer]) / iqm(draws[baseline], axis=1)[:, None]


def scores_text(scores, left_out, unit):
    """What scores returned, in units of what `unit` names: a heading, a line per optimizer, a line per task left out."""
    lines = [f"Area under the return curve / that of {unit}:"] if scores else []
    lines += [f"  {name:22} {x:.3f} [{low:.3f}, {high:.3f}]" for name, (x, low, high) in scores.items()]
    return "\n".join(lines + [f"  {task} does not count: {why}" for task, why in left_out.items()])


class Comparison:
    """The results of several optimizers on several tasks, as they come: rows of the table, and what scores needs."""

    def __init__(self):
        self.rows, self.areas, self.tuning_areas = [], {}, {}

    def add(self, task, optimizer, tuned, **more):
        """task and optimizer: names; tuned: agents.Tuned; more: further entries of the row, which is returned."""
        self.areas[task, optimizer], self.tuning_areas[task, optimizer] = tuned.runs.area(), tuned.tuning_area
        self.rows.append(summarize(task, optimizer, tuned) | more)
        return self.rows[-1]

    def text(self, num_seeds):
        """Table, caption and scores."""
        unit = f"the better of {' and '.join(BASELINES)}"
        found = scores_text(*scores(self.areas, self.tuning_areas), unit)
        return f"{table(self.rows)}\n\n{caption(num_seeds)}\n{found}"


def summarize(task, optimizer, tuned):
    """One row of the table as a dict; task and optimizer: names; tuned: agents.Tuned."""
    row = {"task": task, "optimizer": optimizer, "alpha": tuned.alpha}
    row |= {"seeds": len(tuned.runs.returns), "steps": int(tuned.runs.steps[-1])}
    row |= measured("final", tuned.runs.final()) | measured("area", tuned.runs.area())
    row["diverged"] = int(np.isnan(tuned.runs.area()).sum())
    return row | {"tuning_area": json_number(tuned.tuning_area)}


def measured(name, values):
    """The entries of a row for one quantity: interval of [R] values, and the values themselves."""
    mean, low, high = map(json_number, interval(values))
    return {name: mean, f"{name}_low": low, f"{name}_high": high, f"{name}_runs": list(map(json_number, values))}


def json_number(x):
    """A float that JSON can hold, to 6 digits; None for what is not finite."""
    return float(f"{x:.6g}") if np.isfinite(x) else None


def caption(num_seeds):
    """What the numbers of a table are."""
    if num_seeds < 5:
        return f"Mean [least, largest] of {num_seeds} seeds."
    return f"Interquartile mean [95% bootstrap interval] over {num_seeds} seeds."


def table(rows):
    """The rows of summarize as text, numbers as in caption."""
    columns = {"final": "return, last fifth", "area": "return, whole run", "deterministic": "return without noise"}
    columns = {name: title for name, title in columns.items() if any(name in row for row in rows)}
    titles = " ".join(f"{title:30}" for title in columns.values())
    lines = [f"{'task':25} {'optimizer':22} {'alpha':>7}   {titles}".rstrip()]
    for before, row in zip([None, *rows], rows):
        if before and before["task"] != row["task"]:
            lines.append("")
        cells = " ".join(f"{_cell(row, name):30}" for name in columns)
        diverged = f"  {row['diverged']} of {row['seeds']} diverged" if row.get("diverged") else ""
        lines.append(f"{row['task']:25} {row['optimizer']:22} {row['alpha']:7g}   {cells}".rstrip() + diverged)
    return "\n".join(lines)


def _cell(row, name):
    if row.get(name) is None:
        return "" if name not in row else f"{'diverged':>9}"
    number = lambda x: "diverged" if x is None else f"{x:.2f}"
    return f"{row[name]:9.2f}  [{number(row[name + '_low'])}, {number(row[name + '_high'])}]"
