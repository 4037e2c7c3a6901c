"""Where an index lies: in a folder of its own that is swapped whole, so that readers never see half of one."""

from __future__ import annotations

import os
import shutil
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Generations:
    """Folders of which a file names the current one.

    Args:
        folder: holds the generations, and nothing else.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._pointer = folder / "current"

    def current(self) -> Path | None:
        """The folder to read, or None before the first."""
        try:
            return self.folder / self._pointer.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    @contextmanager
    def turn(self, wait: float) -> Iterator[bool]:
        """Write alone, among all threads and processes; who is killed gives the turn back.

        Args:
            wait: seconds for the others to finish.

        Yields:
            Whether it is ours; False after waiting in vain.
        """
        connection = sqlite3.connect(self.folder / "turn.sqlite", timeout=wait, isolation_level=None)
        try:
            ours = True
            try:
                connection.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError as error:
                if "locked" not in str(error):
                    raise
                ours = False
            yield ours
        finally:
            connection.close()

    @contextmanager
    def fresh(self) -> Iterator[Path]:
        """A new folder, which becomes the current one when the block ends well; in one's turn only."""
        held = self.current()
        for leftover in self.folder.iterdir():
            if leftover.is_dir() and leftover != held:
                shutil.rmtree(leftover, ignore_errors=True)
        made = self.folder / uuid.uuid4().hex[:12]
        made.mkdir()
        try:
            yield made
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
        written = self._pointer.with_suffix(".new")
        written.write_text(made.name, encoding="utf-8")
        os.replace(written, self._pointer)
        if held is not None:
            # Who has its files open reads on; who comes too late finds the next generation.
            shutil.rmtree(held, ignore_errors=True)
