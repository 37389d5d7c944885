"""Means of the parents' weights: weighted, uniform, and on the sphere.

Knows pytrees only; no data, no network. BatchNorm statistics are mixed like weights here: all of
these means keep a variance non-negative. Leaves that are not floating stay as in parent 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from megajax.baselines.leaves import combine, is_floating
from megajax.errors import ConfigError, ParentsError
from megajax.types import PyTree

__all__ = ["slerp", "uniform_average", "weighted_average"]


def uniform_average(parents: Sequence[PyTree]) -> PyTree:
    """The plain mean of the parents, leaf by leaf (a uniform soup).

    Args:
        parents: variable pytrees of one structure; one is enough.

    Returns:
        The mean network, computed in float32 or wider, in the parents' dtypes.

    Raises:
        ParentsError: the parents differ in structure or shapes.

    Example:
        >>> uniform_average([{"w": jnp.zeros(2)}, {"w": jnp.ones(2)}])["w"].tolist()
        [0.5, 0.5]

    Source: Wortsman et al., "Model soups", ICML 2022, arXiv 2203.05482.
    """
    return combine(lambda leaves: leaves.mean(axis=0), parents)


def weighted_average(parents: Sequence[PyTree], weights: Any) -> PyTree:
    """The mean of the parents with a weight for each.

    Args:
        parents: K variable pytrees of one structure.
        weights: `[K]`; used as they are, so that they should sum to one.

    Returns:
        The mean network.

    Raises:
        ConfigError: there is not one weight for each parent.
        ParentsError: the parents differ in structure or shapes.

    Example:
        >>> weighted_average([{"w": jnp.zeros(2)}, {"w": jnp.ones(2)}], [0.25, 0.75])["w"].tolist()
        [0.75, 0.75]
    """
    weights = jnp.asarray(weights, jnp.float32)
    if weights.shape != (len(parents),):
        raise ConfigError(f"weights have shape {weights.shape} for {len(parents)} parents")
    return combine(lambda leaves: jnp.tensordot(weights.astype(leaves.dtype), leaves, 1), parents)


def slerp(parents: Sequence[PyTree], share: float = 0.5, *, per_leaf: bool = True) -> PyTree:
    """Spherical linear interpolation between two parents.

    With the angle W between a and b: `sin((1 - t) W) / sin(W) a + sin(t W) / sin(W) b`. The mean of
    two independent weight vectors is shorter than either; this is not. Taken for each leaf by
    itself, as every leaf has its own scale and the program sees the length of each one; over the
    whole vector the largest leaves alone would set the angle. Where the plane of rotation is not
    defined (a vector is zero, or the two are parallel or opposite) it is the straight line.

    Args:
        parents: two variable pytrees of one structure.
        share: t, of the second parent, in [0, 1].
        per_leaf: interpolate each leaf by itself; otherwise all leaves as one vector.

    Returns:
        The interpolated network.

    Raises:
        ParentsError: there are not two parents, or they differ in structure or shapes.
        ConfigError: the share lies outside [0, 1].

    Example:
        >>> a, b = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}
        >>> [round(x, 3) for x in slerp([a, b])["w"].tolist()]
        [0.707, 0.707]

    Source: Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985.
    """
    if len(parents) != 2:
        raise ParentsError(f"slerp takes two parents: {len(parents)} are given")
    if not 0 <= share <= 1:
        raise ConfigError(f"share is {share}: it must lie between 0 and 1")
    if per_leaf:
        return combine(lambda leaves: _between(leaves, _shares([leaves], share)), parents)
    pairs = zip(*map(jax.tree.leaves, parents), strict=True)
    wide = [jnp.stack([jnp.asarray(x, jnp.float32) for x in p]) for p in pairs if is_floating(p[0])]
    shares = _shares(wide, share)
    return combine(lambda leaves: _between(leaves, shares), parents)


def _between(leaves: jax.Array, shares: jax.Array) -> jax.Array:
    return jnp.tensordot(shares.astype(leaves.dtype), leaves, 1)


def _shares(pairs: Sequence[jax.Array], share: float) -> jax.Array:
    """The coefficients `[2]` of two vectors that are given in pieces `[2, ...]`."""
    flat = [pair.reshape(2, -1) for pair in pairs]
    norm = jnp.sqrt(sum(jnp.sum(pair**2, axis=1) for pair in flat))
    unit = [pair / jnp.where(norm > 0, norm, 1)[:, None] for pair in flat]
    # Exact for small angles too, where the arc cosine of the inner product is not.
    apart = jnp.sqrt(sum(jnp.sum((a - b) ** 2) for a, b in unit))
    together = jnp.sqrt(sum(jnp.sum((a + b) ** 2) for a, b in unit))
    angle = 2 * jnp.arctan2(apart, together)
    defined = (jnp.sin(angle) > 1e-4) & (norm > 0).all()
    line = jnp.array([1 - share, share])
    return jnp.where(defined, jnp.sin(line * angle) / jnp.sin(jnp.where(defined, angle, 1)), line)
