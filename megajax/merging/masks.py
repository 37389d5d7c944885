"""Mixing masks: one coefficient for each gene and parent, `[P, G, K]`, one array for a population.

Which elements of which leaves a gene governs is written down as labels, and every granularity is
another way to write them. Knows pytrees and genes; nothing of programs, data or searches.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from megajax.errors import ConfigError, first_line
from megajax.search import operators
from megajax.trees import Static, is_mixable, leaf_paths
from megajax.types import Genes, Key, PyTree

__all__ = ["FROZEN", "GRANULARITIES", "Masks", "mask_labels", "masks", "nearest_on_simplex"]

FROZEN = -1
"""The label of leaf elements that no gene governs: they stay as in parent 0."""

GRANULARITIES = ("global", "layer", "leaf", "channel", "element")


@dataclass(frozen=True)
class Masks:
    """Mixing masks over K parents.

    The coefficients of a gene sum to one over the parents and are at least `low`. A leaf element is
    the mix of the parents' elements with its gene's coefficients, computed in float32 or wider; a
    one-hot gene gives back a parent's elements bit for bit. Variances stay non-negative where `low`
    is 0, being averages.

    Attributes:
        labels: pytree like one parent, the gene of each leaf element; see `masks`.
        num_parents: K.
        num_genes: G.
        picks: each gene picks one parent.
        low: least coefficient; below 0 a gene may lie beyond a parent.
        parents_first: the first population begins with the parents and their mean; otherwise it
            is random all over.
    """

    labels: Static
    num_parents: int
    num_genes: int
    picks: bool = False
    low: float = 0.0
    parents_first: bool = True
    gene_ndim: ClassVar[int] = 1
    sums_to_one: ClassVar[bool] = True

    def init(self, key: Key, size: int, parents: PyTree = None) -> jax.Array:
        """The first population: the parents, their mean, then masks around one parent each.

        These go from close to the parent to entirely random. Genes that pick a parent have no mean.

        Raises:
            ConfigError: the population has no room for the parents and their mean.
        """
        del parents
        K, G = self.num_parents, self.num_genes
        if not self.parents_first:
            return self.sample(key, (size, G, K), jnp.float32)
        founders = np.eye(K, dtype=np.float32)
        if not self.picks:
            founders = np.concatenate([founders, np.full((1, K), 1 / K, np.float32)])
        if size < len(founders):
            raise ConfigError(
                f"evolution.population_size is {size}: the first population holds the "
                f"{K} parents{'' if self.picks else ' and their mean'}, so at least "
                f"{len(founders)} are needed"
            )
        shape = (size - len(founders), G, K)
        home_key, distance_key, sample_key, hit_key = jax.random.split(key, 4)
        home = _one_hot(operators.uniform_integers(home_key, (shape[0], 1), K), K)
        distance = jax.random.uniform(distance_key, (shape[0], 1, 1))
        wild = self.sample(sample_key, shape, jnp.float32)
        if self.picks:
            hit = jax.random.bernoulli(hit_key, jnp.broadcast_to(distance, (*shape[:2], 1)))
            others = jnp.where(hit, wild, home)
        else:
            others = (1 - distance) * home + distance * wild
        first = jnp.broadcast_to(founders[:, None], (len(founders), G, K))
        return jnp.concatenate([first, others])

    def express(self, genes: jax.Array, parents: PyTree) -> PyTree:
        """The network of one individual, `genes [G, K]`; `parents` from `stack`."""
        return jax.tree.map(lambda label, leaf: _mix(genes, label, leaf), self.labels.tree, parents)

    def stack(self, parents: Sequence[PyTree]) -> PyTree:
        """The parents as `express` takes them: `[K, ...]` where genes mix, else parent 0's leaf."""

        def stacked(label: np.ndarray, *leaves: Any) -> Any:
            return leaves[0] if (label == FROZEN).all() else np.stack(leaves)

        return jax.tree.map(stacked, self.labels.tree, *parents)

    def rows(self, parents: PyTree) -> list[Any]:
        """For each leaf of a network the parents' `[K, ...]`, or None where it is not mixed."""
        pairs = zip(mixed_leaves(self.labels.tree), jax.tree.leaves(parents), strict=True)
        return [leaf if mixed else None for mixed, leaf in pairs]

    def repair(self, genes: jax.Array) -> jax.Array:
        """The nearest coefficients that sum to one and are at least `low`; exact ones stay."""
        K = self.num_parents
        if self.picks:
            return _one_hot(jnp.argmax(genes, axis=-1), K)
        shares = [genes[..., k] for k in range(K)]
        inside = abs(reduce(jnp.add, shares) - 1) < 1e-6
        for share in shares:
            inside &= share >= self.low
        nearest = nearest_on_simplex([share - self.low for share in shares], 1 - K * self.low)
        nearest = [share + self.low for share in nearest]
        if self.low == 0:  # what is almost a parent becomes one
            most = reduce(jnp.maximum, nearest)
            one_hot = most > 1 - 1e-6
            taken = jnp.zeros(one_hot.shape, bool)
            for k, share in enumerate(nearest):
                winner = (share == most) & ~taken
                taken |= winner
                nearest[k] = jnp.where(one_hot, winner.astype(share.dtype), share)
        pairs = zip(shares, nearest, strict=True)
        return jnp.stack([jnp.where(inside, share, near) for share, near in pairs], axis=-1)

    def sample(self, key: Key, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Random genes: parents drawn alike, or coefficients uniform on the simplex."""
        if self.picks:
            K = self.num_parents
            return _one_hot(operators.uniform_integers(key, shape[:-1], K), K).astype(dtype)
        # `jax.random.dirichlet` would compile a rejection sampler.
        waits = jax.random.exponential(key, shape, dtype)
        return waits / waits.sum(-1, keepdims=True)

    def noise(self, key: Key, genes: Genes, *, rate: float, scale: float) -> Genes:
        """The Gaussian mutation of these genes."""
        return operators.gaussian(key, genes, rate=rate, scale=scale, gene_ndim=1)

    def encode(self, genes: jax.Array) -> jax.Array:
        """Logits of the coefficients, those on the border moved inside by a twentieth."""
        room = 1 - self.num_parents * self.low
        shares = (genes - self.low) / room
        inside = 0.95 * shares + 0.05 / self.num_parents
        return jnp.log(jnp.maximum(inside, 1e-6))

    def decode(self, free: jax.Array) -> jax.Array:
        """Coefficients of logits."""
        # One parent after the other, as in `_mix`: softmax would reduce over so short an axis.
        logits = [free[..., k] for k in range(self.num_parents)]
        largest = jax.lax.stop_gradient(reduce(jnp.maximum, logits))
        parts = [jnp.exp(one - largest) for one in logits]
        room = (1 - self.num_parents * self.low) / reduce(jnp.add, parts)
        return jnp.stack([self.low + room * part for part in parts], axis=-1)


def masks(
    variables: PyTree,
    num_parents: int,
    *,
    granularity: str = "channel",
    layers: PyTree | None = None,
    labels: PyTree | None = None,
    freeze: str | Sequence[str] | None = None,
    binary: bool = False,
    low: float = 0.0,
) -> Masks:
    """Mixing masks for networks of one architecture.

    Leaves that are not floating point stay as in parent 0.

    Args:
        variables: of one network, or their shapes and dtypes.
        num_parents: K.
        granularity: see `mask_labels`; not used with `labels`.
        layers: pytree like `variables` with the number of each leaf's layer, from `find_layers`;
            needed for `layer` and `channel`. Without it each leaf counts as a layer of its own.
        labels: the gene of each leaf element, instead of a granularity: a pytree like `variables`,
            or a prefix of it, of integers or integer arrays that broadcast against the leaf. Genes
            are numbered from 0, `FROZEN` (-1) keeps parent 0.
        freeze: regular expression, or several; leaves whose path one of them matches (anywhere)
            stay as in parent 0.
        binary: each gene picks one parent.
        low: least coefficient; see `Masks`.

    Returns:
        The genome.

    Raises:
        ConfigError: unknown granularity; labels that do not fit or skip a number; `freeze` that
            matches no leaf, or all of them.

    Example:
        >>> network = {"w": jnp.zeros(4), "b": jnp.zeros(1)}
        >>> masks(network, 3, labels={"w": jnp.array([0, 0, 1, 1]), "b": -1}).num_genes
        2
    """
    if labels is None:
        labels = mask_labels(variables, granularity, layers)
    labels = _frozen_and_renumbered(_broadcastable(labels, variables), variables, freeze)
    num_genes = 1 + max(int(leaf.max(initial=FROZEN)) for leaf in jax.tree.leaves(labels))
    return Masks(Static(labels), num_parents, num_genes, picks=binary, low=low)


def nearest_on_simplex(shares: Sequence[jax.Array], total: float = 1.0) -> list[jax.Array]:
    """The nearest points that are non-negative and sum to `total`.

    All coordinates but the largest ones become zero; from those a threshold is subtracted, which is
    the largest of (sum of the n largest - total) / n over n. For few coordinates the sums are made
    without sorting, so that all is element by element.

    Args:
        shares: K arrays of one shape, the coordinates of the points.
        total: their sum.

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
        thresholds.append((reduce(jnp.add, largest) - total) / count)
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
        raise ConfigError("layers does not have the structure of the variables")

    next_gene = 0
    first_gene: dict[Any, int] = {}
    labels: list[np.ndarray] = [np.array(FROZEN, np.int32)] * len(leaves)
    of_layer = jax.tree.leaves(layers)
    for i in sorted(range(len(leaves)), key=lambda i: (of_layer[i], i)):
        shape, layer = np.shape(leaves[i]), of_layer[i]
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
        raise ConfigError(f"labels is not a prefix of the variables: {first_line(error)}") from None
    paths, leaves = leaf_paths(variables), jax.tree.leaves(variables)
    result = []
    for path, label, leaf in zip(paths, jax.tree.leaves(full), leaves, strict=True):
        array = np.asarray(label)
        if not np.issubdtype(array.dtype, np.integer):
            raise ConfigError(f"labels of leaf {path} are {array.dtype}: integers are needed")
        shape = np.shape(leaf)
        try:
            np.broadcast_to(array, shape)
        except ValueError:
            raise ConfigError(
                f"labels of leaf {path} have shape {array.shape}, which does not broadcast to "
                f"{shape}"
            ) from None
        if array.min(initial=FROZEN) < FROZEN:
            raise ConfigError(f"labels of leaf {path} go down to {array.min()}: -1 is the lowest")
        rank = (1,) * (len(shape) - array.ndim)
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
    hit: set[str] = set()
    for pattern in [freeze] if isinstance(freeze, str) else freeze or ():
        try:
            matches = {path for path in paths if re.search(pattern, path)}
        except re.error as error:
            raise ConfigError(f"genome.freeze is {pattern!r}: {error}") from None
        if not matches:
            raise ConfigError(
                f"genome.freeze is {pattern!r}: it matches no leaf, such as {paths[0]}"
            )
        hit |= matches
    leaves = [
        np.full_like(leaf, FROZEN) if path in hit or not is_mixable(one) else leaf
        for path, leaf, one in zip(paths, leaves, jax.tree.leaves(variables), strict=True)
    ]
    kept = sorted(set().union(*(np.unique(leaf).tolist() for leaf in leaves)) - {FROZEN})
    if not kept:
        raise ConfigError(f"genome.freeze is {freeze!r}: no leaf is left to be mixed")
    number = np.full(len(used) + 1, FROZEN, np.int32)  # the last entry serves label -1
    number[kept] = np.arange(len(kept))
    return jax.tree.unflatten(treedef, [number[leaf] for leaf in leaves])


def mixed_leaves(labels: PyTree) -> list[bool]:
    """For each leaf whether a gene governs any of its elements."""
    return [bool((label != FROZEN).any()) for label in jax.tree.leaves(labels)]


def _mix(genes: jax.Array, label: np.ndarray, leaf: Any) -> Any:
    """One leaf of one individual: `leaf [K, ...]` mixed with `genes [G, K]` as the label says."""
    if (label == FROZEN).all():
        return leaf
    leaf = jnp.asarray(leaf)
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    coefficients = jnp.moveaxis(look_up(genes, label), -1, 0).astype(wide)
    # One parent after the other: a reduction over so short an axis is hundreds of times slower
    # where XLA makes a loop of it for each element.
    parts = [share * one.astype(wide) for share, one in zip(coefficients, leaf, strict=True)]
    mixed = exact(reduce(jnp.add, parts).astype(leaf.dtype), coefficients, leaf)
    frozen = label == FROZEN
    return jnp.where(frozen, leaf[0], mixed) if frozen.any() else mixed


def exact(mixed: jax.Array, coefficients: Iterable[jax.Array], leaves: Any) -> jax.Array:
    """A mix with the bits of a leaf, -0.0 too, where its coefficient is 1 and all others are 0.

    Only bits change: derivatives are those of the mix.
    """
    shares, found = list(coefficients), mixed
    alone = reduce(jnp.add, [(share != 0).astype(jnp.int32) for share in shares]) == 1
    for share, leaf in zip(shares, leaves, strict=True):
        found = jnp.where(alone & (share == 1), leaf, found)
    return rounded(mixed, found)


@jax.custom_jvp
def rounded(value: jax.Array, bits: jax.Array) -> jax.Array:
    """The same number in other bits: `bits`, with the derivatives of `value`.

    Example:
        >>> jax.value_and_grad(lambda x: rounded(2 * x, jnp.float32(7)))(3.5)[1].item()
        2.0
    """
    del value
    return bits


@rounded.defjvp
def _rounded_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return rounded(*primals), tangents[0]


def look_up(genes: jax.Array, label: np.ndarray) -> jax.Array:
    """`genes[label]`, as a slice where the labels run through, so that no index array is stored."""
    first, size = int(label.flat[0]), label.size
    if first >= 0 and np.array_equal(label.ravel(), np.arange(first, first + size)):
        return genes[first : first + size].reshape(*label.shape, genes.shape[-1])
    return genes[jnp.maximum(label, 0)]


def _one_hot(index: jax.Array, num: int) -> jax.Array:
    return jax.nn.one_hot(index, num, dtype=jnp.float32)
