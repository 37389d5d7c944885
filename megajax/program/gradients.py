"""Gradients of convolutions as a CPU computes them fast, inside compiled loops too.

XLA brings a convolution into the form that its fast kernels take only outside loops; the gradients
that JAX writes are in another form, so that in a loop they are computed number by number, 30 to 400
times slower. Here they are written in that form from the start: the same sums, term by term.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from megajax.program.convolutions import is_plain
from megajax.program.jaxprs import run_equation, walk

__all__ = ["with_fast_gradients"]

_LAYOUT = ("NHWC", "HWIO", "NHWC")
_AT_ONCE = 16
"""Images of which a kernel's gradient is computed at once (benchmarks/gradients.py)."""


def with_fast_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, its convolutions' gradients written as a CPU likes them.

    Convolutions of images with channels last, as Flax has them, without groups and dilation; others
    stay as they are, and so does everything where there is no CPU.

    Args:
        function: any function of pytrees of arrays.

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

    def fast(*arguments: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        results = walk(closed, jax.tree.leaves(arguments), _visit, lambda constant: constant)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return fast


def _visit(number: int, equation: core.JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
    del number
    if not is_plain(equation):
        return run_equation(equation, operands)
    x, kernel = operands
    return [_convolve(x, kernel, equation)]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x: jax.Array, kernel: jax.Array, equation: core.JaxprEqn) -> Any:
    return run_equation(equation, [x, kernel])[0]


def _forward(x: jax.Array, kernel: jax.Array, equation: core.JaxprEqn) -> Any:
    return _convolve(x, kernel, equation), (x, kernel)


def _backward(equation: core.JaxprEqn, kept: Any, slope: jax.Array) -> Any:
    params, (x, kernel) = equation.params, kept
    strides, of_kernel, of_x = params["window_strides"], [], []
    shapes = (x.shape[1:3], kernel.shape[:2], slope.shape[1:3])
    sizes = zip(*shapes, strides, params["padding"], strict=True)
    for size, width, made, stride, (low, _) in sizes:
        spread = (made - 1) * stride + 1
        of_kernel.append((low, width - 1 + spread - size - low))
        of_x.append((width - 1 - low, size - spread + low))
    convolve = partial(
        lax.conv_general_dilated,
        window_strides=(1, 1),
        dimension_numbers=_LAYOUT,
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )

    def of_some(images: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, slope = images
        return convolve(
            x.transpose(3, 1, 2, 0),
            slope.transpose(1, 2, 0, 3),
            padding=of_kernel,
            rhs_dilation=strides,
        ).transpose(1, 2, 0, 3)

    kernel_slope = _summed(of_some, (x, slope))
    turned = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    x_slope = convolve(slope, turned, padding=of_x, lhs_dilation=strides)
    return x_slope.astype(x.dtype), kernel_slope.astype(kernel.dtype)


def _summed(function: Callable[[Any], jax.Array], images: Any) -> jax.Array:
    """The sum over the images, a few at a time; zeros fill up the last few and add nothing.

    In float32 or wider, whatever the precision of the images.
    """
    count = len(images[0])
    if count <= _AT_ONCE:
        return function(images)
    number = -(-count // _AT_ONCE)
    missing = number * _AT_ONCE - count

    def cut(leaf: jax.Array) -> jax.Array:
        padded = jnp.pad(leaf, ((0, missing), *[(0, 0)] * (leaf.ndim - 1)))
        return padded.reshape(number, _AT_ONCE, *leaf.shape[1:])

    few = jax.tree.map(cut, images)
    shape = jax.eval_shape(function, jax.tree.map(lambda leaf: leaf[0], few))
    start = jnp.zeros(shape.shape, jnp.promote_types(shape.dtype, jnp.float32))

    def add(total: jax.Array, some: Any) -> tuple[jax.Array, None]:
        return total + function(some).astype(total.dtype), None

    return jax.lax.scan(add, start, few)[0]


_convolve.defvjp(_forward, _backward)
