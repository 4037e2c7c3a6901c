"""Stacks of methods: checking that they fit together, filling in their options, writing and reading them.

The written form is ``rerope:window=64+logn``: methods joined by ``+``, options by ``:``.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields

from danlu.context.methods import (
    NTK,
    DynamicNTK,
    DynamicPattern,
    DynamicYaRN,
    KeyNorm,
    LeakyReRoPE,
    LogN,
    Method,
    NTKFixed,
    NTKMixed,
    NTKOld,
    PositionInterpolation,
    ReRoPE,
    Stack,
    Window,
    YaRN,
)

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        PositionInterpolation, NTKOld, NTK, NTKFixed, NTKMixed, YaRN, DynamicNTK, DynamicYaRN,
        ReRoPE, LeakyReRoPE, Window, LogN, KeyNorm,
    )
}  # fmt: skip


def check_stack(methods: Sequence[Method]) -> None:
    """Refuse what is not a method, and two methods for one role.

    Raises:
        TypeError: an element is not a method.
        ValueError: two methods change the same thing, or a dynamic pattern meets a fixed frequency scaling.
    """
    seen: dict[str, Method] = {}
    for method in methods:
        if not isinstance(method, Method):
            raise TypeError(f"methods must be danlu methods such as ReRoPE(window=512), got {method!r}")
        if other := seen.get(method.role):
            raise ValueError(f"{other} and {method} both set the {method.role}: keep one of them")
        seen[method.role] = method
    if isinstance(seen.get("pattern"), DynamicPattern) and "frequencies" in seen:
        raise ValueError(f"{seen['pattern']} and {seen['frequencies']} both set the frequencies: keep one of them")


def resolve_stack(methods: Sequence[Method], trained_length: int, target_length: int | None = None) -> Stack:
    """Return the stack with all options filled in for a model and, if given, a length in tokens."""
    check_stack(methods)
    return tuple(method.resolve(trained_length, target_length) for method in methods)


def parse_methods(text: str) -> Stack:
    """Parse ``rerope:window=64+logn``; ``plain`` is the empty stack.

    Raises:
        ValueError: unknown method or option (the nearest known one is named), or an option that is not a value.
    """
    if text.strip() == "plain":
        return ()
    stack = tuple(_parse_method(part.strip()) for part in text.split("+"))
    check_stack(stack)
    return stack


def _parse_method(text: str) -> Method:
    name, *options = text.split(":")
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}{_nearest(name, [*METHODS, 'plain'])}")
    cls = METHODS[name]
    known = [f.name for f in fields(cls)]
    values: dict[str, object] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in known:
            raise ValueError(f"unknown option {key!r} of {name}{_nearest(key, known)}")
        values[key] = _parse_value(f"{name}:{key}", value)
    return cls(**values)


def _parse_value(name: str, text: str) -> object:
    if text in ("True", "true", "False", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise ValueError(f"{name} must be a number, true or false, got {text!r}")


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known) or 'none'}"


def stack_label(methods: Sequence[Method]) -> str:
    """One line for tables: the labels joined by ``+``, ``plain`` for the empty stack."""
    return " + ".join(method.label for method in methods) or "plain"


def default_stacks() -> dict[str, Stack]:
    """Stacks of the standard table, by written form; options are left to ``resolve_stack``."""
    names = ("plain", "window", "pi", "ntk", "ntk-mixed", "yarn", "dynamic-ntk", "rerope", "rerope+logn")
    return {name: parse_methods(name) for name in names}
