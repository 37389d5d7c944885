"""Random search: the control that every other search owes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from megajax.search import operators
from megajax.search.genetic import Evaluate, Space, Tools, evaluated
from megajax.search.loop import FullScoring, Record, State, scored, start
from megajax.types import Genes, Key, PyTree

__all__ = ["RandomSearch", "from_config"]


@dataclass(frozen=True)
class RandomSearch(FullScoring):
    """Draws anew in each generation from what the first population is drawn from.

    What selection and variation add is all that is left between it and a genetic algorithm. Its
    population is the best individuals so far.

    Attributes:
        evaluate: `evaluate(problem, genes [M, ...]) -> fitness [M]` or `(fitness, aux)`.
        space: whose `init` draws; masks or task vectors.
        num_offspring: individuals M of a generation, at least as many as `space.init` needs.

    Example:
        >>> from megajax.merging.masks import masks
        >>> space = masks({"w": jax.numpy.zeros(3)}, 2, granularity="element")
        >>> search = RandomSearch(lambda _, genes: genes[:, :, 0].min(axis=1), space, 8)
        >>> state = search.init(jax.random.key(0), space.init(jax.random.key(1), 8), None)
        >>> state, _ = search.step(jax.random.key(2), state, None)
        >>> int(state.counts.networks), float(state.best.fitness)
        (16, 1.0)
    """

    evaluate: Evaluate
    space: Space
    num_offspring: int

    def init(self, key: Key, genes: Genes, problem: PyTree) -> State:
        """Scores the first population."""
        del key
        return start(evaluated(self.evaluate, problem, genes))

    def step(self, key: Key, state: State, problem: PyTree) -> tuple[State, Record]:
        """Scores as many again, drawn independently."""
        size = self.num_offspring
        drawn = self.space.init(key, 2 * size, None)  # parents and mean come first
        genes = self.space.repair(jax.tree.map(lambda leaf: leaf[size:], drawn))
        offspring = evaluated(self.evaluate, problem, genes)
        return scored(state, operators.plus(key, state.population, offspring), offspring)


def from_config(config: Any, tools: Tools) -> RandomSearch:
    """Random search with the population size of a configuration section."""
    config.require(tools.space.gene_ndim == 1, "method", "weights cannot be drawn at random")
    return RandomSearch(tools.evaluate, tools.space, config.population_size)
