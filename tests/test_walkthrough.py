"""walkthrough.ipynb: all its cells run with short loops, its checks tell solutions from stubs, and its kept outputs are whole."""

import json
import re

import pytest
from programs import ROOT

NOTEBOOK = json.loads((ROOT / "walkthrough.ipynb").read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
TEXT = "\n".join("".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown")
SOLUTIONS = re.findall(r"<summary>Solution</summary>.*?```python\n(.*?)```.*?</details>", TEXT, re.S)
CHECKS = [f"check_{i}" for i in range(1, 6)]


def source(cell):
    """The cell's program, without Jupyter's own lines."""
    return "".join(line for line in cell["source"] if not line.startswith("%"))


def run_cells():
    """What the cells define, executed in order in one namespace."""
    names = {"__name__": "__main__"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUICK", "1")
        patch.setenv("TQDM_DISABLE", "1")  # the first cell sets it too; so it is put back
        patch.chdir(ROOT)
        for i, cell in enumerate(CODE):
            exec(compile(source(cell), f"code cell {i}", "exec"), names)
            names["plt"].close("all")
    return names


def test_all_cells_run_and_every_check_refuses_its_stub_and_accepts_its_solution():
    """One test, so that two processes that share the tests do not both run the cells."""
    executed = run_cells()
    assert len(SOLUTIONS) == len(CHECKS)
    for check in CHECKS:
        with pytest.raises(AssertionError):
            executed[check]()
    solved = dict(executed)
    for solution, check in zip(SOLUTIONS, CHECKS):
        exec(solution, solved)
        # A function keeps the names that it was defined among: the check is defined again beside the solution.
        exec(next(source(cell) for cell in CODE if f"def {check}()" in source(cell)), solved)
        solved[check]()


def test_the_kept_outputs_are_those_of_one_whole_run():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    assert pictures == sum(source(cell).count("plt.subplots(") + source(cell).count("plt.figure(") for cell in CODE)


def test_the_file_is_small_and_names_no_folder_of_a_machine():
    file = (ROOT / "walkthrough.ipynb").read_text()
    assert len(file) < 1.5e6
    assert not re.search(r"(?<![\w.:/])/(home|Users|root|tmp|work|usr|opt|var|mnt)/|[A-Z]:\\\\", file)


def test_its_links_lead_to_files():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", TEXT):
        assert (ROOT / target).exists(), target
