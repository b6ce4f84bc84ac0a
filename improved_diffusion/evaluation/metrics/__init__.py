"""The arithmetic of scores: arrays in, numbers out."""
