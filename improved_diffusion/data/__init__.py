"""Images on disk to batches."""
