"""Copy the lab's results into the documentation: verdicts into the README, figures and a results page into ``docs``.

Run it from the repository root after ``make lab``:

    .venv/bin/python scripts/publish_lab.py

The README's table stays hand-written but for its last column: a row that names a claim in backticks in its third column
gets that claim's verdict. A row whose claim has no result is an error, so that the table cannot quietly go stale.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

BEGIN, END = "<!-- lab:begin", "<!-- lab:end"
MARKS = {"holds": "**holds**", "holds in part": "holds in part", "does not hold here": "*does not hold here*"}


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


def results_page(claims: list[dict[str, str]]) -> str:
    """The results page of the documentation: per claim its statement, verdict, deciding numbers and figure."""
    parts = [
        "# What the lab measured",
        "Every claim below was re-run by `danlu lab run` on a small machine; `danlu lab list` shows them, each takes "
        "a few minutes. A claim that does not hold at this scale is listed like the others.",
    ]
    for claim in claims:
        parts += [
            f"({claim['name']})=\n## {claim['title']}",
            f"{claim['statement']} *({claim['source']})*",
            f"{MARKS[claim['verdict']]}: {claim['summary']}",
        ]
        if claim["figure"]:
            parts.append(f"![{claim['title']}](images/lab/{claim['name']}.png)")
    return "\n\n".join(parts) + "\n"


def publish(lab: Path, root: Path) -> list[str]:
    """Copy everything.

    Args:
        lab: folder with ``results.json`` and ``figures``.
        root: the repository.

    Returns:
        Names of the claims that were published.

    Raises:
        FileNotFoundError: the lab has not run.
    """
    claims = json.loads((lab / "results.json").read_text(encoding="utf-8"))["claims"]
    readme = root / "README.md"
    text = update_readme(readme.read_text(encoding="utf-8"), {claim["name"]: claim["verdict"] for claim in claims})
    images = root / "docs" / "images" / "lab"
    images.mkdir(parents=True, exist_ok=True)
    for claim in claims:
        if claim["figure"]:
            shutil.copyfile(lab / claim["figure"], images / f"{claim['name']}.png")
    (root / "docs" / "measured.md").write_text(results_page(claims), encoding="utf-8")
    readme.write_text(text, encoding="utf-8")
    return [claim["name"] for claim in claims]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Copy the lab's results into README and docs.")
    parser.add_argument("--lab", type=Path, default=Path("build/lab"), help="folder that `danlu lab run` wrote")
    arguments = parser.parse_args()
    names = publish(arguments.lab, Path(__file__).resolve().parents[1])
    print(f"published {len(names)} claims: {', '.join(names)}")


if __name__ == "__main__":
    main()
