"""A probe of attention: what each head of a live model looks at."""
