"""Steps of Adam on the genes of one individual, by mini-batches.

Knows genes and a differentiable objective; nothing of networks, masks or files. A gradient costs
three passes of its mini-batch: one forward, two backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import optax

from megajax.types import Genes, Key, PyTree

__all__ = ["PASSES", "Descent", "FreeSpace", "Objective", "Walk", "descent_of"]

Objective: TypeAlias = Callable[[Key, PyTree, Genes, int], jax.Array]
"""`objective(key, problem, genes_of_one, count)`: a differentiable score of one individual on so
many examples drawn with the key, maximised."""

PASSES = 3
"""Passes of an example that a gradient on it counts as."""

_DECAY = 0.97
"""Of the average's weights, a step: it spans some 33 steps."""


class FreeSpace(Protocol):
    """Genes as numbers without bounds."""

    def encode(self, genes: Genes) -> Genes:
        """Free numbers of genes, which are moved inside their bounds where they lie on them."""

    def decode(self, free: Genes) -> Genes:
        """Genes of free numbers."""


class Walk(NamedTuple):
    """Where a descent stands.

    Attributes:
        free: numbers of one individual, after the last step.
        mean: exponentially weighted mean of the steps' numbers (Polyak and Juditsky 1992): mini-
            batches throw the last point about, and the mean lies between.
        adam: the optimizer's state.
        steps: made so far, int32.
    """

    free: Genes
    mean: Genes
    adam: PyTree
    steps: jax.Array


@dataclass(frozen=True)
class Descent:
    """Some steps of Adam on the free numbers of one individual.

    Attributes:
        objective: see `Objective`.
        space: genes as free numbers, and back.
        steps: how many.
        examples: of each mini-batch.
        learning_rate: of Adam.
    """

    objective: Objective
    space: FreeSpace
    steps: int
    examples: int
    learning_rate: float = 0.1

    @property
    def cost(self) -> int:
        """Passes of an example through a network that one step takes."""
        return PASSES * self.examples

    def start(self, genes: Genes) -> Walk:
        """A walk from the genes of one individual."""
        free = self.space.encode(genes)
        return Walk(free, free, self._optimizer.init(free), jnp.int32(0))

    def __call__(self, key: Key, walk: Walk, problem: PyTree) -> Walk:
        """Makes the steps.

        Args:
            key: PRNG key, for the mini-batches.
            walk: where the descent stands.
            problem: what the objective takes.
        """

        def loss(free: Genes, key: Key) -> jax.Array:
            return -self.objective(key, problem, self.space.decode(free), self.examples)

        def step(i: jax.Array, walk: Walk) -> Walk:
            slope = jax.grad(loss)(walk.free, jax.random.fold_in(key, i))
            sane = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(slope)]).all()
            slope = jax.tree.map(lambda x: jnp.where(sane, x, 0), slope)
            with jax.numpy_dtype_promotion("standard"):  # optax counts in integers
                updates, adam = self._optimizer.update(slope, walk.adam, walk.free)
            free = optax.apply_updates(walk.free, updates)
            count = walk.steps + 1
            share = jnp.maximum(1 / count.astype(jnp.float32), 1 - _DECAY)
            mean = optax.incremental_update(free, walk.mean, share)
            return Walk(free, mean, adam, count)

        return jax.lax.fori_loop(0, self.steps, step, walk)

    def improved(self, key: Key, genes: Genes, problem: PyTree) -> Genes:
        """Genes of one individual after the steps, from a fresh optimizer (Lamarckian)."""
        return self.space.decode(self(key, self.start(genes), problem).free)

    @property
    def _optimizer(self) -> optax.GradientTransformation:
        return optax.adam(self.learning_rate)


def descent_of(config: Any, tools: Any, steps: int) -> Descent:
    """The descent that a configuration section describes.

    Args:
        config: `learning_rate` and `gradient_examples`.
        tools: what the problem gives.
        steps: how many.

    Raises:
        ConfigError: genes that pick a parent have no gradient.
    """
    config.require(not tools.space.picks, "method", "binary genes have no gradient")
    assert tools.objective is not None
    examples = min(config.gradient_examples, tools.num_examples)
    return Descent(tools.objective, tools.space, steps, examples, config.learning_rate)
