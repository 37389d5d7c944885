"""All baselines by name, what each one needs, and one function that runs those that apply.

The only file of the package that knows configuration sections. A `Baseline` is data: a function of
what is given (`Given`), the names of its needs, and where it comes from.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from megajax.baselines.averages import slerp, uniform_average
from megajax.baselines.fisher import fisher_average, fisher_information
from megajax.baselines.leaves import on_weights, statistic_paths
from megajax.baselines.regmean import regmean
from megajax.baselines.searches import best_point, from_evosax, random_search, simplex_lattice
from megajax.baselines.selection import Score, best_of, best_parent, greedy_soup, scorer
from megajax.baselines.task_vectors import dare, task_arithmetic, ties
from megajax.config import (
    EvolutionConfig,
    FitnessConfig,
    GenomeConfig,
    RecalibrateConfig,
)
from megajax.errors import ConfigError, DataError, ParentsError
from megajax.keys import named_key
from megajax.merging.fitness import METRICS, Batches, Evaluate, batches, evaluator
from megajax.merging.genome import Genome, masks, recalibrated
from megajax.merging.merge import check_labels, genome_for
from megajax.merging.plans import Plan, plan_evaluation
from megajax.program.batchnorm import recalibrate
from megajax.program.folding import for_backend
from megajax.search.genetic import GeneticAlgorithm, run
from megajax.search.operators import take
from megajax.search.racing import num_finalists
from megajax.sections import Section, at_least, one_of
from megajax.trees import check_parents, stack_parents
from megajax.types import ApplyFn, Key, PyTree

__all__ = [
    "BASELINES",
    "Baseline",
    "BaselinesConfig",
    "Given",
    "Result",
    "Space",
    "applicable",
    "run_baselines",
    "table",
]

SCALES = tuple(i / 10 for i in range(1, 11))
"""The scales of a task vector that validation chooses from."""

_NEEDS = {
    "validation": "validation data",
    "two parents": "exactly two parents",
    "calibration": "calibration inputs",
    "base": "a base network",
    "evosax": "evosax (pip install 'megajax[searchers]')",
}


class Space(NamedTuple):
    """What a search needs.

    Attributes:
        genome: what the genes mean.
        evaluate: `evaluate(genes [P, ...]) -> (fitness [P], aux)`.
        context: what the genome's `express` takes beside the genes.
    """

    genome: Genome
    evaluate: Evaluate
    context: PyTree


class Given(NamedTuple):
    """What a baseline may use.

    Attributes:
        apply_fn: the network.
        parents: K variable pytrees.
        base: the network that the parents were trained from, or None.
        inputs: K arrays, training inputs of each parent; None if there are none.
        statistics: paths of the BatchNorm statistics.
        score: of one network on the validation data.
        prepare: done to every merged network before it is scored or returned.
        masks: the space of masks that the evolution searches; built when first asked for.
        line: the space of one coefficient for each parent; likewise.
        budget: networks that a search may score.
        evolution: whose population size the searches have.
    """

    apply_fn: ApplyFn
    parents: Sequence[PyTree]
    base: PyTree | None
    inputs: list[Any] | None
    statistics: frozenset[str]
    score: Score
    prepare: Callable[[PyTree], PyTree]
    masks: Callable[[], Space]
    line: Callable[[], Space]
    budget: int
    evolution: EvolutionConfig


class Result(NamedTuple):
    """A network that a baseline made, and what that took.

    Attributes:
        variables: the network, a pytree like each parent.
        evaluations: networks that were scored on the validation data.
        examples: network x example evaluations: that, times the number of validation examples.
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
        needs: keys of what it cannot do without: `validation`, `two parents`, `calibration`, `base`
            or `evosax`.
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


