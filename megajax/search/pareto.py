"""Pareto fronts: searches for all good compromises between several scores at once (NSGA-II).

Knows genes, operators and scores; nothing of networks, masks or files.

Example:
    >>> from typing import NamedTuple
    >>> from megajax.search.loop import Limits, run
    >>> class Aux(NamedTuple):
    ...     tasks: jax.Array
    >>> def evaluate(problem, genes):  # near 0, or near 1?
    ...     scores = -jnp.stack([genes[:, 0] ** 2, (genes[:, 0] - 1) ** 2], axis=1)
    ...     return scores.mean(axis=1), Aux(scores)
    >>> search, key = NSGA2(evaluate, 32), jax.random.key(0)
    >>> genes = jnp.linspace(-9, 9, 32)[:, None]
    >>> state, _ = run(key, search, search.init(key, genes, None), None, Limits(40))
    >>> found = state.population.genes
    >>> bool((found > -0.01).all()), bool((found < 1.01).all()), round(float(found.std()), 1)
    (True, True, 0.3)

Source: Deb, Pratap, Agarwal and Meyarivan, "A fast and elitist multiobjective genetic algorithm:
NSGA-II", IEEE Transactions on Evolutionary Computation 6 (2002).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from megajax.errors import ConfigError
from megajax.search import genetic, operators
from megajax.search.genetic import Evaluate, Tools, evaluated
from megajax.search.loop import FullScoring, Record, State, scored, start
from megajax.search.operators import Crossover, Mutation, Population, take
from megajax.types import Genes, Key, PyTree

__all__ = ["NSGA2", "crowding", "from_config", "hypervolume", "non_dominated_rank"]


@dataclass(frozen=True)
class NSGA2(FullScoring):
    """NSGA-II: (mu + lambda) by non-dominated rank and, within a rank, by crowding distance.

    Parents win a tournament of two by the same order, equals by chance. Distances are those within
    the population at hand. An individual with a score that is not finite is dominated by all others
    that have none.

    Attributes:
        evaluate: `evaluate(problem, genes [M, ...]) -> (fitness [M], aux)`, where `aux.tasks` is
            `[M, T]`, the scores, all maximised. Fitness only says who is the best of all.
        num_offspring: children M of a generation.
        cross: see `megajax.search.operators`.
        mutate: likewise.
        repair: puts genes back into the search space.
    """

    evaluate: Evaluate
    num_offspring: int
    cross: Crossover = operators.sbx
    mutate: Mutation = operators.gaussian
    repair: Callable[[Genes], Genes] = operators.unchanged

    def init(self, key: Key, genes: Genes, problem: PyTree) -> State:
        """Scores the first population.

        Raises:
            ConfigError: there is one task only.
        """
        del key
        state = start(evaluated(self.evaluate, problem, genes))
        if not hasattr(getattr(state.population.aux, "tasks", None), "shape"):
            raise ConfigError("evolution.method is 'nsga2': it needs several tasks")
        return state

    def step(self, key: Key, state: State, problem: PyTree) -> tuple[State, Record]:
        """Makes one generation."""
        tie_key, select_key, cross_key, mutate_key = jax.random.split(key, 4)
        population, size = state.population, state.population.fitness.size
        order = _order(population, jax.random.uniform(tie_key, (size,)))
        pairs = operators.tournament(select_key, -_places(order), 2 * self.num_offspring, size=2)
        first, second = (take(population.genes, half) for half in jnp.split(pairs, 2))
        genes = self.repair(self.mutate(mutate_key, self.cross(cross_key, first, second)))
        offspring = evaluated(self.evaluate, problem, genes)
        everyone = operators.concatenate(population, offspring)
        older = jnp.arange(everyone.fitness.size, dtype=jnp.float32)
        return scored(state, take(everyone, _order(everyone, older)[:size]), offspring)


def non_dominated_rank(scores: jax.Array) -> jax.Array:
    """The front that each individual is on: 0 where nobody is as good at all and better at one.

    The others' fronts are those they are on once all lower fronts are taken away.

    Args:
        scores: `[P, T]`, maximised.

    Returns:
        `[P]` int32.

    Example:
        >>> non_dominated_rank(jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])).tolist()
        [0, 0, 1]
    """
    at_least = (scores[:, None] >= scores[None]).all(axis=-1)
    dominates = at_least & ~at_least.T

    def peel(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rank, front = carry
        left = rank == front
        beaten = (dominates & left[:, None]).any(axis=0)
        return jnp.where(left & beaten, front + 1, rank), front + 1

    def unfinished(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        rank, front = carry
        return (rank == front).any()

    start_ = jnp.zeros(len(scores), jnp.int32), jnp.int32(0)
    return jax.lax.while_loop(unfinished, peel, start_)[0]


def crowding(scores: jax.Array, rank: jax.Array) -> jax.Array:
    """How far an individual's neighbours on its front are from each other, summed over the scores.

    Distances are shares of the front's extent; the ends of a front are infinitely far from others.

    Args:
        scores: `[P, T]`, maximised.
        rank: `[P]`, the front of each.

    Returns:
        `[P]` float32.

    Example:
        >>> scores = jnp.array([[0.0, 4.0], [1.0, 2.0], [4.0, 0.0]])
        >>> crowding(scores, jnp.zeros(3, jnp.int32)).tolist()
        [inf, 2.0, inf]
    """
    fronts = len(rank)

    def of_score(score: jax.Array) -> jax.Array:
        order = jnp.lexsort((score, rank))
        score_, rank_ = score[order], rank[order]
        new = rank_[1:] != rank_[:-1]
        end = jnp.append(True, new) | jnp.append(new, True)
        low = jax.ops.segment_min(score_, rank_, fronts, indices_are_sorted=True)[rank_]
        high = jax.ops.segment_max(score_, rank_, fronts, indices_are_sorted=True)[rank_]
        gap = jnp.roll(score_, -1) - jnp.roll(score_, 1)
        share = jnp.where(high > low, gap / jnp.where(high > low, high - low, 1), 0)
        return jnp.zeros_like(score).at[order].set(jnp.where(end, jnp.inf, share))

    return jax.vmap(of_score, 1)(scores).sum(axis=0)


def hypervolume(scores: Any, reference: Any) -> float:
    """The area that two scores of some individuals dominate, above a reference; exact.

    Args:
        scores: `[F, 2]`, maximised.
        reference: two scores; what does not exceed both counts nothing.

    Raises:
        ConfigError: there are not two scores.

    Example:
        >>> hypervolume([[2.0, 1.0], [1.0, 3.0]], [0.0, 0.0])
        4.0
    """
    points, corner = np.asarray(scores, np.float64), np.asarray(reference, np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or corner.shape != (2,):
        raise ConfigError(f"scores are {points.shape}: hypervolume takes two for each individual")
    heights = points[(points > corner).all(axis=1)] - corner
    heights = heights[np.argsort(-heights[:, 0], kind="stable")]
    steps = np.diff(np.maximum.accumulate(heights[:, 1]), prepend=0.0)
    return float(heights[:, 0] @ steps)


def _order(population: Population, last: jax.Array) -> jax.Array:
    """Indices from the best to the worst; equals by `last [P]`."""
    finite = jnp.isfinite(population.aux.tasks).all(axis=1) & jnp.isfinite(population.fitness)
    scores = jnp.where(finite[:, None], population.aux.tasks, -jnp.inf)
    rank = non_dominated_rank(scores)
    return jnp.lexsort((last, -crowding(jnp.where(finite[:, None], scores, 0), rank), rank))


def _places(order: jax.Array) -> jax.Array:
    """The place of each individual in an order, float32."""
    places = jnp.arange(order.size, dtype=jnp.float32)
    return jnp.zeros_like(places).at[order].set(places)


def from_config(config: Any, tools: Tools) -> NSGA2:
    """NSGA-II with the crossover and mutation that a configuration section describes.

    Raises:
        ConfigError: see `megajax.search.genetic.from_config`.
    """
    varied = genetic.from_config(config, tools)
    return NSGA2(tools.evaluate, config.population_size, varied.cross, varied.mutate, varied.repair)
