"""Networks made ready for many passes: what depends on the weights alone is computed once.

`prepare` computes it for one network; `apply` passes a batch through. A scale and a shift that
follow a convolution or a dense layer, as BatchNorm's do, go into its kernel and one bias, so that a
pass is convolution, bias and activation. On a CPU narrow convolutions are widened, too. All of it
is found in the program, of any network.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from megajax.program.convolutions import (
    NARROW,
    convolve_widely,
    narrow_on,
    pixels_at_once,
    widen_kernel,
)
from megajax.program.jaxprs import (
    ELEMENTWISE,
    Delayed,
    Program,
    delay,
    known,
    moved_axes,
    produced_axes,
    run_equation,
    shape_of,
    static,
    trace,
    walk,
)
from megajax.types import ApplyFn, PyTree

__all__ = ["Folded", "Prepared", "fold", "for_backend", "widened"]


@partial(
    jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["treedef", "shapes"]
)
@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a pass needs of one network; a pytree, to be stacked, mapped over and sharded.

    Attributes:
        arrays: kernels, biases and whatever else the program uses of the weights.
        treedef: structure of the variables.
        shapes: shapes and dtypes of the variables' leaves.
    """

    arrays: list[jax.Array]
    treedef: Any
    shapes: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Folded:
    """A network in two steps; equal ones compare equal. Called, it does both: it is a network, too.

    Attributes:
        apply_fn: the network.
        affine: scales and shifts go into kernels.
        narrow: of which convolutions several pixels are computed at once; see `pixels_at_once`.
    """

    apply_fn: ApplyFn
    affine: bool = True
    narrow: int = 0

    def prepare(self, variables: PyTree, inputs: Any) -> Prepared:
        """What depends on the variables alone.

        Args:
            variables: of one network.
            inputs: a batch of the shape that is to come, or its shapes and dtypes.
        """
        program = trace(self.apply_fn, variables, inputs)
        kept: list[Any] = []
        holes = [None] * len(jax.tree.leaves(inputs))
        self._pass(program, _Pass(kept=kept), jax.tree.leaves(variables), holes)
        # Without a barrier XLA computes some of it anew for every pixel of a pass.
        kept = jax.lax.optimization_barrier(kept)
        return Prepared(kept, program.treedef, program.shapes)

    def apply(self, prepared: Prepared, inputs: Any) -> Any:
        """The outputs of a network for a batch, from what was prepared."""
        variables = jax.tree.unflatten(prepared.treedef, prepared.shapes)
        program = trace(self.apply_fn, variables, inputs)
        given = _Pass(given=iter(prepared.arrays))
        holes = [None] * len(prepared.shapes)
        return self._pass(program, given, holes, jax.tree.leaves(inputs))

    def __call__(self, variables: PyTree, inputs: Any) -> Any:
        """The outputs of a network for a batch, from its variables."""
        program = trace(self.apply_fn, variables, inputs)
        return self._pass(program, _Pass(), jax.tree.leaves(variables), jax.tree.leaves(inputs))

    def _pass(
        self, program: Program, at: _Pass, leaves: Sequence[Any], inputs: Sequence[Any]
    ) -> Any:
        plan = _plan(program, self.affine, self.narrow)
        specs = zip(leaves, program.shapes, strict=True)
        weights = [_Known(known(leaf), _varying(spec.shape)) for leaf, spec in specs]
        visit = partial(_visit, plan, at)
        wanted = plan.folded.union(plan.steps)
        values = walk(program.closed, [*weights, *inputs], visit, _constant, wanted=wanted)
        atoms = program.closed.jaxpr.outvars
        results = [at.operand(*pair) for pair in zip(values, atoms, strict=True)]
        return jax.tree.unflatten(program.output_tree, results)


