"""Ops on examples, and the strings that name them."""
