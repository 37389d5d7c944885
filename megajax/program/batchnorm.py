"""Restores the statistics of activations in a merged network, from its inference program alone.

A mixed network's activations shrink and drift away from what its BatchNorm layers recorded in the
parents; with statistics measured anew the same weights work again (REPAIR, arXiv 2211.08403). Where
the statistics are is read off the program (see `roles`): no training mode, name or framework is
needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from megajax.entry import is_traced, taken
from megajax.errors import ConfigError
from megajax.program.jaxprs import (
    Delayed,
    bodies,
    delay,
    known,
    run,
    run_scan,
    size_of,
    trace,
    walk,
)
from megajax.program.roles import Statistic, Step, find_roles
from megajax.trees import checked_parents, leaf_paths
from megajax.types import ApplyFn, PyTree

__all__ = ["recalibrate", "repair", "with_batch_statistics"]


def recalibrate(
    apply_fn: ApplyFn,
    variables: PyTree,
    inputs: Any,
    statistics: Sequence[tuple[str, str]] = (),
) -> PyTree:
    """Gives every BatchNorm layer the exact mean and variance of its activations on `inputs`.

    Layer by layer in the order of the program, each one behind layers that are corrected already:
    what a forward pass in training mode would normalise with, without its moving average. May be
    jitted and vmapped, so that every candidate of a population can be scored as it will be used.
    Statistics are measured in float32 and kept within what their leaf can hold.

    Args:
        apply_fn: `apply_fn(variables, inputs) -> outputs`, in inference mode.
        variables: of one network.
        inputs: calibration inputs `[n, ...]`, all in one batch; a few hundred do.
        statistics: paths of (mean, variance) leaves, for layers of a form that is not recognised.

    Returns:
        The variables with new statistics; all other leaves are the same.

    Raises:
        ConfigError: the network has no BatchNorm statistics, or some that cannot be measured.
        DataError: fewer than two inputs, or some that are not finite or do not fit.

    Example:
        >>> def apply_fn(w, x):
        ...     return (x - w["mean"]) * jax.lax.rsqrt(w["var"] + 1e-5)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> w = recalibrate(apply_fn, {"mean": jnp.zeros(1), "var": jnp.ones(1)}, x)
        >>> float(w["mean"][0]), float(w["var"][0])
        (2.0, 1.0)

    Source: Jordan et al., "REPAIR: REnormalizing Permuted Activations for Interpolation Repair",
    arXiv 2211.08403, section on resetting BatchNorm.
    """
    variables, inputs = taken(apply_fn, variables, inputs, "calibration inputs", 2)
    return _measured(apply_fn, variables, inputs, statistics)[1]


def with_batch_statistics(
    apply_fn: ApplyFn,
    variables: PyTree,
    inputs: Any,
    statistics: Sequence[tuple[str, str]] = (),
) -> Any:
    """The outputs of a network whose statistics are those of the batch itself, as in training.

    Args:
        apply_fn: as for `recalibrate`.
        variables: of one network.
        inputs: one batch.
        statistics: as for `recalibrate`.

    Example:
        >>> def apply_fn(w, x):
        ...     return (x - w["mean"]) * jax.lax.rsqrt(w["var"])
        >>> x = jnp.array([[1.0], [3.0]])
        >>> with_batch_statistics(apply_fn, {"mean": jnp.zeros(1), "var": jnp.ones(1)}, x).tolist()
        [[-1.0], [1.0]]
    """
    return _measured(apply_fn, variables, inputs, statistics)[0]


def _measured(
    apply_fn: ApplyFn, variables: PyTree, inputs: Any, statistics: Sequence[tuple[str, str]]
) -> tuple[Any, PyTree]:
    """Outputs and variables of a network whose statistics are measured on the way."""
    roles = find_roles(apply_fn, variables, inputs, statistics)
    paths = leaf_paths(variables)
    wrong = dict.fromkeys(roles.unpaired, "no mean goes with it; name the pair in `statistics`")
    for one in roles.statistics:
        odd = [name for name, *_ in (*one.mean_steps, *one.variance_steps) if name not in _UNDO]
        if one.problem or odd:
            wrong[one.variance] = one.problem or f"{odd[0]} comes between it and its use"
    if wrong:
        listed = "; ".join(f"{paths[leaf]}: {why}" for leaf, why in wrong.items())
        raise ConfigError(f"recalibrate cannot measure these statistics anew: {listed}")
    if not roles.statistics:
        raise ConfigError(
            "recalibrate: the network has no BatchNorm statistics (a leaf that is subtracted from "
            "activations, which are then divided by the root of another)"
        )
    leaves, treedef = jax.tree.flatten(variables)
    program, places = trace(apply_fn, variables, inputs), {i: i for i in range(len(leaves))}
    arguments = [*leaves, *jax.tree.leaves(inputs)]
    wanted = {s.equation: s for s in roles.statistics}
    results, _ = _measure(program.closed, arguments, places, wanted, 0)
    outputs = jax.tree.unflatten(program.output_tree, results)
    return outputs, jax.tree.unflatten(treedef, arguments[: len(leaves)])


def _measure(
    closed: core.ClosedJaxpr,
    arguments: list[Any],
    places: Mapping[int, int],
    statistics: Mapping[int, Statistic],
    start: int,
) -> tuple[list[Any], dict[int, Any]]:
    """Runs a program, and sets its arguments that are statistics when they are used.

    Args:
        closed: the network, or what a scan does in each step.
        arguments: arrays; changed on the way.
        places: leaf -> place among the arguments.
        statistics: by the number of their equation.
        start: the number of the first equation.

    Returns:
        The results, and the leaves that were measured.
    """
    steps = {step[1] for one in statistics.values() for step in _steps(one)}
    done: dict[int, Sequence[Delayed]] = {}
    pending: dict[int, Delayed] = {}
    measured: set[int] = set()

    def read(place: int) -> Any:
        if place in pending:  # by now the steps between the leaf and its use are known
            arguments[place] = pending.pop(place)()
        return arguments[place]

    def store(leaf: int, value: jax.Array, steps: Sequence[Step], mean: bool) -> None:
        pending[places[leaf]] = partial(_undone, arguments[places[leaf]], value, steps, done, mean)
        measured.add(leaf)

    def visit(number: int, equation: core.JaxprEqn, operands: Sequence[Delayed]) -> Any:
        if number in steps:
            done[number] = operands
        one = statistics.get(number)
        if one is not None:
            x = operands[one.operand]()
            x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            spread = jnp.var(x, one.axes)
            store(one.mean, jnp.mean(x, one.axes), one.mean_steps, True)
            spread = jnp.sqrt(spread) if one.deviation else spread
            store(one.variance, spread, one.variance_steps, False)
        elif equation.primitive.name == "scan":
            (body,) = bodies(equation)
            held = [n for n in statistics if number < n <= number + size_of(body.closed)]
            if held:
                return map(known, scan(number, equation, operands))
        return delay(equation, operands)

    def scan(number: int, equation: core.JaxprEqn, operands: Sequence[Delayed]) -> list[Any]:
        (body,) = bodies(equation)
        inside = {
            leaf: i
            for i, one in enumerate(operands)
            for leaf in places
            if one is slots[places[leaf]]
        }

        def step(values: list[Any]) -> tuple[list[Any], dict[int, Any]]:
            return _measure(body.closed, values, inside, statistics, number + 1)

        outputs, stacked = run_scan(equation, [operand() for operand in operands], step)
        for leaf, value in stacked.items():
            arguments[places[leaf]] = value
            measured.add(leaf)
        return outputs

    slots: list[Delayed] = [partial(read, place) for place in range(len(arguments))]
    results = walk(closed, slots, visit, known, start, {*statistics, *steps})
    values = [result() for result in results]
    return values, {leaf: read(places[leaf]) for leaf in measured}


def _undone(
    leaf: jax.Array,
    value: jax.Array,
    steps: Sequence[Step],
    done: Mapping[int, Sequence[Delayed]],
    mean: bool,
) -> jax.Array:
    """What a leaf must be for the program to make this of it, within what the leaf can hold."""
    value = value.reshape(leaf.shape)
    for name, number, place in reversed(steps):
        others = [jnp.asarray(one()) for i, one in enumerate(done[number]) if i != place]
        if mean or name != "add":  # what is added to a variance keeps it from zero
            others = [one.reshape(leaf.shape if one.size > 1 else ()) for one in others]
            value = _UNDO[name](value, place, *others)
    limit = float(jnp.finfo(leaf.dtype).max)
    value = jnp.nan_to_num(value, nan=limit, posinf=limit, neginf=-limit)
    return jnp.clip(value, -limit, limit).astype(leaf.dtype)


def _steps(one: Statistic) -> tuple[Step, ...]:
    return (*one.mean_steps, *one.variance_steps)


_UNDO: dict[str, Callable[..., jax.Array]] = {
    **dict.fromkeys(("max", "min", "clamp", "abs", "reduce_precision"), lambda value, *_: value),
    "add": lambda value, _, other: value - other,
    "sub": lambda value, place, other: other - value if place else value + other,
    "mul": lambda value, _, other: value / other,
    "div": lambda value, place, other: other / value if place else value * other,
    "neg": lambda value, _: -value,
    "exp": lambda value, _: jnp.log(value),
    "square": lambda value, _: jnp.sqrt(value),
}
"""What a leaf must be for an equation to give a value: from the value, the leaf's place among the
operands, and the other operands."""


def repair(
    apply_fn: ApplyFn,
    variables: PyTree,
    parents: Sequence[PyTree],
    inputs: Any,
    weights: Sequence[float] | None = None,
) -> PyTree:
    """Gives every hidden unit of a merged network the parents' mean and spread (REPAIR).

    For networks without BatchNorm. Layer by layer in the order of the program, kernel and bias of
    each unit are rescaled so that its pre-activations on `inputs` have the weighted mean of the
    parents' means, and of their standard deviations.

    Args:
        apply_fn: `apply_fn(variables, inputs) -> outputs`, in inference mode.
        variables: of the merged network.
        parents: the K networks it was merged from, hidden units aligned.
        inputs: calibration inputs `[n, ...]`, all in one batch.
        weights: `[K]`, how much each parent counts; None counts them alike.

    Returns:
        The variables with rescaled kernels and biases. A unit that is constant stays as it is.

    Raises:
        ConfigError: no layer has a kernel and a bias that hidden units come from.
        DataError: as for `recalibrate`.
        ParentsError: the parents differ in structure.

    Example:
        >>> def apply_fn(w, x):
        ...     return jnp.tanh(x @ w["u"] + w["b"]) @ w["v"]
        >>> w = {"u": jnp.ones((1, 1)), "b": jnp.zeros(1), "v": jnp.ones((1, 1))}
        >>> shrunk = w | {"u": w["u"] / 4}
        >>> x = jnp.array([[1.0], [-1.0]])
        >>> round(float(repair(apply_fn, shrunk, [w, w], x)["u"][0, 0]), 3)
        1.0

    Source: Jordan et al., "REPAIR: REnormalizing Permuted Activations for Interpolation Repair",
    arXiv 2211.08403.
    """
    if not is_traced((variables, parents)):
        parents = checked_parents([variables, *parents])[1:]
    variables, inputs = taken(apply_fn, variables, inputs, "calibration inputs", 2)
    layers = {one.equation: one for one in find_roles(apply_fn, variables, inputs).linear}
    if not layers:
        raise ConfigError("repair: no hidden layer of the network has a kernel and a bias")
    program = trace(apply_fn, variables, inputs)

    def moments(z: jax.Array, axis: int) -> jax.Array:
        others = tuple(i for i in range(z.ndim) if i != axis)
        z = z.astype(jnp.promote_types(z.dtype, jnp.float32))
        return jnp.stack([jnp.mean(z, others), jnp.std(z, others)])

    def measured(parent: PyTree) -> dict[int, jax.Array]:
        found: dict[int, jax.Array] = {}

        def look(number: int, equation: core.JaxprEqn, operands: Sequence[Delayed]) -> Any:
            outputs = delay(equation, operands)
            if number in layers:
                found[number] = moments(outputs[0](), layers[number].axis)
            return outputs

        run(program, jax.tree.leaves(parent), inputs, look, layers)
        return found

    of_parents = [measured(parent) for parent in parents]
    share = jnp.full(len(parents), 1 / len(parents)) if weights is None else jnp.asarray(weights)
    target = {
        number: jnp.tensordot(share, jnp.stack([found[number] for found in of_parents]), 1)
        for number in layers
    }
    leaves, treedef = jax.tree.flatten(variables)

    def step_in(number: int, equation: core.JaxprEqn, operands: Sequence[Delayed]) -> Any:
        outputs = delay(equation, operands)
        if number not in layers:
            return outputs
        layer, z = layers[number], outputs[0]()
        (mean, spread), (new_mean, new_spread) = moments(z, layer.axis), target[number]
        scale = jnp.where(spread > 1e-6, new_spread / jnp.maximum(spread, 1e-6), 1.0)
        shift = jnp.where(spread > 1e-6, new_mean - scale * mean, 0.0)
        kernel, bias = leaves[layer.kernel], leaves[layer.bias]
        scaled = kernel * _along(scale, layer.kernel_axis, kernel.ndim)
        leaves[layer.kernel] = scaled.astype(kernel.dtype)
        moved = bias * scale.reshape(bias.shape) + shift.reshape(bias.shape)
        leaves[layer.bias] = moved.astype(bias.dtype)
        repaired = z * _along(scale, layer.axis, z.ndim) + _along(shift, layer.axis, z.ndim)
        return [known(repaired.astype(z.dtype))]

    run(program, leaves, inputs, step_in, layers)
    return jax.tree.unflatten(treedef, leaves)


def _along(vector: jax.Array, axis: int, ndim: int) -> jax.Array:
    return vector.reshape([-1 if i == axis else 1 for i in range(ndim)])