def fold(apply_fn: ApplyFn, *, one_core: bool = False) -> Folded:
    """A network whose passes cost as little as they can on this backend.

    Exact up to rounding, in any precision: what is folded is computed in float32 or wider. Inside
    loops and branches nothing is folded.

    Args:
        apply_fn: the network, in inference mode.
        one_core: on a CPU, a single core computes a pass.

    Example:
        >>> def apply_fn(w, x):
        ...     return jnp.tanh((x @ w["kernel"] - w["mean"]) / jnp.sqrt(w["var"]))
        >>> w = {"kernel": jnp.eye(2), "mean": jnp.ones(2), "var": jnp.full(2, 4.0)}
        >>> network, x = fold(apply_fn), jnp.ones((3, 2))
        >>> prepared = network.prepare(w, x)
        >>> [array.tolist() for array in prepared.arrays]
        [[[0.5, 0.0], [0.0, 0.5]], [[-0.5, -0.5]]]
        >>> bool(jnp.allclose(network.apply(prepared, x), apply_fn(w, x)))
        True
    """
    return Folded(static(apply_fn), narrow=narrow_on(one_core))


def widened(apply_fn: ApplyFn, narrow: int = NARROW) -> Folded:
    """The same network, its narrow convolutions computing several pixels of a row at once.

    Args:
        apply_fn: the network.
        narrow: see `pixels_at_once`.

    Example:
        >>> def apply_fn(w, x):
        ...     return jax.lax.conv(x, w, (1, 1), "SAME").mean((2, 3))
        >>> x, w = jnp.ones((2, 3, 8, 8)), jnp.ones((4, 3, 3, 3))
        >>> bool(jnp.allclose(widened(apply_fn)(w, x), apply_fn(w, x)))
        True
    """
    return Folded(static(apply_fn), affine=False, narrow=narrow)


def for_backend(apply_fn: ApplyFn, *, one_core: bool = False) -> ApplyFn:
    """The network as the backend does it fastest from its variables: `widened` on a CPU.

    Args:
        apply_fn: the network.
        one_core: on a CPU, a single core computes a pass.

    Example:
        >>> for_backend(max) == widened(max)  # on a CPU
        True
    """
    narrow = narrow_on(one_core)
    return widened(apply_fn, narrow) if narrow else apply_fn


