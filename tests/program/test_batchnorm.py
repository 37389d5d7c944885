"""Re-estimated statistics against what the same network normalises with in training mode."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import megajax as mj
from megajax.program.batchnorm import recalibrate, repair
from megajax.program.roles import find_roles, find_statistics
from megajax.trees import check_parents, leaf_paths
from megajax.zoo import networks as models

X = jax.random.normal(jax.random.key(1), (32, 16, 16, 3))
NETWORKS = {
    "cnn": {"width": 4},
    "resnet": {"depth": 8},
    "densenet": {"blocks": (2, 2), "growth": 4},
}


def with_random_statistics(variables, seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 999))
    randomized = jax.tree.map(
        lambda leaf: 0.5 + jax.random.uniform(next(keys), leaf.shape), variables["batch_stats"]
    )
    return {**variables, "batch_stats": randomized}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_logits_are_those_of_training_mode(name, wrap):
    model = models.build(name, 5, NETWORKS[name])
    variables = with_random_statistics(model.init(jax.random.key(0), X))
    apply_fn = wrap(mj.from_linen(model, {}, train=False).apply_fn)
    found = find_statistics(apply_fn, variables, X)
    paths = leaf_paths(variables)
    assert {paths[s.mean].replace("/mean", "") for s in found} == {
        paths[s.variance].replace("/var", "") for s in found
    }
    assert 2 * len(found) == len(jax.tree.leaves(variables["batch_stats"]))
    new = jax.jit(lambda variables: recalibrate(apply_fn, variables, X))(variables)
    chex.assert_trees_all_equal(new["params"], variables["params"])
    expected, _ = model.apply(variables, X, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(apply_fn(new, X), expected, rtol=1e-3, atol=1e-4)
    assert not np.allclose(apply_fn(variables, X), expected, atol=1e-2)


def test_nnx_and_a_divided_root_alike():
    class Net(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.conv(x)).mean((1, 2))

    network = mj.from_nnx(Net())
    new = recalibrate(network.apply_fn, network.variables, X)
    z = np.asarray(Net().conv(X), np.float64)
    np.testing.assert_allclose(new["norm"]["mean"], z.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(new["norm"]["var"], z.var((0, 1, 2)), rtol=1e-4)

    def torch_style(w, x):  # channels second, a division by the root
        shape = (1, -1, 1, 1)
        x = (x - w["mean"].reshape(shape)) / jnp.sqrt(w["var"].reshape(shape) + 1e-5)
        return (x * w["scale"].reshape(shape) + w["bias"].reshape(shape)).mean((2, 3))

    w = {name: jnp.full(3, 0.5) for name in ("mean", "var", "scale", "bias")}
    x = jnp.moveaxis(X, -1, 1)
    new = recalibrate(torch_style, w, x)
    np.testing.assert_allclose(new["mean"], np.asarray(x).mean((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(new["var"], np.asarray(x).var((0, 2, 3)), rtol=1e-5)


def test_a_network_without_statistics_is_refused():
    model = nn.Sequential([nn.Dense(4), nn.LayerNorm(), nn.Dense(3)])
    variables = model.init(jax.random.key(0), X)
    assert find_statistics(model.apply, variables, X) == ()
    with pytest.raises(mj.ConfigError, match="no BatchNorm statistics"):
        recalibrate(model.apply, variables, X)


# REPAIR --------------------------------------------------------------------------------------


class Plain(nn.Module):
    """Convolutions and dense layers with biases, no normalisation."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), strides=2, name="a")(x))
        x = nn.relu(nn.Conv(8, (3, 3), name="b")(x)).reshape(len(x), -1)
        return nn.Dense(4, name="d")(nn.relu(nn.Dense(10, name="c")(x)))


def pre_activations(variables):
    """Means and deviations of every hidden unit before its nonlinearity, by Flax's own capture."""
    _, state = Plain().apply(variables, X, capture_intermediates=True)
    layers = state["intermediates"]
    return {
        name: (z.mean(tuple(range(z.ndim - 1))), z.std(tuple(range(z.ndim - 1))))
        for name in "abc"
        for z in [np.asarray(layers[name]["__call__"][0], np.float64)]
    }


def biased(seed):
    keys = iter(jax.random.split(jax.random.key(seed), 9))
    variables = Plain().init(next(keys), X)
    return jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), variables
    )


