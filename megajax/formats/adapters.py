"""From a Flax model to the functional form that megajax works on, and what is such a model.

`from_linen` and `from_nnx` return a `Network(apply_fn, variables)`; a plain JAX function with a
pytree of weights is one already and needs no adapter. Flax is imported only when it is used.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from megajax.errors import InterchangeError
from megajax.trees import is_key, leaf_paths
from megajax.types import ApplyFn, PyTree

if TYPE_CHECKING:
    from flax import linen as nn
    from flax import nnx

__all__ = ["Network", "expect", "form_of", "from_linen", "from_nnx", "to_nnx"]

_HINTS = {
    "a class": ": make an instance of it",
    "a Linen module": ": from_linen(module, variables) takes it",
    "an NNX model": ": from_nnx(model) takes it",
    "a Network": ": take its variables",
}


class Network(NamedTuple):
    """A network in functional form.

    Attributes:
        apply_fn: `apply_fn(variables, inputs) -> outputs`, in inference mode.
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
        The network; the variables keep their structure. Functions that come from equal modules and
        arguments are equal, so that programs compiled for one serve the others.

    Raises:
        InterchangeError: the arguments are something else.

    Example:
        >>> from flax import linen as nn
        >>> variables = nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 4)))
        >>> network = from_linen(nn.Dense(3), variables)
        >>> network.apply_fn(network.variables, jnp.ones((5, 4))).shape
        (5, 3)
        >>> network.apply_fn == from_linen(nn.Dense(3), variables).apply_fn
        True
    """
    expect(module, "a Linen module", "module")
    expect(variables, "a pytree of arrays", "variables")
    from flax.core import meta

    identity = _by_value((module, inference))
    apply_fn = _Apply(hash(identity), identity, partial(module.apply, **inference))
    return Network(apply_fn, meta.unbox(variables))


def from_nnx(model: nnx.Module, **inference: Any) -> Network:
    """A live Flax NNX model; the model itself is left as it is.

    Its variables, those of your own classes too, become a pure dictionary. Random state, caches and
    what a model notes down (`nnx.Intermediate`, `nnx.Perturbation`) stay with the function. The
    `apply_fn` of one model serves all models of its architecture; `to_nnx` is the way back.

    Args:
        model: the model; it is called as `model(inputs, **inference)` in evaluation mode.
        **inference: keyword arguments of the call, for example `deterministic=True`.

    Returns:
        The network. Functions that come from equal architectures and arguments are equal, if the
        random state and caches are.

    Raises:
        InterchangeError: the model is something else.

    Example:
        >>> from flax import nnx
        >>> network = from_nnx(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
        >>> sorted(network.variables)
        ['bias', 'kernel']
        >>> network.apply_fn(network.variables, jnp.ones((5, 4))).shape
        (5, 3)
    """
    expect(model, "an NNX model", "model")
    from flax import nnx

    copy = nnx.clone(model)
    copy.eval()  # type: ignore[no-untyped-call]
    graph, state, rest = nnx.split(copy, _is_kept, ...)  # type: ignore[misc]
    variables = nnx.to_pure_dict(state)
    empty = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), state
    )
    identity = _by_value((graph, jax.tree.structure(state), jax.tree.flatten(rest), inference))
    apply_fn = _Apply(hash(identity), identity, partial(_apply_nnx, graph, empty, rest, inference))
    return Network(apply_fn, variables)


def to_nnx(model: nnx.Module, variables: PyTree) -> nnx.Module:
    """A copy of an NNX model that carries the given variables.

    Args:
        model: a model of the architecture; it is left as it is.
        variables: in the structure that `from_nnx(model)` returns.

    Raises:
        InterchangeError: the variables are not those of such a model.

    Example:
        >>> from flax import nnx
        >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        >>> zeros = jax.tree.map(jnp.zeros_like, from_nnx(model).variables)
        >>> float(to_nnx(model, zeros)(jnp.ones(4)).sum())
        0.0
    """
    expect(model, "an NNX model", "model")
    from flax import nnx

    copy = nnx.clone(model)
    state = nnx.state(copy, _is_kept)
    _fill(state, variables)
    nnx.update(copy, state)
    return copy


def form_of(value: Any) -> str:
    """`a class`, `a Linen module`, `an NNX model`, `a Network`, or else `a pytree of arrays`.

    Example:
        >>> form_of(Network), form_of(Network(jnp.dot, 1.0)), form_of({"w": 1.0})
        ('a class', 'a Network', 'a pytree of arrays')
    """
    if isinstance(value, type):
        return "a class"
    if isinstance(value, Network):
        return "a Network"
    for library, form in (("flax.linen", "a Linen module"), ("flax.nnx", "an NNX model")):
        if library in sys.modules and isinstance(value, sys.modules[library].Module):
            return form
    return "a pytree of arrays"


def expect(value: Any, form: str, name: str) -> None:
    """Checks that an argument has a form.

    Raises:
        InterchangeError: it has another; says what to do.

    Example:
        >>> expect(Network(jnp.dot, 1.0), "a pytree of arrays", "variables")
        Traceback (most recent call last):
        ...
        megajax.errors.InterchangeError: variables must be a pytree of arrays, not a Network: take
        its variables
    """
    found = form_of(value)
    if found != form:
        raise InterchangeError(f"{name} must be {form}, not {found}{_HINTS.get(found, '')}")


@dataclass(frozen=True)
class _Apply:
    """A model's function, equal to others by the value of what it was made from.

    Attributes:
        code: hash of the identity, which takes milliseconds for a large graph.
        identity: of the model and the arguments, by value.
        function: called with the variables and inputs.
    """

    code: int
    identity: Hashable
    function: Callable[..., Any] = field(compare=False, repr=False)

    def __hash__(self) -> int:
        return self.code

    def __call__(self, variables: PyTree, inputs: Any) -> Any:
        return self.function(variables, inputs)


def _apply_nnx(
    graph: Any, empty: Any, rest: Any, inference: Mapping[str, Any], variables: PyTree, inputs: Any
) -> Any:
    from flax import nnx

    # Copies, because a model may count its random numbers even where it does not use them.
    state, others = jax.tree.map(lambda leaf: leaf, (empty, rest))
    _fill(state, variables)
    return nnx.merge(graph, state, others)(inputs, **inference)


def _is_kept(path: Any, value: Any) -> bool:
    """Whether a variable of an NNX model is one of the network's."""
    from flax import nnx

    of_a_run = (nnx.RngState, nnx.Cache, nnx.Intermediate, nnx.Perturbation)
    return not isinstance(value, of_a_run) and not is_key(value)


def _fill(state: Any, variables: PyTree) -> None:
    """Puts variables into the state of an NNX model, which must have just these."""
    from flax import nnx

    ours, theirs = leaf_paths(nnx.to_pure_dict(state)), leaf_paths(variables)
    differing = sorted({*ours} ^ {*theirs})
    if differing:
        side = "lack" if differing[0] in ours else "have"
        raise InterchangeError(f"the variables {side} {differing[0]}, unlike the model")
    nnx.replace_by_pure_dict(state, variables)


def _by_value(value: Any) -> Hashable:
    """Something hashable that is equal for values of equal content."""
    try:
        hash(value)
        return value
    except TypeError:
        pass
    if isinstance(value, (jax.Array, np.ndarray)):
        array = np.asarray(jax.random.key_data(value) if is_key(value) else value)
        return array.dtype, array.shape, array.tobytes()
    if isinstance(value, Mapping):
        return type(value), frozenset((key, _by_value(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(_by_value, value))
    if dataclasses.is_dataclass(value):
        fields = (getattr(value, it.name) for it in dataclasses.fields(value) if it.compare)
        return type(value), tuple(map(_by_value, fields))
    return type(value), id(value)
