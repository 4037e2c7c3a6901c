"""Rotary positions: rescaled frequencies, the lower bound of the base, and randomised positions for training."""

from .dynamic import dynamic_factor, segments
from .scaling import (
    METHODS,
    attention_scaling,
    frequency_factors,
    geometric_base,
    rescaled,
    rope_inv_freq,
    stretch_factor,
)

__all__ = [
    "METHODS",
    "attention_scaling",
    "dynamic_factor",
    "frequency_factors",
    "geometric_base",
    "rescaled",
    "rope_inv_freq",
    "segments",
    "stretch_factor",
]
