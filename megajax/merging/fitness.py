"""Fitness: the score of every network of a population, in one compiled program.

`evaluator` composes three things: how genes become a network, how a network is scored on batches of
examples, and how the population axis is mapped, which is what decides the speed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.tree_util import Partial

from megajax.errors import DataError
from megajax.merging.devices import over_population, place
from megajax.program.prefix import own_leaves, split
from megajax.types import ApplyFn, Genes, PyTree

__all__ = [
    "METRICS",
    "Batches",
    "Evaluate",
    "accuracy",
    "batches",
    "evaluator",
    "example_scores",
    "map_chunks",
    "negative_cross_entropy",
]

Metric: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
Evaluate: TypeAlias = Callable[[Genes], tuple[jax.Array, PyTree]]


class Batches(NamedTuple):
    """Examples cut into B batches of b; the last one is padded.

    Attributes:
        images: `[B, b, ...]`.
        labels: `[B, b]` int32; 0 where padded.
        valid: `[B, b]` bool; False where padded.
    """

    images: jax.Array
    labels: jax.Array
    valid: jax.Array


def batches(images: Any, labels: Any, batch_size: int) -> Batches:
    """Cuts examples into batches, evenly, so that the padding is as small as can be.

    Args:
        images: `[N, ...]`.
        labels: `[N]` integers.
        batch_size: the largest batch to make.

    Returns:
        `ceil(N / batch_size)` batches.

    Raises:
        DataError: there are no examples, or not one label for each.

    Example:
        >>> batches(np.zeros((10, 2)), np.zeros(10, int), 6).valid.sum(axis=1).tolist()
        [5, 5]
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if len(images) == 0:
        raise DataError("the validation set is empty: fitness needs at least one example")
    if labels.shape != images.shape[:1]:
        raise DataError(f"{len(images)} images but labels of shape {labels.shape}")
    count = -(-len(images) // batch_size)
    size = -(-len(images) // count)
    padding = count * size - len(images)

    def cut(array: np.ndarray) -> jax.Array:
        padded = np.concatenate([array, np.zeros((padding, *array.shape[1:]), array.dtype)])
        return jnp.asarray(padded.reshape(count, size, *array.shape[1:]))

    return Batches(cut(images), cut(labels.astype(np.int32)), cut(np.ones(len(images), bool)))


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """1 for each example whose largest logit is the label's, else 0: `[b, C], [b] -> [b]` float32.

    Logits that are not finite are never right.

    Example:
        >>> accuracy(jnp.array([[0.0, 1.0], [1.0, 0.0]]), jnp.array([1, 1])).tolist()
        [1.0, 0.0]
    """
    right = (jnp.argmax(logits, axis=-1) == labels) & jnp.isfinite(logits).all(axis=-1)
    return right.astype(jnp.float32)


def negative_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Log-probability of each label, in nats: `[b, C], [b] -> [b]` float32, at most 0.

    Example:
        >>> float(negative_cross_entropy(jnp.zeros((1, 1)), jnp.array([0]))[0])
        -0.0
    """
    logits = logits.astype(jnp.float32)
    loss: jax.Array = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return -loss


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "cross_entropy": negative_cross_entropy,
}
"""The metrics by the names that the configuration gives them; both are maximised."""


def example_scores(
    apply_fn: ApplyFn, metric: Metric, variables: PyTree, data: Batches
) -> jax.Array:
    """The metric for every example, batch by batch.

    Args:
        apply_fn: the network.
        metric: `(logits [b, C], labels [b]) -> scores [b]`.
        variables: of one network.
        data: the examples.

    Returns:
        `[B, b]`, 0 where padded.

    Example:
        >>> data = batches(np.eye(3), np.arange(3), 2)
        >>> example_scores(lambda w, x: x @ w, accuracy, jnp.eye(3), data).tolist()
        [[1.0, 1.0], [1.0, 0.0]]
    """

    def of_batch(batch: Batches) -> jax.Array:
        scores = metric(apply_fn(variables, batch.images), batch.labels)
        return jnp.where(batch.valid, scores, 0.0)

    scores: jax.Array = jax.lax.map(of_batch, data)
    return scores


def evaluator(
    express: Callable[[Genes, PyTree], PyTree],
    apply_fn: ApplyFn,
    metric: Metric,
    parents: PyTree,
    data: Batches,
    *,
    population_chunk: int,
    per_example: bool = False,
    mesh: Mesh | None = None,
    common: bool = False,
) -> Evaluate:
    """The fitness of a population: the mean of a metric over the examples, network by network.

    The result is a `jax.tree_util.Partial` that carries parents and data as its own leaves, so that
    a jit sees them as arguments and not as constants. Each network is expressed inside the mapped
    body: only `population_chunk` networks exist at a time.

    Args:
        express: `express(genes_of_one, parents) -> variables`.
        apply_fn: the network.
        metric: `(logits [b, C], labels [b]) -> scores [b]`, maximised.
        parents: leaves `[K, ...]`.
        data: the examples.
        population_chunk: networks evaluated side by side; see `map_chunks`.
        per_example: also return the accuracy of every network on every example.
        mesh: devices that share the population, each mapping its part of it chunk by chunk; see
            `megajax.merging.devices`. The results are whole on each of them. None is one device.
        common: layers that all individuals have in common, being frozen, are computed once for the
            population; see `megajax.program.prefix`. What comes out of them is kept for all examples.

    Returns:
        `evaluate(genes) -> (fitness [P] float32, aux)`; aux is `()` or, `per_example`, right or
        wrong as `[P, N]` bool in the order of the examples.

    Example:
        >>> data = batches(np.eye(2), np.arange(2), 2)
        >>> parents = jnp.stack([jnp.eye(2), -jnp.eye(2)])
        >>> express = lambda genes, parents: jnp.tensordot(genes, parents, 1)
        >>> evaluate = evaluator(
        ...     express, lambda w, x: x @ w, accuracy, parents, data, population_chunk=1
        ... )
        >>> evaluate(jnp.eye(2))[0].tolist()
        [1.0, 0.0]
    """
    count = int(data.valid.sum())

    def both(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.stack([metric(logits, labels), accuracy(logits, labels)], axis=-1)

    def of_one(
        network: ApplyFn, genes: Genes, parents: PyTree, data: Batches
    ) -> tuple[jax.Array, PyTree]:
        variables = express(genes, parents)
        if not per_example:
            return example_scores(network, metric, variables, data).sum() / count, ()
        valid = data.valid[..., None]
        scores = example_scores(network, both, variables, data._replace(valid=valid))
        right = scores[..., 1].reshape(-1)[:count] > 0  # the padding is at the end
        return scores[..., 0].sum() / count, right

    def of_all(shared: tuple[PyTree, Batches], genes: Genes) -> tuple[jax.Array, PyTree]:
        parents, data = shared
        network = apply_fn
        if common:
            anyone = jax.tree.map(lambda leaf: leaf[0], genes)
            variables = express(anyone, parents)
            own = own_leaves(express, anyone, parents)
            parts = split(apply_fn, variables, data.images[0], own)
            if parts is not None:
                features = jax.lax.map(partial(parts.first, variables), data.images)
                images: Any = (data.images, features)
                network, data = parts.rest, data._replace(images=images)
        result: tuple[jax.Array, PyTree] = map_chunks(
            lambda one: of_one(network, one, parents, data), genes, population_chunk
        )
        return result

    def evaluate(parents: PyTree, data: Batches, genes: Genes) -> tuple[jax.Array, PyTree]:
        if mesh is None:
            return of_all((parents, data), genes)
        result: tuple[jax.Array, PyTree] = over_population(of_all, mesh, (parents, data), genes)
        return result

    return Partial(evaluate, place(parents, mesh, split=True), place(data, mesh))


def map_chunks(function: Callable[[Any], Any], xs: PyTree, chunk: int) -> PyTree:
    """Maps over the leading axis: `chunk` elements side by side, chunk after chunk.

    Args:
        function: of one element.
        xs: leaves `[P, ...]`.
        chunk: 1 is `lax.map`, P or more is `vmap`, anything between is both.

    Returns:
        Leaves `[P, ...]`; the same values whatever the chunk, up to float rounding.

    Example:
        >>> map_chunks(lambda x: 2 * x, jnp.arange(5), 2).tolist()
        [0, 2, 4, 6, 8]
    """
    if chunk == 1:  # first of all: one alone has the bits that it has among others
        return jax.lax.map(function, xs)
    if chunk >= jax.tree.leaves(xs)[0].shape[0]:
        return jax.vmap(function)(xs)
    return jax.lax.map(function, xs, batch_size=chunk)
