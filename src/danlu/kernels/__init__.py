"""Floor 0: tensors in, tensors out; no models, no files. Import its modules: some need torch, some need numba."""
