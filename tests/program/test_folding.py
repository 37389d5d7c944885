"""What is folded into kernels gives the same network, with less left to do in a pass."""

import collections

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import megajax as mj
from megajax.program.convolutions import NARROW, NARROW_ON_ONE_CORE
from megajax.program.folding import Folded, fold, for_backend
from megajax.program.jaxprs import walk
from megajax.zoo import networks as models

X = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
ZOO = {
    "cnn": {"width": 4},
    "densenet": {"blocks": (2, 2), "growth": 4},
    "mlp": {"hidden": (16, 16), "norm": "batch"},
    "resnet": {"depth": 8, "width": 4},
    "vgg": {"depth": 11, "width": 4, "norm": "batch"},
    "xception": {"width": 4, "middle": 1, "stem": "cifar"},
}


def randomised(variables, seed=0):
    """Every leaf drawn anew: variances positive, means and biases away from zero."""
    keys = iter(jax.random.split(jax.random.key(seed), 9999))

    def draw(path, leaf):
        noise = jax.random.normal(next(keys), leaf.shape, leaf.dtype)
        if path[-1].key in ("var", "scale"):
            return jnp.exp(0.3 * noise)
        fan = max(1, int(np.prod(leaf.shape[:-1]))) if leaf.ndim > 1 else 10
        return noise / np.sqrt(fan).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, variables)


def zoo(name):
    model = models.build(name, 5, ZOO[name])
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)
    return mj.from_linen(model, {}, train=False).apply_fn, randomised(shapes)


def close(found, expected, tolerance=1e-5):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found / scale, expected / scale, atol=tolerance)


def both_steps(network):
    return jax.jit(lambda variables, x: network.apply(network.prepare(variables, x), x))


def equations(function, *arguments):
    """How often each primitive occurs, calls looked into."""
    found = collections.Counter()

    def visit(number, equation, operands):
        found[equation.primitive.name] += 1
        return [None] * len(equation.outvars)

    closed = jax.make_jaxpr(function)(*arguments)
    walk(closed, [None] * len(closed.jaxpr.invars), visit, lambda _: None)
    return found


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("narrow", [0, NARROW, NARROW_ON_ONE_CORE])
def test_the_zoo_is_the_same_to_rounding(name, narrow):
    apply_fn, variables = zoo(name)
    network = Folded(apply_fn, narrow=narrow)
    expected = jax.jit(apply_fn)(variables, X)
    close(both_steps(network)(variables, X), expected)
    close(jax.jit(network)(variables, X), expected)


@pytest.mark.parametrize("name", ["resnet", "vgg"])
def test_of_a_norm_behind_a_convolution_only_the_bias_is_left(name):
    apply_fn, variables = zoo(name)
    network = Folded(apply_fn)
    prepared = jax.eval_shape(network.prepare, variables, X)
    before, after = equations(apply_fn, variables, X), equations(network.apply, prepared, X)
    layers = before["conv_general_dilated"]
    assert after["conv_general_dilated"] == layers
    assert before["sub"] == before["rsqrt"] == layers
    assert [after[name] for name in ("sub", "rsqrt", "mul")] == [0, 0, 0]
    shortcuts = {"resnet": 3, "vgg": 0}[name]
    assert after["add"] == layers + 1 + shortcuts  # biases, the head's too, and residual sums
    # A kernel and a bias for each layer, and no more than the variables have.
    assert len(prepared.arrays) == 2 * layers + 2
    sizes = [sum(x.size for x in jax.tree.leaves(t)) for t in (prepared, variables)]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_network_in_half_precision_is_folded_in_full(dtype):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x = nn.Conv(8, (3, 3), dtype=dtype)(x)
                x = nn.relu(nn.BatchNorm(use_running_average=True, dtype=dtype)(x))
            return nn.Dense(5, dtype=dtype)(x.mean((1, 2)))

    variables = randomised(jax.eval_shape(Net().init, jax.random.key(0), X))
    network = Folded(Net().apply)
    prepared = jax.eval_shape(network.prepare, variables, X)
    assert not equations(network.apply, prepared, X)["sub"]
    kernels = [array for array in prepared.arrays if array.shape[:2] == (3, 3)]
    assert {array.dtype for array in kernels} == {np.dtype(dtype)}
    found, expected = both_steps(network)(variables, X), jax.jit(Net().apply)(variables, X)
    assert found.dtype == expected.dtype == dtype
    close(found.astype(jnp.float32), expected.astype(jnp.float32), 0.05)


class Mixed(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs, use_running_average=True)
        self.heads = nnx.LinearGeneral(4, (2, 3), rngs=rngs)

    def __call__(self, x):
        return self.heads(jax.nn.silu(self.norm(self.conv(x))).mean((1, 2)))


def own(w, x):
    """Channels first, a norm by hand, scaled heads, a kernel on the left, tied weights."""
    z = jax.lax.conv(jnp.moveaxis(x, -1, 1), w["stem"], (1, 1), "SAME")
    shape = (1, -1, 1, 1)
    z = (z - w["mean"].reshape(shape)) / jnp.sqrt(w["var"].reshape(shape) + 1e-5)
    z = jax.nn.relu(z * w["gain"].reshape(shape)).mean((2, 3))
    q = (jnp.einsum("bc,chd->bhd", z, w["q"]) + w["bias"]) * w["heads"][:, None] * 0.5
    left = (w["left"] @ q.reshape(len(x), -1).T) * w["rows"][:, None] + 1
    return {"out": left.T @ w["left"], "raw": (z, -(2 * z @ w["tail"] - w["shift"]))}


