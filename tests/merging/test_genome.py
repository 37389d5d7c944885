"""Masks: endpoints bit for bit, coefficients on the simplex, and labels that are obeyed."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.projections import projection_simplex

from megajax.config import GRANULARITIES, EvolutionConfig
from megajax.errors import ConfigError
from megajax.merging.genome import FROZEN, mask_labels, masks, nearest_on_simplex
from megajax.merging.merge import algorithm_for
from megajax.merging.shares import channel_shares, parent_shares
from megajax.program.roles import find_layers
from megajax.search.genetic import run
from megajax.trees import leaf_paths, stack_parents

KEY = jax.random.key(0)
X = jnp.ones((1, 8, 8, 2))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, name="norm")(nn.Conv(4, (3, 3), name="conv")(x))
        return nn.Dense(3, name="head")(nn.relu(x).mean((1, 2)))


def random_parent(seed):
    """Random weights everywhere, negative zeros among them, positive variances."""
    tree = jax.eval_shape(Net().init, KEY, X)
    keys = iter(jax.random.split(jax.random.key(seed), 99))
    tree = jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), tree)
    tree["params"]["conv"]["bias"] = tree["params"]["conv"]["bias"].at[0].set(-0.0)
    tree["batch_stats"]["norm"]["var"] = jnp.abs(tree["batch_stats"]["norm"]["var"])
    return tree


def parents_of(K):
    return stack_parents([random_parent(k) for k in range(K)])


def genome_of(parents, granularity, **options):
    one = jax.tree.map(lambda leaf: leaf[0], parents)
    layers = find_layers(Net().apply, one, X)
    return masks(parents, granularity=granularity, layers=layers, **options)


def bits(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), tree)


NUM_GENES = {"global": 1, "layer": 2, "leaf": 8, "channel": 4 + 3, "element": 72 + 4 * 5 + 12 + 3}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("K", [2, 5])
def test_one_hot_masks_give_back_a_parent_bit_for_bit(granularity, K):
    parents = parents_of(K)
    genome = genome_of(parents, granularity)
    assert genome.num_genes == NUM_GENES[granularity]
    for k in range(K):
        genes = jnp.zeros((genome.num_genes, K)).at[:, k].set(1.0)
        for express in (genome.express, jax.jit(genome.express)):
            assert bits(express(genes, parents)) == bits(random_parent(k))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_equal_coefficients_give_the_average_and_any_others_the_labelled_mix(granularity):
    parents = parents_of(3)
    genome = genome_of(parents, granularity)
    average = genome.express(jnp.full((genome.num_genes, 3), 1 / 3), parents)
    chex.assert_trees_all_close(
        average, jax.tree.map(lambda leaf: leaf.mean(0), parents), atol=1e-6
    )
    genes = np.asarray(genome.sample(KEY, (genome.num_genes, 3), jnp.float32))
    mixed = genome.express(jnp.asarray(genes), parents)

    def oracle(label, leaf):
        coefficients = genes[np.broadcast_to(label, leaf.shape[1:])]
        return np.einsum("...k,k...->...", coefficients, np.asarray(leaf, np.float64))

    expected = jax.tree.map(oracle, genome.labels, parents)
    chex.assert_trees_all_close(mixed, jax.tree.map(jnp.float32, expected), atol=1e-5)
    assert (mixed["batch_stats"]["norm"]["var"] >= 0).all()


def test_a_layers_leaves_share_a_gene_and_a_channels_numbers_do():
    labels = genome_of(parents_of(2), "layer").labels
    assert {int(labels["params"]["conv"]["kernel"].flat[0])} == {
        int(leaf.flat[0])
        for leaf in jax.tree.leaves([labels["params"]["norm"], labels["batch_stats"]["norm"]])
    }
    labels = genome_of(parents_of(2), "channel").labels
    channels = [0, 1, 2, 3]
    assert labels["params"]["conv"]["kernel"].shape == (1, 1, 1, 4)
    for leaf in jax.tree.leaves([labels["params"]["conv"], labels["batch_stats"]["norm"]]):
        assert leaf.ravel().tolist() == channels
    assert labels["params"]["head"]["bias"].tolist() == [4, 5, 6]


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("K", [2, 4])
def test_first_population_holds_parents_and_mean_and_lies_on_the_simplex(binary, K):
    genome = genome_of(parents_of(K), "channel", binary=binary)
    genes = np.asarray(genome.init(KEY, 40))
    assert genes.shape == (40, 7, K)
    np.testing.assert_array_equal(genes[:K], np.repeat(np.eye(K)[:, None], 7, axis=1))
    if binary:
        assert set(np.unique(genes)) == {0.0, 1.0}
    else:
        np.testing.assert_allclose(genes[K], 1 / K)
    np.testing.assert_allclose(genes.sum(-1), 1, atol=1e-6)
    assert (genes >= 0).all()
    assert len(np.unique(genes, axis=0)) > 20
    with pytest.raises(ConfigError, match=f"population_size is {K - 1}.* {K} parents"):
        genome.init(KEY, K - 1)


def test_repair_is_the_nearest_point_of_the_simplex():
    genome = genome_of(parents_of(3), "channel")
    genes = jax.random.normal(KEY, (200, 7, 3)) * 2
    repaired = np.asarray(genome.repair(genes))
    assert (repaired >= 0).all()
    np.testing.assert_allclose(repaired.sum(-1), 1, atol=1e-5)
    # The defining inequality of a projection: no other point of the simplex is nearer.
    others = np.random.default_rng(0).dirichlet(np.ones(3), (50, 1, 1))
    distance = np.square(np.asarray(genes) - repaired).sum(-1)
    assert (np.square(np.asarray(genes) - others).sum(-1) >= distance - 1e-4).all()
    np.testing.assert_array_equal(genome.repair(jnp.asarray(repaired)), repaired)
    corner = genome.repair(jnp.array([[1.7, -0.4, 0.1]]))
    assert corner.tolist() == [[1.0, 0.0, 0.0]]


def test_binary_repair_picks_the_largest():
    genome = genome_of(parents_of(3), "layer", binary=True)
    assert genome.repair(jnp.array([[0.2, 0.5, 0.3]])).tolist() == [[0.0, 1.0, 0.0]]


def test_frozen_leaves_and_whole_numbers_stay_with_parent_0():
    trees = [{"w": jnp.full(3, float(k)), "v": jnp.full(2, float(k)), "n": k} for k in range(2)]
    parents = stack_parents(trees)
    genome = masks(parents, granularity="leaf", freeze="^v$")
    assert genome.num_genes == 1
    mixed = genome.express(jnp.array([[0.0, 1.0]]), parents)
    assert mixed["w"].tolist() == [1, 1, 1]
    assert mixed["v"].tolist() == [0, 0]
    assert mixed["n"] == 0


def test_a_users_labels_may_be_a_prefix_and_freeze_single_elements():
    parents = stack_parents(
        [{"a": {"w": jnp.full((2, 3), float(k)), "b": jnp.zeros(3)}} for k in (0, 1)]
    )
    genome = masks(parents, labels={"a": np.array([0, FROZEN, 1])})
    assert genome.num_genes == 2
    mixed = genome.express(jnp.array([[0.0, 1.0], [0.25, 0.75]]), parents)
    assert mixed["a"]["w"].tolist() == [[1.0, 0.0, 0.75]] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "neuron"}, "genome.granularity is 'neuron': choose one of global"),
        ({"freeze": "nothing"}, "genome.freeze is 'nothing': it matches no leaf"),
        ({"freeze": "."}, "no leaf is left"),
        ({"freeze": "("}, "genome.freeze is '\\('"),
        ({"labels": {"w": 0.5}}, "labels of leaf w are float64"),
        ({"labels": {"w": np.zeros((2, 2), int)}}, "labels of leaf w have shape \\(2, 2\\)"),
        ({"labels": {"w": -2}}, "labels of leaf w go down to -2"),
        ({"labels": {"w": np.array([0, 0, 2])}}, "labels skip gene 1"),
        ({"labels": {"v": 0}}, "labels is no prefix"),
    ],
)
def test_choices_that_cannot_work_are_named(options, message):
    parents = stack_parents([{"w": jnp.zeros(3)}, {"w": jnp.ones(3)}])
    with pytest.raises(ConfigError, match=message):
        masks(parents, **options)


def test_half_precision_parents_are_mixed_in_float32():
    parents = stack_parents(
        [{"w": jnp.array([1.0], jnp.bfloat16)}, {"w": jnp.array([3.0], jnp.bfloat16)}]
    )
    genome = masks(parents, granularity="global")
    mixed = genome.express(jnp.array([[1 / 3, 2 / 3]]), parents)["w"]
    assert mixed.dtype == jnp.bfloat16
    assert mixed[0] == jnp.bfloat16(1 / 3 + 2)


def test_labels_number_all_elements_once_at_element_granularity():
    one = jax.tree.map(lambda leaf: leaf[0], parents_of(2))
    labels = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(mask_labels(one, "element"))])
    assert sorted(labels.tolist()) == list(range(NUM_GENES["element"]))


def test_parent_shares_are_element_weighted_means():
    parents = parents_of(2)
    genome = genome_of(parents, "leaf")
    genes = genome.sample(KEY, (8, 2), jnp.float32)
    shares = parent_shares(genome, genes, random_parent(0))
    assert set(shares) == {"conv", "norm", "head"}
    paths, labels = leaf_paths(genome.labels), jax.tree.leaves(genome.labels)
    of = {
        path: np.asarray(genes)[int(label.flat[0])]
        for path, label in zip(paths, labels, strict=True)
    }
    expected = (72 * of["params/conv/kernel"] + 4 * of["params/conv/bias"]) / 76
    np.testing.assert_allclose(shares["conv"], expected, rtol=1e-5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_channel_shares_are_what_is_expressed(granularity):
    """Every number of parent k is k, so that a network says which share of parent 1 is in it."""
    parents = stack_parents(
        [jax.tree.map(lambda leaf, k=k: 0 * leaf + k, random_parent(0)) for k in (0, 1)]
    )
    genome = genome_of(parents, granularity)
    genes = genome.sample(KEY, (genome.num_genes, 2), jnp.float32)
    network = genome.express(genes, parents)
    shares = channel_shares(genome, genes, random_parent(0))
    assert list(shares) == list(parent_shares(genome, genes, random_parent(0)))
    for name, expected in [
        ("conv", network["params"]["conv"]["kernel"].mean((0, 1, 2))),
        ("head", network["params"]["head"]["kernel"].mean(0)),
    ]:
        np.testing.assert_allclose(shares[name][:, 1], expected, atol=1e-6)
        np.testing.assert_allclose(shares[name].sum(1), 1, atol=1e-6)
    assert shares["norm"].shape == (4, 2)


@pytest.mark.parametrize("binary", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_search_finds_a_planted_mask(granularity, binary):
    """Every number of parent k is k, so that a network is its own mask."""
    parents = stack_parents(
        [jax.tree.map(lambda leaf, k=k: 0 * leaf + k, random_parent(0)) for k in (0, 1)]
    )
    genome = genome_of(parents, granularity, binary=binary)
    planted = genome.sample(jax.random.key(5), (genome.num_genes, 2), jnp.float32)
    target = genome.express(planted, parents)

    def evaluate(genes):
        def error(genes):
            differences = jax.tree.map(jnp.subtract, genome.express(genes, parents), target)
            return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(differences))

        return -jax.vmap(error)(genes), ()

    config = EvolutionConfig(population_size=64)
    ga = algorithm_for(genome, evaluate, config, binary=binary)
    state, _ = run(KEY, ga, ga.init(KEY, genome.init(KEY, 64)), 200, generations_per_chunk=200)
    miss = np.abs(np.asarray(state.best.genes - planted)).max(axis=-1)
    if binary:
        assert miss.max() == 0
    else:
        assert miss.mean() < 0.05, miss.mean()


@pytest.mark.parametrize("K", [2, 3, 8])
def test_the_nearest_point_of_the_simplex_is_optaxs(K):
    rng = np.random.default_rng(K)
    points = rng.normal(scale=2, size=(500, K)).astype(np.float32)
    points[:50] = np.round(points[:50])  # ties
    points[50:60] = 1 / K
    points[60:70] = np.eye(K)[rng.integers(K, size=10)]
    ours = np.stack(nearest_on_simplex(list(points.T)), axis=-1)
    expected = np.stack([projection_simplex(jnp.asarray(point)) for point in points])
    np.testing.assert_allclose(ours, expected, atol=2e-6)
    np.testing.assert_allclose(ours.sum(-1), 1, atol=2e-6)
    assert ours.min() >= 0
