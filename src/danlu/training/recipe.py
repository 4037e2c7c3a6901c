"""Recipes: what ``danlu train`` does, as a TOML file that is read into typed and strict tables."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from danlu.training.tables import Optimizer, Recipe, Source, Table
from danlu.training.texts import BUILT_IN

AnyTable = TypeVar("AnyTable", bound=Table)


def load_recipe(path: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: a TOML file; relative files in it are relative to its folder.
        settings: changes such as ``training.steps=100``, values written as in TOML (bare words are text).

    Raises:
        ValueError: not TOML, an unknown key (the nearest known one is named), a value outside its range, or tables that
            contradict each other.
        OSError: the file cannot be read.
    """
    path = Path(path)
    return parse_recipe(read_values(path, settings), folder=path.parent, what=str(path))


def read_values(path: Path, settings: Sequence[str] = ()) -> dict[str, Any]:
    """Plain values of a TOML file, with changes such as ``training.steps=100``.

    Raises:
        ValueError: not TOML, or a change that is none.
        OSError: the file cannot be read.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    for setting in settings:
        set_value(values, setting)
    return values


def parse_recipe(values: Mapping[str, Any], *, folder: Path | None = None, what: str = "recipe") -> Recipe:
    """A recipe from plain values.

    Args:
        values: tables and keys as in the TOML file.
        folder: what relative files are relative to; none keeps them as they are.
        what: its name, for errors.

    Raises:
        ValueError: as for ``load_recipe``.
    """
    recipe = validated(Recipe, values, what)
    return recipe if folder is None else _placed(recipe, folder)


def validated(root: type[AnyTable], values: Mapping[str, Any], what: str) -> AnyTable:
    """Values as a typed and strict table.

    Raises:
        ValueError: every mistake in one sentence that names the key, the value and the nearest known key.
    """
    try:
        return root.model_validate(dict(values))
    except ValidationError as error:
        raise ValueError(f"{what}: {'; '.join(_sentence(item, root) for item in error.errors())}") from error


def _placed(recipe: Recipe, folder: Path) -> Recipe:
    """The same recipe with its relative files made absolute."""

    def source(old: Source | None) -> Source | None:
        if old is None:
            return None
        files = tuple(name if name in BUILT_IN else str(folder.absolute() / name) for name in old.files)
        return old.model_copy(update={"files": files})

    def folder_of(name: str | None) -> str | None:
        return str(folder.absolute() / name) if name is not None and (folder / name).exists() else name

    data = recipe.data.model_copy(
        update={"train": source(recipe.data.train), "validation": source(recipe.data.validation)}
    )
    tasks = tuple(
        task.model_copy(update={"train": source(task.train), "validation": source(task.validation)})
        for task in recipe.tasks
    )
    model = recipe.model.model_copy(update={"path": folder_of(recipe.model.path)})
    tokenizer = recipe.tokenizer.model_copy(update={"path": folder_of(recipe.tokenizer.path)})
    return recipe.model_copy(update={"data": data, "tasks": tasks, "model": model, "tokenizer": tokenizer})


def set_value(values: dict[str, Any], setting: str) -> None:
    """Change one key, named with dots, in place."""
    key, sign, text = setting.partition("=")
    if not sign or not key.strip():
        raise ValueError(f"--set must look like training.steps=100, got {setting!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *tables, last = key.strip().split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise ValueError(f"--set {setting}: {table} is not a table")
    values[last] = value


def _sentence(error: Any, root: type[Table]) -> str:
    """One validation error as a sentence that names the key, the value and the nearest known key."""
    # A discriminated union puts its tag into the path, which the file does not have.
    tags = {str(_tag(kind)) for kind in _tables_in(Optimizer)}
    path = [str(part) for part in error["loc"]]
    shown = ".".join(part for i, part in enumerate(path) if not (i == 1 and path[0] == "optimizer" and part in tags))
    if error["type"] == "extra_forbidden":
        known = _known_keys(path[:-1], root)
        near = get_close_matches(path[-1], known, n=1, cutoff=0.0)
        return f"unknown key {shown!r}; the nearest known one is {near[0]!r} (all: {', '.join(known)})"
    if error["type"] == "missing":
        return f"{shown} is missing"
    if error["type"] == "union_tag_invalid":
        near = get_close_matches(str(error["ctx"]["tag"]), sorted(tags), n=1, cutoff=0.0)
        return (
            f"optimizer.name must be one of {', '.join(sorted(tags))}, got {error['ctx']['tag']!r}; nearest {near[0]!r}"
        )
    if error["type"] == "union_tag_not_found":
        return f"optimizer.name is missing: one of {', '.join(sorted(tags))}"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    got = "" if error["type"] == "value_error" else f", got {json.dumps(error['input'], default=str)}"
    return f"{shown} {message}{got}" if shown else f"{message}{got}"


def _known_keys(path: Sequence[str], root: type[Table]) -> list[str]:
    """Keys of the table at this path of a recipe."""
    tables: list[Any] = [root]
    for part in path:
        if part in tables[0].model_fields:
            tables = _tables_in(tables[0].model_fields[part].annotation)
        else:  # the tag of a union, or the place in a list
            tables = [table for table in tables if _tag(table) == part] or tables
    return list(tables[0].model_fields)


def _tag(table: Any) -> str | None:
    name = table.model_fields.get("name")
    return next(iter(get_args(name.annotation)), None) if name is not None else None


def _tables_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, Table):
        return [annotation]
    return [table for part in get_args(annotation) for table in _tables_in(part)]


def differences(recipe: Any, fingerprint: Mapping[str, Any]) -> list[str]:
    """Dotted keys in which a recipe differs from the fingerprint of another."""
    mine, other = _flat(recipe.fingerprint()), _flat(fingerprint)
    return [key for key in mine | other if mine.get(key) != other.get(key)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
