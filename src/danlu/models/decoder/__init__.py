"""The decoder whose token mixing, residual path and mask are chosen by name."""
