"""Ways for tokens to read each other: two-piece positions, windows, logit scales, key normalisation, hybrids."""

from danlu.attention.hybrid import hwfa_config, suggest_window
from danlu.attention.key_norm import add_key_norm, key_norm, remove_key_norm
from danlu.attention.rerope import piecewise_attention, rerope_attention
from danlu.attention.scale import (
    LogitScale,
    effective_tokens,
    log_n_factor,
    optimal_scale,
    sample_log_moment,
    softmax_grad_l1,
)
from danlu.attention.window import window_attention

__all__ = [
    "LogitScale",
    "add_key_norm",
    "effective_tokens",
    "hwfa_config",
    "key_norm",
    "log_n_factor",
    "optimal_scale",
    "piecewise_attention",
    "remove_key_norm",
    "rerope_attention",
    "sample_log_moment",
    "softmax_grad_l1",
    "suggest_window",
    "window_attention",
]
