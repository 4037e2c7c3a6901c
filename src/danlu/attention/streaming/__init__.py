"""Attention as a recurrence: mergeable states, and decoding by recomputation."""