# What is folded ----------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """What is done in another way than the program says.

    Attributes:
        steps: for contractions with weights, how many equations behind them are folded into them.
        folded: the numbers of those equations.
        narrow: of which convolutions several pixels are computed at once.
    """

    steps: dict[int, int]
    folded: frozenset[int]
    narrow: int


class _Chain(NamedTuple):
    """A contraction with weights, scaled and shifted since along its units."""

    head: int
    units: frozenset[int]
    made_by: int


_AFFINE = ("add", "add_any", "sub", "mul", "div")


@functools.lru_cache(maxsize=64)
def _plan(program: Program, affine: bool, narrow: int) -> _Plan:
    uses: collections.Counter[int | None] = collections.Counter()

    def count(number: int, equation: core.JaxprEqn, operands: Sequence[int | None]) -> Any:
        uses.update(operands)
        return [number] * len(equation.outvars)

    arguments: list[Any] = [None] * len(program.closed.jaxpr.invars)
    uses.update(walk(program.closed, arguments, count, lambda _: None))
    chains: dict[int, list[tuple[int, str]]] = {}
    steps: dict[int, int] = {}

    def visit(number: int, equation: core.JaxprEqn, operands: Sequence[Any]) -> list[Any]:
        name, result = equation.primitive.name, equation.outvars[0].aval
        weights = [one for one in operands if isinstance(one, _Known)]
        if len(weights) == len(operands):
            varies = [_varies(equation, weights, shape_of(atom)) for atom in equation.outvars]
            return [_Known(known(None), one) for one in varies]
        made: list[Any] = [None] * len(equation.outvars)
        floats = jnp.issubdtype(getattr(result, "dtype", bool), jnp.floating)
        if not floats or len(weights) > 1 or len(operands) > 2:
            return made
        place = operands.index(weights[0]) if weights else 1
        chain = operands[1 - place] if len(operands) == 2 else operands[0]
        if name in ("dot_general", "conv_general_dilated") and weights:
            units = produced_axes(equation, place)
            grouped = equation.params.get("batch_group_count", 1) != 1
            if units and not grouped and (place == 1 or name == "dot_general"):
                chains[number] = []
                if pixels_at_once(equation, narrow) > 1:
                    steps[number] = 0
                made = [_Chain(number, frozenset(units), number)]
        elif isinstance(chain, _Chain) and uses[chain.made_by] == 1:
            along = {dim for one in weights for dim, varies in enumerate(one.varies) if varies}
            scales = name in _AFFINE and weights and not (name == "div" and place == 0)
            if name == "convert_element_type" or (scales and along <= chain.units):
                chains[chain.head].append((number, name))
                made = [chain._replace(made_by=number)]
        return made

    values: list[Any] = [_Known(known(None), _varying(spec.shape)) for spec in program.shapes]
    values += arguments[len(values) :]
    walk(program.closed, values, visit, _constant)
    folded: set[int] = set()
    for head, chain in chains.items():
        while chain and chain[-1][1] not in _AFFINE:
            chain.pop()
        if affine and any(name in ("mul", "div") for _, name in chain):
            steps[head] = len(chain)
            folded |= {number for number, _ in chain}
    return _Plan(steps, frozenset(folded), narrow)


def _varying(shape: Sequence[int]) -> tuple[bool, ...]:
    return tuple(size != 1 for size in shape)


def _varies(
    equation: core.JaxprEqn, weights: Sequence[_Known], shape: Sequence[int]
) -> tuple[bool, ...]:
    """Along which dimensions an equation's result varies."""
    moved = moved_axes(equation, weights[0].varies) if len(weights) == 1 else None
    if moved is not None:
        return tuple(map(bool, moved))
    if equation.primitive.name in ELEMENTWISE:
        alike = [one.varies for one in weights if len(one.varies) == len(shape)]
        return tuple(any(one[dim] for one in alike) for dim in range(len(shape)))
    return _varying(shape)


# A pass ------------------------------------------------------------------------------------------


class _Known(NamedTuple):
    """A value that depends on weights alone.

    Attributes:
        get: computes it.
        varies: the dimensions along which it varies.
        free: it depends on constants alone, and is no part of what is prepared.
        source: the value in a wider type, if it was rounded last.
    """

    get: Delayed
    varies: tuple[bool, ...]
    free: bool = False
    source: Delayed | None = None

    def small(self) -> jax.Array:
        """One entry along the dimensions in which all are the same."""
        value = jnp.asarray(self.get())
        return value[tuple(slice(None) if varies else slice(1) for varies in self.varies)]


class _Open(NamedTuple):
    """A contraction with weights that still waits for what is folded into it."""

    equation: core.JaxprEqn
    operands: tuple[Any, ...]
    left: int
    pixels: int
    steps: tuple[tuple[str, int, Delayed], ...] = ()


@dataclasses.dataclass
class _Pass:
    """A pass in which values of weights are kept for later, or given, or neither."""

    kept: list[Any] | None = None
    given: Iterator[Any] | None = None
    seen: dict[int, tuple[_Known, Any]] = dataclasses.field(default_factory=dict)

    def hand(self, value: Delayed) -> Any:
        """What weights alone decide."""
        if self.given is not None:
            return next(self.given)
        result = value()
        if self.kept is not None:
            self.kept.append(result)
        return result

    def operand(self, value: Any, atom: Any) -> Any:
        """An operand of an equation in which activations take part."""
        if not isinstance(value, _Known):
            return value
        if value.free or (self.kept is None and self.given is None):
            return value.get()
        if id(value) not in self.seen:
            self.seen[id(value)] = value, self.hand(value.small)
        small = self.seen[id(value)][1]
        return small if small.shape == shape_of(atom) else jnp.broadcast_to(small, shape_of(atom))


def _constant(value: Any) -> _Known:
    return _Known(known(value), _varying(jnp.shape(value)), free=True)


