"""Raw pairs to the table of scores."""
