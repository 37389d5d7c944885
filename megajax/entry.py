"""What comes in is checked once, at every public entry: examples, and a network that takes them.

Knows arrays and functions; nothing of tasks or searches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from megajax.errors import DataError, MegajaxError, first_line
from megajax.trees import leaves_by_path, not_finite, on_host, told
from megajax.types import ApplyFn, PyTree

__all__ = ["check_finite", "check_inputs", "is_traced", "output_shapes", "taken"]


def taken(
    apply_fn: ApplyFn, variables: PyTree, inputs: PyTree, what: str = "inputs", least: int = 1
) -> tuple[PyTree, PyTree]:
    """A network and its inputs, checked, and brought together where they lie on several devices.

    Inside a `jit` there is nothing to check: they come back as they are.

    Args:
        apply_fn: the network.
        variables: its variables.
        inputs: leaves `[N, ...]`.
        what: their name, for the error.
        least: examples that are needed.

    Raises:
        DataError: see `check_inputs`; or the network does not take such inputs.

    Example:
        >>> taken(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.ones((4, 3)))
        Traceback (most recent call last):
        ...
        megajax.errors.DataError: the network does not take inputs float32[4, 3]: dot_general ...
    """
    if is_traced((variables, inputs)):
        return variables, inputs
    check_inputs(inputs, what, least)
    _outputs(apply_fn, variables, inputs)
    arrays = [leaf for leaf in jax.tree.leaves((variables, inputs)) if isinstance(leaf, jax.Array)]
    if len({device for leaf in arrays for device in leaf.devices()}) > 1:
        return on_host(variables), on_host(inputs)
    return variables, inputs


def is_traced(tree: PyTree) -> bool:
    """Whether any leaf is a value inside a `jit`, of which only the shape is known.

    Example:
        >>> is_traced(jnp.ones(3))
        False
    """
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def check_inputs(inputs: PyTree, what: str, least: int = 1) -> int:
    """Checks a set of examples before anything is computed with it.

    Args:
        inputs: leaves `[N, ...]`.
        what: its name, for the error.
        least: examples that are needed.

    Returns:
        The number of examples N.

    Raises:
        DataError: no arrays, leaves of different lengths, too few examples, values that are not
            finite.

    Example:
        >>> check_inputs(jnp.ones((3, 2)), "calibration inputs")
        3
    """
    if isinstance(inputs, Iterator):
        raise DataError(f"{what} is a {type(inputs).__name__}: an array is needed")
    leaves = leaves_by_path(inputs)
    where = {path: f"{what}{f', leaf {path},' if path else ''}" for path in leaves}
    if not leaves:
        raise DataError(f"the {what} are missing: there is no array among them")
    sizes = {}
    for path, leaf in leaves.items():
        shape = getattr(leaf, "shape", None)
        if shape is None:
            raise DataError(f"{where[path]} is a {type(leaf).__name__}: an array is needed")
        if not shape:
            raise DataError(f"{where[path]} is a single number: an example axis is needed")
        sizes[path] = shape[0]
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{path or 'leaf'}: {size}" for path, size in sizes.items())
        raise DataError(f"the {what} are not one for each example: {told}")
    count = next(iter(sizes.values()))
    if count < least:
        raise DataError(f"the {what} are {count}: at least {least} are needed")
    for path, leaf in leaves.items():
        check_finite(leaf, f"the {where[path]}")
    return int(count)


def check_finite(leaf: Any, where: str) -> None:
    """Raises DataError if an array has values that are not finite; `where` names it."""
    if jnp.issubdtype(leaf.dtype, jnp.inexact) and (bad := not_finite(leaf)):
        raise DataError(f"{where}: {bad} of {leaf.size} values are not finite")


def output_shapes(apply_fn: ApplyFn, variables: PyTree, inputs: PyTree) -> PyTree:
    """Shapes and dtypes of a network's outputs; every leaf has one entry for each example.

    Raises:
        DataError: the network does not take such inputs, or its outputs have no example axis.
    """
    outputs = _outputs(apply_fn, variables, inputs)
    size = jax.tree.leaves(inputs)[0].shape[0]
    for path, leaf in leaves_by_path(outputs).items():
        if not leaf.shape or leaf.shape[0] != size:
            where = f"output {path}" if path else "the output"
            raise DataError(
                f"{where} of the network has shape {leaf.shape} for {size} examples: its first "
                "axis must be the examples"
            )
    return outputs


def _outputs(apply_fn: ApplyFn, variables: PyTree, inputs: PyTree) -> PyTree:
    try:
        return jax.eval_shape(apply_fn, variables, inputs)
    except MegajaxError:
        raise
    except Exception as error:
        raise DataError(
            f"the network does not take inputs {told(inputs)}: {first_line(error)}"
        ) from error
