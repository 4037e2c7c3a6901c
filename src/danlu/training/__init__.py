"""Training from a recipe file with the host library's Trainer."""
