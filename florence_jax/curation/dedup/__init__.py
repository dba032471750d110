"""Near-duplicates: hashes, their join, components, representatives."""
