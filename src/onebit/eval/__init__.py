"""Measures what a model knows: perplexity, distance from another model, tasks; figures with their errors."""
