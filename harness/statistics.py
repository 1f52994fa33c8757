"""What the numbers of many runs say: interquartile means with intervals, the score against the better baseline, tables.

A run that diverged has NaN as its return. It counts as worse than any number: it is trimmed with the worst quarter, and
where more than that quarter diverged, the mean is -inf.
"""

import numpy as np

BASELINES = ("adam", "rmsprop")  # designed by hand; a score is in units of the better one
ENOUGH = 5  # runs, of which a bootstrap says something


def worst_if_diverged(values):
    """The same numbers, with -inf for NaN."""
    values = np.asarray(values, float)
    return np.where(np.isnan(values), -np.inf, values)


def iqm(values, axis=None):
    """Interquartile mean: the mean of the middle half, that of scipy.stats.trim_mean, whose import takes half a second."""
    values = worst_if_diverged(values)
    values = values.ravel() if axis is None else np.moveaxis(values, axis, 0)
    cut = len(values) // 4
    return np.partition(values, (cut, len(values) - cut - 1), axis=0)[cut : len(values) - cut].mean(0)


def interval(values):
    """Interquartile mean of [R] values and its 95% bootstrap interval: (mean, low, high).

    Below ENOUGH values it is their mean, and the interval is from the least to the largest.
    """
    values = worst_if_diverged(values)
    if len(values) < ENOUGH:
        return float(values.mean()), float(values.min()), float(values.max())
    resampled = values[np.random.default_rng(0).integers(len(values), size=(10_000, len(values)))]
    return float(iqm(values)), *_middle(iqm(resampled, axis=1))


def over_meta_runs(learned, units):
    """Mean over tasks of areas in units of a baseline's: its interquartile mean over meta-runs, and a 95% bootstrap interval.

    Meta-runs and the baseline's agents are both drawn again, so the interval holds the noise of the baseline, too.

    Args: learned: {task: [S] area of each meta-run}; units: {task: [R] areas of the baseline's agents}.
    Returns: (mean, low, high).
    """
    random, num = np.random.default_rng(0), len(next(iter(learned.values())))
    which = _drawn(range(num), random).astype(int)  # [2001, S], the same meta-runs on all tasks
    unit = {task: iqm(_drawn(areas, random), axis=1)[:, None] for task, areas in units.items()}
    ratios = [np.asarray(areas)[which] / unit[task] for task, areas in learned.items()]
    mean, *resampled = iqm(np.mean(ratios, axis=0), axis=1)
    return float(mean), *_middle(resampled)


def _drawn(values, random):
    """The [R] values themselves, then 2000 times as many of them at random: [2001, R]."""
    values = np.asarray(values, float)
    return np.concatenate([values[None], values[random.integers(values.size, size=(2000, values.size))]])


def _middle(resampled):
    """The 95% in the middle: (low, high)."""
    return np.quantile(resampled, (0.025, 0.975), method="nearest").tolist()  # nearest: -inf is not interpolated


def shown(mean, low, high, number="{:.3f}".format):
    """A mean and its interval as text; number: makes a text of a number."""
    return f"{number(mean)} [{number(low)}, {number(high)}]"