def test_repair_gives_every_hidden_unit_the_parents_mean_and_spread():
    parents = [biased(seed) for seed in range(3)]
    merged = jax.tree.map(lambda *leaves: sum(leaves) / 3, *parents)
    weights = np.array([0.5, 0.3, 0.2])
    new = jax.jit(lambda merged: repair(Plain().apply, merged, parents, X, weights))(merged)
    wanted = [pre_activations(parent) for parent in parents]
    found, before = pre_activations(new), pre_activations(merged)
    for name in "abc":
        for moment in range(2):
            target = sum(
                w * parent[name][moment] for w, parent in zip(weights, wanted, strict=True)
            )
            np.testing.assert_allclose(found[name][moment], target, rtol=2e-3, atol=2e-4)
            assert not np.allclose(before[name][moment], target, rtol=0.05, atol=1e-2)
    chex.assert_trees_all_equal(new["params"]["d"], merged["params"]["d"])  # the logits' layer


def test_repair_leaves_a_parent_as_it_is_and_refuses_a_network_without_biases():
    parent = biased(0)
    new = repair(Plain().apply, parent, [parent, parent], X)
    chex.assert_trees_all_close(new, parent, rtol=1e-4, atol=1e-5)
    plain = {"u": jnp.eye(3), "v": jnp.eye(3)}
    with pytest.raises(mj.ConfigError, match="no hidden layer of the network has a kernel and a b"):
        repair(lambda w, x: jnp.tanh(x @ w["u"]) @ w["v"], plain, [plain], X)


def test_a_kernel_that_is_used_twice_or_not_transposable_is_left_alone():
    def tied(w, x):
        return jnp.tanh(x @ w["u"] + w["b"]) @ w["u"].T

    weights = {"u": jnp.ones((3, 5)), "b": jnp.ones(5)}
    assert find_roles(tied, weights, jnp.ones((2, 3))).linear == ()


def test_batch_norm_inside_a_checkpoint_is_found():
    """`jax.checkpoint` is a call like any other: what is in it is walked too."""
    model, options = models.build("cnn", 3, {"width": 4}), {"train": False}
    variables = model.init(jax.random.key(0), X)

    def plain(variables, x):
        return model.apply(variables, x, **options)

    found = find_statistics(jax.checkpoint(plain), variables, X)
    assert found == find_statistics(plain, variables, X) != ()
    fresh = [recalibrate(f, variables, X) for f in (jax.checkpoint(plain), plain)]
    chex.assert_trees_all_close(*fresh, rtol=1e-5, atol=1e-6)


# BatchNorm by what it does -------------------------------------------------------------------


def haiku(w, z):  # statistics with axes of size 1, a scale in the root's factor
    return (z - w["mean"]) * (w["scale"] * jax.lax.rsqrt(w["var"] + 1e-5)) + w["bias"]


def floored(w, z):
    return (z - w["mean"]) / jnp.sqrt(jnp.maximum(w["var"], 0) + 1e-5) * w["scale"]


def power(w, z):
    return (z - w["mean"]) * (w["var"] + 1e-5) ** -0.5


def deviation(w, z):
    return w["scale"] * (z - w["mean"]) / (w["var"] + 1e-3)


def reciprocal(w, z):
    return (z - w["mean"]) * (w["scale"] / w["var"]) + w["bias"]


def fused(w, z):
    inverse = w["scale"] * jax.lax.rsqrt(w["var"] + 1e-5)
    return z * inverse + (w["bias"] - w["mean"] * inverse)


def debiased(w, z):
    correction = 1 - 0.9 ** w["count"].astype(jnp.float32)
    return (z - w["mean"] / correction) / jnp.sqrt(w["var"] / correction + 1e-5)


def half(w, z):
    return ((z - w["mean"]) / jnp.sqrt(w["var"] + 1e-3)).astype(z.dtype)


FORMS = {  # what the second leaf is to hold, and what both are to be divided by
    haiku: (np.var, 1),
    floored: (np.var, 1),
    power: (np.var, 1),
    deviation: (np.std, 1),
    reciprocal: (np.std, 1),
    debiased: (np.var, 1 - 0.9**3),
}


