"""Where papers come from: readers of each source's format, and the polling that keeps a site complete."""
