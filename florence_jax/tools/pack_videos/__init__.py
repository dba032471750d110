"""Videos as ArrayRecord files."""
