"""Searches for genes that pick one parent each: (1 + lambda) by bit flips, and PBIL.

They know one-hot genes `[P, ..., K]` and fitness; nothing of networks, masks or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from megajax.errors import ConfigError
from megajax.search import operators
from megajax.search.genetic import Evaluate, Tools, evaluated
from megajax.search.loop import FullScoring, Record, State, scored, start
from megajax.search.operators import Mutation, Population, take
from megajax.types import Genes, Key, PyTree, bind

__all__ = ["PBIL", "OnePlusOne", "one_plus_one", "pbil"]


@dataclass(frozen=True)
class OnePlusOne(FullScoring):
    """The (1 + 1) evolutionary algorithm: a child that is no worse replaces its only parent.

    With `num_offspring` above 1 it is (1 + lambda): the best of the children stands against the
    parent. The parent, the best of the first population, is all of the population.

    Attributes:
        evaluate: `evaluate(problem, genes [M, ...]) -> fitness [M]` or `(fitness, aux)`.
        mutate: how a child differs from its parent.
        num_offspring: children of a generation, lambda.

    Example:
        >>> from megajax.search.loop import Limits, run
        >>> search = OnePlusOne(lambda _, genes: genes[..., 1].sum(-1),
        ...                     bind(operators.flip, rate=1 / 20), num_offspring=4)
        >>> key, genes = jax.random.key(0), jax.nn.one_hot(jnp.zeros((1, 20), jnp.int32), 2)
        >>> state, _ = run(key, search, search.init(key, genes, None), None, Limits(200))
        >>> float(state.best.fitness)
        20.0

    Source: Droste, Jansen and Wegener, "On the analysis of the (1+1) evolutionary algorithm",
    Theoretical Computer Science 276 (2002).
    """

    evaluate: Evaluate
    mutate: Mutation
    num_offspring: int = 1

    def init(self, key: Key, genes: Genes, problem: PyTree) -> State:
        """Scores the first population, whose best is the first parent."""
        del key
        state = start(evaluated(self.evaluate, problem, genes))
        return state._replace(population=_alone(state.best))

    def step(self, key: Key, state: State, problem: PyTree) -> tuple[State, Record]:
        """Makes one generation."""
        parent, size = state.population, self.num_offspring
        genes = self.mutate(key, take(parent.genes, jnp.zeros(size, jnp.int32)))
        offspring = evaluated(self.evaluate, problem, genes)
        child = _alone(take(offspring, jnp.argmax(offspring.fitness)))
        no_worse = child.fitness[0] >= parent.fitness[0]
        survivor = jax.tree.map(lambda new, old: jnp.where(no_worse, new, old), child, parent)
        return scored(state, survivor, offspring)


@dataclass(frozen=True)
class PBIL(FullScoring):
    """Population-based incremental learning: probabilities that learn from each generation's best.

    The population is what was drawn last. The probabilities of the parents start alike for every
    gene and learn from the first population too; they stay a distribution, and never become certain
    as long as there is mutation.

    Attributes:
        evaluate: `evaluate(problem, genes [M, ...]) -> fitness [M]` or `(fitness, aux)`.
        num_offspring: individuals M of a generation.
        learning_rate: how far probabilities move to the genes of the best.
        negative_learning_rate: how much farther, where the worst has another gene.
        mutation_rate: share of the genes whose probabilities are shifted at random.
        mutation_shift: how far they are.

    Example:
        >>> from megajax.search.loop import Limits, run
        >>> search = PBIL(lambda _, genes: genes[..., 1].sum(-1), num_offspring=16)
        >>> key, genes = jax.random.key(0), jax.nn.one_hot(jnp.zeros((16, 20), jnp.int32), 2)
        >>> state, _ = run(key, search, search.init(key, genes, None), None, Limits(60))
        >>> float(state.best.fitness)
        20.0

    Source: Baluja, "Population-based incremental learning", CMU-CS-94-163 (1994).
    """

    evaluate: Evaluate
    num_offspring: int
    learning_rate: float = 0.1
    negative_learning_rate: float = 0.075
    mutation_rate: float = 0.02
    mutation_shift: float = 0.05

    def init(self, key: Key, genes: Genes, problem: PyTree) -> State:
        """Scores the first population and learns from it.

        Raises:
            ConfigError: it has not as many individuals as a generation.
        """
        size = jax.tree.leaves(genes)[0].shape[0]
        if size != self.num_offspring:
            raise ConfigError(
                f"the first population has {size} individuals: this search needs as many as "
                f"offspring, {self.num_offspring}"
            )
        population = evaluated(self.evaluate, problem, genes)
        even = jax.tree.map(lambda leaf: jnp.full_like(leaf[0], 1 / leaf.shape[-1]), genes)
        return start(population, self._learnt(key, even, population))

    def step(self, key: Key, state: State, problem: PyTree) -> tuple[State, Record]:
        """Draws one generation and learns from it."""
        draw_key, learn_key = jax.random.split(key)
        keys = _keys(draw_key, state.memory)
        genes = jax.tree.map(self._drawn, keys, state.memory)
        offspring = evaluated(self.evaluate, problem, genes)
        memory = self._learnt(learn_key, state.memory, offspring)
        return scored(state, offspring, offspring, memory)

    def _drawn(self, key: Key, chance: jax.Array) -> jax.Array:
        shape = (self.num_offspring, *chance.shape[:-1])
        pick = jax.random.categorical(key, jnp.log(chance), shape=shape)
        return jax.nn.one_hot(pick, chance.shape[-1], dtype=chance.dtype)

    def _learnt(self, key: Key, chances: PyTree, population: Population) -> PyTree:
        """The probabilities after a generation; none of it finite teaches nothing but mutation."""
        finite = jnp.isfinite(population.fitness)
        best: Genes = take(population.genes, jnp.argmax(population.fitness))
        worst_place = jnp.argmin(jnp.where(finite, population.fitness, jnp.inf))
        worst: Genes = take(population.genes, worst_place)

        def learn(key: Key, chance: jax.Array, best: jax.Array, worst: jax.Array) -> jax.Array:
            hit_key, shift_key = jax.random.split(key)
            differ = (best != worst).any(axis=-1, keepdims=True)
            learnt = _towards(chance, best, self.learning_rate)
            learnt = jnp.where(differ, _towards(learnt, best, self.negative_learning_rate), learnt)
            chance = jnp.where(finite.any(), learnt, chance)
            hit = jax.random.bernoulli(hit_key, self.mutation_rate, (*chance.shape[:-1], 1))
            pick = operators.uniform_integers(shift_key, chance.shape[:-1], chance.shape[-1])
            goal = jax.nn.one_hot(pick, chance.shape[-1], dtype=chance.dtype)
            return jnp.where(hit, _towards(chance, goal, self.mutation_shift), chance)

        return jax.tree.map(learn, _keys(key, chances), chances, best, worst)


def _towards(chance: jax.Array, goal: jax.Array, rate: float) -> jax.Array:
    return (1 - rate) * chance + rate * goal


def _keys(key: Key, tree: PyTree) -> PyTree:
    """A key for each leaf."""
    treedef: Any = jax.tree.structure(tree)
    return treedef.unflatten(list(jax.random.split(key, treedef.num_leaves)))


def _alone(one: Population) -> Population:
    """A population of one."""
    return jax.tree.map(lambda leaf: leaf[None], one)


def one_plus_one(config: Any, tools: Tools) -> OnePlusOne:
    """The (1 + lambda) algorithm that a configuration section describes: one flip on average.

    Raises:
        ConfigError: genes that do not pick a parent.
    """
    _check(config, tools)
    rate = config.mutation_rate
    mutate = bind(operators.flip, rate=1 / tools.space.num_genes if rate is None else rate)
    return OnePlusOne(tools.evaluate, mutate, config.offspring or config.population_size)


def pbil(config: Any, tools: Tools) -> PBIL:
    """PBIL with the population size of a configuration section, and its learning rate.

    Raises:
        ConfigError: genes that do not pick a parent.
    """
    _check(config, tools)
    rate = config.learning_rate
    config.require(rate <= 1, "learning_rate", "that of probabilities is at most 1")
    search = PBIL(tools.evaluate, config.population_size, learning_rate=rate)
    return search


def _check(config: Any, tools: Tools) -> None:
    config.require(
        tools.space.picks, "method", "it is for genes that pick a parent: genome.binary=True"
    )