def run_baselines(
    key: Key,
    apply_fn: ApplyFn,
    parents: Sequence[PyTree],
    validation: tuple[Any, Any],
    *,
    calibration: Any | None = None,
    parent_inputs: Sequence[Any] | None = None,
    base: PyTree | None = None,
    config: BaselinesConfig | None = None,
    recalibrate: RecalibrateConfig | None = None,
    genome: GenomeConfig | None = None,
    fitness: FitnessConfig | None = None,
    evolution: EvolutionConfig | None = None,
    labels: PyTree | None = None,
    budget: int | None = None,
    callback: Callable[[str], None] | None = None,
) -> dict[str, Result]:
    """Runs the baselines that the configuration names, on one set of parents.

    For baselines on aligned parents, pass aligned parents (`MergeResult.parents`); all that choose
    by validation use the metric of `fitness`, and the searches the genes, the first population and
    the recalibration of `genome`, `evolution` and `recalibrate`: what `merge` was given.

    BatchNorm statistics are averaged by every method that does not mix them by masks, and with
    `recalibrate.enabled` measured anew in every network that is no parent, before it is scored.
    Leaves that are not floating stay as in parent 0.

    Args:
        key: PRNG key; what a method draws does not depend on which others run.
        apply_fn: `apply_fn(variables, inputs [b, ...]) -> logits [b, C]`, in inference mode.
        parents: K >= 2 variable pytrees of one structure.
        validation: inputs `[N, ...]` and labels `[N]`, which no parent was trained on.
        calibration: training inputs `[n, ...]` for recalibration, Fisher and RegMean.
        parent_inputs: K arrays of each parent's own training inputs, for Fisher and RegMean; None
            takes `calibration` for all of them.
        base: the network that all parents were trained from. Its hidden units must be in the order
            of the parents', so that it goes with parents as they were trained, not aligned ones.
        config: which baselines; None takes the defaults, here as below.
        recalibrate: whether statistics are measured anew.
        genome: what a gene is.
        fitness: how a network is scored.
        evolution: whose population size the searches have, and whose evaluations by default.
        labels: the user's own genes; see `megajax.merging.genome.masks`.
        budget: networks that the evolution scored; None computes what it would at most, 0 leaves
            the searches out. Where the configuration has a budget of its own, that one counts.
        callback: called with the name of each baseline before it runs.

    Returns:
        The results by name, in the order of `BASELINES`.

    Raises:
        ConfigError: a baseline that is named cannot be applied, or a budget is too small.
        ParentsError: parents that do not fit together or are not finite.
        DataError: data that is empty or has impossible labels, or is missing for `recalibrate`.

    Example:
        >>> def apply_fn(variables, x):
        ...     return x @ variables["kernel"]
        >>> parents = [{"kernel": jnp.diag(jnp.array(d))} for d in ([1.0, 1, 0], [0.0, 1, 1])]
        >>> results = run_baselines(
        ...     jax.random.key(0), apply_fn, parents, (jnp.eye(3), jnp.arange(3)),
        ...     config=BaselinesConfig(names=("best_parent", "line")), budget=5,
        ... )
        >>> {name: result.evaluations for name, result in results.items()}
        {'best_parent': 2, 'line': 5}
        >>> results["line"].detail["weights"]
        [0.5, 0.5]
    """
    config, fitness = config or BaselinesConfig(), fitness or FitnessConfig()
    genome, evolution = genome or GenomeConfig(), evolution or EvolutionConfig()
    measure_anew = recalibrate or RecalibrateConfig()
    check_parents(parents)
    if base is not None:
        _check_base(parents[0], base)
    plan = plan_evaluation(
        apply_fn, parents[0], np.asarray(validation[0]), fitness, evolution.population_size
    )
    data = batches(*validation, plan.batch_size)
    batch = data.images[0]
    check_labels(validation[1], jax.eval_shape(apply_fn, parents[0], batch).shape[-1])
    if calibration is None and measure_anew.enabled:
        raise DataError("calibration inputs are missing: recalibrate needs them")

    metric = METRICS[fitness.metric] if isinstance(fitness.metric, str) else fitness.metric
    score = scorer(apply_fn, metric, data)
    stacked = cache(partial(stack_parents, parents))
    inputs = _own_inputs(parents, calibration, parent_inputs, config.examples)
    anew = None
    if measure_anew.enabled:
        anew = jnp.asarray(calibration)[: measure_anew.examples]
    space = partial(_space, for_backend(apply_fn), metric, data, anew, plan)
    given = Given(
        apply_fn=apply_fn,
        parents=parents,
        base=base,
        inputs=inputs,
        statistics=statistic_paths(apply_fn, parents[0], batch),
        score=score,
        prepare=_recalibration(apply_fn, anew),
        masks=cache(
            lambda: space(stacked(), genome_for(apply_fn, stacked(), batch, genome, labels=labels))
        ),
        line=cache(lambda: space(stacked(), masks(stacked(), granularity="global"))),
        budget=config.budget or budget or _evaluations(evolution, fitness, len(validation[1])),
        evolution=evolution,
    )
    available = {"validation"}
    available |= {"two parents"} if len(parents) == 2 else set()
    available |= {"calibration"} if inputs is not None else set()
    available |= {"base"} if base is not None else set()
    results: dict[str, Result] = {}
    for name in applicable(config.names, available):
        if budget == 0 and BASELINES[name].searches:
            continue
        if callback is not None:
            callback(name)
        result = BASELINES[name].run(named_key(key, name), given)
        results[name] = result._replace(examples=result.evaluations * len(validation[1]))
    return results


