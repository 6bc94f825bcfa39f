"""Simulated environments, stepped many at a time."""
