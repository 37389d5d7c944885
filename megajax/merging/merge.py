"""The main job: parents and validation data in, one merged network out.

`merge` puts the pieces together as the configuration sections say: it aligns the parents, builds
the `Problem` and runs a search on it. It writes no file, and prints nothing unless it is asked to.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from megajax.alignment import AlignConfig
from megajax.alignment.workflow import align_checked, as_align
from megajax.entry import check_inputs, output_shapes
from megajax.errors import ConfigError, DataError, ParentsError
from megajax.keys import as_key
from megajax.merging.genome import Genome, GenomeConfig, check_genome, make_genome
from megajax.merging.problem import (
    FitnessConfig,
    Problem,
    RecalibrateConfig,
    evaluate,
    expressed,
    improved,
    make_problem,
    objective,
    race_of,
    scores_of,
)
from megajax.merging.progress import ProgressLine
from megajax.merging.tasks import Task, as_tasks, check_task, with_teacher
from megajax.merging.weights import Weights
from megajax.program.memory import check_fits
from megajax.program.roles import find_read, find_statistics
from megajax.search.genetic import check_operators
from megajax.search.loop import (
    Info,
    Search,
    State,
    check_alive,
    compiled_step,
    examples_scored,
    first_info,
    first_state,
    joined,
    run,
)
from megajax.search.methods import EvolutionConfig, limits_of, make_search
from megajax.search.operators import concatenate
from megajax.search.pareto import NSGA2, non_dominated_rank
from megajax.trees import (
    checked_base,
    checked_parents,
    is_key,
    is_mixable,
    leaf_paths,
    leaves_by_path,
    on_host,
    unlike,
)
from megajax.types import ApplyFn, Genes, Key, PyTree

__all__ = ["Front", "MergeResult", "merge", "problem_for"]

_log = logging.getLogger(__name__)


class Front(NamedTuple):
    """Networks of which none is as good as another on all tasks and better on one.

    Attributes:
        genes: leaves `[F, ...]`.
        scores: `[F, T]` on the validation data of each task, in ascending order of the first.
        problem: what the genes mean.
        parent: what unmixed leaves are taken from.
    """

    genes: Genes
    scores: np.ndarray
    problem: Problem
    parent: PyTree

    def network(self, number: int) -> PyTree:
        """The variables of one of them."""
        genes = jax.tree.map(lambda leaf: leaf[number], self.genes)
        return with_unmixed(expressed(self.problem, genes), self.problem.genome, self.parent)


class MergeResult(NamedTuple):
    """What a merge found.

    Attributes:
        variables: the merged network, a pytree like each parent.
        fitness: its fitness on the validation data.
        parent_fitness: `[K]`, of the parents as they were given, on the same data.
        genes: the merged network's genes.
        history: one entry for the first population and one for each generation, NumPy `[1 + G]`;
            for a search that went on from a state, the generations after it.
        evaluations: networks scored in all, a child once, however many examples it was scored on.
        examples_scored: what that cost: passes of a validation example through a network. Passes of
            calibration examples (`recalibrate.examples` before each scoring) come on top.
        scores: the score on each task by name, of the merged network; one entry for one task.
        parent_scores: likewise `[K]`, of the parents.
        metrics: the metric of each task by name.
        genome: what the genes mean.
        parents: the K parents as they were mixed, hidden units aligned.
        problem: what was searched; `megajax.merging.problem.expressed(problem, genes)` is a
            network.
        state: the search's last state, from which it can go on.
        front: for `evolution.method="nsga2"`, the best compromises between the tasks that it
            knows; `variables` is the one with the best weighted fitness. None for other methods.
    """

    variables: PyTree
    fitness: float
    parent_fitness: np.ndarray
    genes: PyTree
    history: Info
    evaluations: int
    examples_scored: int
    scores: dict[str, float]
    parent_scores: dict[str, np.ndarray]
    metrics: dict[str, str]
    genome: Genome
    parents: list[PyTree]
    problem: Problem
    state: State
    front: Front | None = None

    def __repr__(self) -> str:
        of_parents = ", ".join(f"{value:.4g}" for value in self.parent_fitness)
        return (
            f"MergeResult(fitness={self.fitness:.4g}, parent_fitness=[{of_parents}], "
            f"metrics={self.metrics}, num_genes={self.genome.num_genes}, "
            f"generations={len(self.history.generation) - 1}, evaluations={self.evaluations})"
        )


def merge(
    key: Key | int,
    apply_fn: ApplyFn,
    parents: Sequence[PyTree],
    data: Any,
    *,
    calibration: PyTree | None = None,
    base: PyTree | None = None,
    align: AlignConfig | str | None = None,
    recalibrate: RecalibrateConfig | None = None,
    genome: GenomeConfig | Genome | None = None,
    fitness: FitnessConfig | None = None,
    evolution: EvolutionConfig | None = None,
    labels: PyTree | None = None,
    keep: Mapping[str, int] | None = None,
    first: Genes | None = None,
    state: State | Mapping[str, Any] | None = None,
    callback: Callable[[State, Info], bool | None] | None = None,
    progress: bool = False,
) -> MergeResult:
    """Merges networks of one architecture by a search over mixing masks (or other genes).

    The parents are in the first population (unless `genome.parents_first` is off), and the best
    individual is never lost: but for rounding the result's fitness is at least the best parent's.
    On other data it may not be; keep a test set aside. Calls with equal shapes and choices share
    one compiled program, whatever their parents, keys and data.

    Args:
        key: PRNG key, or a whole number; the same one gives the same result.
        apply_fn: `apply_fn(variables, inputs) -> outputs`, in inference mode.
        parents: K >= 2 variable pytrees of one structure.
        data: validation inputs and targets, which no parent was trained on; or a `Task`, or several
            (their scores are weighted and added up, see `FitnessConfig.combine`). For classifiers:
            inputs `[N, ...]` and labels `[N]`.
        calibration: training inputs `[n, ...]`, without labels: what activations are matched and
            statistics measured on. Needed only where `align` or `recalibrate` ask for it.
        base: the network that the parents were trained from, for `genome.kind="task_vectors"`.
        align: how hidden units are brought into correspondence: a section, or a method by name;
            None takes the defaults, here and below. Not for task vectors, whose parents have their
            base's order.
        recalibrate: whether BatchNorm statistics are measured anew for every candidate.
        genome: what a gene is: a section, or a genome of your own.
        fitness: how an individual is scored.
        evolution: the search.
        labels: your own genes instead of `genome.granularity`; see `megajax.masks`.
        keep: regular expression for leaf paths -> number of the parent that those leaves come from,
            unmixed; the other parents may have other shapes there (another number of classes).
        first: genes that the first population holds, leaves `[F, ...]`: what another search found,
            say. They take the places of the last individuals; the first K + 1, the parents among
            them, stay.
        state: where an earlier call with the same other arguments got to (a `State`, or its leaves
            in nested dictionaries, as from a file); the search goes on from it exactly as it would
            have. None starts anew.
        callback: called with the state and the infos after each compiled call of some generations,
            and, for a search that starts anew, once before the first; a true result stops the
            search.
        progress: say on the standard error how far the search is.

    Returns:
        The merged network and how it was found.

    Raises:
        ParentsError: parents that do not fit together or are not finite.
        DataError: data that is empty, not finite or does not fit the network.
        ConfigError: choices that cannot work, or a state of another search.
        DeviceError: a generation does not fit in the device's memory.
        SearchError: none of the networks of a generation has a finite fitness.

    Example:
        >>> def apply_fn(variables, x):
        ...     return x @ variables["kernel"]
        >>> parents = [{"kernel": np.diag(np.float32(d))} for d in ([1, 1, 0], [0, 1, 1])]
        >>> data = np.eye(3, dtype=np.float32), np.arange(3)
        >>> result = merge(jax.random.key(0), apply_fn, parents, data,
        ...                evolution=EvolutionConfig(population_size=8, generations=30))
        >>> bool(result.fitness > result.parent_fitness.max())
        True

    Source: Yun, "MeGA: Merging Multiple Independently Trained Neural Networks Based on Genetic
    Algorithm", arXiv 2406.04607; `megajax.mega_paper` is its algorithm to the letter. The search
    over masks is megajax's own.
    """
    evolution = evolution or EvolutionConfig()
    line = ProgressLine(evolution.generations) if progress else None

    def called(state: State, info: Info) -> bool:
        if line is not None:
            line.show(info)
        return bool(callback is not None and callback(state, info))

    align_key, genes_key, init_key, run_key = jax.random.split(as_key(key), 4)
    given = checked_parents(parents, keep)
    tasks = tasks_of(apply_fn, given, data, fitness)
    aligned = aligned_parents(
        align_key, apply_fn, given, tasks[0].inputs, calibration, align, keep, base
    )
    problem = problem_of(
        apply_fn,
        aligned,
        tasks,
        calibration=calibration,
        base=base,
        recalibrate=recalibrate,
        genome=genome,
        fitness=fitness,
        labels=labels,
        keep=keep,
        population_size=evolution.population_size,
    )
    if recalibrate is None or not recalibrate.enabled:
        _warn_of_statistics(problem, given[0], tasks)
    problem, parent_fitness, parent_scores = with_reference(problem, given, fitness)
    search = search_of(problem, evolution, fitness)
    problem = _asked(problem, search)
    genes = _first_genes(problem.genome, evolution.population_size, genes_key, problem.parents)
    if first is not None:
        evolution.require(
            not evolution.parents_only, "parents_only", "it leaves no place for genes in `first`"
        )
        genes = _with_first(problem.genome, genes, _checked_first(first, genes, len(given)))
    check_operators(search, genes)

    history, stopped = [], False
    start = jax.eval_shape(partial(search.init, init_key), genes, problem)
    if state is not None:
        state = _check_state(state, start)
    limits = limits_of(evolution, problem.num_examples)
    check_fits(lambda: compiled_step(search, limits.per_call, run_key, start, problem))
    if state is None:
        state = first_state(search, init_key, genes, problem)
        info = first_info(state)
        history.append(info)
        stopped = called(state, info)
        check_alive(info)
    if not stopped:
        state, infos = run(
            run_key,
            search,
            state,
            problem,
            limits,
            num_examples=problem.num_examples,
            callback=called,
        )
        history.append(infos)
    if line is not None:
        line.close()
    counts = jax.device_get(state.counts)
    variables = with_unmixed(expressed(problem, state.best.genes), problem.genome, aligned[0])
    _, aux = scores_of(problem, variables) if len(tasks) > 1 else (None, None)
    values = [state.best.fitness] if aux is None else list(aux.tasks)
    names = [str(task.name) for task in tasks]
    return MergeResult(
        variables=variables,
        fitness=float(state.best.fitness),
        parent_fitness=parent_fitness,
        genes=state.best.genes,
        history=joined(history),
        evaluations=int(counts.networks),
        examples_scored=examples_scored(search, problem.num_examples, counts),
        scores={name: float(value) for name, value in zip(names, values, strict=True)},
        parent_scores=dict(zip(names, parent_scores.T, strict=True)),
        metrics={name: task.metric.name for name, task in zip(names, tasks, strict=True)},
        genome=problem.genome,
        parents=aligned,
        problem=problem,
        state=state,
        front=_front(state, problem, aligned[0]) if isinstance(search, NSGA2) else None,
    )


def problem_for(
    apply_fn: ApplyFn,
    parents: Sequence[PyTree],
    data: Any,
    *,
    calibration: PyTree | None = None,
    base: PyTree | None = None,
    recalibrate: RecalibrateConfig | None = None,
    genome: GenomeConfig | Genome | None = None,
    fitness: FitnessConfig | None = None,
    labels: PyTree | None = None,
    keep: Mapping[str, int] | None = None,
    population_size: int = 32,
) -> Problem:
    """The problem of merging parents as they are. Arguments and errors as for `merge`.

    Args:
        apply_fn: the network.
        parents: aligned already, if they are to be.
        data: see `merge`.
        calibration: see `merge`.
        base: see `merge`.
        recalibrate: see `merge`.
        genome: see `merge`.
        fitness: see `merge`.
        labels: see `merge`.
        keep: see `merge`.
        population_size: individuals that will be evaluated together, for the layout.

    Returns:
        What `megajax.merging.problem.evaluate` and every search take.

    Example:
        >>> from megajax.merging.problem import evaluate
        >>> parents = [np.eye(2, dtype=np.float32), -np.eye(2, dtype=np.float32)]
        >>> data = np.eye(2, dtype=np.float32), np.arange(2)
        >>> problem = problem_for(lambda w, x: x @ w, parents, data,
        ...                       fitness=FitnessConfig(metric="accuracy"))
        >>> first_parent, second_parent = jnp.array([1.0, 0]), jnp.array([0.0, 1])
        >>> genes = jnp.stack([first_parent, second_parent])[:, None].repeat(2, axis=1)
        >>> evaluate(problem, genes)[0].tolist()
        [1.0, 0.0]
    """
    checked = checked_parents(parents, keep)
    return problem_of(
        apply_fn,
        checked,
        tasks_of(apply_fn, checked, data, fitness),
        calibration=calibration,
        base=base,
        recalibrate=recalibrate,
        genome=genome,
        fitness=fitness,
        labels=labels,
        keep=keep,
        population_size=population_size,
    )


def problem_of(
    apply_fn: ApplyFn,
    checked: list[PyTree],
    tasks: list[Task],
    *,
    calibration: PyTree | None,
    base: PyTree | None,
    recalibrate: RecalibrateConfig | None,
    genome: GenomeConfig | Genome | None,
    fitness: FitnessConfig | None,
    labels: PyTree | None,
    keep: Mapping[str, int] | None,
    population_size: int,
) -> Problem:
    """`problem_for` of parents and tasks that are checked already."""
    fitness, recalibrate = fitness or FitnessConfig(), recalibrate or RecalibrateConfig()
    inputs = first_examples(tasks[0].inputs)
    if genome is None or isinstance(genome, GenomeConfig):
        frozen = tuple(keep or {})
        chosen = make_genome(
            apply_fn, checked[0], inputs, len(checked), genome, labels=labels, freeze=frozen
        )
    else:
        chosen = genome
    own = chosen is genome
    by_vectors = isinstance(genome, GenomeConfig) and genome.kind == "task_vectors"
    if by_vectors and base is None:
        raise ConfigError("genome.kind is 'task_vectors': base, the network before, is needed")
    if base is not None:
        base = checked_base(base, checked[0])
    examples = None
    if recalibrate.enabled:
        examples = _calibration(calibration, apply_fn, checked[0], "recalibrate", 2)
        examples = jax.tree.map(lambda leaf: leaf[: recalibrate.examples], examples)
    _check_unmixed(checked, chosen, tasks)
    problem = make_problem(
        checked,
        tasks,
        chosen,
        base=base if by_vectors or own else None,
        calibration=examples,
        statistics=recalibrate.statistics,
        config=fitness,
        population_size=population_size,
    )
    if own:
        check_genome(chosen, population_size, problem.parents, checked[0])
    return problem


def search_of(
    problem: Problem, evolution: EvolutionConfig, fitness: FitnessConfig | None = None
) -> Search:
    """The search that configuration sections describe, for a problem."""
    race = race_of(fitness or FitnessConfig(), problem)
    return make_search(
        evolution,
        problem.genome,
        evaluate,
        race,
        objective=objective,
        improve=improved,
        num_examples=problem.num_examples,
    )


def _asked(problem: Problem, search: Search) -> Problem:
    """The problem, its evaluation telling all that a search asks for."""
    return replace(problem, per_example=getattr(search, "per_example", False))


def _front(state: State, problem: Problem, parent: PyTree) -> Front:
    """The front of the last population and the best ever, each point once."""
    best = jax.tree.map(lambda leaf: leaf[None], state.best)
    everyone = jax.device_get(concatenate(best, state.population))
    scores = everyone.aux.tasks
    there = np.isfinite(scores).all(axis=1)
    rank = non_dominated_rank(jnp.where(there[:, None], scores, -jnp.inf))
    _, first = np.unique(scores, axis=0, return_index=True)
    chosen = first[((rank == 0) & there)[first]]
    genes = jax.tree.map(lambda leaf: leaf[chosen], everyone.genes)
    return Front(genes, scores[chosen], problem, parent)


def searched(key: Key, problem: Problem, evolution: EvolutionConfig) -> State:
    """The last state of a search on a problem, from a first population of the genome's own."""
    genes_key, init_key, run_key = jax.random.split(key, 3)
    search = search_of(problem, evolution)
    problem = _asked(problem, search)
    genes = _first_genes(problem.genome, evolution.population_size, genes_key, problem.parents)
    total = problem.num_examples
    return run(
        run_key,
        search,
        first_state(search, init_key, genes, problem),
        problem,
        limits_of(evolution, total),
        num_examples=total,
    )[0]


