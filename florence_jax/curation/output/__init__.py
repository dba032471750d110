"""Shards, metadata, the audit and the page of the funnel."""
