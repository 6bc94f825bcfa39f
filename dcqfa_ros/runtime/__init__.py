"""Engines in worker processes, denoising, chunks and their execution; no ROS, no PyTorch."""
