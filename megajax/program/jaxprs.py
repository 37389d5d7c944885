"""Traced programs: walked equation by equation, or run with somebody stepping in.

The only module that knows JAX's versions: names of primitives, forms of their parameters. It knows
nothing of what networks are made of.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.extend import core

from megajax.types import ApplyFn, PyTree

__all__ = [
    "CALLS",
    "CONTRACTIONS",
    "ELEMENTWISE",
    "UNKNOWN_FORM",
    "Body",
    "Delayed",
    "Program",
    "Visit",
    "bodies",
    "body_of",
    "delay",
    "dependences",
    "known",
    "moved_axes",
    "produced_axes",
    "run",
    "run_equation",
    "run_scan",
    "shape_of",
    "size_of",
    "static",
    "trace",
    "walk",
]

_CUSTOM = ("custom_jvp_call", "custom_vjp_call")
CALLS = frozenset(
    (*_CUSTOM, "call", "checkpoint", "closed_call", "core_call", "eval_jaxpr", "jit", "pjit")
) | {"remat2"}
"""Primitives that do what a program of theirs does, once and on their own operands."""

CONTRACTIONS = ("dot_general", "conv_general_dilated", "ragged_dot_general", "gather")
"""Primitives in which a leaf meets activations to make new ones: products, and look-ups."""

ELEMENTWISE = frozenset(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil
    clamp clz complex conj convert_element_type copy cos cosh digamma div eq eq_to erf erf_inv
    erfc exp exp2 expm1 floor ge gt igamma igammac imag integer_pow is_finite le le_to lgamma
    log log1p log2 logistic lt lt_to max min mul name ne neg nextafter not one_minus_square or
    polygamma polynomial population_count pow real reduce_precision regularized_incomplete_beta rem
    round rsqrt select_n sharding_constraint shift_left shift_right_arithmetic shift_right_logical
    sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta
    """.split()  # noqa: SIM905
)
"""Primitives that act on each entry by itself."""

_SAME = ("convert_element_type", "copy", "copy_p", "name", "sharding_constraint", "stop_gradient")

UNKNOWN_FORM = (AttributeError, IndexError, KeyError, TypeError, ValueError)
"""What reading parameters raises where another version of JAX gives them another form."""

Delayed: TypeAlias = Callable[[], Any]
"""A value that is computed when it is asked for."""

