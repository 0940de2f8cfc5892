"""Scheduling: the work of each step, and its results."""
