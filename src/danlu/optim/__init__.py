"""Optimisers that need less memory, as ordinary PyTorch objects."""
