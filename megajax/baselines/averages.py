"""Means of the parents' weights: weighted, uniform, and on the sphere.

Knows pytrees only; no data, no network. BatchNorm statistics are mixed like weights here: all of
these means keep a variance non-negative. Leaves that are not floating stay as in parent 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from megajax.baselines.given import Given, Result, baseline
from megajax.baselines.leaves import combine
from megajax.errors import ConfigError, ParentsError
from megajax.types import Key, PyTree

__all__ = ["slerp", "uniform_average"]


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


def slerp(parents: Sequence[PyTree], share: float = 0.5) -> PyTree:
    """Spherical linear interpolation between two parents.

    With the angle W between a and b: `sin((1 - t) W) / sin(W) a + sin(t W) / sin(W) b`. The mean of
    two independent weight vectors is shorter than either; this is not. Taken for each leaf by
    itself, as every leaf has its own scale and the program sees the length of each one; over the
    whole vector the largest leaves alone would set the angle. Where the plane of rotation is not
    defined (a vector is zero, or the two are parallel or opposite) it is the straight line.

    Args:
        parents: two variable pytrees of one structure.
        share: t, of the second parent, in [0, 1].

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
    return combine(lambda leaves: _between(leaves, _shares(leaves, share)), parents)


def _between(leaves: jax.Array, shares: jax.Array) -> jax.Array:
    return jnp.tensordot(shares.astype(leaves.dtype), leaves, 1)


def _shares(pair: jax.Array, share: float) -> jax.Array:
    """The coefficients `[2]` of two vectors, `[2, ...]`."""
    flat = pair.reshape(2, -1)
    norm = jnp.sqrt(jnp.sum(flat**2, axis=1))
    a, b = flat / jnp.where(norm > 0, norm, 1)[:, None]
    # Exact for small angles too, where the arc cosine of the inner product is not.
    apart, together = jnp.sqrt(jnp.sum((a - b) ** 2)), jnp.sqrt(jnp.sum((a + b) ** 2))
    angle = 2 * jnp.arctan2(apart, together)
    defined = (jnp.sin(angle) > 1e-4) & (norm > 0).all()
    line = jnp.array([1 - share, share])
    return jnp.where(defined, jnp.sin(line * angle) / jnp.sin(jnp.where(defined, angle, 1)), line)


@baseline(
    "uniform_average",
    "the mean of the parents",
    "Wortsman et al., arXiv 2203.05482",
    default=True,
)
def _uniform_average(key: Key, given: Given) -> Result:
    return Result(given.merged(uniform_average))


@baseline(
    "slerp",
    "half way between two parents, each leaf on its sphere",
    "Shoemake, SIGGRAPH 1985",
    needs=("two parents",),
    default=True,
)
def _slerp(key: Key, given: Given) -> Result:
    return Result(given.merged(slerp))
