"""Losses of the supernet."""
