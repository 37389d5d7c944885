"""Fisher-weighted averaging: each weight counts as much as a network's predictions hang on it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from megajax.baselines.given import Given, Result, baseline
from megajax.baselines.leaves import combine, is_floating
from megajax.entry import taken
from megajax.errors import ParentsError
from megajax.merging.tasks import Batches, Task, batches
from megajax.types import ApplyFn, Key, PyTree

__all__ = ["fisher_average", "fisher_information"]


def fisher_information(
    apply_fn: ApplyFn, variables: PyTree, inputs: PyTree, *, chunk: int = 8
) -> PyTree:
    """The diagonal of a classifier's Fisher information, from per-example gradients.

    `F = mean over x of E_y (d log p(y | x) / d theta)^2`, with y from the network's own
    predictions: the exact expectation over the C classes (C backward passes for each example). The
    given labels would make another matrix of it (Kunstner et al., arXiv 1905.12558).

    Args:
        apply_fn: `apply_fn(variables, inputs) -> logits [b, ..., C]`, in inference mode.
        variables: of one network.
        inputs: leaves `[n, ...]`; a few hundred examples do.
        chunk: examples whose gradients exist side by side: memory is this many copies of the
            variables.

    Returns:
        A pytree like the variables, float32, non-negative; 0 for leaves that are not floating.

    Raises:
        DataError: there are no inputs, or they are not finite.

    Example:
        >>> x = jnp.full((3, 1), 2.0)
        >>> fisher_information(lambda w, x: x @ w, jnp.zeros((1, 2)), x).tolist()
        [[1.0, 1.0]]

    Source: Matena and Raffel, "Merging models with Fisher-weighted averaging", NeurIPS 2022,
    arXiv 2111.09832.
    """
    what = "inputs of the Fisher information"
    variables, inputs = taken(apply_fn, variables, inputs, what)
    count = len(jax.tree.leaves(inputs)[0])
    data = batches(Task(jax.tree.map(np.asarray, inputs)), min(chunk, count))
    return _information(apply_fn, variables, data)


def fisher_average(parents: Sequence[PyTree], fishers: Sequence[PyTree]) -> PyTree:
    """The mean of the parents, each element weighted by its Fisher information.

    `theta = sum_k F_k theta_k / sum_k F_k`: the mode of the product of the parents' posteriors,
    each a Gaussian with the precision F_k. Where no parent has any information, the plain mean.

    Args:
        parents: K variable pytrees of one structure.
        fishers: of each parent, from `fisher_information`.

    Returns:
        The merged network.

    Raises:
        ParentsError: there are not as many Fishers as parents, or something differs in structure.

    Example:
        >>> parents = [{"w": jnp.array([0.0, 0.0])}, {"w": jnp.array([1.0, 1.0])}]
        >>> fishers = [{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([3.0, 0.0])}]
        >>> fisher_average(parents, fishers)["w"].tolist()
        [0.75, 0.5]

    Source: Matena and Raffel, arXiv 2111.09832, equation 2.
    """
    if len(parents) != len(fishers):
        raise ParentsError(f"{len(fishers)} Fishers are given for {len(parents)} parents")

    def mean(leaves: jax.Array, information: jax.Array) -> jax.Array:
        # Only ratios count; scaling to a largest of one keeps tiny ones from vanishing.
        scaled = information / jnp.maximum(information.max(axis=0, keepdims=True), _TINY)
        weight = jnp.where(scaled.sum(axis=0) > 0, scaled, 1.0)
        return jnp.sum(weight * leaves, axis=0) / jnp.sum(weight, axis=0)

    return combine(mean, parents, fishers)


@baseline(
    "fisher",
    "the mean, each weight counted by its Fisher information",
    "Matena and Raffel, arXiv 2111.09832",
    needs=("calibration", "labels"),
    default=True,
)
def _fisher(key: Key, given: Given) -> Result:
    assert given.inputs is not None
    pairs = zip(given.parents, given.inputs, strict=True)
    fishers = [fisher_information(given.apply_fn, parent, own) for parent, own in pairs]
    return Result(given.merged(fisher_average, fishers))


_TINY = np.finfo(np.float32).tiny


@partial(jax.jit, static_argnums=0)
def _information(apply_fn: ApplyFn, variables: PyTree, data: Batches) -> PyTree:
    leaves, treedef = jax.tree.flatten(variables)
    places = [i for i, leaf in enumerate(leaves) if is_floating(leaf)]

    def log_probabilities(weights: list[jax.Array], x: PyTree) -> jax.Array:
        filled = list(leaves)
        for i, weight in zip(places, weights, strict=True):
            filled[i] = weight
        one = jax.tree.map(lambda leaf: leaf[None], x)
        logits = apply_fn(jax.tree.unflatten(treedef, filled), one)[0]
        return jax.nn.log_softmax(logits.astype(jnp.float32))

    def of_example(x: PyTree) -> list[jax.Array]:
        weights = [leaves[i] for i in places]
        log_p, pull_back = jax.vjp(lambda weights: log_probabilities(weights, x), weights)

        def add(total: list[jax.Array], number: jax.Array) -> Any:
            one = jax.nn.one_hot(number, log_p.size, dtype=log_p.dtype)
            (gradient,) = pull_back(one.reshape(log_p.shape))
            share = jnp.exp(log_p.reshape(-1)[number])
            squares = [share * g.astype(jnp.float32) ** 2 for g in gradient]
            return [t + s for t, s in zip(total, squares, strict=True)], None

        zeros = [jnp.zeros(leaf.shape, jnp.float32) for leaf in weights]
        return jax.lax.scan(add, zeros, jnp.arange(log_p.size))[0]

    def of_batch(total: list[jax.Array], batch: Batches) -> Any:
        each = jax.vmap(of_example)(batch.inputs)
        sums = [jnp.tensordot(batch.valid.astype(jnp.float32), leaf, 1) for leaf in each]
        return [t + s for t, s in zip(total, sums, strict=True)], None

    zeros = [jnp.zeros(leaves[i].shape, jnp.float32) for i in places]
    total, _ = jax.lax.scan(of_batch, zeros, data)
    found = [jnp.zeros(jnp.shape(leaf), jnp.float32) for leaf in leaves]
    for i, leaf in zip(places, total, strict=True):
        found[i] = leaf / data.valid.sum(dtype=jnp.float32)
    return jax.tree.unflatten(treedef, found)
