"""Relevance, balance and informativeness: which pairs of the usable ones are kept."""
