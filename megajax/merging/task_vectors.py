"""Task vectors: what training did to a common base, scaled gene by gene and added up.

Knows pytrees and genes; nothing of programs, data or searches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from megajax.errors import ConfigError
from megajax.merging.masks import FROZEN, exact, look_up, mixed_leaves, rounded
from megajax.search import operators
from megajax.trees import Static
from megajax.types import Genes, Key, PyTree

__all__ = ["TaskVectors"]

SCALES = (0.3, 0.5, 0.7, 1.0)
"""The scales of task arithmetic in the first population."""


@dataclass(frozen=True)
class TaskVectors:
    """Networks `base + sum_k c_k (parent_k - base)`, with a coefficient for each gene and parent.

    Genes are `[P, G, K]`, or `[P, G, 2 K]` with `trim`: the second half are then densities, and a
    task vector keeps that share of the gene's elements, those of largest magnitude in their leaf
    (the trimming of TIES, arXiv 2306.01708). A gene that is one-hot gives back a parent bit for
    bit, and one of zeros the base.

    Attributes:
        labels: pytree like one parent, the gene of each leaf element; see `megajax.masks`.
        num_parents: K.
        num_genes: G.
        low: least coefficient.
        high: largest coefficient.
        trim: whether densities are searched too.

    Source: Ilharco et al., "Editing models with task arithmetic", arXiv 2212.04089.
    """

    labels: Static
    num_parents: int
    num_genes: int
    low: float = 0.0
    high: float = 2.0
    trim: bool = False
    gene_ndim: ClassVar[int] = 1
    picks: ClassVar[bool] = False

    def init(self, key: Key, size: int, parents: PyTree = None) -> jax.Array:
        """The first population: parents, base, task arithmetic at several scales, random points."""
        del parents
        K, G = self.num_parents, self.num_genes
        sums = np.outer(SCALES, np.ones(K))
        alone = np.concatenate([scale * np.eye(K) for scale in SCALES[:-1]])
        known = np.concatenate([np.eye(K), np.zeros((1, K)), sums, alone]).astype(np.float32)
        if size < K + 1:
            raise ConfigError(
                f"evolution.population_size is {size}: the first population holds the {K} parents "
                f"and their base, so at least {K + 1} are needed"
            )
        known = np.clip(known[:size], self.low, self.high)
        known = np.broadcast_to(known[:, None], (len(known), G, K))
        draws = self.sample(key, (size - len(known), G, self._width), jnp.float32)
        if self.trim:
            known = np.concatenate([known, np.ones_like(known)], axis=-1)
        return jnp.concatenate([known, draws])

    @property
    def _width(self) -> int:
        return self.num_parents * (2 if self.trim else 1)

    def express(self, genes: jax.Array, parents: PyTree) -> PyTree:
        """The network of one individual, `genes [G, K or 2 K]`; `parents` from `stack`."""
        return jax.tree.map(
            lambda label, leaf: self._add(genes, label, leaf), self.labels.tree, parents
        )

    def stack(self, parents: Sequence[PyTree], base: PyTree) -> PyTree:
        """Where genes act the base, then the parents, `[1 + K, ...]`; else parent 0's leaf.

        With `trim`, a pair of these and of the ranks of the task vectors' elements.
        """

        def stacked(label: np.ndarray, first: Any, *leaves: Any) -> Any:
            if (label == FROZEN).all():
                return leaves[0]
            networks = np.stack([first, *leaves])
            return (networks, _ranks(networks)) if self.trim else networks

        return jax.tree.map(stacked, self.labels.tree, base, *parents)

    def rows(self, parents: PyTree) -> list[Any]:
        """For each leaf of a network the parents' `[K, ...]`, or None where it is not mixed."""
        structure: Any = jax.tree.structure(self.labels.tree)
        leaves = structure.flatten_up_to(parents)
        networks = [leaf[0] if isinstance(leaf, tuple) else leaf for leaf in leaves]
        pairs = zip(mixed_leaves(self.labels.tree), networks, strict=True)
        return [leaf[1:] if mixed else None for mixed, leaf in pairs]

    def repair(self, genes: jax.Array) -> jax.Array:
        """Coefficients within the bounds, densities within [0, 1]."""
        K = self.num_parents
        bounded = jnp.clip(genes[..., :K], self.low, self.high)
        if not self.trim:
            return bounded
        return jnp.concatenate([bounded, jnp.clip(genes[..., K:], 0, 1)], axis=-1)

    def sample(self, key: Key, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Coefficients uniform between the bounds, cut to [0, 1]; densities uniform in [0, 1]."""
        drawn = jax.random.uniform(key, shape, dtype)
        low, high = max(self.low, 0.0), min(self.high, 1.0)
        coefficient = jnp.arange(shape[-1]) < self.num_parents
        bounded = drawn * (high - low) + low
        return jnp.where(jnp.broadcast_to(coefficient, shape), bounded, drawn)

    def noise(self, key: Key, genes: Genes, *, rate: float, scale: float) -> Genes:
        """The Gaussian mutation of these genes."""
        return operators.gaussian(key, genes, rate=rate, scale=scale, gene_ndim=1)

    def encode(self, genes: jax.Array) -> jax.Array:
        """Logits of where coefficients and densities lie between their bounds, moved inside."""
        low, high = self._bounds
        inside = 0.98 * (genes - low) / (high - low) + 0.01
        return jnp.log(inside) - jnp.log1p(-inside)

    def decode(self, free: jax.Array) -> jax.Array:
        """Coefficients and densities of logits. Densities get no gradient: they are thresholds."""
        low, high = self._bounds
        return low + (high - low) * jax.nn.sigmoid(free)

    @property
    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.zeros(self._width, np.float32), np.ones(self._width, np.float32)
        low[: self.num_parents], high[: self.num_parents] = self.low, self.high
        return low, high

    def _add(self, genes: jax.Array, label: np.ndarray, leaf: Any) -> jax.Array:
        if (label == FROZEN).all():
            return leaf
        K = self.num_parents
        networks, ranks = leaf if self.trim else (leaf, None)
        networks = jnp.asarray(networks)
        wide = jnp.promote_types(networks.dtype, jnp.float32)
        numbers = jnp.moveaxis(look_up(genes, label), -1, 0)
        scales = list(numbers[:K].astype(wide))
        if ranks is not None:
            scales = [jnp.where(ranks[k] < numbers[K + k], c, 0) for k, c in enumerate(scales)]
        base, *others = (one.astype(wide) for one in networks)
        total = base
        for scale, other in zip(scales, others, strict=True):
            total = total + scale * (other - base)
        result = exact(total.astype(networks.dtype), scales, networks[1:])
        nothing = reduce(jnp.logical_and, [scale == 0 for scale in scales])
        result = rounded(result, jnp.where(nothing, networks[0], result))
        frozen = label == FROZEN
        return jnp.where(frozen, networks[1], result) if frozen.any() else result


def _ranks(networks: np.ndarray) -> np.ndarray:
    """For each task vector the share of elements that are larger: float32 `[K, ...]` in [0, 1)."""
    vectors = abs(networks[1:].astype(np.float64) - networks[0]).reshape(len(networks) - 1, -1)
    order = np.argsort(np.argsort(-vectors, axis=1, kind="stable"), axis=1)
    ranks: np.ndarray = (order / vectors.shape[1]).astype(np.float32)
    return ranks.reshape(networks[1:].shape)