def with_unmixed(variables: PyTree, genome: Genome, parent: PyTree) -> PyTree:
    """A network whose unmixed leaves are the given parent's own, which a device may have cut."""
    leaves, treedef = jax.tree.flatten(variables)
    rows = zip(jax.tree.leaves(genome.labels.tree), leaves, jax.tree.leaves(parent), strict=True)
    return jax.tree.unflatten(
        treedef, [own if (label < 0).all() else leaf for label, leaf, own in rows]
    )


def tasks_of(
    apply_fn: ApplyFn, parents: Sequence[PyTree], data: Any, fitness: FitnessConfig | None
) -> list[Task]:
    """Checked tasks; `fitness.metric` is that of those without one of their own."""
    metric = fitness.metric if fitness is not None else None
    tasks = [
        task if task.metric is not None else task._replace(metric=metric) for task in as_tasks(data)
    ]
    tasks = [with_teacher(task, apply_fn, parents) for task in tasks]
    tasks = [check_task(task, apply_fn, parents[0], number) for number, task in enumerate(tasks)]
    names = [task.name for task in tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"two tasks are called {twice!r}: names must differ")
    if not any(task.weight for task in tasks):
        raise ConfigError("the weights of all tasks are 0: nothing counts")
    return tasks


def first_examples(inputs: PyTree) -> PyTree:
    """A batch that tells what a network does: enough of the inputs to trace and verify it."""
    return jax.tree.map(lambda leaf: np.asarray(leaf[:8]), inputs)


