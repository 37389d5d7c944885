"""Each network of the zoo goes through both adapters and is scored as a population."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import megajax as mj
from megajax.zoo.networks import MODELS, build

NETWORKS = [
    ("cnn", {"width": 2}),
    ("densenet", {"blocks": (1, 1), "growth": 4, "stem": "cifar"}),
    ("mlp", {"hidden": (8,), "norm": "batch"}),
    ("resnet", {"depth": 8, "width": 2, "conv_bias": True}),
    ("vgg", {"depth": 11, "width": 2, "norm": "batch"}),
    ("xception", {"width": 1, "middle": 1, "stem": "cifar"}),
]
X = np.random.default_rng(0).uniform(size=(6, 16, 16, 3)).astype(np.float32)
LABELS = np.arange(6) % 3

# Compiling takes the time here.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def test_no_network_of_the_zoo_is_left_out():
    assert sorted(name for name, _ in NETWORKS) == sorted(MODELS)


def random_variables(model, seed):
    """Weights and statistics made by NumPy; positive, so that variances are, too."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)
    return jax.tree.map(
        lambda leaf: rng.uniform(0.1, 0.5, leaf.shape).astype(np.float32) / leaf.shape[0] ** 0.5,
        shapes,
    )


def joined(first, second):
    """Two nested dictionaries in one."""
    both = {name: joined(first[name], second[name]) for name in first.keys() & second.keys()}
    return {**first, **second, **both}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), NETWORKS)
def test_both_adapters_and_a_population_give_the_networks_own_figures(name, options):
    model = build(name, 3, options)
    parents = [random_variables(model, seed) for seed in (1, 2)]
    linen = mj.from_linen(model, parents[0], train=False)
    chex.assert_trees_all_equal(linen.variables, parents[0])

    blank = nnx.eval_shape(lambda: nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(X))
    blank.to_nnx__rngs = None  # only there to initialise
    in_nnx = joined(*map(parents[0].get, ("params", "batch_stats")))
    network = mj.from_nnx(mj.to_nnx(blank, in_nnx))
    chex.assert_trees_all_equal(network.variables, in_nnx)

    problem = mj.problem_for(
        linen.apply_fn,
        parents,
        (X, LABELS),
        genome=mj.GenomeConfig(granularity="global"),
        fitness=mj.FitnessConfig(metric="cross_entropy", batch_size=3, population_chunk=1),
        population_size=3,
    )

    @jit
    def figures(problem, parents, in_nnx, genes):
        mean = jax.tree.map(lambda *leaves: sum(leaves) / 2, *parents)
        three = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parents, mean)
        alone = jax.lax.map(lambda variables: model.apply(variables, X), three)
        return alone, network.apply_fn(in_nnx, X), mj.evaluate(problem, genes)[0]

    genes = problem.genome.init(jax.random.key(0), 3)
    alone, through_nnx, fitness = figures(problem, parents, in_nnx, genes)
    np.testing.assert_allclose(through_nnx, alone[0], rtol=1e-4, atol=1e-4)
    logits = np.asarray(alone, np.float64)
    nll = np.log(np.exp(logits).sum(-1)) - logits[:, np.arange(6), LABELS]
    np.testing.assert_allclose(fitness, -nll.mean(axis=1), rtol=1e-4)
    assert len(np.unique(fitness)) == 3
