"""The selector's ranking as a policy walks it: what was refused is not asked for again before a new ranking comes."""

from __future__ import annotations

from dcqfa_ros.runtime.engines import AUTO


class RankedEngines:
    """Engines ``<runtime>/<variant>``, best first, and those of them that were refused.

    Attributes:
        refused: engines of this ranking that could not be opened.
    """

    def __init__(self) -> None:
        """Know no ranking yet."""
        self._order: tuple[tuple[str, str], ...] = ()  # runtime and variant
        self.refused: set[str] = set()

    def take(self, ranking: str) -> None:
        """Take a new ranking, ``<runtime>/<variant>`` separated by commas; earlier refusals are forgotten."""
        pairs = [entry.partition("/") for entry in ranking.split(",")]
        self._order = tuple((runtime, variant) for runtime, _, variant in pairs if variant)
        self.refused = set()

    def refuse(self, engine: str) -> None:
        """Note that an engine could not be opened."""
        if engine in {f"{runtime}/{variant}" for runtime, variant in self._order}:
            self.refused.add(engine)

    def best(self, variant: str = AUTO, runtime: str = AUTO) -> tuple[str, str] | None:
        """Return runtime and variant of the best engine that was not refused, or None where none is left.

        Args:
            variant: the only variant to consider, or ``auto``.
            runtime: the only runtime to consider, or ``auto``.
        """
        for on, name in self._order:
            if variant in (AUTO, name) and runtime in (AUTO, on) and f"{on}/{name}" not in self.refused:
                return on, name
        return None

    def after(self, refused: str, variant: str, runtime: str, running: str) -> tuple[tuple[str, str] | None, str]:
        """Note a refusal and say what follows.

        Args:
            refused: engine that could not be opened.
            variant: as :meth:`best`.
            runtime: as :meth:`best`.
            running: engine that still runs, or empty.

        Returns:
            Runtime and variant to ask for, None where there is none or it runs; and what to report, empty where the
            refused engine is not of the ranking.
        """
        self.refuse(refused)
        if refused not in self.refused:
            return None, ""
        best = self.best(variant, runtime)
        if best is None:
            rest = f"{running} runs on" if running else "no engine runs"
            return None, f"{refused} was refused: nothing of the selector's ranking is left to try, {rest}"
        engine = "/".join(best)
        if engine == running:
            return None, f"{refused} was refused: {running}, the next of the selector's ranking, runs on"
        return best, f"{refused} was refused: trying {engine}, the next of the selector's ranking"
