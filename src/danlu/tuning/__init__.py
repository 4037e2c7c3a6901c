"""Adapting and growing trained models."""
