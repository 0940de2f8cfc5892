"""Blocks through Ray's object store: for CPU workers, and wherever nothing faster works."""
