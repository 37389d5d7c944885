"""From a Flax model to the functional form that megajax works on.

`from_linen` and `from_nnx` return a `Network(apply_fn, variables)`; a plain JAX function with a
pytree of weights is one already and needs no adapter.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax import nnx

from megajax.types import ApplyFn, PyTree

__all__ = ["Network", "from_linen", "from_nnx", "to_nnx"]

_WEIGHTS = nnx.Any(nnx.Param, nnx.BatchStat)


class Network(NamedTuple):
    """A network in functional form.

    Attributes:
        apply_fn: `apply_fn(variables, inputs [b, ...]) -> logits [b, C]`, in inference mode.
        variables: pytree of weights and normalisation statistics.
    """

    apply_fn: ApplyFn
    variables: PyTree


def from_linen(module: nn.Module, variables: PyTree, **inference: Any) -> Network:
    """A Flax Linen module and its variables.

    Args:
        module: the Linen module.
        variables: what `module.init` or training returned: all collections that the forward pass
            reads, such as `{"params": ..., "batch_stats": ...}`. Partitioning boxes are removed.
        **inference: keyword arguments that put the module into inference mode, for example
            `train=False` or `deterministic=True`.

    Returns:
        The network; the variables keep their structure.

    Example:
        >>> model = nn.Dense(3)
        >>> variables = model.init(jax.random.key(0), jax.numpy.ones((1, 4)))
        >>> network = from_linen(model, variables)
        >>> network.apply_fn(network.variables, jax.numpy.ones((5, 4))).shape
        (5, 3)
    """

    def apply_fn(variables: PyTree, inputs: jax.Array) -> jax.Array:
        logits = module.apply(variables, inputs, **inference)
        assert isinstance(logits, jax.Array)
        return logits

    return Network(apply_fn, nn.meta.unbox(variables))


def from_nnx(model: nnx.Module) -> Network:
    """A live Flax NNX model; the model itself is left as it is.

    The variables are the model's parameters and normalisation statistics as a pure dictionary.
    Everything else (dropout streams, caches) stays with the returned function. The `apply_fn` of
    one model serves all models of its architecture; `to_nnx` is the way back.

    Args:
        model: the model; it is called as `model(inputs)` in evaluation mode.

    Returns:
        The network.

    Example:
        >>> network = from_nnx(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
        >>> sorted(network.variables)
        ['bias', 'kernel']
        >>> network.apply_fn(network.variables, jax.numpy.ones((5, 4))).shape
        (5, 3)
    """
    frozen = nnx.clone(model)
    frozen.eval()  # type: ignore[no-untyped-call]
    graph, state, rest = nnx.split(frozen, _WEIGHTS, ...)  # type: ignore[misc]

    def apply_fn(variables: PyTree, inputs: jax.Array) -> jax.Array:
        # Copies, because a model may count its random numbers even where it does not use them.
        filled, others = jax.tree.map(lambda leaf: leaf, (state, rest))
        nnx.replace_by_pure_dict(filled, variables)
        logits: jax.Array = nnx.merge(graph, filled, others)(inputs)
        return logits

    return Network(apply_fn, nnx.to_pure_dict(state))


def to_nnx(model: nnx.Module, variables: PyTree) -> nnx.Module:
    """A copy of an NNX model that carries the given variables.

    Args:
        model: a model of the architecture.
        variables: in the structure that `from_nnx(model)` returns.

    Returns:
        The new model; the one passed in is left as it is.

    Example:
        >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        >>> zeros = jax.tree.map(jax.numpy.zeros_like, from_nnx(model).variables)
        >>> float(to_nnx(model, zeros)(jax.numpy.ones(4)).sum())
        0.0
    """
    copy = nnx.clone(model)
    state = nnx.state(copy, _WEIGHTS)
    nnx.replace_by_pure_dict(state, variables)
    nnx.update(copy, state)
    return copy
