"""The models: the only package that imports Flax; parameters leave it as plain nested dicts."""
