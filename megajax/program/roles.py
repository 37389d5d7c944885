"""What a network's program does with each leaf, read off in one pass and asked for by everybody.

Which layer a leaf belongs to, which products it takes part in and along which axes, whether it is a
kernel, a bias, a scale or a statistic. Names and containers play no part, so that Linen, NNX, Haiku
and plain JAX are all alike.
"""

from __future__ import annotations

import collections
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.extend import core

from megajax.errors import ConfigError
from megajax.program.jaxprs import (
    CONTRACTIONS,
    ELEMENTWISE,
    Body,
    Program,
    bodies,
    dependences,
    moved_axes,
    produced_axes,
    shape_of,
    size_of,
    trace,
    walk,
)
from megajax.trees import leaf_paths
from megajax.types import ApplyFn, PyTree

__all__ = [
    "Contraction",
    "Linear",
    "Role",
    "Roles",
    "Statistic",
    "Step",
    "find_layers",
    "find_roles",
    "find_statistics",
]

Step: TypeAlias = tuple[str, int, int]
"""What was done to a leaf, entry by entry: primitive, number of the equation, operand it was."""


class Contraction(NamedTuple):
    """A matrix product, convolution or look-up that a leaf takes part in.

    Attributes:
        number: of the equation, in the order of execution.
        equation: what it says.
        operand: which operand the leaf is.
        axes: for each dimension of that operand the leaf's axis; None where it has none.
        inside: it is in a loop or a branch.
    """

    number: int
    equation: core.JaxprEqn
    operand: int
    axes: tuple[int | None, ...]
    inside: bool

    @property
    def written(self) -> tuple[int, ...]:
        """The leaf's axes that reach the result: those that are not summed over."""
        axes = [self.axes[dim] for dim in produced_axes(self.equation, self.operand).values()]
        return tuple(sorted(axis for axis in axes if axis is not None and axis >= 0))


class Role(NamedTuple):
    """What one leaf is.

    Attributes:
        layer: number of its layer, in the order of the program.
        kind: `kernel`, `embedding`, `scale`, `bias`, `mean`, `variance` or `other`, from what is
            done first with it; `unused` if nothing is.
        first: number of the equation in which it first meets activations or another leaf, or -1.
        flattened: `(*spatial, channels)`, if the last axis of the activations that it first meets
            was flattened from there.
        contractions: those it takes part in, in the order of the program.
        elsewhere: it is used in another way than in plain contractions with activations.
    """

    layer: int
    kind: str
    first: int
    flattened: tuple[int, ...]
    contractions: tuple[Contraction, ...]
    elsewhere: bool


class Statistic(NamedTuple):
    """A BatchNorm layer: where its statistics are, and where the program uses them.

    Attributes:
        mean: index of the mean's leaf, in flattening order.
        variance: index of the variance's leaf.
        equation: number of the equation that first meets activations with one of them.
        axes: the activations' axes that are averaged over.
        operand: which operand of the equation the activations are.
        mean_steps: from the leaf to the mean that is used, such as a division that debiases it.
        variance_steps: from the leaf to the variance.
        deviation: the second leaf holds the standard deviation.
        problem: why it cannot be measured where it is; empty if it can.
    """

    mean: int
    variance: int
    equation: int
    axes: tuple[int, ...]
    operand: int = 0
    mean_steps: tuple[Step, ...] = ()
    variance_steps: tuple[Step, ...] = ()
    deviation: bool = False
    problem: str = ""


class Linear(NamedTuple):
    """A dense layer or convolution with a bias, whose outputs are hidden units.

    Attributes:
        kernel: index of the kernel's leaf, in flattening order.
        kernel_axis: the kernel's axis of output units.
        bias: index of the bias's leaf, `[units]`.
        equation: number of the equation that adds the bias.
        axis: the activations' axis of units.
    """

    kernel: int
    kernel_axis: int
    bias: int
    equation: int
    axis: int


