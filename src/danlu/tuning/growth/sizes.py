"""The sizes of a model, the sizes it can grow to, and the order of old and new blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from danlu.hosts.architecture import Architecture
from danlu.tuning.growth.maps import copies


@dataclass(frozen=True)
class Sizes:
    """Sizes that can grow, by the names that configurations use."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_hidden_layers: int


def sizes_of(arch: Architecture) -> Sizes:
    """Read the sizes off the matrices, which must be alike in all blocks.

    Raises:
        ValueError: they are not.
    """
    found = {
        Sizes(
            hidden_size=block.attention.query.weight.shape[1],
            intermediate_size=block.feed_forward.up.weight.shape[0],
            num_attention_heads=block.attention.heads,
            num_key_value_heads=block.attention.kv_heads,
            head_dim=block.attention.head_dim,
            num_hidden_layers=len(arch.blocks),
        )
        for block in arch.blocks
    }
    if len(found) > 1:
        raise ValueError(f"model must have blocks of one size, got {len(found)} different ones")
    return found.pop()


def resolve_sizes(arch: Architecture, wanted: dict[str, int | None]) -> Sizes:
    """Complete and check what was asked for.

    Args:
        arch: the model.
        wanted: sizes by the names of ``Sizes``; None keeps a size, or derives it where the host derives it.

    Returns:
        All sizes of the grown model.

    Raises:
        TypeError: a size that is no integer.
        ValueError: a size below the model's, sizes that do not divide, or nothing to grow.
    """
    old = sizes_of(arch)
    before = asdict(old)
    given = {name: size for name, size in wanted.items() if size is not None}
    for name, size in given.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be an integer, got {size!r}")
        if size < before[name]:
            raise ValueError(
                f"{name} must be at least {before[name]}, the model's own, got {size}: growth never shrinks"
            )
    new = Sizes(**{**before, **given})
    new = _coupled(new, given, old, arch.config.model_type) if arch.family != "llama" else new
    if new == old:
        raise ValueError(f"nothing grows: pass at least one size above the model's, which are {_words(before)}")
    heads, kv_heads = new.num_attention_heads, new.num_key_value_heads
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads must be a multiple of num_key_value_heads, got {heads} and {kv_heads}")
    group = old.num_attention_heads // old.num_key_value_heads
    if heads // kv_heads < group:
        raise ValueError(
            f"each key-value head must keep its {group} query heads, got num_attention_heads={heads} with "
            f"num_key_value_heads={kv_heads}: pass num_attention_heads={group * kv_heads} or more"
        )
    return new


def layer_sources(old: int, new: int, placement: str | Sequence[int]) -> list[tuple[int, bool]]:
    """For each block of the grown stack, the block that it copies and whether it is new.

    Args:
        old: blocks now.
        new: blocks wanted.
        placement: ``even`` (new blocks after each old one in turn), ``end``, or the places of the new blocks in the
            grown stack, counted from 0. A new block copies the one before it, the first one the one after it.

    Raises:
        ValueError: another word, or places that are not ``new - old`` different ones in 0..new-1.
    """
    if placement == "even":
        sources: list[int] = copies(old, new).tolist()
        return [(source, i > 0 and sources[i - 1] == source) for i, source in enumerate(sources)]
    if placement == "end":
        return [(min(i, old - 1), i >= old) for i in range(new)]
    if isinstance(placement, str):
        raise ValueError(f"placement must be 'even', 'end' or the places of the new blocks, got {placement!r}")
    places = set(placement)
    if len(places) != new - old or len(places) != len(placement) or not places <= set(range(new)):
        raise ValueError(f"placement must be {new - old} different places in 0..{new - 1}, got {list(placement)}")
    result = []
    kept = -1
    for i in range(new):
        kept += i not in places
        result.append((max(kept, 0), i in places))
    return result


def rope_type(config: Any) -> str:
    """The kinds of RoPE that a configuration names, joined by commas; ``default`` where it names none."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value["rope_type"] for value in rope.values() if isinstance(value, dict) and "rope_type" in value]
    return ", ".join(sorted({*nested, *([rope["rope_type"]] if "rope_type" in rope else [])})) or "default"


def _coupled(new: Sizes, given: dict[str, int], old: Sizes, kind: str) -> Sizes:
    """Hosts of the BERT and GPT-2 kind have one key head per query head and hidden_size = heads * head_dim."""
    hidden, heads = new.hidden_size, new.num_attention_heads
    rule = f"a {kind} model has hidden_size = num_attention_heads * head_dim"
    if given.get("num_key_value_heads", heads) != heads:
        raise ValueError(f"num_key_value_heads must be num_attention_heads in a {kind} model, got {given}")
    if hidden % heads:
        raise ValueError(f"hidden_size must be a multiple of num_attention_heads={heads}, got {hidden}: {rule}")
    head_dim = hidden // heads
    if head_dim < old.head_dim or given.get("head_dim", head_dim) != head_dim:
        needed = heads * max(old.head_dim, given.get("head_dim", 0))
        raise ValueError(f"{_words(given)} would need hidden_size={needed}: {rule}, now with head_dim {old.head_dim}")
    return Sizes(**{**asdict(new), "num_key_value_heads": heads, "head_dim": head_dim})


def _words(sizes: dict[str, Any]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())
