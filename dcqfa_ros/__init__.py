"""Device-conditioned quantized policies on robots: bundle, runtime, drivers, safety and ROS 2 nodes."""

__version__ = "0.1.0"
