"""A progress bar for what turns out to be slow. A floor below every other: no danlu imports."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def watched(values: Sequence[T], label: str) -> Iterator[T]:
    """Pass values through; on a terminal, draw a bar once two seconds have gone by.

    Args:
        values: what to loop over.
        label: text beside the bar.
    """
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task(label, total=len(values))
    began, drawn = time.monotonic(), False
    try:
        for done, value in enumerate(values):
            if not drawn and bar.console.is_terminal and time.monotonic() - began > 2:
                bar.start()
                drawn = True
            if drawn:
                bar.update(task, completed=done)
            yield value
    finally:
        if drawn:
            bar.stop()
