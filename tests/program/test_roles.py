"""What leaves are is read off the program: alike for Linen, NNX and plain JAX."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import megajax as mj
from megajax.program.jaxprs import delay, run, trace
from megajax.program.roles import find_roles
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


def test_all_branches_are_read():
    def program(w, x):
        x = x @ w["first"]
        x = jax.lax.cond(
            x.sum() > 0, lambda x: x @ w["left"] + w["bias"], lambda x: x @ w["right"], x
        )
        return x @ w["last"]

    w = {name: jnp.ones((3, 3)) for name in ("first", "left", "right", "last")}
    w["bias"] = jnp.ones(3)
    layers = grouped(program, w, jnp.ones((1, 3)))
    assert layers == [{"first"}, {"right"}, {"left", "bias"}, {"last"}]
    layers = grouped(lambda w, x: jax.lax.switch(2, [lambda: x @ w["left"]] * 3), w, X[0, 0])
    assert {"left"} in layers


def test_a_learned_start_of_a_loop_has_a_layer():
    def program(w, x):
        def step(h, x):
            return jnp.tanh(x @ w["in"] + h @ w["again"]), None

        return jax.lax.scan(step, w["start"], x)[0] @ w["out"]

    shapes = {"start": (2, 5), "in": (3, 5), "again": (5, 5), "out": (5, 4)}
    w = {name: jnp.ones(shape) for name, shape in shapes.items()}
    roles = find_roles(program, w, jnp.ones((7, 2, 3)))
    by_name = dict(zip(sorted(w), roles.leaves, strict=True))
    assert [by_name[name].layer for name in ("start", "in", "again", "out")] == [0, 1, 2, 3]
    assert [one.inside for one in by_name["again"].contractions] == [True]


def test_what_a_leaf_is_and_along_which_axes_it_writes():
    def program(w, x):
        x = jnp.einsum("bhwc,cnd->bnd", x, w["heads"]) + w["bias"]
        x = x * w["scale"]
        return x.reshape(len(x), -1) @ w["out"].T + w["table"][x[:, 0, 0].astype(int)]

    shapes = {
        "heads": (3, 2, 4), "bias": (2, 4), "scale": (4,), "out": (5, 8), "table": (9, 5),
        "unused": (1,),
    }  # fmt: skip
    w = {name: jnp.ones(shape) for name, shape in shapes.items()}
    by_name = dict(zip(sorted(w), find_roles(program, w, X).leaves, strict=True))
    assert {name: role.kind for name, role in by_name.items()} == {
        "heads": "kernel", "bias": "bias", "scale": "scale", "out": "kernel",
        "table": "embedding", "unused": "unused",
    }  # fmt: skip
    written = {n: [c.written for c in role.contractions] for n, role in by_name.items()}
    assert written == {
        "heads": [(1, 2)], "bias": [], "scale": [], "out": [(0,)], "table": [(1,)], "unused": [],
    }  # fmt: skip
    assert [name for name, role in by_name.items() if role.elsewhere] == ["bias", "scale", "table"]


def test_inputs_and_outputs_are_any_pytrees():
    def program(w, x):
        hidden = jnp.tanh(x["image"].mean((1, 2)) @ w["a"] + x["more"][0] @ w["b"])
        return {"logits": hidden @ w["c"], "hidden": (hidden, None)}

    w = {"a": jnp.ones((3, 4)), "b": jnp.ones((2, 4)), "c": jnp.ones((4, 5))}
    x = {"image": X, "more": [jnp.ones((2, 2))]}
    assert grouped(program, w, x) == [{"a"}, {"b"}, {"c"}]
    traced = trace(program, w, x)
    outputs = run(traced, jax.tree.leaves(w), x, lambda number, *equation: delay(*equation))
    chex.assert_trees_all_close(outputs, program(w, x))


def test_the_same_network_is_read_once():
    calls = []

    def network(w, x):
        calls.append(1)
        return jnp.tanh(x @ w["u"]) @ w["v"]

    def ask(w, x):
        return mj.find_layers(network, w, x), find_roles(network, w, x)

    w = {"u": jnp.ones((3, 4)), "v": jnp.ones((4, 2))}
    first = ask(w, X[0])
    other = jax.tree.map(lambda leaf: np.asarray(2 * leaf), w)
    assert ask(other, np.asarray(X[1]))[1] is first[1]
    assert mj.find_symmetries(network, w, X[0]) == mj.find_symmetries(network, other, X[1])
    assert len(calls) == 1
    ask(w, X[0, :1])  # another shape is another program, and so is another precision
    with jax.default_matmul_precision("highest"):
        ask(w, X[0])
    assert len(calls) == 3


class Unhashable:
    __hash__ = None

    def __call__(self, w, x):
        return x @ w


def test_a_network_without_a_hash_is_read_too():
    assert mj.find_layers(Unhashable(), jnp.ones((3, 2)), X) == 0
