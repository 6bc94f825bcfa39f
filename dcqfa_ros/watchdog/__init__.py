"""An independent process that trips the controller's safe stop when an armed arm_node falls silent.

Standard library only, no threads, its own connection to the controller: nothing that can hang ``arm_node`` (its
interpreter, its ROS graph, its socket) can hang the watchdog with it. Run it as ``python -m dcqfa_ros.watchdog``.
It is no safety function: the controller's emergency-stop chain is.
"""
