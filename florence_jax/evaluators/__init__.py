"""Evaluators: each owns its data and turns parameters into named numbers and a piece of the report."""
