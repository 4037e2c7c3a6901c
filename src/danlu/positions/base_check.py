"""Check of a host model's rotary base against a length, before a long run is paid for."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .bound import first_negative, recommended_base
from .export import host_frequencies, rope_tables, rotated_dim

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger("danlu.positions")


@dataclass(frozen=True)
class BaseReport:
    """Result of `check_base` for one frequency table of a model.

    Attributes:
        layer_type: Name of the table in the configuration, None where all layers share one.
        base: Rotary base of the configuration.
        dim, pass_through: Rotated and unrotated dims of a head.
        length: Length checked, tokens.
        max_length: First distance with a negative sum; None where there is none below `length`.
        ok: Whether the table is feasible for `length`.
        advice: One sentence to act on.
    """

    layer_type: str | None
    base: float
    dim: int
    pass_through: int
    length: int
    max_length: int | None
    ok: bool
    advice: str


def check_base(model: PreTrainedModel | PreTrainedConfig, length: int | None = None) -> tuple[BaseReport, ...]:
    """Check the rotary base of a host model against a length, before a long training run or a long context.

    The model's real table is checked (scalings such as llama3 included) together with its unrotated dims. Each table
    that fails is also logged as a warning.

    Args:
        model: A transformers model or its configuration.
        length: Tokens, >= 2; None reads `max_position_embeddings`. Layers with a sliding window are checked up to the
            window.

    Returns:
        One report per frequency table.

    Raises:
        ValueError: No rotary positions, or a table that depends on the length (dynamic).

    Source: Scientific Spaces archive 10122; arXiv:2405.14591.
    """
    config: Any = getattr(model, "config", model).get_text_config()
    if length is None:
        length = int(config.max_position_embeddings)
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise ValueError(f"length must be an integer >= 2, got {length!r}")
    reports = []
    for layer_type, parameters in rope_tables(config).items():
        inv_freq, scaling = host_frequencies(config, layer_type)
        dim = rotated_dim(config, layer_type)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        pass_through = getattr(config, "qk_nope_head_dim", None) or head_dim - dim
        window = getattr(config, "sliding_window", None) if layer_type == "sliding_attention" else None
        reach = min(length, window) if window else length
        # m multiplies cos and sin of the rotated dims only, so the others weigh 1 / m**2 beside them
        found = first_negative(inv_freq.numpy(), pass_through / 2 / scaling**2, reach)
        base = float(parameters["rope_theta"])
        advice = _advice(base, dim, pass_through, reach, found)
        if found is not None:
            logger.warning("%s", advice)
        reports.append(BaseReport(layer_type, base, dim, pass_through, reach, found, found is None, advice))
    return tuple(reports)


def _advice(base: float, dim: int, pass_through: int, length: int, found: int | None) -> str:
    setting = f"base {base:g} with {dim} rotated and {pass_through} unrotated dims"
    if pass_through >= dim:
        return f"{setting} has no lower bound: the unrotated dims outweigh every cosine."
    if found is None:
        return f"{setting} is large enough for {length} tokens."
    try:
        star = recommended_base(length, dim, pass_through=pass_through, safe=False).b_star
    except ValueError:
        return (
            f"{setting} is feasible to {found} tokens only, and no larger base reaches {length}: leave dims unrotated."
        )
    return (
        f"{setting} is feasible to {found} tokens only, {length} were asked: train with a base of at least {star:.4g} "
        "(recommended_base also gives the safe one), or rescale the frequencies (ntk-mixed, yarn)."
    )
