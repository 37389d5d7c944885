"""Niches: individuals compete for examples, and mate with who is right where they are wrong (M2N2).

Knows genes, operators and who is right on which example; nothing of networks, masks or files.

Example:
    >>> from typing import NamedTuple
    >>> from megajax.search.loop import Limits, run
    >>> class Aux(NamedTuple):
    ...     right: jax.Array
    >>> def evaluate(target, genes):  # the i-th example needs the i-th gene
    ...     right = abs(genes - target) < 0.3
    ...     return right.mean(axis=1), Aux(right)
    >>> halves = jnp.array([[1.0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]])
    >>> search, key, target = Niches(evaluate, 4), jax.random.key(0), jnp.ones(6)
    >>> state, _ = run(key, search, search.init(key, halves, target), target, Limits(20))
    >>> float(state.best.fitness)
    1.0

Source: Abrantes, Lange and Tang, "Competition and attraction improve model fusion", GECCO 2025,
arXiv 2508.16204.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from megajax.search import genetic, operators
from megajax.search.genetic import Evaluate, Tools, evaluated
from megajax.search.loop import FullScoring, Record, State, scored, start
from megajax.search.operators import Crossover, Mutation, Population, take
from megajax.types import Genes, Key, PyTree, bind

__all__ = ["Niches", "attraction", "from_config", "shared_fitness"]

_SPHERICAL = bind(operators.split_point, spherical=True)
_NONE = bind(operators.apply_all, mutations=())


@dataclass(frozen=True)
class Niches(FullScoring):
    """An archive whose members share the examples that they are right on.

    A generation: the first of each pair is drawn in proportion to its shared fitness, the second in
    proportion to what it would add where the first is wrong. Children enter the archive one after
    the other: each takes the place of the member with the least shared fitness, itself included.
    Members without a finite fitness are right nowhere.

    Attributes:
        evaluate: `evaluate(problem, genes [M, ...]) -> (fitness [M], aux)`, where `aux.right` is
            `[M, N]` bool. Fitness says who is the best; it is not what is competed for.
        num_offspring: children M of a generation, who all have their parents in the same archive.
            M2N2 makes one at a time.
        cross: see `megajax.search.operators`.
        mutate: likewise; the default is none.
        repair: puts genes back into the search space.
        alpha: exponent of the number of members that share an example; 0 is no competition.
        matchmaker: whether the second of a pair is drawn by the first; otherwise it is drawn alike.
        founders: how many of the first population are put into the archive, whose other places are
            empty at first; None is all.
    """

    evaluate: Evaluate
    num_offspring: int = 1
    cross: Crossover = _SPHERICAL
    mutate: Mutation = _NONE
    repair: Callable[[Genes], Genes] = operators.unchanged
    alpha: float = 1.0
    matchmaker: bool = True
    founders: int | None = None
    per_example: ClassVar[bool] = True

    def init(self, key: Key, genes: Genes, problem: PyTree) -> State:
        """Scores the first population, or its founders alone."""
        del key
        size = jax.tree.leaves(genes)[0].shape[0]
        founders = size if self.founders is None else self.founders
        state = start(evaluated(self.evaluate, problem, take(genes, jnp.arange(founders))))
        # An empty place is a copy at -inf, which owns nothing and is the first to be replaced.
        archive: Population = take(state.population, jnp.arange(size) % founders)
        fitness = jnp.where(jnp.arange(size) < founders, archive.fitness, -jnp.inf)
        return state._replace(population=archive._replace(fitness=fitness))

    def step(self, key: Key, state: State, problem: PyTree) -> tuple[State, Record]:
        """Makes one generation."""
        pair_key, cross_key, mutate_key = jax.random.split(key, 3)
        archive = state.population
        first, second = self._pairs(pair_key, archive)
        genes = self.cross(cross_key, take(archive.genes, first), take(archive.genes, second))
        genes = self.repair(self.mutate(mutate_key, genes))
        offspring = evaluated(self.evaluate, problem, genes)
        everyone = operators.concatenate(archive, offspring)
        who = _archived(everyone, archive.fitness.size, self.alpha)
        return scored(state, take(everyone, who), offspring)

    def _pairs(self, key: Key, archive: Population) -> tuple[jax.Array, jax.Array]:
        """Indices of the first and the second of each pair, `[M]` each."""
        first_key, second_key = jax.random.split(key)
        right = _right(archive)
        alive = jnp.isfinite(archive.fitness).astype(jnp.float32)
        shared = shared_fitness(right, self.alpha)
        shared = jnp.where(shared.sum() > 0, shared, alive)
        first = jax.random.categorical(first_key, jnp.log(shared), shape=(self.num_offspring,))
        if not self.matchmaker:
            second = jax.random.categorical(second_key, jnp.log(shared), shape=first.shape)
            return first, second
        gain = attraction(right, self.alpha)[first]
        # Nobody is right where the first is wrong: anybody else then, or the first if it is alone.
        itself = jax.nn.one_hot(first, shared.size, dtype=jnp.bool_)
        others = jnp.where(itself, 0, shared[None])
        others = jnp.where(others.any(axis=1, keepdims=True), others, itself.astype(jnp.float32))
        gain = jnp.where(gain.any(axis=1, keepdims=True), gain, others)
        return first, jax.random.categorical(second_key, jnp.log(gain))


def shared_fitness(right: jax.Array, alpha: float = 1.0) -> jax.Array:
    """What each individual gets of the examples, which those who are right on them share.

    Args:
        right: `[P, N]` bool, who is right on which example.
        alpha: an example that n are right on is worth 1 / n^alpha to each of them.

    Returns:
        `[P]` float32.

    Example:
        >>> shared_fitness(jnp.array([[True, True, False], [True, False, False]])).tolist()
        [1.5, 0.5]
    """
    return jnp.where(right, _worth(right, alpha), 0).sum(axis=1)


def attraction(right: jax.Array, alpha: float = 1.0) -> jax.Array:
    """How much the second of a pair gets of the examples on which the first is wrong.

    Args:
        right: `[P, N]` bool, who is right on which example.
        alpha: see `shared_fitness`.

    Returns:
        `[P, P]` float32, at `[first, second]`; the diagonal is zero.

    Example:
        >>> attraction(jnp.array([[True, True, False], [False, False, True]])).tolist()
        [[0.0, 1.0], [2.0, 0.0]]
    """
    gets = jnp.where(right, _worth(right, alpha), 0)
    return jnp.matmul((~right).astype(gets.dtype), gets.T, precision="highest")


def _worth(right: jax.Array, alpha: float) -> jax.Array:
    """`[N]`, of each example to one of those who are right on it."""
    return jnp.maximum(right.sum(axis=0), 1).astype(jnp.float32) ** -alpha


def _right(population: Population) -> jax.Array:
    return population.aux.right & jnp.isfinite(population.fitness)[:, None]


def _archived(everyone: Population, size: int, alpha: float) -> jax.Array:
    """Who is in the archive, the first `size`, after the others tried to get in: `[size]`."""
    right, alive = _right(everyone), jnp.isfinite(everyone.fitness)

    def enter(number: jax.Array, who: jax.Array) -> jax.Array:
        rivals = right[jnp.append(who, number)]
        worst = jnp.argmin(shared_fitness(rivals, alpha))  # `size` is the child itself
        place = jnp.where(alive[number], worst, size)
        return who.at[place].set(number, mode="drop")

    return jax.lax.fori_loop(size, alive.size, enter, jnp.arange(size))


def from_config(config: Any, tools: Tools) -> Niches:
    """The search by niches that a configuration section describes.

    The crossover is M2N2's: on the arc between whole networks where genes are weights, cut in the
    order of the program, and on the line where they are coefficients; genes that pick a parent are
    cut without being mixed.

    Raises:
        ConfigError: see `megajax.search.genetic.from_config`.
    """
    space = tools.space
    crossover = config.crossover
    if crossover is None and space.picks:
        crossover = "one_point"
    elif crossover is None:
        crossover = bind(
            operators.split_point,
            spherical=space.gene_ndim is None,
            gene_ndim=space.gene_ndim,
            order=getattr(space, "order", ()),
        )
    varied = genetic.from_config(config.replace(crossover=crossover), tools)
    return Niches(
        tools.evaluate,
        num_offspring=config.offspring or config.population_size,
        cross=varied.cross,
        mutate=_NONE if config.mutation_rate == 0 else varied.mutate,
        repair=varied.repair,
        alpha=config.sharing,
        matchmaker=config.matchmaker,
        founders=space.num_parents if config.parents_only else None,
    )
