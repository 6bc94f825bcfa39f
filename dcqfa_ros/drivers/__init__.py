"""Driver protocols and hardware drivers: plain Python, no ROS."""
