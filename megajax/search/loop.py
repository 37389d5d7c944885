"""Runs any search on the device, some generations in one compiled call, until a limit is reached.

Knows what a search is (`Search`) and nothing of operators, genes or networks. A problem is an
argument of the compiled program, never part of it: one program serves all problems of equal shapes.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from megajax.errors import SearchError
from megajax.search.operators import Population, take
from megajax.types import Genes, Key, PyTree

__all__ = [
    "Counts",
    "FullScoring",
    "Info",
    "Limits",
    "Record",
    "Search",
    "State",
    "check_alive",
    "examples_scored",
    "run",
]


class Counts(NamedTuple):
    """What a search has cost so far, int32.

    Attributes:
        networks: networks that were scored, each once, however many examples it was scored on.
        full: of these, the networks that were scored on all examples.
        partial: cheaper looks: at a sample of the examples, or a gradient on a batch. Each costs
            `partial_examples` of the search.
    """

    networks: jax.Array
    full: jax.Array
    partial: jax.Array


class State(NamedTuple):
    """What a search needs to go on.

    Attributes:
        population: P individuals with their fitness.
        best: the best individual ever seen, without a population axis.
        generation: generations done, int32.
        stale: generations since the best last improved, int32.
        counts: what the search has cost.
        memory: whatever else the search carries; `()` for nothing.
    """

    population: Population
    best: Population
    generation: jax.Array
    stale: jax.Array
    counts: Counts
    memory: PyTree = ()


class Record(NamedTuple):
    """What a generation notes on the device.

    Attributes:
        generation: its number, from 1; 0 is the first population. int32.
        counts: what the search has cost up to and including it.
        best_ever: best fitness seen so far, float32.
        fitness: of the population, `[P]`.
        diversity: standard deviation of a gene over the population, mean over the genes, float32.
        invalid: networks of this generation without a finite fitness, int32.
        valid: networks of this generation with one, int32.
    """

    generation: jax.Array
    counts: Counts
    best_ever: jax.Array
    fitness: jax.Array
    diversity: jax.Array
    invalid: jax.Array
    valid: jax.Array


class Info(NamedTuple):
    """What generations have to tell: NumPy, leaves `[G]`. Statistics are over finite fitnesses.

    Attributes:
        generation: its number, from 1; 0 is the first population.
        evaluations: networks scored up to and including it.
        completed: networks scored on all examples up to and including it.
        partial: cheaper looks up to and including it; see `Counts`.
        best_ever: best fitness seen so far.
        best: best fitness in the population.
        median: median fitness in the population.
        mean: mean fitness in the population.
        std: standard deviation of the fitness in the population.
        worst: worst fitness in the population.
        diversity: standard deviation of a gene over the population, mean over the genes.
        invalid: networks of this generation whose fitness was not a finite number; of those that
            lost a race it is not known.
        valid: networks of this generation whose fitness is a finite number.
    """

    generation: np.ndarray
    evaluations: np.ndarray
    completed: np.ndarray
    partial: np.ndarray
    best_ever: np.ndarray
    best: np.ndarray
    median: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    worst: np.ndarray
    diversity: np.ndarray
    invalid: np.ndarray
    valid: np.ndarray


COUNTS = frozenset({"generation", "evaluations", "completed", "partial", "invalid", "valid"})
"""The figures of `Info` that are whole numbers."""


class Search(Protocol):
    """A search: a hashable value, equal to others with the same choices, with two pure functions.

    Attributes:
        partial_examples: what one of the `partial` looks of `Counts` costs, in passes of an example
            through a network.
    """

    @property
    def partial_examples(self) -> int: ...  # noqa: D102

    def init(self, key: Key, genes: Genes, problem: PyTree) -> State:
        """Scores the first population."""

    def step(self, key: Key, state: State, problem: PyTree) -> tuple[State, Record]:
        """Makes one generation."""

    def cost(self, num_examples: int) -> int:
        """What a generation costs at most, in passes of an example through a network."""


class FullScoring:
    """What searches have in common that score all their offspring on all examples, once.

    Attributes:
        num_offspring: of a generation.
    """

    num_offspring: int
    partial_examples: ClassVar[int] = 0

    def cost(self, num_examples: int) -> int:
        """Passes of an example through a network that a generation takes."""
        return self.num_offspring * num_examples


class Limits(NamedTuple):
    """When a search ends; None is no limit.

    Attributes:
        generations: after so many, counted from the first population.
        patience: when so many generations brought no better best.
        seconds: when so many have passed in this call. Not reproducible by nature.
        examples: before more passes of an example through a network would be made than these.
        per_call: generations in one compiled call, between two looks of the host.
    """

    generations: int
    patience: int | None = None
    seconds: float | None = None
    examples: int | None = None
    per_call: int = 10


def run(
    key: Key,
    search: Search,
    state: State,
    problem: PyTree,
    limits: Limits,
    *,
    num_examples: int = 1,
    callback: Callable[[State, Info], bool | None] | None = None,
) -> tuple[State, Info]:
    """Runs a search until one of its limits is reached.

    Generation g uses `fold_in(key, g)`, so that a search continued from a saved state goes on
    exactly as it would have.

    Args:
        key: PRNG key of the whole search.
        search: for example a `megajax.search.genetic.GeneticAlgorithm`.
        state: from its `init`, or a later one.
        problem: what its evaluation takes beside the genes; any pytree.
        limits: when to end.
        num_examples: examples that a full scoring of a network passes through it.
        callback: called with the state and the infos of the generations since (NumPy, leaves
            `[n]`) after each compiled call; a true result ends the search.

    Returns:
        The last state, and the infos of all generations that this call did (NumPy, leaves `[G]`).

    Raises:
        SearchError: no network of a generation has a finite fitness. The callback has seen the
            state by then.

    Example:
        >>> from megajax.search.genetic import GeneticAlgorithm
        >>> def evaluate(target, genes):
        ...     return -jnp.abs(genes - target).sum(-1)
        >>> search = GeneticAlgorithm(evaluate, num_offspring=8)
        >>> key, target = jax.random.key(0), jnp.ones(8)
        >>> state = search.init(key, jnp.eye(8), target)
        >>> _, infos = run(key, search, state, target, Limits(9, examples=30))
        >>> infos.evaluations.tolist()
        [16, 24]
    """
    started, history = time.monotonic(), []
    while True:
        done, stale, counts = jax.device_get((state.generation, state.stale, state.counts))
        last = limits.generations
        if limits.examples is not None:
            left = limits.examples - examples_scored(search, num_examples, counts)
            last = min(last, int(done) + max(left, 0) // search.cost(num_examples))
        last = min(last, int(done) + limits.per_call)
        if last <= done or (limits.patience is not None and stale >= limits.patience):
            break
        if limits.seconds is not None and time.monotonic() - started >= limits.seconds:
            break
        state, noted = _generations(search, limits.per_call, key, state, np.int32(last), problem)
        noted, new = jax.device_get(noted), slice(last - int(done))
        infos = describe(jax.tree.map(operator.itemgetter(new), noted))
        history.append(infos)
        stop = callback is not None and callback(state, infos)
        check_alive(infos)
        if stop:
            break
    return state, joined(history)


def joined(history: Sequence[Info]) -> Info:
    """The figures of all generations of several calls, one after the other."""
    types = [np.int32 if name in COUNTS else np.float32 for name in Info._fields]
    nothing = Info(*(np.zeros(0, kind) for kind in types))
    return Info(*map(np.concatenate, zip(nothing, *history, strict=True)))


def first_state(search: Search, key: Key, genes: Genes, problem: PyTree) -> State:
    """The scored first population, compiled once for all problems of equal shapes."""
    return _init(search, key, genes, problem)


def compiled_step(search: Search, per_call: int, key: Key, state: State, problem: PyTree) -> Any:
    """The compiled program that `run` will call, to be asked what memory it takes."""
    arguments = (search, per_call, key, state, np.int32(0), problem)
    return _generations.lower(*arguments).compile()


def examples_scored(search: Search, num_examples: int, counts: Counts) -> int:
    """What a search has cost: passes of an example through a network, as a Python integer.

    Example:
        >>> from megajax.search.genetic import GeneticAlgorithm
        >>> search = GeneticAlgorithm(lambda problem, genes: genes, num_offspring=2)
        >>> examples_scored(search, 500, Counts(np.int32(7), np.int32(7), np.int32(0)))
        3500
    """
    return int(counts.full) * num_examples + int(counts.partial) * search.partial_examples


def check_alive(infos: Info) -> None:
    """Checks that every generation had a network with a finite fitness.

    Args:
        infos: of some generations, NumPy, leaves `[G]`.

    Raises:
        SearchError: one had none; names the generation.
    """
    dead = np.flatnonzero(infos.valid == 0)
    if len(dead):
        generation, count = infos.generation[dead[0]], infos.invalid[dead[0]]
        raise SearchError(
            f"generation {generation}: none of the {count} networks has a finite fitness; check "
            "fitness.metric and evolution.mutation_scale"
        )


def start(population: Population, memory: PyTree = ()) -> State:
    """The state of a first population that was scored on all examples.

    Example:
        >>> state = start(Population(jnp.array([3.0, 5.0]), jnp.array([0.1, 0.9])))
        >>> float(state.best.genes), int(state.counts.networks)
        (5.0, 2)
    """
    zero = jnp.zeros((), jnp.int32)
    size = zero + population.fitness.size
    best: Population = take(population, jnp.argmax(population.fitness))
    return State(population, best, zero, zero, Counts(size, size, zero), memory)


def advance(
    state: State,
    population: Population,
    offspring: Population,
    counts: Counts,
    memory: PyTree = (),
) -> State:
    """The state after a generation.

    Args:
        state: before it.
        population: who survived it.
        offspring: whom it scored; the best of them may be the best ever, the earlier of equals.
        counts: what it cost.
        memory: what the search carries on.
    """
    child: Population = take(offspring, jnp.argmax(offspring.fitness))
    improved = child.fitness > state.best.fitness
    best = jax.tree.map(lambda new, old: jnp.where(improved, new, old), child, state.best)
    return State(
        population,
        best,
        state.generation + 1,
        jnp.where(improved, 0, state.stale + 1),
        jax.tree.map(jnp.add, state.counts, counts),
        memory,
    )


def scored(
    state: State,
    survivors: Population,
    offspring: Population,
    memory: PyTree = (),
    counts: Counts | None = None,
) -> tuple[State, Record]:
    """What `step` returns after a generation.

    Args:
        state: before it.
        survivors: who survived it.
        offspring: whom it scored.
        memory: what the search carries on.
        counts: what it cost; None if all offspring were scored on all examples.
    """
    size = jnp.int32(offspring.fitness.size)
    counts = Counts(size, size, jnp.int32(0)) if counts is None else counts
    state = advance(state, survivors, offspring, counts, memory)
    valid = jnp.sum(jnp.isfinite(offspring.fitness))
    return state, record(state, counts.full - valid, valid)


def record(state: State, invalid: jax.Array, valid: jax.Array) -> Record:
    """What `step` notes of a generation.

    Args:
        state: after it.
        invalid: networks of the generation without a finite fitness.
        valid: networks of the generation with one.
    """
    leaves = jax.tree.leaves(state.population.genes)
    spread = [_std(leaf).sum() for leaf in leaves]
    return Record(
        state.generation,
        state.counts,
        state.best.fitness,
        state.population.fitness,
        sum(spread, jnp.float32(0)) / sum(leaf[0].size for leaf in leaves),
        jnp.asarray(invalid, jnp.int32),
        jnp.asarray(valid, jnp.int32),
    )


def describe(records: Record) -> Info:
    """The figures of generations, from what they noted.

    Args:
        records: leaves `[G, ...]`, on the device or not.
    """
    noted: Any = jax.device_get(records)
    fitness = np.where(np.isfinite(noted.fitness), noted.fitness, np.nan)
    fitness[~np.isfinite(noted.fitness).any(axis=1)] = -np.inf  # nothing to describe
    with np.errstate(invalid="ignore"):
        return Info(
            generation=noted.generation,
            evaluations=noted.counts.networks,
            completed=noted.counts.full,
            partial=noted.counts.partial,
            best_ever=noted.best_ever,
            best=np.nanmax(fitness, axis=1),
            median=np.nanmedian(fitness, axis=1),
            mean=np.nanmean(fitness, axis=1),
            std=np.nanstd(fitness, axis=1),
            worst=np.nanmin(fitness, axis=1),
            diversity=noted.diversity,
            invalid=noted.invalid,
            valid=noted.valid,
        )


def first_info(state: State) -> Info:
    """The figures of a first population, leaves `[1]`."""
    noted = _first_record(state)
    return describe(jax.tree.map(lambda leaf: leaf[None], jax.device_get(noted)))


def _std(genes: jax.Array) -> jax.Array:
    """Standard deviation over the population.

    XLA on a CPU reduces a leading axis number by number, far apart in memory; here whole
    individuals are added, two by two. Moments are about the first, lest digits cancel.
    """

    def mean(x: jax.Array) -> jax.Array:
        size, odd = len(x), jnp.zeros_like(x[0])
        while len(x) > 1:
            half = len(x) // 2
            if len(x) % 2:
                odd += x[-1]
            x = x[:half] + x[half : 2 * half]
        return (x[0] + odd) / size

    wide = genes.astype(jnp.promote_types(genes.dtype, jnp.float32))
    from_first = wide - wide[:1]
    return jnp.sqrt(jnp.maximum(mean(from_first**2) - mean(from_first) ** 2, 0))


# The compiled programs: what is static is a value, what is large is an argument -------------------


@jax.jit
def _first_record(state: State) -> Record:
    finite = jnp.isfinite(state.population.fitness)
    return record(state, jnp.sum(~finite), jnp.sum(finite))


@partial(jax.jit, static_argnums=0)
def _init(search: Search, key: Key, genes: Genes, problem: PyTree) -> State:
    return search.init(key, genes, problem)


@partial(jax.jit, static_argnums=(0, 1))
def _generations(
    search: Search, length: int, key: Key, state: State, last: jax.Array, problem: PyTree
) -> tuple[State, Record]:
    """Generations until `last`, at most `length`; the records of those not done are zeros."""
    shapes = jax.eval_shape(search.step, key, state, problem)[1]
    records = jax.tree.map(lambda leaf: jnp.zeros((length, *leaf.shape), leaf.dtype), shapes)

    def generation(i: jax.Array, carry: tuple[State, Record]) -> tuple[State, Record]:
        state, records = carry
        state, noted = search.step(jax.random.fold_in(key, state.generation), state, problem)
        return state, jax.tree.map(lambda all_, one: all_.at[i].set(one), records, noted)

    return jax.lax.fori_loop(0, last - state.generation, generation, (state, records))
