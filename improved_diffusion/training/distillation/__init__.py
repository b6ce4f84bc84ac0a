"""Distillation: a student of few steps from a trained teacher. One module for each method."""
