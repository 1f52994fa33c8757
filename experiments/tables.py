"""Experiment: the tables and numbers of README.md, docs/ and weights/README.md, computed from the files in results/.

    python -m experiments.tables            # writes them into the texts
    python -m experiments.tables --check    # changes nothing: a line per difference, and status 1 if there is one

A text holds <!-- NAME -->content<!-- end -->, within a line or around a table; each module's CONTENTS
say how a content is computed.
"""

import itertools
import pathlib
import re
import sys
from dataclasses import dataclass

from experiments import (
    contents,
    drift,
    headroom,
    meta_seeds,
    pipeline_drift,
    pipeline_rl,
    pipeline_toy,
    protocols,
    six_worlds,
)
from harness import runs

CONTENTS = {}
for module in (contents, drift, headroom, meta_seeds, pipeline_drift, pipeline_rl, pipeline_toy, protocols, six_worlds):
    CONTENTS |= module.CONTENTS
MARKER = re.compile(r"<!-- (\w+) -->")


@dataclass(frozen=True)
class Config:
    check: bool = False  # compare only
    texts: str = str(runs.ROOT)  # folder of README.md, docs/ and weights/


def rewritten(text, where):
    """The text with all contents computed again, and [(name, written, computed)] of those that differ.

    Raises runs.UsageError, which names the text by `where`: an unknown marker, one that is never closed, a missing result.
    """
    parts, differences, at, markers = [], [], 0, list(MARKER.finditer(text))
    for opened, closed in itertools.zip_longest(markers[::2], markers[1::2]):
        place = f"{where}, line {text[: opened.start()].count(chr(10)) + 1}: marker {opened[1]}"
        if opened[1] not in CONTENTS:
            raise runs.UsageError(f"{place} is unknown; known: {', '.join(CONTENTS)}")
        if closed is None or closed[1] != "end":
            raise runs.UsageError(f"{place} is never closed; put <!-- end --> behind its content")
        try:
            content = CONTENTS[opened[1]]()
        except FileNotFoundError as error:
            raise runs.UsageError(f"{place} needs {error.filename}, which does not exist") from None
        if "\n" in content:
            content = f"\n\n{content}\n\n"  # Markdown wants an empty line between a comment and a table
        elif not text[: opened.start()].rpartition("\n")[2].strip():
            raise runs.UsageError(f"{place} begins a line, which Markdown takes for HTML; put a word before it")
        written = text[opened.end() : closed.start()]
        differences += [(opened[1], written, content)] if written != content else []
        parts, at = [*parts, text[at : opened.end()], content], closed.start()
    return "".join([*parts, text[at:]]), differences


def main(argv=None):
    config = runs.parse(Config, {}, __doc__, argv)
    root, different = pathlib.Path(config.texts), False
    texts = [root / "README.md", *sorted(root.glob("docs/*.md")), root / "weights/README.md"]
    for path in [path for path in texts if path.exists()]:
        new, differences = rewritten(path.read_text(), path.relative_to(root))
        for name, *both in differences:
            lines = itertools.zip_longest(*(content.strip().split("\n") for content in both), fillvalue="nothing")
            written, computed = next((pair for pair in lines if pair[0] != pair[1]), ("empty lines", "others"))
            print(f"{path.relative_to(root)}: {name}: written {written}, computed {computed}")
        different |= bool(differences)
        if differences and not config.check:
            with runs.whole_file(path, "w") as file:
                file.write(new)
    if config.check and different:
        sys.exit(1)


if __name__ == "__main__":
    runs.run(main)
