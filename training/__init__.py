"""Turns settings and a split into a run folder. Nothing here opens the test set or imports `evaluation`."""
