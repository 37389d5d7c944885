"""Searches of evosax (CMA-ES, differential evolution, ...) over the same genes.

evosax is imported only when one of them runs (`pip install -e ".[searchers]"`).
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from megajax.errors import ConfigError, did_you_mean
from megajax.search.genetic import Evaluate, Space, Tools, evaluated
from megajax.search.loop import FullScoring, Record, State, scored, start
from megajax.search.operators import Population
from megajax.types import Genes, Key, PyTree

__all__ = ["Evosax", "from_config"]


@contextmanager
def _as_evosax_counts() -> Iterator[None]:
    """It mixes types and ranks, which JAX may have been told to refuse."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@dataclass(frozen=True)
class Evosax(FullScoring):
    """An algorithm of evosax over a space of genes.

    The first population is scored as it is given; a distribution-based algorithm then starts with
    its mean at the best of it, a population-based one with all of it. What the algorithm asks for
    is repaired, scored, and told back repaired: where good masks lie on the border of the simplex,
    told what it drew it would wander off to where all genes are repaired to the same ones. Fitness
    that is not finite counts as -inf and is never the best; a generation without any finite fitness
    teaches the algorithm nothing.

    Genes that are vectors of K coefficients which sum to one have K - 1 free numbers: those, along
    an orthonormal basis, are what the algorithm sees.

    Attributes:
        algorithm: name in `evosax.algorithms`, such as `CMA_ES`, `Sep_CMA_ES`,
            `DifferentialEvolution` or `PSO`.
        evaluate: `evaluate(problem, genes [M, ...]) -> fitness [M]` or `(fitness, aux)`, maximised
            (evosax minimises; the sign is changed here).
        space: what the genes mean.
        num_offspring: individuals M of a generation; the first population must have as many.
        scale: initial standard deviation of the algorithms that have one.
        options: keyword arguments of the class, as pairs.
        parameters: fields of its `default_params` to replace, as pairs.

    Source: Lange, "evosax: JAX-based evolution strategies", GECCO 2023, arXiv 2212.04180.
    """

    algorithm: str
    evaluate: Evaluate
    space: Space
    num_offspring: int
    scale: float = 0.3
    options: tuple[tuple[str, Any], ...] = ()
    parameters: tuple[tuple[str, Any], ...] = ()

    @_as_evosax_counts()
    def init(self, key: Key, genes: Genes, problem: PyTree) -> State:
        """Scores the first population and starts the algorithm from it.

        Raises:
            ConfigError: evosax is not installed, has no such algorithm, or refuses the choices; or
                the first population has another size.
        """
        size = jax.tree.leaves(genes)[0].shape[0]
        if size != self.num_offspring:
            raise ConfigError(
                f"the first population has {size} individuals: this search needs as many as "
                f"offspring, {self.num_offspring}"
            )
        state = start(evaluated(self.evaluate, problem, genes))
        strategy, fixed = self._built(genes)
        encode, _ = self._coordinates()
        if self._population_based(strategy):
            cost = -state.population.fitness  # evosax minimises; inf is the worst
            memory = strategy.init(key, encode(genes), cost, fixed)
        else:
            memory = strategy.init(key, encode(state.best.genes), fixed)
        # Python's own numbers, which would have another type after the first step.
        memory = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), memory)
        return state._replace(memory=memory)

    @_as_evosax_counts()
    def step(self, key: Key, state: State, problem: PyTree) -> tuple[State, Record]:
        """Asks the algorithm for a generation, scores it and tells the algorithm."""
        ask_key, tell_key = jax.random.split(key)
        strategy, fixed = self._built(state.population.genes)
        encode, decode = self._coordinates()
        asked, memory = strategy.ask(ask_key, state.memory, fixed)
        genes = self.space.repair(decode(asked))
        offspring: Population = evaluated(self.evaluate, problem, genes)
        finite = jnp.isfinite(offspring.fitness)
        # What may be weighed into a mean has to be a number; what joins a population must not win.
        worst = -jnp.min(offspring.fitness, where=finite, initial=jnp.inf)
        failed = jnp.inf if self._population_based(strategy) else worst
        cost = jnp.where(finite, -offspring.fitness, failed)
        told, _ = strategy.tell(tell_key, encode(genes), cost, memory, fixed)
        memory = jax.tree.map(
            lambda new, old: jnp.where(finite.any(), new, old).astype(old.dtype), told, state.memory
        )
        return scored(state, offspring, offspring, memory)

    def _coordinates(self) -> tuple[Callable[[Genes], Genes], Callable[[Genes], Genes]]:
        """To the numbers that are free to vary, and back."""
        if not getattr(self.space, "sums_to_one", False):
            return (lambda genes: genes), (lambda genes: genes)

        def encode(leaf: jax.Array) -> jax.Array:
            return leaf @ jnp.asarray(_helmert(leaf.shape[-1]).T, leaf.dtype)

        def decode(leaf: jax.Array) -> jax.Array:
            K = leaf.shape[-1] + 1
            return leaf @ jnp.asarray(_helmert(K), leaf.dtype) + 1 / K

        return partial(jax.tree.map, encode), partial(jax.tree.map, decode)

    def _population_based(self, strategy: Any) -> bool:
        names = set(inspect.signature(strategy.init).parameters)
        if not {"mean", "population"} & names:
            raise ConfigError(
                f"searcher {self.algorithm} starts neither from a mean nor from a population"
            )
        return "population" in names

    def _built(self, genes: Genes) -> tuple[Any, Any]:
        """The evosax object and its parameters."""
        kind: Any = _algorithm(self.algorithm)
        one = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), genes)
        encode, _ = self._coordinates()
        options, parameters = dict(self.options), dict(self.parameters)
        if "std_schedule" in inspect.signature(kind).parameters:
            options.setdefault("std_schedule", optax.constant_schedule(self.scale))
        try:
            strategy = kind(population_size=self.num_offspring, solution=encode(one), **options)
            fixed = strategy.default_params
            if hasattr(fixed, "std_init"):
                parameters.setdefault("std_init", jnp.asarray(self.scale))
            return strategy, fixed.replace(**parameters)
        except (AssertionError, TypeError, ValueError) as error:
            raise ConfigError(f"searcher {self.algorithm}: {error}") from None


def from_config(config: Any, tools: Tools, *, algorithm: str) -> Evosax:
    """An algorithm of evosax with the population size of a configuration section."""
    _algorithm(algorithm)
    return Evosax(algorithm, tools.evaluate, tools.space, config.population_size)


def is_installed() -> bool:
    """Whether evosax can be imported."""
    return importlib.util.find_spec("evosax") is not None


def _algorithm(name: str) -> type:
    try:
        from evosax.algorithms import algorithms
    except ImportError:
        raise ConfigError(
            "evosax is not installed: pip install -e '.[searchers]' for its algorithms"
        ) from None
    known: dict[str, type] = algorithms
    if name not in known:
        hint = did_you_mean(name, known, f"there are {', '.join(known)}")
        raise ConfigError(f"evosax has no algorithm {name!r}; {hint}")
    return known[name]


def _helmert(size: int) -> np.ndarray:
    """An orthonormal basis of the vectors that sum to zero, `[size - 1, size]`."""
    rows = np.tril(np.ones((size, size)), -1)[1:]
    rows -= np.diag(np.arange(size))[1:]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
