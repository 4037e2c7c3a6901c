"""Naive-Bayes contexts: one answer from many documents that a model reads one by one."""
