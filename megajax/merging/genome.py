"""Genomes: what a gene is, and how the genes of one individual become a network.

A genome is data plus pure functions, `init`, `express` and `repair` above all. Two kinds:

    masks    the population is ONE array of coefficients over the parents, `[P, G, K]`; which leaf
             elements a gene governs is a labels pytree, and every granularity is just another way
             to write those labels
    weights  the population is the networks' own weights, leaf by leaf `[P, ...]`, as in MeGA

Example:
    >>> parents = {"w": jnp.stack([jnp.zeros((2, 3)), jnp.ones((2, 3))])}
    >>> genome = masks(parents, granularity="channel")
    >>> genes = genome.init(jax.random.key(0), 5)  # both parents, their mean, two random masks
    >>> genes.shape
    (5, 3, 2)
    >>> genome.express(genes[2], parents)["w"].tolist()
    [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from megajax.config import GRANULARITIES
from megajax.errors import ConfigError
from megajax.program.batchnorm import recalibrate
from megajax.search import operators
from megajax.trees import leaf_paths, num_parents, one_of
from megajax.types import ApplyFn, Genes, Key, PyTree

if TYPE_CHECKING:
    from megajax.program.roles import Statistic

__all__ = [
    "FROZEN",
    "Genome",
    "mask_labels",
    "masks",
    "nearest_on_simplex",
    "recalibrated",
    "weights",
]

FROZEN = -1
"""The label of leaf elements that no gene governs: they stay as in parent 0."""


class Genome(NamedTuple):
    """How genes stand for networks.

    Attributes:
        init: `init(key, population_size, parents) -> genes [P, ...]`, the first population. The
            parents come first, in order, unless the genome was told otherwise. Masks need no
            `parents` for it.
        express: `express(genes_of_one, parents) -> variables`, the network of one individual;
            `parents` has leaves `[K, ...]`.
        repair: `repair(genes) -> genes` puts what variation made back into the search space.
        sample: `sample(key, shape, dtype) -> genes` draws random genes, for the reset mutation.
        gene_ndim: trailing axes of one gene, for the operators.
        num_genes: genes of an individual.
        labels: pytree like the variables, the gene of each leaf element; see `masks`. None for a
            genome of weights.
        noise: `noise(key, genes, *, rate, scale) -> genes`, the Gaussian mutation of these genes.
    """

    init: Callable[..., Genes]
    express: Callable[[Genes, PyTree], PyTree]
    repair: Callable[[Genes], Genes]
    sample: Callable[[Key, tuple[int, ...], Any], jax.Array]
    gene_ndim: int | None
    num_genes: int
    labels: PyTree
    noise: Callable[..., Genes]


# Masks -------------------------------------------------------------------------------------------


def masks(
    parents: PyTree,
    *,
    granularity: str = "channel",
    layers: PyTree | None = None,
    labels: PyTree | None = None,
    freeze: str | Sequence[str] | None = None,
    binary: bool = False,
) -> Genome:
    """Mixing masks over K parents: one array of coefficients, `[P, G, K]` float32.

    The coefficients of a gene are non-negative and sum to one over the parents. A leaf element is
    the mix of the parents' elements with its gene's coefficients, computed in float32 or wider; a
    one-hot gene gives back a parent's elements bit for bit. Variances stay non-negative, being
    averages. Leaves that are not floating point stay as in parent 0.

    Args:
        parents: stacked variables, leaves `[K, ...]`, or their shapes and dtypes.
        granularity: see `mask_labels`; not used with `labels`.
        layers: pytree like one parent with the number of each leaf's layer, from `find_layers`;
            needed for `layer` and `channel`. Without it each leaf counts as a layer of its own.
        labels: the gene of each leaf element, instead of a granularity: a pytree like one parent,
            or a prefix of it, of integers or integer arrays that broadcast against the leaf. Genes
            are numbered from 0, `FROZEN` (-1) keeps parent 0.
        freeze: regular expression, or several; leaves whose path one of them matches (anywhere)
            stay as in parent 0.
        binary: each gene picks one parent.

    Returns:
        The genome. Its first population holds the K parents, then their mean (not if `binary`),
        then masks around one parent each, from close to it to entirely random.

    Raises:
        ConfigError: unknown granularity; labels that do not fit or skip a number; `freeze` that
            matches no leaf, or all of them.

    Example:
        >>> parents = {"w": jnp.zeros((3, 4)), "b": jnp.zeros((3, 1))}  # K = 3
        >>> masks(parents, labels={"w": jnp.array([0, 0, 1, 1]), "b": -1}).num_genes
        2
    """
    K = num_parents(parents)
    one = one_of(parents)
    if labels is None:
        labels = mask_labels(one, granularity, layers)
    labels = _frozen_and_renumbered(_broadcastable(labels, one), one, freeze)
    num_genes = 1 + max(int(leaf.max(initial=FROZEN)) for leaf in jax.tree.leaves(labels))

    def express(genes: jax.Array, parents: PyTree) -> PyTree:
        return jax.tree.map(lambda label, leaf: _mix(genes, label, leaf), labels, parents)

    def repair(genes: jax.Array) -> jax.Array:
        if binary:
            return _one_hot(jnp.argmax(genes, axis=-1), K)
        shares = [genes[..., k] for k in range(K)]
        inside = abs(reduce(jnp.add, shares) - 1) < 1e-6
        for share in shares:
            inside &= share >= 0
        nearest = nearest_on_simplex(shares)
        most = reduce(jnp.maximum, nearest)
        one_hot = most > 1 - 1e-6
        taken = jnp.zeros(one_hot.shape, bool)
        for k, share in enumerate(nearest):
            winner = (share == most) & ~taken
            taken |= winner
            nearest[k] = jnp.where(one_hot, winner.astype(share.dtype), share)
        pairs = zip(shares, nearest, strict=True)
        return jnp.stack([jnp.where(inside, share, near) for share, near in pairs], axis=-1)

    def sample(key: Key, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        if binary:
            return _one_hot(jax.random.randint(key, shape[:-1], 0, K), K).astype(dtype)
        # Uniform on the simplex; `jax.random.dirichlet` would compile a rejection sampler.
        waits = jax.random.exponential(key, shape, dtype)
        return waits / waits.sum(-1, keepdims=True)

    def init(key: Key, population_size: int, parents: PyTree | None = None) -> jax.Array:
        del parents
        founders = jnp.eye(K) if binary else jnp.concatenate([jnp.eye(K), jnp.full((1, K), 1 / K)])
        if population_size < len(founders):
            raise ConfigError(
                f"evolution.population_size is {population_size}: the first population holds the "
                f"{K} parents{'' if binary else ' and their mean'}, so at least {len(founders)} "
                "are needed"
            )
        founders = jnp.broadcast_to(founders[:, None], (len(founders), num_genes, K))
        shape = (population_size - len(founders), num_genes, K)
        home_key, distance_key, sample_key, hit_key = jax.random.split(key, 4)
        home = _one_hot(jax.random.randint(home_key, (shape[0], 1), 0, K), K)
        distance = jax.random.uniform(distance_key, (shape[0], 1, 1))
        wild = sample(sample_key, shape, jnp.float32)
        if binary:
            hit = jax.random.bernoulli(hit_key, jnp.broadcast_to(distance, (*shape[:2], 1)))
            others = jnp.where(hit, wild, home)
        else:
            others = (1 - distance) * home + distance * wild
        return jnp.concatenate([founders, others])

    noise = partial(operators.gaussian, gene_ndim=1)
    return Genome(init, express, repair, sample, 1, num_genes, labels, noise)


def nearest_on_simplex(shares: Sequence[jax.Array]) -> list[jax.Array]:
    """The nearest points that are non-negative and sum to one.

    All coordinates but the largest ones become zero; from those a threshold is subtracted, which is
    the largest of (sum of the n largest - 1) / n over n. For few coordinates the sums are made
    without sorting, so that all is element by element.

    Args:
        shares: K arrays of one shape, the coordinates of the points.

    Returns:
        K arrays alike.

    Example:
        >>> [float(share) for share in nearest_on_simplex([jnp.array(1.0), jnp.array(0.5)])]
        [0.75, 0.25]

    Source: Held, Wolfe and Crowder, "Validation of subgradient optimization", Mathematical
    Programming 6 (1974).
    """
    thresholds = []
    for least in shares:
        among = [share >= least for share in shares]
        largest = [jnp.where(n, share, 0) for n, share in zip(among, shares, strict=True)]
        count = sum(n.astype(least.dtype) for n in among)
        thresholds.append((reduce(jnp.add, largest) - 1) / count)
    threshold = reduce(jnp.maximum, thresholds)
    return [jnp.maximum(share - threshold, 0) for share in shares]


def mask_labels(variables: PyTree, granularity: str, layers: PyTree | None = None) -> PyTree:
    """The labels of a granularity: which gene governs each leaf element.

    Args:
        variables: one parent, or its shapes and dtypes.
        granularity: `global` (one gene for the network), `layer` (one for all leaves of a layer),
            `leaf`, `channel` (one for each output channel of a layer, shared by all its leaves:
            the last axis, as in Flax) or `element`.
        layers: pytree like `variables` with the number of each leaf's layer; None makes each leaf a
            layer of its own.

    Returns:
        Pytree like `variables` of int32 arrays that broadcast against the leaves; genes are
        numbered from 0 without gaps, layer by layer.

    Raises:
        ConfigError: unknown granularity, or `layers` of another structure.

    Example:
        >>> layer = {"kernel": np.ones((3, 2)), "bias": np.ones(2)}
        >>> mask_labels(layer, "channel", {"kernel": 0, "bias": 0})["kernel"].tolist()
        [[0, 1]]
    """
    if granularity not in GRANULARITIES:
        raise ConfigError(
            f"genome.granularity is {granularity!r}: choose one of {', '.join(GRANULARITIES)}"
        )
    leaves, treedef = jax.tree.flatten(variables)
    if layers is None:
        layers = jax.tree.unflatten(treedef, range(len(leaves)))
    if str(jax.tree.structure(layers)) != str(treedef):
        raise ConfigError("layers has not the structure of the variables")

    next_gene = 0
    first_gene: dict[Any, int] = {}
    labels: list[np.ndarray] = [np.array(FROZEN, np.int32)] * len(leaves)
    of_layer = jax.tree.leaves(layers)
    for i in sorted(range(len(leaves)), key=lambda i: (of_layer[i], i)):
        shape, layer = tuple(leaves[i].shape), of_layer[i]
        if granularity == "global":
            group: Any = ()
            inside: tuple[int, ...] = ()
        elif granularity == "layer":
            group, inside = layer, ()
        elif granularity == "channel":
            inside = (1,) * (len(shape) - 1) + shape[-1:]
            group = (layer, shape[-1:])
        else:
            group, inside = (layer, i), shape if granularity == "element" else ()
        size = int(np.prod(inside))
        if group not in first_gene:
            first_gene[group] = next_gene
            next_gene += size
        labels[i] = (first_gene[group] + np.arange(size, dtype=np.int32)).reshape(inside)
    return jax.tree.unflatten(treedef, labels)


def _broadcastable(labels: PyTree, variables: PyTree) -> PyTree:
    """Labels as a full pytree of int32 arrays of the leaves' rank, checked leaf by leaf."""
    try:
        full = jax.tree.broadcast(labels, variables)
    except ValueError as error:
        raise ConfigError(f"labels is no prefix of the variables: {error}") from None
    paths, leaves = leaf_paths(variables), jax.tree.leaves(variables)
    result = []
    for path, label, leaf in zip(paths, jax.tree.leaves(full), leaves, strict=True):
        array = np.asarray(label)
        if not np.issubdtype(array.dtype, np.integer):
            raise ConfigError(f"labels of leaf {path} are {array.dtype}: integers are needed")
        try:
            fits = np.broadcast_shapes(array.shape, leaf.shape) == tuple(leaf.shape)
        except ValueError:
            fits = False
        if not fits:
            raise ConfigError(
                f"labels of leaf {path} have shape {array.shape}, which does not broadcast to "
                f"{tuple(leaf.shape)}"
            )
        if array.min(initial=FROZEN) < FROZEN:
            raise ConfigError(f"labels of leaf {path} go down to {array.min()}: -1 is the lowest")
        rank = (1,) * (len(leaf.shape) - array.ndim)
        result.append(array.astype(np.int32).reshape(rank + array.shape))
    return jax.tree.unflatten(jax.tree.structure(variables), result)


