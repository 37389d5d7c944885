"""Other searches over the same genes, with the same `init` and `step` as the genetic algorithm.

`megajax.search.genetic.run` drives them unchanged, so that budgets, histories and callbacks are those of
the genetic algorithm, and so is the promise: the first population holds the parents and the best
individual is kept, so the result is never worse than the best parent. evosax is imported only when
one of its algorithms is asked for (`pip install "megajax[searchers]"`).
"""

from __future__ import annotations

import difflib
import inspect
import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from scipy.linalg import helmert

from megajax.errors import ConfigError
from megajax.merging.fitness import Evaluate
from megajax.merging.genome import Genome
from megajax.search import operators
from megajax.search.genetic import (
    GAInfo,
    GAState,
    GeneticAlgorithm,
    best_ever,
    describe,
    evaluated,
    genetic_algorithm,
)
from megajax.search.operators import Population
from megajax.types import Genes, Key, PyTree

__all__ = ["SearchState", "best_point", "from_evosax", "random_search", "simplex_lattice"]


def simplex_lattice(num_parents: int, limit: int) -> np.ndarray:
    """Mixing coefficients that cover the simplex evenly: for two parents, the straight line.

    All points whose coefficients are multiples of 1 / m, for the largest m that keeps within the
    limit: parents first, then their mean, then the others (a {K, m} simplex-lattice design).

    Args:
        num_parents: K, at least 2.
        limit: the largest number of points, at least K + 1.

    Returns:
        Coefficients `[M, K]` float32, M <= limit.

    Raises:
        ConfigError: the limit does not even allow the parents and their mean.

    Example:
        >>> simplex_lattice(2, 5).tolist()
        [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.25, 0.75], [0.75, 0.25]]

    Source: Scheffe, "Experiments with mixtures", J. Royal Statistical Society B 20 (1958).
    """
    K = num_parents

    def size(m: int) -> int:
        return math.comb(m + K - 1, K - 1) + (m % K != 0)

    if limit < size(1):
        raise ConfigError(
            f"baselines.budget is {limit}: {K} parents and their mean need at least {size(1)}"
        )
    m = next(m for m in itertools.count(1) if size(m + 1) > limit)
    bars = np.array(list(itertools.combinations(range(m + K - 1), K - 1)), np.int64)
    edges = np.pad(bars, ((0, 0), (1, 1)), constant_values=((0, 0), (-1, m + K - 1)))
    counts = np.diff(edges, axis=1) - 1
    inner = counts[(counts.max(axis=1) < m) & (counts * K != m).any(axis=1)]
    return np.concatenate([np.eye(K), np.full((1, K), 1 / K), inner / m]).astype(np.float32)


def best_point(evaluate: Evaluate, genes: Genes, *, batch_size: int) -> tuple[Genes, np.ndarray]:
    """Scores given individuals, however many, and takes the best.

    Args:
        evaluate: `evaluate(genes [P, ...]) -> (fitness [P], aux)`, maximised.
        genes: leaves `[M, ...]`.
        batch_size: individuals in one call.

    Returns:
        The genes of the best (the first of equal ones), and the fitness `[M]` of all; -inf where it
        is no finite number.

    Example:
        >>> evaluate = lambda genes: (-jnp.abs(genes - 0.6), ())
        >>> float(best_point(evaluate, jnp.linspace(0, 1, 5), batch_size=2)[0])
        0.5
    """
    scored = evaluate if isinstance(evaluate, Partial) else Partial(evaluate)
    count = jax.tree.leaves(genes)[0].shape[0]
    size = min(batch_size, count)
    parts = []
    for start in range(0, count, size):
        indices = jnp.minimum(start + jnp.arange(size), count - 1)  # the last batch may repeat one
        parts.append(np.asarray(_fitness(scored, operators.take(genes, indices))))
    fitness = np.concatenate(parts)[:count]
    return operators.take(genes, jnp.asarray(fitness.argmax())), fitness


@jax.jit
def _fitness(evaluate: Evaluate, genes: Genes) -> jax.Array:
    return evaluated(evaluate, genes).fitness


