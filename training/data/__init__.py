"""Captioned images: from any source to batches."""
