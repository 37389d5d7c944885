"""Restores the statistics of activations in a merged network, from its inference program alone.

A mixed network's activations shrink and drift away from what its BatchNorm layers recorded in the
parents; with statistics measured anew the same weights work again (REPAIR, arXiv 2211.08403). The
layers are found in the program: a leaf is a mean if it is subtracted from activations that are then
divided by the root of another leaf, the variance. So no training mode, name or framework is needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend import core

from megajax.errors import ConfigError
from megajax.genome import FROZEN, Genome
from megajax.types import ApplyFn, PyTree

__all__ = ["Statistic", "find_statistics", "recalibrate", "recalibrated"]

_CALLS = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "checkpoint", "custom_jvp_call", "custom_vjp_call"}
)


class Statistic(NamedTuple):
    """A BatchNorm layer: where its statistics are, and where the program uses them.

    Attributes:
        mean: index of the mean's leaf, in flattening order.
        variance: index of the variance's leaf.
        equation: which equation subtracts the mean, in the order of execution.
        axes: the activations' axes that are averaged over.
    """

    mean: int
    variance: int
    equation: int
    axes: tuple[int, ...]


def find_statistics(apply_fn: ApplyFn, variables: PyTree, inputs: Any) -> tuple[Statistic, ...]:
    """Finds the BatchNorm layers of a network in its inference program.

    Args:
        apply_fn: `apply_fn(variables, inputs) -> logits`, in inference mode.
        variables: of one network, or their shapes and dtypes.
        inputs: a batch of inputs `[b, ...]`, or its shape and dtype.

    Returns:
        The layers, in the order in which the program uses them; none inside loops.

    Example:
        >>> def apply_fn(w, x):
        ...     return (x - w["mean"]) * jax.lax.rsqrt(w["var"] + 1e-5)
        >>> w = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
        >>> find_statistics(apply_fn, w, jnp.ones((8, 3)))
        (Statistic(mean=0, variance=1, equation=1, axes=(0,)),)
    """
    program, shapes = _trace(apply_fn, variables, inputs)
    leaves = [_Trait(weight=True, leaf=i, dims=tuple(range(s.ndim))) for i, s in enumerate(shapes)]
    arguments = [*leaves, *(_Trait() for _ in jax.tree.leaves(inputs))]
    found: list[Statistic] = []

    def visit(number: int, equation: core.JaxprEqn, operands: Sequence[_Trait]) -> Sequence[_Trait]:
        trait = _follow(number, equation, operands)
        if trait.root is not None and trait.centred is not None:
            found.append(trait.centred._replace(variance=trait.root))
            trait = _Trait()
        return [trait] * len(equation.outvars)

    _walk(program.jaxpr, [_Trait(weight=True)] * len(program.consts), arguments, visit)
    return tuple(found)


def recalibrate(apply_fn: ApplyFn, variables: PyTree, inputs: jax.Array) -> PyTree:
    """Gives every BatchNorm layer the exact mean and variance of its activations on `inputs`.

    Layer by layer in the order of the program, each one behind layers that are corrected already:
    what a forward pass in training mode would normalise with, without its moving average. May be
    jitted and vmapped, so that every candidate of a population can be scored as it will be used.

    Args:
        apply_fn: `apply_fn(variables, inputs) -> logits`, in inference mode.
        variables: of one network.
        inputs: calibration inputs `[n, ...]`, all in one batch; a few hundred do.

    Returns:
        The variables with new statistics; all other leaves are the same.

    Raises:
        ConfigError: the network has no BatchNorm statistics.

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
    statistics = {s.equation: s for s in find_statistics(apply_fn, variables, inputs)}
    if not statistics:
        raise ConfigError(
            "recalibrate: the network has no BatchNorm statistics (a leaf that is subtracted from "
            "activations, which are then divided by the root of another)"
        )
    program, _ = _trace(apply_fn, variables, inputs)
    leaves, treedef = jax.tree.flatten(variables)

    def visit(
        number: int, equation: core.JaxprEqn, operands: Sequence[_Delayed]
    ) -> Sequence[_Delayed]:
        statistic = statistics.get(number)
        if statistic is not None:
            x = operands[0]().astype(jnp.float32)
            mean, variance = jnp.mean(x, statistic.axes), jnp.var(x, statistic.axes)
            for index, value in ((statistic.mean, mean), (statistic.variance, variance)):
                leaves[index] = value.reshape(leaves[index].shape).astype(leaves[index].dtype)
        return _delay(equation, operands)

    # A leaf is read when its value is needed and not before: by then its statistics are new.
    arguments = [lambda i=i: leaves[i] for i in range(len(leaves))]
    arguments += [lambda leaf=leaf: leaf for leaf in jax.tree.leaves(inputs)]
    constants = [lambda const=const: const for const in program.consts]
    for output in _walk(program.jaxpr, constants, arguments, visit):
        output()
    return jax.tree.unflatten(treedef, leaves)


