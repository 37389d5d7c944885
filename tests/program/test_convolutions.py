"""Convolutions that compute several pixels at once are the same convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from megajax.program.convolutions import NARROW, NARROW_ON_ONE_CORE, pixels_at_once
from megajax.program.folding import widened
from megajax.program.jaxprs import trace, walk
from megajax.program.roles import find_layers, find_statistics
from megajax.zoo import networks as models

RNG = np.random.default_rng(0)


def convolution(shape, kernel, **options):
    """A network of one convolution, its inputs, and the result by NumPy-like sums in float64."""
    options = {"window_strides": (1, 1), "padding": "SAME"} | options

    def apply_fn(w, x):
        return lax.conv_general_dilated(x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)

    x = RNG.normal(size=shape).astype(np.float32)
    w = RNG.normal(size=kernel).astype(np.float32)
    return apply_fn, w, x


def by_hand(w, x, strides, padding):
    """The sums, written out."""
    x = np.pad(x.astype(np.float64), ((0, 0), *padding, (0, 0)))
    (kh, kw, _, channels), (sh, sw) = w.shape, strides
    height, width = (x.shape[1] - kh) // sh + 1, (x.shape[2] - kw) // sw + 1
    result = np.zeros((len(x), height, width, channels))
    for i in range(height):
        for j in range(width):
            patch = x[:, i * sh : i * sh + kh, j * sw : j * sw + kw]
            result[:, i, j] = np.tensordot(patch, w.astype(np.float64), 3)
    return result


def chosen(apply_fn, w, x):
    found = []

    def visit(number, equation, operands):
        found.append(pixels_at_once(equation))
        return [None] * len(equation.outvars)

    program = trace(apply_fn, w, x)
    walk(program.closed, [None] * len(program.closed.jaxpr.invars), visit, lambda _: None)
    return found


@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (1, 2), (3, 1)])
@pytest.mark.parametrize("padding", [((0, 0), (0, 0)), ((1, 1), (1, 1)), ((2, 0), (0, 3))])
@pytest.mark.parametrize(
    ("channels", "width", "kernel"),
    [((3, 16), 12, (3, 3)), ((1, 4), 17, (1, 2)), ((16, 8), 11, (5, 4))],
)
def test_it_is_the_same_convolution(strides, padding, channels, width, kernel):
    apply_fn, w, x = convolution(
        (2, 9, width, channels[0]), (*kernel, *channels), window_strides=strides, padding=padding
    )
    wide = jax.jit(widened(apply_fn))(w, x)
    np.testing.assert_allclose(wide, by_hand(w, x, strides, padding), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "kernel", "options", "pixels"),
    [
        ((2, 8, 8, 3), (3, 3, 3, 16), {}, 4),
        ((2, 8, 8, 1), (3, 3, 1, 16), {}, 2),
        ((2, 8, 8, 8), (3, 3, 8, 8), {}, 4),
        ((2, 8, 6, 16), (3, 3, 16, 8), {}, 2),  # six pixels are no multiple of four
        ((2, 8, 7, 16), (3, 3, 16, 8), {}, 1),
        ((2, 8, 8, 16), (3, 3, 16, 16), {}, 1),  # a gain alone, a loss in a network
        ((2, 8, 8, 32), (3, 3, 32, 16), {}, 1),  # wide enough
        ((2, 8, 8, 16), (3, 3, 16, 32), {}, 1),
        ((2, 8, 8, 16), (1, 1, 16, 16), {}, 1),  # nothing to share
        ((2, 8, 8, 4), (3, 3, 2, 16), {"feature_group_count": 2}, 1),
        ((2, 8, 8, 3), (3, 3, 3, 16), {"rhs_dilation": (2, 2)}, 1),
        ((2, 8, 8, 3), (3, 3, 3, 16), {"lhs_dilation": (2, 2), "padding": ((1, 1), (1, 1))}, 1),
    ],
)
def test_it_is_left_alone_where_nothing_is_won_or_something_else_is_meant(
    shape, kernel, options, pixels
):
    apply_fn, w, x = convolution(shape, kernel, **options)
    assert chosen(apply_fn, w, x) == [pixels]
    np.testing.assert_allclose(widened(apply_fn)(w, x), apply_fn(w, x), rtol=1e-4, atol=1e-4)


def test_one_dimension_other_layouts_and_half_precision_are_left_alone():
    x, w = RNG.normal(size=(2, 3, 8, 8)), RNG.normal(size=(16, 3, 3, 3))
    assert chosen(lambda w, x: lax.conv(x, w, (1, 1), "SAME"), w, x) == [1]
    line = (("NWC", "WIO", "NWC"), np.ones((2, 8, 3)), np.ones((3, 3, 16)))

    def along(w, x):
        return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=line[0])

    assert chosen(along, line[2], line[1]) == [1]
    apply_fn, w, x = convolution((2, 8, 8, 3), (3, 3, 3, 16))
    assert chosen(apply_fn, w.astype(jnp.bfloat16), x.astype(jnp.bfloat16)) == [1]


def test_two_pixels_at_once_from_16_to_16_channels_are_for_one_core():
    apply_fn, w, x = convolution((2, 8, 8, 16), (3, 3, 16, 16))
    (equation,) = trace(apply_fn, w, x).closed.jaxpr.eqns
    found = [pixels_at_once(equation, narrow) for narrow in (0, NARROW, NARROW_ON_ONE_CORE)]
    assert found == [1, 1, 2]
    wide = jax.jit(widened(apply_fn, NARROW_ON_ONE_CORE))(w, x)
    np.testing.assert_allclose(wide, apply_fn(w, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options"), [("cnn", {}), ("resnet", {"depth": 8}), ("vgg", {"depth": 11, "width": 8})]
)
def test_a_network_of_the_zoo_is_the_same_function_and_still_understood(name, options):
    model = models.build(name, 10, options)
    x = RNG.normal(size=(4, 16, 16, 3)).astype(np.float32)
    variables = model.init(jax.random.key(0), x)
    wide = widened(model.apply, NARROW_ON_ONE_CORE)
    assert max(chosen(model.apply, variables, x)) > 1
    np.testing.assert_allclose(
        jax.jit(wide)(variables, x), model.apply(variables, x), rtol=1e-4, atol=1e-4
    )
    ours, theirs = (find_statistics(one, variables, x) for one in (wide, model.apply))
    assert [(*s[:2], s.axes) for s in ours] == [(*s[:2], s.axes) for s in theirs]
    assert find_layers(wide, variables, x) == find_layers(model.apply, variables, x)


@pytest.mark.slow
def test_side_by_side_and_in_a_loop_it_is_the_same_too():
    model = models.build("cnn", 10, {})
    x = RNG.normal(size=(4, 8, 8, 1)).astype(np.float32)
    two = jax.vmap(lambda key: model.init(key, x))(jax.random.split(jax.random.key(0)))
    expected = jax.lax.map(lambda variables: model.apply(variables, x), two)
    wide = widened(model.apply)
    for mapped in (jax.vmap(wide, (0, None)), lambda v, x: jax.lax.map(lambda v: wide(v, x), v)):
        np.testing.assert_allclose(jax.jit(mapped)(two, x), expected, rtol=1e-4, atol=1e-4)
