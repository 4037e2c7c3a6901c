"""The text that danlu-nano was trained and is evaluated on: the standard library of the running Python."""

from __future__ import annotations

import sysconfig
from pathlib import Path

#: Modules that danlu-nano has never seen. Their tests (``test_<name>``) are held out with them.
HELD_OUT = (
    "_pydecimal",
    "argparse",
    "difflib",
    "doctest",
    "imaplib",
    "mailbox",
    "optparse",
    "pickle",
    "statistics",
    "tarfile",
    "turtle",
    "typing",
)


def _standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _is_held_out(path: Path) -> bool:
    names = {part.removesuffix(".py").removeprefix("test_").strip("_") for part in path.parts}
    return any(name.strip("_").removeprefix("py") in names or name.strip("_") in names for name in HELD_OUT)


def training_files() -> list[Path]:
    """Source files for training, sorted by path: the standard library and its tests, less the held-out modules."""
    root = _standard_library()
    paths = (path for path in root.rglob("*.py") if "site-packages" not in path.parts)
    return sorted(path for path in paths if not _is_held_out(path.relative_to(root)))


def held_out_files() -> list[Path]:
    """Paths of the held-out modules that the running Python has, in the order of ``HELD_OUT``.

    Raises:
        FileNotFoundError: this Python ships no library source (a zipped or stripped standard library).
    """
    found = [path for name in HELD_OUT if (path := _standard_library() / f"{name}.py").is_file()]
    if not found:
        raise FileNotFoundError(
            f"no library source under {_standard_library()}: this Python is zipped or stripped; "
            "pass your own text with --text FILE"
        )
    return found


def held_out_text() -> str:
    """The held-out modules, one after another."""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in held_out_files())
