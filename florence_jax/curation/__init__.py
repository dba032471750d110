"""Curation: from raw data to training sets."""
