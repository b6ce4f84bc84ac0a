"""What a run says: messages, rows of values, trackers, curves."""