class Roles(NamedTuple):
    """What a program does with the leaves of its variables.

    Attributes:
        leaves: the role of each leaf, in flattening order.
        statistics: the BatchNorm layers, in the order of the program.
        linear: the layers with kernel and bias whose outputs can be rescaled exactly: not the last
            one, none in a loop, none whose kernel is used twice.
        unpaired: leaves whose root divides activations, as a variance's does, with no mean to it.
        biased: all layers outside of loops with a kernel and a bias, `linear` among them.
    """

    leaves: tuple[Role, ...]
    statistics: tuple[Statistic, ...]
    linear: tuple[Linear, ...]
    unpaired: tuple[int, ...]
    biased: tuple[Linear, ...] = ()


def find_roles(
    apply_fn: ApplyFn,
    variables: PyTree,
    inputs: Any,
    statistics: Sequence[tuple[str, str]] = (),
) -> Roles:
    """Reads a network's program, which is not run; the same program only once.

    Args:
        apply_fn: the network, in inference mode.
        variables: of one network, or their shapes and dtypes.
        inputs: a batch of inputs, or its shapes and dtypes.
        statistics: paths of (mean, variance) leaves that are statistics even if nothing shows it.

    Raises:
        ConfigError: there is no such leaf, or it never meets activations.

    Example:
        >>> def apply_fn(w, x):
        ...     return jax.numpy.tanh(x @ w["u"] + w["b"]) @ w["v"]
        >>> w = {"b": np.ones(3), "u": np.ones((2, 3)), "v": np.ones((3, 1))}
        >>> found = find_roles(apply_fn, w, np.ones((4, 2)))
        >>> [(role.kind, role.layer) for role in found.leaves]
        [('bias', 0), ('kernel', 0), ('kernel', 1)]
        >>> found.linear
        (Linear(kernel=1, kernel_axis=1, bias=0, equation=2, axis=1),)
    """
    return _read(trace(apply_fn, variables, inputs), tuple(map(tuple, statistics)))


def find_layers(apply_fn: ApplyFn, variables: PyTree, inputs: Any) -> PyTree:
    """Numbers the layers of a network in the order in which its program uses them.

    A layer begins where a leaf meets the activations in a contraction (matrix product, convolution,
    look-up); the leaves that then act on its output entry by entry (bias, scale, statistics) belong
    to it. The program is only traced, never run.

    Args:
        apply_fn: `apply_fn(variables, inputs) -> outputs`.
        variables: one parent (arrays, or their shapes and dtypes).
        inputs: a batch of inputs `[b, ...]`, or its shape and dtype.

    Returns:
        A pytree like `variables` with the layer's number (int) at each leaf. A leaf that the
        program does not use is a layer of its own.

    Example:
        >>> def apply_fn(variables, x):
        ...     for w, b in variables:
        ...         x = jax.numpy.tanh(x @ w + b)
        ...     return x
        >>> mlp = [(np.ones((4, 8)), np.ones(8)), (np.ones((8, 2)), np.ones(2))]
        >>> find_layers(apply_fn, mlp, np.ones((1, 4)))
        [(0, 0), (1, 1)]
    """
    roles = find_roles(apply_fn, variables, inputs)
    layers = [role.layer for role in roles.leaves]
    return jax.tree.unflatten(jax.tree.structure(variables), layers)


def find_statistics(
    apply_fn: ApplyFn,
    variables: PyTree,
    inputs: Any,
    statistics: Sequence[tuple[str, str]] = (),
) -> tuple[Statistic, ...]:
    """Finds the BatchNorm layers of a network in its inference program; see `find_roles`.

    A leaf is a mean if it is subtracted from activations that are then divided by another leaf, the
    deviation, or by the root of another, the variance.

    Example:
        >>> def apply_fn(w, x):
        ...     return (x - w["mean"]) * jax.lax.rsqrt(w["var"] + 1e-5)
        >>> w = {"mean": np.zeros(3), "var": np.ones(3)}
        >>> find_statistics(apply_fn, w, np.ones((8, 3)))[0][:4]
        (0, 1, 1, (0,))
    """
    return find_roles(apply_fn, variables, inputs, statistics).statistics


