"""Gradient search: Adam on the genes, from the best of the first population."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from megajax.search import operators
from megajax.search.descent import Descent, descent_of
from megajax.search.genetic import Evaluate, Tools, evaluated
from megajax.search.loop import Counts, Record, State, advance, record, start
from megajax.types import Genes, Key, PyTree

__all__ = ["GradientSearch", "from_config"]


@dataclass(frozen=True)
class GradientSearch:
    """Adam from the best of the first population, with the best ever kept by full scoring.

    A generation is as many steps as cost what a population of `num_offspring` would, and one full
    scoring of where they led. Its population is the best points so far.

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
        free = self.descent.space.encode(state.best.genes)
        return state._replace(memory=(free, self.descent.optimizer.init(free)))

    def step(self, key: Key, state: State, problem: PyTree) -> tuple[State, Record]:
        """Goes down for a generation and scores the point on all examples."""
        free, adam = self.descent(key, state.memory[0], state.memory[1], problem)
        genes = jax.tree.map(lambda leaf: leaf[None], self.descent.space.decode(free))
        point = evaluated(self.evaluate, problem, genes)
        counts = Counts(*map(jnp.int32, (1, 1, self.descent.steps)))
        survivors = operators.plus(key, state.population, point)
        valid = jnp.sum(jnp.isfinite(point.fitness))
        state = advance(state, survivors, point, counts, (free, adam))
        return state, record(state, 1 - valid, valid)

    @property
    def partial_examples(self) -> int:
        """Passes that one step takes."""
        return self.descent.cost

    def cost(self, num_examples: int) -> int:
        """Passes of an example through a network that a generation takes."""
        return self.descent.steps * self.descent.cost + num_examples


def from_config(config: Any, tools: Tools) -> GradientSearch:
    """Gradient search, a generation costing what one of the genetic algorithm would."""
    config.require(tools.race is None, "method", "only the genetic algorithm races")
    cost = descent_of(config, tools, 1).cost
    steps = math.ceil((config.population_size - 1) * tools.num_examples / cost)
    return GradientSearch(tools.evaluate, descent_of(config, tools, max(steps, 1)))
