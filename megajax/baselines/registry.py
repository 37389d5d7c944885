"""One function that runs the baselines that apply, and the section that names them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any

import jax
import numpy as np

from megajax.alignment import AlignConfig
from megajax.baselines.given import BASELINES, NEEDS, Given, Result
from megajax.baselines.leaves import statistic_paths
from megajax.entry import check_inputs
from megajax.errors import ConfigError, ParentsError
from megajax.keys import as_key, named_key
from megajax.merging.genome import Genome, GenomeConfig, make_genome
from megajax.merging.merge import (
    aligned_parents,
    first_examples,
    problem_of,
    search_of,
    tasks_of,
    with_reference,
    with_unmixed,
)
from megajax.merging.problem import FitnessConfig, Problem, RecalibrateConfig, with_genome
from megajax.search import evosax
from megajax.search.methods import EvolutionConfig
from megajax.sections import Section, at_least, one_of
from megajax.trees import checked_base, checked_parents
from megajax.types import ApplyFn, Key, PyTree

__all__ = ["BaselinesConfig", "applicable", "run_baselines", "table"]

_Name = Annotated[str, one_of(BASELINES)]


class BaselinesConfig(Section):
    """What the merged network is compared with.

    Attributes:
        names: methods of `megajax.baselines.BASELINES`, where one that cannot be applied is an
            error; or one name; or `default` (the few most telling ones) or `all`, without those
            that need something that is missing (a base network, exactly two parents).
        budget: networks that a search over masks or the straight line may score; None takes as many
            as the evolution did.
        examples: training inputs of each parent that Fisher and RegMean measure on.
    """

    section = "baselines"
    names: Annotated[str, one_of(BASELINES, "default", "all")] | tuple[_Name, ...] = "default"
    budget: Annotated[int, at_least(1)] | None = None
    examples: Annotated[int, at_least(1)] = 256


def run_baselines(
    key: Key | int,
    apply_fn: ApplyFn,
    parents: Sequence[PyTree],
    data: Any,
    *,
    calibration: PyTree | None = None,
    parent_inputs: Sequence[PyTree] | None = None,
    base: PyTree | None = None,
    config: BaselinesConfig | None = None,
    align: AlignConfig | str | None = None,
    recalibrate: RecalibrateConfig | None = None,
    genome: GenomeConfig | Genome | None = None,
    fitness: FitnessConfig | None = None,
    evolution: EvolutionConfig | None = None,
    labels: PyTree | None = None,
    keep: Mapping[str, int] | None = None,
    budget: int | None = None,
    callback: Callable[[str], bool | None] | None = None,
) -> dict[str, Result]:
    """Runs the baselines that the configuration names, on one set of parents.

    All that choose by validation use the metric of `fitness`, and the searches the genes, the first
    population and the recalibration of `genome`, `evolution` and `recalibrate`: what `merge` was
    given. For a genome of weights the searches take channel masks.

    BatchNorm statistics are averaged by every method that does not mix them by masks, and with
    `recalibrate.enabled` measured anew in every network that is no parent, before it is scored.
    Leaves that are not floating stay as in parent 0.

    Args:
        key: PRNG key, or a whole number; what a method draws does not depend on which others run.
        apply_fn: `apply_fn(variables, inputs) -> outputs`, in inference mode.
        parents: K >= 2 variable pytrees of one structure.
        data: validation data, as for `megajax.merge`.
        calibration: training inputs `[n, ...]` for recalibration, Fisher and RegMean.
        parent_inputs: K pytrees of each parent's own training inputs, for Fisher and RegMean; None
            takes `calibration` for all of them.
        base: the network that all parents were trained from. Its hidden units must be in the order
            of the parents', so that it goes with parents as they were trained, not aligned ones.
        config: which baselines; None takes the defaults, here and below.
        align: align the parents first, as for `megajax.merge`; None takes them as they are
            (`MergeResult.parents` are aligned already).
        recalibrate: whether statistics are measured anew.
        genome: what a gene is.
        fitness: how a network is scored.
        evolution: whose population size the searches have, and whose evaluations by default.
        labels: the user's own genes; see `megajax.masks`.
        keep: leaves that are left to one parent, as for `megajax.merge`.
        budget: networks that the evolution scored; None computes what it would at most, 0 leaves
            the searches out. Where the configuration has a budget of its own, that one counts.
        callback: called with the name of each baseline before it runs; a true result stops.

    Returns:
        The results by name, in the order of `BASELINES`.

    Raises:
        ConfigError: a baseline that is named cannot be applied, or a budget is too small.
        ParentsError: parents that do not fit together or are not finite.
        DataError: data that is empty or does not fit, or is missing for `recalibrate`.

    Example:
        >>> def apply_fn(variables, x):
        ...     return x @ variables["kernel"]
        >>> parents = [{"kernel": np.diag(np.float32(d))} for d in ([1, 1, 0], [0, 1, 1])]
        >>> results = run_baselines(
        ...     jax.random.key(0), apply_fn, parents, (np.eye(3, dtype=np.float32), np.arange(3)),
        ...     config=BaselinesConfig(names=("best_parent", "line")), budget=5,
        ... )
        >>> {name: result.evaluations for name, result in results.items()}
        {'best_parent': 2, 'line': 5}
        >>> results["line"].detail["weights"]
        [0.5, 0.5]
    """
    key = as_key(key)
    config, evolution = config or BaselinesConfig(), evolution or EvolutionConfig()
    networks = checked_parents(parents, keep)
    tasks = tasks_of(apply_fn, networks, data, fitness)
    align, inputs = align or AlignConfig(method="none"), tasks[0].inputs
    own_key = named_key(key, "align")
    networks = aligned_parents(own_key, apply_fn, networks, inputs, calibration, align, keep)
    inputs = first_examples(inputs)
    if isinstance(genome, GenomeConfig) and genome.kind != "masks":
        genome = GenomeConfig(freeze=genome.freeze)
    problem = problem_of(
        apply_fn,
        networks,
        tasks,
        calibration=calibration,
        base=None,
        recalibrate=recalibrate,
        genome=genome,
        fitness=fitness,
        labels=labels,
        keep=keep,
        population_size=evolution.population_size,
    )
    problem, *_ = with_reference(problem, networks, fitness)
    one, frozen = GenomeConfig(granularity="global"), tuple(keep or {})
    line = make_genome(apply_fn, networks[0], inputs, len(networks), one, freeze=frozen)
    own = _own_inputs(len(networks), calibration, parent_inputs, config.examples)
    if base is not None:
        base = checked_base(base, networks[0])
    given = Given(
        apply_fn=apply_fn,
        parents=networks,
        base=base,
        inputs=own,
        statistics=statistic_paths(apply_fn, networks[0], inputs, problem.statistics),
        problem=problem,
        line=with_genome(problem, networks, line),
        budget=config.budget or budget or _evaluations(evolution, fitness, problem),
        evolution=evolution,
    )
    results: dict[str, Result] = {}
    for name in applicable(config.names, _available(given)):
        if budget == 0 and BASELINES[name].searches:
            continue
        if callback is not None and callback(name):
            break
        result = BASELINES[name].run(named_key(key, name), given)
        variables = with_unmixed(result.variables, problem.genome, networks[0])
        examples = result.evaluations * problem.num_examples
        results[name] = result._replace(variables=variables, examples=examples)
    return results


def applicable(names: str | Collection[str], available: Collection[str]) -> list[str]:
    """The baselines to run, in the order of `BASELINES`.

    Args:
        names: as in `BaselinesConfig`.
        available: keys of what a baseline may need.

    Returns:
        Names.

    Raises:
        ConfigError: a baseline that is named, and not one of `default` or `all`, needs something
            that is not there.

    Example:
        >>> applicable("default", set())
        ['best_parent', 'uniform_average', 'greedy_soup', 'line', 'random_search']
        >>> applicable(["ties"], set())
        Traceback (most recent call last):
        ...
        megajax.errors.ConfigError: baselines.names has 'ties', which needs a base network
    """
    if names in ("default", "all"):
        return [
            name
            for name, baseline in BASELINES.items()
            if baseline.needs <= set(available) and (baseline.default or names == "all")
        ]
    chosen = {names} if isinstance(names, str) else set(names)
    for name in BASELINES:
        missing = sorted(BASELINES[name].needs - set(available))
        if name in chosen and missing:
            raise ConfigError(f"baselines.names has {name!r}, which needs {NEEDS[missing[0]]}")
    return [name for name in BASELINES if name in chosen]


def table() -> list[tuple[str, ...]]:
    """The methods as rows of strings: what each does, needs and comes from.

    Returns:
        Rows; the first one is the header.

    Example:
        >>> table()[0]
        ('baseline', 'needs', 'what it is', 'reference')
    """
    header = ("baseline", "needs", "what it is", "reference")
    return [
        header,
        *(
            (
                name,
                ", ".join(NEEDS[need] for need in NEEDS if need in baseline.needs) or "nothing",
                baseline.summary,
                baseline.reference,
            )
            for name, baseline in BASELINES.items()
        ),
    ]


def _available(given: Given) -> set[str]:
    labelled = given.problem.metrics[0].name in ("cross_entropy", "accuracy")
    there = {
        "two parents": len(given.parents) == 2,
        "calibration": given.inputs is not None,
        "labels": labelled,
        "base": given.base is not None,
        "evosax": evosax.is_installed(),
    }
    return {name for name, ok in there.items() if ok}


def _own_inputs(
    count: int, shared: PyTree | None, own: Sequence[PyTree] | None, limit: int
) -> list[Any] | None:
    if own is None and shared is None:
        return None
    sets = [shared] * count if own is None else list(own)
    if len(sets) != count:
        raise ParentsError(f"parent_inputs has {len(sets)} arrays for {count} parents")
    for inputs in sets:
        check_inputs(inputs, "calibration inputs" if own is None else "parent_inputs")
    return [jax.tree.map(lambda leaf: np.asarray(leaf)[:limit], inputs) for inputs in sets]


def _evaluations(
    evolution: EvolutionConfig, fitness: FitnessConfig | None, problem: Problem
) -> int:
    """Networks' worth of passes that an evolution makes that nothing stops early."""
    search, total = search_of(problem, evolution, fitness), problem.num_examples
    most = evolution.population_size + evolution.generations * search.cost(total) / total
    budget = evolution.evaluation_budget
    return round(most) if budget is None else min(round(most), budget)
