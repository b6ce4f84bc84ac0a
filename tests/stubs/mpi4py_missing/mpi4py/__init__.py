"""Stands in for mpi4py as if it were not installed."""

raise ModuleNotFoundError("No module named 'mpi4py'")
