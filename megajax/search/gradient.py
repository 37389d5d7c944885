"""Gradient search: Adam on the genes, from the best of the first population."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from megajax.search import operators
from megajax.search.descent import Descent, Walk, descent_of
from megajax.search.genetic import Evaluate, Tools, evaluated
from megajax.search.loop import Counts, Record, State, scored, start
from megajax.types import Genes, Key, PyTree

__all__ = ["GradientSearch", "from_config"]

_POINTS = 2
"""Points that a generation scores: the last one and the mean."""


@dataclass(frozen=True)
class GradientSearch:
    """Adam from the best of the first population, with the best ever kept by full scoring.

    A generation is as many steps as cost what a population of `num_offspring` would, and two full
    scorings: of the last point and of the steps' mean. Its population is the best points so far.

    Attributes:
        evaluate: `evaluate(problem, genes [M, ...]) -> fitness [M]` or `(fitness, aux)`.
        descent: what a generation does to the point.
    """

    evaluate: Evaluate
    descent: Descent

    def init(self, key: Key, genes: Genes, problem: PyTree) -> State:
        """Scores the first population; the best of it is where the descent starts."""
        del key
        state = start(evaluated(self.evaluate, problem, genes))
        return state._replace(memory=self.descent.start(state.best.genes))

    def step(self, key: Key, state: State, problem: PyTree) -> tuple[State, Record]:
        """Goes down for a generation and scores on all examples where that led."""
        walk: Walk = self.descent(key, state.memory, problem)
        free = jax.tree.map(lambda *leaves: jnp.stack(leaves), walk.free, walk.mean)
        points = evaluated(self.evaluate, problem, jax.vmap(self.descent.space.decode)(free))
        counts = Counts(*map(jnp.int32, (_POINTS, _POINTS, self.descent.steps)))
        survivors = operators.plus(key, state.population, points)
        return scored(state, survivors, points, walk, counts)

    @property
    def partial_examples(self) -> int:
        """Passes that one step takes."""
        return self.descent.cost

    def cost(self, num_examples: int) -> int:
        """Passes of an example through a network that a generation takes."""
        return self.descent.steps * self.descent.cost + _POINTS * num_examples


def from_config(config: Any, tools: Tools) -> GradientSearch:
    """Gradient search, a generation costing what one of the genetic algorithm would."""
    cost = descent_of(config, tools, 1).cost
    steps = math.ceil((config.population_size - _POINTS) * tools.num_examples / cost)
    return GradientSearch(tools.evaluate, descent_of(config, tools, max(steps, 1)))
