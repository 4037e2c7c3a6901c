"""Residual paths and initialisation of host models."""
