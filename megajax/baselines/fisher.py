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
from megajax.baselines.regmean import check_inputs
from megajax.errors import ConfigError, DataError, ParentsError
from megajax.program.jaxprs import static
from megajax.types import ApplyFn, Key, PyTree

__all__ = ["fisher_average", "fisher_information"]

_TINY = np.finfo(np.float32).tiny


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
    place: the empirical Fisher, which is another matrix (Kunstner et al., arXiv 1905.12558). Where
    an example has several positions, their information is added up.

    Args:
        apply_fn: `apply_fn(variables, inputs [b, ...]) -> logits [b, ..., C]`, in inference mode.
        variables: of one network.
        inputs: `[n, ...]`, or a pytree of such; a few hundred do.
        labels: `[n, ...]` integers, for the empirical Fisher.
        samples: classes drawn for each example; None sums over all of them.
        key: PRNG key, needed with `samples` only.
        chunk: examples whose gradients exist side by side: memory is this many copies of the
            variables.

    Returns:
        A pytree like the variables, float32, non-negative; 0 for leaves that are not floating.

    Raises:
        DataError: there are no inputs, they are not finite, or not one possible label for each.
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
    count = check_inputs(inputs)
    chunk = min(chunk, count)
    rows = np.arange(-(-count // chunk) * chunk).reshape(-1, chunk)
    batches = jax.tree.map(lambda x: jnp.asarray(x)[rows % count], inputs)
    one = jax.eval_shape(lambda x: jax.tree.map(lambda leaf: leaf[0], x), batches)
    classes = jax.eval_shape(apply_fn, variables, one).shape[-1]
    given = np.zeros(count, np.int32) if labels is None else np.asarray(labels)
    if given.min() < 0 or given.max() >= classes:
        raise DataError(
            f"labels run from {given.min()} to {given.max()}, but the network has {classes} classes"
        )
    keys = jax.random.split(jax.random.key(0) if key is None else key, rows.shape)
    data = batches, jnp.asarray(given)[rows % count], keys, jnp.asarray(rows < count)
    return _information(static(apply_fn), labels is not None, samples, variables, data)


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


@partial(jax.jit, static_argnums=(0, 1, 2))
def _information(
    apply_fn: ApplyFn, empirical: bool, samples: int | None, variables: PyTree, data: Any
) -> PyTree:
    leaves, treedef = jax.tree.flatten(variables)
    mixed = [i for i, leaf in enumerate(leaves) if is_floating(leaf)]
    weights = [leaves[i] for i in mixed]

    def log_probabilities(weights: list[jax.Array], x: Any) -> jax.Array:
        filled = list(leaves)
        for i, leaf in zip(mixed, weights, strict=True):
            filled[i] = leaf
        alone = jax.tree.map(lambda leaf: leaf[None], x)
        logits = apply_fn(jax.tree.unflatten(treedef, filled), alone)[0]
        return jax.nn.log_softmax(logits.astype(jnp.float32))

    def of_example(x: Any, label: jax.Array, key: Key) -> list[jax.Array]:
        log_p, pull_back = jax.vjp(lambda weights: log_probabilities(weights, x), weights)
        if empirical:
            drawn, share = label[None], jnp.ones(1)
        elif samples is None:  # every class of every position, one by one
            drawn, share = jnp.arange(log_p.size), jnp.exp(log_p).ravel()
        else:
            drawn = jax.random.categorical(key, log_p, shape=(samples, *log_p.shape[:-1]))
            share = jnp.full(samples, 1 / samples)
        every = samples is None and not empirical

        def add(total: list[jax.Array], one: tuple[jax.Array, jax.Array]) -> Any:
            number, weight = one
            chosen = jax.nn.one_hot(number, log_p.size if every else log_p.shape[-1])
            (gradient,) = pull_back(chosen.reshape(log_p.shape).astype(log_p.dtype))
            squares = [(weight * g.astype(jnp.float32) ** 2).astype(jnp.float32) for g in gradient]
            return [t + s for t, s in zip(total, squares, strict=True)], None

        return jax.lax.scan(add, zeros, (drawn, share))[0]

    def add_batch(total: list[jax.Array], batch: Any) -> Any:
        *examples, valid = batch
        each = jax.vmap(of_example)(*examples)
        sums = [jnp.tensordot(valid.astype(jnp.float32), leaf, 1) for leaf in each]
        return [t + s for t, s in zip(total, sums, strict=True)], None

    zeros = [jnp.zeros(leaf.shape, jnp.float32) for leaf in weights]
    total, _ = jax.lax.scan(add_batch, zeros, data)
    found = [jnp.zeros(jnp.shape(leaf), jnp.float32) for leaf in leaves]
    for i, leaf in zip(mixed, total, strict=True):
        found[i] = leaf / data[-1].sum().astype(jnp.float32)
    return jax.tree.unflatten(treedef, found)
