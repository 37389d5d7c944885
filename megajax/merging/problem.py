"""The problem that a search solves: parents, tasks and what genes mean, as ONE pytree.

Its arrays are leaves and everything else is static and compared by value, so that a compiled
program serves all problems of equal shapes. `evaluate` scores a population in one program, and is
where genes become networks; it knows nothing of how genes vary.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from megajax.errors import ConfigError, DataError
from megajax.merging.devices import Layout, choose_layout, over_population, place
from megajax.merging.genome import Genome
from megajax.merging.metrics import METRICS, Metric, accuracy, binary_accuracy, default_metric
from megajax.merging.tasks import Batches, Task, batches
from megajax.program.batchnorm import recalibrate, with_batch_statistics
from megajax.program.folding import Folded, Prepared, fold, for_backend
from megajax.program.gradients import with_fast_gradients
from megajax.program.prefix import own_leaves, split
from megajax.search.descent import Descent
from megajax.search.genetic import Race
from megajax.sections import Section, at_least, between, one_of
from megajax.trees import is_mixable
from megajax.types import ApplyFn, Genes, Key, PyTree, bind

__all__ = [
    "Aux",
    "FitnessConfig",
    "Problem",
    "RecalibrateConfig",
    "evaluate",
    "express",
    "make_problem",
    "race_of",
    "sample",
    "scores_of",
]


class FitnessConfig(Section):
    """How an individual is scored on the validation data. Fitness is always maximised.

    Attributes:
        metric: a name in `megajax.merging.metrics.METRICS`, a function `(outputs, targets) ->
            scores [b]` whose mean over the examples is the fitness, or a `Metric`. None follows
            from the targets: the negative cross-entropy for class labels.
        combine: what several tasks' scores become: the weighted mean of `relative` scores (each in
            units of the best parent's) or of the `raw` ones.
        batch_size: examples per forward pass, or `auto` for a choice by backend and network.
        population_chunk: individuals evaluated side by side by `vmap` (the rest in turn by
            `lax.map`), or `auto`.
        devices: devices that share the population, or `all` for those of all processes. Their
            number does not change the search, up to float rounding. `auto` means one for `merge`,
            and all of them in a run, where every core of a CPU is made a device.
        devices_per_network: how many of them share the weights of one network; a divisor of
            `devices`. Only needed where a single device has no room for a network or for all the
            parents.
        select_on_test: score on the test images instead, as MeGA's reference does for many parents.
            The search then chooses the network that happens to suit the test images, no figure is
            held out any more, and the report says so. For the command line: `merge` scores on the
            data that it is given.
        tasks: for the command line: functions of the run's data set (`megajax.zoo.data.Dataset`)
            that return a `Task` each, or a pair of inputs and targets. The search is scored on them
            instead of the validation images, and the report has the score on each. For figures on
            test examples they are called again, with the test images as `dataset.validation`.
        distill_examples: for the command line: training images that the metric `distill` takes,
            without their labels; None takes all.
        racing_examples: score each child on this many validation examples first, drawn anew for
            each generation with every label's share, and only the best children on all of them; the
            others are out. None scores every child on all.
        racing_finalists: with `racing_examples`, the share of the offspring scored on all examples.
    """

    section = "fitness"
    metric: Annotated[str, one_of(METRICS)] | Metric | Callable[..., Any] | None = None
    combine: Literal["relative", "raw"] = "relative"
    batch_size: Annotated[int, at_least(1)] | Literal["auto"] = "auto"
    population_chunk: Annotated[int, at_least(1)] | Literal["auto"] = "auto"
    devices: Annotated[int, at_least(1)] | Literal["auto", "all"] = "auto"
    devices_per_network: Annotated[int, at_least(1)] = 1
    select_on_test: bool = False
    tasks: tuple[Callable[..., Any], ...] = ()
    distill_examples: Annotated[int, at_least(1)] | None = 20_000
    racing_examples: Annotated[int, at_least(1)] | None = None
    racing_finalists: Annotated[float, between(1e-9, 1)] = 0.125

    def _check(self) -> None:
        """Raises ConfigError for devices that do not divide, and choices that exclude others."""
        divides = isinstance(self.devices, str) or self.devices % self.devices_per_network == 0
        self.require(
            divides, "devices_per_network", f"it must divide the {self.devices} of fitness.devices"
        )
        alone = not (self.tasks and self.select_on_test)
        self.require(alone, "select_on_test", "fitness.tasks are what the search is scored on")


class RecalibrateConfig(Section):
    """Whether BatchNorm statistics are measured anew for every candidate, inside the fitness.

    Attributes:
        enabled: for networks with BatchNorm; others are refused.
        examples: training inputs to measure on, all in one batch.
        statistics: pairs of paths of (mean, variance) leaves, for layers of a form that is not
            recognised; see `megajax.recalibrate`.
    """

    section = "recalibrate"
    enabled: bool = False
    examples: Annotated[int, at_least(2)] = 256
    statistics: tuple[tuple[str, str], ...] = ()

    def _check(self) -> None:
        """Raises ConfigError for statistics that would not be measured."""
        used = self.enabled or not self.statistics
        self.require(used, "statistics", "recalibrate.enabled is off, so they are not measured")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Problem:
    """What a search is given.

    Attributes:
        parents: as the genome stacks them: leaves `[K, ...]` where they are mixed.
        batches: of each task.
        calibration: inputs `[n, ...]` that statistics are measured on; None where they are not.
        weights: `[T]`, of the tasks.
        reference: `[T]`, the best parent's score on each task, or None where scores are raw.
        genome: what genes mean.
        networks: `apply_fn` of each task.
        metrics: of each task.
        layout: how a population is cut for its evaluation.
        faithful: for each parent whether its unmixed leaves are those that every network has.
        per_example: whether `evaluate` also says who is right on which example.
        prefix: whether layers that all individuals have in common are computed once for all.
        statistics: paths of (mean, variance) leaves that the user names, to be measured too.
    """

    parents: PyTree
    batches: tuple[Batches, ...]
    calibration: PyTree | None
    weights: jax.Array
    reference: jax.Array | None
    genome: Genome = field(metadata={"static": True})
    networks: tuple[ApplyFn, ...] = field(metadata={"static": True})
    metrics: tuple[Metric, ...] = field(metadata={"static": True})
    layout: Layout = field(metadata={"static": True})
    faithful: tuple[bool, ...] = field(metadata={"static": True})
    per_example: bool = field(default=False, metadata={"static": True})
    prefix: bool = field(default=False, metadata={"static": True})
    statistics: tuple[tuple[str, str], ...] = field(default=(), metadata={"static": True})

    @property
    def num_examples(self) -> int:
        """Examples of all tasks together: what a full scoring passes through a network."""
        return sum(int(np.asarray(of_task.valid).sum()) for of_task in self.batches)


class Aux(NamedTuple):
    """What an evaluation tells beside the fitness.

    Attributes:
        tasks: `[P, T]`, the score on each task, or `()` where there is one task.
        right: `[P, N]` bool, who is right on which example: of all tasks one after the other, in
            the order of the batches (nobody is on their padding); `()` where nobody asked.
    """

    tasks: Any = ()
    right: Any = ()


def make_problem(
    parents: Sequence[PyTree],
    tasks: Sequence[Task],
    genome: Genome,
    *,
    base: PyTree | None = None,
    calibration: PyTree | None = None,
    statistics: tuple[tuple[str, str], ...] = (),
    config: FitnessConfig | None = None,
    population_size: int,
) -> Problem:
    """Puts a problem together and places its arrays on the devices.

    Args:
        parents: K variable pytrees, checked, on the host, hidden units aligned.
        tasks: from `check_task`.
        genome: what genes mean.
        base: the network that the parents were trained from, for task vectors.
        calibration: inputs that statistics are measured on; None where they are not.
        statistics: paths of (mean, variance) leaves that the user names.
        config: how networks are scored; None takes the defaults.
        population_size: individuals P, for the layout.

    Raises:
        ConfigError: numbers of devices that cannot be, or a race on more examples than there are.
    """
    config = config or FitnessConfig()
    networks = tuple(task.apply_fn for task in tasks if task.apply_fn is not None)
    layout = choose_layout(networks[0], parents[0], tasks[0].inputs, config, population_size)
    mesh = layout.mesh
    cut = tuple(batches(task, layout.batch_size) for task in tasks)
    stacked = genome.stack(parents, base) if base is not None else genome.stack(parents)
    weights = np.array([task.weight for task in tasks], np.float32)
    shares_layers = calibration is None and len(tasks) == 1 and _has_frozen(parents[0], genome)
    return Problem(
        parents=place(stacked, mesh, split=True),
        batches=place(cut, mesh),
        calibration=place(calibration, mesh),
        weights=place(weights / max(weights.sum(), 1e-38), mesh),
        reference=None,
        genome=genome,
        networks=networks,
        metrics=tuple(task.metric for task in tasks),
        layout=layout,
        faithful=_faithful(parents, genome),
        prefix=shares_layers,
        statistics=statistics,
    )


def with_genome(problem: Problem, parents: Sequence[PyTree], genome: Genome) -> Problem:
    """The same problem with genes of another meaning.

    Args:
        problem: the problem.
        parents: that it was made of.
        genome: what genes mean; not task vectors.
    """
    return replace(
        problem,
        genome=genome,
        parents=place(genome.stack(parents), problem.layout.mesh, split=True),
        faithful=_faithful(parents, genome),
        prefix=False,
    )


def express(problem: Problem, genes: Genes) -> PyTree:
    """The network of one individual, its statistics measured anew where the problem says so.

    An individual that is exactly one of the parents keeps that parent's statistics, bit for bit.

    Args:
        problem: the problem.
        genes: of one individual.

    Returns:
        Variables, a pytree like each parent.
    """
    variables = problem.genome.express(genes, problem.parents)
    if problem.calibration is None:
        return variables
    network = for_backend(problem.networks[0], one_core=problem.layout.one_core)
    new = recalibrate(network, variables, problem.calibration, problem.statistics)
    is_parent = _is_parent(problem, variables)
    return jax.tree.map(lambda old, new: jnp.where(is_parent, old, new), variables, new)


def evaluate(problem: Problem, genes: Genes) -> tuple[jax.Array, Aux]:
    """The fitness of a population, network by network.

    Each network is expressed inside the mapped body: only `layout.population_chunk` networks exist
    at a time on a device.

    Args:
        problem: the problem.
        genes: leaves `[P, ...]`.

    Returns:
        Fitness `[P]` float32, and what else is known.
    """

    def of_all(problem: Problem, genes: Genes) -> tuple[jax.Array, Aux]:
        score = _scorer(problem, genes)
        return map_chunks(
            lambda one: score(express(problem, one)), genes, problem.layout.population_chunk
        )

    mesh = problem.layout.mesh
    if mesh is None:
        return of_all(problem, genes)
    return over_population(of_all, mesh, problem, genes)


def scores_of(problem: Problem, variables: PyTree) -> tuple[jax.Array, Aux]:
    """The fitness of one network, given by its variables, and what else is known.

    Args:
        problem: only its tasks matter; problems with the same tasks share the compiled program.
        variables: of one network.
    """
    tasks = replace(
        problem,
        parents=(),
        calibration=None,
        genome=None,  # type: ignore[arg-type]
        layout=Layout(1, problem.layout.batch_size),
        faithful=(),
        per_example=False,
        prefix=False,
        statistics=(),
    )
    return _scores(tasks, variables)


@jax.jit
def _scores(problem: Problem, variables: PyTree) -> tuple[jax.Array, Aux]:
    return _scorer(problem, None)(variables)


@jax.jit
def expressed(problem: Problem, genes: Genes) -> PyTree:
    """`express`, compiled once for all problems of equal shapes."""
    return express(problem, genes)


def sample(key: Key, problem: Problem, *, count: int) -> Problem:
    """The problem on examples of its first task drawn without replacement.

    All examples are equally likely. With class labels, every label has as many as its share, give
    or take one: every (total / count)-th of the examples in order of their labels, from a random
    first, and in random order within a label. Networks that differ in the classes they are good at
    are told apart by fewer examples so. Candidates are recalibrated on no more examples either.

    Args:
        key: PRNG key.
        problem: the problem, of one task.
        count: n to draw.

    Source: stratified sampling with proportional allocation, Cochran, Sampling Techniques (1977),
    chapter 5.
    """
    (data,) = problem.batches
    total = data.valid.size
    number = -(-count // data.valid.shape[1])
    size = -(-count // number)
    order_key, first_key = jax.random.split(key)
    rank = jax.random.uniform(order_key, (total,))
    valid = data.valid.reshape(-1)
    labels = _class_labels(data)
    columns = (rank, ~valid) if labels is None else (rank, labels, ~valid)
    ordered = jnp.lexsort(columns)
    there = valid.sum()
    places = jnp.arange(count, dtype=jnp.float32) + jax.random.uniform(first_key)
    places = (places * (there.astype(jnp.float32) / count)).astype(jnp.int32)
    chosen = ordered[jnp.minimum(places, there - 1)]
    chosen = jnp.pad(chosen, (0, number * size - count))

    def cut(leaf: jax.Array) -> jax.Array:
        rows = leaf.reshape(-1, *leaf.shape[2:])[chosen]
        return rows.reshape(number, size, *leaf.shape[2:])

    counts = (jnp.arange(number * size) < count).reshape(number, size)
    inputs, targets = jax.tree.map(cut, (data.inputs, data.targets))
    few = Batches(inputs, targets, counts)
    calibration = jax.tree.map(lambda leaf: leaf[:count], problem.calibration)
    return replace(problem, batches=(few,), calibration=calibration)


def objective(key: Key, problem: Problem, genes: Genes, count: int) -> jax.Array:
    """A differentiable score of one individual on examples drawn anew, for gradient searches.

    Where statistics are measured anew, they are those of the drawn examples, as in training. A
    metric without a gradient (accuracy, F1) is replaced by the cross-entropy.

    Args:
        key: PRNG key of the draw.
        problem: the problem.
        genes: of one individual.
        count: examples to draw from each task.
    """
    variables = problem.genome.express(genes, problem.parents)
    scores = []
    rows = zip(problem.networks, problem.metrics, problem.batches, strict=True)
    for number, (network, metric, data) in enumerate(rows):
        few = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), data)
        if count < few.valid.size:
            own_key = jax.random.fold_in(key, number)
            chosen = jax.random.randint(own_key, (count,), 0, few.valid.size)
            few = jax.tree.map(lambda leaf, chosen=chosen: leaf[chosen], few)
        if problem.calibration is not None:
            network = partial(with_batch_statistics, network, statistics=problem.statistics)
        one_core = problem.layout.one_core
        outputs = with_fast_gradients(network, one_core=one_core)(variables, few.inputs)
        smooth = metric.smooth or metric
        statistics = smooth.statistics(outputs, few.targets)
        scores.append(smooth.of(statistics, few.valid))
    if len(scores) == 1:
        return scores[0]
    return problem.weights @ relative(jnp.stack(scores), problem.reference)


def improved(key: Key, problem: Problem, genes: Genes, *, descent: Descent) -> Genes:
    """Every individual of a population after some steps of gradient ascent of its own.

    Args:
        key: PRNG key.
        problem: the problem.
        genes: leaves `[P, ...]`.
        descent: the steps.
    """
    size = jax.tree.leaves(genes)[0].shape[0]

    def of_all(problem: Problem, xs: tuple[Key, Genes]) -> Genes:
        chunk = problem.layout.population_chunk
        return map_chunks(lambda one: descent.improved(one[0], one[1], problem), xs, chunk)

    keys = jax.random.split(key, size)
    if problem.layout.mesh is None:
        return of_all(problem, (keys, genes))
    return over_population(of_all, problem.layout.mesh, problem, (keys, genes))


def race_of(config: FitnessConfig, problem: Problem) -> Race | None:
    """How children race as a configuration says, or None.

    Raises:
        ConfigError: there are several tasks, or fewer examples than the race would draw.
    """
    count = config.racing_examples
    if count is None:
        return None
    total = problem.num_examples
    config.require(count <= total, "racing_examples", f"there are only {total} validation examples")
    config.require(len(problem.batches) == 1, "racing_examples", "races are for one task")
    return Race(bind(sample, count=count), count, config.racing_finalists)


def map_chunks(function: Callable[[Any], Any], xs: PyTree, chunk: int) -> Any:
    """Maps over the leading axis: `chunk` elements side by side, chunk after chunk.

    Args:
        function: of one element.
        xs: leaves `[P, ...]`.
        chunk: 1 is `lax.map`, P or more is `vmap`, anything between is both.

    Returns:
        Leaves `[P, ...]`; the same values whatever the chunk, up to float rounding.

    Example:
        >>> map_chunks(lambda x: 2 * x, jnp.arange(5), 2).tolist()
        [0, 2, 4, 6, 8]
    """
    if chunk == 1:  # first of all: one alone has the bits that it has among others
        return jax.lax.map(function, xs)
    if chunk >= jax.tree.leaves(xs)[0].shape[0]:
        return jax.vmap(function)(xs)
    return jax.lax.map(function, xs, batch_size=chunk)


def _scorer(problem: Problem, genes: Genes | None) -> Callable[[PyTree], tuple[jax.Array, Aux]]:
    """`score(variables) -> (fitness, aux)` of one network on all tasks."""
    networks, data = list(problem.networks), list(problem.batches)
    if problem.prefix and genes is not None:
        networks[0], data[0] = _after_prefix(problem, genes)

    def score(variables: PyTree) -> tuple[jax.Array, Aux]:
        scores, right = [], []
        folded = [fold(network, one_core=problem.layout.one_core) for network in networks]
        rows = zip(folded, problem.metrics, data, strict=True)
        for network, metric, of_task in rows:
            one_batch = jax.tree.map(operator.itemgetter(0), of_task.inputs)
            prepared = network.prepare(variables, one_batch)
            of_batch = partial(_pass, network, prepared, metric, problem.per_example)
            statistics, hits = jax.lax.map(of_batch, of_task)
            scores.append(metric.of(statistics, of_task.valid))
            right.append(hits)
        hits = ()
        if problem.per_example:
            hits = jnp.concatenate([of_task.reshape(-1) for of_task in right])
        if len(scores) == 1:
            return scores[0].astype(jnp.float32), Aux((), hits)
        each = jnp.stack(scores)
        fitness = problem.weights @ relative(each, problem.reference)
        return fitness.astype(jnp.float32), Aux(each, hits)

    return score


def _pass(
    network: Folded, prepared: Prepared, metric: Metric, per_example: bool, batch: Batches
) -> tuple[PyTree, Any]:
    """The statistics of a batch, and who is right on which example, if that is asked for."""
    outputs = network.apply(prepared, batch.inputs)
    statistics = metric.statistics(outputs, batch.targets)
    return statistics, _hits(outputs, batch.targets) & batch.valid if per_example else ()


def _hits(outputs: Any, targets: Any) -> jax.Array:
    """On which examples a network is right, on at least half of their positions: `[b]` bool.

    Raises:
        ConfigError: there are no labels to be right on.
    """
    known = {"cross_entropy": accuracy, "binary_cross_entropy": binary_accuracy}
    try:
        score = known[default_metric(outputs, targets)]
    except (DataError, KeyError):
        raise ConfigError("evolution.method is 'niches': it needs tasks with labels") from None
    return score(outputs, targets) >= 0.5


def relative(scores: Any, reference: Any) -> Any:
    """Scores in units of the best parent's: 0 is as good, for scores of either sign."""
    if reference is None:
        return scores
    return (scores - reference) / jnp.maximum(abs(reference), 1e-6)


