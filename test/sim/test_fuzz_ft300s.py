"""The fuzzing campaign counts what it should: a parser that believes too much or recovers late does not pass."""

from __future__ import annotations

from dcqfa_ros.drivers.ft300s_protocol import FRAME_BYTES, Frame, StreamParser
from dcqfa_ros.sim.fuzz_ft300s import fuzz, fuzz_collisions


class Gullible(StreamParser):
    """Believes whatever stands behind a header."""

    def feed(self, data: bytes) -> list[Frame]:
        frames = super().feed(data)
        if self.trust.suspect and len(data) >= FRAME_BYTES and data.startswith(b"\x20\x4e"):
            frames.append(Frame(tuple(int.from_bytes(data[i : i + 2], "little") for i in range(2, 14, 2)), 0))  # type: ignore[arg-type]
        return frames


class Slow(StreamParser):
    """Loses every third piece."""

    count = 0

    def feed(self, data: bytes) -> list[Frame]:
        self.count += 1
        return [] if self.count % 3 == 0 else super().feed(data)


class Broken(StreamParser):
    def feed(self, data: bytes) -> list[Frame]:
        if data.startswith(b"\xff"):
            raise IndexError("a defect")
        return super().feed(data)


def test_the_parser_passes_a_short_campaign() -> None:
    report = fuzz(5000, seed=3)
    assert report.passed, report.examples
    assert report.chunks == 5000
    assert report.wrenches > 3000
    assert report.recoveries > 1500
    assert report.remembered < FRAME_BYTES


def test_equal_seeds_give_equal_campaigns() -> None:
    assert fuzz(300, seed=1) == fuzz(300, seed=1)
    assert fuzz(300, seed=1) != fuzz(300, seed=2)


def test_a_parser_that_believes_too_much_recovers_late_or_raises_does_not_pass() -> None:
    gullible, slow, broken = (fuzz(3000, 1, kind()) for kind in (Gullible, Slow, Broken))
    assert gullible.false_wrenches > 0 and not gullible.passed
    assert slow.late_recoveries > 0 and not slow.passed
    assert broken.exceptions > 0 and not broken.passed
    assert any("IndexError: a defect" in text for text in broken.examples)


def test_damage_that_meets_the_crc_seldom_becomes_a_false_wrench() -> None:
    share, report = fuzz_collisions(20_000, seed=1)
    assert report.collisions > 500
    assert share < 0.02
    assert report.exceptions == report.late_recoveries == 0