def find_read(apply_fn: ApplyFn, variables: PyTree, inputs: Any) -> frozenset[str]:
    """The paths of the leaves that a network's outputs depend on; see `jaxprs.dependences`.

    Args:
        apply_fn: the network.
        variables: of one network, or their shapes and dtypes.
        inputs: a batch of inputs, or its shapes and dtypes.

    Example:
        >>> w = {"kernel": np.ones((3, 2)), "steps_trained": np.int32(7)}
        >>> sorted(find_read(lambda w, x: x @ w["kernel"], w, np.ones((1, 3))))
        ['kernel']
    """
    paths, results = leaf_paths(variables), dependences(trace(apply_fn, variables, inputs))
    return frozenset(paths[leaf] for leaves in results for leaf in leaves)


class _Moment(NamedTuple):
    """A leaf, as it is where the program uses it.

    Attributes:
        leaf: its index.
        steps: what was done to it, entry by entry.
        depth: how many loops took one entry of it each.
        deviation: activations are divided by it, not by its root.
    """

    leaf: int
    steps: tuple[Step, ...] = ()
    depth: int = 0
    deviation: bool = False


class _Weight(NamedTuple):
    """A value that is computed from leaves and constants alone.

    Attributes:
        axes: for each dimension the leaf's axis; -1 where it varies otherwise, None where not.
        leaves: all leaves it was computed from.
        own: the leaf that it is, but for layout and type and what was done to it entry by entry.
        root: a factor or divisor in it that is the root of a leaf, or a deviation.
        raw: it is the leaf itself, or what loops took of it.
    """

    axes: tuple[int | None, ...] = ()
    leaves: frozenset[int] = frozenset()
    own: _Moment | None = None
    root: _Moment | None = None
    raw: bool = False


class _Active(NamedTuple):
    """A value that depends on the inputs.

    Attributes:
        layer: that computed it; -1 before any.
        spatial: it is `[batch, *spatial, channels]`.
        flattened: `(*spatial, channels)`, if its last axis was flattened from there.
        linear: what a contraction just computed, before its bias is added.
        centred: a mean was just subtracted: the statistic, its variance still to come.
    """

    layer: int = -1
    spatial: bool = False
    flattened: tuple[int, ...] = ()
    linear: Linear | None = None
    centred: Statistic | None = None


_Value: TypeAlias = _Weight | _Active
_Inside: TypeAlias = tuple[str, ...]

_KINDS = {"add": "bias", "add_any": "bias", "mul": "scale"}
_WINDOWS = ("reduce_window", "reduce_window_max", "reduce_window_min", "reduce_window_sum")
_SPATIAL = (*_WINDOWS, "pad", "slice", "concatenate")


class _Here(NamedTuple):
    """Where the pass is.

    Attributes:
        number: of the equation.
        equation: what it says.
        inside: the loops and branches that it is inside of.
        operands: the values of its operands.
    """

    number: int
    equation: core.JaxprEqn
    inside: _Inside
    operands: Sequence[Any]

    @property
    def name(self) -> str:
        return str(self.equation.primitive.name)

    @property
    def active(self) -> list[int]:
        """Which operands depend on the inputs."""
        return [i for i, one in enumerate(self.operands) if isinstance(one, _Active)]

    def still(self, operand: int) -> tuple[int, ...]:
        """The result's axes along which an operand of it does not vary."""
        shape = shape_of(self.equation.invars[operand])
        rank = len(shape_of(self.equation.outvars[0]))
        if len(shape) != rank:
            return tuple(range(rank)) if not shape else ()
        still = zip(range(rank), self.operands[operand].axes, shape, strict=True)
        return tuple(dim for dim, axis, size in still if axis is None or size == 1)

    def problem(self, moment: _Moment) -> str:
        """Why a statistic cannot be measured here."""
        if set(self.inside) - {"scan"}:
            return f"inside a {self.inside[-1]}"
        return "inside a scan that does not slice it" if moment.depth < len(self.inside) else ""


