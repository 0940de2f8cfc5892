"""Decode steps in micro-batches: the attention of one beside the feed-forward of another."""
