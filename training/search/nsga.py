"""NSGA-II over the genes of a search space (``algorithms.md`` section 5), by pymoo.

Genes are those of :meth:`SearchSpace.encode` without the first one: searched networks have integer precision. Every
individual is repaired to the canonical genes of a network of the space, so equal networks are recognised as duplicates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.config import Config
from pymoo.core.crossover import Crossover
from pymoo.core.evaluator import Evaluator
from pymoo.core.mutation import Mutation
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.core.repair import Repair
from pymoo.problems.static import StaticProblem

from training.conditions import TOLERANCE
from training.space import GENES_PER_BLOCK, SearchSpace
from training.subnet import Subnet

Config.warnings["not_compiled"] = False  # a hint on stdout, where results are printed

OBJECTIVES = 3  # distance, latency, memory
CROSSOVER = 0.9
Objectives = Callable[[Sequence[Subnet]], NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Genetics:
    """Size of a search.

    Attributes:
        population: individuals of a generation.
        generations: number of them, the first included.
        seed: of every draw.
    """

    population: int = 64
    generations: int = 50
    seed: int = 0


class Genes:
    """Integer-precision networks of a space as rows of numbers."""

    def __init__(self, space: SearchSpace) -> None:
        """Take the gene sizes of ``space``."""
        self.space = space
        self.sizes = np.array(space.gene_sizes[1:])
        self._integer = len(space.precisions) - 1
        self._whole = [index for index, block in enumerate(space.shape.blocks) if not block.elastic]

    def encode(self, subnets: Sequence[Subnet]) -> NDArray[np.int64]:
        """Rows (N, genes) of networks of integer precision."""
        return np.array([self.space.encode(subnet)[1:] for subnet in subnets], dtype=np.int64).reshape(
            len(subnets), len(self.sizes)
        )

    def decode(self, rows: NDArray[np.int64]) -> list[Subnet]:
        """The networks of repaired rows."""
        return [self.space.decode((self._integer, *row)) for row in rows.tolist()]

    def repaired(self, rows: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
        """Rows of networks of the space: blocks are put back with random genes or skipped, idle genes are 0.

        A group whose number of blocks lies between two that the space offers goes to either, to the nearer one more
        often.
        """
        rows = rows.copy()
        blocks, sizes = self.blocks(rows), self.blocks(self.sizes[None])[0]

        def put_back(block: NDArray[np.int64], index: int) -> None:
            block[index] = random.integers(0, sizes[index])
            block[index, 0] = 1

        for block in blocks:
            block[self._whole, 0] = 1  # of which only the bits are chosen
            for index in sorted(self.space.always_kept):
                if not block[index, 0]:
                    put_back(block, index)
            for group, members in self.space.groups.items():
                kept = [index for index in members if block[index, 0]]
                change = self._depth(len(kept), self.space.depth_choices[group], random) - len(kept)
                if change > 0:
                    for index in random.choice([i for i in members if not block[i, 0]], change, replace=False):
                        put_back(block, index)
                elif change < 0:
                    free = [index for index in kept if index not in self.space.always_kept]
                    block[random.choice(free, -change, replace=False), 0] = 0
        blocks *= blocks[..., :1]
        return rows

    @staticmethod
    def _depth(kept: int, choices: Sequence[int], random: np.random.Generator) -> int:
        """The number of blocks to keep where ``kept`` are."""
        if kept in choices:
            return kept
        if kept < choices[0]:
            return choices[0]
        below, above = max(d for d in choices if d < kept), min(d for d in choices if d > kept)
        return below if random.random() * (above - below) < above - kept else above

    def blocks(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """A view (N, blocks, genes of a block)."""
        return rows.reshape(len(rows), len(self.space.shape.blocks), GENES_PER_BLOCK)


class _Repair(Repair):
    def __init__(self, genes: Genes, random: np.random.Generator) -> None:
        super().__init__()
        self._genes, self._random = genes, random

    def _do(self, problem: Any, X: NDArray[np.int64], **kwargs: Any) -> NDArray[np.int64]:  # noqa: ARG002, N803
        return self._genes.repaired(X, self._random)


class _Crossover(Crossover):
    """Exchange genes evenly; a block that one parent skips is exchanged whole, since its other genes mean nothing."""

    def __init__(self, genes: Genes, random: np.random.Generator) -> None:
        super().__init__(2, 2, prob=CROSSOVER)
        self._genes, self._random = genes, random

    def _do(self, problem: Any, X: NDArray[np.int64], *args: Any, **kwargs: Any) -> NDArray[np.int64]:  # noqa: ARG002, N803
        first, second = (self._genes.blocks(part) for part in X)
        each = self._random.random(first.shape) < 0.5
        both = (first[..., :1] == 1) & (second[..., :1] == 1)
        swap = np.where(both, each, each[..., :1])
        children = np.where(swap, second, first), np.where(swap, first, second)
        return np.stack([child.reshape(X.shape[1:]) for child in children])


class _Mutation(Mutation):
    """Change each gene that has a choice with the probability that changes one on average.

    A block that comes back by that gets genes of its own: those of a skipped block mean nothing.
    """

    def __init__(self, genes: Genes, random: np.random.Generator) -> None:
        super().__init__()
        self._genes, self._random = genes, random
        self._rate = 1.0 / max(1, int((genes.sizes > 1).sum()))

    def _do(self, problem: Any, X: NDArray[np.int64], *args: Any, **kwargs: Any) -> NDArray[np.int64]:  # noqa: ARG002, N803
        genes, random = self._genes, self._random
        other = (X + random.integers(1, np.maximum(genes.sizes, 2), size=X.shape)) % genes.sizes
        changed = np.where(random.random(X.shape) < self._rate, other, X)
        before, after = genes.blocks(X), genes.blocks(changed)
        back = (before[..., 0] == 0) & (after[..., 0] == 1)
        fresh = random.integers(0, genes.blocks(genes.sizes[None])[0], size=after.shape)
        fresh[..., 0] = 1
        after[back] = fresh[back]
        return changed


def evolve(
    space: SearchSpace,
    start: Sequence[Subnet],
    objectives: Objectives,
    budgets: Sequence[float],
    genetics: Genetics,
) -> None:
    """Evolve networks of small distance, latency and memory; what was seen on the way is ``objectives``' to keep.

    Args:
        space: the search space.
        start: networks of the first generation (integer precision); it is filled up at random.
        objectives: from networks to rows (N, 3) of distance, latency and memory.
        budgets: most latency and memory; networks within both win against all others.
        genetics: size and seed; equal ones repeat the search exactly.
    """
    own, pymoos = np.random.SeedSequence(genetics.seed).spawn(2)
    genes, random = Genes(space), np.random.default_rng(own)
    problem = Problem(len(genes.sizes), OBJECTIVES, n_ieq_constr=len(budgets), xl=0, xu=genes.sizes - 1, vtype=int)
    repair = _Repair(genes, random)
    given = genes.encode(list(dict.fromkeys(start))[: genetics.population])
    drawn = random.integers(0, genes.sizes, size=(genetics.population - len(given), len(genes.sizes)))
    first = Population.new("X", np.concatenate([given, genes.repaired(drawn, random)]))
    algorithm = NSGA2(
        pop_size=genetics.population,
        sampling=first,
        crossover=_Crossover(genes, random),
        mutation=_Mutation(genes, random),
        repair=repair,
        eliminate_duplicates=True,
    )
    algorithm.setup(problem, termination=("n_gen", genetics.generations), seed=int(pymoos.generate_state(1)[0]))
    limits = np.array(budgets, dtype=np.float64)
    while algorithm.has_next():
        offspring = algorithm.ask()
        if offspring is None:  # every network within reach is in the population
            break
        rows = objectives(genes.decode(np.array(offspring.get("X"), dtype=np.int64)))
        Evaluator().eval(StaticProblem(problem, F=rows, G=rows[:, 1:] / limits - 1.0 - TOLERANCE), offspring)
        algorithm.tell(infills=offspring)
