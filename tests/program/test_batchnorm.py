"""Re-estimated statistics against what the same network normalises with in training mode."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import megajax as mj
from megajax.merging.genome import masks
from megajax.program.batchnorm import (
    find_linear,
    find_statistics,
    recalibrate,
    recalibrated,
    repair,
)
from megajax.trees import leaf_paths
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


def test_inside_a_population_every_candidate_has_its_own_and_parents_keep_theirs():
    model = models.build("cnn", 5, {"width": 2})
    apply_fn = mj.from_linen(model, {}, train=False).apply_fn
    trees = [with_random_statistics(model.init(jax.random.key(k), X), k) for k in range(2)]
    parents = mj.stack_parents(trees)
    plain = masks(parents, granularity="leaf")
    genome = recalibrated(plain, apply_fn)
    genes = genome.init(jax.random.key(5), 6)
    networks = jax.jit(jax.vmap(genome.express, (0, None)))(genes, (parents, X))
    for i, network in enumerate(mj.unstack_parents(networks)):
        if i < 2:
            chex.assert_trees_all_equal(network, trees[i])
        else:
            expected = recalibrate(apply_fn, plain.express(genes[i], parents), X)
            chex.assert_trees_all_close(network, expected, rtol=1e-4, atol=1e-5)


def test_with_frozen_leaves_only_parent_0_is_a_parent():
    model = models.build("cnn", 5, {"width": 2})
    apply_fn = mj.from_linen(model, {}, train=False).apply_fn
    trees = [with_random_statistics(model.init(jax.random.key(k), X), k) for k in range(2)]
    parents = mj.stack_parents(trees)
    genome = recalibrated(masks(parents, granularity="leaf", freeze="conv1"), apply_fn)
    genes = genome.init(jax.random.key(5), 3)
    chex.assert_trees_all_equal(genome.express(genes[0], (parents, X)), trees[0])
    other = genome.express(genes[1], (parents, X))["batch_stats"]["norm2"]["mean"]
    assert not np.allclose(other, trees[1]["batch_stats"]["norm2"]["mean"])


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
    with pytest.raises(mj.ConfigError, match="no hidden layer of the network has a kernel and a b"):
        repair(
            lambda w, x: jnp.tanh(x @ w["u"]) @ w["v"], {"u": jnp.eye(3), "v": jnp.eye(3)}, [], X
        )


def test_a_kernel_that_is_used_twice_or_not_transposable_is_left_alone():
    def tied(w, x):
        return jnp.tanh(x @ w["u"] + w["b"]) @ w["u"].T

    assert find_linear(tied, {"u": jnp.ones((3, 5)), "b": jnp.ones(5)}, jnp.ones((2, 3))) == ()


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