def scores(areas, tuning_areas, baselines=BASELINES):
    """Each optimizer's area under the return curve, in units of the better baseline's, over tasks and seeds.

    The better baseline of a task is chosen on the tuning seeds, not on the runs that it divides. A baseline that is compared
    with itself is resampled once, so its score is 1.

    Args:
        areas: {(task, optimizer): [R]}, one number per reported run.
        tuning_areas: {(task, optimizer): number}, the mean of the chosen alpha on the tuning seeds.
        baselines: names of optimizers.
    Returns:
        ({optimizer: (interquartile mean over all tasks and runs, low, high)} with 95% bootstrap intervals,
        {task: why it does not count}: a baseline was not run, or is not surely above zero, so that ratios mean nothing)
    """
    tasks, left_out, better = dict.fromkeys(task for task, _ in areas), {}, {}
    for task in tasks:
        if absent := [name for name in baselines if (task, name) not in areas]:
            left_out[task] = f"without {' and '.join(absent)}"
            continue
        best = max(baselines, key=lambda name: worst_if_diverged(tuning_areas[task, name]))
        if not interval(areas[task, best])[1] > 0:
            left_out[task] = f"the return of {best} is not surely above 0"
        else:
            better[task] = best
    random, result = np.random.default_rng(0), {}
    for optimizer in dict.fromkeys(name for _, name in areas):
        ratios = []
        for task in [task for task in better if (task, optimizer) in areas]:
            mine = _drawn(areas[task, optimizer], random)
            unit = mine if optimizer == better[task] else _drawn(areas[task, better[task]], random)
            ratios.append(worst_if_diverged(mine) / iqm(unit, axis=1)[:, None])
        if ratios:
            mean, *resampled = iqm(np.concatenate(ratios, axis=1), axis=1)
            result[optimizer] = (float(mean), *_middle(resampled))
    return result, left_out


def report(results):
    """(rows of summary.json; table, caption and scores as text) of {(task, optimizer): agents.Tuned}."""
    rows = [summarize(*pair, tuned) for pair, tuned in results.items()]
    areas = {pair: tuned.runs.area() for pair, tuned in results.items()}
    found, left_out = scores(areas, {pair: tuned.tuning_area for pair, tuned in results.items()})
    lines = [f"Area under the return curve / that of the better of {' and '.join(BASELINES)}:"] if found else []
    few = rows[0]["seeds"] < ENOUGH  # for which there is no interval
    lines += [f"  {name:31} {f'{score[0]:.3f}' if few else shown(*score)}" for name, score in found.items()]
    lines += [f"  {task} does not count: {why}" for task, why in left_out.items()]
    return rows, "\n".join([table(rows), "", caption(rows[0]["seeds"]), *lines])


def summarize(task, optimizer, tuned):
    """One row of the table as a dict; task and optimizer: names; tuned: agents.Tuned."""
    row = {"task": task, "optimizer": optimizer, "alpha": tuned.alpha}
    row |= {"seeds": len(tuned.runs.returns), "steps": int(tuned.runs.steps[-1])}
    row |= measured("final", tuned.runs.final()) | measured("area", tuned.runs.area())
    return row | {"diverged": int(np.isnan(tuned.runs.area()).sum()), "tuning_area": json_number(tuned.tuning_area)}


def measured(name, values):
    """The entries of a row for one quantity: interval of [R] values, and the values themselves."""
    mean, low, high = map(json_number, interval(values))
    return {name: mean, f"{name}_low": low, f"{name}_high": high, f"{name}_runs": list(map(json_number, values))}


def json_number(x):
    """A float that JSON can hold, to 6 digits; None for what is not finite."""
    return float(f"{x:.6g}") if np.isfinite(x) else None


def caption(num_seeds):
    """What the numbers of a table are."""
    if num_seeds < ENOUGH:
        return f"Mean [least, largest] of {num_seeds} seeds."
    return f"Interquartile mean [95% bootstrap interval] over {num_seeds} seeds."


def table(rows):
    """The rows of summarize as text, numbers as in caption."""
    columns = {"final": "return, last fifth", "area": "return, whole run"}
    number = lambda x: "diverged" if x is None else f"{x:.2f}"
    cell = lambda row, name: shown(row[name], row[f"{name}_low"], row[f"{name}_high"], number)
    lines = [["task", "optimizer", "alpha", *columns.values(), ""]]
    for before, row in zip([rows[0], *rows], rows):
        lines += [[]] if row["task"] != before["task"] else []
        diverged = f"{row['diverged']} of {row['seeds']} diverged" if row["diverged"] else ""
        cells = [cell(row, name) for name in columns]
        lines.append([row["task"], row["optimizer"], f"{row['alpha']:g}", *cells, diverged])
    widths = [2 + max(map(len, column)) for column in zip(*filter(None, lines))]
    return "\n".join("".join(f"{x:{width}}" for x, width in zip(line, widths)).rstrip() for line in lines)