def _visit(
    plan: _Plan, at: _Pass, number: int, equation: core.JaxprEqn, operands: Sequence[Any]
) -> list[Any]:
    if all(isinstance(one, _Known) for one in operands):
        outputs = delay(equation, [one.get for one in operands])
        free = all(one.free for one in operands)
        rounded = equation.primitive.name == "convert_element_type"
        source = (operands[0].source or operands[0].get) if rounded else None
        return [
            _Known(output, _varies(equation, operands, shape_of(atom)), free, source)
            for output, atom in zip(outputs, equation.outvars, strict=True)
        ]
    if number in plan.folded:
        place, one = next((i, x) for i, x in enumerate(operands) if isinstance(x, _Open))
        other: Any = getattr(operands[place - 1], "small", None)
        step = (equation.primitive.name, place, other)
        one = one._replace(steps=(*one.steps, step), left=one.left - 1)
        return [one] if one.left else [_closed(at, one, equation.outvars[0].aval)]
    if number in plan.steps:
        pixels = pixels_at_once(equation, plan.narrow)
        one = _Open(equation, tuple(operands), plan.steps[number], pixels)
        return [one] if one.left else [_closed(at, one, equation.outvars[0].aval)]
    values = [at.operand(*pair) for pair in zip(operands, equation.invars, strict=True)]
    if at.kept is not None:
        return [None] * len(equation.outvars)
    return run_equation(equation, values)


def _closed(at: _Pass, one: _Open, result: Any) -> Any:
    """The result of a contraction, with everything that is folded into it."""
    equation = one.equation
    place, kernel = next((i, x) for i, x in enumerate(one.operands) if isinstance(x, _Known))
    factors = functools.cache(partial(_factors, one.steps))

    def weights() -> jax.Array:
        value = kernel.get()
        if one.steps:
            source = jnp.asarray((kernel.source or kernel.get)())
            source = source.astype(jnp.promote_types(source.dtype, jnp.float32))
            value = (source * _placed(factors()[0], equation, place)).astype(value.dtype)
        return widen_kernel(equation, value, one.pixels) if one.pixels > 1 else value

    ready = at.hand(weights)
    shifts = any(name in ("add", "add_any", "sub") for name, *_ in one.steps)
    shift = at.hand(lambda: factors()[1]) if shifts else None
    if at.kept is not None:
        return None
    inputs = one.operands[1 - place]
    if one.pixels > 1:
        made = convolve_widely(equation, inputs, ready, one.pixels)
    else:
        (made,) = run_equation(equation, [inputs, ready] if place == 1 else [ready, inputs])
    if shift is not None:
        made = made.astype(jnp.promote_types(made.dtype, jnp.float32)) + shift
    return made.astype(result.dtype)


def _factors(steps: Sequence[tuple[str, int, Delayed]]) -> tuple[Any, Any]:
    """The scale and the shift that equations amount to, one after the other."""
    scale, shift = jnp.float32(1), jnp.float32(0)
    for name, place, other in steps:
        if name == "convert_element_type":
            continue
        value = other()
        value = value.astype(jnp.promote_types(value.dtype, jnp.float32))
        if name == "mul":
            scale, shift = scale * value, shift * value
        elif name == "div":
            scale, shift = scale / value, shift / value
        elif name == "sub":
            scale, shift = (scale, shift - value) if place == 0 else (-scale, value - shift)
        else:
            shift = shift + value
    return scale, shift


def _placed(scale: jax.Array, equation: core.JaxprEqn, place: int) -> jax.Array:
    """A scale of a contraction's result, laid out as one of its kernel."""
    if not scale.ndim:
        return scale
    units = produced_axes(equation, place)  # dimension of the result -> dimension of the kernel
    dims = sorted(units, key=units.__getitem__)
    rest = [dim for dim in range(scale.ndim) if dim not in units]
    shape = [1] * len(shape_of(equation.invars[place]))
    for dim in dims:
        shape[units[dim]] = scale.shape[dim]
    return scale.transpose([*dims, *rest]).reshape(shape)
