"""RegMean: the linear layers whose outputs are nearest to the parents' on the parents' own inputs.

What is no kernel (biases, norms, embeddings, kernels inside loops or used in two ways) is averaged,
as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from megajax.baselines.given import Given, Result, baseline
from megajax.baselines.layerwise import merge_layers, product
from megajax.errors import ConfigError, ParentsError
from megajax.types import ApplyFn, Key, PyTree

__all__ = ["regmean"]

_RIDGE = 1e-6


def regmean(
    apply_fn: ApplyFn,
    parents: Sequence[PyTree],
    inputs: Any,
    *,
    alpha: float = 0.9,
    batch_size: int = 64,
) -> PyTree:
    """Merges linear layers in closed form, so that their outputs stay near the parents'.

    For each layer `W = (sum_k G_k)^-1 sum_k G_k W_k`, which minimises
    `sum_k |X_k W - X_k W_k|^2`; X_k is what enters the layer in parent k and `G_k = X_k^T X_k`, its
    off-diagonal scaled by `alpha`. Along directions in which no parent has any input (pixels that
    are always 0) W is the mean: a millionth of the trace is added to the diagonal. All layers are
    solved by themselves, on the host in float64: no layer knows what others became.

    Args:
        apply_fn: the network, in inference mode.
        parents: K variable pytrees of one structure, hidden units aligned.
        inputs: `[n, ...]` (any pytree but a list), or a list of K: each parent's own training
            inputs.
        alpha: 1 for the exact solution, 0 to weigh every input by itself; the paper takes 0.9, and
            0.1 where 0.9 degenerates.
        batch_size: the largest batch to run; the windows of a convolution exist for one batch.

    Returns:
        The merged network. Leaves that are no kernel are averaged, those that are not floating stay
        as in parent 0.

    Raises:
        ConfigError: alpha lies outside [0, 1], or the network has no linear layer.
        DataError: there are no inputs, or they are not finite.
        ParentsError: there are not K lists of inputs, or the parents differ in structure.

    Example:
        >>> import numpy as np
        >>> def apply_fn(w, x):
        ...     return x @ w
        >>> parents = [np.array([[1.0], [5.0]]), np.array([[7.0], [2.0]])]
        >>> inputs = [np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])]  # each sees one input only
        >>> regmean(apply_fn, parents, inputs).round(3).tolist()
        [[1.0], [2.0]]

    Source: Jin et al., "Dataless knowledge fusion by merging weights of language models", ICLR
    2023, arXiv 2212.09849.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha is {alpha}: it must lie between 0 and 1")
    sets = [((k,), own) for k, own in enumerate(_own(parents, inputs))]
    return merge_layers(
        apply_fn, _nearest, parents, sets, alpha=alpha, ridge=_RIDGE, batch_size=batch_size
    )


def _own(parents: Sequence[PyTree], inputs: Any) -> list[PyTree]:
    own = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs] * len(parents)
    if len(own) != len(parents):
        raise ParentsError(f"{len(own)} lists of inputs are given for {len(parents)} parents")
    return own


def _nearest(rows: jax.Array, deviations: jax.Array, alpha: Any) -> tuple[jax.Array, jax.Array]:
    """The equations of the layer that is nearest to all parents', each on its own rows."""
    grams = product("kngi,kngj->kgij", rows, rows)
    grams *= alpha + (1 - alpha) * jnp.eye(rows.shape[-1])
    return grams.sum(0), product("kgij,kgjo->gio", grams, deviations)


@baseline(
    "regmean",
    "linear layers nearest to the parents' outputs, in closed form",
    "Jin et al., arXiv 2212.09849",
    needs=("calibration",),
    default=True,
)
def _regmean(key: Key, given: Given) -> Result:
    assert given.inputs is not None
    return Result(given.prepared(regmean(given.apply_fn, given.parents, given.inputs)))
