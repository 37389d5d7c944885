"""What the benchmarks on trained pairs share: a pair, its data, and who the best parent is."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import megajax as mj
from megajax.run.config import Config
from megajax.zoo import data, training
from megajax.zoo import networks as models


class Pair(NamedTuple):
    """Two networks trained independently as a configuration says.

    Attributes:
        dataset: the images, split.
        apply_fn: the network.
        parents: their variables.
        key: for what is done with them.
    """

    dataset: data.Dataset
    apply_fn: Callable[[Any, Any], Any]
    parents: Sequence[Any]
    key: jax.Array


def train(seed: int, config: Config) -> Pair:
    """Trains the pair of a seed."""
    data_key, shard_key, train_key, key = jax.random.split(jax.random.key(seed), 4)
    dataset = data.load(data_key, config.data)
    model = models.build(config.model.name, dataset.num_classes, config.model.options)
    shards = data.shards(shard_key, dataset.train.labels, dataset.num_classes, config.parents)
    parents, _ = training.train(train_key, model, dataset.train, shards, config.training)
    return Pair(dataset, mj.from_linen(model, {}, train=False).apply_fn, parents, key)


def aligned(pair: Pair) -> list[Any]:
    """The parents, hidden units in correspondence by their activations on 256 training images."""
    parents, _ = mj.align(
        pair.key,
        pair.apply_fn,
        pair.parents,
        pair.dataset.validation.images[:8],
        calibration=pair.dataset.train.images[:256],
        config=mj.AlignConfig(method="activations"),
    )
    return parents


def best_parent(pair: Pair) -> Any:
    """The parent that is better on validation images."""
    split = pair.dataset.validation
    logits = (mj.predict(pair.apply_fn, parent, split.images) for parent in pair.parents)
    return pair.parents[int(np.argmax([mj.measure(one, split.labels).accuracy for one in logits]))]


def midpoint(networks: Sequence[Any]) -> Any:
    """The plain average."""
    return jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *networks)
