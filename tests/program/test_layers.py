"""Layers are read off the program: the same for Linen, NNX and plain JAX, whatever the names."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import megajax as mj
from megajax.trees import leaf_paths

X = jnp.ones((2, 8, 8, 3))


def grouped(apply_fn, variables, x=X):
    """The leaves' paths, layer by layer."""
    layers = mj.find_layers(apply_fn, variables, x)
    groups = {}
    for path, layer in zip(leaf_paths(variables), jax.tree.leaves(layers), strict=True):
        groups.setdefault(layer, set()).add(path)
    return [groups[number] for number in sorted(groups)]


class Block(nn.Module):
    """A residual block whose names sort in another order than they run in."""

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(4, (3, 3), name="z_first")(x)
        y = nn.relu(nn.BatchNorm(use_running_average=True, name="y_norm")(y))
        y = nn.Conv(4, (3, 3), name="a_second")(y)
        y = nn.BatchNorm(use_running_average=True, name="b_norm")(y)
        shortcut = nn.Conv(4, (1, 1), name="c_shortcut")(x)
        return nn.Dense(3, name="head")(nn.relu(y + shortcut).mean((1, 2)))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_a_convolution_its_bias_and_its_norm_are_one_layer(wrap):
    variables = Block().init(jax.random.key(0), X)
    norm = {"params/{}/scale", "params/{}/bias", "batch_stats/{}/mean", "batch_stats/{}/var"}
    weights = {"params/{}/kernel", "params/{}/bias"}

    def named(pattern, name):
        return {path.format(name) for path in pattern}

    assert grouped(wrap(Block().apply), variables) == [
        named(weights, "z_first") | named(norm, "y_norm"),
        named(weights, "a_second") | named(norm, "b_norm"),
        named(weights, "c_shortcut"),
        named(weights, "head"),
    ]


def test_nnx_and_plain_jax_alike():
    class Net(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.b = nnx.Conv(3, 4, (3, 3), rngs=rngs)
            self.a = nnx.BatchNorm(4, rngs=rngs)
            self.c = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.c(nnx.relu(self.a(self.b(x))).mean((1, 2)))

    network = mj.from_nnx(Net())
    first = {"b/kernel", "b/bias", "a/scale", "a/bias", "a/mean", "a/var"}
    assert grouped(network.apply_fn, network.variables) == [first, {"c/kernel", "c/bias"}]

    def mlp(w, x):
        return jnp.tanh(x @ w["v"] + w["q"]) @ w["u"].T + w["p"]

    flat = {"v": jnp.ones((3, 5)), "q": jnp.ones(5), "u": jnp.ones((2, 5)), "p": jnp.ones(2)}
    assert grouped(mlp, flat, jnp.ones((1, 3))) == [{"v", "q"}, {"u", "p"}]


def test_scan_shared_and_unused_leaves():
    def program(w, x):
        def body(carry, _):
            return jnp.tanh(carry @ w["again"] + w["bias"]), None

        x, _ = jax.lax.scan(body, x @ w["in"], None, length=3)
        return x @ w["in"].T  # tied

    w = {
        "in": jnp.ones((3, 4)),
        "again": jnp.ones((4, 4)),
        "bias": jnp.ones(4),
        "unused": jnp.ones(7),
    }
    assert grouped(program, w, jnp.ones((1, 3))) == [{"in"}, {"again", "bias"}, {"unused"}]
