"""Speed: one module for each group of `python -m benchmarks`, and what they share.

Each group has `run(context)`, which measures several ways to do one thing in turns (A B C A B C ...) and reports a row
for each: `ways` holds the way to compare, `workloads` the networks, `report` the table and the file.
"""
