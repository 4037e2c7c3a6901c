"""What a model's cache costs."""
