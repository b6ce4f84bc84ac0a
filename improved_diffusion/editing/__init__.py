"""Editing images with a trained model: one class for each command, usable with arrays or with files."""