class _Reader:
    """What is gathered on the way through a program."""

    def __init__(self, program: Program):
        self.program = program
        self.layers: dict[int, int] = {}
        self.first: dict[int, tuple[str, int, tuple[int, ...]]] = {}
        self.contractions: dict[int, list[Contraction]] = collections.defaultdict(list)
        self.elsewhere: set[int] = set()
        self.statistics: list[Statistic] = []
        self.met: dict[int, Statistic] = {}  # where a leaf first meets activations
        self.roots: dict[int, None] = {}
        self.linear: list[Linear] = []
        self.last = -1  # the number of the last contraction

    def walk(
        self, closed: core.ClosedJaxpr, values: Sequence[Any], start: int, inside: _Inside
    ) -> list[_Value]:
        def visit(number: int, equation: core.JaxprEqn, operands: Sequence[Any]) -> list[_Value]:
            output = self.visit(_Here(number, equation, inside, operands))
            return [output] * len(equation.outvars)

        return walk(closed, values, visit, lambda value: _Weight(_varying(np.shape(value))), start)

    def visit(self, here: _Here) -> _Value:
        active = here.active
        within = bodies(here.equation) if active else []
        if within:
            return self.control(here, within)
        self.meet(here)
        if not active:
            return _combined(here)
        if here.name == "convert_element_type":
            value: _Active = here.operands[0]
            return value
        output = _passed(here, self.place(here.name, here.operands))
        if len(here.operands) == 2 and len(active) == 1:
            output = self.bias(here, self.normalise(here, output, active[0]), active[0])
        return output

    def control(self, here: _Here, within: Sequence[Body]) -> _Active:
        """Reads all bodies of a loop or branch; what comes out of it depends on the inputs."""
        start, layer = here.number + 1, -1
        active = [here.operands[i] for i in here.active]
        for body in within:
            values = [here.operands[i] for i in body.operands]
            last = len(values) - body.sliced
            for i, value in enumerate(values):
                if isinstance(value, _Active):
                    values[i] = _Active(value.layer)
                elif i >= last:
                    own = value.own._replace(depth=value.own.depth + 1) if value.raw else value.own
                    values[i] = value._replace(axes=value.axes[1:], own=own)
                elif i >= last - body.carried:  # what is carried comes to depend on the inputs
                    self.meet(here._replace(operands=[value, _Active()]))
                    values[i] = _Active(self.place("", [value, *active]))
            results = self.walk(body.closed, values, start, (*here.inside, here.name))
            layer = max([layer, *(one.layer for one in results if isinstance(one, _Active))])
            start += size_of(body.closed)
        return _Active(layer)

    def place(self, name: str, operands: Sequence[Any]) -> int:
        """The layer of what an equation computes; leaves that are met first join it."""
        leaves = {leaf for one in operands if isinstance(one, _Weight) for leaf in one.leaves}
        layer = max((one.layer for one in operands if isinstance(one, _Active)), default=-1)
        new = leaves - self.layers.keys()
        if new and (name in CONTRACTIONS or layer < 0):
            layer = max(self.layers.values(), default=-1) + 1
        elif leaves and not new and name in CONTRACTIONS:
            layer = max(self.layers[leaf] for leaf in leaves)  # used again, as tied weights are
        self.layers.update(dict.fromkeys(new, layer))
        return layer

    def meet(self, here: _Here) -> None:
        """Notes what is done with the leaves among an equation's operands."""
        name, inside, operands, active = here.name, bool(here.inside), here.operands, here.active
        product = name in ("dot_general", "conv_general_dilated") and not inside
        self.last = here.number if product else self.last
        flattened = next((operands[i].flattened for i in active if operands[i].flattened), ())
        weights = {i: one for i, one in enumerate(operands) if isinstance(one, _Weight)}
        alone = not active and sum(bool(one.leaves) for one in weights.values()) < 2
        for i, value in weights.items():
            view = value.own is not None and not value.own.steps
            kind = "other" if inside or not view else _KINDS.get(name, "other")
            if name in CONTRACTIONS and value.own is not None:
                found = Contraction(here.number, here.equation, i, value.axes, inside)
                self.contractions[value.own.leaf].append(found)
                if active and view and not inside and (product or i == 0):
                    kind = "kernel" if product else "embedding"
            whole = view and self.size(value) == math.prod(shape_of(here.equation.invars[i]))
            if whole and not (product and active) and not _moves(here.equation):
                self.elsewhere.update(value.leaves)
            for leaf in () if alone else value.leaves:
                self.first.setdefault(leaf, (kind, here.number, flattened))
                if active:
                    still = here.still(i) if name in ELEMENTWISE else ()
                    at = Statistic(-1, -1, here.number, still, active[0])
                    self.met.setdefault(leaf, at)

    def size(self, weight: _Weight) -> int:
        return math.prod(self.program.shapes[weight.own.leaf].shape) if weight.own else 0

    def normalise(self, here: _Here, output: _Active, place: int) -> _Active:
        """Follows activations from which a mean is taken, and that are divided by a root then."""
        value, weight = here.operands[place], here.operands[1 - place]
        own, root, centred = weight.own, weight.root, value.centred
        if here.name == "sub" and place == 0 and own is not None:
            mean = Statistic(own.leaf, -1, here.number, here.still(1), 0, own.steps)
            return output._replace(centred=mean._replace(problem=here.problem(own)))
        if here.name not in ("mul", "div"):
            return output
        if root is None and own is not None and here.name == "div" and place == 0:
            root = own._replace(deviation=True)
        if root is not None and not root.deviation:
            self.roots[root.leaf] = None
        if root is None or centred is None:
            return output._replace(centred=centred)
        found = centred._replace(variance=root.leaf, variance_steps=root.steps)
        problem = centred.problem or here.problem(root)
        self.statistics.append(found._replace(deviation=root.deviation, problem=problem))
        return output

    def bias(self, here: _Here, output: _Active, place: int) -> _Active:
        """Follows a product with a kernel to the bias that is added to it."""
        value, weight = here.operands[place], here.operands[1 - place]
        if here.inside or weight.own is None or weight.own.steps:
            return output
        shape, leaf = shape_of(here.equation.outvars[0]), weight.own.leaf
        if here.name in ("dot_general", "conv_general_dilated") and place == 0:
            others, units = (produced_axes(here.equation, operand) for operand in (0, 1))
            batched = here.name == "dot_general" and len(others) + len(units) < len(shape)
            for axis, dim in units.items() if len(units) == 1 and not batched else ():
                kernel_axis = weight.axes[dim]
                if kernel_axis is not None:
                    linear = Linear(leaf, kernel_axis, -1, here.number, axis)
                    return output._replace(linear=linear)
        elif here.name in ("add", "add_any") and value.linear is not None:
            axis, still = value.linear.axis, here.still(1 - place)
            if {axis, *still} >= {*range(len(shape))} and self.size(weight) == shape[axis]:
                self.linear.append(value.linear._replace(bias=leaf, equation=here.number))
        return output

    def name(self, named: Sequence[tuple[str, ...]]) -> None:
        """Adds the statistics that the user names, if they were not found as such."""
        shapes = jax.tree.unflatten(self.program.treedef, self.program.shapes)
        places = {path: i for i, path in enumerate(leaf_paths(shapes))}
        for pair in named:
            for path in pair:
                if places.get(path) not in self.met:
                    why = "never meets activations" if path in places else "is no leaf"
                    raise ConfigError(f"statistics names {path!r}: it {why} of the network")
            mean, variance = (places[path] for path in pair)
            if all(one[:2] != (mean, variance) for one in self.statistics):
                at = min(self.met[mean], self.met[variance], key=lambda one: one.equation)
                self.statistics.append(at._replace(mean=mean, variance=variance))

    def roles(self) -> Roles:
        count = len(self.program.shapes)
        after = itertools.count(max(self.layers.values(), default=-1) + 1)
        unused = [leaf for leaf in range(count) if leaf not in self.layers]
        self.layers.update(zip(unused, after, strict=False))  # each is a layer of its own
        kinds = {one.mean: "mean" for one in self.statistics}
        kinds |= {one.variance: "variance" for one in self.statistics}

        def role(leaf: int) -> Role:
            kind, first, flattened = self.first.get(leaf, ("unused", -1, ()))
            contractions, elsewhere = self.contractions[leaf], leaf in self.elsewhere
            kind = kinds.get(leaf, kind)
            return Role(self.layers[leaf], kind, first, flattened, tuple(contractions), elsewhere)

        biased = [one for one in self.linear if len(self.contractions[one.kernel]) == 1]
        return Roles(
            tuple(map(role, range(count))),
            tuple(self.statistics),
            tuple(one for one in biased if one.equation < self.last),
            tuple(leaf for leaf in self.roots if leaf not in kinds),
            tuple(biased),
        )