def recalibrated(genome: Genome, apply_fn: ApplyFn) -> Genome:
    """A genome of masks whose networks are recalibrated as they are expressed.

    Every candidate is then scored, and used, with statistics of its own. An individual that is one
    of the parents keeps that parent's statistics, bit for bit.

    Args:
        genome: a genome of masks.
        apply_fn: the network, in inference mode.

    Returns:
        The genome; its `express` takes `(parents, inputs)` in place of `parents`, where `inputs`
        `[n, ...]` are the calibration inputs.

    Example:
        >>> from megajax.genome import masks
        >>> parents = {"mean": jnp.zeros((2, 1)), "var": jnp.ones((2, 1)), "w": jnp.ones((2, 1))}
        >>> def apply_fn(w, x):
        ...     return (x * w["w"] - w["mean"]) * jax.lax.rsqrt(w["var"] + 1e-5)
        >>> genome = recalibrated(masks(parents, granularity="global"), apply_fn)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> float(genome.express(jnp.array([[0.5, 0.5]]), (parents, x))["mean"][0])
        2.0
        >>> float(genome.express(jnp.array([[1.0, 0.0]]), (parents, x))["mean"][0])
        0.0
    """
    frozen = any((label == FROZEN).any() for label in jax.tree.leaves(genome.labels))

    def express(genes: jax.Array, context: tuple[PyTree, jax.Array]) -> PyTree:
        parents, inputs = context
        variables = genome.express(genes, parents)
        is_parent = jnp.all((genes[:, :1] if frozen else genes) == 1, axis=0)
        new = recalibrate(apply_fn, variables, inputs)
        return jax.tree.map(lambda old, new: jnp.where(is_parent.any(), old, new), variables, new)

    return genome._replace(express=express)


_Delayed: TypeAlias = Callable[[], Any]


def _delay(equation: core.JaxprEqn, operands: Sequence[_Delayed]) -> list[_Delayed]:
    """The outputs of an equation, computed at the first use of one of them."""
    pairs = zip(equation.invars, operands, strict=True)
    values = {atom: value for atom, value in pairs if not isinstance(atom, core.Literal)}
    names = core.DebugInfo("equation", equation.primitive.name, None, None)
    alone = core.Jaxpr((), list(values), equation.outvars, [equation], equation.effects, names)
    compute = core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))
    computed: list[Any] = []

    def output(index: int) -> Any:
        if not computed:
            computed.extend(compute(*(value() for value in values.values())))
        return computed[index]

    return [partial(output, i) for i in range(len(equation.outvars))]


class _Trait(NamedTuple):
    """What is known of an intermediate without computing it.

    Attributes:
        weight: derived from leaves and constants only.
        leaf: it is this leaf, reshaped or broadcast; `dims` are the axes where the leaf's are.
        dims: see `leaf`.
        root: a factor or divisor that is the root of this leaf.
        centred: activations from which a mean was just subtracted.
    """

    weight: bool = False
    leaf: int | None = None
    dims: tuple[int, ...] = ()
    root: int | None = None
    centred: Statistic | None = None