def leaves_of_a_norm(shape):
    names = ("bias", "mean", "scale", "var")
    drawn = {
        name: 0.5 + jax.random.uniform(jax.random.key(i), shape) for i, name in enumerate(names)
    }
    return drawn | {"count": jnp.int32(3)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(6,), (1, 1, 1, 6)])
def test_every_form_of_batch_norm_is_measured_anew(form, shape):
    def apply_fn(w, x):
        return form(w["norm"], jax.lax.conv(x, w["kernel"], (1, 1), "SAME").transpose(0, 2, 3, 1))

    w = {"kernel": jax.random.normal(jax.random.key(9), (6, 3, 3, 3))}
    w["norm"] = leaves_of_a_norm(shape)
    x = jnp.moveaxis(X[:8], -1, 1)
    new = jax.jit(lambda w, x: recalibrate(apply_fn, w, x))(w, x)
    z = np.asarray(jax.lax.conv(x, w["kernel"], (1, 1), "SAME"), np.float64)
    spread, factor = FORMS[form]
    assert new["norm"]["mean"].shape == shape
    mean, second = new["norm"]["mean"].ravel(), new["norm"]["var"].ravel()
    np.testing.assert_allclose(mean, z.mean((0, 2, 3)) * factor, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(second, spread(z, (0, 2, 3)) * factor, rtol=1e-4)
    for name in ("bias", "scale", "count"):
        np.testing.assert_array_equal(new["norm"][name], w["norm"][name])


def test_stacked_layers_inside_a_scan():
    """Each layer of a loop, loops in loops too, is measured behind those before it."""

    def layer(x, w):
        z = jnp.tanh(x) @ w["kernel"]
        return x + haiku(w, z), z

    def blocks(w, x):
        return jax.lax.scan(lambda x, w: jax.lax.scan(layer, x, w), x, w["blocks"])

    def apply_fn(w, x):
        return debiased(w, blocks(w, x)[0])

    stacked = {
        name: jnp.stack([leaf] * 6).reshape(2, 3, 1, 5) + jax.random.uniform(jax.random.key(3))
        for name, leaf in leaves_of_a_norm((5,)).items()
        if name != "count"
    }
    kernel = jax.random.normal(jax.random.key(4), (2, 3, 5, 5))
    w = leaves_of_a_norm((5,)) | {"blocks": stacked | {"kernel": kernel}}
    x = jax.random.normal(jax.random.key(5), (40, 5))
    new = jax.jit(lambda w: recalibrate(apply_fn, w, x))(w)
    out, z = blocks(new, x)  # what enters each layer, behind layers that are corrected
    z = np.asarray(z, np.float64)
    np.testing.assert_allclose(new["blocks"]["mean"][..., 0, :], z.mean(2), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(new["blocks"]["var"][..., 0, :], z.var(2), rtol=1e-3)
    np.testing.assert_allclose(new["mean"], out.mean(0) * (1 - 0.9**3), rtol=1e-3, atol=1e-4)
    chex.assert_trees_all_equal(new["blocks"]["kernel"], kernel)


def test_statistics_that_the_user_names():
    def centred(w, x):  # a shift and a scale like any other
        return (x + w["shift"]) * w["factor"]

    w, x = {"shift": jnp.zeros(3), "factor": jnp.ones(3)}, X[0]
    with pytest.raises(mj.ConfigError, match="no BatchNorm statistics"):
        recalibrate(centred, w, x)
    new = recalibrate(centred, w, x, statistics=(("shift", "factor"),))
    np.testing.assert_allclose(new["shift"], x.mean((0, 1)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(new["factor"], x.var((0, 1)), rtol=1e-4)
    w = leaves_of_a_norm((3,))
    with pytest.raises(mj.ConfigError, match="var: no mean goes with it; name the pair"):
        recalibrate(fused, w, x)
    new = recalibrate(fused, w, x, statistics=(("mean", "var"),))
    np.testing.assert_allclose(new["mean"], x.mean((0, 1)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(new["var"], x.var((0, 1)), rtol=1e-4)
    with pytest.raises(
        mj.ConfigError, match="statistics names 'none': it is no leaf of the network"
    ):
        recalibrate(fused, w, x, statistics=(("mean", "none"),))


@pytest.mark.parametrize(
    ("apply_fn", "message"),
    [
        (lambda w, x: x * jax.lax.rsqrt(w["var"] + 1e-5), "var: no mean goes with it"),
        (
            lambda w, x: jax.lax.fori_loop(0, 3, lambda _, x: haiku(w, x), x),
            "var: inside a (scan that does not slice it|while)",
        ),
        (
            lambda w, x: jax.lax.cond(x.sum() > 0, lambda x: haiku(w, x), lambda x: x, x),
            "var: inside a cond",
        ),
        (
            lambda w, x: (x - w["mean"]) * jax.lax.rsqrt(jnp.sin(w["var"]) + 1e-5),
            "var: sin comes between it and its use",
        ),
    ],
)
def test_statistics_that_nothing_corrects_are_listed(apply_fn, message):
    with pytest.raises(mj.ConfigError, match=f"cannot measure these statistics anew: {message}"):
        recalibrate(apply_fn, leaves_of_a_norm((3,)), X)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("scale", [1, 3000])
def test_half_precision_is_measured_in_full_and_stays_finite(dtype, scale):
    """A variance of 9 million is more than float16 holds."""
    w = jax.tree.map(lambda leaf: leaf.astype(dtype), leaves_of_a_norm((3,)))
    x = (scale * X).astype(dtype)
    new = recalibrate(half, w, x)
    assert all(leaf.dtype == dtype for leaf in new.values())
    check_parents([new, new])
    z = np.asarray(x, np.float64)
    largest = float(jnp.finfo(dtype).max)
    np.testing.assert_allclose(new["mean"].astype(float), z.mean((0, 1, 2)), rtol=0.02, atol=1e-2)
    expected = np.minimum(z.var((0, 1, 2)), largest)
    np.testing.assert_allclose(new["var"].astype(float), expected, rtol=0.01)


def test_haiku_itself():
    hk = pytest.importorskip("haiku")

    @hk.without_apply_rng
    @hk.transform_with_state
    def net(x, is_training=False):
        x = hk.BatchNorm(True, True, 0.9)(hk.Conv2D(4, 3)(x), is_training=is_training)
        return hk.Linear(3)(jax.nn.relu(x).mean((1, 2)))

    variables = net.init(jax.random.key(0), X, True)

    def apply_fn(variables, x):
        return net.apply(*variables, x)[0]

    params, state = recalibrate(apply_fn, variables, X)
    expected, _ = net.apply(*variables, X, True)
    np.testing.assert_allclose(apply_fn((params, state), X), expected, rtol=1e-3, atol=1e-4)


def test_derivatives_of_ones_own_are_kept():
    """What a user gives a derivative keeps it when the network is run with somebody stepping in."""

    @jax.custom_vjp
    def through(x):
        return jnp.sign(x)

    through.defvjp(lambda x: (through(x), None), lambda _, g: (g,))

    def apply_fn(w, x):
        return haiku(w, through(x @ w["kernel"]))

    def loss(kernel):
        new = recalibrate(apply_fn, w | {"kernel": kernel}, X[0, 0])
        return (new["mean"] ** 2).sum()

    w = leaves_of_a_norm((3,)) | {"kernel": jax.random.normal(jax.random.key(1), (3, 3))}
    assert np.abs(jax.grad(loss)(w["kernel"])).max() > 0


def test_inputs_and_outputs_of_any_form():
    def apply_fn(w, x):
        z = x["a"] @ w["kernel"] + x["b"][0]
        return {"out": haiku(w, z), "nothing": None}

    w = leaves_of_a_norm((4,)) | {"kernel": jax.random.normal(jax.random.key(1), (3, 4))}
    x = {"a": X[0, 0], "b": (X[0, 1, :, :1],)}
    new = recalibrate(apply_fn, w, x)
    z = x["a"] @ w["kernel"] + x["b"][0]
    np.testing.assert_allclose(new["mean"], z.mean(0), rtol=1e-4, atol=1e-5)

    def plain(w, x):
        return {"y": jnp.tanh(x["a"] @ w["u"] + w["b"]) @ w["v"]}

    parent = {"u": jnp.ones((3, 2)), "b": jnp.zeros(2), "v": jnp.ones((2, 1))}
    repaired = repair(plain, parent | {"u": parent["u"] / 4}, [parent, parent], x)
    np.testing.assert_allclose(repaired["u"], parent["u"], rtol=1e-4)
