"""Genetic operators: pure functions, key first, generic over pytrees with a population axis.

The four kinds and their signatures; a function of the same signature drops in, and options are
fixed with `megajax.types.bind`:

    select(key, fitness [P], num)         -> indices [num] of the selected individuals, int32
    cross(key, first, second)             -> children; the i-th of the i-th pair
    mutate(key, genes)                    -> genes
    survive(key, population, offspring)   -> population of the size of the first

Genes are any pytree whose leaves have a leading population axis. `gene_ndim` says how many trailing
axes of a leaf belong to ONE gene: 0 where each number is a gene, 1 where a gene is a vector (a
mask's coefficients over the parents), None where the whole leaf is one gene (a weight tensor).

Source of the classical operators: Eiben and Smith, Introduction to Evolutionary Computing (2015);
BLX-alpha: Eshelman and Schaffer (1993); linear ranking: Baker (1985); SBX and
polynomial mutation: Deb and Agrawal (1995), Deb and Goyal (1996), bounded as in NSGA-II's code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from megajax.types import Genes, Key, PyTree, bind

__all__ = [
    "BLENDING",
    "CROSSOVERS",
    "SELECTIONS",
    "SURVIVALS",
    "Crossover",
    "Mutation",
    "Population",
    "Selection",
    "Survival",
    "apply_all",
    "arithmetic",
    "best",
    "blx_alpha",
    "choose_one",
    "flip",
    "gaussian",
    "generational",
    "one_point",
    "plus",
    "polynomial",
    "rank",
    "reset",
    "roulette",
    "sbx",
    "split_point",
    "take",
    "tournament",
    "two_point",
    "unchanged",
    "uniform",
]


class Population(NamedTuple):
    """Individuals and their scores.

    Attributes:
        genes: pytree, leaves `[P, ...]`.
        fitness: `[P]` float32, maximised; -inf where an evaluation gave no finite number.
        aux: whatever else the evaluation returned, leaves `[P, ...]`; `()` for nothing.
    """

    genes: Genes
    fitness: jax.Array
    aux: PyTree = ()


Selection: TypeAlias = Callable[[Key, jax.Array, int], jax.Array]
Crossover: TypeAlias = Callable[[Key, Genes, Genes], Genes]
Mutation: TypeAlias = Callable[[Key, Genes], Genes]
Survival: TypeAlias = Callable[[Key, Population, Population], Population]


def take(tree: PyTree, indices: jax.Array) -> PyTree:
    """The individuals at `indices` (an index, or an array of them) of every leaf.

    Example:
        >>> take({"genes": jnp.arange(4)}, jnp.array([3, 0]))["genes"].tolist()
        [3, 0]
    """
    return jax.tree.map(lambda leaf: leaf[indices], tree)


def unchanged(genes: Genes) -> Genes:
    """The genes as they are: the repair of a space without bounds.

    Example:
        >>> unchanged(3)
        3
    """
    return genes


# Selection ---------------------------------------------------------------------------------------


def tournament(key: Key, fitness: jax.Array, num: int, *, size: int = 3) -> jax.Array:
    """The fittest of `size` individuals drawn at random, `num` times.

    Args:
        key: PRNG key.
        fitness: `[P]`.
        num: tournaments to hold.
        size: contestants of each, all different.

    Returns:
        Winners' indices, `[num]` int32. Equal contestants: the one drawn first wins.

    Raises:
        ValueError: `size` is larger than the population.

    Example:
        >>> tournament(jax.random.key(0), jnp.array([0.0, 2.0, 1.0]), 4, size=3).tolist()
        [1, 1, 1, 1]
    """
    contestants = _distinct(key, fitness.shape[0], num, size)
    winners = jnp.argmax(fitness[contestants], axis=1)
    return jnp.take_along_axis(contestants, winners[:, None], axis=1)[:, 0]


def _distinct(key: Key, population_size: int, num: int, size: int) -> jax.Array:
    """`num` ordered draws of `size` distinct indices each, in O(num size^2)."""
    if size > population_size:
        raise ValueError(f"cannot draw {size} distinct from a population of {population_size}")
    drawn: list[jax.Array] = []
    rest = [population_size - place for place in range(size)]
    for index in uniform_integers(key, (num, size), np.array(rest)).T:
        # The index-th of those not drawn yet: step over the drawn ones in ascending order.
        for earlier in jnp.sort(jnp.stack(drawn), axis=0) if drawn else ():
            index = index + (index >= earlier).astype(jnp.int32)
        drawn.append(index)
    return jnp.stack(drawn, axis=1)


def uniform_integers(key: Key, shape: tuple[int, ...], limit: Any) -> jax.Array:
    """Integers from 0 to `limit` - 1, int32, drawn alike; `jax.random.randint` compiles longer.

    Args:
        key: PRNG key.
        shape: of the result.
        limit: a number below 2^16, or an array of them that broadcasts against the shape; some
            results are more likely than others by a part of limit / 2^24.

    Example:
        >>> uniform_integers(jax.random.key(0), (4,), 1).tolist()
        [0, 0, 0, 0]
    """
    limit = jnp.broadcast_to(jnp.asarray(limit, jnp.int32), shape)
    drawn = (jax.random.uniform(key, shape) * limit.astype(jnp.float32)).astype(jnp.int32)
    return jnp.minimum(drawn, limit - 1)


def roulette(key: Key, fitness: jax.Array, num: int) -> jax.Array:
    """Selection in proportion to the fitness above the worst finite one.

    Args:
        key: PRNG key.
        fitness: `[P]`, of any sign; individuals at -inf are never selected while another is finite.
        num: how many to select, with replacement.

    Returns:
        Indices, `[num]` int32. If all finite fitnesses are equal, they are equally likely.

    Example:
        >>> roulette(jax.random.key(0), jnp.array([1.0, 1.0, 9.0]), 3).tolist()
        [2, 2, 2]
    """
    finite = jnp.isfinite(fitness)
    worst = jnp.min(fitness, where=finite, initial=jnp.inf)
    weight = jnp.where(finite, fitness - worst, 0.0)
    weight = jnp.where(weight.max() > 0, weight, finite.astype(weight.dtype))
    return _draw(key, weight, num)


def rank(key: Key, fitness: jax.Array, num: int, *, pressure: float = 1.7) -> jax.Array:
    """Linear ranking: the best is expected `pressure` times, the worst `2 - pressure` times.

    Args:
        key: PRNG key.
        fitness: `[P]`; only the order counts, and individuals at -inf are never selected while
            another is finite.
        num: how many to select, with replacement.
        pressure: in [1, 2]; expected copies of the best in P draws.

    Returns:
        Indices, `[num]` int32.

    Example:
        >>> rank(jax.random.key(0), jnp.array([1.0, 2.0]), 3, pressure=2.0).tolist()
        [1, 1, 1]
    """
    population_size = fitness.shape[0]
    position = jnp.argsort(jnp.argsort(fitness)) / max(population_size - 1, 1)
    weight = (2.0 - pressure) + 2.0 * (pressure - 1.0) * position
    return _draw(key, jnp.where(jnp.isfinite(fitness), weight, 0.0), num)


def _draw(key: Key, weight: jax.Array, num: int) -> jax.Array:
    """Categorical draws; a weight of exactly zero is never drawn while another is positive."""
    return jax.random.categorical(key, jnp.log(weight), shape=(num,)).astype(jnp.int32)


# Crossover ---------------------------------------------------------------------------------------


def arithmetic(
    key: Key, first: Genes, second: Genes, *, per_gene: bool = False, gene_ndim: int | None = 0
) -> Genes:
    """Child `b * first + (1 - b) * second` with b ~ U(0, 1).

    Args:
        key: PRNG key.
        first: genes of the first of each pair, leaves `[N, ...]`.
        second: genes of the second, alike.
        per_gene: draw b for each gene; otherwise one b for the whole child, as in MeGA.
        gene_ndim: trailing axes of one gene; see the module.

    Returns:
        Children, alike.

    Example:
        >>> child = arithmetic(jax.random.key(0), jnp.zeros((1, 3)), jnp.ones((1, 3)))
        >>> bool((child == child[0, 0]).all())
        True
    """
    if per_gene:
        return _per_leaf(
            lambda key, a, b: _blend(a, b, jax.random.uniform(key, _gene_shape(a, gene_ndim))),
            key,
            first,
            second,
        )
    share = jax.random.uniform(key, (_size(first),))
    return jax.tree.map(lambda a, b: _blend(a, b, share), first, second)


def uniform(
    key: Key, first: Genes, second: Genes, *, rate: float = 0.5, gene_ndim: int | None = 0
) -> Genes:
    """Each gene comes from `second` with probability `rate`, otherwise from `first`.

    Args:
        key: PRNG key.
        first: genes of the first of each pair, leaves `[N, ...]`.
        second: genes of the second, alike.
        rate: probability in [0, 1].
        gene_ndim: trailing axes of one gene; see the module.

    Returns:
        Children, alike; every gene is one of the pair's, bit for bit.

    Example:
        >>> uniform(jax.random.key(0), jnp.zeros((1, 4)), jnp.ones((1, 4)), rate=1.0).tolist()
        [[1.0, 1.0, 1.0, 1.0]]
    """

    def cross(key: Key, a: jax.Array, b: jax.Array) -> jax.Array:
        shape = _gene_shape(a, gene_ndim)
        even = isinstance(rate, float) and rate == 0.5
        swap = _coins(key, shape) if even else jax.random.bernoulli(key, rate, shape)
        return jnp.where(_expand(swap, a), b, a)

    return _per_leaf(cross, key, first, second)


def one_point(key: Key, first: Genes, second: Genes, *, gene_ndim: int | None = 0) -> Genes:
    """Genes before a random cut come from `first`, the others from `second`.

    The cut falls between two genes, in the order of the leaves; neither part is empty, as long as
    there are two genes.

    Args:
        key: PRNG key.
        first: genes of the first of each pair, leaves `[N, ...]`.
        second: genes of the second, alike.
        gene_ndim: trailing axes of one gene; see the module.

    Returns:
        Children, alike.

    Example:
        >>> one_point(jax.random.key(1), jnp.zeros((1, 2)), jnp.ones((1, 2))).tolist()
        [[0.0, 1.0]]
    """
    last = max(_num_genes(first, gene_ndim) - 1, 1)
    start = jax.random.randint(key, (_size(first),), 1, last + 1)
    return _splice(first, second, start, jnp.full_like(start, last + 1), gene_ndim)


def two_point(key: Key, first: Genes, second: Genes, *, gene_ndim: int | None = 0) -> Genes:
    """Genes between two random cuts come from `second`, the others from `first`.

    Args:
        key: PRNG key.
        first: genes of the first of each pair, leaves `[N, ...]`.
        second: genes of the second, alike.
        gene_ndim: trailing axes of one gene; see the module.

    Returns:
        Children, alike; at least one gene comes from `second`, and one from `first` unless there is
        a single gene.

    Example:
        >>> child = two_point(jax.random.key(1), jnp.zeros((1, 5)), jnp.ones((1, 5)))
        >>> 1 <= child.sum() <= 4
        Array(True, dtype=bool)
    """
    num_genes = _num_genes(first, gene_ndim)
    start_key, length_key = jax.random.split(key)
    length = jax.random.randint(length_key, (_size(first),), 1, max(num_genes, 2))
    start = jax.random.randint(start_key, length.shape, 0, num_genes - length + 1)
    return _splice(first, second, start, start + length, gene_ndim)


def blx_alpha(
    key: Key, first: Genes, second: Genes, *, alpha: float = 0.5, gene_ndim: int | None = 0
) -> Genes:
    """Blend crossover: each gene is drawn from the pair's interval, widened by `alpha` each way.

    A gene that is a vector is drawn from the line through the pair, widened alike, so that
    coefficients that sum to one keep doing so.

    Args:
        key: PRNG key.
        first: genes of the first of each pair, leaves `[N, ...]`.
        second: genes of the second, alike.
        alpha: widening, as a share of the interval's length.
        gene_ndim: trailing axes of one gene; see the module.

    Returns:
        Children, alike.

    Example:
        >>> child = blx_alpha(jax.random.key(0), jnp.zeros((1, 9)), jnp.ones((1, 9)), alpha=0.1)
        >>> bool(((child >= -0.1) & (child <= 1.1)).all())
        True
    """

    def cross(key: Key, a: jax.Array, b: jax.Array) -> jax.Array:
        shape = _gene_shape(a, gene_ndim)
        return _blend(a, b, jax.random.uniform(key, shape, minval=-alpha, maxval=1.0 + alpha))

    return _per_leaf(cross, key, first, second)


def sbx(
    key: Key,
    first: Genes,
    second: Genes,
    *,
    eta: float = 20.0,
    rate: float = 0.9,
    low: float = -math.inf,
    high: float = math.inf,
    gene_ndim: int | None = 0,
) -> Genes:
    """Simulated binary crossover: genes near one of the pair's, the nearer the closer the pair.

    With probability `rate` a child is made so: half of its genes come from `first`; the others lie
    on the line through the pair, around either of the two with equal probability. Otherwise the
    child is `first`.

    Args:
        key: PRNG key.
        first: genes of the first of each pair, leaves `[N, ...]`.
        second: genes of the second, alike.
        eta: distribution index; the larger, the nearer children are to the pair.
        rate: probability in [0, 1] that a child is crossed at all.
        low: no number of a child lies below it, if none of its pair does.
        high: nor above it.
        gene_ndim: trailing axes of one gene; see the module.

    Returns:
        Children, alike.

    Example:
        >>> child = sbx(jax.random.key(0), jnp.zeros((1, 99)), jnp.ones((1, 99)), low=0, high=1)
        >>> bool(((child >= 0) & (child <= 1)).all()), bool(abs(child - 0.5).min() > 0.1)
        (True, True)
    """
    whole_key, genes_key = jax.random.split(key)
    crossed = jax.random.bernoulli(whole_key, rate, (_size(first),))
    power = 1 / (eta + 1)

    def cross(key: Key, a: jax.Array, b: jax.Array) -> jax.Array:
        shape = _gene_shape(a, gene_ndim)
        spread_key, side_key, hit_key = jax.random.split(key, 3)
        drawn = _expand(jax.random.uniform(spread_key, shape, a.dtype), a)
        way = jnp.where(_expand(_coins(side_key, shape), a), b - a, a - b)
        gap = abs(way)
        room = jnp.where(way > 0, high - jnp.maximum(a, b), jnp.minimum(a, b) - low)
        # The tail beyond the bound is cut off: `total` is what is left of twice the probability.
        total = 2 - (1 + 2 * room / jnp.where(gap > 0, gap, 1)) ** -(eta + 1)
        inner = drawn * total
        spread = jnp.where(inner <= 1, inner, 1 / (2 - jnp.maximum(inner, 1))) ** power
        child = jnp.clip((a + b + spread * way) / 2, low, high)
        hit = _expand(_coins(hit_key, shape), a) & _expand(crossed, a) & (gap > 0)
        return jnp.where(hit, child, a)

    return _per_leaf(cross, genes_key, first, second)


def split_point(
    key: Key,
    first: Genes,
    second: Genes,
    *,
    spherical: bool = False,
    gene_ndim: int | None = 0,
    order: tuple[int, ...] = (),
) -> Genes:
    """Genes before a random cut are mixed one way, those behind it the other way round (M2N2).

    Before the cut a child is `(1 - w) first + w second` with one w ~ U(0, 1), from the cut on
    `w first + (1 - w) second`. The cut comes before any gene with equal probability. Where a gene
    is a whole leaf, the cut may fall inside a leaf all the same.

    Args:
        key: PRNG key.
        first: genes of the first of each pair, leaves `[N, ...]`.
        second: genes of the second, alike.
        spherical: mix on the arc between the two, both taken as one long vector, instead of on the
            straight line.
        gene_ndim: trailing axes of one gene; see the module.
        order: numbers of the leaves in the order that is cut; empty for the order of the tree.

    Returns:
        Children, alike.

    Example:
        >>> child = split_point(jax.random.key(1), jnp.zeros((1, 9)), jnp.ones((1, 9)))
        >>> len(set(child[0].tolist())), round(float(child[0, 0] + child[0, -1]), 6)
        (2, 1.0)

    Source: Abrantes, Lange and Tang, "Competition and attraction improve model fusion",
    arXiv 2508.16204, equation 2.
    """
    leaves, treedef = jax.tree.flatten(first)
    order = order or tuple(range(len(leaves)))
    one = [leaves[i] for i in order]
    other = [jax.tree.leaves(second)[i] for i in order]
    cut_key, share_key = jax.random.split(key)
    num_genes = _num_genes(one, gene_ndim or 0)
    cut = jax.random.randint(cut_key, (_size(first),), 0, num_genes)
    share = jax.random.uniform(share_key, cut.shape)
    mix = _on_the_arc if spherical else _on_the_line
    before, behind = mix(one, other, share), mix(one, other, 1 - share)
    children = _splice(before, behind, cut, jnp.full_like(cut, num_genes), gene_ndim or 0)
    back = sorted(range(len(order)), key=order.__getitem__)
    return jax.tree.unflatten(treedef, [children[i] for i in back])


def _on_the_line(first: Genes, second: Genes, share: jax.Array) -> Genes:
    """`(1 - share) first + share second`."""
    return jax.tree.map(lambda a, b: _blend(b, a, share), first, second)


def _on_the_arc(first: Genes, second: Genes, share: jax.Array) -> Genes:
    """Spherical interpolation of whole individuals; on the line where they are parallel."""

    def dot(one: Genes, other: Genes) -> jax.Array:
        def of_leaf(a: jax.Array, b: jax.Array) -> jax.Array:
            return (a.astype(jnp.float32) * b.astype(jnp.float32)).sum(axis=range(1, a.ndim))

        pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        return sum((of_leaf(a, b) for a, b in pairs), jnp.float32(0))

    lengths = jnp.sqrt(dot(first, first)) * jnp.sqrt(dot(second, second))
    cosine = dot(first, second) / jnp.where(lengths > 0, lengths, 1)
    angle = jnp.arccos(jnp.clip(cosine, -1, 1))
    sine = jnp.sin(angle)
    parallel = sine <= 1e-6
    sine = jnp.where(parallel, 1, sine)
    of_first = jnp.where(parallel, 1 - share, jnp.sin((1 - share) * angle) / sine)
    of_second = jnp.where(parallel, share, jnp.sin(share * angle) / sine)
    return jax.tree.map(
        lambda a, b: (
            _expand(of_first, a).astype(a.dtype) * a + _expand(of_second, b).astype(b.dtype) * b
        ),
        first,
        second,
    )


def choose_one(key: Key, first: Genes, second: Genes, *, among: Sequence[Crossover]) -> Genes:
    """Each child is made by one of several crossovers, drawn with equal probability.

    Args:
        key: PRNG key.
        first: genes of the first of each pair, leaves `[N, ...]`.
        second: genes of the second, alike.
        among: the crossovers.

    Returns:
        Children, alike.

    Example:
        >>> first, second = jnp.zeros((2, 1)), jnp.ones((2, 1))
        >>> choose_one(jax.random.key(0), first, second, among=[uniform, arithmetic]).shape
        (2, 1)
    """
    choice_key, *keys = jax.random.split(key, len(among) + 1)
    children = [cross(k, first, second) for k, cross in zip(keys, among, strict=True)]
    choice = uniform_integers(choice_key, (_size(first),), len(among))
    return jax.tree.map(
        lambda *leaves: jnp.stack(leaves)[choice, jnp.arange(choice.size)], *children
    )


def _splice(
    first: Genes, second: Genes, start: jax.Array, stop: jax.Array, gene_ndim: int | None
) -> Genes:
    """Genes at positions start <= position < stop (`[N]` each) from `second`, others `first`."""
    leaves, treedef = jax.tree.flatten(first)
    offset, children = 0, []
    for a, b in zip(leaves, jax.tree.leaves(second), strict=True):
        shape = _gene_shape(a, gene_ndim)[1:]
        size = math.prod(shape)
        position = offset + jnp.arange(size).reshape(1, *shape)
        offset += size
        inside = (position >= _expand(start, position)) & (position < _expand(stop, position))
        children.append(jnp.where(_expand(inside, a), b, a))
    return jax.tree.unflatten(treedef, children)


def _blend(a: jax.Array, b: jax.Array, share: jax.Array) -> jax.Array:
    # This form gives back a gene that both share bit for bit.
    return b + _expand(share, a).astype(a.dtype) * (a - b)


# Mutation ----------------------------------------------------------------------------------------


def gaussian(
    key: Key,
    genes: Genes,
    *,
    rate: float = 0.05,
    scale: float = 0.1,
    relative: bool = False,
    gene_ndim: int | None = 0,
) -> Genes:
    """Adds N(0, scale^2) to every number of a gene, with probability `rate` for each gene.

    Args:
        key: PRNG key.
        genes: leaves `[N, ...]`.
        rate: probability in [0, 1].
        scale: standard deviation of the noise.
        relative: measure the scale in standard deviations of the gene's own numbers; a gene whose
            numbers are all equal then stays as it is.
        gene_ndim: trailing axes of one gene; see the module.

    Returns:
        Genes, alike; those not hit are unchanged bit for bit.

    Example:
        >>> gaussian(jax.random.key(0), jnp.ones((1, 2)), rate=0.0).tolist()
        [[1.0, 1.0]]
    """

    def renew(key: Key, hit: jax.Array) -> jax.Array:
        noise = scale * jax.random.normal(key, hit.shape, hit.dtype)
        if relative:
            inside = tuple(range(len(_gene_shape(hit, gene_ndim)), hit.ndim))
            noise *= jnp.std(hit, axis=inside, keepdims=True)
        return hit + noise

    return _per_leaf(partial(_renewed, renew, rate, gene_ndim), key, genes)


def reset(
    key: Key,
    genes: Genes,
    *,
    rate: float = 0.05,
    sample: Callable[[Key, tuple[int, ...], Any], jax.Array] = jax.random.uniform,
    gene_ndim: int | None = 0,
) -> Genes:
    """Draws a gene anew, with probability `rate` for each gene.

    Args:
        key: PRNG key.
        genes: leaves `[N, ...]`.
        rate: probability in [0, 1].
        sample: `sample(key, shape, dtype)`, for any number of genes; the default draws every number
            from U(0, 1).
        gene_ndim: trailing axes of one gene; see the module.

    Returns:
        Genes, alike; those not hit are unchanged bit for bit.

    Example:
        >>> reset(jax.random.key(0), jnp.full((1, 2), 7.0), rate=1.0).max() < 1
        Array(True, dtype=bool)
    """

    def renew(key: Key, hit: jax.Array) -> jax.Array:
        return sample(key, hit.shape, hit.dtype)

    return _per_leaf(partial(_renewed, renew, rate, gene_ndim), key, genes)


def polynomial(
    key: Key,
    genes: Genes,
    *,
    rate: float = 0.05,
    eta: float = 20.0,
    low: float = 0.0,
    high: float = 1.0,
    gene_ndim: int | None = 0,
) -> Genes:
    """Moves the numbers of a gene within bounds, most often a little; `rate` for each gene.

    Args:
        key: PRNG key.
        genes: leaves `[N, ...]`, numbers between the bounds.
        rate: probability in [0, 1].
        eta: distribution index: moves are of the order of (high - low) / eta.
        low: lower bound.
        high: upper bound.
        gene_ndim: trailing axes of one gene; see the module.

    Returns:
        Genes, alike; those not hit are unchanged bit for bit.

    Example:
        >>> genes = polynomial(jax.random.key(0), jnp.zeros((1, 99)), rate=1.0)
        >>> bool(((genes >= 0) & (genes <= 1)).all()), bool(genes.mean() < 0.05)
        (True, True)
    """

    def renew(key: Key, hit: jax.Array) -> jax.Array:
        drawn = jax.random.uniform(key, hit.shape, hit.dtype, -1, 1)
        room = jnp.where(drawn < 0, hit - low, high - hit) / (high - low)
        away = 1 - abs(drawn)  # of twice the probability, what lies beyond the move
        step = 1 - (away + (1 - away) * (1 - room) ** (eta + 1)) ** (1 / (eta + 1))
        return jnp.clip(hit + jnp.sign(drawn) * step * (high - low), low, high)

    return _per_leaf(partial(_renewed, renew, rate, gene_ndim), key, genes)


def flip(key: Key, genes: Genes, *, rate: float = 0.05) -> Genes:
    """Lets a gene that picks one parent pick another one, with probability `rate` for each gene.

    Standard bit mutation, where there are two parents.

    Args:
        key: PRNG key.
        genes: leaves `[N, ..., K]`, one-hot along the last axis.
        rate: probability in [0, 1].

    Returns:
        Genes, alike.

    Example:
        >>> flip(jax.random.key(0), jnp.array([[[1.0, 0.0], [0.0, 1.0]]]), rate=1.0).tolist()
        [[[0.0, 1.0], [1.0, 0.0]]]
    """

    def renew(key: Key, hit: jax.Array) -> jax.Array:
        K = hit.shape[-1]
        step = 1 + uniform_integers(key, hit.shape[:-1], K - 1)
        return jax.nn.one_hot((jnp.argmax(hit, axis=-1) + step) % K, K, dtype=hit.dtype)

    return _per_leaf(partial(_renewed, renew, rate, 1), key, genes)


def apply_all(key: Key, genes: Genes, *, mutations: Sequence[Mutation]) -> Genes:
    """Several mutations in turn, each with a key of its own.

    Args:
        key: PRNG key.
        genes: leaves `[N, ...]`.
        mutations: applied from first to last.

    Returns:
        Genes, alike.

    Example:
        >>> apply_all(jax.random.key(0), jnp.ones((1, 2)), mutations=[]).tolist()
        [[1.0, 1.0]]
    """
    for i, mutate in enumerate(mutations):
        genes = mutate(jax.random.fold_in(key, i), genes)
    return genes


def _renewed(
    renew: Callable[[Key, jax.Array], jax.Array],
    rate: float,
    gene_ndim: int | None,
    key: Key,
    leaf: jax.Array,
) -> jax.Array:
    """A leaf with `renew(key, genes)` in place of its genes, with probability `rate` for each.

    Where few are hit, random numbers are drawn for those alone: which they are follows from the
    gaps between them, which are geometric.
    """
    size, *shape = _gene_shape(leaf, gene_ndim)
    num_genes = math.prod(shape)
    hit_key, renew_key = jax.random.split(key)
    most = most_hits(rate, num_genes)
    if 4 * most > num_genes or leaf.size < _FEW:
        hit = jax.random.bernoulli(hit_key, rate, (size, *shape))
        return jnp.where(_expand(hit, leaf), renew(renew_key, leaf), leaf)
    gaps = jax.random.geometric(hit_key, rate, (size, most), jnp.int32)
    gene = jnp.cumsum(jnp.minimum(gaps, num_genes + 1), axis=1) - 1
    rows = leaf.reshape(size, num_genes, *leaf.shape[1 + len(shape) :])
    place = (jnp.arange(size)[:, None], gene)
    new = renew(renew_key, rows.at[place].get(mode="clip"))
    rows = rows.at[place].set(new, mode="drop", unique_indices=True, indices_are_sorted=True)
    return rows.reshape(leaf.shape)


_FEW = 2**18
"""Numbers that are drawn faster than the genes hit among them are found."""


def most_hits(rate: float, num_genes: int) -> int:
    """A number that the genes hit, each with probability `rate`, exceed once in 10^15 times.

    >>> most_hits(0.01, 10_000), most_hits(0.05, 20), most_hits(0.0, 10_000)
    (196, 20, 10000)
    """
    if not 0 < rate < 1 or num_genes > 2**24:  # positions are added up in 32 bits
        return num_genes
    mean = rate * num_genes
    return min(num_genes, math.ceil(mean + 8 * math.sqrt(mean) + 16))


# Survival ----------------------------------------------------------------------------------------


def generational(key: Key, population: Population, offspring: Population) -> Population:
    """All offspring survive, and with them the best of the old population (the elites).

    With P individuals and M offspring there are P - M elites.

    Args:
        key: not used.
        population: P individuals.
        offspring: M <= P individuals.

    Returns:
        P individuals, the elites first, best of all in slot 0; scores move along unchanged.

    Example:
        >>> old = Population(jnp.array([1, 2, 3]), jnp.array([0.1, 0.3, 0.2]))
        >>> new = Population(jnp.array([4, 5]), jnp.array([0.0, 0.0]))
        >>> generational(jax.random.key(0), old, new).genes.tolist()
        [2, 4, 5]
    """
    del key
    elites = best(population, _size(population) - _size(offspring))
    return concatenate(elites, offspring)


def plus(key: Key, population: Population, offspring: Population) -> Population:
    """The best of old and new together: (mu + lambda).

    Args:
        key: not used.
        population: P individuals.
        offspring: any number of individuals.

    Returns:
        P individuals, best first; scores move along unchanged. Equal fitness: the older one stays.

    Example:
        >>> old = Population(jnp.array([1, 2]), jnp.array([0.1, 0.3]))
        >>> new = Population(jnp.array([4, 5]), jnp.array([0.2, 0.0]))
        >>> plus(jax.random.key(0), old, new).genes.tolist()
        [2, 4]
    """
    del key
    return best(concatenate(population, offspring), _size(population))


def best(population: Population, num: int) -> Population:
    """The `num` fittest, best first; equal ones in the order of the population.

    Example:
        >>> best(Population(jnp.array([1, 2]), jnp.array([0.1, 0.3])), 1).genes.tolist()
        [2]
    """
    order = jnp.argsort(-population.fitness, stable=True)[:num]
    return take(population, order)


def concatenate(first: Population, second: Population) -> Population:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)


# Pytrees with a population axis ------------------------------------------------------------------


def _per_leaf(operator: Callable[..., jax.Array], key: Key, *trees: Genes) -> Genes:
    """Applies `operator(key, *leaves)` leaf by leaf, every leaf with a key of its own."""
    leaves, treedef = jax.tree.flatten(trees[0])
    keys = [key] if len(leaves) == 1 else jax.random.split(key, len(leaves))
    columns = zip(keys, *map(jax.tree.leaves, trees), strict=True)
    return jax.tree.unflatten(treedef, [operator(*column) for column in columns])


def _size(genes: Genes) -> int:
    return int(jax.tree.leaves(genes)[0].shape[0])


def _gene_shape(leaf: jax.Array, gene_ndim: int | None) -> tuple[int, ...]:
    """The leaf's shape without the axes inside a gene: `[N, genes...]`."""
    return leaf.shape[:1] if gene_ndim is None else leaf.shape[: leaf.ndim - gene_ndim]