def _calibration(
    inputs: PyTree | None, apply_fn: ApplyFn, variables: PyTree, what: str, least: int
) -> PyTree:
    if inputs is None:
        raise DataError(f"calibration inputs are missing: {what} needs them")
    check_inputs(inputs, "calibration inputs", least)
    output_shapes(apply_fn, variables, first_examples(inputs))
    return on_host(inputs)


def aligned_parents(
    key: Key,
    apply_fn: ApplyFn,
    parents: list[PyTree],
    inputs: PyTree,
    calibration: PyTree | None,
    config: AlignConfig | str | None,
    keep: Mapping[str, int] | None,
    base: PyTree | None = None,
) -> list[PyTree]:
    """Checked parents, their hidden units brought into correspondence, on the host."""
    if config is None:
        config = "none" if base is not None else AlignConfig()
    config = as_align(config)
    if config.method in ("activations", "both"):
        calibration = _calibration(calibration, apply_fn, parents[0], "align", 2)
    few = first_examples(inputs)
    aligned, _ = align_checked(
        key, apply_fn, parents, few, calibration=calibration, config=config, keep=keep
    )
    return [on_host(parent) for parent in aligned]


def _check_unmixed(parents: list[PyTree], genome: Genome, tasks: Sequence[Task]) -> None:
    """Leaves that cannot be mixed must be equal, or nothing that a network computes.

    Those that are left to one parent are equal. What no task's program reads is parent 0's.
    """
    labels = jax.tree.leaves(genome.labels.tree)
    rows = zip(leaf_paths(parents[0]), labels, *map(jax.tree.leaves, parents), strict=True)
    differ = [
        path
        for path, label, first, *others in rows
        if (label < 0).all()
        and not is_mixable(first)
        and not all(_same(first, other) for other in others)
    ]
    if not differ:
        return
    networks = [(task.apply_fn, first_examples(task.inputs)) for task in tasks]
    read = [find_read(apply_fn, parents[0], few) for apply_fn, few in networks if apply_fn]
    differ = [path for path in differ if any(path in of_one for of_one in read)]
    if differ:
        kind = leaves_by_path(parents[0])[differ[0]].dtype
        raise ParentsError(
            f"leaf {', '.join(differ)}: {kind} cannot be mixed, and the parents differ in it; "
            f"keep={{{differ[0]!r}: 0}} takes parent 0's for every network"
        )