def _frozen_and_renumbered(
    labels: PyTree, variables: PyTree, freeze: str | Sequence[str] | None
) -> PyTree:
    """Freezes leaves by path and dtype, and closes the gaps that this leaves in the numbering."""
    paths = leaf_paths(variables)
    leaves, treedef = jax.tree.flatten(labels)
    used = set().union(*(np.unique(leaf).tolist() for leaf in leaves)) - {FROZEN}
    if used != set(range(len(used))):
        gap = next(i for i in range(len(used)) if i not in used)
        raise ConfigError(f"labels skip gene {gap}: genes are numbered from 0 without gaps")
    hit = [False] * len(paths)
    for pattern in [freeze] if isinstance(freeze, str) else freeze or ():
        try:
            matches = [bool(re.search(pattern, path)) for path in paths]
        except re.error as error:
            raise ConfigError(f"genome.freeze is {pattern!r}: {error}") from None
        if not any(matches):
            raise ConfigError(
                f"genome.freeze is {pattern!r}: it matches no leaf, such as {paths[0]}"
            )
        hit = [before or now for before, now in zip(hit, matches, strict=True)]
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(variables)]
    leaves = [
        leaf if jnp.issubdtype(dtype, jnp.floating) and not frozen else np.full_like(leaf, FROZEN)
        for leaf, dtype, frozen in zip(leaves, dtypes, hit, strict=True)
    ]
    kept = sorted(set().union(*(np.unique(leaf).tolist() for leaf in leaves)) - {FROZEN})
    if not kept:
        raise ConfigError(f"genome.freeze is {freeze!r}: no leaf is left to be mixed")
    number = np.full(len(used) + 1, FROZEN, np.int32)  # the last entry serves label -1
    number[kept] = np.arange(len(kept))
    return jax.tree.unflatten(treedef, [number[leaf] for leaf in leaves])


