"""Scores of pictures by models."""
