"""Choices made on validation data, one network at a time: the best parent, the greedy soup."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from megajax.baselines.averages import uniform_average
from megajax.baselines.given import Given, Result, baseline, best_of
from megajax.types import Key, PyTree

__all__ = ["Soup", "greedy_soup"]


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


def greedy_soup(
    parents: Sequence[PyTree],
    score: Callable[[PyTree], float],
    average: Callable[[Sequence[PyTree]], PyTree] = uniform_average,
) -> Soup:
    """Adds parents to an average, best first, as long as the score does not fall.

    Args:
        parents: K variable pytrees.
        score: of one network, maximised; validation accuracy in the paper. What is no finite number
            counts as -inf.
        average: of several networks.

    Returns:
        The soup; 2 K - 1 networks were scored. Its score is never below the best parent's.

    Raises:
        ParentsError: the parents differ in structure or shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> parents = [{"w": jnp.array(w)} for w in (1.0, 9.0, 3.0)]
        >>> greedy_soup(parents, lambda network: -abs(float(network["w"]) - 2)).members
        [0, 2]

    Source: Wortsman et al., "Model soups", ICML 2022, arXiv 2203.05482, recipe 1.
    """
    variables, best, scores = best_of(parents, score)
    order = sorted(range(len(parents)), key=lambda k: -scores[k])
    members, highest = [best], scores[best]
    for k in order[1:]:
        candidate = average([parents[i] for i in [*members, k]])
        reached = score(candidate)
        if reached >= highest:
            variables, highest = candidate, reached
            members.append(k)
    return Soup(variables, members, highest, 2 * len(parents) - 1)


@baseline(
    "greedy_soup",
    "the mean of those parents that do not make it worse, best first",
    "Wortsman et al., arXiv 2203.05482",
    default=True,
)
def _greedy_soup(key: Key, given: Given) -> Result:
    def average(parents: Sequence[PyTree]) -> PyTree:
        return given._replace(parents=parents).merged(uniform_average)

    soup = greedy_soup(given.parents, given.score, average)
    detail = {"members": soup.members, "fitness": soup.score}
    return Result(soup.variables, soup.evaluations, detail=detail)
