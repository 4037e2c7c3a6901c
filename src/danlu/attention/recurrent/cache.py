"""Cache layer of the recurrent mixers: one state of fixed size, whatever the number of tokens."""

from __future__ import annotations

from danlu.attention.linear.cache import StateCache


class RecurrentLayer(StateCache):
    """State of a recurrent mixer, as a named tuple of tensors with the batch first.

    For an LRU that is ``h`` (batch, state_size) in complex64, for an SLRU the same in float32, and for RWKV-4 two sums,
    the scale of both and the last input.
    """