@functools.lru_cache(maxsize=64)
def _read(program: Program, named: tuple[tuple[str, ...], ...]) -> Roles:
    reader = _Reader(program)
    values: list[_Value] = [
        _Weight(tuple(range(len(spec.shape))), frozenset({i}), _Moment(i), raw=True)
        for i, spec in enumerate(program.shapes)
    ]
    inputs = program.closed.jaxpr.invars[len(values) :]
    values += [_Active(spatial=len(shape_of(atom)) >= 4) for atom in inputs]
    for result in reader.walk(program.closed, values, 0, ()):
        if isinstance(result, _Weight):
            reader.elsewhere.update(result.leaves)
    reader.name(named)
    return reader.roles()


def _varying(shape: Sequence[int]) -> tuple[int | None, ...]:
    return tuple(-1 if n != 1 else None for n in shape)


def _moves(equation: core.JaxprEqn) -> bool:
    """Whether an equation only changes the layout or type of its one operand."""
    shapes = [shape_of(atom) for atom in (*equation.invars, *equation.outvars)]
    if len(shapes) != 2 or moved_axes(equation, [None] * len(shapes[0])) is None:
        return False
    return math.prod(shapes[0]) == math.prod(shapes[1])


def _combined(here: _Here) -> _Weight:
    """What an equation makes of weights alone."""
    operands: Sequence[_Weight] = here.operands
    equation, shape = here.equation, shape_of(here.equation.outvars[0])
    moved = moved_axes(equation, operands[0].axes) if len(operands) == 1 else None
    if moved is not None:
        return operands[0]._replace(axes=moved, raw=False)
    leaves = frozenset[int]().union(*(one.leaves for one in operands))
    if here.name not in ELEMENTWISE:
        return _Weight(_varying(shape), leaves)
    moments = {i: one.own for i, one in enumerate(operands) if one.own is not None}
    # A number, such as a counter that debiases an average, is done to the leaf beside it.
    large = [i for i in moments if math.prod(shape_of(equation.invars[i])) > 1] or [*moments]
    main = large[0] if len({moments[i].leaf for i in large}) == 1 else -1
    alike = [one.axes for one in operands if len(one.axes) == len(shape)]
    axes = [-1 if any(one[dim] is not None for one in alike) else None for dim in range(len(shape))]
    own = None
    if main >= 0:
        step = (here.name, here.number, main)
        own = moments[main]._replace(steps=(*moments[main].steps, step))
        pairs = zip(axes, operands[main].axes or axes, strict=True)
        axes = [label if axis is None else axis for label, axis in pairs]
    return _Weight(tuple(axes), leaves, own, _root(here, moments, main))