def _warn_of_statistics(problem: Problem, variables: PyTree, tasks: Sequence[Task]) -> None:
    """Says what mixed BatchNorm statistics cost; a genome of weights evolves its own."""
    if isinstance(problem.genome, Weights):
        return
    found = find_statistics(problem.networks[0], variables, first_examples(tasks[0].inputs))
    if found:
        _warn_once(leaf_paths(variables)[found[0].variance])


@lru_cache(maxsize=256)
def _warn_once(example: str) -> None:
    _log.warning(
        "the network has BatchNorm statistics (such as %s) and recalibrate is off: mixed networks "
        "normalise by statistics of other activations, and many score far below their parents; "
        "recalibrate=RecalibrateConfig(enabled=True), with calibration inputs, measures them anew",
        example,
    )


def _same(first: Any, other: Any) -> bool:
    if is_key(first):
        first, other = jax.random.key_data(first), jax.random.key_data(other)
    return np.array_equal(np.asarray(first), np.asarray(other))


def with_reference(
    problem: Problem, given: list[PyTree], fitness: FitnessConfig | None
) -> tuple[Problem, np.ndarray, np.ndarray]:
    """The problem with what its scores are relative to, the parents' fitness `[K]` and scores."""
    found = [jax.device_get(scores_of(problem, parent)) for parent in given]
    values = np.array([value for value, _ in found], np.float32)
    if len(problem.networks) == 1:
        return problem, values, values[:, None]
    scores = np.stack([aux.tasks for _, aux in found])
    if fitness is not None and fitness.combine == "raw":
        return problem, values, scores
    best = np.where(np.isfinite(scores), scores, -np.inf).max(axis=0)
    problem = replace(problem, reference=jnp.asarray(best))
    values = np.array([scores_of(problem, parent)[0] for parent in given], np.float32)
    return problem, values, scores


