"""Simulated cells behind the same driver protocols as the hardware; imports no ROS and no torch."""