def applicable(names: str | Collection[str], available: Collection[str]) -> list[str]:
    """The baselines to run, in the order of `BASELINES`.

    Args:
        names: as in `BaselinesConfig`.
        available: of what a baseline may need; evosax is looked for.

    Returns:
        Names.

    Raises:
        ConfigError: a baseline that is named, and not one of `default` or `all`, needs something
            that is not there.

    Example:
        >>> applicable("default", {"validation"})
        ['best_parent', 'uniform_average', 'greedy_soup', 'line', 'random_search']
        >>> applicable(["ties"], {"validation"})
        Traceback (most recent call last):
        ...
        megajax.errors.ConfigError: baselines.names has 'ties', which needs a base network
    """
    available = set(available)
    if importlib.util.find_spec("evosax") is not None:
        available.add("evosax")
    if names in ("default", "all"):
        return [
            name
            for name, baseline in BASELINES.items()
            if baseline.needs <= available and (baseline.default or names == "all")
        ]
    chosen = {names} if isinstance(names, str) else set(names)
    for name in BASELINES:
        missing = sorted(BASELINES[name].needs - available)
        if name in chosen and missing:
            raise ConfigError(f"baselines.names has {name!r}, which needs {_NEEDS[missing[0]]}")
    return [name for name in BASELINES if name in chosen]


def table() -> list[tuple[str, ...]]:
    """The methods as rows of strings: what each does, needs and comes from.

    Returns:
        Rows; the first one is the header.

    Example:
        >>> table()[1][:2]
        ('best_parent', 'validation data')
    """
    header = ("baseline", "needs", "what it is", "reference")
    return [
        header,
        *(
            (
                name,
                ", ".join(_NEEDS[need] for need in _NEEDS if need in baseline.needs) or "nothing",
                baseline.summary,
                baseline.reference,
            )
            for name, baseline in BASELINES.items()
        ),
    ]


# The methods -------------------------------------------------------------------------------------


def _best_parent(key: Key, given: Given) -> Result:
    choice = best_parent(given.parents, given.score)
    detail = {"parent": choice.number, "fitness": choice.scores[choice.number]}
    return Result(choice.variables, len(choice.scores), detail=detail)


def _plain(method: Callable[[Sequence[PyTree]], PyTree]) -> Callable[[Key, Given], Result]:
    """A method that looks at nothing but the parents."""
    return lambda key, given: Result(given.prepare(_merged(method, given)))


def _merged(method: Callable[..., PyTree], given: Given, *others: PyTree) -> PyTree:
    """What a method makes of all leaves but the statistics, which are averaged."""
    return jax.jit(partial(on_weights, method, given.statistics))(list(given.parents), *others)


def _greedy_soup(key: Key, given: Given) -> Result:
    soup = greedy_soup(given.parents, given.score, prepare=given.prepare)
    detail = {"members": soup.members, "fitness": soup.score}
    return Result(soup.variables, soup.evaluations, detail=detail)


def _fisher(key: Key, given: Given) -> Result:
    assert given.inputs is not None
    fishers = [
        fisher_information(given.apply_fn, parent, own)
        for parent, own in zip(given.parents, given.inputs, strict=True)
    ]
    return Result(given.prepare(_merged(fisher_average, given, fishers)))


def _regmean(key: Key, given: Given) -> Result:
    assert given.inputs is not None
    return Result(given.prepare(regmean(given.apply_fn, given.parents, given.inputs)))


def _scaled(method: Callable[..., PyTree]) -> Callable[[Key, Given], Result]:
    """A method on task vectors, its scale chosen on the validation data."""

    def run(key: Key, given: Given) -> Result:
        @jax.jit
        def merge(parents: list[PyTree], base: PyTree, scale: jax.Array) -> PyTree:
            return on_weights(partial(method, key, scale=scale), given.statistics, parents, base)

        parents = list(given.parents)
        networks = (given.prepare(merge(parents, given.base, jnp.float32(s))) for s in SCALES)
        variables, number, scores = best_of(networks, given.score)
        detail = {"scale": SCALES[number], "fitness": scores[number]}
        return Result(variables, len(scores), detail=detail)

    return run


