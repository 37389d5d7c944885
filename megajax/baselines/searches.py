"""Searches as baselines: the straight line, and every other method at the evolution's cost."""

from __future__ import annotations

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from megajax.baselines.given import Given, Result, baseline
from megajax.errors import ConfigError
from megajax.merging.merge import searched
from megajax.merging.problem import Problem, evaluate, expressed
from megajax.search.genetic import evaluated
from megajax.types import Genes, Key

__all__ = ["best_point", "simplex_lattice"]


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


def best_point(problem: Problem, genes: Genes, batch_size: int) -> tuple[Genes, np.ndarray]:
    """Scores given individuals, however many, and takes the best.

    Args:
        problem: the problem.
        genes: leaves `[M, ...]`.
        batch_size: individuals in one call.

    Returns:
        The genes of the best (the first of equal ones), and the fitness `[M]` of all; -inf where it
        is no finite number.
    """
    count = jax.tree.leaves(genes)[0].shape[0]
    size = min(batch_size, count)
    parts = []
    for start in range(0, count, size):
        rows = np.minimum(start + np.arange(size), count - 1)  # the last batch may repeat one
        parts.append(np.asarray(_fitness(problem, jax.tree.map(lambda x, r=rows: x[r], genes))))
    fitness = np.concatenate(parts)[:count]
    return jax.tree.map(lambda leaf: leaf[fitness.argmax()], genes), fitness


@jax.jit
def _fitness(problem: Problem, genes: Genes) -> jax.Array:
    return evaluated(evaluate, problem, genes).fitness


@baseline(
    "line",
    "the best point of the straight line, or of the simplex of three parents and more",
    "Scheffe, J. R. Stat. Soc. B 20 (1958)",
    default=True,
    searches=True,
)
def _line(key: Key, given: Given) -> Result:
    points = simplex_lattice(len(given.parents), given.budget)
    genes, fitness = best_point(given.line, points[:, None], given.evolution.population_size)
    variables = expressed(given.line, jnp.asarray(genes))
    detail = {"weights": genes[0].tolist(), "fitness": float(fitness.max())}
    return Result(variables, len(points), detail=detail)


def _searched(method: str, key: Key, given: Given) -> Result:
    """Another method over the same masks, from a first population like the evolution's."""
    size = given.evolution.population_size
    if given.budget < size:
        raise ConfigError(
            f"baselines.budget is {given.budget}: the first population alone needs {size}"
        )
    evolution = given.evolution.replace(
        method=method,
        generations=given.budget // size,
        evaluation_budget=given.budget,
        patience=None,
        time_budget=None,
    )
    found = searched(key, given.problem, evolution)
    detail = {"fitness": float(found.best.fitness)}
    evaluations = int(found.counts.networks)
    return Result(expressed(given.problem, found.best.genes), evaluations, detail=detail)


baseline(
    "random_search",
    "the best of as many random masks as the evolution scored",
    "-",
    default=True,
    searches=True,
)(partial(_searched, "random"))
baseline(
    "cma_es",
    "CMA-ES over the masks; the covariance of all genes limits it to some thousand genes",
    "Hansen, arXiv 1604.00772",
    needs=("evosax",),
    searches=True,
)(partial(_searched, "cma_es"))
baseline(
    "sep_cma_es",
    "CMA-ES with a diagonal covariance over the masks",
    "Ros and Hansen, PPSN 2008",
    needs=("evosax",),
    searches=True,
)(partial(_searched, "sep_cma_es"))
baseline(
    "differential_evolution",
    "differential evolution over the masks",
    "Storn and Price, J. Global Optimization 11 (1997)",
    needs=("evosax",),
    searches=True,
)(partial(_searched, "differential_evolution"))
