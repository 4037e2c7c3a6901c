"""Counting memory by tensors, the same on every machine: what the allocator gives out and takes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most bytes of CPU tensors that are alive at once during a call, above those alive before it.

    Args:
        call: what to do; tensors of libraries that allocate by themselves are not seen.

    Returns:
        Bytes.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = top = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        top = max(top, level)
    return top
