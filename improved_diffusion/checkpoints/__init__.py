"""Files of weights and of whole training states."""
