"""Attention to quantised keys: codebook, engine, layer, and what quantising a trained model's keys would cost."""
