"""Options to networks."""