def _mix(genes: jax.Array, label: np.ndarray, leaf: jax.Array) -> jax.Array:
    """One leaf of one individual: `leaf [K, ...]` mixed with `genes [G, K]` as the label says."""
    if (label == FROZEN).all():
        return leaf[0]
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    coefficients = jnp.moveaxis(_look_up(genes, label), -1, 0).astype(wide)
    # One parent after the other: a reduction over so short an axis is hundreds of times slower
    # where XLA makes a loop of it for each element.
    parts = [share * one.astype(wide) for share, one in zip(coefficients, leaf, strict=True)]
    mixed = reduce(jnp.add, parts).astype(leaf.dtype)
    # Products with 0 and 1 already give a parent's numbers; this gives its bits (-0.0 too).
    for share, one in zip(coefficients, leaf, strict=True):
        mixed = jnp.where(share == 1, one, mixed)
    frozen = label == FROZEN
    return jnp.where(frozen, leaf[0], mixed) if frozen.any() else mixed


def _look_up(genes: jax.Array, label: np.ndarray) -> jax.Array:
    """`genes[label]`, as a slice where the labels run through, so that no index array is stored."""
    first, size = int(label.flat[0]), label.size
    if first >= 0 and np.array_equal(label.ravel(), np.arange(first, first + size)):
        return genes[first : first + size].reshape(*label.shape, genes.shape[-1])
    return genes[jnp.maximum(label, 0)]


