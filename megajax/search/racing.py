"""Which of the offspring are scored, and on how many examples.

By default all are, on all. Two options make the same search cheaper, each on its own or together:
`reuse` takes over the fitness of an individual that is there already, bit for bit, and `racing`
scores all children on a few examples and only the best of them on all. Knows genes as arrays of
bits and evaluations as functions; nothing of networks or operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from megajax.merging.fitness import Batches, Evaluate
from megajax.search.operators import Population, take
from megajax.types import Genes, Key, PyTree

__all__ = [
    "Racing",
    "Scored",
    "Scoring",
    "draw",
    "evaluated",
    "examples_per_generation",
    "examples_scored",
    "fingerprints",
    "num_finalists",
    "on_sample",
    "score_offspring",
    "score_some",
    "twins",
]


class Racing(NamedTuple):
    """Children are scored on a sample of the examples first, and the best of them on all.

    Attributes:
        sample: `sample(key, evaluate)` is the evaluation on examples drawn anew; see `on_sample`.
        examples: n that are drawn.
        total: N that there are.
        share: of the offspring that are scored on all.
    """

    sample: Callable[[Key, Evaluate], Evaluate]
    examples: int
    total: int
    share: float


class Scoring(NamedTuple):
    """How the offspring of a generation are scored; the default is all of them, on all examples.

    Attributes:
        reuse: children that are there already, bit for bit, are not scored again.
        chunk: individuals that are evaluated side by side; None is all of them.
        racing: a first look on few examples, or None.
    """

    reuse: bool = False
    chunk: int | None = None
    racing: Racing | None = None


class Scored(NamedTuple):
    """Offspring with their fitness, and what that took.

    Attributes:
        offspring: M individuals; -inf for those that gave no finite number or lost the race.
        evaluations: networks that were scored, on a sample or on all examples, int32.
        completed: networks that were scored on all examples, int32.
        invalid: offspring that are known to give no finite number, int32.
    """

    offspring: Population
    evaluations: jax.Array
    completed: jax.Array
    invalid: jax.Array


def score_offspring(
    scoring: Scoring, key: Key | None, evaluate: Evaluate, genes: Genes, population: Population
) -> Scored:
    """Scores the children of a generation.

    With `reuse`, a child whose bits are those of a member of the population, or of an earlier
    child, takes over its fitness and aux. With `racing`, the others are scored on a sample, the
    best `num_finalists` of them on all examples, and the rest get -inf; a member without a finite
    fitness is then no one to take over from, because it may only have lost its race. A child
    without a finite fitness on the sample has none on all examples either and is not tried again.

    Args:
        scoring: what is scored.
        key: for the sample; not used without racing.
        evaluate: `evaluate(genes [M, ...]) -> (fitness [M], aux)`.
        genes: of the children, leaves `[M, ...]`.
        population: the P parents.

    Returns:
        The offspring, in the order of the genes.

    Example:
        >>> def evaluate(genes):
        ...     return genes[:, 0], ()
        >>> parents = evaluated(evaluate, jnp.array([[1.0], [2.0]]))
        >>> children = jnp.array([[2.0], [5.0], [5.0], [7.0]])
        >>> found = score_offspring(Scoring(reuse=True, chunk=1), None, evaluate, children, parents)
        >>> found.offspring.fitness.tolist(), int(found.evaluations)
        ([2.0, 5.0, 5.0, 7.0], 2)
    """
    racing = scoring.racing
    if racing is None and not scoring.reuse:
        offspring = evaluated(evaluate, genes)
        count = jnp.int32(offspring.fitness.size)
        return Scored(offspring, count, count, jnp.sum(~jnp.isfinite(offspring.fitness)))
    size, members = _size(genes), _size(population.genes)
    own = members + jnp.arange(size)
    origin = own
    if scoring.reuse:
        known = jnp.isfinite(population.fitness) if racing else jnp.ones(members, bool)
        origin = twins(genes, population.genes, known)
    fresh = origin == own
    judged = _race if racing is not None else _judge
    offspring, failed, evaluations, completed = judged(scoring, key, evaluate, genes, fresh)
    if scoring.reuse:
        fitness = _from(origin, population.fitness, offspring.fitness)
        aux = jax.tree.map(lambda old, new: _from(origin, old, new), population.aux, offspring.aux)
        offspring = Population(genes, fitness, aux)
        failed = _from(origin, ~jnp.isfinite(population.fitness), failed)
    return Scored(offspring, evaluations, completed, jnp.sum(failed))


def evaluated(evaluate: Evaluate, genes: Genes) -> Population:
    """Individuals with their fitness; what is not a finite number counts as -inf.

    Args:
        evaluate: `evaluate(genes [P, ...]) -> (fitness [P], aux)`.
        genes: leaves `[P, ...]`.

    Returns:
        The population.

    Example:
        >>> evaluated(lambda genes: (genes, ()), jnp.array([1.0, jnp.nan])).fitness.tolist()
        [1.0, -inf]
    """
    fitness, aux = evaluate(genes)
    return Population(genes, jnp.where(jnp.isfinite(fitness), fitness, -jnp.inf), aux)


def score_some(
    evaluate: Evaluate, genes: Genes, wanted: jax.Array, chunk: int | None = None
) -> tuple[jax.Array, PyTree, jax.Array]:
    """Scores the individuals that are wanted, chunk by chunk, and as few others as can be.

    Args:
        evaluate: `evaluate(genes [c, ...]) -> (fitness [c], aux)`.
        genes: leaves `[M, ...]`.
        wanted: `[M]` bool.
        chunk: individuals in one call, c; None is all M, so that all are scored or none.

    Returns:
        Fitness `[M]` and aux, leaves `[M, ...]`, which mean nothing where not `wanted`; and how
        many were scored, int32: those wanted, rounded up to whole chunks.

    Example:
        >>> evaluate = lambda genes: (10 * genes, ())
        >>> wanted = jnp.array([False, True, False, True])
        >>> fitness, _, count = score_some(evaluate, jnp.arange(4.0), wanted, chunk=1)
        >>> fitness.tolist(), int(count)
        ([0.0, 10.0, 0.0, 30.0], 2)
    """
    size = _size(genes)
    chunk = min(chunk or size, size)
    order = jnp.argsort(~wanted, stable=True)  # those wanted first
    chunks = (jnp.sum(wanted, dtype=jnp.int32) + chunk - 1) // chunk
    shapes = jax.eval_shape(evaluate, jax.eval_shape(lambda: take(genes, order[:chunk])))
    nothing = jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape[1:]), leaf.dtype), shapes)

    def one_more(carry: tuple[jax.Array, PyTree]) -> tuple[jax.Array, PyTree]:
        done, results = carry
        # The last slice is moved back into the array: it may score some a second time.
        rows = jax.lax.dynamic_slice(order, (done * chunk,), (chunk,))
        new = evaluate(take(genes, rows))
        return done + 1, jax.tree.map(lambda all_, some: all_.at[rows].set(some), results, new)

    _, (fitness, aux) = jax.lax.while_loop(
        lambda carry: carry[0] < chunks, one_more, (jnp.zeros((), jnp.int32), nothing)
    )
    return fitness, aux, jnp.minimum(chunks * chunk, size)


# Duplicates --------------------------------------------------------------------------------------


def twins(genes: Genes, members: Genes, known: jax.Array) -> jax.Array:
    """For each child, who else has exactly its bits: a member, an earlier child, or nobody.

    Fingerprints are compared with all, bits with the first that has the same fingerprint. If those
    differ after all, the child counts as new: then more is scored than need be, and never a wrong
    fitness taken over.

    Args:
        genes: of the children, leaves `[M, ...]`.
        members: of the population, leaves `[P, ...]`.
        known: `[P]` bool: members from which a fitness can be taken over.

    Returns:
        `[M]` int32: places in the members followed by the children; a child's own for nobody.

    Example:
        >>> children = jnp.array([[3.0], [2.0], [3.0], [-0.0]])
        >>> twins(children, jnp.array([[2.0], [0.0]]), jnp.array([True, True])).tolist()
        [2, 0, 2, 5]
    """
    size, before = _size(genes), _size(members)
    own = before + jnp.arange(size)
    mine = fingerprints(genes)
    theirs = jnp.concatenate([fingerprints(members), mine])
    alike = (mine[:, None] == theirs[None]).all(axis=-1)
    alike &= jnp.arange(before + size) < own[:, None]  # members and earlier children
    alike &= jnp.concatenate([known, jnp.ones(size, bool)])
    first = jnp.argmax(alike, axis=1)

    def same(old: jax.Array, new: jax.Array) -> jax.Array:
        of_member, of_child = (
            old[jnp.minimum(first, before - 1)],
            new[jnp.maximum(first - before, 0)],
        )
        is_member = (first < before).reshape(-1, *[1] * (new.ndim - 1))
        other = jnp.where(is_member, of_member, of_child)
        return (_words(other) == _words(new)).all(axis=1)

    equal = jnp.stack(jax.tree.leaves(jax.tree.map(same, members, genes))).all(axis=0)
    return jnp.where(alike.any(axis=1) & equal, first, own)


def fingerprints(genes: Genes) -> jax.Array:
    """Two 32-bit hashes of the bits of each individual's genes.

    Args:
        genes: leaves `[P, ...]` of numbers or truth values.

    Returns:
        `[P, 2]` uint32; equal for equal bits, and for others by chance of one in 2^64.

    Example:
        >>> first, second, third = fingerprints(jnp.array([[0.0], [-0.0], [0.0]])).tolist()
        >>> first == third, first == second
        (True, False)
    """
    total = jnp.zeros((_size(genes), 2), jnp.uint32)
    start = 0
    for leaf in jax.tree.leaves(genes):
        words = _words(leaf)
        place = jnp.arange(words.shape[1], dtype=jnp.uint32) + jnp.uint32(start)
        hashes = [
            jnp.sum(_mixed(words ^ _mixed(place ^ jnp.uint32(salt))), axis=1, dtype=jnp.uint32)
            for salt in (0x9E3779B9, 0x7F4A7C15)
        ]
        total += jnp.stack(hashes, axis=1)
        start += words.shape[1]
    return total


def _mixed(words: jax.Array) -> jax.Array:
    """MurmurHash3's last step: each bit of the result depends on all bits."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)


