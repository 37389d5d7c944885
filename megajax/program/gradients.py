"""Gradients of convolutions as a CPU computes them fast, inside compiled loops too.

XLA brings a convolution into the form that its fast kernels take only outside loops; the gradients
that JAX writes are in another form, so that in a loop they are computed number by number, 30 to 400
times slower. Here they are written in that form from the start: the same sums, term by term. Narrow
convolutions compute several pixels at once (see `convolutions`), forwards and back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from megajax.program.convolutions import (
    convolve_widely,
    is_plain,
    narrow_on,
    pixels_at_once,
    widen_kernel,
)
from megajax.program.jaxprs import bodies, run_equation, walk

__all__ = ["all_are_fast", "with_fast_gradients"]

_CONVOLUTION = "conv_general_dilated"
_LAYOUT = ("NHWC", "HWIO", "NHWC")
_AT_ONCE = 16
"""Images of which a kernel's gradient is computed at once (benchmarks/gradients.py)."""


def with_fast_gradients(
    function: Callable[..., Any], *, one_core: bool = False
) -> Callable[..., Any]:
    """The same function, its convolutions and their gradients written as a CPU likes them.

    Convolutions of images with channels last, as Flax has them, without groups and dilation; others
    stay as they are, and so does everything where there is no CPU.

    Args:
        function: any function of pytrees of arrays.
        one_core: a single core computes it.

    Example:
        >>> import jax.numpy as jnp
        >>> def loss(w, x):
        ...     y = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=_LAYOUT)
        ...     return (y**2).sum()
        >>> x, w = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5))
        >>> fast, slow = jax.grad(with_fast_gradients(loss))(w, x), jax.grad(loss)(w, x)
        >>> bool((fast == slow).all())
        True
    """
    if jax.default_backend() != "cpu":
        return function
    visit = partial(_visit, narrow_on(one_core))

    def fast(*arguments: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        results = walk(closed, jax.tree.leaves(arguments), visit, lambda constant: constant)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return fast


def all_are_fast(function: Callable[..., Any], *arguments: Any) -> bool:
    """Whether no convolution is left whose gradients a CPU computes slowly inside loops.

    Args:
        function: as for `with_fast_gradients`.
        *arguments: of the function, or their shapes and dtypes.

    Example:
        >>> x, w = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 1, 2))
        >>> def depthwise(w, x):
        ...     return jax.lax.conv_general_dilated(
        ...         x, w, (1, 1), "SAME", dimension_numbers=_LAYOUT, feature_group_count=2
        ...     )
        >>> all_are_fast(depthwise, w, x), all_are_fast(lambda w, x: w.sum() * x, w, x)
        (False, True)
    """
    closed, slow = jax.make_jaxpr(function)(*arguments), []

    def visit(number: int, equation: core.JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
        del number, operands
        if equation.primitive.name == _CONVOLUTION:
            slow.append(not is_plain(equation))
        else:  # what is inside control flow is left as it is
            slow.extend(_CONVOLUTION in str(body.closed) for body in bodies(equation))
        return [None] * len(equation.outvars)

    walk(closed, [None] * len(closed.in_avals), visit, lambda constant: None)
    return not any(slow)


def _visit(
    narrow: int, number: int, equation: core.JaxprEqn, operands: Sequence[Any]
) -> Sequence[Any]:
    del number
    if not is_plain(equation):
        return run_equation(equation, operands)
    x, kernel = operands
    return [_convolve(x, kernel, equation, narrow)]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x: jax.Array, kernel: jax.Array, equation: core.JaxprEqn, narrow: int) -> Any:
    pixels = pixels_at_once(equation, narrow)
    if pixels == 1:
        return run_equation(equation, [x, kernel])[0]
    return convolve_widely(equation, x, widen_kernel(equation, kernel, pixels), pixels)


def _forward(x: jax.Array, kernel: jax.Array, equation: core.JaxprEqn, narrow: int) -> Any:
    return _convolve(x, kernel, equation, narrow), (x, kernel)


def _backward(equation: core.JaxprEqn, narrow: int, kept: Any, slope: jax.Array) -> Any:
    x, kernel = kept
    convolve = partial(
        lax.conv_general_dilated,
        window_strides=(1, 1),
        dimension_numbers=_LAYOUT,
        precision=equation.params["precision"],
        preferred_element_type=equation.params["preferred_element_type"],
    )
    by_kernel = _by_kernel(convolve, x, kernel, slope, equation).astype(kernel.dtype)
    return _by_images(convolve, x, kernel, slope, equation, narrow).astype(x.dtype), by_kernel


def _sizes(
    x: jax.Array, kernel: jax.Array, slope: jax.Array, equation: core.JaxprEqn
) -> list[tuple[int, ...]]:
    """Of both axes: sides of image, window and result, the stride, and the padding before."""
    lows = [low for low, _ in equation.params["padding"]]
    shapes = (x.shape[1:3], kernel.shape[:2], slope.shape[1:3])
    return list(zip(*shapes, equation.params["window_strides"], lows, strict=True))


def _by_kernel(
    convolve: Callable[..., Any],
    x: jax.Array,
    kernel: jax.Array,
    slope: jax.Array,
    equation: core.JaxprEqn,
) -> jax.Array:
    """The images as what is convolved, the slopes as the kernel, and the examples as channels."""
    padding, strides = [], equation.params["window_strides"]
    for size, width, made, stride, low in _sizes(x, kernel, slope, equation):
        spread = (made - 1) * stride + 1
        padding.append((low, width - 1 + spread - size - low))

    def of_some(images: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, slope = images
        return convolve(
            x.transpose(3, 1, 2, 0),
            slope.transpose(1, 2, 0, 3),
            padding=padding,
            rhs_dilation=strides,
        ).transpose(1, 2, 0, 3)

    return _summed(of_some, (x, slope))


def _by_images(
    convolve: Callable[..., Any],
    x: jax.Array,
    kernel: jax.Array,
    slope: jax.Array,
    equation: core.JaxprEqn,
    narrow: int,
) -> jax.Array:
    """The slopes convolved with the kernel turned round.

    With a stride s, the pixels si, si + 1, ..., si + s - 1 are channels of one pixel i: each has
    every s-th entry of the kernel, so that no zeros come between the slopes.
    """
    padding, strides = [], equation.params["window_strides"]
    sizes = _sizes(x, kernel, slope, equation)
    for axis, (size, width, made, stride, low) in enumerate(sizes):
        # Pixel si + a has slope i - t by entry st + a + low of the kernel, first <= t <= last.
        first, last = -((stride - 1 + low) // stride), (width - 1 - low) // stride
        window = last - first + 1
        padding.append((last, -(-size // stride) - made - last + window - 1))
        before = -(stride * first + low)
        ends = [(0, 0)] * kernel.ndim
        ends[2 * axis] = before, stride * window - before - width
        shape = (*kernel.shape[: 2 * axis], window, stride, *kernel.shape[2 * axis + 1 :])
        kernel = jnp.flip(jnp.pad(kernel, ends).reshape(shape), 2 * axis)
    turned = kernel.transpose(0, 2, 5, 1, 3, 4)  # window by window, out, stride by stride, in
    turned = turned.reshape(*turned.shape[:3], -1)
    back = jax.make_jaxpr(partial(convolve, padding=padding))(slope, turned)
    result = _convolve(slope, turned, back.eqns[0], narrow)
    if strides == (1, 1):
        return result
    count, height, width, _ = result.shape
    pixels = result.reshape(count, height, width, *strides, -1).transpose(0, 1, 3, 2, 4, 5)
    pixels = pixels.reshape(count, height * strides[0], width * strides[1], -1)
    return pixels[:, : x.shape[1], : x.shape[2]]


def _summed(function: Callable[[Any], jax.Array], images: Any) -> jax.Array:
    """The sum over the images, a few at a time; zeros fill up the last few and add nothing.

    In float32 or wider, whatever the precision of the images.
    """
    count = len(images[0])
    if count <= _AT_ONCE:
        return function(images)
    missing = -count % _AT_ONCE
    if missing:
        images = jax.tree.map(
            lambda leaf: jnp.pad(leaf, ((0, missing), *[(0, 0)] * (leaf.ndim - 1))), images
        )

    def some(number: jax.Array) -> Any:
        return jax.tree.map(
            lambda leaf: lax.dynamic_slice_in_dim(leaf, number * _AT_ONCE, _AT_ONCE), images
        )

    shape = jax.eval_shape(function, some(jnp.int32(0)))
    start = jnp.zeros(shape.shape, jnp.promote_types(shape.dtype, jnp.float32))

    def add(number: jax.Array, total: jax.Array) -> jax.Array:
        return total + function(some(number)).astype(total.dtype)

    return lax.fori_loop(0, -(-count // _AT_ONCE), add, start)


_convolve.defvjp(_forward, _backward)