def _num_genes(genes: Genes, gene_ndim: int | None) -> int:
    return sum(math.prod(_gene_shape(leaf, gene_ndim)[1:]) for leaf in jax.tree.leaves(genes))


def _coins(key: Key, shape: tuple[int, ...]) -> jax.Array:
    """Fair coins, 32 from each random word: a Bernoulli number takes a word of its own."""
    count = math.prod(shape)
    words = jax.random.bits(key, (-(-count // 32), 1), jnp.uint32)
    coins = (words >> jnp.arange(32, dtype=jnp.uint32)[None]) & 1
    return coins.reshape(-1)[:count].reshape(shape).astype(bool)


def _expand(values: jax.Array, like: jax.Array) -> jax.Array:
    """Appends axes of length one until `values` broadcasts against `like`."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


# By name -----------------------------------------------------------------------------------------

SELECTIONS: dict[str, Selection] = {
    "tournament": tournament,
    "roulette": roulette,
    "rank": rank,
}
CROSSOVERS: dict[str, Crossover] = {
    "arithmetic": arithmetic,
    "arithmetic_per_gene": bind(arithmetic, per_gene=True),
    "uniform": uniform,
    "one_point": one_point,
    "two_point": two_point,
    "blx_alpha": blx_alpha,
    "sbx": sbx,
    "split_lerp": split_point,
    "split_slerp": bind(split_point, spherical=True),
}
BLENDING = frozenset(CROSSOVERS) - {"uniform", "one_point", "two_point"}
"""The crossovers that make new numbers, which genes that pick one parent cannot have."""
SURVIVALS: dict[str, Survival] = {"plus": plus, "generational": generational}
