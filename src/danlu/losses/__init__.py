"""Losses for fine-tuning."""
