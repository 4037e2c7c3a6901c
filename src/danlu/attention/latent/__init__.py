"""Multi-head latent attention: the layer, its cache, and absorbed decoding of the host's models."""