def _one_hot(index: jax.Array, num: int) -> jax.Array:
    return jax.nn.one_hot(index, num, dtype=jnp.float32)


# Weights -----------------------------------------------------------------------------------------


def weights(
    parents: PyTree,
    *,
    statistics: Sequence[Statistic] = (),
    freeze: str | Sequence[str] | None = None,
    parents_first: bool = True,
    relative_noise: bool = True,
    noise_on_statistics: bool = False,
    clip_variances: bool = True,
) -> Genome:
    """The individual is the network: its leaves are the genes, stacked `[P, ...]`.

    A leaf that is frozen or not floating point has no gene (None in its place) and stays as in
    parent 0; half precision leaves evolve in float32. A population takes the memory of P networks,
    so large networks are better searched by masks.

    The options stand where MeGA's reference is doubtful; their defaults are the sound choices.

    Args:
        parents: stacked variables, leaves `[K, ...]`, or their shapes and dtypes.
        statistics: the network's BatchNorm layers, from `find_statistics`.
        freeze: regular expression, or several; leaves whose path one of them matches (anywhere)
            stay as in parent 0.
        parents_first: the first population holds the K parents, their mean, then points between
            them, as with masks, so that the result cannot be worse than the best parent. Otherwise
            it is random points between the parents only.
        relative_noise: the scale of the noise is in units of the standard deviation of the leaf
            that it hits, because one absolute scale drowns a layer of small weights and does
            nothing to one of large weights.
        noise_on_statistics: noise hits the leaves of `statistics` too. They are measurements of
            activations, so that noise makes them wrong and nothing else.
        clip_variances: negative variances are set to zero; the root of one is no number, and the
            network is lost.

    Returns:
        The genome. A gene is a whole leaf (`gene_ndim` is None).

    Raises:
        ConfigError: `freeze` that matches no leaf, or all of them.

    Example:
        >>> parents = {"w": jnp.array([[0.0, 0.0], [4.0, 8.0]])}
        >>> genome = weights(parents)
        >>> genome.init(jax.random.key(0), 3, parents)["w"].tolist()
        [[0.0, 0.0], [4.0, 8.0], [2.0, 4.0]]

    Source: Yun, "Merging Multiple Independently Trained Neural Networks Based on Genetic
    Algorithm", arXiv 2406.04607; `megajax.run.presets.mega_paper` sets all its choices.
    """
    K = num_parents(parents)
    lines = masks(parents, granularity="global", freeze=freeze)
    has_gene = [not (label == FROZEN).all() for label in jax.tree.leaves(lines.labels)]
    genes_of = [i for i, has in enumerate(has_gene) if has]  # the leaf of each gene
    variances = {statistic.variance for statistic in statistics}
    quiet = set() if noise_on_statistics else variances.union(s.mean for s in statistics)
    noisy = [gene for gene, leaf in enumerate(genes_of) if leaf not in quiet]
    clipped = [clip_variances and leaf in variances for leaf in genes_of]

    def init(key: Key, population_size: int, parents: PyTree) -> PyTree:
        if parents_first:
            coefficients = lines.init(key, population_size)
        else:
            coefficients = lines.sample(key, (population_size, 1, K), jnp.float32)
        wide = jax.tree.map(
            lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), parents
        )
        leaves, treedef = jax.tree.flatten(jax.vmap(lines.express, (0, None))(coefficients, wide))
        return jax.tree.unflatten(
            treedef, [leaf if has else None for leaf, has in zip(leaves, has_gene, strict=True)]
        )

    def express(genes: PyTree, parents: PyTree) -> PyTree:
        return jax.tree.map(
            lambda gene, leaf: leaf[0] if gene is None else gene.astype(leaf.dtype),
            genes,
            parents,
            is_leaf=lambda gene: gene is None,
        )

    def repair(genes: PyTree) -> PyTree:
        leaves, treedef = jax.tree.flatten(genes)
        pairs = zip(leaves, clipped, strict=True)
        return jax.tree.unflatten(
            treedef, [jnp.maximum(leaf, 0) if clip else leaf for leaf, clip in pairs]
        )

    def sample(key: Key, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        raise ConfigError("genome.kind is 'weights': there is nothing to draw new genes from")

    def noise(key: Key, genes: PyTree, *, rate: float, scale: float) -> PyTree:
        leaves, treedef = jax.tree.flatten(genes)
        mutated = operators.gaussian(
            key,
            [leaves[i] for i in noisy],
            rate=rate,
            scale=scale,
            relative=relative_noise,
            gene_ndim=None,
        )
        for i, leaf in zip(noisy, mutated, strict=True):
            leaves[i] = leaf
        return jax.tree.unflatten(treedef, leaves)

    return Genome(init, express, repair, sample, None, len(genes_of), None, noise)


def recalibrated(genome: Genome, apply_fn: ApplyFn) -> Genome:
    """A genome whose networks are recalibrated as they are expressed.

    Every candidate is then scored, and used, with statistics of its own. An individual that is
    exactly one of the parents keeps that parent's statistics, bit for bit.

    Args:
        genome: a genome of masks or weights.
        apply_fn: the network, in inference mode.

    Returns:
        The genome; its `express` takes `(parents, inputs)` in place of `parents`, where `inputs`
        `[n, ...]` are the calibration inputs.

    Example:
        >>> from megajax.merging.genome import masks
        >>> parents = {"mean": jnp.zeros((2, 1)), "var": jnp.ones((2, 1)), "w": jnp.eye(2)[:, :1]}
        >>> def apply_fn(w, x):
        ...     return (x * w["w"] - w["mean"]) * jax.lax.rsqrt(w["var"] + 1e-5)
        >>> genome = recalibrated(masks(parents, granularity="global"), apply_fn)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> float(genome.express(jnp.array([[0.5, 0.5]]), (parents, x))["mean"][0])
        1.0
        >>> float(genome.express(jnp.array([[1.0, 0.0]]), (parents, x))["mean"][0])
        0.0
    """

    def express(genes: Genes, context: tuple[PyTree, jax.Array]) -> PyTree:
        parents, inputs = context
        variables = genome.express(genes, parents)
        equal = jax.tree.map(
            lambda leaf, of_parents: (leaf == of_parents).all(range(1, of_parents.ndim)),
            variables,
            parents,
        )
        is_parent = jnp.stack(jax.tree.leaves(equal)).all(axis=0).any()
        new = recalibrate(apply_fn, variables, inputs)
        return jax.tree.map(lambda old, new: jnp.where(is_parent, old, new), variables, new)

    return genome._replace(express=express)


# Shares ------------------------------------------------------------------------------------------
