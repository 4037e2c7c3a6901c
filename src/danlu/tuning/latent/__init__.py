"""Conversion of trained models to latent attention."""
