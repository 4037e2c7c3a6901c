"""How host models are built: their blocks, their matrices, what kind each parameter is."""