def _words(leaf: jax.Array) -> jax.Array:
    """The bits of a leaf, `[P, n]` uint32; nothing is rounded or made equal."""
    if leaf.dtype == bool:
        bits = leaf.astype(jnp.uint8)
    else:  # 64 bits become two words
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * min(leaf.dtype.itemsize, 4)}")
    return bits.reshape(leaf.shape[0], -1).astype(jnp.uint32)


# The race ----------------------------------------------------------------------------------------


def on_sample(
    function: Callable[..., Any], count: int, total: int, key: Key, evaluate: Evaluate
) -> Evaluate:
    """The evaluation on examples drawn without replacement; for `Racing.sample`, the rest bound.

    Args:
        function: `function(*context, data, genes)`, made for `count` examples: the function of an
            `evaluator` on as many.
        count: n to draw.
        total: N that there are.
        key: PRNG key.
        evaluate: on all examples, a `jax.tree_util.Partial` whose last argument is the data.

    Returns:
        A `Partial` with the same context.

    Example:
        >>> from megajax.merging.fitness import batches
        >>> def mean(data, genes):
        ...     return genes * data.images.sum(where=data.valid) / 2, ()
        >>> data = batches(jnp.array([4.0, 4.0, 4.0]), jnp.zeros(3, int), 3)
        >>> on_sample(mean, 2, 3, jax.random.key(0), Partial(mean, data))(jnp.ones(1))[0].tolist()
        [4.0]
    """
    *context, data = evaluate.args  # type: ignore[attr-defined]
    return Partial(function, *context, draw(key, data, count, total))