def _follow(number: int, equation: core.JaxprEqn, operands: Sequence[_Trait]) -> _Trait:
    """The trait of an equation's output."""
    name, ndim = equation.primitive.name, len(_shape(equation.outvars[0]))
    first, *others = operands or [_Trait(weight=True)]
    second = others[0] if others else _Trait(weight=True)
    if all(operand.weight for operand in operands):
        if name in ("reshape", "broadcast_in_dim", "convert_element_type", "squeeze", "copy"):
            dims = _moved(equation, first.dims) if first.leaf is not None else None
            return first._replace(leaf=first.leaf if dims else None, dims=dims or ())
        if name in ("rsqrt", "sqrt", "pow", "integer_pow"):
            return _Trait(weight=True, root=first.leaf)
        if name == "add" and (first.leaf is None) != (second.leaf is None):  # variance + epsilon
            return first if first.leaf is not None else second
        if name in ("mul", "div"):
            return _Trait(weight=True, root=first.root if first.root is not None else second.root)
        return _Trait(weight=True)
    if name == "sub" and not first.weight and second.leaf is not None:
        axes = tuple(axis for axis in range(ndim) if axis not in second.dims)
        return _Trait(centred=Statistic(second.leaf, -1, number, axes))
    if name in ("mul", "div"):
        centred = first.centred if first.centred is not None else second.centred
        root = first.root if first.root is not None else second.root
        return _Trait(centred=centred, root=root if centred is not None else None)
    if name == "convert_element_type":
        return first
    return _Trait()


def _moved(equation: core.JaxprEqn, dims: tuple[int, ...]) -> tuple[int, ...] | None:
    """Where axes are after a reshape that only adds or drops axes of length one, or a broadcast."""
    before, after = _shape(equation.invars[0]), _shape(equation.outvars[0])
    if equation.primitive.name == "broadcast_in_dim":
        return tuple(equation.params["broadcast_dimensions"][dim] for dim in dims)
    if equation.primitive.name in ("convert_element_type", "copy"):
        return dims
    kept = [dim for dim in dims if before[dim] != 1]
    places = [dim for dim, size in enumerate(after) if size != 1]
    if [before[dim] for dim in kept] != [after[dim] for dim in places]:
        return None
    return tuple(places) if len(kept) == len(dims) else None


def _shape(atom: Any) -> tuple[int, ...]:
    shape: tuple[int, ...] = atom.aval.shape
    return shape


def _trace(apply_fn: ApplyFn, variables: PyTree, inputs: Any) -> tuple[Any, list[Any]]:
    """The program over the flattened leaves and inputs, and the leaves' shapes."""
    shapes, treedef = jax.tree.flatten(jax.eval_shape(lambda tree: tree, variables))

    def flat_apply(flat: Sequence[jax.Array], inputs: Any) -> jax.Array:
        return apply_fn(jax.tree.unflatten(treedef, flat), inputs)

    return jax.make_jaxpr(flat_apply)(shapes, inputs), shapes


def _walk(
    jaxpr: core.Jaxpr,
    constants: Sequence[Any],
    arguments: Sequence[Any],
    visit: Callable[[int, core.JaxprEqn, Sequence[Any]], Sequence[Any]],
    numbers: Iterator[int] | None = None,
) -> list[Any]:
    """Visits the equations in order, those inside calls too, with the values of their operands.

    `visit(number, equation, operands)` returns the values of the outputs. A value is whatever the
    visitor makes of it; for a literal it is made from the constants' kind.
    """
    numbers = itertools.count() if numbers is None else numbers
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, constants, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))
    static = bool(arguments) and isinstance(arguments[0], _Trait)

    def read(atom: Any) -> Any:
        if not isinstance(atom, core.Literal):
            return values[atom]
        return _Trait(weight=True) if static else lambda: atom.val

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        body = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        if equation.primitive.name in _CALLS and body is not None:
            inner = getattr(body, "jaxpr", body)
            of_body = getattr(body, "consts", ())
            consts = [_Trait(weight=True) if static else lambda c=c: c for c in of_body]
            outputs: Sequence[Any] = _walk(inner, consts, operands, visit, numbers)
        else:
            outputs = visit(next(numbers), equation, operands)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]
