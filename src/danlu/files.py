"""Writing files so that nothing is ever half written. The floor below every other: no danlu imports."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A new file beside ``path`` to write to, moved over it when the block ends well and removed when it does not.

    A reader sees the old content or the new one, never a part. Parent folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp gives 0600
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: str | Path, content: str | bytes) -> Path:
    """Write ``content`` to ``path`` whole or not at all, and return the path."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(path)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """A new folder beside ``path`` to fill, moved into its place when the block ends well, removed when it does not.

    What was at ``path`` before is set aside first and deleted last, so that it is never mixed with the new files.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    new, old = temporary / "new", temporary / "old"
    new.mkdir()
    try:
        yield new
        if path.exists():
            path.replace(old)
        try:
            new.replace(path)
        except OSError:
            if old.exists():
                old.replace(path)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
