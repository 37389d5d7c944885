"""What all individuals have in common is computed once for the population, not once for each.

Where the first layers are frozen, every network passes the examples through the same numbers. Knows
programs, and which leaves are an individual's own; nothing of masks, metrics or devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from megajax.program.jaxprs import Delayed, delay, known, trace, walk
from megajax.types import ApplyFn, Genes, PyTree

__all__ = ["Split", "features_size", "own_leaves", "split"]


class Split(NamedTuple):
    """A network in two parts.

    Attributes:
        first: `first(variables, inputs [b, ...]) -> features`, a list of arrays that depend on
            leaves that all individuals have in common, and on no other.
        rest: `rest(variables, (inputs, features)) -> logits [b, C]`.
    """

    first: Callable[[PyTree, Any], list[jax.Array]]
    rest: ApplyFn


def own_leaves(
    express: Callable[[Genes, PyTree], PyTree], genes: Genes, context: PyTree
) -> list[bool]:
    """Which leaves of a network depend on its genes, seen from the program that expresses them.

    Args:
        express: `express(genes_of_one, context) -> variables`.
        genes: of one individual, or their shapes and dtypes.
        context: the parents and what else is needed, or shapes and dtypes.

    Returns:
        One truth value for each leaf, in flattening order; False where all individuals have the
        same numbers.

    Example:
        >>> from megajax.merging.masks import masks
        >>> one = {"u": jax.numpy.ones(3), "v": jax.numpy.ones(3)}
        >>> genome = masks(one, 2, granularity="leaf", freeze="u")
        >>> own_leaves(genome.express, jax.numpy.ones((1, 2)), genome.stack([one, one]))
        [False, True]
    """
    program = trace(express, genes, context)
    arguments = [True] * len(program.shapes)
    arguments += [False] * (len(program.closed.jaxpr.invars) - len(arguments))

    def visit(number: int, equation: core.JaxprEqn, operands: Sequence[bool]) -> Sequence[bool]:
        del number
        return [any(operands)] * len(equation.outvars)

    return walk(program.closed, arguments, visit, lambda constant: False)


def split(apply_fn: ApplyFn, variables: PyTree, inputs: Any, own: Sequence[bool]) -> Split | None:
    """Splits a network where its individuals begin to differ.

    Args:
        apply_fn: the network.
        variables: of one network, or their shapes and dtypes.
        inputs: one batch, or its shape and dtype.
        own: for each leaf whether individuals differ in it; see `own_leaves`.

    Returns:
        The two parts; None where the first would hold no contraction and nothing would be saved.

    Example:
        >>> import jax.numpy as jnp
        >>> def apply_fn(w, x):
        ...     return jnp.tanh(x @ w["first"]) @ w["second"]
        >>> w, x = {"first": jnp.eye(2), "second": jnp.ones((2, 3))}, jnp.ones((4, 2))
        >>> parts = split(apply_fn, w, x, own=[False, True])
        >>> [feature.shape for feature in parts.first(w, x)]
        [(4, 2)]
        >>> bool((parts.rest(w, (x, parts.first(w, x))) == apply_fn(w, x)).all())
        True
    """
    if all(own):
        return None
    program = trace(apply_fn, variables, inputs)
    arguments = [_Trait(own=one) for one in own]
    arguments += [_Trait(of_inputs=True) for _ in jax.tree.leaves(inputs)]
    border: dict[tuple[int, int], bool] = {}  # of each feature, whether a contraction is in it

    def use(trait: _Trait) -> None:
        if trait.place is not None and trait.of_inputs and not trait.own:
            border[trait.place] = trait.contracted

    def visit(number: int, equation: core.JaxprEqn, operands: Sequence[_Trait]) -> list[_Trait]:
        own = any(operand.own for operand in operands)
        of_inputs = any(operand.of_inputs for operand in operands)
        if own:
            for operand in operands:
                use(operand)
        work = any(operand.contracted for operand in operands if operand.of_inputs)
        work |= of_inputs and equation.primitive.name in ("dot_general", "conv_general_dilated")
        return [
            _Trait(own, of_inputs, work, (number, index)) for index in range(len(equation.outvars))
        ]

    for result in walk(program.closed, arguments, visit, lambda constant: _Trait()):
        use(result)
    if not any(border.values()):
        return None
    places = sorted(border)

    def first(variables: PyTree, inputs: Any) -> list[jax.Array]:
        found: dict[tuple[int, int], Delayed] = {}

        def keep(number: int, equation: core.JaxprEqn, operands: Sequence[Delayed]) -> Any:
            outputs = delay(equation, operands)
            found.update({(number, index): output for index, output in enumerate(outputs)})
            return outputs

        values = [*jax.tree.leaves(variables), *jax.tree.leaves(inputs)]
        walk(program.closed, [known(value) for value in values], keep, known)
        return [found[place]() for place in places]

    structure: Any = jax.tree.structure(jax.eval_shape(apply_fn, variables, inputs))

    def rest(variables: PyTree, inputs: Any) -> PyTree:
        images, features = inputs
        there = {place: known(value) for place, value in zip(places, features, strict=True)}

        def replace(number: int, equation: core.JaxprEqn, operands: Sequence[Delayed]) -> Any:
            outputs = delay(equation, operands)
            return [there.get((number, index), output) for index, output in enumerate(outputs)]

        values = [*jax.tree.leaves(variables), *jax.tree.leaves(images)]
        outputs = walk(program.closed, [known(value) for value in values], replace, known)
        return structure.unflatten([output() for output in outputs])

    return Split(first, rest)


def features_size(apply_fn: ApplyFn, variables: PyTree, batches: Any, own: Sequence[bool]) -> int:
    """What the first part of a network gives for all examples, in bytes; 0 if it has none.

    Args:
        apply_fn: the network.
        variables: of one network, or their shapes and dtypes.
        batches: the inputs `[B, b, ...]`, or their shape and dtype.
        own: as for `split`.

    Example:
        >>> import jax.numpy as jnp
        >>> w, x = {"first": jnp.eye(2), "second": jnp.ones((2, 3))}, jnp.ones((5, 4, 2))
        >>> def apply_fn(w, x):
        ...     return jnp.tanh(x @ w["first"]) @ w["second"]
        >>> features_size(apply_fn, w, x, [False, True]), features_size(apply_fn, w, x, [True] * 2)
        (160, 0)
    """
    batch = jax.ShapeDtypeStruct(batches.shape[1:], batches.dtype)
    parts = split(apply_fn, variables, batch, own)
    if parts is None:
        return 0
    features = jax.eval_shape(parts.first, variables, batch)
    each = sum(int(one.size) * int(one.dtype.itemsize) for one in features)
    return int(batches.shape[0]) * each


class _Trait(NamedTuple):
    """Where a value comes from.

    Attributes:
        own: individuals differ in it.
        of_inputs: it depends on the inputs.
        contracted: a contraction of the inputs went into it.
        place: equation and output that it is the result of; None for arguments and constants.
    """

    own: bool = False
    of_inputs: bool = False
    contracted: bool = False
    place: tuple[int, int] | None = None
