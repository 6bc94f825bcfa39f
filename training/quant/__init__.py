"""Quantizers and quantized layers."""
