"""Trial bookkeeping: records, statistics, videos and the report; imports no ROS and no torch."""
