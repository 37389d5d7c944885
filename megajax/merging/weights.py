"""A genome of weights: the individual is the network itself, as in MeGA's reference.

Knows pytrees and genes; nothing of programs, data or searches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from megajax.errors import ConfigError
from megajax.merging.masks import Masks, mixed_leaves
from megajax.search import operators
from megajax.types import Genes, Key, PyTree

__all__ = ["Weights"]


@dataclass(frozen=True)
class Weights:
    """The leaves of the network are the genes, stacked `[P, ...]`; a gene is a whole leaf.

    A leaf that is frozen or not floating point has no gene (None in its place) and stays as in
    parent 0; half precision leaves evolve in float32. A population takes the memory of P networks,
    so large networks are better searched by masks. The options stand where MeGA's reference is
    doubtful; their defaults are the sound choices.

    Attributes:
        line: masks with one gene for the network, from which the first population is made: the
            parents, their mean and points between them, so that the result cannot be worse than
            the best parent; or random points only.
        quiet: numbers of the leaves that noise spares, in flattening order: BatchNorm's statistics,
            which are measurements of activations, so that noise makes them wrong and nothing else.
        clipped: numbers of the leaves whose negative values are set to zero: variances, because the
            root of a negative one is no number and the network is lost.
        relative_noise: the scale of the noise is in units of the standard deviation of the leaf
            that it hits, because one absolute scale drowns a layer of small weights and does
            nothing to one of large weights.
        order: numbers of the leaves that evolve, among themselves, in the order in which the
            network's program uses them, for crossovers that cut it; empty for that of the tree.

    Source: Yun, "MeGA: Merging Multiple Independently Trained Neural Networks Based on Genetic
    Algorithm", arXiv 2406.04607; `megajax.mega_paper` sets all its choices.
    """

    line: Masks
    quiet: frozenset[int] = frozenset()
    clipped: frozenset[int] = frozenset()
    relative_noise: bool = True
    order: tuple[int, ...] = ()
    gene_ndim: ClassVar[None] = None
    picks: ClassVar[bool] = False

    @property
    def labels(self) -> Any:
        """Those of `line`: which leaves evolve."""
        return self.line.labels

    @property
    def num_parents(self) -> int:
        """The number of parents K."""
        return self.line.num_parents

    @property
    def num_genes(self) -> int:
        """Leaves that evolve."""
        return sum(self._has_gene)

    @property
    def _has_gene(self) -> list[bool]:
        return mixed_leaves(self.line.labels.tree)

    def init(self, key: Key, size: int, parents: PyTree) -> PyTree:
        """The first population; see `line`."""
        has_gene = jax.tree.unflatten(jax.tree.structure(parents), self._has_gene)

        def wide(leaf: Any, has: bool) -> Any:
            return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) if has else leaf

        points = self.line.init(key, size)
        express = jax.vmap(self.line.express, (0, None), 0)
        networks = express(points, jax.tree.map(wide, parents, has_gene))
        return jax.tree.map(lambda leaf, has: leaf if has else None, networks, has_gene)

    def express(self, genes: PyTree, parents: PyTree) -> PyTree:
        """The network of one individual; `parents` from `stack`."""
        return jax.tree.map(
            lambda gene, leaf: leaf if gene is None else gene.astype(leaf.dtype),
            genes,
            parents,
            is_leaf=lambda gene: gene is None,
        )

    def stack(self, parents: Any) -> PyTree:
        """The parents as `express` takes them: `[K, ...]` where leaves evolve."""
        return self.line.stack(parents)

    def rows(self, parents: PyTree) -> list[Any]:
        """For each leaf of a network the parents' `[K, ...]`, or None where it is not mixed."""
        return self.line.rows(parents)

    def repair(self, genes: PyTree) -> PyTree:
        """Sets negative variances to zero, if so chosen."""
        leaves = self._by_number(genes)
        leaves |= {i: jnp.maximum(leaves[i], 0) for i in leaves if i in self.clipped}
        return jax.tree.unflatten(jax.tree.structure(genes), leaves.values())

    def sample(self, key: Key, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """There is nothing to draw new weights from."""
        raise ConfigError("genome.kind is 'weights': there is nothing to draw new genes from")

    def noise(self, key: Key, genes: Genes, *, rate: float, scale: float) -> Genes:
        """The Gaussian mutation of these genes."""
        leaves = self._by_number(genes)
        noisy = {i: leaf for i, leaf in leaves.items() if i not in self.quiet}
        mutated = operators.gaussian(
            key,
            list(noisy.values()),
            rate=rate,
            scale=scale,
            relative=self.relative_noise,
            gene_ndim=None,
        )
        leaves |= zip(noisy, mutated, strict=True)
        return jax.tree.unflatten(jax.tree.structure(genes), leaves.values())

    def encode(self, genes: PyTree) -> PyTree:
        """The weights themselves."""
        return genes

    def decode(self, free: PyTree) -> PyTree:
        """The weights themselves, variances repaired."""
        return self.repair(free)

    def _by_number(self, genes: PyTree) -> dict[int, jax.Array]:
        """The genes by the number of the network's leaf."""
        numbers = [i for i, has in enumerate(self._has_gene) if has]
        return dict(zip(numbers, jax.tree.leaves(genes), strict=True))
