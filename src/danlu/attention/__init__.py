"""Ways for tokens to read each other: logit scales, key normalisation, windows, and hybrids of them."""

from danlu.attention.key_norm import add_key_norm, key_norm, remove_key_norm
from danlu.attention.scale import (
    LogitScale,
    effective_tokens,
    log_n_factor,
    optimal_scale,
    sample_log_moment,
    softmax_grad_l1,
)

__all__ = [
    "LogitScale",
    "add_key_norm",
    "effective_tokens",
    "key_norm",
    "log_n_factor",
    "optimal_scale",
    "remove_key_norm",
    "sample_log_moment",
    "softmax_grad_l1",
]