def _line(key: Key, given: Given) -> Result:
    space = given.line()
    points = simplex_lattice(len(given.parents), given.budget)
    genes, fitness = best_point(
        space.evaluate, jnp.asarray(points)[:, None], batch_size=given.evolution.population_size
    )
    detail = {"weights": genes[0].tolist(), "fitness": float(fitness.max())}
    return Result(jax.jit(space.genome.express)(genes, space.context), len(points), detail=detail)


def _searched(
    make: Callable[..., GeneticAlgorithm], *, draws: bool = False
) -> Callable[[Key, Given], Result]:
    """A search over the masks, from a first population like the evolution's.

    One that `draws` from what that is drawn from also spends what is left for less than a whole
    generation, so that it scores exactly as many networks as its budget has.
    """

    def search(key: Key, given: Given) -> Result:
        size = given.evolution.population_size
        if given.budget < size:
            raise ConfigError(
                f"baselines.budget is {given.budget}: the first population alone needs {size}"
            )
        genes_key, init_key, run_key = jax.random.split(key, 3)
        space = given.masks()
        algorithm = make(space.evaluate, space.genome, num_offspring=size)
        genes = jax.jit(space.genome.init, static_argnums=1)(genes_key, size)
        state, _ = run(
            run_key,
            algorithm,
            algorithm.init(init_key, genes),
            given.budget // size,
            generations_per_chunk=given.evolution.generations_per_chunk,
            evaluation_budget=given.budget,
        )
        best, count = state.best, int(state.evaluations)
        if draws and count < given.budget:
            drawn = space.genome.init(jax.random.fold_in(run_key, given.budget), 2 * size)
            rest = jnp.arange(size, size + given.budget - count)  # parents and mean come first
            genes, fitness = best_point(space.evaluate, take(drawn, rest), batch_size=size)
            count = given.budget
            if fitness.max() > best.fitness:
                best = best._replace(genes=genes, fitness=fitness.max())
        variables = jax.jit(space.genome.express)(best.genes, space.context)
        return Result(variables, count, detail={"fitness": float(best.fitness)})

    return search


def _keyless(method: Callable[..., PyTree]) -> Callable[..., PyTree]:
    return lambda key, *networks, **options: method(*networks, **options)


_ON_BASE = frozenset({"validation", "base"})
_OTHER_SEARCH = frozenset({"validation", "evosax"})

BASELINES: dict[str, Baseline] = {
    "best_parent": Baseline(
        _best_parent,
        frozenset({"validation"}),
        "the parent that is best on the validation data",
        "-",
        default=True,
    ),
    "uniform_average": Baseline(
        _plain(uniform_average),
        frozenset(),
        "the mean of the parents",
        "Wortsman et al., arXiv 2203.05482",
        default=True,
    ),
    "slerp": Baseline(
        _plain(slerp),
        frozenset({"two parents"}),
        "half way between two parents, each leaf on its sphere",
        "Shoemake, SIGGRAPH 1985",
        default=True,
    ),
    "greedy_soup": Baseline(
        _greedy_soup,
        frozenset({"validation"}),
        "the mean of those parents that do not make it worse, best first",
        "Wortsman et al., arXiv 2203.05482",
        default=True,
    ),
    "fisher": Baseline(
        _fisher,
        frozenset({"calibration"}),
        "the mean, each weight counted by its Fisher information",
        "Matena and Raffel, arXiv 2111.09832",
        default=True,
    ),
    "regmean": Baseline(
        _regmean,
        frozenset({"calibration"}),
        "linear layers nearest to the parents' outputs, in closed form",
        "Jin et al., arXiv 2212.09849",
        default=True,
    ),
    "task_arithmetic": Baseline(
        _scaled(_keyless(task_arithmetic)),
        _ON_BASE,
        "the base plus the scaled sum of the task vectors",
        "Ilharco et al., arXiv 2212.04089",
    ),
    "ties": Baseline(
        _scaled(_keyless(ties)),
        _ON_BASE,
        "task vectors trimmed to a fifth, merged where signs agree",
        "Yadav et al., arXiv 2306.01708",
    ),
    "dare": Baseline(
        _scaled(dare),
        _ON_BASE,
        "task vectors with a random half dropped and the rest doubled, added up",
        "Yu et al., arXiv 2311.03099",
    ),
    "line": Baseline(
        _line,
        frozenset({"validation"}),
        "the best point of the straight line, or of the simplex of three parents and more",
        "Scheffe, J. R. Stat. Soc. B 20 (1958)",
        default=True,
        searches=True,
    ),
    "random_search": Baseline(
        _searched(random_search, draws=True),
        frozenset({"validation"}),
        "the best of as many random masks as the evolution scored",
        "-",
        default=True,
        searches=True,
    ),
    "cma_es": Baseline(
        _searched(partial(from_evosax, "CMA_ES")),
        _OTHER_SEARCH,
        "CMA-ES over the masks; the covariance of all genes limits it to some thousand genes",
        "Hansen, arXiv 1604.00772",
        searches=True,
    ),
    "sep_cma_es": Baseline(
        _searched(partial(from_evosax, "Sep_CMA_ES")),
        _OTHER_SEARCH,
        "CMA-ES with a diagonal covariance over the masks",
        "Ros and Hansen, PPSN 2008",
        searches=True,
    ),
    "differential_evolution": Baseline(
        _searched(partial(from_evosax, "DifferentialEvolution")),
        _OTHER_SEARCH,
        "differential evolution over the masks",
        "Storn and Price, J. Global Optimization 11 (1997)",
        searches=True,
    ),
}
"""The baselines by the names that the configuration gives them."""

