"""Rotary positions: rotation, rescaled frequencies, the lower bound of the base, and randomised positions."""

from .base_check import BaseReport, check_base
from .bound import BaseBound, max_length, recommended_base, similarity_sum
from .dynamic import dynamic_factor, segments
from .export import export_config, host_frequencies, rope_tables, rotated_dim, to_longrope
from .randomised import RandomPositionCollator, equal_mean_positions, evenly_spaced_positions, subset_positions
from .rotary import Rotary, half_to_interleaved, interleaved_to_half, inverse_frequencies
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
    "BaseBound",
    "BaseReport",
    "RandomPositionCollator",
    "Rotary",
    "attention_scaling",
    "check_base",
    "dynamic_factor",
    "equal_mean_positions",
    "evenly_spaced_positions",
    "export_config",
    "frequency_factors",
    "geometric_base",
    "half_to_interleaved",
    "host_frequencies",
    "interleaved_to_half",
    "inverse_frequencies",
    "max_length",
    "recommended_base",
    "rescaled",
    "rope_inv_freq",
    "rope_tables",
    "rotated_dim",
    "segments",
    "similarity_sum",
    "stretch_factor",
    "subset_positions",
    "to_longrope",
]
