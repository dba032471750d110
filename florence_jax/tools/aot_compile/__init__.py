"""Compiles the training step ahead of time for slices that are not there."""
