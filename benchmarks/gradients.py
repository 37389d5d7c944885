"""Where does a CPU's training step go: the gradients of convolutions, and other forms of them.

    taskset -c 0 python benchmarks/gradients.py

The 3x3 convolutions of a ResNet on 256 images: milliseconds of the result, of the gradient by the
images and of that by the kernel, as XLA computes them, then the last one in other forms: nine
matrix products, one of patches, patches of four images at a time in a loop, and what
`megajax.program.gradients` does, XLA's form for sixteen images at a time. Medians of synchronised
runs.

Then the result and the gradient by the images inside a loop on one core, as an epoch of training
computes them: as a convolution like any other, and as `megajax.program.gradients` writes it.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from timing import seconds

from megajax.program.gradients import with_fast_gradients

LAYOUT = ("NHWC", "HWIO", "NHWC")
IMAGES, AT_ONCE = 256, 4
SHAPES = ((32, 16), (16, 32), (8, 64))  # side of the images, channels in and out
STRIDED = ((32, 16, 16, 1), (32, 16, 32, 2), (16, 32, 64, 2))  # and the stride


def convolved(w: Any, x: Any) -> Any:
    """The convolution."""
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=LAYOUT)


def by_kernel(x: Any, slope: Any, w: Any) -> Any:
    """The gradient as JAX writes it."""
    return jax.vjp(lambda w: convolved(w, x), w)[1](slope)[0]


def by_images(x: Any, slope: Any, w: Any) -> Any:
    """The gradient as JAX writes it."""
    return jax.vjp(partial(convolved, w), x)[1](slope)[0]


def shifted(x: Any) -> list[Any]:
    """The nine neighbours of each pixel."""
    side = x.shape[1]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return [padded[:, i : i + side, j : j + side] for i in range(3) for j in range(3)]


def products(x: Any, slope: Any, w: Any) -> Any:
    """A matrix product for each neighbour."""
    each = [jnp.einsum("nhwi,nhwo->io", near, slope) for near in shifted(x)]
    return jnp.stack(each).reshape(w.shape)


def patches(x: Any, slope: Any, w: Any) -> Any:
    """One matrix product of all neighbours."""
    near = jnp.concatenate(shifted(x), axis=-1).reshape(-1, 9 * x.shape[-1])
    return (near.T @ slope.reshape(-1, slope.shape[-1])).reshape(w.shape)


def few(x: Any, slope: Any, w: Any) -> Any:
    """The same for a few images at a time."""
    cut = [leaf.reshape(-1, AT_ONCE, *leaf.shape[1:]) for leaf in (x, slope)]
    start = jnp.zeros_like(w)
    return lax.scan(lambda total, part: (total + patches(*part, w), None), start, cut)[0]


def chosen(x: Any, slope: Any, w: Any) -> Any:
    """What the library does."""
    return jax.vjp(lambda w: with_fast_gradients(convolved)(w, x), w)[1](slope)[0]


def in_loop(form: Any) -> Any:
    """Five times over, each by what the last one gave, so that none is left out."""

    def many(first: Any, *rest: Any) -> Any:
        def again(_: Any, total: Any) -> Any:
            return total + form(first + 1e-30 * total, *rest).mean()

        return lax.fori_loop(0, 5, again, jnp.float32(0))

    return jax.jit(many)


def inside_loops() -> None:
    """Prints the second table."""
    print("\n| images, channels, stride | result | ours | by images | ours |")
    print("|", " | ".join(["---"] * 5), "|")
    rng = np.random.default_rng(0)
    for side, before, after, stride in STRIDED:
        x = jnp.asarray(rng.normal(size=(IMAGES, side, side, before)), jnp.float32)
        w = jnp.asarray(rng.normal(size=(3, 3, before, after)), jnp.float32)

        def plain(x: Any, w: Any, stride: int = stride) -> Any:
            strides, padding = (stride, stride), ((1, 1), (1, 1))
            return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=LAYOUT)

        def back(slope: Any, w: Any, stride: int = stride, side: int = side) -> Any:
            padding = ((1, side - side // stride * stride + stride),) * 2
            turned = w[::-1, ::-1].transpose(0, 1, 3, 2)
            return lax.conv_general_dilated(
                slope,
                turned,
                (1, 1),
                padding,
                lhs_dilation=(stride, stride),
                dimension_numbers=LAYOUT,
            )

        ours = with_fast_gradients(plain, one_core=True)

        def our_back(slope: Any, w: Any, x: Any, ours: Any = ours) -> Any:
            return jax.vjp(lambda x: ours(x, w), x)[1](slope)[0]

        slope = plain(x, w)
        np.testing.assert_allclose(back(slope, w), our_back(slope, w, x), rtol=1e-3, atol=0.1)
        forms = ((plain, (x, w)), (ours, (x, w)), (back, (slope, w)), (our_back, (slope, w, x)))
        row = [seconds(in_loop(form), *given) / 5 for form, given in forms]
        cells = " | ".join(f"{1000 * one:.1f}" for one in row)
        print(
            f"| {IMAGES} x {side} x {side}, {before} to {after}, {stride} | {cells} |", flush=True
        )


def main() -> None:
    """Prints the tables."""
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, milliseconds")
    forms = (by_images, by_kernel, products, patches, few, chosen)
    names = ("images, channels", "result", *(form.__name__.replace("_", " ") for form in forms))
    print("|", " | ".join(names), "|")
    print("|", " | ".join(["---"] * len(names)), "|")
    rng = np.random.default_rng(0)
    for side, channels in SHAPES:
        x, slope = jnp.asarray(rng.normal(size=(2, IMAGES, side, side, channels)), jnp.float32)
        w = jnp.asarray(rng.normal(size=(3, 3, channels, channels)), jnp.float32)
        expected = jax.jit(by_kernel)(x, slope, w)
        row = [seconds(jax.jit(convolved), w, x)]
        for form in forms:
            compiled = jax.jit(form)
            if form not in (by_images, by_kernel):
                np.testing.assert_allclose(compiled(x, slope, w), expected, rtol=1e-3, atol=0.1)
            row.append(seconds(compiled, x, slope, w))
        cells = " | ".join(f"{1000 * one:.1f}" for one in row)
        print(f"| {IMAGES} x {side} x {side}, {channels} | {cells} |", flush=True)
    inside_loops()


if __name__ == "__main__":
    main()
