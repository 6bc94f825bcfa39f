"""One command source at a time: the others are refused and counted."""

from __future__ import annotations


class CommandLease:
    """Which source may command the arm. The holder changes only while the arm is disarmed (the caller sees to that)."""

    def __init__(self, sources: tuple[str, ...], holder: str) -> None:
        """Set the known sources and the first holder.

        Raises:
            ValueError: ``holder`` is not one of ``sources``.
        """
        self.sources = sources
        self.refused: dict[str, int] = dict.fromkeys(sources, 0)
        self.holder = ""
        self.give(holder)

    def give(self, holder: str) -> None:
        """Hand the lease to ``holder``.

        Raises:
            ValueError: unknown source.
        """
        if holder not in self.sources:
            raise ValueError(f"command source {holder!r}: expected one of {', '.join(self.sources)}")
        self.holder = holder

    def admits(self, source: str) -> bool:
        """Whether a command of ``source`` may be obeyed; a refusal is counted."""
        if source == self.holder:
            return True
        self.refused[source] = self.refused.get(source, 0) + 1
        return False
