"""What the package costs and how good it is: `python -m benchmarks` measures speed; the scripts beside it quality."""
