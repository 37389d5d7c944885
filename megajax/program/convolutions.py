"""Convolutions as a CPU likes them: with few channels, several neighbouring pixels at once.

A convolution is a matrix product of patches with kernels. With few output channels that matrix is
narrow, and a CPU reaches a fraction of its speed. Here the kernel is repeated side by side, moved
on by one stride each time and filled up with zeros; it then gives the channels of that many
neighbouring pixels, which lie beside each other in memory as they should. The zeros cost more
operations and less time: a 3x3 convolution from 3 to 16 channels is 2.5 times faster, from 8 to 8
2.1 times (benchmarks/convolutions.py). Every sum has the same terms, but for zeros; floating point
may add them in another order.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from megajax.program.jaxprs import UNKNOWN_FORM, shape_of

__all__ = [
    "NARROW",
    "NARROW_ON_ONE_CORE",
    "convolve_widely",
    "is_plain",
    "narrow_on",
    "pixels_at_once",
    "widen_kernel",
]

_NHWC = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def is_plain(equation: core.JaxprEqn) -> bool:
    """Whether an equation is a convolution of images with channels last, as Flax has them.

    One that is dilated or grouped is not plain.
    """
    params = equation.params
    try:
        return equation.primitive.name == "conv_general_dilated" and (
            params["dimension_numbers"] == _NHWC
            and params["feature_group_count"] == params["batch_group_count"] == 1
            and {*params["lhs_dilation"], *params["rhs_dilation"]} == {1}
        )
    except UNKNOWN_FORM:
        return False


NARROW, NARROW_ON_ONE_CORE = 15, 16
"""Output channels up to which several pixels at once are faster. From 16 to 16 channels they take a
third less time on one core; of several cores XLA uses only one for such a convolution."""


def narrow_on(one_core: bool) -> int:
    """Up to how many output channels several pixels at once are faster here; 0 if never.

    Args:
        one_core: on a CPU, a single core computes a convolution.

    Example:
        >>> narrow_on(False), narrow_on(True)  # on a CPU
        (15, 16)
    """
    if jax.default_backend() != "cpu":
        return 0
    return NARROW_ON_ONE_CORE if one_core else NARROW


def pixels_at_once(equation: core.JaxprEqn, narrow: int = NARROW) -> int:
    """How many pixels of a row a convolution had better compute at once; 1 leaves it as it is.

    Args:
        equation: any equation.
        narrow: the most output channels that a convolution of more than four channels may have; 0
            leaves all convolutions as they are.

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
    result: Any = equation.outvars[0].aval
    if not is_plain(equation) or result.dtype != jnp.float32:
        return 1
    width = shape_of(equation.outvars[0])[2]
    channels_in, channels_out = shape_of(equation.invars[1])[2:]
    thin = channels_in <= 4 or (channels_in <= 16 and channels_out <= narrow)
    if not narrow or not thin or shape_of(equation.invars[1])[1] == 1:
        return 1
    enough = 64 if 1 < channels_in <= 4 else 32
    pixels = 1
    while 2 * pixels * channels_out <= enough and width % (2 * pixels) == 0:
        pixels *= 2
    return pixels


def widen_kernel(equation: core.JaxprEqn, kernel: jax.Array, pixels: int) -> jax.Array:
    """The kernel for so many pixels at once."""
    _, right = equation.params["window_strides"]
    shifted = [
        jnp.pad(kernel, ((0, 0), (i * right, (pixels - 1 - i) * right), (0, 0), (0, 0)))
        for i in range(pixels)
    ]
    return jnp.concatenate(shifted, axis=3)


def convolve_widely(
    equation: core.JaxprEqn, inputs: jax.Array, kernel: jax.Array, pixels: int
) -> jax.Array:
    """What the convolution gives, from the kernel of `widen_kernel` for so many pixels."""
    down, right = equation.params["window_strides"]
    params = {**equation.params, "window_strides": (down, right * pixels)}
    wide: jax.Array = equation.primitive.bind(inputs, kernel, **params)
    return wide.reshape(shape_of(equation.outvars[0]))
