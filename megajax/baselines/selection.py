"""Choices made on validation data, one network at a time: the best parent, the greedy soup.

Knows a network only as a score; `scorer` makes one from a network function, a metric and data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import jax

from megajax.baselines.averages import uniform_average
from megajax.errors import ParentsError
from megajax.merging.fitness import Batches, Metric, example_scores
from megajax.types import ApplyFn, PyTree

__all__ = ["Choice", "Score", "Soup", "best_of", "best_parent", "greedy_soup", "scorer"]

Score: TypeAlias = Callable[[PyTree], float]
"""The score of one network, maximised; no finite number counts as -inf."""


class Choice(NamedTuple):
    """The best of several networks.

    Attributes:
        variables: the network.
        number: which one it is.
        scores: of all of them, in their order; as many as were evaluated.
    """

    variables: PyTree
    number: int
    scores: list[float]


class Soup(NamedTuple):
    """A greedy soup.

    Attributes:
        variables: the mean of its members.
        members: their numbers, in the order in which they were added.
        score: of the soup.
        evaluations: networks that were scored.
    """

    variables: PyTree
    members: list[int]
    score: float
    evaluations: int


def scorer(apply_fn: ApplyFn, metric: Metric, data: Batches) -> Score:
    """The mean of a metric over examples, for one network after another; compiled once.

    Args:
        apply_fn: the network.
        metric: `(logits [b, C], labels [b]) -> scores [b]`, maximised.
        data: the examples.

    Returns:
        `score(variables) -> float`.

    Example:
        >>> import numpy as np
        >>> from megajax.merging.fitness import accuracy, batches
        >>> score = scorer(lambda w, x: x @ w, accuracy, batches(np.eye(3), np.arange(3), 2))
        >>> score(np.eye(3)), score(-np.eye(3))
        (1.0, 0.0)
    """
    count = int(data.valid.sum())
    return lambda variables: float(_total(apply_fn, metric, variables, data)) / count


@partial(jax.jit, static_argnums=(0, 1))
def _total(apply_fn: ApplyFn, metric: Metric, variables: PyTree, data: Batches) -> jax.Array:
    return example_scores(apply_fn, metric, variables, data).sum()


def best_of(networks: Iterable[PyTree], score: Score) -> Choice:
    """The network with the highest score; of equal ones, the first.

    Args:
        networks: at least one; made one at a time if it is a generator.
        score: see `Score`.

    Returns:
        The choice.

    Raises:
        ParentsError: there are no networks.

    Example:
        >>> best_of([1.0, 3.0, float("nan")], lambda network: network).number
        1
    """
    best: tuple[PyTree, int] | None = None
    scores: list[float] = []
    for number, variables in enumerate(networks):
        scores.append(_finite(score(variables)))
        if best is None or scores[number] > scores[best[1]]:
            best = variables, number
    if best is None:
        raise ParentsError("there are no networks to choose from")
    return Choice(*best, scores)


def best_parent(parents: Sequence[PyTree], score: Score) -> Choice:
    """The best parent on the data of the score: what not merging at all gives.

    Args:
        parents: K variable pytrees.
        score: see `Score`.

    Returns:
        The choice; K networks were scored.

    Example:
        >>> best_parent([{"w": 1.0}, {"w": 2.0}], lambda parent: parent["w"]).variables
        {'w': 2.0}
    """
    return best_of(parents, score)


def greedy_soup(
    parents: Sequence[PyTree],
    score: Score,
    *,
    prepare: Callable[[PyTree], PyTree] = lambda variables: variables,
) -> Soup:
    """Adds parents to an average, best first, as long as the score does not fall.

    Args:
        parents: K variable pytrees.
        score: see `Score`; validation accuracy in the paper.
        prepare: done to every average before it is scored, such as recalibration.

    Returns:
        The soup; 2 K - 1 networks were scored. Its score is never below the best parent's.

    Raises:
        ParentsError: there are no parents, or they differ in structure or shapes.

    Example:
        >>> score = lambda w: -abs(float(w) - 1.1)
        >>> greedy_soup([0.0, 5.0, 2.0], score).members
        [2, 0]

    Source: Wortsman et al., "Model soups", ICML 2022, arXiv 2203.05482, recipe 1.
    """
    variables, best, scores = best_parent(parents, score)
    order = sorted(range(len(parents)), key=lambda k: -scores[k])
    members, highest = [best], scores[best]
    for k in order[1:]:
        candidate = prepare(uniform_average([parents[i] for i in [*members, k]]))
        reached = _finite(score(candidate))
        if reached >= highest:
            variables, highest = candidate, reached
            members.append(k)
    return Soup(variables, members, highest, 2 * len(parents) - 1)


def _finite(score: float) -> float:
    return score if math.isfinite(score) else -math.inf