def draw(key: Key, data: Batches, count: int, total: int) -> Batches:
    """Examples drawn without replacement, of every label its share, and cut into batches.

    All examples are equally likely, and a label has as many as its share in all of them, give or
    take one: every (total / count)-th of the examples in order of their labels, from a random
    first, and in random order within a label. Networks that differ in the classes they are good at
    are told apart by fewer examples so.

    Args:
        key: PRNG key.
        data: the examples, the padding at the end.
        count: n to draw.
        total: N that there are, at least n.

    Returns:
        n examples, evenly cut into batches no larger than those that there are.

    Example:
        >>> from megajax.merging.fitness import batches
        >>> few = draw(jax.random.key(0), batches(jnp.arange(9), jnp.arange(9) // 3, 4), 6, 9)
        >>> few.images.shape, sorted(few.labels[few.valid].tolist())
        ((2, 3), [0, 0, 1, 1, 2, 2])

    Source: stratified sampling with proportional allocation, Cochran, Sampling Techniques (1977),
    chapter 5.
    """
    number = -(-count // data.valid.shape[1])
    size = -(-count // number)
    valid = jnp.arange(number * size) < count
    order_key, first_key = jax.random.split(key)
    labels = data.labels.reshape(-1)[:total]
    by_label = jnp.lexsort((jax.random.uniform(order_key, (total,)), labels))
    place = (jnp.arange(count) + jax.random.uniform(first_key)) * (total / count)
    chosen = by_label[jnp.minimum(place.astype(jnp.int32), total - 1)]
    chosen = jnp.pad(chosen, (0, number * size - count))

    def cut(leaf: jax.Array) -> jax.Array:
        rows = leaf.reshape(-1, *leaf.shape[2:])[chosen]
        return rows.reshape(number, size, *leaf.shape[2:])

    valid = valid.reshape(number, size)
    return Batches(cut(data.images), jnp.where(valid, cut(data.labels), 0), valid)


def num_finalists(share: float, num_offspring: int) -> int:
    """How many of the offspring are scored on all examples: the share, rounded up.

    >>> num_finalists(0.125, 32), num_finalists(0.1, 30), num_finalists(0.01, 8)
    (4, 3, 1)
    """
    return max(math.ceil(share * num_offspring - 1e-9), 1)


# What it costs -----------------------------------------------------------------------------------


def examples_scored(
    racing: Racing | None, total: int, population_size: int, evaluations: int, completed: int
) -> int:
    """What a search has cost: passes of one example through one network, on the validation data.

    Args:
        racing: as the search had it.
        total: examples N.
        population_size: networks of the first population, which is always scored on all examples.
        evaluations: networks scored in all.
        completed: networks scored on all examples.

    Returns:
        A Python integer, which does not overflow.

    Example:
        >>> examples_scored(None, 500, 32, 1952, 1952)
        976000
        >>> examples_scored(Racing(on_sample, 64, 500, 0.125), 500, 32, 32 + 60 * 32, 32 + 60 * 4)
        258880
    """
    if racing is None:
        return int(evaluations) * total
    return (int(evaluations) - population_size) * racing.examples + int(completed) * total


def examples_per_generation(racing: Racing | None, total: int, num_offspring: int) -> int:
    """What a generation costs at most, in the same unit.

    Args:
        racing: as the search has it.
        total: examples N.
        num_offspring: children M.

    Example:
        >>> examples_per_generation(Racing(on_sample, 64, 500, 0.125), 500, 32)
        4048
    """
    if racing is None:
        return num_offspring * total
    return num_offspring * racing.examples + num_finalists(racing.share, num_offspring) * total


_Judged = tuple[Population, jax.Array, jax.Array, jax.Array]


def _judge(
    scoring: Scoring, key: Key | None, evaluate: Evaluate, genes: Genes, fresh: jax.Array
) -> _Judged:
    """All that are new on all examples; the others' places mean nothing."""
    del key
    fitness, aux, count = score_some(evaluate, genes, fresh, scoring.chunk)
    failed = ~jnp.isfinite(fitness)
    return Population(genes, jnp.where(failed, -jnp.inf, fitness), aux), failed, count, count


def _race(
    scoring: Scoring, key: Key | None, evaluate: Evaluate, genes: Genes, fresh: jax.Array
) -> _Judged:
    """All that are new on a sample, and the best of them on all examples."""
    racing = scoring.racing
    assert racing is not None
    assert key is not None
    size = _size(genes)
    rough, _, evaluations = score_some(racing.sample(key, evaluate), genes, fresh, scoring.chunk)
    alive = fresh & jnp.isfinite(rough)
    order = jnp.argsort(jnp.where(alive, -rough, jnp.inf), stable=True)
    first = order[: num_finalists(racing.share, size)]
    final = alive[first]
    fitness, aux, completed = score_some(evaluate, take(genes, first), final, scoring.chunk)
    finite = final & jnp.isfinite(fitness)
    offspring = Population(
        genes,
        jnp.full(size, -jnp.inf, fitness.dtype).at[first].set(jnp.where(finite, fitness, -jnp.inf)),
        jax.tree.map(
            lambda leaf: jnp.zeros((size, *leaf.shape[1:]), leaf.dtype).at[first].set(leaf), aux
        ),
    )
    failed = ~jnp.isfinite(rough)
    return (
        offspring,
        failed.at[first].set(failed[first] | (final & ~finite)),
        evaluations,
        completed,
    )


def _from(origin: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    return jnp.concatenate([old, new])[origin]


def _size(genes: Genes) -> int:
    size: int = jax.tree.leaves(genes)[0].shape[0]
    return size
