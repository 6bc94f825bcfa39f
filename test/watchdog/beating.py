"""A process that beats like an armed arm_node until it is killed or stopped; prints when the watchdog is ready."""

import sys
import time

from dcqfa_ros.watchdog.client import WatchdogClient

client = WatchdogClient(sys.argv[1])
said = ""
while True:
    problem = client.problem()
    client.beat(armed=said == "ready" and (problem is None or "tripped" in problem))
    now = "ready" if problem is None else "tripped" if "tripped" in problem else said
    if now != said:
        said = now
        print(said, flush=True)
    time.sleep(0.01)
