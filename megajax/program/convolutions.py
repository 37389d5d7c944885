"""Convolutions as a CPU likes them: with few channels, several neighbouring pixels at once.

Knows programs and nothing of populations: `widened` gives the same network as another program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from megajax.program.jaxprs import run_equation, shape_of, trace, walk
from megajax.types import ApplyFn, PyTree

__all__ = ["for_backend", "pixels_at_once", "widened"]

_NHWC = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def for_backend(apply_fn: ApplyFn) -> ApplyFn:
    """The network as the backend does it fastest: `widened` on a CPU, elsewhere as it is.

    Example:
        >>> apply_fn = lambda w, x: x @ w
        >>> for_backend(apply_fn) is apply_fn  # on a CPU
        False
    """
    return widened(apply_fn) if jax.default_backend() == "cpu" else apply_fn


def widened(apply_fn: ApplyFn) -> ApplyFn:
    """The same network, its narrow convolutions computing several pixels of a row at once.

    A convolution is a matrix product of patches with kernels. With few output channels that matrix
    is narrow, and a CPU reaches a fraction of its speed. Here the kernel is repeated side by side,
    moved on by one stride each time and filled up with zeros; it then gives the channels of that
    many neighbouring pixels, which lie beside each other in memory as they should. The zeros cost
    more operations and less time: a 3x3 convolution from 3 to 16 channels is 2.5 times faster, from
    8 to 8 2.1 times (benchmarks/convolutions.py). Every sum has the same terms, but for zeros;
    floating point may add them in another order.

    Args:
        apply_fn: the network.

    Returns:
        `apply_fn(variables, inputs) -> logits`.

    Example:
        >>> def apply_fn(w, x):
        ...     return jax.lax.conv(x, w, (1, 1), "SAME").mean((2, 3))
        >>> x, w = jnp.ones((2, 3, 8, 8)), jnp.ones((4, 3, 3, 3))
        >>> bool(jnp.allclose(widened(apply_fn)(w, x), apply_fn(w, x)))
        True
    """

    def apply(variables: PyTree, inputs: PyTree) -> PyTree:
        program = trace(apply_fn, variables, inputs)
        structure: Any = jax.tree.structure(jax.eval_shape(apply_fn, variables, inputs))
        leaves = jax.tree.leaves((variables, inputs))
        return structure.unflatten(walk(program.closed, leaves, _visit, lambda constant: constant))

    return apply


def pixels_at_once(equation: core.JaxprEqn) -> int:
    """How many pixels of a row a convolution had better compute at once; 1 leaves it as it is.

    Args:
        equation: any equation.

    Returns:
        A divisor of the width of the result. 1 for what is no convolution of images in float32 with
        channels last (as Flax has them), without dilation and groups.

    Example:
        >>> def apply_fn(x, w):
        ...     return jax.lax.conv_general_dilated(
        ...         x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ...     )
        >>> program = jax.make_jaxpr(apply_fn)(jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3, 16)))
        >>> pixels_at_once(program.eqns[0])
        4
    """
    if equation.primitive.name != "conv_general_dilated":
        return 1
    params = equation.params
    result: Any = equation.outvars[0].aval
    plain = (
        params["dimension_numbers"] == _NHWC
        and params["feature_group_count"] == params["batch_group_count"] == 1
        and set(params["lhs_dilation"]) == set(params["rhs_dilation"]) == {1}
        and result.dtype == jnp.float32
    )
    if not plain:
        return 1
    width = shape_of(equation.outvars[0])[2]
    channels_in, channels_out = shape_of(equation.invars[1])[2:]
    thin = channels_in <= 4 or (channels_in <= 16 and channels_out < 16)
    if not thin or shape_of(equation.invars[1])[1] == 1:
        return 1
    enough = 64 if 1 < channels_in <= 4 else 32
    pixels = 1
    while 2 * pixels * channels_out <= enough and width % (2 * pixels) == 0:
        pixels *= 2
    return pixels


def _visit(number: int, equation: core.JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
    del number
    pixels = pixels_at_once(equation)
    if pixels == 1:
        return run_equation(equation, operands)
    params = equation.params
    inputs, kernel = operands
    down, right = params["window_strides"]
    shifted = [
        jnp.pad(kernel, ((0, 0), (i * right, (pixels - 1 - i) * right), (0, 0), (0, 0)))
        for i in range(pixels)
    ]
    wide = lax.conv_general_dilated(
        inputs,
        jnp.concatenate(shifted, axis=3),
        (down, right * pixels),
        params["padding"],
        dimension_numbers=params["dimension_numbers"],
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    return [wide.reshape(shape_of(equation.outvars[0]))]
