"""Experiment: what the texts say of whole meta-runs, from what meta_seeds.py and pipeline_*.py wrote; see tables.py."""

import numpy as np

from experiments.contents import markdown, number, read_csv, read_json, span
from harness import statistics


def pipeline_toy():
    """A line per estimator and kind of resets, a column per meta learning rate; a loss of 100 and more is one that exploded."""
    scores = {}
    for row in read_csv("pipeline_toy/results.csv"):
        setting = row["estimator"], row["resets"]
        scores.setdefault(setting, {}).setdefault(row["meta_learning_rate"], []).append(float(row["score"]))
    shown = lambda x: number(x) if x < 100 else "> 100"
    of_rate = lambda values: "{} [{}, {}]".format(*map(shown, statistics.interval(values)))
    lines = [[*setting, *map(of_rate, rates.values())] for setting, rates in scores.items()]
    return markdown(f"meta-gradient by | resets | {' | '.join(scores['gradient', 'none'])}", *lines)


def pipeline_rl_scores():
    """{(group or optimizer, resets or ""): [score of each meta-seed]}"""
    scores = {}
    for row in read_csv("pipeline_rl/results.csv"):
        arm = tuple(row["arm"].rsplit("-", 1)) if "-" in row["arm"] else (row["arm"], "")
        scores.setdefault(arm, []).append(float(row["score"]))
    return scores


def pipeline_rl():
    """A line per way to learn, a column per kind of resets, and the ratio of the first two, paired by meta-seed."""
    scores, lines = pipeline_rl_scores(), []
    shown = lambda values: span(*statistics.interval(values)) if len(values) else ""
    for group in dict.fromkeys(group for group, _ in scores):
        staggered, synchronised, none = (scores.get((group, r), []) for r in ("staggered", "synchronised", "none"))
        if synchronised:
            lines.append([group, *map(shown, (staggered, synchronised, none)), pipeline_rl_ratio(group)])
        else:
            lines.append([f"{group}, not learned here", shown(scores[group, ""]), "", "", ""])
    return markdown("learned by | staggered | synchronised | none | staggered / synchronised", *lines)


def pipeline_rl_score(group, resets):
    return span(*statistics.interval(pipeline_rl_scores()[group, resets]))


def pipeline_rl_ratio(group):
    scores = pipeline_rl_scores()
    return span(*statistics.interval(np.divide(scores[group, "staggered"], scores[group, "synchronised"])))


def pipeline_drift(resets):
    return span(*statistics.interval([float(row[resets]) for row in read_csv("pipeline_drift/results.csv")]))


def meta_seeds(folder):
    """{name: function} of what experiments/meta_seeds.py wrote into a folder."""
    read = lambda: read_json(f"{folder}/summary.json")
    mean = lambda label: float(np.mean(list(read()["ratios"][label].values())))
    over = lambda name: span(*(read()["over_meta_seeds"][name][f"score{end}"] for end in ("", "_low", "_high")))
    others = lambda: [label for label in read()["ratios"] if not label.startswith("meta-seed")]

    def above():
        return f"{read()['above_1']['all tasks']} of {len(read()['over_meta_seeds']['all tasks']['score_runs'])}"

    def unseen():
        seeds = [label.split()[1] for label in read()["ratios"] if label.startswith("meta-seed")]
        seen = read_json(f"{folder}/meta_runs/{seeds[0]}/config.json")["config"]["tasks"]
        return ", ".join(f"{over(task)} on {task}" for task in read()["better_baseline"] if task not in seen)

    def best_variant():
        best = max((label for label in others() if not label.startswith("untrained")), key=mean)
        return f"{best} {number(mean(best))}"

    def single():
        """What one meta-run prints: 95% of the scores of all meta-runs, their and the baselines' agents drawn again."""
        areas = {}
        for row in read_csv(f"{folder}/agents.csv"):
            areas.setdefault((row["task"], row["optimizer"]), []).append(float(row["area"]))
        random, better, drawn = np.random.default_rng(0), read()["better_baseline"], []
        draw = lambda pair: random.choice(areas[pair], len(areas[pair]))
        for label in [label for label in read()["ratios"] if label.startswith("meta-seed")] * 200:
            ratios = [draw((task, label)) / statistics.iqm(draw((task, name))) for task, name in better.items()]
            drawn.append(statistics.iqm(np.concatenate(ratios)))
        low, high = np.quantile(drawn, (0.025, 0.975))
        return f"{number(low)} to {number(high)}"

    def table():
        columns = ["all tasks", *read()["better_baseline"]]
        lines = [[x, *map(number, (mean(x), *read()["ratios"][x].values()))] for x in others()]
        return markdown(f"optimizer | {' | '.join(columns)}", ["optim4rl, over meta-runs", *map(over, columns)], *lines)

    untrained = lambda: number(next(mean(label) for label in others() if label.startswith("untrained")))
    functions = dict(score=lambda: over("all tasks"), above=above, unseen=unseen, untrained=untrained)
    return functions | dict(best_variant=best_variant, single=single, table=table)


CONTENTS = {
    "pipeline_toy": pipeline_toy,
    "pipeline_rl": pipeline_rl,
    "rl_nres": lambda: pipeline_rl_score("nres_falling", "staggered"),
    "rl_nres_none": lambda: pipeline_rl_score("nres_falling", "none"),
    "rl_nres_ratio": lambda: pipeline_rl_ratio("nres_falling"),
    "rl_nres_constant_ratio": lambda: pipeline_rl_ratio("nres_constant"),
    "rl_gradient": lambda: pipeline_rl_score("gradient_constant", "staggered"),
    "rl_gradient_none": lambda: pipeline_rl_score("gradient_constant", "none"),
    "rl_gradient_ratio": lambda: pipeline_rl_ratio("gradient_constant"),
    "rl_gradient_32_ratio": lambda: pipeline_rl_ratio("gradient_constant_32"),
    "pipeline_drift_staggered": lambda: pipeline_drift("staggered"),
    "pipeline_drift_synchronised": lambda: pipeline_drift("synchronised"),
    **{f"default_{name}": content for name, content in meta_seeds("meta_seeds").items()},
}
