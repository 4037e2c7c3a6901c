"""Requests to other sites: one shared pace for each host, retries that respect it, guards against what comes back."""
