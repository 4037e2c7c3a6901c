"""Says why the first call on a machine takes seconds: the loops are being compiled."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger("danlu.kernels")


def announce(loop: Any) -> None:
    """Log a line when a loop is about to be compiled: it is neither loaded nor kept from an earlier process.

    Args:
        loop: a function decorated with ``numba.njit(cache=True)``.
    """
    if loop.signatures:  # already loaded
        return
    function = loop.py_func
    folder = Path(loop.stats.cache_path)
    pattern = f"{function.__module__.rpartition('.')[2]}.{function.__name__}-{function.__code__.co_firstlineno}.*.nbi"
    if next(folder.glob(pattern), None) is None:
        logger.warning("compiling %s for this machine, some seconds, once; it is kept in %s", function.__name__, folder)
