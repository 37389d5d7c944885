"""What a baseline is, what it may use, and the list of all of them.

A baseline is a function of what is given and a registry entry beside it; it knows how a network is
scored by `Given` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from megajax.baselines.leaves import on_weights
from megajax.errors import ParentsError
from megajax.merging.problem import Problem, scores_of
from megajax.program.batchnorm import recalibrate
from megajax.search.methods import EvolutionConfig
from megajax.types import ApplyFn, Key, PyTree

__all__ = ["BASELINES", "NEEDS", "Baseline", "Given", "Result", "baseline"]

NEEDS = {
    "two parents": "exactly two parents",
    "calibration": "calibration inputs",
    "labels": "class labels",
    "base": "a base network",
    "evosax": "evosax (pip install -e '.[searchers]')",
}
"""What a baseline may be unable to do without, in words."""


class Given(NamedTuple):
    """What a baseline may use.

    Attributes:
        apply_fn: the network.
        parents: K variable pytrees.
        base: the network that the parents were trained from, or None.
        inputs: K arrays, training inputs of each parent; None if there are none.
        statistics: paths of the BatchNorm statistics.
        problem: the masks that a search searches, and the tasks that every network is scored on.
        line: the same with one coefficient for each parent.
        budget: networks that a search may score.
        evolution: whose population size the searches have.
    """

    apply_fn: ApplyFn
    parents: Sequence[PyTree]
    base: PyTree | None
    inputs: Sequence[Any] | None
    statistics: frozenset[str]
    problem: Problem
    line: Problem
    budget: int
    evolution: EvolutionConfig

    def score(self, variables: PyTree) -> float:
        """The fitness of one network; what is no finite number counts as -inf."""
        value = float(scores_of(self.problem, variables)[0])
        return value if math.isfinite(value) else -math.inf

    def prepared(self, variables: PyTree) -> PyTree:
        """A merged network as it is scored and returned: its statistics measured anew, or not."""
        if self.problem.calibration is None:
            return variables
        named = self.problem.statistics
        return _recalibrated(self.apply_fn, variables, self.problem.calibration, named)

    def merged(self, method: Callable[..., PyTree], *others: PyTree) -> PyTree:
        """What a method makes of the parents, prepared; BatchNorm statistics are averaged.

        Args:
            method: `method(parents, *others) -> variables`; a module-level function or a `Bound`,
                which is compiled once for all parents of equal shapes.
            *others: what else it takes, as in `megajax.baselines.leaves.on_weights`.
        """
        parents = list(self.parents)
        return self.prepared(_applied(method, self.statistics, parents, *others))


class Result(NamedTuple):
    """A network that a baseline made, and what that took.

    Attributes:
        variables: the network, a pytree like each parent.
        evaluations: networks that were scored on the validation data.
        examples: network x example evaluations.
        detail: what was chosen: `fitness`, `parent`, `members`, `weights` or `scale`.
    """

    variables: PyTree
    evaluations: int = 0
    examples: int = 0
    detail: Mapping[str, Any] = {}


class Baseline(NamedTuple):
    """A method.

    Attributes:
        run: `run(key, given) -> result`.
        needs: keys of `NEEDS`.
        summary: what it does, in a line.
        reference: where it comes from.
        default: whether it is one of the `default` names.
        searches: whether it scores as many networks as its budget allows.
    """

    run: Callable[[Key, Given], Result]
    needs: frozenset[str]
    summary: str
    reference: str
    default: bool = False
    searches: bool = False


BASELINES: dict[str, Baseline] = {}
"""The baselines by the names that the configuration gives them."""


def baseline(
    name: str,
    summary: str,
    reference: str,
    *,
    needs: Sequence[str] = (),
    default: bool = False,
    searches: bool = False,
) -> Callable[[Callable[[Key, Given], Result]], Callable[[Key, Given], Result]]:
    """Lists a function `(key, given) -> Result` as a baseline. See `Baseline` for the arguments.

    Example:
        >>> @baseline("first_parent", "the first parent, whatever it is worth", "-")
        ... def first_parent(key, given):
        ...     return Result(given.parents[0])
        >>> BASELINES.pop("first_parent").summary
        'the first parent, whatever it is worth'
    """

    def listed(run: Callable[[Key, Given], Result]) -> Callable[[Key, Given], Result]:
        BASELINES[name] = Baseline(run, frozenset(needs), summary, reference, default, searches)
        return run

    return listed


def best_of(networks: Any, score: Callable[[PyTree], float]) -> tuple[PyTree, int, list[float]]:
    """The network with the highest score (of equal ones the first), its number and all scores.

    Args:
        networks: made one at a time if it is a generator.
        score: of one network, maximised; what is no finite number counts as -inf.

    Raises:
        ParentsError: there are no networks.

    Example:
        >>> best_of([1.0, 3.0, 2.0], float)
        (3.0, 1, [1.0, 3.0, 2.0])
    """
    best: PyTree = None
    scores: list[float] = []
    for variables in networks:
        value = score(variables)
        scores.append(value if math.isfinite(value) else -math.inf)
        if np.argmax(scores) == len(scores) - 1:
            best = variables
    if not scores:
        raise ParentsError("there are no networks to choose from")
    return best, int(np.argmax(scores)), scores


@baseline("best_parent", "the parent that is best on the validation data", "-", default=True)
def _best_parent(key: Key, given: Given) -> Result:
    variables, number, scores = best_of(given.parents, given.score)
    return Result(variables, len(scores), detail={"parent": number, "fitness": scores[number]})


_recalibrated = jax.jit(recalibrate, static_argnums=(0, 3))


@partial(jax.jit, static_argnums=(0, 1))
def _applied(
    method: Callable[..., PyTree], statistics: frozenset[str], parents: Any, *others: Any
) -> PyTree:
    return on_weights(method, statistics, parents, *others)