Visit: TypeAlias = Callable[[int, core.JaxprEqn, Sequence[Any]], Sequence[Any]]
"""`visit(number, equation, operands)` returns the values of the equation's outputs."""


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A traced network; compared by identity, so that what is found out about it can be cached.

    Attributes:
        closed: the program; its arguments are the variables' leaves, then the inputs'.
        shapes: shapes and dtypes of the variables' leaves.
        treedef: structure of the variables.
        output_tree: structure of the outputs.
    """

    closed: core.ClosedJaxpr
    shapes: tuple[Any, ...]
    treedef: Any
    output_tree: Any


class Body(NamedTuple):
    """A program inside control flow.

    Attributes:
        closed: the program.
        operands: which operands of the equation its arguments are.
        carried: how many of the arguments, those before the sliced ones, change from step to step.
        sliced: how many of the last arguments are one entry (along axis 0) of the operand.
    """

    closed: core.ClosedJaxpr
    operands: tuple[int, ...]
    carried: int = 0
    sliced: int = 0


def trace(apply_fn: ApplyFn, variables: PyTree, inputs: Any) -> Program:
    """Traces a network without running it; the same network on the same shapes only once.

    Args:
        apply_fn: the network.
        variables: of one network, or their shapes and dtypes.
        inputs: a batch of inputs, or its shapes and dtypes.

    Example:
        >>> import numpy as np
        >>> len(trace(lambda w, x: x @ w, np.ones((3, 2)), np.ones((1, 3))).closed.eqns)
        1
    """
    specs, treedef = jax.tree.flatten(jax.eval_shape(_same, variables))
    input_specs, input_tree = jax.tree.flatten(jax.eval_shape(_same, inputs))
    config: Any = jax.config
    context = (
        config.jax_enable_x64,
        config.jax_default_matmul_precision,
        config.jax_numpy_dtype_promotion,
        jax.sharding.get_abstract_mesh(),  # the types in a program name the mesh it is traced under
    )
    shapes = (tuple(specs), tuple(input_specs))
    return _trace(static(apply_fn), treedef, input_tree, shapes, context)


@functools.lru_cache(maxsize=64)
def _trace(
    apply_fn: ApplyFn, treedef: Any, input_tree: Any, shapes: tuple[Any, Any], context: Hashable
) -> Program:
    del context  # what tracing depends on besides its arguments
    specs, input_specs = shapes

    def flat(leaves: Sequence[Any], inputs: Sequence[Any]) -> Any:
        return apply_fn(jax.tree.unflatten(treedef, leaves), jax.tree.unflatten(input_tree, inputs))

    closed, outputs = jax.make_jaxpr(flat, return_shape=True)(specs, input_specs)
    return Program(closed, specs, treedef, jax.tree.structure(outputs))


def _same(tree: PyTree) -> PyTree:
    return tree


@dataclasses.dataclass(frozen=True, eq=False)
class _ByIdentity:
    """A function that has no hash, as one that has."""

    apply_fn: ApplyFn

    def __call__(self, variables: PyTree, inputs: Any) -> Any:
        return self.apply_fn(variables, inputs)


def static(apply_fn: ApplyFn) -> ApplyFn:
    """The network as a static argument: itself, or a wrapper where it cannot be hashed.

    Example:
        >>> static(max) is max
        True
    """
    try:
        hash(apply_fn)
    except TypeError:
        return _ByIdentity(apply_fn)
    return apply_fn


def walk(
    closed: core.ClosedJaxpr,
    arguments: Sequence[Any],
    visit: Visit,
    lift: Callable[[Any], Any],
    start: int = 0,
    wanted: Collection[int] | None = None,
) -> list[Any]:
    """Visits the equations in the order of execution, those inside calls too.

    What a value is, is up to the visitor: a description, a delayed array, anything. Control flow is
    visited as one equation; a visitor that walks into its `bodies` starts at the number after its
    own, and so an equation has the same number in every walk.

    Args:
        closed: the program.
        arguments: values of its arguments.
        visit: gets the equation's number and the values of its operands.
        lift: makes a value from a constant.
        start: the number of the first equation.
        wanted: functions with derivatives of their own (`jax.custom_jvp`) that hold none of these
            equations are visited whole, so that running them keeps the derivatives.

    Returns:
        The values of the program's results.

    Example:
        >>> import numpy as np
        >>> program = trace(lambda w, x: jax.jit(jax.numpy.sin)(x @ w), np.ones((3, 2)), np.ones(3))
        >>> def visit(number, equation, operands):
        ...     print(number, equation.primitive.name)
        ...     return [None]
        >>> walk(program.closed, [None, None], visit, lambda constant: None)
        0 dot_general
        1 sin
        [None]
    """
    jaxpr, number = closed.jaxpr, start
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, map(lift, closed.consts), strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Any:
        return lift(atom.val) if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        body, after = body_of(equation), number + _numbers(equation)
        if wanted is not None and equation.primitive.name in _CUSTOM:
            body = body if any(number <= one < after for one in wanted) else None
        outputs: Sequence[Any]
        if body is None:
            outputs = visit(number, equation, operands)
        else:
            outputs = walk(body, operands, visit, lift, number, wanted)
        values.update(zip(equation.outvars, outputs, strict=True))
        number = after
    return [read(atom) for atom in jaxpr.outvars]


def size_of(closed: core.ClosedJaxpr) -> int:
    """How many equations a program has, with those inside calls and control flow.

    Example:
        >>> size_of(jax.make_jaxpr(jax.jit(lambda x: 2 * x + 1))(1.0))
        2
    """
    return sum(map(_numbers, closed.jaxpr.eqns))


def _numbers(equation: core.JaxprEqn) -> int:
    """How many numbers an equation takes, with what is inside it."""
    body = body_of(equation)
    if body is not None:
        return max(size_of(body), 1)
    return 1 + sum(size_of(one.closed) for one in bodies(equation))


def body_of(equation: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """The program that a call does; None for what is no call, or none of a form that is known.

    Example:
        >>> equation = jax.make_jaxpr(jax.jit(lambda x: 2 * x))(1.0).eqns[0]
        >>> len(body_of(equation).eqns)
        1
    """
    return _whole_body(equation) if equation.primitive.name in CALLS else None


def bodies(equation: core.JaxprEqn) -> list[Body]:
    """The programs inside control flow; none for other equations, or forms that are not known.

    Example:
        >>> def f(x):
        ...     return jax.lax.scan(lambda carry, x: (carry + x, None), 0.0, x)[0]
        >>> [(body.operands, body.carried, body.sliced)
        ...  for body in bodies(jax.make_jaxpr(f)(jax.numpy.ones(3)).eqns[-1])]
        [((0, 1), 1, 1)]
    """
    name, params, every = equation.primitive.name, equation.params, range(len(equation.invars))
    try:
        if name == "cond":
            return [Body(_closed(one), tuple(every[1:])) for one in params["branches"]]
        if name == "while":
            first = params["cond_nconsts"]
            carry = every[first + params["body_nconsts"] :]
            return [
                Body(_closed(params["cond_jaxpr"]), (*every[:first], *carry), len(carry)),
                Body(_closed(params["body_jaxpr"]), tuple(every[first:]), len(carry)),
            ]
        whole = None if name in CALLS else _whole_body(equation)
        if whole is None:
            return []
        if name != "scan":
            return [Body(whole, tuple(every))]
        # Which are carried and which are sliced is told by the shapes, in every version of JAX.
        carried = sum(map(_same_rank, equation.outvars, whole.jaxpr.outvars))
        sliced = len(every) - sum(map(_same_rank, equation.invars, whole.jaxpr.invars))
        return [Body(whole, tuple(every), carried, sliced)]
    except UNKNOWN_FORM:
        return []


def _whole_body(equation: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """The one program inside an equation that takes its operands and gives its outputs."""
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    body = next((equation.params[name] for name in names if name in equation.params), None)
    if not isinstance(body, (core.Jaxpr, core.ClosedJaxpr)):
        return None
    closed = _closed(body)
    fits = len(closed.jaxpr.invars) == len(equation.invars)
    fits = fits and len(closed.jaxpr.outvars) == len(equation.outvars)
    return closed if fits else None


def _closed(jaxpr: Any) -> core.ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


def _same_rank(one: Any, other: Any) -> bool:
    return len(shape_of(one)) == len(shape_of(other))


def dependences(program: Program) -> list[frozenset[int]]:
    """For each result of a program the leaves of its variables that it depends on, by number.

    What goes into a loop or a branch counts as read by all that comes out of it.

    Example:
        >>> dependences(trace(lambda w, x: (x + w[1], w[0] * w[1]), [1.0, 2.0], 3.0))
        [frozenset({1}), frozenset({0, 1})]
    """
    count = len(program.closed.jaxpr.invars)
    arguments = [frozenset({i} if i < len(program.shapes) else ()) for i in range(count)]

    def visit(
        number: int, equation: core.JaxprEqn, operands: Sequence[frozenset[int]]
    ) -> list[frozenset[int]]:
        del number
        return [frozenset[int]().union(*operands)] * len(equation.outvars)

    return walk(program.closed, arguments, visit, lambda constant: frozenset())


def run(
    program: Program,
    leaves: Sequence[Any],
    inputs: Any,
    visit: Visit,
    wanted: Collection[int] | None = (),
) -> Any:
    """Runs a program with somebody stepping in; nothing is computed that no output needs.

    Args:
        program: the traced network.
        leaves: of its variables; a list may change on the way, for a leaf is read when its value is
            used.
        inputs: a batch.
        visit: gets and returns `Delayed` values; `delay` does what an equation says.
        wanted: as for `walk`.

    Returns:
        The outputs.

    Example:
        >>> program = trace(lambda w, x: w * x, 2.0, 3.0)
        >>> float(run(program, [2.0], 3.0, lambda number, *equation: delay(*equation)))
        6.0
    """
    arguments: list[Delayed] = [partial(leaves.__getitem__, i) for i in range(len(program.shapes))]
    arguments += map(known, jax.tree.leaves(inputs))
    results = walk(program.closed, arguments, visit, known, wanted=wanted)
    return jax.tree.unflatten(program.output_tree, [result() for result in results])


def delay(equation: core.JaxprEqn, operands: Sequence[Delayed]) -> list[Delayed]:
    """The outputs of an equation, computed at the first use of one of them.

    Example:
        >>> equation = jax.make_jaxpr(lambda x: 2 * x)(1.0).eqns[0]
        >>> literal, argument = lambda: 2.0, lambda: jax.numpy.float32(3.0)
        >>> float(delay(equation, [literal, argument])[0]())
        6.0
    """
    computed: list[Any] = []

    def output(index: int) -> Any:
        if not computed:
            computed.extend(run_equation(equation, [operand() for operand in operands]))
        return computed[index]

    return [partial(output, i) for i in range(len(equation.outvars))]


def known(value: Any) -> Delayed:
    """A value that is there already.

    Example:
        >>> known(1)()
        1
    """
    return lambda: value


def run_equation(equation: core.JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """Does what an equation says, on arrays.

    Example:
        >>> equation = jax.make_jaxpr(lambda x: 2 * x)(1.0).eqns[0]
        >>> float(run_equation(equation, [2.0, jax.numpy.float32(3.0)])[0])
        6.0
    """
    pairs = zip(equation.invars, operands, strict=True)
    values = {atom: value for atom, value in pairs if not isinstance(atom, core.Literal)}
    names = core.DebugInfo("equation", equation.primitive.name, None, None)
    alone = core.Jaxpr((), list(values), equation.outvars, [equation], equation.effects, names)
    return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*values.values())


def run_scan(
    equation: core.JaxprEqn,
    operands: Sequence[Any],
    step: Callable[[list[Any]], tuple[list[Any], PyTree]],
) -> tuple[list[Any], PyTree]:
    """Runs a `lax.scan` with another step.

    Args:
        equation: the scan.
        operands: arrays.
        step: from the arguments of the body to its results, and whatever else each step gives.

    Returns:
        The outputs, and what else the steps gave, stacked along axis 0.

    Example:
        >>> def f(x):
        ...     return jax.lax.scan(lambda carry, x: (carry + x, None), 0.0, x)[0]
        >>> x = jax.numpy.ones(3)
        >>> equation = jax.make_jaxpr(f)(x).eqns[-1]
        >>> run_scan(equation, [0.0, x], lambda inside: ([inside[0] + 2 * inside[1]], {}))
        ([Array(6., dtype=float32)], {})
    """
    (body,) = bodies(equation)
    last = len(operands) - body.sliced
    first = last - body.carried
    held = list(operands[:first])

    def inside(carry: list[Any], sliced: list[Any]) -> tuple[list[Any], Any]:
        results, more = step([*held, *carry, *sliced])
        return results[: body.carried], (results[body.carried :], more)

    avals: list[Any] = [atom.aval for atom in equation.outvars[: body.carried]]
    carry = [
        value if hasattr(value, "dtype") else jax.numpy.asarray(value, aval.dtype)
        for value, aval in zip(operands[first:last], avals, strict=True)
    ]
    carry, (stacked, more) = jax.lax.scan(
        inside,
        carry,
        list(operands[last:]),
        length=equation.params["length"],
        reverse=equation.params["reverse"],
    )
    return [*carry, *stacked], more


def moved_axes(
    equation: core.JaxprEqn, axes: Sequence[int | None]
) -> tuple[int | None, ...] | None:
    """Follows the axes of an array through an equation that changes no more than layout or type.

    Args:
        equation: any equation.
        axes: for each dimension of its first operand which axis it is; None for one of no interest.

    Returns:
        The same for each dimension of its result; None for an axis that was added. None in all if
        the equation does more than add and drop axes of length one, move axes, broadcast or
        convert.

    Example:
        >>> import numpy as np
        >>> equation = jax.make_jaxpr(lambda x: x.T)(np.ones((2, 3))).eqns[0]
        >>> moved_axes(equation, (0, 1))
        (1, 0)
    """
    name = equation.primitive.name
    try:
        if name in _SAME:
            return tuple(axes)
        if name == "transpose":
            return tuple(axes[dim] for dim in equation.params["permutation"])
        shape = shape_of(equation.outvars[0])
        if name == "broadcast_in_dim":
            places = dict(zip(equation.params["broadcast_dimensions"], axes, strict=True))
            return tuple(places.get(dim) for dim in range(len(shape)))
    except UNKNOWN_FORM:
        return None
    if name in ("reshape", "squeeze", "expand_dims"):
        before = shape_of(equation.invars[0])
        if [n for n in before if n != 1] == [n for n in shape if n != 1]:
            kept = iter([axis for axis, n in zip(axes, before, strict=True) if n != 1])
            return tuple(next(kept) if n != 1 else None for n in shape)
    return None


def produced_axes(equation: core.JaxprEqn, operand: int) -> dict[int, int]:
    """Which dimensions of a contraction's result are an operand's own: those it is not summed over.

    Args:
        equation: any equation.
        operand: number of the operand.

    Returns:
        Dimension of the result -> dimension of the operand; none for what is no contraction.

    Example:
        >>> import numpy as np
        >>> equation = jax.make_jaxpr(lambda x, w: x @ w)(np.ones((5, 2)), np.ones((2, 3))).eqns[0]
        >>> produced_axes(equation, 0), produced_axes(equation, 1)
        ({0: 0}, {1: 1})
    """
    name = equation.primitive.name
    numbers: Any = equation.params.get("dimension_numbers")
    shapes = [shape_of(atom) for atom in equation.invars[:2]]
    try:
        if name == "dot_general":
            contracted, batch = numbers
            free = [
                [dim for dim in range(len(shape)) if dim not in (*contracted[i], *batch[i])]
                for i, shape in enumerate(shapes)
            ]
            first = len(batch[0]) + (len(free[0]) if operand else 0)
            return {first + i: dim for i, dim in enumerate(free[operand])}
        if name == "conv_general_dilated":
            if operand == 0:
                return {numbers.out_spec[0]: numbers.lhs_spec[0]}
            return {numbers.out_spec[1]: numbers.rhs_spec[0]}
        if name == "gather" and operand == 0:
            gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
            window = [dim for dim in range(len(shapes[0])) if dim not in gone]
            pairs = zip(numbers.offset_dims, window, strict=True)
            return {out: dim for out, dim in pairs if dim not in numbers.start_index_map}
    except UNKNOWN_FORM:
        pass
    return {}


def shape_of(atom: Any) -> tuple[int, ...]:
    """The shape of an equation's operand or output.

    Example:
        >>> import numpy as np
        >>> shape_of(jax.make_jaxpr(lambda x: x + x)(np.ones((2, 3))).eqns[0].outvars[0])
        (2, 3)
    """
    return tuple(getattr(atom.aval, "shape", ()))