def random_search(evaluate: Evaluate, genome: Genome, *, num_offspring: int) -> GeneticAlgorithm:
    """Random search: the control that every genetic algorithm owes.

    Each generation draws anew from what the genetic algorithm's first population is drawn from
    (masks around one parent each, from close to it to entirely random), so that what selection and
    variation add is all that is left between the two.

    Args:
        evaluate: `evaluate(genes [M, ...]) -> (fitness [M], aux)`, maximised.
        genome: what the genes mean.
        num_offspring: individuals M of a generation, at least as many as `genome.init` needs.

    Returns:
        The algorithm; its population is the best individuals so far.

    Raises:
        ConfigError: there are too few offspring.

    Example:
        >>> from megajax.merging.genome import masks
        >>> genome = masks({"w": jnp.zeros((2, 3))}, granularity="element")
        >>> evaluate = lambda genes: (genes[:, :, 0].min(axis=1), ())
        >>> search = random_search(evaluate, genome, num_offspring=8)
        >>> state = search.init(jax.random.key(0), genome.init(jax.random.key(1), 8))
        >>> state, info = search.step(jax.random.key(2), state)
        >>> int(info.evaluations), float(info.best_ever)
        (16, 1.0)
    """
    _one(genome, num_offspring)  # raises for too few

    def draw(key: Key, genes: Genes) -> Genes:
        del genes
        drawn = genome.init(key, 2 * num_offspring)
        return jax.tree.map(lambda leaf: leaf[num_offspring:], drawn)  # parents and mean come first

    return genetic_algorithm(
        evaluate,
        num_offspring=num_offspring,
        cross=lambda key, first, second: first,
        mutate=draw,
        repair=genome.repair,
    )


class SearchState(NamedTuple):
    """The state of a library's search, with the fields of `megajax.search.genetic.GAState`.

    Attributes:
        population: the individuals that were scored last.
        best: the best individual ever seen, without a population axis.
        generation: generations done, int32.
        evaluations: networks scored so far, int32.
        stale: generations since the best last improved, int32.
        completed: networks scored on all examples so far, which all of them are, int32.
        strategy: what the library's algorithm carries.
    """

    population: Population
    best: Population
    generation: jax.Array
    evaluations: jax.Array
    stale: jax.Array
    completed: jax.Array
    strategy: PyTree


def from_evosax(
    algorithm: str | type,
    evaluate: Evaluate,
    genome: Genome,
    *,
    num_offspring: int,
    scale: float = 0.3,
    options: Mapping[str, Any] | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> GeneticAlgorithm:
    """An algorithm of evosax (CMA-ES, differential evolution, ...) over a genome.

    The first population is scored as it is given; a distribution-based algorithm then starts with
    its mean at the best of it, a population-based one with all of it. What the algorithm asks for
    is repaired, scored, and told back repaired: where good masks lie on the border of the simplex,
    told what it drew it would wander off to where all genes are repaired to the same ones. Fitness
    that is not finite counts as -inf and is never the best; a generation without any finite fitness
    teaches the algorithm nothing.

    Genes that are vectors of K coefficients (`gene_ndim` 1) sum to one and so have K - 1 free
    numbers: those, along an orthonormal basis, are what the algorithm sees.

    Args:
        algorithm: name in `evosax.algorithms`, such as `CMA_ES`, `Sep_CMA_ES`,
            `DifferentialEvolution` or `PSO`; or the class.
        evaluate: `evaluate(genes [M, ...]) -> (fitness [M], aux)`, maximised (evosax minimises; the
            sign is changed here).
        genome: what the genes mean.
        num_offspring: individuals M of a generation; the first population must have as many.
        scale: initial standard deviation of the algorithms that have one.
        options: keyword arguments of the class.
        parameters: fields of its `default_params` to replace.

    Returns:
        The algorithm.

    Raises:
        ConfigError: evosax is not installed, has no such algorithm, or refuses the choices; or the
            first population has another size.

    Example:
        >>> from megajax.search.genetic import run
        >>> from megajax.merging.genome import masks
        >>> genome = masks({"w": jnp.zeros((2, 3))}, granularity="element")
        >>> evaluate = lambda genes: (-jnp.sum((genes[:, :, 0] - 0.3) ** 2, axis=1), ())
        >>> search = from_evosax("Sep_CMA_ES", evaluate, genome, num_offspring=8)
        >>> key = jax.random.key(0)
        >>> state, _ = run(key, search, search.init(key, genome.init(key, 8)), 30)
        >>> bool(state.best.fitness > -1e-3)
        True

    Source: Lange, "evosax: JAX-based evolution strategies", GECCO 2023, arXiv 2212.04180.
    """
    encode, decode = _coordinates(genome)
    one = _one(genome, num_offspring)
    strategy, fixed = _build(
        algorithm, num_offspring, encode(one), scale, dict(options or {}), dict(parameters or {})
    )
    names = inspect.signature(strategy.init).parameters
    if not {"mean", "population"} & set(names):
        name = type(strategy).__name__
        raise ConfigError(f"searcher {name} starts neither from a mean nor from a population")
    population_based = "population" in names
    search = _Search(strategy, encode, decode, genome.repair, num_offspring, population_based)
    scored = evaluate if isinstance(evaluate, Partial) else Partial(evaluate)
    return GeneticAlgorithm(
        Partial(partial(_init, search), scored, fixed),
        Partial(partial(_step, search), scored, fixed),
        num_offspring,
    )


class _Search(NamedTuple):
    strategy: Any
    encode: Callable[[Genes], Genes]
    decode: Callable[[Genes], Genes]
    repair: Callable[[Genes], Genes]
    num_offspring: int
    population_based: bool


@partial(jax.jit, static_argnums=0)
def _init(
    search: _Search, evaluate: Evaluate, fixed: PyTree, key: Key, genes: Genes
) -> SearchState:
    size = jax.tree.leaves(genes)[0].shape[0]
    if size != search.num_offspring:
        raise ConfigError(
            f"the first population has {size} individuals: this search needs as many as offspring, "
            f"{search.num_offspring}"
        )
    population = evaluated(evaluate, genes)
    best: Population = operators.take(population, jnp.argmax(population.fitness))
    if search.population_based:
        cost = -population.fitness  # evosax minimises; inf is the worst
        strategy = search.strategy.init(key, search.encode(genes), cost, fixed)
    else:
        strategy = search.strategy.init(key, search.encode(best.genes), fixed)
    # Python's own numbers, which would have another type after the first step.
    strategy = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), strategy)
    zero = jnp.zeros((), jnp.int32)
    return SearchState(population, best, zero, zero + size, zero, zero + size, strategy)


