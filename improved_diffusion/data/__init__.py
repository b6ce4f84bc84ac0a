"""Images on disk, and batches of them."""
