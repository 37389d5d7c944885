"""Re-estimated statistics against what the same network normalises with in training mode."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import megajax as mj
from megajax import models
from megajax.genome import masks
from megajax.normalization import find_statistics, recalibrate, recalibrated
from megajax.parents import leaf_paths

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
