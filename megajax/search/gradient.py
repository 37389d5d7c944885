"""Gradient search: Adam on the genes themselves, by mini-batches.

Knows genes and a differentiable objective; nothing of networks, masks or files. A gradient costs
three passes of its mini-batch: one forward, two backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import optax

from megajax.search import operators
from megajax.search.genetic import Evaluate, Race, evaluated
from megajax.search.loop import Counts, Record, State, advance, record, start
from megajax.types import Genes, Key, PyTree

__all__ = ["Descent", "GradientSearch", "Objective", "from_config"]

Objective: TypeAlias = Callable[[Key, PyTree, Genes, int], jax.Array]
"""`objective(key, problem, genes_of_one, count)`: a differentiable score of one individual on so
many examples drawn with the key, maximised."""

PASSES = 3
"""Passes of an example that a gradient on it counts as."""


class FreeSpace(Protocol):
    """Genes as numbers without bounds."""

    def encode(self, genes: Genes) -> Genes:
        """Free numbers of genes, which are moved inside their bounds where they lie on them."""

    def decode(self, free: Genes) -> Genes:
        """Genes of free numbers."""


@dataclass(frozen=True)
class Descent:
    """Some steps of Adam on the free numbers of one individual.

    Attributes:
        objective: see `Objective`.
        space: genes as free numbers, and back.
        steps: how many.
        examples: of each mini-batch.
        learning_rate: of Adam.
    """

    objective: Objective
    space: FreeSpace
    steps: int
    examples: int
    learning_rate: float = 0.1

    @property
    def cost(self) -> int:
        """Passes of an example through a network that one step takes."""
        return PASSES * self.examples

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Adam; its state is `optimizer.init(free)`."""
        return optax.adam(self.learning_rate)

    def __call__(
        self, key: Key, free: Genes, adam: PyTree, problem: PyTree
    ) -> tuple[Genes, PyTree]:
        """Makes the steps.

        Args:
            key: PRNG key, for the mini-batches.
            free: numbers of one individual.
            adam: the optimizer's state.
            problem: what the objective takes.
        """

        def loss(free: Genes, key: Key) -> jax.Array:
            return -self.objective(key, problem, self.space.decode(free), self.examples)

        def step(i: jax.Array, carry: tuple[Genes, PyTree]) -> tuple[Genes, PyTree]:
            free, adam = carry
            slope = jax.grad(loss)(free, jax.random.fold_in(key, i))
            sane = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(slope)]).all()
            slope = jax.tree.map(lambda x: jnp.where(sane, x, 0), slope)
            with jax.numpy_dtype_promotion("standard"):  # optax counts in integers
                updates, adam = self.optimizer.update(slope, adam, free)
            return optax.apply_updates(free, updates), adam

        done: tuple[Genes, PyTree] = jax.lax.fori_loop(0, self.steps, step, (free, adam))
        return done

    def improved(self, key: Key, genes: Genes, problem: PyTree) -> Genes:
        """Genes of one individual after the steps, from a fresh optimizer (Lamarckian)."""
        free = self.space.encode(genes)
        return self.space.decode(self(key, free, self.optimizer.init(free), problem)[0])


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
        free, adam = self.descent(key, *state.memory, problem)
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


def from_config(
    config: Any,
    space: Any,
    evaluate: Evaluate,
    race: Race | None,
    objective: Objective,
    num_examples: int,
) -> GradientSearch:
    """Gradient search, a generation costing what one of the genetic algorithm would."""
    config.require(race is None, "method", "only the genetic algorithm races")
    descent = descent_of(config, space, objective, num_examples, steps=1)
    steps = math.ceil((config.population_size - 1) * num_examples / descent.cost)
    return GradientSearch(
        evaluate, descent_of(config, space, objective, num_examples, steps=max(steps, 1))
    )


def descent_of(
    config: Any, space: Any, objective: Objective, num_examples: int, steps: int
) -> Descent:
    """The descent that a configuration section describes.

    Raises:
        ConfigError: genes that pick a parent have no gradient.
    """
    config.require(not space.picks, "method", "binary genes have no gradient")
    examples = min(config.gradient_examples, num_examples)
    return Descent(objective, space, steps, examples, config.learning_rate)
