"""One module per ROS 2 node; beside ``dcqfa_ros.ros`` the only code that imports rclpy."""
