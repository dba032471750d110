"""The parameter tree: policy by path, placement, storage."""
