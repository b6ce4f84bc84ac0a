"""Measures of a model's quality, from arrays and callables: no diffusion code is imported here."""
