"""Text that is on every machine: the source of the running Python's library, and the prose of documentation strings."""

from __future__ import annotations

import ast
import importlib.util
import sysconfig
import warnings
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


def prose_files() -> tuple[list[Path], list[Path]]:
    """Modules whose documentation strings are read as English prose, to train on and, every eighth, held out.

    The standard library and packages that danlu needs, mixed in a fixed order.
    """
    files = [path for path in training_files() if "test" not in path.parts]
    for package in ("numpy", "torch", "matplotlib", "transformers"):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            files += sorted(Path(spec.submodule_search_locations[0]).rglob("*.py"))
    train: list[tuple[int, Path]] = []
    test: list[tuple[int, Path]] = []
    for i, path in enumerate(files):
        (train if i % 8 else test).append((i * 7919 % len(files), path))
    return [path for _, path in sorted(train)], [path for _, path in sorted(test)]


def docstrings(path: Path) -> str:
    """The documentation strings of a module that have more than one word; empty where it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's strings
            tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return "".join(f"{text}\n\n" for text in found if text and " " in text)
