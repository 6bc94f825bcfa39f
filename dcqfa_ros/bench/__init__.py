"""Benchmarks behind ``dcqfa bench``."""