def _step(
    search: _Search, evaluate: Evaluate, fixed: PyTree, key: Key, state: SearchState
) -> tuple[SearchState, GAInfo]:
    ask_key, tell_key = jax.random.split(key)
    asked, strategy = search.strategy.ask(ask_key, state.strategy, fixed)
    genes = search.repair(search.decode(asked))
    offspring = evaluated(evaluate, genes)
    finite = jnp.isfinite(offspring.fitness)
    # What may be weighed into a mean has to be a number; what joins a population must not win.
    worst = -jnp.min(offspring.fitness, where=finite, initial=jnp.inf)
    failed = jnp.inf if search.population_based else worst
    cost = jnp.where(finite, -offspring.fitness, failed)
    told, _ = search.strategy.tell(tell_key, search.encode(genes), cost, strategy, fixed)
    strategy = jax.tree.map(
        lambda new, old: jnp.where(finite.any(), new, old).astype(old.dtype), told, state.strategy
    )

    best, improved = best_ever(offspring, state.best)
    state = SearchState(
        offspring,
        best,
        state.generation + 1,
        state.evaluations + search.num_offspring,
        jnp.where(improved, 0, state.stale + 1),
        state.completed + search.num_offspring,
        strategy,
    )
    return state, describe(GAState(*state[:6]), jnp.sum(~finite), jnp.sum(finite))


def _one(genome: Genome, population_size: int) -> Genes:
    """Genes of one individual, all zero; raises if a first population cannot be so small."""
    genes = jax.eval_shape(lambda: genome.init(jax.random.key(0), population_size))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), genes)


def _coordinates(genome: Genome) -> tuple[Callable[[Genes], Genes], Callable[[Genes], Genes]]:
    """To the numbers that are free to vary, and back."""
    if genome.gene_ndim != 1:
        return (lambda genes: genes), (lambda genes: genes)

    def encode(leaf: jax.Array) -> jax.Array:
        return leaf @ jnp.asarray(helmert(leaf.shape[-1]).T, leaf.dtype)

    def decode(leaf: jax.Array) -> jax.Array:
        K = leaf.shape[-1] + 1
        return leaf @ jnp.asarray(helmert(K), leaf.dtype) + 1 / K

    return partial(jax.tree.map, encode), partial(jax.tree.map, decode)


def _build(
    algorithm: str | type,
    num_offspring: int,
    one: Genes,
    scale: float,
    options: dict[str, Any],
    parameters: dict[str, Any],
) -> tuple[Any, Any]:
    """The evosax object and its parameters."""
    try:
        from evosax import algorithms as library
    except ImportError:
        raise ConfigError(
            "evosax is not installed: pip install 'megajax[searchers]' for its algorithms"
        ) from None
    known: dict[str, type] = library.algorithms
    if isinstance(algorithm, str) and algorithm not in known:
        near = difflib.get_close_matches(algorithm, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise ConfigError(f"evosax has no algorithm {algorithm!r}; {hint}")
    kind: Any = known[algorithm] if isinstance(algorithm, str) else algorithm
    if "std_schedule" in inspect.signature(kind).parameters:
        options.setdefault("std_schedule", optax.constant_schedule(scale))
    try:
        strategy = kind(population_size=num_offspring, solution=one, **options)
        fixed = strategy.default_params
        if hasattr(fixed, "std_init"):
            parameters.setdefault("std_init", jnp.asarray(scale))
        return strategy, fixed.replace(**parameters)
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"searcher {kind.__name__}: {error}") from None
