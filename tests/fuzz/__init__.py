"""Damaged files, thrown at the readers of models."""
