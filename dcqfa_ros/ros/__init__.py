"""ROS 2 side of dcqfa_ros: interface table, lifecycle base class, diagnostics, bring-up and process supervision."""