OWN = {
    "stem": (5, 3, 3, 3), "mean": (5,), "var": (5,), "gain": (5,), "q": (5, 2, 3), "bias": (2, 3),
    "heads": (2,), "left": (7, 6), "rows": (7,), "tail": (5, 2), "shift": (2,),
}  # fmt: skip


def test_nnx_and_functions_of_ones_own():
    network = mj.from_nnx(Mixed())
    variables = randomised(network.variables)
    folded = Folded(network.apply_fn)
    close(both_steps(folded)(variables, X), jax.jit(network.apply_fn)(variables, X))
    assert len(jax.eval_shape(folded.prepare, variables, X).arrays) == 4

    w = randomised({name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in OWN.items()})
    found, expected = both_steps(Folded(own))(w, X), jax.jit(own)(w, X)
    jax.tree.map(close, found, expected)
    prepared = jax.eval_shape(Folded(own).prepare, w, X)
    left = equations(Folded(own).apply, prepared, X)
    assert (left["sub"], left["sqrt"]) == (1, 0)  # where nothing is scaled, nothing is folded


def test_what_is_used_twice_or_varies_otherwise_is_left_alone():
    def twice(w, x):
        z = x @ w["a"]
        return z * w["s"] + jnp.sin(z)  # the product is needed as it is, too

    def by_row(w, x):
        return (x @ w["a"]) * w["r"][:, None] + w["s"]

    def outputs(w, x):
        z = x @ w["a"]
        return z, z * w["s"]

    w = {"a": jnp.ones((3, 4)), "s": jnp.arange(4.0), "r": jnp.arange(5.0)}
    x = jax.random.normal(jax.random.key(0), (5, 3))
    for apply_fn in (twice, by_row, outputs):
        network = Folded(apply_fn)
        assert equations(network.apply, network.prepare(w, x), x)["mul"] == 1
        chex.assert_trees_all_equal(both_steps(network)(w, x), jax.jit(apply_fn)(w, x))


@pytest.mark.parametrize(
    "apply_fn",
    [
        lambda w, x: jnp.tanh(x @ w["a"] + w["b"]) @ w["c"],
        lambda w, x: jax.lax.scan(lambda x, b: (jnp.tanh(x + b), x.sum()), x @ w["a"], w["s"]),
        lambda w, x: jax.lax.cond(x.sum() > 0, lambda: x @ w["a"], lambda: x @ (2 * w["a"])),
        lambda w, x: w["b"],
        lambda w, x: x,
        lambda w, x: (w["table"][jnp.argmax(x, -1)], 3.0, w["n"] + 1),
    ],
)
def test_where_nothing_is_to_be_folded_the_result_is_the_same(apply_fn):
    shapes = {"a": (3, 4), "b": (4,), "c": (4, 2), "s": (6, 4), "table": (3, 2)}
    w = {name: jax.random.normal(jax.random.key(2), shape) for name, shape in shapes.items()}
    w["n"] = jnp.int32(3)
    x = jax.random.normal(jax.random.key(0), (5, 3))
    network = Folded(apply_fn)
    chex.assert_trees_all_equal(both_steps(network)(w, x), network(w, x))
    chex.assert_trees_all_close(both_steps(network)(w, x), apply_fn(w, x), rtol=1e-6, atol=0)


def test_prepared_networks_are_stacked_mapped_and_passed_through_other_batches():
    apply_fn, _ = zoo("resnet")
    networks = [zoo("resnet")[1], randomised(zoo("resnet")[1], 1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *networks)
    network = fold(apply_fn)
    prepared = jax.jit(jax.vmap(network.prepare, (0, None)))(stacked, X)

    @jax.jit
    def scores(prepared, x):
        return jax.lax.map(lambda one: network.apply(one, x), prepared)

    for x in (X, X[:2], np.concatenate([X, X])):
        for found, variables in zip(scores(prepared, x), networks, strict=True):
            close(found, jax.jit(apply_fn)(variables, x))


def test_equal_networks_share_a_program_and_broadcast_weights_are_kept_small():
    apply_fn = mj.from_linen(models.build("cnn", 5, {"width": 4}), {}, train=False).apply_fn
    assert len({fold(apply_fn), fold(apply_fn)}) == 1
    assert for_backend(apply_fn) == for_backend(apply_fn)

    def planes(w, x):
        return jnp.sin(x) * jnp.broadcast_to(w, x.shape)

    (array,) = Folded(planes).prepare(jnp.arange(3.0), X).arrays
    assert array.shape == (1, 1, 1, 3)


def test_derivatives_of_ones_own_are_kept():
    @jax.custom_vjp
    def through(x):
        return jnp.round(x)

    through.defvjp(lambda x: (through(x), None), lambda _, g: (g,))
    network = Folded(lambda w, x: through((x @ w["a"]) * w["s"]).sum())
    w = {"a": jnp.ones((3, 4)), "s": jnp.ones(4)}
    gradient = jax.grad(lambda w: both_steps(network)(w, X[0, 0]))(w)
    np.testing.assert_allclose(gradient["s"], jnp.full(4, X[0, 0].sum()), rtol=1e-5)