def _root(here: _Here, moments: dict[int, _Moment], main: int) -> _Moment | None:
    """The root that an equation takes, or passes on in a product."""
    power = here.equation.invars[-1]
    half = here.name == "pow" and isinstance(power, core.Literal) and abs(float(power.val)) == 0.5
    if here.name in ("sqrt", "rsqrt") or half:
        return moments.get(main)
    if here.name not in ("mul", "div"):
        return None
    roots: list[_Moment] = [one.root for one in here.operands if one.root is not None]
    if not roots and here.name == "div" and main != 0 and 1 in moments:
        return moments[1]._replace(deviation=True)
    return roots[0] if roots else None


def _passed(here: _Here, layer: int) -> _Active:
    """What an equation makes of activations: how its result is laid out."""
    name, shape = here.name, shape_of(here.equation.outvars[0])
    active = [(here.operands[i], shape_of(here.equation.invars[i])) for i in here.active]
    value, before = active[0]
    if name == "conv_general_dilated":
        numbers = here.equation.params.get("dimension_numbers")
        last = getattr(numbers, "out_spec", (0, 0))[1] == len(shape) - 1
        return _Active(layer, spatial=last)
    if name in ("dot_general", "transpose"):
        return _Active(layer)
    if name == "reshape" and value.spatial and len(shape) == 2 and shape[0] == before[0]:
        return _Active(layer, flattened=before[1:])
    same = all(size in (shape, ()) for _, size in active)
    spatial = same or (name in _SPATIAL and len(before) == len(shape))
    flat = next((one.flattened for one, _ in active if one.flattened), ())
    return _Active(
        layer,
        spatial=spatial and any(one.spatial for one, _ in active),
        flattened=flat if same else (),
    )
