"""A Python that starts with this on its path draws no figures: they take longer than all else in a small run."""

import sys

sys.modules["matplotlib.backends.backend_agg"] = None
