"""A genome whose networks are recalibrated as they are expressed."""

import chex
import jax
import numpy as np

import megajax as mj
from megajax.merging.genome import masks, recalibrated
from megajax.program.batchnorm import recalibrate
from megajax.zoo import networks as models

X = jax.random.normal(jax.random.key(1), (32, 16, 16, 3))


def with_random_statistics(variables, seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 999))
    randomized = jax.tree.map(
        lambda leaf: 0.5 + jax.random.uniform(next(keys), leaf.shape), variables["batch_stats"]
    )
    return {**variables, "batch_stats": randomized}


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
