"""Demonstrations: readers, splits, windows, normalisers."""
