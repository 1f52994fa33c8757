"""The texts and the results that they report: experiments/tables.py and the contents of the experiments."""

import pathlib
import re
import shutil

import numpy as np
import pytest

import meta_train
from experiments import arms, contents, meta_seeds, protocols, tables
from harness import agents, runs, statistics

ROOT = pathlib.Path(__file__).resolve().parents[1]
DIGIT_IN_CONTENT = re.compile(r"(<!-- (?!end)\w+ -->[^<]*?)(\d)(?=[^<]*<!-- end -->)", re.DOTALL)


@pytest.fixture
def copies(tmp_path):
    """A folder with copies of the texts under docs/ and weights/."""
    for folder in ("docs", "weights"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.npz"))
    return tmp_path


def check(folder):
    tables.main(["--check", "--texts", str(folder)])


def test_the_texts_say_what_the_results_say():
    check(ROOT)


@pytest.mark.parametrize("name", ["docs/results.md", "docs/gated_adam.md", "docs/speed.md"])
def test_a_changed_digit_is_found_and_written_back(copies, name, capsys):
    text = (copies / name).read_text()
    changed = DIGIT_IN_CONTENT.sub(lambda match: match[1] + str((int(match[2]) + 1) % 10), text, count=1)
    assert changed != text
    (copies / name).write_text(changed)
    with pytest.raises(SystemExit, match="1"):
        check(copies)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{name}: ") and "written" in line and "computed" in line
    tables.main(["--texts", str(copies)])
    assert (copies / name).read_text() == text
    check(copies)


@pytest.mark.parametrize(
    "text, message",
    [
        ("It is <!-- nonsense -->1<!-- end -->.", "nonsense is unknown"),
        ("It is <!-- gated_six -->1.", "gated_six is never closed"),
        ("It is <!-- gated_six -->1, <!-- gated_four_robots -->2<!-- end -->.", "gated_six is never closed"),
        ("It is\n<!-- gated_six -->1<!-- end -->.", "gated_six begins a line"),
    ],
)
def test_markers_that_cannot_be_filled_are_refused(text, message):
    with pytest.raises(runs.UsageError, match=message):
        tables.rewritten(text, "README.md")


def test_a_missing_result_matters_only_where_a_marker_asks_for_it(monkeypatch, tmp_path):
    monkeypatch.setattr(contents, "RESULTS", tmp_path)
    contents.read_json.cache_clear()
    assert tables.rewritten("No numbers. <!-- a comment of two words -->", "README.md")[1] == []
    with pytest.raises(runs.UsageError, match="default_score needs .*summary.json, which does not exist"):
        tables.rewritten("It is <!-- default_score -->1<!-- end -->.", "README.md")


def test_three_seeds_show_their_range_or_no_interval():
    row = {"seeds": 3, "area": 2.0, "area_low": 1.9, "area_high": 2.1}
    assert contents.cell(row, "area") == "2.00"
    assert contents.cell(row | {"area_runs": [1.0, 2.0, 3.0]}, "area") == "2.00 [1.00, 3.00]"


def test_a_score_does_not_depend_on_the_other_optimizers_of_a_table():
    random = np.random.default_rng(0)
    row = lambda: {"area_runs": random.normal(3.0, 0.5, 10)}
    rows = {(task, name): row() for task in "ab" for name in ("sign_descent", "adam", "optim4rl", "rmsprop")}
    alone = {pair: row for pair, row in rows.items() if pair[1] != "sign_descent"}
    assert contents.score(rows, "ab", "optim4rl") == contents.score(alone, "ab", "optim4rl")


@pytest.mark.parametrize("variants", [True, False])
def test_meta_seeds_test_every_optimizer_on_every_task(monkeypatch, tmp_path, variants):
    monkeypatch.setattr(arms, "learned", lambda config: agents.Optimizer("optim4rl", {"x": float(config.seed)}))
    monkeypatch.setattr(arms, "test", lambda folder, task, label, optimizer, *args: (label, optimizer.meta_params))
    results = meta_seeds.run_all(meta_seeds.Config(seeds=(1, 2), variants=variants), tmp_path, None)
    labels = {"sign_descent", "adam", "rmsprop", "untrained_optim4rl", "meta-seed 1", "meta-seed 2", meta_seeds.MEAN}
    labels |= set(agents.VARIANTS) if variants else set()
    assert set(results) == {(task, label) for task in meta_train.Config.test_tasks for label in labels}
    assert all(result[0] == label for (_, label), result in results.items())
    mean_weights = {result[1]["x"] for (_, label), result in results.items() if label == meta_seeds.MEAN}
    assert mean_weights == {1.5}  # of meta-seeds 1 and 2


def test_meta_seeds_are_read_as_they_are_written(monkeypatch):
    class Result:
        alpha, tuning_area = 0.1, 1.0

        def __init__(self, area):
            self.runs = type("Runs", (), {"area": lambda self: np.full(4, area)})()

    labels = {"adam": 2.0, "rmsprop": 1.0, "rmsprop_0.99": 2.4, "untrained_optim4rl": 1.8}
    areas = {("world", label): Result(area) for label, area in labels.items()}
    areas |= {("world", f"meta-seed {seed}"): Result(2.0 + seed / 10) for seed in range(5)}
    areas["world", meta_seeds.MEAN] = Result(2.6)
    summary = meta_seeds.summarize(areas)
    monkeypatch.setattr(meta_seeds, "kept", lambda folder: (summary, meta_seeds.areas_of(areas)))
    of_seeds = meta_seeds.contents_of("meta_seeds")
    mean, low, high = statistics.over_meta_runs({"world": [2.0, 2.1, 2.2, 2.3, 2.4]}, {"world": [2.0]})  # adam's
    assert of_seeds["score"]() == f"{mean:.2f} [{low:.2f}, {high:.2f}]"
    assert of_seeds["above"]() == "4 of 5"
    assert "| untrained_optim4rl | 0.90 | 0.90 |" in of_seeds["table"]()
    assert f"| {meta_seeds.MEAN} | 1.30 | 1.30 |" in of_seeds["table"]()
    assert of_seeds["best_variant"]() == "rmsprop_0.99 1.20"


def test_a_panel_counts_the_pieces_that_were_run_at_full_size(tmp_path):
    of_panel = lambda: {row[0]: row[-1] for row in protocols.panels(tmp_path)}
    assert of_panel()["Figure 1"] == "0 of 1 pieces"
    (tmp_path / "figure1").mkdir()
    (tmp_path / "figure1/figure1.json").write_text("{}")
    assert of_panel()["Figure 1"] == "1 of 1 pieces" and of_panel()["Figure 5"] == "0 of 1 pieces"


def test_every_content_stands_in_a_text():
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "weights/README.md"]
    written = set(tables.MARKER.findall("".join(text.read_text() for text in texts)))
    assert written - {"end"} == set(tables.CONTENTS)
