"""Gradients written for a CPU are those that JAX writes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from megajax.program.gradients import all_are_fast, with_fast_gradients

LAYOUT = ("NHWC", "HWIO", "NHWC")


def loss_of(strides, padding):
    def loss(w, x):
        y = jax.lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=LAYOUT)
        return jnp.sin(y).sum()

    return loss


def drawn(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def assert_result_and_gradients_are_those_of_jax(fast, loss, w, x):
    found = jax.jit(jax.value_and_grad(fast, argnums=(0, 1)))(w, x)
    expected = jax.value_and_grad(loss, argnums=(0, 1))(w, x)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("images", [1, 16, 17, 48])
@pytest.mark.parametrize("strides", [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_a_convolution_has_the_gradients_that_jax_gives_it(images, strides, padding):
    x, w = drawn(images, (images, 9, 8, 3), (3, 3, 3, 5))
    loss = loss_of(strides, padding)
    assert_result_and_gradients_are_those_of_jax(with_fast_gradients(loss), loss, w, x)


@pytest.mark.parametrize(
    ("kernel", "strides"),
    [
        ((1, 1), (2, 2)),
        ((2, 2), (3, 2)),
        ((3, 3), (2, 2)),
        ((5, 4), (1, 1)),
        ((5, 4), (3, 2)),
    ],
)
@pytest.mark.parametrize("padding", ["SAME", ((0, 0), (1, 1)), ((2, 1), (0, 3))])
def test_any_window_has_the_gradients_that_jax_gives_it(kernel, strides, padding):
    x, w = drawn(0, (3, 9, 8, 2), (*kernel, 2, 4))
    loss = loss_of(strides, padding)
    assert_result_and_gradients_are_those_of_jax(with_fast_gradients(loss), loss, w, x)


@pytest.mark.parametrize("channels", [(3, 16), (8, 8), (16, 16)])
def test_narrow_convolutions_on_one_core(channels):
    x, w = drawn(0, (3, 8, 8, channels[0]), (3, 3, *channels))
    loss = loss_of((1, 1), "SAME")
    fast = with_fast_gradients(loss, one_core=True)
    shapes = [eqn.outvars[0].aval.shape for eqn in jax.make_jaxpr(fast)(w, x).eqns]
    assert (3, 8, 8, channels[1]) in shapes
    assert_result_and_gradients_are_those_of_jax(fast, loss, w, x)


def test_gradients_of_gradients_are_those_of_jax():
    x, w = drawn(0, (2, 6, 6, 3), (3, 3, 3, 4))
    loss = loss_of((2, 2), "SAME")

    def curvature(loss):
        return jax.grad(lambda w: jnp.vdot(jax.grad(loss)(w, x), jnp.cos(w)))(w)

    np.testing.assert_allclose(
        curvature(with_fast_gradients(loss)), curvature(loss), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(
    ("options", "fast"),
    [
        ({}, True),
        ({"window_strides": (2, 2)}, True),
        ({"feature_group_count": 2}, False),
        ({"rhs_dilation": (2, 2)}, False),
        ({"lhs_dilation": (2, 2)}, False),
        ({"dimension_numbers": ("NHWC", "HWIO", "NCHW")}, False),
    ],
)
def test_what_is_slow_inside_loops_is_known(options, fast):
    usual = {"window_strides": (1, 1), "padding": [(0, 0)] * 2, "dimension_numbers": LAYOUT}
    x, w = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 4 // options.get("feature_group_count", 1), 4))

    def convolved(w, x):
        return jax.nn.relu(jax.lax.conv_general_dilated(x, w, **(usual | options)))

    def inside(w, x):
        return jax.lax.scan(lambda total, x: (total + convolved(w, x).sum(), None), 0.0, x[None])

    assert all_are_fast(convolved, w, x) == fast
    assert all_are_fast(jax.jit(convolved), w, x) == fast
    assert not all_are_fast(inside, w, x)


def test_many_images_in_half_precision_are_summed_in_full():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(1, 2, (1000, 4, 4, 3)), jnp.bfloat16)
    w = jnp.ones((3, 3, 3, 2), jnp.bfloat16)

    def loss(w, x):
        y = jax.lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=LAYOUT)
        return y.astype(jnp.float32).sum()

    found = jax.jit(jax.grad(with_fast_gradients(loss)))(w, x)
    expected = jax.grad(loss)(w.astype(jnp.float32), x.astype(jnp.float32))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2**-8)


def test_a_network_in_training_keeps_its_statistics_and_its_dropout():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Conv(4, (3, 3))(x)))
            return nn.Dense(2)(nn.Dropout(0.5, deterministic=False)(x.mean((1, 2))))

    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    x = jax.random.normal(jax.random.key(2), (20, 6, 6, 3))
    variables = Net().init(keys, x)

    def forward(variables, x, key):
        return Net().apply(variables, x, mutable=["batch_stats"], rngs={"dropout": key})

    def loss(forward, variables):
        outputs, updated = forward(variables, x, keys["dropout"])
        return (outputs**2).mean(), updated

    fast, slow = (
        jax.jit(jax.value_and_grad(lambda v, f=f: loss(f, v), has_aux=True))(variables)
        for f in (with_fast_gradients(forward), forward)
    )
    for one, other in zip(jax.tree.leaves(fast), jax.tree.leaves(slow), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