def _after_prefix(problem: Problem, genes: Genes) -> tuple[ApplyFn, Batches]:
    """The network behind its common layers, and what comes out of those for all examples."""
    anyone = jax.tree.map(lambda leaf: leaf[0], genes)
    variables = problem.genome.express(anyone, problem.parents)
    (data,) = problem.batches
    few = jax.tree.map(lambda leaf: leaf[0], data.inputs)
    own = own_leaves(problem.genome.express, anyone, problem.parents)
    parts = split(problem.networks[0], variables, few, own)
    if parts is None:
        return problem.networks[0], data
    each = jax.tree.leaves(jax.eval_shape(parts.first, variables, few))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in each) * len(data.valid)
    if size > _MOST_FEATURES:
        return problem.networks[0], data
    features = jax.lax.map(partial(parts.first, variables), data.inputs)
    return parts.rest, data._replace(inputs=(data.inputs, features))


_MOST_FEATURES = 1e9
"""Bytes of what frozen first layers may give for all examples; more is computed each time."""


def _has_frozen(parent: PyTree, genome: Genome) -> bool:
    """Whether leaves that could be mixed are the same in all individuals."""
    rows = zip(jax.tree.leaves(genome.labels.tree), jax.tree.leaves(parent), strict=True)
    return any((label < 0).all() and is_mixable(leaf) for label, leaf in rows)


def _is_parent(problem: Problem, variables: PyTree) -> jax.Array:
    """Whether a network is exactly one of the parents that were given."""
    same = jnp.asarray(problem.faithful)
    rows = problem.genome.rows(problem.parents)
    for row, leaf in zip(rows, jax.tree.leaves(variables), strict=True):
        if row is not None:
            same &= (leaf == row).all(range(1, row.ndim))
    return same.any()


def _faithful(parents: Sequence[PyTree], genome: Genome) -> tuple[bool, ...]:
    labels = jax.tree.leaves(genome.labels.tree)
    first = jax.tree.leaves(parents[0])

    def like_first(parent: PyTree) -> bool:
        return all(
            leaf is other or np.array_equal(leaf, other)
            for label, leaf, other in zip(labels, first, jax.tree.leaves(parent), strict=True)
            if (label < 0).any() and is_mixable(leaf)
        )

    return tuple(like_first(parent) for parent in parents)


def _class_labels(data: Batches) -> jax.Array | None:
    labels = data.targets[0] if isinstance(data.targets, tuple) else data.targets
    one_each = hasattr(labels, "dtype") and labels.ndim == 2
    if not one_each or not jnp.issubdtype(labels.dtype, jnp.integer):
        return None
    return labels.reshape(-1)
