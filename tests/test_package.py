"""The package as a whole: what importing it costs, and that its public names exist and agree."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import danlu


def _fresh_python(code: str) -> str:
    """Run code in a new interpreter and return what it prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("statement", ["import danlu", "import danlu, danlu.assets; dir(danlu)"])
def test_import_is_light(statement):
    heavy = ("torch", "transformers", "matplotlib", "numpy", "typer", "rich", "jinja2", "safetensors")
    loaded = _fresh_python(f"{statement}\nimport sys\nprint(*[name for name in {heavy!r} if name in sys.modules])")
    assert loaded == ""


def test_import_is_quick():
    # Processor time, so that a busy machine changes nothing.
    spent = _fresh_python("import time; t = time.process_time(); import danlu; print(time.process_time() - t)")
    assert float(spent) < 0.5


@pytest.mark.parametrize("name", danlu.__all__)
def test_public_name_resolves_and_is_documented(name):
    value = getattr(danlu, name)
    assert value.__doc__ and value.__doc__.strip()
    assert value is getattr(danlu, name)


def test_static_imports_match_the_lazy_table():
    tree = ast.parse(Path(danlu.__file__).read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    static = {
        alias.asname: statement.module
        for statement in guarded.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert static == danlu._HOME_OF


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'rerope_atention'"):
        danlu.rerope_atention  # noqa: B018


def test_dir_lists_the_public_names():
    assert set(danlu.__all__) <= set(dir(danlu))


def test_typed_marker_ships():
    assert (Path(danlu.__file__).parent / "py.typed").is_file()
