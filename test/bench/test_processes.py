"""Child processes of a benchmark."""

from __future__ import annotations

import subprocess
import sys
import threading

from dcqfa_ros.bench.processes import children, end, run_module


def test_children_of_threads_that_have_ended_are_found_too():
    before = children()
    processes = []
    thread = threading.Thread(target=lambda: processes.append(run_module("http.server", "--bind", "127.0.0.1", "0")))
    thread.start()
    thread.join()
    try:
        assert children() - before == {processes[0].pid}
    finally:
        end(processes[0])
    assert children() == before


def test_children_of_another_process_are_not_this_process_own():
    code = "import subprocess; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        try:
            assert children(parent.pid) == {child} and child not in children()
        finally:
            subprocess.run(["kill", str(child)], check=True)


def test_a_zombie_is_a_child_until_it_is_waited_for():
    before = children()
    process = subprocess.Popen(["true"], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.read() == b""  # it has ended, and nobody waited for it
    assert children() - before == {process.pid}
    process.wait()
    assert children() == before
