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
from pymoo.core.evaluator import Evaluator
from pymoo.core.mutation import Mutation
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.core.repair import Repair
from pymoo.operators.crossover.ux import UniformCrossover
from pymoo.problems.static import StaticProblem

from training.space import GENES_PER_BLOCK, SearchSpace
from training.subnet import Precision, Subnet

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

    def encode(self, subnets: Sequence[Subnet]) -> NDArray[np.int64]:
        """Rows (N, genes) of networks of integer precision."""
        return np.array([self.space.encode(subnet)[1:] for subnet in subnets], dtype=np.int64).reshape(
            len(subnets), len(self.sizes)
        )

    def decode(self, rows: NDArray[np.int64]) -> list[Subnet]:
        """The networks of repaired rows."""
        return [self.space.decode((self._integer, *row)) for row in rows.tolist()]

    def repaired(self, rows: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
        """Rows of the nearest networks of the space: missing blocks are put back at random, idle genes are 0."""
        rows = rows.copy()
        blocks = rows.reshape(len(rows), len(self.space.shape.blocks), GENES_PER_BLOCK)
        for index in self.space.always_kept:
            blocks[:, index, 0] = 1
        for group, members in self.space.groups.items():
            least = self.space.min_depth[group]
            for block in blocks:
                skipped = [index for index in members if not block[index, 0]]
                missing = least - (len(members) - len(skipped))
                if missing > 0:
                    block[random.choice(skipped, missing, replace=False), 0] = 1
        blocks *= blocks[..., :1]
        return rows


class _Repair(Repair):
    def __init__(self, genes: Genes, random: np.random.Generator) -> None:
        super().__init__()
        self._genes, self._random = genes, random

    def _do(self, problem: Any, X: NDArray[np.int64], **kwargs: Any) -> NDArray[np.int64]:  # noqa: ARG002, N803  (pymoo's)
        return self._genes.repaired(X, self._random)


class _Mutation(Mutation):
    """Draw each gene anew with the probability that changes one on average."""

    def __init__(self, genes: Genes, random: np.random.Generator) -> None:
        super().__init__()
        self._sizes, self._random = genes.sizes, random

    def _do(self, problem: Any, X: NDArray[np.int64], *args: Any, **kwargs: Any) -> NDArray[np.int64]:  # noqa: ARG002, N803
        anew = self._random.integers(0, self._sizes, size=X.shape)
        return np.where(self._random.random(X.shape) < 1.0 / len(self._sizes), anew, X)


def evolve(
    space: SearchSpace,
    start: Sequence[Subnet],
    objectives: Objectives,
    budgets: Sequence[float],
    genetics: Genetics,
    each: Callable[[int], None] | None = None,
) -> list[Subnet]:
    """Evolve networks of small distance, latency and memory; returns the last generation.

    Args:
        space: the search space.
        start: networks of the first generation (integer precision); it is filled up at random.
        objectives: from networks to rows (N, 3) of distance, latency and memory.
        budgets: most latency and memory; networks within both win against all others.
        genetics: size and seed; equal ones repeat the search exactly.
        each: called after every generation with its number, from 1; None for nothing.
    """
    genes, random = Genes(space), np.random.default_rng(genetics.seed)
    problem = Problem(len(genes.sizes), OBJECTIVES, n_ieq_constr=len(budgets), xl=0, xu=genes.sizes - 1, vtype=int)
    repair = _Repair(genes, random)
    given = genes.encode(list(dict.fromkeys(start))[: genetics.population])
    drawn = random.integers(0, genes.sizes, size=(genetics.population - len(given), len(genes.sizes)))
    first = Population.new("X", np.concatenate([given, genes.repaired(drawn, random)]))
    algorithm = NSGA2(
        pop_size=genetics.population,
        sampling=first,
        crossover=UniformCrossover(prob=CROSSOVER),
        mutation=_Mutation(genes, random),
        repair=repair,
        eliminate_duplicates=True,
    )
    algorithm.setup(problem, termination=("n_gen", genetics.generations), seed=genetics.seed, verbose=False)
    limits = np.array(budgets, dtype=np.float64)
    generation = 0
    while algorithm.has_next():
        offspring = algorithm.ask()
        rows = objectives(genes.decode(np.array(offspring.get("X"), dtype=np.int64)))
        Evaluator().eval(StaticProblem(problem, F=rows, G=rows[:, 1:] / limits - 1.0 - 1e-6), offspring)
        algorithm.tell(infills=offspring)
        generation += 1
        if each is not None:
            each(generation)
    return genes.decode(np.array(algorithm.pop.get("X"), dtype=np.int64))


def integers(subnets: Sequence[Subnet]) -> list[Subnet]:
    """Those of integer precision."""
    return [subnet for subnet in subnets if subnet.precision is Precision.INT]
