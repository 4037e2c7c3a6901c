"""Tokens: a byte-level unigram tokenizer, its trainer, exact sampling of segmentations, and the host library's face."""
