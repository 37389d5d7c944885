"""Checks that permuting hidden units leaves a network's outputs alone, up to rounding."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from megajax.alignment.permutations import (
    Array,
    identity_permutations,
    permute,
    random_permutations,
    validate,
)
from megajax.alignment.symmetries import Symmetries
from megajax.errors import DataError, ParentsError, SymmetryError
from megajax.program.jaxprs import Delayed, Program, delay, run, static, trace
from megajax.trees import leaves_by_path, not_finite
from megajax.types import ApplyFn, Key, PyTree

__all__ = ["verify"]


def verify(
    key: Key,
    symmetries: Symmetries,
    apply_fn: ApplyFn,
    variables: PyTree,
    inputs: Any,
    *,
    tolerance: float | None = None,
    draws: int = 3,
) -> None:
    """Checks that permuting the hidden units leaves the outputs alone.

    The variables are perturbed first, for fresh ones (zero biases, unit variances) would hide a
    leaf that a group has forgotten. All groups are permuted at once; if the outputs change, they
    are permuted one by one to tell which is at fault. Matrix products run at the highest precision
    that the device has.

    Args:
        key: PRNG key, for the perturbation and the permutations.
        symmetries: the symmetries, found or written by hand.
        apply_fn: `apply_fn(variables, inputs) -> outputs`.
        variables: pytree of arrays.
        inputs: pytree of arrays; random ones will do.
        tolerance: the largest change of an output allowed, relative to how much the perturbation
            changes the outputs of its leaf. None takes what the lowest precision in the program
            allows (1e-4 for float32, 0.03 for bfloat16), or ten times what summing in another order
            changes.
        draws: how often to perturb and permute: a unit that is dead in one draw hides its errors.

    Raises:
        SymmetryError: the symmetries do not fit the variables, or a group is wrong; the message
            names it and its leaves.
        DataError: the outputs are not a number as it is, for the inputs are not, or for finite
            ones.
        ParentsError: the same, for the variables are not finite.

    >>> def mlp(variables, x):
    ...     return jax.nn.relu(x @ variables["w"] + variables["b"]) @ variables["v"]
    >>> from megajax.alignment.symmetries import Group, Site
    >>> variables = {"w": jnp.ones((3, 8)), "b": jnp.zeros(8), "v": jnp.ones((8, 2))}
    >>> forgot_the_bias = Symmetries((Group("hidden", 8, (Site("w", 1), Site("v", 0))),))
    >>> verify(jax.random.key(0), forgot_the_bias, mlp, variables, jnp.ones((4, 3)))
    Traceback (most recent call last):
    megajax.errors.SymmetryError: group 'hidden' changes the outputs by ...: w axis 1, v axis 0
    """
    validate(symmetries, variables)
    network, still = static(apply_fn), identity_permutations(symmetries)
    variables = jax.tree.map(np.asarray, variables)

    def outputs(permutations: Any, variables: PyTree) -> list[Array]:
        return _floating(_outputs(network, permute(symmetries, permutations, variables), inputs))

    given = outputs({}, variables)
    _check_numbers(given, variables, inputs)
    lowest = 0.3 * _epsilon(trace(apply_fn, variables, inputs)) ** 0.5
    for each in jax.random.split(key, draws):
        noise, draw = jax.random.split(each)
        perturbed = _perturb(noise, variables)
        first, before = given, outputs({}, perturbed)
        if any(np.isnan(one).any() for one in before):  # too much for its precision
            perturbed, before = variables, given
            first = [np.zeros_like(one) for one in given]
        change, drawn = partial(_change, first, before), random_permutations(draw, symmetries)
        allowed = lowest if tolerance is None else tolerance
        by = change(outputs(drawn, perturbed))
        if by > allowed and tolerance is None:
            reordered = _floating(_reordered(network, perturbed, inputs))
            allowed = max(allowed, 10 * change(reordered))
        if by <= allowed:
            continue
        for group in symmetries.groups:
            by = change(outputs({**still, group.name: drawn[group.name]}, perturbed))
            if not by <= allowed:
                where = ", ".join(site.describe() for site in group.sites)
                raise SymmetryError(
                    f"group {group.name!r} changes the outputs by {by:.2g}: {where}"
                )
        raise SymmetryError("the groups change the outputs together, though none does alone")


@partial(jax.jit, static_argnums=0)
def _outputs(apply_fn: ApplyFn, variables: PyTree, inputs: Any) -> list[jax.Array]:
    with jax.default_matmul_precision("highest"):
        return jax.tree.leaves(apply_fn(variables, inputs))


@partial(jax.jit, static_argnums=0)
def _reordered(apply_fn: ApplyFn, variables: PyTree, inputs: Any) -> list[jax.Array]:
    """The outputs with the terms of all sums, but those in loops, in reverse order."""
    with jax.default_matmul_precision("highest"):
        program = trace(apply_fn, variables, inputs)
        outputs = run(program, jax.tree.leaves(variables), inputs, _reverse, None)
        return jax.tree.leaves(outputs)


def _reverse(number: int, equation: core.JaxprEqn, operands: Sequence[Delayed]) -> list[Delayed]:
    del number
    name, params = equation.primitive.name, equation.params
    axes: Sequence[Sequence[int]] = ()
    if name == "dot_general":
        axes = params["dimension_numbers"][0]
    elif name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        if params["feature_group_count"] == params["batch_group_count"] == 1:
            axes = ([numbers.lhs_spec[1]], [numbers.rhs_spec[1]])
    elif name == "reduce_sum":
        axes = (params["axes"],)
    if axes:
        pairs = zip(operands, axes, strict=True)
        operands = [partial(_flipped, operand, tuple(along)) for operand, along in pairs]
    return delay(equation, operands)


def _flipped(operand: Delayed, axes: tuple[int, ...]) -> jax.Array:
    return jnp.flip(operand(), axes)


@functools.lru_cache(maxsize=64)
def _epsilon(program: Program) -> float:
    """The spacing of the coarsest floating-point type that anything in a program has."""

    def dtypes(jaxpr: core.Jaxpr) -> Iterator[Any]:
        for equation in jaxpr.eqns:
            yield from (getattr(atom.aval, "dtype", bool) for atom in equation.outvars)
            for inside in core.jaxprs_in_params(equation.params):
                yield from dtypes(inside)

    floats = {one for one in dtypes(program.closed.jaxpr) if jnp.issubdtype(one, jnp.floating)}
    return max(float(jnp.finfo(one).eps) for one in floats or {float})


def _floating(outputs: Sequence[jax.Array]) -> list[Array]:
    """The outputs that can change a little; all of them if there are no such."""
    arrays = [np.asarray(one) for one in outputs]
    return [one for one in arrays if jnp.issubdtype(one.dtype, jnp.inexact)] or arrays


def _change(first: Sequence[Array], before: Sequence[Array], after: Sequence[Array]) -> float:
    """The largest change of an output, relative to what perturbing the weights changes in its leaf.

    So classes that are switched off, by minus infinity or by -1e9, do not blind the comparison. An
    output may always change by the spacing of its own numbers.
    """
    changes = [0.0]
    for arrays in zip(first, before, after, strict=True):
        spacing = 0.0
        if jnp.issubdtype(arrays[0].dtype, jnp.inexact):
            spacing = 2 * float(jnp.finfo(arrays[0].dtype).eps)
        wide = jnp.promote_types(arrays[0].dtype, jnp.float32)
        other, a, b = (array.astype(wide) for array in arrays)
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        with np.errstate(invalid="ignore"):
            spread = np.nan_to_num(np.abs(a - other), nan=0, posinf=0).max(initial=0)
            over = np.where(same, 0, np.abs(b - a) - spacing * np.abs(a))
        by = np.nan_to_num(over, nan=np.inf).max(initial=0)
        changes.append(float(by / spread) if spread else np.inf if by else 0.0)
    return max(changes)


def _check_numbers(outputs: Sequence[Array], variables: PyTree, inputs: Any) -> None:
    """Names what is wrong with a network that gives no numbers before anything is permuted."""
    if not any(np.isnan(one).any() for one in outputs):
        return
    for error, name, tree in ((DataError, "inputs", inputs), (ParentsError, "leaf", variables)):
        for path, leaf in leaves_by_path(tree).items():
            values = np.asarray(leaf)
            if jnp.issubdtype(values.dtype, jnp.inexact) and (bad := not_finite(values)):
                at = f"{name} {path}".strip()
                raise error(f"{at}: {bad} of {values.size} values are not finite")
    raise DataError(
        "the network's outputs are not a number, for inputs and weights that are finite"
    )


def _perturb(key: Key, variables: PyTree) -> PyTree:
    """Makes every entry different; leaves without a negative entry stay so."""
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))

    def jitter(leaf: Array) -> Array:
        if not jnp.issubdtype(leaf.dtype, np.floating) or not leaf.size:
            return leaf
        values = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
        signed = values.min() < 0 or values.max() == 0
        spread = (0.1 + 0.5 * values.std()) if signed else 0.0
        scale, shift = rng.standard_normal((2, *leaf.shape), np.float32)
        limit = float(jnp.finfo(leaf.dtype).max)
        moved = np.clip(values * np.exp(0.3 * scale) + spread * shift, -limit, limit)
        return np.asarray(moved, leaf.dtype)

    return jax.tree.map(jitter, variables)
