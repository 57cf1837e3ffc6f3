"""Data: from a raw release to batches."""
