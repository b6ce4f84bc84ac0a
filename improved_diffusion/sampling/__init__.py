"""Sampling: solvers, timestep grids, guidance, and pipelines from a checkpoint to images."""
