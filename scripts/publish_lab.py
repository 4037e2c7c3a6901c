"""Copy the lab's results into the documentation: verdicts into the README, figures and a results page into ``docs``.

Run it from the repository root after ``make lab``:

    .venv/bin/python scripts/publish_lab.py

The README's table stays hand-written but for its last column: a row that names a claim in backticks in its third column
gets that claim's verdict. A row whose claim has no result is an error, so that the table cannot quietly go stale.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

BEGIN, END = "<!-- lab:begin", "<!-- lab:end"
MARKS = {"holds": "**holds**", "holds in part": "holds in part", "does not hold here": "*does not hold here*"}


HEAD = (
    "# What the lab measured\n\nEvery claim below was re-run by `danlu lab run` on a small machine; `danlu lab list` "
    "shows them, each takes a few minutes. A claim that does not hold at this scale is listed like the others.\n"
)


def update_readme(text: str, verdicts: dict[str, str]) -> str:
    """Fill the last column of the table between the markers.

    Args:
        text: the README.
        verdicts: claim name to verdict.

    Returns:
        The README with the verdicts filled in.

    Raises:
        ValueError: a marker is missing, or a row names a claim without a result.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(f"README must hold the lines {BEGIN} ... and {END} ...; put them around the table of methods")
    head, rest = text.split(BEGIN, 1)
    table, tail = rest.split(END, 1)
    lines = []
    for line in table.split("\n"):
        cells = line.split("|")
        names = [name.strip().strip("`") for name in cells[3].split(",")] if line.startswith("| ") else []
        if names and cells[3].strip().startswith("`"):
            missing = [name for name in names if name not in verdicts]
            if missing:
                raise ValueError(f"no result for {', '.join(missing)}; run: danlu lab run {' '.join(missing)}")
            cells[4] = " " + ", ".join(MARKS[verdicts[name]] for name in names) + " "
        lines.append("|".join(cells))
    return head + BEGIN + "\n".join(lines) + END + tail


def section(claim: dict[str, str]) -> str:
    """One claim on the results page: statement, verdict, deciding numbers and figure."""
    parts = [
        f"({claim['name']})=\n## {claim['title']}",
        f"{claim['statement']} *({claim['source']})*",
        f"{MARKS[claim['verdict']]}: {claim['summary']}",
    ]
    if claim["figure"]:
        parts.append(f"![{claim['title']}](images/lab/{claim['name']}.png)")
    return "\n\n".join(parts) + "\n"


def published(page: str) -> tuple[dict[str, str], dict[str, str]]:
    """Sections and verdicts of a results page by claim."""
    found = re.split(r"^\((\S+)\)=\n", page, flags=re.MULTILINE)[1:]
    sections = {name: f"({name})=\n{text.rstrip()}\n" for name, text in zip(found[::2], found[1::2], strict=True)}
    verdicts = {}
    for name, text in sections.items():
        for verdict, mark in MARKS.items():
            if re.search(rf"^{re.escape(mark)}: ", text, flags=re.MULTILINE):
                verdicts[name] = verdict
    return sections, verdicts


def publish(lab: Path, root: Path, order: list[str]) -> list[str]:
    """Copy everything; claims that were not run keep what was published before.

    Args:
        lab: folder with ``results.json`` and ``figures``.
        root: the repository.
        order: all claims, in the order of the page; others are dropped from it.

    Returns:
        Names of the claims that were published.

    Raises:
        FileNotFoundError: the lab has not run.
    """
    claims = json.loads((lab / "results.json").read_text(encoding="utf-8"))["claims"]
    readme, results = root / "README.md", root / "docs" / "measured.md"
    sections, verdicts = published(results.read_text(encoding="utf-8") if results.is_file() else "")
    sections |= {claim["name"]: section(claim) for claim in claims}
    verdicts |= {claim["name"]: claim["verdict"] for claim in claims}
    text = update_readme(readme.read_text(encoding="utf-8"), verdicts)
    images = root / "docs" / "images" / "lab"
    images.mkdir(parents=True, exist_ok=True)
    for claim in claims:
        if claim["figure"]:
            shutil.copyfile(lab / claim["figure"], images / f"{claim['name']}.png")
    results.write_text("\n".join([HEAD, *(sections[name] for name in order if name in sections)]), encoding="utf-8")
    readme.write_text(text, encoding="utf-8")
    return [claim["name"] for claim in claims]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Copy the lab's results into README and docs.")
    parser.add_argument("--lab", type=Path, default=Path("build/lab"), help="folder that `danlu lab run` wrote")
    arguments = parser.parse_args()
    from danlu.lab import claims

    names = publish(arguments.lab, Path(__file__).resolve().parents[1], list(claims()))
    print(f"published {len(names)} claims: {', '.join(names)}")


if __name__ == "__main__":
    main()
