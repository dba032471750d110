"""Solvers of convex problems, on the device."""
