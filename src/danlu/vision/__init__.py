"""Discrete codes of images and self-supervised image features."""
