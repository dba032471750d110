"""Public PyTorch weights as a folder of this project."""
