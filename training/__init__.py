"""Training of policies and everything that makes variants of them; never part of the robot's installation."""
