"""RegMean and its kin: each linear layer is the one whose outputs are nearest to the parents'.

They differ in what enters a layer: each parent's own activations (RegMean), those of the layers
merged before it (RegMean++), or the mean of the parents' (PLeaS). What is no kernel (norms,
embeddings, kernels inside loops or used in two ways) is averaged, as in the papers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from megajax.baselines.given import Given, Result, baseline
from megajax.baselines.layerwise import merge_layers, product
from megajax.errors import ConfigError, ParentsError
from megajax.types import ApplyFn, Key, PyTree

__all__ = ["pleas", "regmean", "regmean_plus"]


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
    return _regression(apply_fn, parents, inputs, alpha, batch_size=batch_size)


def regmean_plus(
    apply_fn: ApplyFn,
    parents: Sequence[PyTree],
    inputs: Any,
    *,
    alpha: float = 0.9,
    batch_size: int = 64,
) -> PyTree:
    """RegMean++: RegMean layer by layer, each on what the merged layers before it give.

    As `regmean`, but X_k is what enters the layer in the merged network, as far as it is merged, on
    parent k's inputs: that is what the layer will get. The paper goes block by block of a
    transformer, and inside a block by the parents' own activations; here every layer is a block.
    So it is each parent's own inputs that tell the parents apart: on the same inputs for all of
    them the result is their mean. Takes a pass over all inputs for each layer.

    Args:
        apply_fn: see `regmean`.
        parents: see `regmean`.
        inputs: see `regmean`.
        alpha: see `regmean`.
        batch_size: see `regmean`.

    Returns:
        The merged network, as for `regmean`; the errors are those of `regmean`, too.

    Example:
        >>> import numpy as np
        >>> def apply_fn(w, x):
        ...     return x @ w["u"] @ w["v"]
        >>> parents = [{"u": np.eye(2), "v": np.eye(2)}, {"u": 3 * np.eye(2), "v": np.eye(2)}]
        >>> regmean_plus(apply_fn, parents, np.eye(2))["u"].round(3).tolist()
        [[2.0, 0.0], [0.0, 2.0]]

    Source: Nguyen et al., "RegMean++: enhancing effectiveness and generalization of regression mean
    for model merging", TMLR 2026, arXiv 2508.03121, and its public code, of which none is used.
    """
    return _regression(apply_fn, parents, inputs, alpha, in_turn=True, batch_size=batch_size)


def pleas(
    apply_fn: ApplyFn, parents: Sequence[PyTree], inputs: Any, *, batch_size: int = 64
) -> PyTree:
    """PLeaS's least squares: layers that take the parents' mean input to their mean output.

    For each layer, its bias included, `|X W - Y|^2` is least, where X is the mean over the parents
    of what enters the layer and Y the mean of what leaves it; every parent sees all inputs. This is
    the second step of the paper at the parents' own size; the first, permutations, is `align`. The
    paper goes down by Adam; here it is solved. What no input determines stays at the mean.

    Args:
        apply_fn: see `regmean`.
        parents: see `regmean`.
        inputs: see `regmean`; those of all parents are put together.
        batch_size: see `regmean`.

    Returns:
        The merged network. Leaves that are neither kernel nor bias of a layer are averaged.

    Raises:
        ConfigError: the network has no linear layer.
        DataError: there are no inputs, or they are not finite.
        ParentsError: there are not K lists of inputs, or the parents differ in structure.

    Example:
        >>> import numpy as np
        >>> parents = [np.array([[1.0], [5.0]]), np.array([[7.0], [3.0]])]
        >>> pleas(lambda w, x: x @ w, parents, np.eye(2)).round(3).tolist()
        [[4.0], [4.0]]

    Source: Nasery et al., "PLeaS - merging models with permutations and least squares", CVPR 2025,
    arXiv 2407.02447, and its public code, of which none is used.
    """
    own = _own(parents, inputs)
    shared = own[:1] if all(one is own[0] for one in own) else own
    sets = [(range(len(parents)), one) for one in shared]
    return merge_layers(apply_fn, _through, parents, sets, biases=True, batch_size=batch_size)


def _regression(
    apply_fn: ApplyFn, parents: Sequence[PyTree], inputs: Any, alpha: float, **options: Any
) -> PyTree:
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha is {alpha}: it must lie between 0 and 1")
    sets = [((k,), own) for k, own in enumerate(_own(parents, inputs))]
    return merge_layers(apply_fn, _nearest, parents, sets, alpha=alpha, **options)


def _own(parents: Sequence[PyTree], inputs: Any) -> list[PyTree]:
    own = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs] * len(parents)
    if len(own) != len(parents):
        raise ParentsError(f"{len(own)} lists of inputs are given for {len(parents)} parents")
    return own


def _nearest(rows: jax.Array, deviations: jax.Array, alpha: Any) -> tuple[jax.Array, jax.Array]:
    """The equations of the layer that is nearest to all parents', each on its own rows."""
    grams = product("kngi,kngj->kgij", rows, rows)
    shrunk = alpha + (1 - alpha) * jnp.eye(rows.shape[-1])
    grams *= shrunk[None, None]
    return grams.sum(0), product("kgij,kgjo->gio", grams, deviations)


def _through(rows: jax.Array, deviations: jax.Array, alpha: Any) -> tuple[jax.Array, jax.Array]:
    """The equations of the layer that takes the mean row to the mean of the parents' outputs."""
    del alpha
    mean = rows.mean(0)
    excess = product("kngi,kgio->ngo", rows, deviations) / len(rows)
    return product("ngi,ngj->gij", mean, mean), product("ngi,ngo->gio", mean, excess)


def _merged(method: Callable[..., PyTree], key: Key, given: Given) -> Result:
    assert given.inputs is not None
    return Result(given.prepared(method(given.apply_fn, given.parents, given.inputs)))


baseline(
    "regmean",
    "linear layers nearest to the parents' outputs, in closed form",
    "Jin et al., arXiv 2212.09849",
    needs=("calibration",),
    default=True,
)(partial(_merged, regmean))
baseline(
    "regmean_plus",
    "RegMean layer by layer, on what the merged layers before give",
    "Nguyen et al., arXiv 2508.03121",
    needs=("calibration",),
)(partial(_merged, regmean_plus))
baseline(
    "pleas",
    "least squares from the parents' mean activations to the mean of their outputs",
    "Nasery et al., arXiv 2407.02447",
    needs=("calibration",),
    default=True,
)(partial(_merged, pleas))