_Name = Annotated[str, one_of(BASELINES)]


class BaselinesConfig(Section):
    """What the merged network is compared with.

    Attributes:
        names: methods of `megajax.baselines.BASELINES`, an error where one cannot be applied; or
            one name; or `default` (a few that tell most) or `all`, of which those that need
            something that is not there (a base network, exactly two parents) are left out.
        budget: networks that a search over masks or the straight line may score; None takes as many
            as the evolution did.
        examples: training inputs of each parent that Fisher and RegMean measure on.
    """

    section = "baselines"
    names: Annotated[str, one_of(BASELINES, "default", "all")] | tuple[_Name, ...] = "default"
    budget: Annotated[int, at_least(1)] | None = None
    examples: Annotated[int, at_least(1)] = 256


# What is given -----------------------------------------------------------------------------------


def _space(
    apply_fn: ApplyFn,
    metric: Any,
    data: Batches,
    anew: jax.Array | None,
    plan: Plan,
    stacked: PyTree,
    genome: Genome,
) -> Space:
    """A genome with its evaluation, as `merge` builds it."""
    context = stacked
    if anew is not None:
        genome, context = recalibrated(genome, apply_fn), (stacked, anew)
    evaluate = evaluator(
        genome.express,
        apply_fn,
        metric,
        context,
        data,
        population_chunk=plan.population_chunk,
        mesh=plan.mesh,
    )
    return Space(genome, evaluate, context)


def _recalibration(apply_fn: ApplyFn, inputs: jax.Array | None) -> Callable[[PyTree], PyTree]:
    if inputs is None:
        return lambda variables: variables
    return jax.jit(lambda variables: recalibrate(apply_fn, variables, inputs))


def _own_inputs(
    parents: Sequence[PyTree], shared: Any | None, own: Sequence[Any] | None, limit: int
) -> list[Any] | None:
    if own is None:
        return None if shared is None else [np.asarray(shared)[:limit]] * len(parents)
    if len(own) != len(parents):
        raise ParentsError(f"parent_inputs has {len(own)} arrays for {len(parents)} parents")
    return [np.asarray(inputs)[:limit] for inputs in own]


def _check_base(parent: PyTree, base: PyTree) -> None:
    try:
        check_parents([parent, base])
    except ParentsError as error:
        raise ParentsError(f"the base network (as parent 1) does not fit: {error}") from None


def _evaluations(evolution: EvolutionConfig, fitness: FitnessConfig, total: int) -> int:
    """Networks that an evolution scores that nothing stops early; passes over all, if they race."""
    size = evolution.population_size
    children = size - (evolution.elites if evolution.survival == "generational" else 0)
    each: float = children
    if fitness.racing_examples is not None:
        finalists = num_finalists(fitness.racing_finalists, children)
        each = finalists + children * fitness.racing_examples / total
    most = round(size + evolution.generations * each)
    return most if evolution.evaluation_budget is None else min(most, evolution.evaluation_budget)
