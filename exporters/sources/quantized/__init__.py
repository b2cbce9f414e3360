"""Weights that a file holds in blocks already, read as they are: nothing is rounded a second time."""
