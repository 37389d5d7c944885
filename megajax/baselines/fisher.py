"""Fisher-weighted averaging: each weight counts as much as its parent's predictions hang on it.

`fisher_information` needs the network function and inputs, `fisher_average` only pytrees. Of any
network, BatchNorm statistics included: they are leaves that the predictions depend on. Whoever
wants them left out puts `megajax.baselines.on_weights` around the average.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from megajax.baselines.leaves import combine, is_floating
from megajax.errors import ConfigError, ParentsError
from megajax.merging.fitness import Batches, batches
from megajax.merging.merge import check_labels
from megajax.types import ApplyFn, Key, PyTree

__all__ = ["fisher_average", "fisher_information"]


def fisher_information(
    apply_fn: ApplyFn,
    variables: PyTree,
    inputs: Any,
    labels: Any | None = None,
    *,
    samples: int | None = None,
    key: Key | None = None,
    chunk: int = 8,
) -> PyTree:
    """The diagonal of a network's Fisher information, from per-example gradients.

    `F = mean over x of E_y (d log p(y | x) / d theta)^2`, with y from the network's own
    predictions: the exact expectation over the C classes (C backward passes for each example), or
    with `samples` a Monte Carlo estimate. With `labels` the given label takes the expectation's
    place: the empirical Fisher, which is another matrix (Kunstner et al., arXiv 1905.12558).

    Args:
        apply_fn: `apply_fn(variables, inputs [b, ...]) -> logits [b, C]`, in inference mode.
        variables: of one network.
        inputs: `[n, ...]`; a few hundred do.
        labels: `[n]` integers, for the empirical Fisher.
        samples: classes drawn for each example; None sums over all of them.
        key: PRNG key, needed with `samples` only.
        chunk: examples whose gradients exist side by side: memory is this many copies of the
            variables.

    Returns:
        A pytree like the variables, float32, non-negative; 0 for leaves that are not floating.

    Raises:
        DataError: there are no inputs, or not one possible label for each.
        ConfigError: both labels and samples are given, or samples without a key.

    Example:
        >>> w = jnp.zeros((1, 2))  # both classes at 1/2, so that F = x^2 p (1 - p)
        >>> fisher_information(lambda w, x: x @ w, w, np.array([[2.0]])).tolist()
        [[1.0, 1.0]]

    Source: Matena and Raffel, "Merging models with Fisher-weighted averaging", NeurIPS 2022,
    arXiv 2111.09832.
    """
    if labels is not None and samples is not None:
        raise ConfigError("labels and samples exclude each other: empirical or sampled Fisher")
    if samples is not None and (key is None or samples < 1):
        raise ConfigError(f"samples is {samples}: at least 1 and a key are needed")
    count = len(inputs)
    given = np.zeros(count, np.int32) if labels is None else labels
    data = batches(inputs, given, min(chunk, max(count, 1)))
    check_labels(given, jax.eval_shape(apply_fn, variables, data.images[0]).shape[-1])
    keys = jax.random.split(jax.random.key(0) if key is None else key, data.labels.shape)
    return _information(apply_fn, labels is not None, samples, variables, data, keys)


def fisher_average(
    parents: Sequence[PyTree], fishers: Sequence[PyTree], weights: Sequence[float] | None = None
) -> PyTree:
    """The mean of the parents, each element weighted by its Fisher information.

    `theta = sum_k l_k F_k theta_k / sum_k l_k F_k`: the mode of the product of the parents'
    posteriors, each a Gaussian with the precision F_k. Where no parent has any information, the
    plain (l-weighted) mean.

    Args:
        parents: K variable pytrees of one structure.
        fishers: of each parent, from `fisher_information`.
        weights: l, `[K]`, how much each parent counts; None counts them alike.

    Returns:
        The merged network.

    Raises:
        ParentsError: there are not as many Fishers as parents, or something differs in structure.

    Example:
        >>> parents = [{"w": jnp.zeros(2)}, {"w": jnp.ones(2)}]
        >>> fishers = [{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([3.0, 0.0])}]
        >>> fisher_average(parents, fishers)["w"].tolist()
        [0.75, 0.5]

    Source: Matena and Raffel, arXiv 2111.09832, equation 2.
    """
    if len(parents) != len(fishers):
        raise ParentsError(f"{len(fishers)} Fishers are given for {len(parents)} parents")
    share = jnp.ones(len(parents)) if weights is None else jnp.asarray(weights, jnp.float32)

    def mean(leaves: jax.Array, information: jax.Array) -> jax.Array:
        prior = share.reshape(-1, *(1,) * (leaves.ndim - 1)) * jnp.ones_like(leaves)
        # Only ratios count; scaling to a largest of one keeps tiny ones from vanishing.
        scaled = prior * information / jnp.maximum(information.max(axis=0), _TINY)
        known = scaled.sum(axis=0) > 0
        weight = jnp.where(known, scaled, prior)
        return jnp.sum(weight * leaves, axis=0) / jnp.sum(weight, axis=0)

    return combine(mean, parents, fishers)


_TINY = np.finfo(np.float32).tiny


@partial(jax.jit, static_argnums=(0, 1, 2))
def _information(
    apply_fn: ApplyFn,
    empirical: bool,
    samples: int | None,
    variables: PyTree,
    data: Batches,
    keys: Key,
) -> PyTree:
    leaves, treedef = jax.tree.flatten(variables)
    floating = [is_floating(leaf) for leaf in leaves]
    weights = [leaf for leaf, mixed in zip(leaves, floating, strict=True) if mixed]

    def log_probabilities(weights: list[jax.Array], x: jax.Array) -> jax.Array:
        rest = iter(weights)
        filled = [
            next(rest) if mixed else leaf for leaf, mixed in zip(leaves, floating, strict=True)
        ]
        logits = apply_fn(jax.tree.unflatten(treedef, filled), x[None])[0]
        return jax.nn.log_softmax(logits.astype(jnp.float32))

    def of_example(x: jax.Array, label: jax.Array, key: Key) -> list[jax.Array]:
        log_p, pull_back = jax.vjp(lambda weights: log_probabilities(weights, x), weights)
        if empirical:
            classes, share = label[None], jnp.ones(1)
        elif samples is None:
            classes, share = jnp.arange(log_p.size), jnp.exp(log_p)
        else:
            classes = jax.random.categorical(key, log_p, shape=(samples,))
            share = jnp.full(samples, 1 / samples)

        def add(total: list[jax.Array], drawn: tuple[jax.Array, jax.Array]) -> Any:
            number, weight = drawn
            (gradient,) = pull_back(jax.nn.one_hot(number, log_p.size, dtype=log_p.dtype))
            squares = [weight * g.astype(jnp.float32) ** 2 for g in gradient]
            return [t + s for t, s in zip(total, squares, strict=True)], None

        zeros = [jnp.zeros(leaf.shape, jnp.float32) for leaf in weights]
        return jax.lax.scan(add, zeros, (classes, share))[0]

    def add_batch(total: list[jax.Array], batch: tuple[Batches, Key]) -> Any:
        data, keys = batch
        each = jax.vmap(of_example)(data.images, data.labels, keys)
        sums = [jnp.tensordot(data.valid.astype(jnp.float32), leaf, 1) for leaf in each]
        return [t + s for t, s in zip(total, sums, strict=True)], None

    zeros = [jnp.zeros(leaf.shape, jnp.float32) for leaf in weights]
    total, _ = jax.lax.scan(add_batch, zeros, (data, keys))
    count = data.valid.sum()
    found = iter(total)
    return jax.tree.unflatten(
        treedef,
        [
            next(found) / count if mixed else jnp.zeros(jnp.shape(leaf), jnp.float32)
            for leaf, mixed in zip(leaves, floating, strict=True)
        ],
    )
