"""The whole cell for an hour, with devices unplugged all the time: memory, deadlines, recoveries."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest

from test.faults.cell import FaultCell
from test.faults.conftest import Figures, Sizes
from test.faults.test_cell_faults import ALLOWED_MS, CODES, SOURCES, counted, disconnect
from test.faults.watch import Watch, deadlines, silences

pytestmark = pytest.mark.soak

WARM_UP_S = 300.0
GROWTH_PERCENT = 5.0
FULL_SIZE = {"width": 640, "height": 480, "fps": 30.0}


@pytest.mark.timeout(4 * 3600)
def test_an_hour_of_the_cell_leaks_nothing_misses_nothing_silently_and_recovers_every_time(
    sizes: Sizes, figures: Figures
) -> None:
    rng = random.Random(1)
    cameras = {f"{name}_camera_node": FULL_SIZE for name in ("wrist", "front")}
    done: Counter[str] = Counter()
    codes: Counter[str] = Counter()
    late_motion = 0
    late: list[str] = []
    begun_s = time.monotonic()
    latest: dict[str, float] = dict.fromkeys(SOURCES, 0.0)
    with FaultCell({**cameras, "arm_node": {"rate": 100.0}}) as cell:
        cell.arm.keep_traffic = False
        watch = Watch(cell)
        watch.start()
        end = time.monotonic() + sizes.soak_s
        while time.monotonic() < end or min(done[d] for d in SOURCES) < sizes.soak_disconnects:
            left = [d for d in SOURCES if done[d] < sizes.soak_disconnects] or list(SOURCES)
            device = rng.choice(left)
            with cell.commanded_by(SOURCES[device]) as commander:
                for _ in range(10):  # in a row, because the lease changes only while the arm is disarmed
                    lost_ns, code, _ = disconnect(cell, commander, device, rng)
                    done[device] += 1
                    codes[code] += 1
                    moved = [f.stamp_ns for f in cell.arm.moving_since(lost_ns)]
                    after = (max(moved) - lost_ns) / 1e6 if moved else 0.0
                    latest[device] = max(latest[device], after)
                    if after > ALLOWED_MS[device]:
                        late_motion += 1
                        late.append(f"{device} after {time.monotonic() - begun_s:.0f} s: {told(cell, lost_ns)}")
                    if done[device] >= sizes.soak_disconnects and time.monotonic() > end:
                        break
                cell.move(commander)
                pause(cell, commander, sizes, done, end)
        length = time.monotonic() - watch.began_s
        watch.stop()
        alive = [name for name, process in cell.processes.items() if process.process.poll() is None]
        growth = watch.growth(min(WARM_UP_S, sizes.soak_s / 4))
        missed, untold, longest = deadlines(cell, 1 / 100.0)
        quiet = silences(cell, time.time())
        worst = max(value for _, value in growth.values())
        figures.add(
            "soak of the emulated cell",
            seconds=length,
            **{f"disconnects_of_{device}": done[device] for device in SOURCES},
            **{f"last_motion_ms_after_{device}_loss": ms for device, ms in latest.items()},
            stop_codes=counted(codes.elements()),
            motion_commands_after_the_loss_was_due=late_motion,
            late_motion="; ".join(late) or "none",
            stops_of_other_causes=counted(cell.other_stops),
            messages_on_the_socket=len(cell.arm.stream),
            processes_alive=f"{len(alive)} of {len(cell.processes)}",
            deadlines_missed=missed,
            deadlines_missed_without_a_diagnostic=untold,
            longest_gap_of_the_stream_ms=longest * 1000,
            longest_silence_of_a_node_s=max(quiet.values()),
            largest_growth_percent=worst,
            **{f"memory_of_{name}": f"{mib:.0f} MiB {value:+.1f} %" for name, (mib, value) in growth.items()},
        )
        assert len(alive) == len(cell.processes)
        assert late_motion == 0
        assert untold == 0
        assert worst < GROWTH_PERCENT, growth
        assert all(codes[CODES[device]] > 0 for device in SOURCES)


def pause(cell: FaultCell, commander: object, sizes: Sizes, done: Counter[str], end: float) -> None:
    """Let the arm move undisturbed for a part of the time that is not needed for the disconnects to come."""
    left_s = end - time.monotonic()
    to_come = sum(max(0, sizes.soak_disconnects - done[d]) for d in SOURCES)
    time.sleep(max(0.0, min(10.0, (left_s - 4.0 * to_come) / (1 + to_come / 10))))


def told(cell: FaultCell, lost_ns: int) -> str:
    """What to know of a demand for motion that came too late: why the arm stopped, and its last demands."""
    last = [
        f"came {(came - lost_ns) / 1e6:.0f}, made {(made - lost_ns) / 1e6:.0f} ms after"
        for came, made in list(cell.arm.newest)[-3:]
    ]
    return f"{cell.state.get('code', '')} ({cell.state.get('reason', '')}), demands {', '.join(last)}"