@partial(jax.jit, static_argnums=(0, 1))
def _first_genes(genome: Genome, size: int, key: Key, parents: PyTree) -> PyTree:
    return genome.init(key, size, parents)


@partial(jax.jit, static_argnums=0)
def _with_first(genome: Genome, genes: Genes, first: Genes) -> Genes:
    """A population whose last individuals are the given ones."""
    return jax.tree.map(lambda old, new: old.at[-len(new) :].set(new), genes, genome.repair(first))


def _checked_first(first: Genes, genes: Genes, num_parents: int) -> Genes:
    """Genes that can take places in a population, in its dtypes."""
    there, here = leaves_by_path(first), leaves_by_path(genes)
    for path in {**here, **there}:
        found, wanted = (np.shape(tree[path]) if path in tree else None for tree in (there, here))
        if found is None or wanted is None or len(found) == 0 or found[1:] != wanted[1:]:
            needed = f"[F, {', '.join(map(str, wanted[1:]))}]" if wanted else "no such leaf"
            raise ConfigError(f"first: leaf {path} has shape {found}: {needed} is needed")
    counts, size = {len(leaf) for leaf in there.values()}, len(next(iter(here.values())))
    room = size - num_parents - 1
    if len(counts) > 1 or not 1 <= max(counts) <= room:
        raise ConfigError(
            f"first holds {' or '.join(map(str, sorted(counts)))} individuals: a population of "
            f"{size} has room for 1 to {room} beside the {num_parents} parents and their mean"
        )
    leaves = [jnp.asarray(there[path], here[path].dtype) for path in here]
    if not all(np.isfinite(leaf).all() for leaf in leaves):
        raise ConfigError("first: there are genes that are not finite")
    return jax.tree.unflatten(jax.tree.structure(genes), leaves)


def _check_state(state: State | Mapping[str, Any], start: State) -> State:
    """The state on the device, if it is one of a search that starts so."""
    for path, found, wanted in unlike(state, start):
        raise ConfigError(f"the state is of another search: {path} is {found} there, {wanted} here")
    there = leaves_by_path(state)
    leaves = [jnp.asarray(there[path]) for path in leaf_paths(start)]
    return jax.tree.unflatten(jax.tree.structure(start), leaves)
